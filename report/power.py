r"""How large a difference has to be to be found: the power of the tables' tests.

A difference is found at level $\alpha$ if its estimate $\hat\delta$ is further from 0 than half of
the interval at that level, $h$, by the rule of `report.significance`:

$$ h^2 = q_{\alpha/2}^2 + t_{1-\alpha/2,\,S-1}^2\, \hat s^2 / S, $$

with the bootstrap's deviation q over examples and the spread $\hat s$ over S seeds (for calibration
errors half of the bias by bins is added, and $\hat\delta$ is taken around its middle). With
$\hat\delta \sim \mathcal N(\delta, \sigma^2)$ and the standard error $\sigma$ over examples and
seeds, a true difference $\delta$ is found with probability

$$ \mathbb E\Big[\Phi\Big(\frac{\delta - h}{\sigma}\Big)
    + \Phi\Big(\frac{-\delta - h}{\sigma}\Big)\Big],
    \qquad \hat s^2 = s^2 \chi^2_{S-1} / (S - 1), $$

the mean over how much the spread of so few seeds varies from one repetition to the next, which is
independent of $\hat\delta$ for normal values. The first step of Holm's correction over m rows asks
for $\alpha/m$. Student's quantile grows fast there: of 3 seeds it is 4.3 at 5 % and 20 at 5 %/21.
A level below 2 / (R + 1), the lowest p-value of R resamples, finds nothing.

The sizes of the noise, q and s, are those of the rows at hand: the power of a repetition with as
many examples and seeds and with that noise, no property of a method. They are estimates too.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

from report.measure import METRICS
from report.rows import Family
from report.significance import TAIL, Difference, Noise, deviations, lowest_p, seed_deviation

ASKED = (0.03, 0.08)  # differences in ECE, such as this field reports
KEYS = ("acc", "ece", "nll", "brier")
USUAL = 0.8  # power that a study is usually planned for
SPREADS = 1000  # quantiles of chi squared that stand for its law


def half_widths(noise: Noise, level: float = 2 * TAIL) -> np.ndarray:
    """Half of a difference's interval, for spreads over seeds as repetitions would have them.

    Args:
        noise: of the difference.
        level: of the test, on both sides together.
    Returns:
        (`SPREADS`,), equally probable; infinite where the resamples allow no such p-value.
    """
    defined = int(np.isfinite(noise.replicates).sum())
    if level < lowest_p(defined):
        return np.full(SPREADS, np.inf)
    seeds = np.hypot.reduce(
        [
            seed_deviation(side, level / 2) * _relative_spreads(len(side), stream)
            for stream, side in enumerate(noise.seeds)
        ]
    )
    sides = np.hypot(deviations(noise.replicates, level / 2)[:, None], seeds)  # (2, SPREADS)
    return sides.mean(axis=0) + abs(noise.floor) / 2


def _relative_spreads(seeds: int, stream: int) -> np.ndarray:
    """Estimated over true standard deviation of so many values; in another order by stream."""
    if seeds < 2:
        return np.ones(SPREADS)
    shares = (np.arange(SPREADS) + 0.5) / SPREADS
    spreads = np.sqrt(chi2.ppf(shares, seeds - 1) / (seeds - 1))
    return np.random.default_rng(stream).permutation(spreads)  # two sides are independent


def power(delta: float, widths: np.ndarray, error: float) -> float:
    """Probability that a true difference is found.

    Args:
        delta: the true difference.
        widths: h, equally probable ones, as of `half_widths`.
        error: the standard error; above 0.
    """
    found = norm.cdf((delta - widths) / error) + norm.cdf((-delta - widths) / error)
    return float(np.mean(found))


def detectable(widths: np.ndarray, error: float, wanted: float = USUAL) -> float:
    """The true difference that is found with probability `wanted`; inf if there is none."""
    most = float(np.max(widths)) + 10 * error
    if not math.isfinite(most):
        return math.inf
    return float(brentq(lambda delta: power(delta, widths, error) - wanted, 0, most))


def power_note(family: Family) -> str:
    """What the table of differences can find, by the median over its rows; "" if unknown."""
    found = {key: known for key in KEYS if (known := _known(family, key))}
    if "ece" not in found:
        return ""
    rows = len(family.rows) - 1

    def median(key: str, of, tests: int = 1) -> float:
        values = [of(half_widths(d.noise, 2 * TAIL / tests), d.error) for d in found[key]]
        return float(np.median(values))

    def median_power(delta: float, tests: int) -> float:
        return median("ece", lambda widths, error: power(delta, widths, error), tests)

    texts = []
    for delta in ASKED:
        one, first = median_power(delta, 1), median_power(delta, rows)
        texts.append(f"of {delta} with probability {one:.2f} ({first:.2f})")
    least = {key: median(key, detectable) for key in found}
    listed = ", ".join(
        f"{value:.3f} in {METRICS[key].title}"
        for key, value in least.items()
        if math.isfinite(value)
    )
    note = (
        f"Power at this size, by the median row: one test at 5 % (Holm's first step) finds a true "
        f"difference in ECE {', '.join(texts)}"
    )
    note += f"; four times out of five one test finds {listed}." if listed else "."
    return f"{note} {_obstacle(found['ece'], rows, median_power(max(ASKED), rows))}".strip()


def _obstacle(found: list[Difference], rows: int, first_step: float) -> str:
    """Why next to nothing can become bold, and the remedy; "" if it can."""
    resamples = max(len(d.noise.replicates) for d in found)
    if rows * lowest_p(resamples) > 2 * TAIL:
        return (
            f"Nothing can be bold: no p-value of {resamples} resamples is below "
            f"{lowest_p(resamples):.2g}, and Holm's first step over {rows} rows asks for "
            f"{2 * TAIL / rows:.2g}. It takes --bootstrap {math.ceil(rows / TAIL)} or more."
        )
    fewest = min((len(s) for d in found for s in d.noise.seeds if len(s) > 1), default=0)
    if first_step >= 0.5 or not fewest or rows < 2:
        return ""
    tail = TAIL / rows
    of_examples = [np.ptp(deviations(d.noise.replicates, tail)) / 2 for d in found]
    of_seeds = [d.noise.of_seeds(tail) for d in found]
    if np.median(of_seeds) < np.median(of_examples):
        return ""  # too few examples are to blame
    wider = t.isf(tail, fewest - 1) / t.isf(TAIL, fewest - 1)
    return (
        f"Hardly anything can become bold: with {fewest} seeds and {rows} rows, Holm's first step "
        f"counts the noise of seeds {wider:.1f} times as much as one test does. More seeds or "
        f"fewer rows are the remedy."
    )


def _known(family: Family, key: str) -> list[Difference]:
    """The differences whose noise is known, and is not 0."""
    cells = (row.cells.get(key) for row in family.rows)
    found = (cell.difference for cell in cells if cell is not None and cell.difference is not None)
    return [d for d in found if math.isfinite(d.high - d.low) and d.error > 0]
