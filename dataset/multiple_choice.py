"""Multiple choice for causal LMs: the answer is read from the next token after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dataset.base import DatasetBase, Example
from dataset.batches import seeded_order
from dataset.columns import checked_text
from dataset.record import Prompt
from dataset.shots import (
    BOUNDARY,
    NO_SHOTS,
    Shots,
    check_length,
    check_number,
    common_beginning,
    in_turns,
    split_of_shots,
)
from dataset.sources import Row
from dataset.tasks import MULTIPLE_CHOICE_TASKS
from utils.errors import UsageError, quoted
from utils.registry import users_code


class MultipleChoice(DatasetBase):
    """Prompts ending in "Answer:"; classes are the answer tokens of the task's choices."""

    tasks = MULTIPLE_CHOICE_TASKS
    padding_side = "left"
    target_ids_are_tokens = True

    def __init__(self, args, accelerator, tokenizer=None, name=None, task=None) -> None:
        super().__init__(args, accelerator, tokenizer, name, task)
        self._target_ids = torch.tensor(self._answer_tokens())

    @property
    def target_ids(self) -> Tensor:
        """(C,) answer tokens, in label order."""
        return self._target_ids

    def _answer_tokens(self) -> list[int]:
        """One token per answer word, as it follows the prompt.

        A prompt ends in a colon, so the answer is written with a space before it. Tokenizers of the
        SentencePiece kind (Llama-2, Mistral) put that space on by themselves, byte-level ones
        (Llama-3, Qwen, SmolLM2) need it spelled out: the form that gives one token is taken.

        Raises:
            UsageError: an answer is not one token, or two answers are the same token.
        """
        tokens = {}
        for word in self.task.choices:
            encoded = [
                self.tokenizer(form, add_special_tokens=False).input_ids
                for form in (f" {word}", word)
            ]
            single = [ids[0] for ids in encoded if len(ids) == 1]
            unknown = self.tokenizer.unk_token_id
            if not single or single[0] == unknown:
                raise UsageError(
                    f"the answer '{word}' of {self.task.name} is not one token of "
                    f"{self.args.model}'s tokenizer (it gives {encoded[0]}); multiple choice needs "
                    f"answers of one token each: {self._other_words}, or another model."
                )
            tokens[word] = single[0]
        if len(set(tokens.values())) < len(tokens):
            raise UsageError(
                f"two answers of {self.task.name} are the same token of {self.args.model}'s "
                f"tokenizer: {tokens}; they cannot be told apart."
            )
        return list(tokens.values())

    @property
    def _other_words(self) -> str:
        """What can be done about answers that are no tokens."""
        if self.task.table is None:
            return "choose other words in the task"
        classes = ", ".join(self.task.table.choices)
        return (
            f"pass --answer-words, one for each class in this order: {quoted(classes, 400)}; or "
            "train a classifier, whose classes may have any names (--dataset-type bertds)"
        )

    @cached_property
    def shots(self) -> Shots:
        """--num-shots solved rows, the same before every prompt of the task.

        Of a training split, classes take turns in an order that depends on --seed-split only. A
        split "shots" is somebody's choice already: its first rows are taken, and where it has a
        column `subject` (MMLU's five rows of each), the subjects take turns. A shifted data set
        is not trained on, so --limit-train is not about its rows.

        Raises:
            UsageError: too few rows, or examples that are too long.
        """
        number = self.args.num_shots
        if not number:
            return NO_SHOTS
        key = split_of_shots(self.task, number)
        splits = self.task.splits
        is_trained_on = not self.is_shifted and splits[key] == splits.get("train")
        rows = list(self.rows_of(key, self.args.limit_train if is_trained_on else 0))
        check_number(number, self.task, key, len(rows), least_left=int(is_trained_on))
        if key == "train":
            order = seeded_order(len(rows), "shots", self.args.seed_split)
            chosen = in_turns(order, [self.label_of(row, where) for where, row in rows])[:number]
        else:
            subjects = [str(row.get("subject")) for _, row in rows]
            chosen = in_turns(range(len(rows)), subjects)[:number]
        solved = BOUNDARY.join(self._solved(*rows[i]) for i in chosen)
        check_length(solved + BOUNDARY)
        return self._as_shots(solved, splits[key], frozenset(chosen))

    def _as_shots(self, solved: str, split: str, rows: frozenset[int]) -> Shots:
        # the last example's last token may depend on whether anything follows
        followed = self.tokenizer(f"{solved}{BOUNDARY}A").input_ids
        tokens = common_beginning(self.tokenizer(solved).input_ids, followed)
        return Shots(text=solved + BOUNDARY, tokens=tokens, split=split, rows=rows)

    def take_shots(self, text: str) -> None:
        """See `DatasetBase`; the rows that the examples were made of are not looked for."""
        solved = text.removesuffix(BOUNDARY)
        self.shots = self._as_shots(solved, "", frozenset()) if solved else NO_SHOTS

    def answer_as(self, choices: Sequence[str]) -> None:
        """See `DatasetBase`; the answers' tokens follow."""
        super().answer_as(choices)
        self._target_ids = torch.tensor(self._answer_tokens())

    def _solved(self, where: str, row: Row) -> str:
        """A row's prompt and its answer."""
        with users_code(lambda: self.cannot_read(row, where)):
            prompt = self._prompt(row)
        text = f"{''.join(prompt)} {self.task.choices[self.label_of(row, where)]}"
        number, (most, reason) = len(self.tokenizer(text).input_ids), self.limit
        if number > most:
            raise UsageError(
                f"{where}: the row serves as a solved example (--num-shots) and alone has {number} "
                f"tokens, {reason}; an example is never cut: raise --max-seq-len, choose a model "
                "that reads more, choose others by --seed-split, or drop --num-shots."
            )
        return text

    def encode(self, row: Row) -> tuple[Example, bool]:
        """Tokens of the prompt. One that is too long loses the end of its context, nothing else."""
        head, context, tail = self._prompt(row)
        head = self.shots.text + head
        ids = self._tokenize(head + context + tail)
        most, reason = self.limit
        cut = len(ids) > most
        while len(ids) > most:
            words = self.tokenizer(context, add_special_tokens=False).input_ids
            if not words:
                raise UsageError(self._too_long(len(ids), reason))
            # Joined again, the pieces may tokenize to another length: hence the loop.
            keep = max(0, len(words) - (len(ids) - most))
            shorter = self.tokenizer.decode(words[:keep], skip_special_tokens=True)
            context = shorter if len(shorter) < len(context) else context[:-1]
            ids = self._tokenize(head + context + tail)
        if tuple(ids[: len(self.shots.tokens)]) != self.shots.tokens:
            raise UsageError(
                "the tokenizer joins the row's text with the solved examples before it, but all "
                "prompts must begin with the same tokens: drop --num-shots, or let the task's "
                "prompt begin with a word"
            )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}, cut

    def _too_long(self, number: int, reason: str) -> str:
        remedy = "raise --max-seq-len, choose a model that reads more, or leave the row out."
        if self.args.num_shots:
            return (
                f"the question and the solved examples before it (--num-shots "
                f"{self.args.num_shots}) have {number} tokens, {reason}; neither is ever cut: pass "
                f"a smaller --num-shots, {remedy}"
            )
        return (
            f"the question alone has {number} tokens, {reason}; a question is never cut: {remedy}"
        )

    def _prompt(self, row: Row) -> Prompt:
        prompt = self.task.prompt(row)
        if not isinstance(prompt, Prompt):
            raise TypeError(
                f"the task's prompt gives {quoted(prompt)}; a causal LM reads a Prompt(head, "
                "context, tail), sentences are for --dataset-type bertds"
            )
        for name, part in zip(Prompt._fields, prompt, strict=True):
            checked_text(part, f"the prompt's {name}")
        return prompt

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        if self.args.append_eos and self.task.eos_published:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids
