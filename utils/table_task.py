"""A table of a user's own as a task: its record, the template of its prompts, its flags' rules.

    --dataset reviews.csv --text-column review --label-column sentiment [--prompt "{review} Is it:"]

The record is pure data. It is part of bayes_config.json, so what it says is checked wherever it is
made or read. `dataset.tables` makes prompts of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field, StringConstraints, model_validator

from utils.data_set_names import SUFFIXES, is_table, same_data_set, split_noise
from utils.errors import UsageError, quoted
from utils.flags import spelling
from utils.records import Record

MOST_CLASSES = 200
# Flags that say something of a table, in the order in which messages look at them.
COLUMN_FLAGS = ("text_column", "label_column", "prompt", "answer_words")
FILE_FLAGS = ("val_file", "test_file")


# --- templates ------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a template: text as it is, or the name of a column."""

    text: str
    is_column: bool = False


# An escape, a placeholder, a line break, or a brace that is neither.
_MARKS = re.compile(r"(?P<escape>\{\{|\}\})|\{(?P<column>[^{}]+)\}|(?P<line>\\n)|(?P<brace>[{}])")


def pieces_of(template: str) -> tuple[Piece, ...]:
    r"""The parts of a --prompt, in order.

    `{column}` stands for a cell and for nothing else: there are no attributes, indices or formats.
    `{{` and `}}` are braces, and the two characters `\n` are a line break.

    Raises:
        ValueError: a brace that belongs to no placeholder.
    """
    pieces: list[Piece] = []
    text, position = "", 0
    for mark in _MARKS.finditer(template):
        text += template[position : mark.start()]
        position = mark.end()
        if mark["brace"]:
            raise ValueError(
                f"the brace at character {mark.start() + 1} of {quoted(template)} belongs to no "
                "{column}; a brace that is text is written {{ or }}"
            )
        if mark["column"] is None:
            text += "\n" if mark["line"] else mark["escape"][0]
            continue
        pieces += [Piece(text), Piece(mark["column"], is_column=True)]
        text = ""
    return (*pieces, Piece(text + template[position:]))


# --- the record -----------------------------------------------------------------------------------


Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"\S")]
Words = Annotated[list[Text], Field(min_length=2, max_length=MOST_CLASSES)]


