"""Intervals for what is counted and averaged over rows, from exact laws where there are any."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv, stdtrit

from decisions.checks import exact_share


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    r"""The exact interval of a binomial share (Clopper and Pearson 1934), never too short.

    The shares p at which neither $P(X \ge k)$ nor $P(X \le k)$ falls below half of $1 -
    \mathrm{confidence}$. All of [0, 1] where there are no trials.

    Raises:
        UsageError: the confidence is not between 0 and 1.
    """
    tail = float(1 - exact_share(confidence, "confidence")) / 2
    low = 0.0 if successes == 0 else betaincinv(successes, trials - successes + 1, tail)
    high = 1.0 if successes == trials else betaincinv(successes + 1, trials - successes, 1 - tail)
    return Interval(float(low), float(high))


def mean_interval(
    values: Float[np.ndarray, " n"], lowest: float, highest: float, confidence: float = 0.95
) -> Interval:
    r"""Student's interval of a mean, $\bar v \pm t_{n-1} s / \sqrt n$, cut to where values can lie.

    Approximate: exact for normal values only. Without two values it is all that can be.

    Raises:
        UsageError: the confidence is not between 0 and 1.
    """
    tail = float(1 - exact_share(confidence, "confidence")) / 2
    if len(values) < 2:
        return Interval(lowest, highest)
    half = stdtrit(len(values) - 1, 1 - tail) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = np.mean(values)
    return Interval(float(max(lowest, mean - half)), float(min(highest, mean + half)))
