r"""Split conformal prediction: sets of answers that hold the right one with a chosen probability.

Calibration rows 1..n that the posterior was neither trained nor tuned on get a score
$s_i = s(x_i, y_i)$ each, large where the right answer looks unlikely. With
$k = \lceil (n+1)(1-\alpha) \rceil$ the threshold is the k-th smallest score, and the set of a new
row has every answer whose score is not above it. If calibration rows and the new row are
exchangeable (drawn from one population, in any order), the set has the right answer with
probability at least $1-\alpha$ (Vovk, Gammerman and Shafer 2005; Papadopoulos et al. 2002).

That probability is over calibration rows and the new row together. It is no promise for a single
row, none for a kind of rows (but classes, with `per_class`), and none at all for shifted data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from utils.errors import UsageError, quoted
from utils.seeding import mix_seed

SCORES = ("lac", "aps", "raps")
PENALTY, FREE_RANKS = 0.1, 1  # of RAPS: lambda, and k_reg

Probabilities = Float[np.ndarray, "n C"]


@dataclass(frozen=True)
class Thresholds:
    """What a set is made by.

    Attributes:
        score: one of `SCORES`.
        level: $1-\\alpha$, the coverage that is promised.
        values: the largest score that is let in, (1,), or of each class, (C,).
        numbers: how many calibration rows each of them is from.
    """

    score: str
    level: float
    values: Float[np.ndarray, " classes"]
    numbers: Int[np.ndarray, " classes"]


def scores(probs: Probabilities, score: str, uniform: Float[np.ndarray, " n"]) -> Probabilities:
    r"""The nonconformity of every answer.

    With the answers of a row ordered by falling probability and $\rho(y)$ the place of y:

    - lac: $1 - p_y$ (Sadinle, Lei and Wasserman 2019): the smallest sets on average.
    - aps: $\sum_{c: \rho(c) < \rho(y)} p_c + u\, p_y$ with u uniform (Romano, Sesia and Candès
      2020): sets adapt to how hard a row is.
    - raps: aps plus $\lambda \max(0, \rho(y) - k_{reg})$ (Angelopoulos et al. 2021), which keeps
      unlikely answers out of large sets; here $\lambda = 0.1$, $k_{reg} = 1$, not tuned.

    Args:
        probs: (n, C).
        score: one of `SCORES`.
        uniform: u of each row, (n,), from [0, 1]; see `uniforms`.
    Returns:
        (n, C)
    Raises:
        UsageError: another score.
    """
    if score not in SCORES:
        raise UsageError(f"score {quoted(score)}: it must be one of {', '.join(SCORES)}.")
    if score == "lac":
        return 1.0 - probs
    order = np.argsort(-probs, axis=1, kind="stable")
    falling = np.take_along_axis(probs, order, 1)
    before = np.cumsum(falling, 1) - falling
    sorted_scores = before + uniform[:, None] * falling
    if score == "raps":
        ranks = np.arange(1, probs.shape[1] + 1)
        sorted_scores = sorted_scores + PENALTY * np.maximum(0, ranks - FREE_RANKS)
    found = np.empty_like(sorted_scores)
    np.put_along_axis(found, order, sorted_scores, 1)
    return found


def uniforms(seed: int, purpose: str, index: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A uniform number for each row, by its index: other rows have no part in it.

    Args:
        seed: of all.
        purpose: keeps the numbers of calibration rows and of new ones apart.
        index: of the rows, (n,).
    """
    key = mix_seed(f"conformal sets of {purpose} rows", seed)
    return np.array(
        [np.random.Generator(np.random.Philox(key=key, counter=int(i))).random() for i in index]
    )


def calibrate(
    probs: Probabilities,
    labels: Int[np.ndarray, " n"],
    score: str,
    level: float,
    per_class: bool = False,
    uniform: Float[np.ndarray, " n"] | None = None,
    names: Sequence[str] | None = None,
) -> Thresholds:
    """Thresholds from calibration rows.

    Args:
        probs: of the calibration rows, (n, C).
        labels: theirs, (n,).
        score: one of `SCORES`.
        level: $1-\\alpha$.
        per_class: whether every class gets a threshold from its own rows, so that the promise holds
            for the rows of each class (Vovk 2012: label-conditional).
        uniform: (n,), see `scores`; None for lac.
        names: of the classes, for messages.
    Raises:
        UsageError: a level that is none, or too few rows; the message says how many it takes.
    """
    check_level(level)
    uniform = np.ones(len(probs)) if uniform is None else uniform
    own = np.take_along_axis(scores(probs, score, uniform), labels[:, None], 1)[:, 0]
    groups = [own[labels == c] for c in range(probs.shape[1])] if per_class else [own]
    needed = rows_needed(level)
    for c, group in enumerate(groups):
        if len(group) < needed:
            of_class = f" of class {quoted(names[c]) if names else c}" if per_class else ""
            raise UsageError(
                f"a coverage of {level:g} takes {needed} calibration rows{of_class}, but there are "
                f"{len(group)}; ask for less, or calibrate on more rows"
                f"{', or not per class' if per_class else ''}."
            )
    values = [np.sort(group)[place(len(group), level) - 1] for group in groups]
    return Thresholds(score, level, np.array(values), np.array([len(group) for group in groups]))


