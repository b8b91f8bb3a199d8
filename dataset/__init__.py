"""Data sets: rows of a task, made into batches that every method takes.

`DATASETS` maps --dataset-type to a class. A data set itself is one `Task` record in `tasks.py`, or
a record in a user's own file (`--dataset path/to/file.py:NAME`), or a table (`--dataset my.csv`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dataset.shots import check_shots
from dataset.tables import check_tables
from dataset.tasks import CLASSIFICATION_TASKS, MULTIPLE_CHOICE_TASKS, check_shifted
from utils.errors import UsageError
from utils.registry import LazyTable

if TYPE_CHECKING:
    from dataset.base import DatasetBase

DATASETS = LazyTable(
    {
        "mcdataset": "dataset.multiple_choice:MultipleChoice",
        "bertds": "dataset.sequence_classification:SequenceClassification",
    }
)
_TASKS = {"mcdataset": MULTIPLE_CHOICE_TASKS, "bertds": CLASSIFICATION_TASKS}
# The classes by their own names: `from dataset import MultipleChoice` imports that one, then.
_CLASSES = LazyTable(
    {
        "DatasetBase": "dataset.base:DatasetBase",
        "MultipleChoice": "dataset.multiple_choice:MultipleChoice",
        "SequenceClassification": "dataset.sequence_classification:SequenceClassification",
    }
)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_data_sets(args) -> None:
    """Look the data sets of --dataset and --ood-datasets up, before anything is loaded for them.

    Raises:
        UsageError: one is unknown, its record breaks a rule, two have one name, one has no rows
            for --num-shots, a table lacks a column, or --limit-ood has nothing to limit.
    """
    if args.limit_ood is not None and not args.ood_datasets:
        raise UsageError(
            f"--limit-ood {args.limit_ood} is about --ood-datasets, of which there are none; drop "
            "it, or pass --limit-eval."
        )
    check_shifted(args, _TASKS[args.dataset_type])
    check_shots(args, _TASKS[args.dataset_type])
    check_tables(args)


def build_dataset(args, accelerator) -> DatasetBase:
    """The data set that the flags name, tokenized and ready to be iterated."""
    return DATASETS[args.dataset_type](args, accelerator)