class TableTask(Record):
    """What a table of a user's own asks; with it alone, new rows become prompts.

    Attributes:
        name: of the data set: the file's name without its ending.
        text_columns: one, or two for pairs.
        label_column: whose cells name the classes.
        prompt: the template (`pieces_of`); None: the default one, or the columns as sentences.
        choices: the C classes, as they stand in the label column, in label order.
        answer_words: the C words that a causal LM answers with; None: the classes themselves.
    """

    name: Text
    text_columns: Annotated[list[Text], Field(min_length=1, max_length=2)]
    label_column: Text
    prompt: Text | None = None
    choices: Words
    answer_words: Words | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """What a prediction is called: the answer words, or else the classes."""
        return tuple(self.answer_words or self.choices)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row needs besides its label: the text columns first."""
        return columns_of(self.text_columns, self.prompt)

    @model_validator(mode="after")
    def _columns_and_answers_agree(self) -> TableTask:
        check_columns(self.text_columns, self.label_column, self.prompt)
        for name in ("choices", "answer_words"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"'{name}' has the same entry twice")
        if self.answer_words is not None and len(self.answer_words) != len(self.choices):
            raise ValueError(
                f"there are {len(self.answer_words)} answer words for {len(self.choices)} classes"
            )
        return self


def columns_of(text_columns: Sequence[str], prompt: str | None) -> tuple[str, ...]:
    """The columns that a row needs besides its label; see `TableTask.columns`."""
    named = [piece.text for piece in pieces_of(prompt or "") if piece.is_column]
    return tuple(dict.fromkeys([*text_columns, *named]))


def check_columns(text_columns: list[str], label_column: str, prompt: str | None) -> None:
    """Whether the columns and the template go together.

    Raises:
        ValueError: one column stands for two things, or the template leaves a text column out,
            names the label or has a brace too many.
    """
    if len(set(text_columns)) < len(text_columns):
        raise ValueError(f"the text column {quoted(text_columns[0])} is given twice")
    if label_column in text_columns:
        raise ValueError(f"the column {quoted(label_column)} is given as text and as label")
    if prompt is None:
        return
    named = {piece.text for piece in pieces_of(prompt) if piece.is_column}
    if label_column in named:
        raise ValueError(f"the prompt has the label in it: {{{label_column}}}")
    for column in text_columns:
        if column not in named:
            raise ValueError(f"the prompt has no {{{column}}}, so the text would not be read")


# --- the flags ------------------------------------------------------------------------------------


def check_table_flags(args) -> None:
    """Hold the flags of a table against each other and against --dataset.

    Raises:
        UsageError: one is given without a table or missing with one, or two contradict.
    """
    given = [f for f in (*COLUMN_FLAGS, *FILE_FLAGS) if getattr(args, f) is not None]
    if not is_table(args.dataset):
        _check_no_table(args, given)
        return
    told = f"--dataset {quoted(args.dataset)} is a table"
    missing = [spelling(f) for f in ("text_column", "label_column") if getattr(args, f) is None]
    if missing:
        raise UsageError(
            f"{told}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            "the names of the column with the text (or two of them) and of the one with the label."
        )
    if args.data_dir is not None:
        raise UsageError(
            f"{told} of rows, and --data-dir {quoted(args.data_dir)} is where the rows of a named "
            "data set are: pass one of them (--val-file and --test-file name further tables)."
        )
    if len(args.text_column) > 2:
        raise UsageError(
            f"--text-column takes one column, or two for pairs, but got {len(args.text_column)}; "
            "a causal LM reads further ones as {column} in --prompt."
        )
    try:
        check_columns(args.text_column, args.label_column, args.prompt)
    except ValueError as error:
        flags = "--text-column and --label-column" + (", --prompt" if args.prompt else "")
        raise UsageError(f"{flags}: {error}.") from None
    _check_kind(args)
    for name in FILE_FLAGS:
        file = getattr(args, name)
        if file is None:
            continue
        if not is_table(file):
            raise UsageError(
                f"{spelling(name)} {quoted(file)}: it must be a table, which ends in one of "
                f"{', '.join(SUFFIXES)}."
            )
        if same_data_set(file, args.dataset):
            raise UsageError(
                f"{spelling(name)} {quoted(file)} is --dataset itself: rows that were trained on "
                "would be evaluated. Pass another file"
                + (
                    ", or drop it: a part of --dataset is kept out of training."
                    if name == "val_file"
                    else "."
                )
            )
    if args.testing_set == "test" and args.test_file is None:
        raise UsageError(
            f"--testing-set test evaluates --test-file, which is missing, and {told}; pass both, "
            "or neither."
        )


def check_kept_split(args, trained: Mapping[str, Any]) -> None:
    """Whether the rows that are evaluated are rows that the loaded adapter was not trained on.

    Args:
        args: all flags.
        trained: those of the run that trained the adapter, as far as they are known.
    Raises:
        UsageError: a table would be divided otherwise than for the adapter's training.
    """
    is_same = is_table(args.dataset) and same_data_set(args.dataset, trained.get("dataset"))
    if not is_same or args.val_file is not None:
        return
    for name in ("seed_split", "text_column"):
        if name in trained and getattr(args, name) != trained[name]:
            raise UsageError(
                f"{spelling(name)} is {quoted(getattr(args, name))}, but the adapter in "
                f"{args.load_lora_path} was trained with {quoted(trained[name])}: other rows of "
                f"{args.dataset} would be evaluated than those that it was not trained on. Drop "
                "it, or evaluate another file (--val-file)."
            )


def _check_no_table(args, given: list[str]) -> None:
    if given:
        flag = spelling(given[0])
        raise UsageError(
            f"{flag} is about a table as data set, but --dataset {quoted(args.dataset)} is none: "
            f"pass a file that ends in one of {', '.join(SUFFIXES)}, or drop {flag}."
        )
    tables = [("--ood-ori-dataset", args.ood_ori_dataset)]
    tables += [("--ood-datasets", name) for name in args.ood_datasets or ()]
    for flag, name in tables:
        if name is not None and is_table(split_noise(name).base):
            raise UsageError(
                f"{flag} {quoted(name)} is a table, which is read by the columns that are given "
                f"for the table in --dataset; but --dataset {quoted(args.dataset)} is none."
            )


def _check_kind(args) -> None:
    """What a causal LM's prompts need, and a classifier has no use for."""
    if args.dataset_type == "bertds":
        if args.answer_words is not None:
            raise UsageError(
                "--answer-words are what a causal LM answers with, but --dataset-type bertds "
                "trains a classifier, which needs none; drop one of them."
            )
        return
    words = args.answer_words or ()
    if len(set(words)) < len(words):
        raise UsageError(
            f"--answer-words {quoted(' '.join(words))}: two classes cannot have the same word."
        )
    last = pieces_of(args.prompt)[-1].text if args.prompt is not None else ""
    if last != last.rstrip():
        raise UsageError(
            f"--prompt ends in white space ({quoted(last[-20:])}), but the answer follows with a "
            "space of its own; let it end in a colon, for example."
        )
    if args.ood_ori_dataset and not is_table(args.ood_ori_dataset) and args.answer_words:
        raise UsageError(
            f"--ood-ori-dataset {quoted(args.ood_ori_dataset)} says what the answers are, and so "
            "do --answer-words; drop one of them."
        )
