"""A table of a user's own as a task: rows of a file, classes from its labels, prompts of its cells.

    args -> table_task -> Task           of --dataset my.csv --text-column A --label-column L
    TableTask -> task_of -> Task         of a posterior's record, for new rows

A cell is data. Templates are filled in once, so that nothing in a cell is taken for a placeholder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.columns import checked_text
from dataset.files import Row, read_rows
from dataset.record import NAME_RULE, Prompt, Task, checked_task, is_name
from utils.data_set_names import data_set_name, is_table, split_noise
from utils.errors import UsageError, quoted
from utils.logging import logger, notice_once
from utils.registry import did_you_mean
from utils.table_task import MOST_CLASSES, Piece, TableTask, columns_of, pieces_of

VALIDATION_SHARE = 0.2  # of the rows, where there is no --val-file
LONGEST_CLASS = 100  # characters of a class's name
# More classes than this are believed where they have two rows each, on average.
FEW_CLASSES = 10
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


# --- from the flags to a task ---------------------------------------------------------------------


def table_task(args, name: str, flag: str, source: Task | None = None) -> Task:
    """The task of a table: the data set of a run, or rows that a run's posterior is evaluated on.

    The latter are all evaluated. The former are divided (`Table`), unless there is a --val-file.

    Args:
        args: flags; those about columns hold for every table of the run.
        name: the path.
        flag: that names it: --dataset, --ood-datasets, ...
        source: the data set whose answers the adapter gives, where it is another one.
    Raises:
        UsageError: the file cannot be read, a row is broken, or its labels are no classes, or
            others than those of `source`.
    """
    stem = data_set_name(name)
    if not is_name(stem):
        raise UsageError(
            f"{flag} {quoted(name)}: a table is called after its file without the ending, "
            f"{quoted(stem)}, which must be {NAME_RULE}; rename the file."
        )
    columns = _Columns(args.text_column, args.label_column, args.prompt)
    rows = list(columns.read(name, flag))
    choices, words = _answers(args, rows, columns.label_column, flag, source)
    record = TableTask(
        name=stem,
        text_columns=list(args.text_column),
        label_column=args.label_column,
        prompt=args.prompt,
        choices=choices,
        answer_words=words,
    )
    if flag != "--dataset":
        return task_of(record, args.dataset_type, Table(record, rows, divided=False))
    files = {"validation": args.val_file, "test": args.test_file}
    files = {split: file for split, file in files.items() if file is not None}
    table = Table(record, rows, args.val_file is None, args.seed_split, files)
    return task_of(record, args.dataset_type, table)


def task_of(record: TableTask, dataset_type: str, source: Table | None = None) -> Task:
    """The task that a record describes.

    Args:
        record: of a table.
        dataset_type: mcdataset for prompts of a causal LM, bertds for a classifier's sentences.
        source: of its rows; None where somebody else has them. Then `Task.prompt` takes a row with
            the columns `record.columns`, with or without its label.
    Raises:
        UsageError: its name can be no data set's.
    """
    if source is None or not source.is_whole:
        splits = {"train": "train", "val": "validation"}
        splits |= {"test": "test"} if source is not None and "test" in source.files else {}
    else:
        splits = dict.fromkeys(("train", "val", "test"), "rows")  # --num-shots takes some of them
    task = Task(
        name=record.name,
        source=source,
        splits=splits,
        columns=(*record.columns, record.label_column),
        choices=record.answers,
        prompt=_prompt_of(record) if dataset_type == "mcdataset" else _sentences_of(record),
        label=_label_of(record),
        # no row of the data: the example goes where the adapter goes
        example=dict.fromkeys(record.columns, "...") | {record.label_column: record.choices[0]},
        text_columns=tuple(record.text_columns),
        table=record,
    )
    return checked_task(task, record.name)


def check_tables(args) -> None:
    """Look at the first row of each table that the flags name, before anything slow is imported.

    Raises:
        UsageError: a file cannot be read, or its first row lacks a column.
    """
    if not is_table(args.dataset):
        return
    columns = _Columns(args.text_column, args.label_column, args.prompt)
    named = [("--dataset", args.dataset), ("--val-file", args.val_file)]
    named += [("--test-file", args.test_file), ("--ood-ori-dataset", args.ood_ori_dataset)]
    named += [("--ood-datasets", split_noise(name).base) for name in args.ood_datasets or ()]
    for flag, name in named:
        if is_table(name):
            next(columns.read(name, flag))


def _answers(
    args, rows: list[tuple[str, Row]], label_column: str, flag: str, source: Task | None
) -> tuple[list[str], list[str] | None]:
    """The classes of a table and its answer words, or those of `source` if it has all of them."""
    first = {}  # class -> where it stands first
    for where, row in rows:
        first.setdefault(row[label_column], where)
    if source is not None:
        choices = source.table.choices if source.table is not None else list(source.choices)
        unknown = [label for label in first if label not in choices]
        if not unknown:
            return choices, source.table.answer_words if source.table is not None else None
        if flag == "--ood-datasets" or args.dataset_type == "bertds":
            raise UsageError(_unknown_label(first[unknown[0]], unknown[0], choices, source.name))
        logger.info("%s has other classes than %s: its own are read.", rows[0][0], source.name)
    choices = classes_of([row[label_column] for _, row in rows], rows[0][0])
    words = args.answer_words
    if words is not None and len(words) != len(choices):
        raise UsageError(
            f"--answer-words has {len(words)} words, but the {len(choices)} classes of "
            f"{data_set_name(args.dataset)} need one each, in this order: "
            f"{quoted(', '.join(choices), 400)}."
        )
    return choices, words


def _unknown_label(where: str, label: str, choices: Sequence[str], name: str) -> str:
    return (
        f"{where}: the label {quoted(label)} is none of the classes of {name}"
        f"{did_you_mean(label, choices)} They are {quoted(', '.join(choices), 400)}."
    )


def classes_of(labels: Sequence[str], where: str) -> list[str]:
    """The classes that labels name, in label order: sorted, by value if all of them are numbers.

    Args:
        labels: of all rows.
        where: the first row, for messages.
    Raises:
        UsageError: one class only, or so many that they look like free text or a regression.
    """
    classes = set(labels)
    told = f"{where} and on: --label-column"
    if len(classes) < 2:
        raise UsageError(
            f"{told} has {quoted(labels[0])} in all {len(labels)} rows; there must be at least two "
            "classes to tell apart."
        )
    if len(classes) > MOST_CLASSES or len(classes) > max(FEW_CLASSES, len(labels) // 2):
        raise UsageError(
            f"{told} has {len(classes)} different values in {len(labels)} rows, such as "
            f"{quoted(labels[0])}; that looks like free text or like a regression, and labels must "
            f"be classes (at most {MOST_CLASSES}, with several rows each)."
        )
    if all(_NUMBER.fullmatch(label) for label in classes):
        return sorted(classes, key=lambda label: (float(label), label))
    return sorted(classes)


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """What is read of every table of a run."""

    text_columns: Sequence[str]
    label_column: str
    prompt: str | None

    def read(self, file: str, flag: str) -> Iterator[tuple[str, Row]]:
        """(where, row) of a table; a row has the needed cells only, each as text.

        Raises:
            UsageError: a row has not the columns, no text or no label, or there are no rows.
        """
        is_empty = True
        for where, row in read_rows(_path_of(file, flag), flag):
            is_empty = False
            try:
                cells = cells_of(row, columns_of(self.text_columns, self.prompt))
                check_text(cells, self.text_columns)
                cells[self.label_column] = label_in(row, self.label_column)
            except ValueError as error:
                raise UsageError(f"{where}: {error}") from None
            yield where, cells
        if is_empty:
            raise UsageError(f"{flag}: {file} has no rows; it needs at least one.")


@dataclass(frozen=True, eq=False)
class Table:
    """The source of a table's rows.

    A row's side in the division depends on its text and the seed only: it keeps it whatever other
    rows there are, in whatever order, and rows of the same text are on the same side.

    Attributes:
        record: what the table asks.
        own: (where, row) of the table itself.
        divided: whether a part of it is the split "validation".
        seed: of the division.
        files: split -> a further table that has its rows.
    """

    record: TableTask
    own: list[tuple[str, Row]] = field(repr=False)
    divided: bool = True
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it has one split, of all rows."""
        return not (self.divided or self.files)

    def rows(self, split: str) -> list[tuple[str, Row]]:
        """(where, row) of "train", "validation" or "test"; of a whole table of "rows".

        Raises:
            UsageError: the division leaves nothing on a side, or a row of a further file is broken.
        """
        if split in self.files:
            return self._of_file(split)
        if not self.divided:
            return self.own
        sides = {"train": [], "validation": []}
        for where, row in self.own:
            sides["validation" if self._is_validation(row) else "train"].append((where, row))
        for side, rows in sides.items():
            if not rows:
                raise UsageError(
                    f"its {len(self.own)} rows leave none for the split {side}: about "
                    f"{VALIDATION_SHARE:.0%} are taken for validation, by what they say, and there "
                    "are too few rows for that. Pass --val-file, or another --seed-split."
                )
        return sides[split]

    def _of_file(self, split: str) -> list[tuple[str, Row]]:
        flag = {"validation": "--val-file", "test": "--test-file"}[split]
        record = self.record
        columns = _Columns(record.text_columns, record.label_column, record.prompt)
        rows = list(columns.read(self.files[split], flag))
        for where, row in rows:
            label = row[record.label_column]
            if label not in record.choices:
                raise UsageError(_unknown_label(where, label, record.choices, record.name))
        trained = {self._text(row) for _, row in self.rows("train")}
        if number := sum(self._text(row) in trained for _, row in rows):
            notice_once(
                f"{flag}: {number} of {len(rows)} rows say the same as a training row; what is "
                "measured on them is too good."
            )
        return rows

    def _text(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in self.record.text_columns)

    def _is_validation(self, row: Row) -> bool:
        return self._place([self.seed, *self._text(row)]) < VALIDATION_SHARE

    def place(self, row: Row, division: str) -> float:
        """A number in [0, 1) that says on which side of a further division a row's text stands."""
        return self._place([division, self.seed, *self._text(row)])

    @staticmethod
    def _place(content: list[Any]) -> float:
        # SHA-256: the same on every machine, and in every version of Python
        digest = hashlib.sha256(json.dumps(content).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def _path_of(file: str, flag: str) -> Path:
    path = Path(file)
    if file.startswith("~") and not path.exists():
        raise UsageError(
            f"{flag}: there is no file {quoted(file)}; a shell replaces ~ only where a word begins "
            "with it: leave a space before it, no = and no quotes."
        )
    return path


def cell_text(value: Any) -> str:
    """A cell as text: "" for none, numbers and booleans as JSON has them; 2.0 is 2.

    Raises:
        ValueError: it is a list, an object or of some other type, or no valid text.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value) if isinstance(value, int) else checked_text(value, "a cell")


def cells_of(row: Row, columns: Sequence[str]) -> dict[str, str]:
    """The cells of these columns, as text.

    Raises:
        ValueError: there is no such column, or no text in it.
    """
    cells = {}
    for column in columns:
        if column not in row:
            raise ValueError(
                f"there is no column {quoted(column)}{did_you_mean(column, row)} The row has "
                f"{quoted(', '.join(row), 400)}."
            )
        try:
            cells[column] = cell_text(row[column])
        except ValueError as error:
            raise ValueError(f"column {quoted(column)}: {error}") from None
    return cells


def check_text(cells: Mapping[str, str], text_columns: Sequence[str]) -> None:
    """Whether there is something to read: one of a pair may be empty.

    Raises:
        ValueError: there is not.
    """
    if not any(cells[column].strip() for column in text_columns):
        raise ValueError(f"there is no text in {quoted(', '.join(text_columns))}")


def label_in(row: Row, column: str) -> str:
    """The class that a row's label names; white space around it does not count.

    Raises:
        ValueError: there is no label, or what is there can be no class.
    """
    label = cells_of(row, [column])[column].strip()
    if not label:
        raise ValueError(
            f"the label is missing (column {quoted(column)}); label the row, or leave it out"
        )
    if len(label) > LONGEST_CLASS or not label.isprintable():
        raise ValueError(
            f"the label {quoted(label)} (column {quoted(column)}) looks like free text; a class is "
            f"named on one line, by at most {LONGEST_CLASS} printable characters"
        )
    return label


# --- from a row to what a model reads -------------------------------------------------------------


def _pieces(record: TableTask) -> tuple[Piece, ...]:
    """The parts of the template; of the default one where the record has none."""
    if record.prompt is not None:
        return pieces_of(record.prompt)
    answers = ", ".join(record.answers)
    pieces = [Piece(f"Choose the {record.label_column}: {answers}.\n\n")]
    for column in record.text_columns:
        pieces += [Piece(f"{column}: "), Piece(column, is_column=True), Piece("\n")]
    # The answer follows the colon with a space, as `MultipleChoice` reads it.
    return (*pieces, Piece(f"{record.label_column}:"))


def _prompt_of(record: TableTask):
    """Row -> `Prompt`, whose context is the first text column's text, where it stands first."""
    pieces = _pieces(record)
    first = pieces.index(Piece(record.text_columns[0], is_column=True))

    def prompt(row: Row) -> Prompt:
        cells = _readable(row, record)
        texts = [cells[piece.text] if piece.is_column else piece.text for piece in pieces]
        return Prompt("".join(texts[:first]), texts[first], "".join(texts[first + 1 :]))

    return prompt


def _sentences_of(record: TableTask):
    """Row -> the text columns as sentences, or the filled-in template as one."""
    pieces = pieces_of(record.prompt) if record.prompt is not None else None

    def sentences(row: Row) -> tuple[str, ...]:
        cells = _readable(row, record)
        if pieces is None:
            return tuple(cells[column] for column in record.text_columns)
        return ("".join(cells[p.text] if p.is_column else p.text for p in pieces),)

    return sentences


def _readable(row: Row, record: TableTask) -> dict[str, str]:
    cells = cells_of(row, record.columns)
    check_text(cells, record.text_columns)
    return cells


def _label_of(record: TableTask):
    """Row -> the position of its class."""

    def label(row: Row) -> int:
        name = label_in(row, record.label_column)
        if name not in record.choices:
            raise ValueError(f"the label {quoted(name)} is no class of {record.name}")
        return record.choices.index(name)

    return label
