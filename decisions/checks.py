"""What the functions of this room take; of anything else they say what it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int

from decisions.information import own_draws, row_blocks
from utils.errors import UsageError, quoted

SUM_TOLERANCE = 1e-3  # of a row's probabilities from 1: half precision, not another quantity

Keys = Sequence[int | str]  # one a row: its number, its id, its text


def exact_share(value: float, what: str) -> Fraction:
    """A number between 0 and 1 as the decimal fraction that it was written as.

    0.9 is meant as 9/10, not as the binary number next to it: products with it decide how many rows
    are enough, and 10 * (1 - 0.9) must be 1.

    Raises:
        UsageError: it does not lie between 0 and 1, both excluded.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < 1:
        raise UsageError(
            f"{what} is {quoted(value)}; it must lie between 0 and 1, both excluded, such as 0.9."
        )
    return Fraction(repr(number))


def check_probabilities(
    probabilities: Float[np.ndarray, "n C"], num_classes: int | None = None
) -> Float[np.ndarray, "n C"]:
    """In double precision.

    Raises:
        UsageError: they are no (n, C) probabilities of at least two classes, or of other classes.
    """
    found = np.asarray(probabilities, dtype=float)
    if found.ndim != 2 or found.shape[1] < 2:
        raise UsageError(
            f"The probabilities have shape {found.shape}; they must be (rows, classes), with two "
            "classes or more. Of draws (rows, draws, classes), take the mean over the draws."
        )
    if num_classes is not None and found.shape[1] != num_classes:
        raise UsageError(
            f"The probabilities are of {found.shape[1]} classes, and the thresholds of "
            f"{num_classes}; they must belong to the same task."
        )
    # written so that NaN is wrong as well
    right = (found >= 0).all(1) & (np.abs(found.sum(1) - 1) <= SUM_TOLERANCE)
    if not right.all():
        row = int(np.argmin(right))
        raise UsageError(
            f"Row {row} of the probabilities is {quoted(found[row].tolist())}; they must be 0 or "
            "more and add up to 1. Of log-probabilities, take exp first."
        )
    return found


def check_labels(labels: Int[np.ndarray, " n"], n: int, num_classes: int) -> Int[np.ndarray, " n"]:
    """As an array of integers.

    Raises:
        UsageError: they are not one class index a row.
    """
    found = np.asarray(labels)
    if found.shape != (n,) or not (n == 0 or np.issubdtype(found.dtype, np.integer)):
        raise UsageError(
            f"The labels have shape {found.shape} and type {found.dtype}; they must be one class "
            f"index for each of the {n} rows."
        )
    wrong = (found < 0) | (found >= num_classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UsageError(
            f"The label of row {row} is {found[row]}; with {num_classes} classes it must be 0 to "
            f"{num_classes - 1}."
        )
    return found.astype(np.int64)


def check_flags(values: Bool[np.ndarray, " n"], what: str, n: int | None = None) -> np.ndarray:
    """Yes or no for each row, as booleans; 0 and 1 are taken too.

    Raises:
        UsageError: they are something else, or of another number of rows.
    """
    found = np.asarray(values)
    if found.ndim != 1 or (n is not None and len(found) != n) or not np.isin(found, (0, 1)).all():
        rows = "each row" if n is None else f"each of the {n} rows"
        raise UsageError(
            f"{what} has shape {found.shape} and type {found.dtype}; it must be True or False for "
            f"{rows}."
        )
    return found.astype(bool)


def check_scores(scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """In double precision.

    Raises:
        UsageError: they are not one finite number a row.
    """
    found = np.asarray(scores, dtype=float)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise UsageError(
            f"The scores have shape {found.shape}; they must be one finite number for each row, "
            "the larger the surer."
        )
    return found


def check_keys(keys: Keys | None, n: int) -> Keys:
    """One key for each of n rows; None: their numbers.

    Raises:
        UsageError: there are more or fewer.
    """
    if keys is None:
        return range(n)
    if len(keys) != n:
        raise UsageError(f"There are {len(keys)} keys for {n} rows; each row needs one.")
    return keys


def check_draws(
    draws: Float[np.ndarray, "n N C"], num_draws: Int[np.ndarray, " n"] | None = None
) -> tuple[Float[np.ndarray, "n N C"], Int[np.ndarray, " n"]]:
    """The draws as they are, and how many of them each row has.

    Raises:
        UsageError: they are no log-probabilities (n, N, C), or `num_draws` is not 1 to N a row.
    """
    found = np.asarray(draws)
    if found.ndim != 3 or 0 in found.shape or found.shape[2] < 2:
        raise UsageError(
            f"The draws have shape {found.shape}; they must be log-probabilities (rows, draws, "
            "classes) of at least one row, one draw and two classes."
        )
    n, most, _ = found.shape
    drawn = np.full(n, most) if num_draws is None else np.asarray(num_draws)
    if drawn.shape != (n,) or drawn.min() < 1 or drawn.max() > most:
        raise UsageError(
            f"num_draws is {quoted(drawn.tolist())}; it must be from 1 to {most} for each of the "
            f"{n} rows."
        )
    for rows in row_blocks(n, found[0].size):
        probs, own = own_draws(found[rows], drawn[rows])
        right = (np.abs(probs.sum(-1) - 1) <= SUM_TOLERANCE) | ~own  # not so for NaN
        if not right.all():
            row = rows.start + int(np.argmin(right.all(1)))
            raise UsageError(
                f"Row {row} has draws whose probabilities do not add up to 1; the draws must be "
                "log-probabilities. Of logits, take log_softmax; of probabilities, log."
            )
    return found, drawn
