"""How data sets are called: in flags, in folders, in the blocks of metrics.json.

flag                        block, and part of a file's name
bbc_headlines               bbc_headlines
FILE.py:NAME                NAME
reviews.csv                 reviews
bbc_unseen_topic:ood        bbc_unseen_topic-ood
any of them + ":noisy:3"    ... + "-noisy-3"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from utils.errors import UsageError, quoted
from utils.registry import names_code

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
STRENGTHS = (1, 2, 3, 4, 5)  # of errors in the text
_MARK = ":noisy"
_BLOCK = re.compile(
    rf"(?P<base>.+)-noisy-(?P<strength>[{STRENGTHS[0]}-{STRENGTHS[-1]}])", re.DOTALL
)


class Noisy(NamedTuple):
    """A data set and how strong the errors in its text are; None: there are none."""

    base: str
    strength: int | None


def is_table(name: str | None) -> bool:
    """Whether --dataset's value is the path of a table: its ending says so, in any case."""
    return name is not None and not names_code(name) and Path(name).suffix.lower() in SUFFIXES


def same_data_set(first: str | None, second: str | None) -> bool:
    """Whether two values of --dataset mean the same: two paths of a table may be spelled apart."""
    if is_table(first) and is_table(second):
        try:
            return Path(first).resolve() == Path(second).resolve()
        except (OSError, RuntimeError, ValueError):  # a link to itself, a NUL
            return first == second
    return first == second


def split_noise(name: str) -> Noisy:
    """The parts of `NAME:noisy:K`; any other name as it is.

    Raises:
        UsageError: no strength follows, one that does not exist, or there is no data set before it.
    """
    whole = Noisy(name, None)
    base, mark, rest = name.rpartition(_MARK)
    if is_table(name) or not mark or rest[:1] not in ("", ":"):
        return whole
    if not rest and names_code(name) and not names_code(base):
        return whole  # a record that is called so, in a user's file
    if not base:
        raise UsageError(f"{quoted(name)}: no data set stands before {_MARK}.")
    if _MARK + ":" in base + ":":
        raise UsageError(f"{quoted(name)}: errors are put into a text once; name one strength.")
    strength = rest[1:]
    if strength not in map(str, STRENGTHS):
        raise UsageError(
            f"{quoted(name)}: the strength of the errors is {quoted(strength)}; it must be one of "
            f"{', '.join(map(str, STRENGTHS))}, as in {base[:60]}{_MARK}:3."
        )
    return Noisy(base, int(strength))


def data_set_name(dataset: str) -> str:
    """What a run's folder and files call its data set.

    Args:
        dataset: as in --dataset or --ood-datasets: a name, FILE.py:NAME, or the path of a table,
            which is called after its file without the ending; each with or without `:noisy:K`.
    Raises:
        UsageError: its strength of errors is none.
    """
    base, strength = split_noise(dataset)
    if is_table(base):
        name = Path(base).stem
    else:
        name = base.rpartition(":")[2] if names_code(base) else base.replace(":", "-")
    return name if strength is None else noisy_block(name, strength)


def noisy_block(base: str, strength: int) -> str:
    """The block of a data set with errors in its text, from that of the data set as it is."""
    return f"{base}-noisy-{strength}"


def noise_of_block(block: str) -> Noisy:
    """The parts of what `noisy_block` gives; any other block's name as it is."""
    match = _BLOCK.fullmatch(block)
    return Noisy(match["base"], int(match["strength"])) if match else Noisy(block, None)


def check_noisy_names(args) -> None:
    """Errors in the text are for evaluation on shifted data, and for nothing else.

    Raises:
        UsageError: a name is broken, or stands where rows are trained on.
    """
    for flag in ("dataset", "ood_ori_dataset"):
        name = getattr(args, flag)
        if name is None:
            continue
        base, strength = split_noise(name)
        if strength is not None:
            shown = quoted(name)
            raise UsageError(
                f"--{flag.replace('_', '-')} {shown}: rows with errors in their text are only "
                f"evaluated; pass {quoted(base)} here, and --ood-datasets {shown}."
            )
    for name in args.ood_datasets or ():
        split_noise(name)
