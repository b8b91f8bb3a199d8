"""Data sets: rows of a task, made into batches that every method takes.

`DATASETS` maps --dataset-type to a class. A data set itself is one `Task` record in `tasks.py`, or
a record in a user's own file (`--dataset path/to/file.py:NAME`).
"""

from dataset.base import DatasetBase
from dataset.multiple_choice import MultipleChoice
from dataset.sequence_classification import SequenceClassification

DATASETS: dict[str, type[DatasetBase]] = {
    "mcdataset": MultipleChoice,
    "bertds": SequenceClassification,
}


def build_dataset(args, accelerator) -> DatasetBase:
    """The data set that the flags name, tokenized and ready to be iterated."""
    return DATASETS[args.dataset_type](args, accelerator)
