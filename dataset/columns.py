"""What the columns of a row say: texts, choices, answers; and what is none of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dataset.sources import Row
from utils.errors import quoted

LETTERS = ("A", "B", "C", "D", "E")


# --- texts ----------------------------------------------------------------------------------------


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is text that a tokenizer can take.

    Raises:
        ValueError: it is something else, or has half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {quoted(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair at character {error.start}") from None
    return value


def text_of(row: Row, key: str) -> str:
    """The text of a column."""
    return checked_text(row[key], f"column '{key}'")


def options_of(row: Row, key: str) -> list[str]:
    """The texts of a row's choices: a list, or one under "text" beside their labels, as in ARC.

    Raises:
        ValueError: no list of one to five texts, or labels that are not A, B, C or 1, 2, 3.
    """
    texts, labels = row[key], None
    if isinstance(texts, Mapping):
        texts, labels = texts.get("text"), texts.get("label")
    if not isinstance(texts, list | tuple):
        raise ValueError(f"column '{key}': the choices are no list, but {quoted(texts)}")
    if not 0 < len(texts) <= len(LETTERS):
        problem = "no choices" if not texts else f"more than {len(LETTERS)} choices"
        raise ValueError(f"column '{key}' has {problem}")
    numbers = tuple(str(i + 1) for i in range(len(texts)))
    # in another order the answer key would name another choice than the one shown with its letter
    if labels is not None and (
        not isinstance(labels, list | tuple)
        or tuple(map(str, labels)) not in (LETTERS[: len(texts)], numbers)
    ):
        raise ValueError(
            f"column '{key}': the choices' labels are {quoted(labels)}; they must be A, B, C "
            "and so on, or 1, 2, 3 and so on, one for each choice"
        )
    return [checked_text(text, f"column '{key}': choice {i + 1}") for i, text in enumerate(texts)]


def sentences(*keys: str) -> Callable[[Row], tuple[str, ...]]:
    return lambda row: tuple(text_of(row, key) for key in keys)


# --- answers --------------------------------------------------------------------------------------


def whole_number(row: Row, key: str, rule: str = "a whole number") -> int:
    """A column's whole number: an integer, 1.0 as pandas has it, or the digits of a CSV.

    Nothing is rounded, and True is no 1.

    Raises:
        ValueError: it is something else.
    """
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
        return int(value)
    raise ValueError(f"column '{key}' is {quoted(value)}; it must be {rule}")


def letter_or_number(key: str) -> Callable[[Row], int]:
    """An answer key that is a letter from A on, or a number from 1 on (some rows of ARC)."""
    rule = f"a letter from {LETTERS[0]} to {LETTERS[-1]}, or a number from 1 on"

    def label(row: Row) -> int:
        answer = row[key].strip() if isinstance(row[key], str) else None
        return LETTERS.index(answer) if answer in LETTERS else whole_number(row, key, rule) - 1

    return label


def class_index(num_labels: int, key: str = "label") -> Callable[[Row], int]:
    """A class index, as in GLUE. -1 (an unlabelled row of a hidden test set) is an error."""

    def label(row: Row) -> int:
        index = whole_number(row, key)
        if not 0 <= index < num_labels:
            raise ValueError(f"column '{key}' is {quoted(index)}; it must be 0 to {num_labels - 1}")
        return index

    return label


def zero_based(key: str) -> Callable[[Row], int]:
    """An index from 0 on, as in MMLU and HellaSwag."""
    return lambda row: whole_number(row, key)


def among(key: str, answer: Callable[[Row], int]) -> Callable[[Row], int]:
    """`answer`, which must be one of the choices that the row itself has in column `key`."""

    def label(row: Row) -> int:
        index, number = answer(row), len(options_of(row, key))
        if not 0 <= index < number:
            raise ValueError(f"the answer is choice {quoted(index + 1)} of {number}")
        return index

    return label


def boolean_answer(key: str) -> Callable[[Row], int]:
    """True -> 0, False -> 1: the order of the answer words."""

    def label(row: Row) -> int:
        answer = row[key].strip().lower() if isinstance(row[key], str) else row[key]
        if isinstance(answer, bool):
            return int(not answer)
        if answer not in ("true", "false"):
            raise ValueError(f"column '{key}' is {quoted(row[key])}; it must be true or false")
        return ("true", "false").index(answer)

    return label
