r"""Answering only where the error rate is bounded, and saying nothing elsewhere.

A row is answered where its confidence S is above a threshold. Calibration rows decide how low the
threshold may be so that, with probability at least $1-\delta$ over calibration sets, the error rate
among answered rows, $R(\lambda) = P(\text{wrong} \mid S > \lambda)$, is at most r ("Learn then
Test", Angelopoulos et al. 2021; selection with guaranteed risk, Geifman and El-Yaniv 2017).

With the calibration rows in order of falling confidence, hypothesis m says that the rule which
answers what lies above the (m+1)-th of them errs more often than r. Given that row's confidence,
the m rows above it are a sample of what the rule answers, and under the hypothesis their errors
$e_m$ are no fewer than binomial ones: $p_m = P(\mathrm{Bin}(m, r) \le e_m)$ is an exact p-value.
Hypotheses are tested in a fixed order, from the fewest rows with which any could be rejected to all
of them, each at level $\delta$, until one cannot be rejected. If R does not fall where the
threshold is lowered, the first true one is the one behind the last row above the point $R = r$,
wherever calibration rows lie, and it is rejected with probability $\delta$ at most. Where R is not
monotone, the order of its ups and downs may depend on the rows, and the level is approximate. The
promise is for rows like the calibration rows, never for shifted ones.
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
    """The lowest threshold that fixed-sequence testing allows.

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
    p = _p_values(answered, errors, max_risk)
    least = rows_needed(max_risk, confidence)
    tested = answered >= least
    rejected = p[tested] <= 1 - confidence
    number = int(rejected.argmin()) if not rejected.all() else len(rejected)
    if number == 0:
        raise UsageError(_infeasible(answered, errors, len(score), max_risk, confidence, least))
    last = np.flatnonzero(tested)[number - 1]
    return SelectiveThreshold(
        float(values[last]),
        max_risk,
        confidence,
        int(answered[last]),
        int(errors[last]),
        len(score),
    )


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
    answered: np.ndarray,
    errors: np.ndarray,
    number: int,
    max_risk: float,
    confidence: float,
    least: int,
) -> str:
    asked = f"at most {max_risk:g} wrong among the answered, with confidence {confidence:g}"
    if number < least:
        return (
            f"{asked}, takes at least {least} calibration rows without an error, but there are "
            f"{number}; calibrate on more rows, or ask for less."
        )
    possible = _smallest_risk(answered, errors, confidence)
    had = (
        f"with this confidence {possible:.3f} can be had"
        if possible is not None
        else "no other risk can be had with this confidence"
    )
    return (
        f"{asked}, cannot be shown by {number} calibration rows: among the surest ones too many "
        f"are wrong; {had}. Ask for that, or calibrate on more rows."
    )


def _smallest_risk(answered: np.ndarray, errors: np.ndarray, confidence: float) -> float | None:
    """The smallest r, in thousandths, whose first hypothesis is rejected."""
    for thousandths in range(1, 1000):
        risk = thousandths / 1000
        first = np.flatnonzero(answered >= rows_needed(risk, confidence))
        if len(first) and _p_values(answered, errors, risk)[first[0]] <= 1 - confidence:
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
