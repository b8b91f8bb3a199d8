r"""Answering only where the error rate is bounded, and saying nothing elsewhere.

A row is answered where its confidence S is above a threshold. Calibration rows decide how low the
threshold may be so that, with probability at least $1-\delta$ over calibration sets, the error rate
among answered rows, $R(\lambda) = P(\text{wrong} \mid S > \lambda)$, is at most r ("Learn then
Test", Angelopoulos et al. 2021; selection with guaranteed risk, Geifman and El-Yaniv 2017).

With the calibration rows in order of falling confidence, hypothesis m says that the rule which
answers what lies above the (m+1)-th of them errs more often than r. Given that row's confidence,
the m rows above it are a sample of what the rule answers, and under the hypothesis their errors
$e_m$ are no fewer than binomial ones: $p_m = P(\mathrm{Bin}(m, r) \le e_m)$ is an exact p-value.

Hypotheses are tested in a fixed order, from few rows to all, until one cannot be rejected. As a
single error among the first few rows would end that, there are J such sequences, which begin at
m = a, 2a, 4a, ..., each at level $\delta / J$ (Bonferroni); a is the fewest rows that can reject
anything, and J as large as the number of calibration rows allows. The lowest threshold that any of
them reaches is taken.

If R does not fall where the threshold is lowered, the first true hypothesis of a sequence is the
one behind the last row above the point $R = r$, wherever calibration rows lie, and is rejected with
probability $\delta / J$ at most. Where R is not monotone, the order of its ups and downs may depend
on the rows, and where scores tie, so may the place at which a sequence begins: there the level is
approximate. The promise is for rows like the calibration rows, never for shifted ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from decisions.conformal import check_level, share
from utils.errors import UsageError

CONFIDENCES = ("max-probability", "entropy", "mutual-information")


@dataclass(frozen=True)
class SelectiveThreshold:
    """Rows with a confidence above `value` are answered.

    Attributes:
        value: minus infinity: all are.
        max_risk, confidence: what was asked for: r, and $1-\\delta$.
        answered, errors: of the calibration rows above it.
        number: of all calibration rows.
    """

    value: float
    max_risk: float
    confidence: float
    answered: int
    errors: int
    number: int


def choose_threshold(
    score: Float[np.ndarray, " n"],
    wrong: Bool[np.ndarray, " n"],
    max_risk: float,
    confidence: float,
) -> SelectiveThreshold:
    """The lowest threshold that fixed-sequence testing allows (see above).

    Args:
        score: confidence of the calibration rows, (n,): larger is surer.
        wrong: whether their answers are, (n,).
        max_risk: r.
        confidence: $1-\\delta$.
    Raises:
        UsageError: shares that are none; or not even the surest rows are right often enough, or
            there are too few; the message says what can be had.
    """
    check_level(max_risk, "a largest risk")
    check_level(confidence, "a confidence")
    answered, errors, values = _candidates(score, wrong)
    starts, level = sequences(len(score), max_risk, confidence)
    rejected = _p_values(answered, errors, max_risk) <= level
    ends = [_last_rejected(rejected, int(np.searchsorted(answered, start))) for start in starts]
    last = max((end for end in ends if end is not None), default=None)
    if last is None:
        raise UsageError(_infeasible(answered, errors, len(score), max_risk, confidence))
    return SelectiveThreshold(
        float(values[last]),
        max_risk,
        confidence,
        int(answered[last]),
        int(errors[last]),
        len(score),
    )


def sequences(number: int, max_risk: float, confidence: float) -> tuple[list[int], float]:
    """With how many answered rows each sequence of tests begins, and the level of its tests.

    None where there are too few rows for a single one.
    """
    starts: list[int] = []
    level = 1 - confidence
    while True:
        more = len(starts) + 1
        first = rows_needed(max_risk, 1 - (1 - confidence) / more)
        if first * 2 ** (more - 1) > number:
            return starts, level
        starts = [first * 2**j for j in range(more)]
        level = (1 - confidence) / more


def _last_rejected(rejected: Bool[np.ndarray, " m"], first: int) -> int | None:
    """The last of those that are rejected without a gap from the first one on."""
    own = rejected[first:]
    number = len(own) if own.all() else int(own.argmin())
    return first + number - 1 if number else None


def rows_needed(max_risk: float, confidence: float) -> int:
    r"""The fewest answered calibration rows without an error that show it: the smallest m with
    $(1-r)^m \le \delta$."""
    exact = math.log(1 - confidence) / math.log(1 - max_risk)
    near = round(exact)
    return near if math.isclose(exact, near, rel_tol=1e-12) else math.ceil(exact)


def _candidates(
    score: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """(answered, errors, threshold) of every rule that lies between two different scores."""
    order = np.argsort(-score, kind="stable")
    falling = score[order]
    errors = np.cumsum(wrong[order])
    below = np.append(falling[1:], -np.inf)  # the next one: only what is above it is answered
    ends = np.flatnonzero(falling > below)  # rows of one score are answered together or not at all
    return ends + 1, errors[ends], below[ends]


def _p_values(answered: np.ndarray, errors: np.ndarray, max_risk: float) -> np.ndarray:
    from scipy.stats import binom

    return binom.cdf(errors, answered, max_risk)


def _infeasible(
    answered: np.ndarray, errors: np.ndarray, number: int, max_risk: float, confidence: float
) -> str:
    asked = f"at most {max_risk:g} wrong among the answered, with confidence {confidence:g}"
    least = rows_needed(max_risk, confidence)
    if number < least:
        return (
            f"{asked}, takes at least {least} calibration rows without an error, but there are "
            f"{number}; calibrate on more rows, or ask for less."
        )
    possible = _smallest_risk(answered, errors, number, confidence)
    had = (
        f"with this confidence {possible:.3f} could have been had"
        if possible is not None
        else "with this confidence no other risk could have been had"
    )
    return (
        f"{asked}, cannot be shown by {number} calibration rows: among the surest ones too many "
        f"are wrong; {had}. Ask for more, or calibrate on more rows."
    )


def _smallest_risk(
    answered: np.ndarray, errors: np.ndarray, number: int, confidence: float
) -> float | None:
    """The smallest r, in thousandths, with which a sequence gets over its first test."""
    for thousandths in range(1, 1000):
        risk = thousandths / 1000
        starts, level = sequences(number, risk, confidence)
        first = np.searchsorted(answered, starts)
        if len(first) and (_p_values(answered[first], errors[first], risk) <= level).any():
            return risk
    return None


def confidence_scores(
    probs: Float[np.ndarray, "n C"],
    entropy: Float[np.ndarray, " n"],
    mutual_information: Float[np.ndarray, " n"],
    kind: str,
) -> Float[np.ndarray, " n"]:
    """One of `CONFIDENCES` of each row, (n,): larger is surer.

    Raises:
        UsageError: another kind.
    """
    if kind not in CONFIDENCES:
        raise UsageError(f"confidence by {kind!r}: it must be one of {', '.join(CONFIDENCES)}.")
    if kind == "max-probability":
        return probs.max(1)
    return -(entropy if kind == "entropy" else mutual_information)


class SelectiveReport(NamedTuple):
    """Answered rows, held against their labels: shares with Clopper and Pearson's intervals.

    Attributes:
        answered: of all rows.
        risk: wrong ones among the answered; NaN where none is answered.
    """

    answered: tuple[float, float, float]
    risk: tuple[float, float, float]


def report_answers(
    score: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"], threshold: SelectiveThreshold
) -> SelectiveReport:
    """What the threshold does on labelled rows."""
    answered = score > threshold.value
    number = int(answered.sum())
    return SelectiveReport(share(number, len(score)), share(int((wrong & answered).sum()), number))
