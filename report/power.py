r"""How large a difference has to be to be found: the power of the tables' tests.

A difference counts if its 95 % interval excludes 0: if the estimate $\hat\delta$ is further from 0
than half of the interval, $h$, which holds the noise of examples and seeds as
`report.significance` does (the quantile of Student's law over seeds, and for calibration errors the
bias by bins). With $\hat\delta \sim \mathcal N(\delta, \sigma^2)$ and the standard error $\sigma$
over examples and seeds, a true difference $\delta$ is found with probability

$$ \Phi\Big(\frac{\delta - h}{\sigma}\Big) + \Phi\Big(\frac{-\delta - h}{\sigma}\Big), $$

and four times out of five from $\delta = h + 0.84\,\sigma$ on. $h$ and $\sigma$ are those of the
rows at hand: the power of a repetition with as many examples and seeds, no property of a method.
The first step of Holm's correction over m rows asks for 5 %/m, where h is
$z_{1 - 0.025/m} / z_{0.975}$ times as wide.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from report.measure import METRICS
from report.rows import Family
from report.significance import TAIL, Difference

ASKED = (0.03, 0.08)  # differences in ECE, such as this field reports
KEYS = ("acc", "ece", "nll", "brier")
USUAL = 0.8  # power that a study is usually planned for


def power(delta: float, half_width: float, error: float) -> float:
    """Probability that a true difference is found.

    Args:
        delta: the true difference.
        half_width: h, of the interval.
        error: the standard error; above 0.
    """
    return float(norm.cdf((delta - half_width) / error) + norm.cdf((-delta - half_width) / error))


def detectable(half_width: float, error: float, wanted: float = USUAL) -> float:
    """The true difference that is found with probability `wanted`, above 0.5."""
    return half_width + float(norm.ppf(wanted)) * error


def holm_factor(rows: int) -> float:
    """How much wider an interval is at the first step of Holm's correction over so many rows."""
    return float(norm.isf(TAIL / rows) / norm.isf(TAIL))


def power_note(family: Family) -> str:
    """What the table of differences can find, by the median over its rows; "" if unknown."""
    found = {key: known for key in KEYS if (known := _known(family, key))}
    if "ece" not in found:
        return ""
    factor = holm_factor(len(family.rows) - 1)

    def median(key: str, of, factor: float = 1.0) -> float:
        values = [of((d.high - d.low) / 2 * factor, d.error) for d in found[key]]
        return float(np.median(values))

    texts = []
    for delta in ASKED:
        one, first = (median("ece", lambda h, e, d=delta: power(d, h, e), f) for f in (1, factor))
        texts.append(f"of {delta} with probability {one:.2f} ({first:.2f})")
    least = ", ".join(f"{median(key, detectable):.3f} in {METRICS[key].title}" for key in found)
    return (
        f"Power at this size, by the median row: one test at 5 % (Holm's first step) finds a true "
        f"difference in ECE {', '.join(texts)}; four times out of five one test finds {least}."
    )


def _known(family: Family, key: str) -> list[Difference]:
    """The differences whose noise is known, and is not 0."""
    cells = (row.cells.get(key) for row in family.rows)
    found = (cell.difference for cell in cells if cell is not None and cell.difference is not None)
    return [d for d in found if math.isfinite(d.high - d.low) and d.error > 0]
