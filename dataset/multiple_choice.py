"""Multiple choice for causal LMs: the answer is read from the next token after the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dataset.base import DatasetBase, Example
from dataset.sources import Row
from dataset.tasks import MULTIPLE_CHOICE_TASKS, Prompt, checked_text
from utils.errors import UsageError, quoted


class MultipleChoice(DatasetBase):
    """Prompts ending in "Answer:"; classes are the answer tokens of the task's choices."""

    tasks = MULTIPLE_CHOICE_TASKS
    padding_side = "left"
    target_ids_are_tokens = True

    def __init__(self, args, accelerator, tokenizer=None, name=None) -> None:
        super().__init__(args, accelerator, tokenizer, name)
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
                    "answers of one token each: choose other words in the task, or another model."
                )
            tokens[word] = single[0]
        if len(set(tokens.values())) < len(tokens):
            raise UsageError(
                f"two answers of {self.task.name} are the same token of {self.args.model}'s "
                f"tokenizer: {tokens}; they cannot be told apart."
            )
        return list(tokens.values())

    def encode(self, row: Row) -> tuple[Example, bool]:
        """Tokens of the prompt. One that is too long loses the end of its context, nothing else."""
        head, context, tail = self._prompt(row)
        ids = self._tokenize(head + context + tail)
        most, reason = self.limit
        cut = len(ids) > most
        while len(ids) > most:
            words = self.tokenizer(context, add_special_tokens=False).input_ids
            if not words:
                raise UsageError(
                    f"the question alone has {len(ids)} tokens, {reason}; a question is never cut: "
                    "raise --max-seq-len, choose a model that reads more, or leave the row out."
                )
            # Joined again, the pieces may tokenize to another length: hence the loop.
            keep = max(0, len(words) - (len(ids) - most))
            shorter = self.tokenizer.decode(words[:keep], skip_special_tokens=True)
            context = shorter if len(shorter) < len(context) else context[:-1]
            ids = self._tokenize(head + context + tail)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}, cut

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
