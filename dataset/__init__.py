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


def check_data_sets(args) -> None:
    """Look the data sets of --dataset and --ood-datasets up, before anything is written for them.

    Raises:
        UsageError: one is unknown, its record breaks a rule, or two have one name.
    """
    DATASETS[args.dataset_type].check_shifted(args)


def build_dataset(args, accelerator) -> DatasetBase:
    """The data set that the flags name, tokenized and ready to be iterated."""
    return DATASETS[args.dataset_type](args, accelerator)
