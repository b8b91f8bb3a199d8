"""Rows to predict, with labels or without, as a task's examples: for a posterior that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dataset import DATASETS
from dataset.base import UNLABELLED, DatasetBase, Example
from dataset.record import Task
from dataset.sources import Row
from dataset.tables import task_of
from dataset.tasks import find_task
from utils.data_set_names import is_table
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.table_task import TableTask


class RowReader:
    """A task's way from a row to tokens, without the task's own rows.

    Args:
        dataset: of the task; nothing of its splits is read.

    Attributes:
        target_ids: (C,) answer tokens of a causal LM; None for a classifier.
        loader: examples -> this process's batches of them, the longest first.
        text_column: the one column that the prompt reads, where it reads one: rows may be given as
            its text alone. None where it reads several, or nobody knows.
        texts: columns that have text in them, whatever it looks like.
    """

    def __init__(self, dataset: DatasetBase) -> None:
        self._dataset = dataset
        self.target_ids: Tensor | None = dataset.target_ids
        self.loader = dataset.eval_loader
        columns = _columns_read(dataset.task)
        self.text_column = columns[0] if len(columns) == 1 else None
        example = dataset.task.example or {}
        self.texts = frozenset(key for key, value in example.items() if isinstance(value, str))

    def example(self, row: Row | str, where: str) -> Example:
        """Tokens of a row, and its label; `UNLABELLED` where the row does not say it.

        Args:
            row: its columns, or the text of `text_column`.
            where: it stands, for messages.
        Raises:
            UsageError: the row cannot be read: a column is missing, a label is none of the answers.
        """
        watched = _Watched(self._as_row(row, where))
        dataset = self._dataset
        try:
            example = dataset.encoded(watched, where)[0]
        except UsageError:
            self._check_columns(watched, where)
            raise
        watched.asked.clear()
        try:
            label = dataset.label_of(watched, where)
        except UsageError:
            # nothing stands where the label would be, or what GLUE writes for that
            if not any(_is_empty(watched, column) for column in watched.asked):
                raise
            label = UNLABELLED
        return example | {"labels": label}

    def _as_row(self, row: Row | str, where: str) -> Row:
        if isinstance(row, dict):
            return row
        if not isinstance(row, str):
            raise UsageError(f"{where}: a row is {quoted(row)}; it must be a dict of its columns.")
        if self.text_column is None:
            task = self._dataset.task
            raise UsageError(
                f"{where}: the row is text, but {task.name} reads several columns, or its record "
                f"has no example that tells ({', '.join(task.columns)}); give it as an object of "
                "its columns."
            )
        return {self.text_column: row}

    def _check_columns(self, row: _Watched, where: str) -> None:
        """Name the column that is missing, where that is why the row could not be read."""
        missing = [column for column in row.asked if _is_absent(row, column)]
        if missing:
            raise UsageError(
                f"{where}: column {quoted(missing[0])} is missing; {self._dataset.task.name} needs "
                f"it, the row has {quoted(', '.join(map(str, row)) or 'no column')}."
            )


class _Watched(dict):
    """A row that notes which of its columns are asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.asked: dict[str, None] = {}  # in their order

    def __getitem__(self, column: str) -> Any:
        self.asked[column] = None
        return super().__getitem__(column)

    def __contains__(self, column: object) -> bool:
        if isinstance(column, str):
            self.asked[column] = None
        return super().__contains__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.asked[column] = None
        return super().get(column, default)


def _is_absent(row: dict, column: str) -> bool:
    return dict.get(row, column) is None


def _is_empty(row: dict, column: str) -> bool:
    value = dict.get(row, column)
    if isinstance(value, str):
        return value.strip() in ("", str(UNLABELLED))
    return value is None or (isinstance(value, int) and value == UNLABELLED)


def _columns_read(task: Task) -> Sequence[str]:
    """The columns that a task's prompt asks for in its own example."""
    if not task.example:
        return ()
    row = _Watched(dict(task.example))
    try:
        task.prompt(row)
    except Exception:  # a user's own; whoever reads a row hears of it
        return ()
    return tuple(row.asked)


def reader_of(
    args,
    accelerator,
    choices: Sequence[str],
    shots: str = "",
    table: TableTask | None = None,
    example_tokens: Sequence[int] = (),
) -> RowReader:
    """How the rows of a saved posterior's task become tokens.

    Args:
        args: flags of the posterior: `dataset` names the task.
        accelerator: of this process.
        choices: the posterior's answers, in label order.
        shots: the solved examples in front of every prompt.
        table: what a user's own table asks, if the posterior was trained on one.
        example_tokens: of the task's own example when the posterior was trained; none: not known.
    Raises:
        UsageError: the task is unknown, or has other answers than the posterior.
    """
    kind = DATASETS[args.dataset_type]
    if is_table(args.dataset) and table is None:
        raise UsageError(
            f"the data set {quoted(args.dataset)} is a table, but the posterior's record does not "
            "say how its rows are read; name a task of that name, or FILE.py:NAME."
        )
    task = task_of(table, args.dataset_type) if table else find_task(args.dataset, kind.tasks)
    splits = [split for split in task.splits if split != "shots"]
    evaluated = args.testing_set if args.testing_set in splits else splits[0]
    args = args.replaced(testing_set=evaluated, ood_ori_dataset=None, ood_datasets=None)
    dataset = kind(args, accelerator, task=task)
    dataset.answer_as(choices)
    dataset.take_shots(shots)
    shown = dataset.shown_example() if example_tokens else None
    if shown is not None and list(shown["input_ids"]) != list(example_tokens):
        logger.warning(
            "The example of %s has other tokens than when this posterior was trained: its prompt "
            "or the tokenizer has changed since, and answers may be worse for it.",
            task.name,
        )
    return RowReader(dataset)
