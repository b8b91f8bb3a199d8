"""What a data set is: the record `Task`, and the rules for one from a user's own file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.sources import Hub, HubGroup, Row, Source
from utils.errors import UsageError, quoted
from utils.table_task import TableTask

PUBLISHED_FLAGS = {"choice_format": "text_first", "boolq_tokens": "swapped", "bbc_split": 1}


class Prompt(NamedTuple):
    """What a causal LM reads. Only `context` may be shortened to fit --max-seq-len."""

    head: str
    context: str
    tail: str


@dataclass(frozen=True)
class Task:
    """A data set: where its rows are, how a row reads, and what its answer is.

    Attributes:
        name: as in --dataset.
        source: hub id, or the embedded corpus; anything with `rows(split)` that gives (where, row),
            or None where `--data-dir`, which replaces it, is always given.
        splits: "train", "val" and "test" (as in --testing-set) to the source's split names. The
            published protocol evaluates on "val". "shots", if the source has such a split, is
            where --num-shots takes its solved examples from; else that is "train".
        columns: the columns that a row must have.
        choices: the answers, in label order: words for a causal LM, class names for a classifier.
        prompt: row -> `Prompt` (multiple choice), or a tuple of one or two sentences (classifier).
        label: row -> index into `choices`; raises ValueError or KeyError on an unknown answer.
            None: the rows belong to none of the classes, and are for --ood-datasets only.
        published: where published or older runs differ: flag name -> fields of the record to
            replace. "choice_format" for text_first, "boolq_tokens" for swapped, "bbc_split" for 1.
        eos_published: whether they append end-of-text to the prompt (--append-eos).
        example: a row in the source's schema, written by hand: documentation (`scripts/tasks.py`
            renders it), and what the golden tests render.
        text_columns: those of free text, in which `NAME:noisy:K` makes errors: not those of
            answers, nor any whose errors would change the answer.
        table: what a user's own table asks, where that is what the record was made from
            (`dataset.tables`).
    """

    name: str
    source: Source | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    choices: tuple[str, ...]
    prompt: Callable[[Row], Prompt | tuple[str, ...]]
    label: Callable[[Row], int] | None
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eos_published: bool = False
    example: Row | None = None
    text_columns: tuple[str, ...] = ()
    table: TableTask | None = None


# --- a record of a user's own ---------------------------------------------------------------------


def checked_task(task: Any, spec: str) -> Task:
    """The record that --dataset or --ood-datasets names, after every field was looked at.

    Args:
        task: what stands under that name.
        spec: the name, for the message.
    Returns:
        the record, its lists turned into tuples.
    Raises:
        UsageError: no `Task`, or the first field that breaks its rule.
    """
    if not isinstance(task, Task):
        raise UsageError(f"--dataset {quoted(spec)}: it must be a dataset.tasks.Task record.")
    for name, (rule, holds) in _RULES.items():
        value = getattr(task, name)
        if not holds(value):
            raise UsageError(
                f"--dataset {quoted(spec)}: the field '{name}' is {quoted(value)}; it must be "
                f"{rule}."
            )
    if task.table is not None and tuple(task.choices) != task.table.answers:
        raise UsageError(
            f"--dataset {quoted(spec)}: the fields 'choices' and 'table' have other answers; leave "
            "'table' out: it is for tables, which need no record."
        )
    lists = {name: tuple(getattr(task, name)) for name in ("columns", "choices", "text_columns")}
    return dataclasses.replace(task, **lists)


def _is_text(value: Any) -> bool:
    """Text with something in it, and nothing that UTF-8 has no bytes for."""
    if not (isinstance(value, str) and value.strip()):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


NAME_RULE = (
    "text of at most 100 bytes, letters, digits and ._+- or spaces after them: it names files"
)


def is_name(value: Any) -> bool:
    """A name that can be a folder's or a part of a file's on any system."""
    if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > 100:
        return False
    return re.fullmatch(r"\w[\w.+ -]*", value) is not None


def _is_split(value: Any) -> bool:
    """A split's name: with --data-dir it is the beginning of a file's name, in that folder."""
    is_path = isinstance(value, str) and any(mark in value for mark in "/\\\0")
    return _is_text(value) and len(value) <= 100 and not is_path


def _are_texts(value: Any, least: int) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) >= least
        and all(map(_is_text, value))
        and len(set(value)) == len(value)
    )


def _is_source(value: Any) -> bool:
    if isinstance(value, Hub):
        return _is_text(value.path) and (value.config is None or _is_text(value.config))
    if isinstance(value, HubGroup):
        return _is_text(value.path) and _are_texts(value.configs, 1)
    is_class = isinstance(value, type)
    return value is None or (not is_class and callable(getattr(value, "rows", None)))


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(key in ("train", "val", "test", "shots") for key in value)
        and any(key != "shots" for key in value)
        and all(map(_is_split, value.values()))
    )


def _are_replacements(value: Any) -> bool:
    """For each flag fields of the record, each as the record's own rule has it."""
    return isinstance(value, Mapping) and all(
        key in PUBLISHED_FLAGS
        and isinstance(fields, Mapping)
        and all(name in _RULES and _RULES[name][1](new) for name, new in fields.items())
        for key, fields in value.items()
    )


# field of a `Task` -> what it must be, in words and as a function
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": (NAME_RULE, is_name),
    "source": (
        "Hub('owner/name', config), HubGroup, an object with a method rows(split), or None",
        _is_source,
    ),
    "splits": (
        "a dict from 'train', 'val' and 'test' (and 'shots', if there is one for --num-shots) to "
        "names of the source's splits, such as {'train': 'train', 'val': 'validation'}",
        _are_splits,
    ),
    "columns": ("a tuple of column names, each once", lambda value: _are_texts(value, 0)),
    "choices": (
        "a tuple of at least two different texts, none of them empty",
        lambda value: _are_texts(value, 2),
    ),
    "prompt": ("a function of a row", callable),
    "label": ("a function of a row, or None", lambda value: value is None or callable(value)),
    "published": (
        "a dict from 'choice_format', 'boolq_tokens' and 'bbc_split' to fields of the record",
        _are_replacements,
    ),
    "eos_published": ("True or False", lambda value: isinstance(value, bool)),
    "example": (
        "a row (a dict), or None",
        lambda value: value is None or isinstance(value, Mapping),
    ),
    "text_columns": ("a tuple of column names, each once", lambda value: _are_texts(value, 0)),
    "table": ("a TableTask, or None", lambda value: value is None or isinstance(value, TableTask)),
}