def sets(
    probs: Probabilities,
    thresholds: Thresholds,
    uniform: Float[np.ndarray, " n"] | None = None,
    allow_empty: bool = False,
) -> Bool[np.ndarray, "n C"]:
    """Which answers each row's set has.

    Args:
        probs: of the rows, (n, C).
        thresholds: from `calibrate`.
        uniform: (n,), see `scores`; None for lac.
        allow_empty: a row whose every score is above the threshold has an empty set, which counts
            as wrong; False adds its most probable answer, which can only raise the coverage.
    """
    uniform = np.ones(len(probs)) if uniform is None else uniform
    found = scores(probs, thresholds.score, uniform) <= thresholds.values
    if not allow_empty:
        found[np.arange(len(probs)), probs.argmax(1)] |= ~found.any(1)
    return found


def check_level(level: float, what: str = "a coverage") -> None:
    """It is a share.

    Raises:
        UsageError: it is not between 0 and 1, both excluded.
    """
    if not 0 < level < 1:
        raise UsageError(f"{what} of {quoted(level)}: it must be above 0 and below 1.")


def place(number: int, level: float) -> int:
    r"""$k = \lceil (n+1)(1-\alpha) \rceil$: which of n sorted scores is the threshold.

    In exact arithmetic of the level's decimal digits: 0.9 of 9 rows is the 9th, not the 10th.
    """
    return math.ceil((number + 1) * Fraction(repr(float(level))))


def rows_needed(level: float) -> int:
    r"""The smallest n with $\lceil (n+1)(1-\alpha) \rceil \le n$, which is
    $\lceil (1-\alpha)/\alpha \rceil$."""
    exact = Fraction(repr(float(level)))
    return math.ceil(exact / (1 - exact))


# --- what a threshold is worth --------------------------------------------------------------------


class CoverageLaw(NamedTuple):
    r"""The coverage that a given calibration set has reached, over calibration sets.

    Given the calibration rows, the coverage of new ones is a number that nobody knows. Over
    calibration sets it follows Beta(k, n + 1 - k) if scores have no ties (Vovk 2012); with ties,
    and where empty sets get an answer, it lies above.
    """

    mean: float
    low: float
    high: float


def coverage_law(number: int, level: float, confidence: float = 0.95) -> CoverageLaw:
    """Mean and central interval of that law, for n calibration rows."""
    from scipy.stats import beta

    k = place(number, level)
    law = beta(k, number + 1 - k)
    tail = (1 - confidence) / 2
    return CoverageLaw(float(law.mean()), float(law.ppf(tail)), float(law.ppf(1 - tail)))


class SetReport(NamedTuple):
    """Sets of labelled rows, held against the labels.

    Attributes:
        coverage: the share of rows whose set has the label, with its interval.
        size: mean number of answers in a set, with its interval.
        size_right, size_wrong: where the most probable answer is right, and where it is not; NaN
            where there is no such row.
        of_class: coverage of each class's rows; NaN of a class without rows.
    """

    coverage: tuple[float, float, float]
    size: tuple[float, float, float]
    size_right: float
    size_wrong: float
    of_class: Float[np.ndarray, " C"]


def report_sets(
    found: Bool[np.ndarray, "n C"],
    probs: Probabilities,
    labels: Int[np.ndarray, " n"],
    confidence: float = 0.95,
) -> SetReport:
    """Coverage (Clopper and Pearson's interval) and sizes (normal interval) of n rows."""
    covered = found[np.arange(len(labels)), labels]
    sizes = found.sum(1).astype(float)
    right = probs.argmax(1) == labels
    spread = (
        _normal_quantile(confidence) * sizes.std(ddof=1) / math.sqrt(len(sizes))
        if (len(sizes) > 1)
        else math.nan
    )
    mean = float(sizes.mean())
    return SetReport(
        share(int(covered.sum()), len(covered), confidence),
        (mean, mean - spread, mean + spread),
        _mean(sizes[right]),
        _mean(sizes[~right]),
        np.array([_mean(covered[labels == c]) for c in range(probs.shape[1])]),
    )


def share(count: int, number: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """(share, low, high) of a count: the exact interval of Clopper and Pearson (1934)."""
    from scipy.stats import beta

    if not number:
        return math.nan, 0.0, 1.0
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, number - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, number - count)) if count < number else 1.0
    return count / number, low, high


def _normal_quantile(confidence: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + confidence) / 2))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
