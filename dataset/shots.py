"""Few-shot prompts (--num-shots): solved examples that stand in front of every row's prompt.

They are the same for all rows of a task, whichever split is read, so all prompts share a beginning.
They come from the task's split "shots", where its record has one, else from its training split. No
row that serves as one is trained on, held out, an anchor or evaluated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from dataset.record import Task
from dataset.tasks import find_task
from utils.data_set_names import is_table, split_noise
from utils.errors import UsageError, quoted
from utils.records import LONGEST_SHOTS

BOUNDARY = "\n\n"  # after each solved example


class Shots(NamedTuple):
    """The solved examples of a task.

    Attributes:
        text: that every prompt begins with; a blank line is its end. Empty if there are none.
        tokens: that every prompt begins with: those of `text` up to its last blank line.
        split: the source's name of the split that they are rows of.
        rows: their positions in it.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    split: str | None = None
    rows: frozenset[int] = frozenset()


NO_SHOTS = Shots()


def split_of_shots(task: Task, number: int) -> str:
    """The key in `task.splits` of the rows that serve as solved examples.

    Raises:
        UsageError: the task has neither a split "shots" nor one to train on.
    """
    for key in ("shots", "train"):
        if key in task.splits:
            return key
    raise UsageError(
        f"--num-shots {number}: solved examples are rows of a task's split 'shots' or 'train', and "
        f"{task.name} has neither (its splits: {', '.join(task.splits)}); drop --num-shots, choose "
        "another data set, or name such a split in its record."
    )


def check_shots(args, tasks: Mapping[str, Task]) -> None:
    """Whether --dataset and all of --ood-datasets have rows that --num-shots can take.

    Raises:
        UsageError: one has none.
    """
    if args.num_shots:
        for name in (args.dataset, *(args.ood_datasets or ())):
            name = split_noise(name).base
            if is_table(name):  # any of its rows can be one
                continue
            split_of_shots(find_task(name, tasks), args.num_shots)


def check_number(number: int, task: Task, key: str, num_rows: int, least_left: int) -> None:
    """Whether a split has rows enough.

    Args:
        number: of the solved examples.
        task: that they are of.
        key: of the split, in `task.splits`.
        num_rows: that the split has, after --limit-train.
        least_left: how many rows others need of it.
    Raises:
        UsageError: it has too few.
    """
    if number + least_left > num_rows:
        others = ", and one at least must be left to train on" if least_left else ""
        raise UsageError(
            f"--num-shots {number}: {task.name} gives {num_rows} rows of its split "
            f"{quoted(task.splits[key])}{others}; pass a smaller --num-shots, or give it more rows "
            "(--limit-train limits those of a training split)."
        )


def check_length(text: str) -> None:
    """Whether a posterior's record can hold the solved examples.

    Raises:
        UsageError: they are too long.
    """
    if len(text) > LONGEST_SHOTS:
        raise UsageError(
            f"--num-shots: the solved examples have {len(text)} characters, and a posterior's "
            f"record takes {LONGEST_SHOTS}; pass a smaller number."
        )


def in_turns(order: Sequence[int], groups: Sequence[Hashable]) -> list[int]:
    """`order`, rearranged so that groups take turns: the first of each, then the second of each.

    Args:
        order: positions.
        groups: the group of each position.
    """
    seen: Counter[Hashable] = Counter()
    turn = {}
    for position in order:
        turn[position] = seen[groups[position]]
        seen[groups[position]] += 1
    return sorted(order, key=turn.__getitem__)


def common_beginning(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The tokens that two lists both begin with."""
    number = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return tuple(first[:number])
