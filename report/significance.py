r"""Is a difference real? Bootstrap over examples, spread over seeds.

**Examples.** A resample draws n of the n examples with replacement (Efron 1979). All rows of a
table, that is all methods and seeds on the same examples, see the same resamples, so that
differences are paired: what makes an example hard for all cancels. The deviations of an estimate
are $q_{2.5, 97.5}(\theta^* - \bar{\theta^*})$, quantiles of the resampled values (means over the
seeds) around their mean. Centring matters for binned calibration errors: a resample repeats
examples and is therefore noisier than the sample, so $\theta^*$ lies above $\hat\theta$.

**Seeds.** With S >= 2 seeds, the noise of the seeds is $t_{0.975, S-1} \, s / \sqrt S$, with s the
standard deviation over seeds of the value, or of the difference on the seeds that both sides have
(without a common one, of each side). It is added in quadrature to the deviations of the examples,
so each source of noise keeps its own quantile. Resampling two or three seeds instead would
understate how much they vary: without any true difference it finds one in 51, 29 and 19 % of the
cases with 2, 3 and 5 seeds (nominal: 5 %); this rule in about 5 % or fewer (tests/test_report.py).

**Calibration errors** are biased upwards by the noise of their bins: between 0 (errors far above
the noise) and the row's noise floor (calibrated; `report.uncertainty.noise_floors`), which is lower
for a model that is more confident. So the interval of a difference is the hull of two: around the
difference as it is, and around the one with the floors taken off. It excludes 0 only if both do.

**Many comparisons.** The p-value of a difference is the lowest level at which its interval excludes
0, and no lower than 2 / (R + 1) for R resamples. Of the differences between a table's rows and its
baseline, those of one metric are one family, whose p-values `holm` corrects (Holm 1979): if no row
differed, one would be found in at most 5 % of the cases. Intervals themselves are not corrected.

**What intervals do not say.** With one seed they hold the noise of the test examples only. The
interval of a single calibration error lies around the value with its bias. `report.power` says how
large a difference has to be to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from utils.seeding import mix_seed

TAIL = 0.025  # on each side of an interval
CHUNK = 8_000_000  # weights at once: 64 MB
MOST_ROWS = 1000  # resamples at once: with few examples, sums over bins are larger than the weights


def seed_of_examples(stream: str, seed: int, fingerprint: int) -> int:
    """The seed of a stream that equal examples have in common; of a fingerprint, 32 bits count."""
    return mix_seed(stream, seed, fingerprint & 0xFFFFFFFF)


def resample(sizes: dict[int, int], resamples: int, seed: int) -> Iterator[list[np.ndarray]]:
    """How often each example is drawn in each resample, in chunks of resamples.

    Args:
        sizes: fingerprint of the examples -> their number n. The same fingerprint gets the same
            resamples whenever it is asked for, other ones are resampled independently.
        resamples: R, the rows of all chunks together.
        seed: of the report.
    Yields:
        counts (r, n) for each of `sizes`.
    """
    rngs = [
        np.random.default_rng(seed_of_examples("bootstrap examples", seed, key)) for key in sizes
    ]
    rows = max(1, min(CHUNK // max(sizes.values()), MOST_ROWS))
    for start in range(0, resamples, rows):
        drawn = range(min(rows, resamples - start))
        yield [
            np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in drawn]).astype(float)
            for rng, n in zip(rngs, sizes.values(), strict=True)
        ]


def deviations(replicates: np.ndarray, tails: ArrayLike = TAIL) -> np.ndarray:
    """(low, high) of resampled values around their mean; NaN if fewer than half are defined.

    Args:
        replicates: resampled values, (R,).
        tails: the share beyond each side, a number or (L,).
    Returns:
        (2,) or (2, L)
    """
    tails = np.asarray(tails, dtype=float)
    defined = replicates[np.isfinite(replicates)]
    if not len(defined) or 2 * len(defined) < len(replicates):
        return np.full((2, *tails.shape), np.nan)
    return np.quantile(defined - defined.mean(), np.stack([tails, 1 - tails]))


def seed_deviation(values: Sequence[float], tails: ArrayLike = TAIL) -> np.ndarray:
    """Half of the t interval of a mean over seeds; 0 for one seed, of which nothing is known."""
    if len(values) < 2:
        return np.zeros(np.shape(tails))
    quantile = t.ppf(1 - np.asarray(tails), len(values) - 1)
    return quantile * np.std(values, ddof=1) / len(values) ** 0.5


def interval(
    value: float,
    replicates: np.ndarray,
    of_seeds: float = 0.0,
    lowest: float = -np.inf,
    highest: float = np.inf,
) -> tuple[float, float]:
    """The 95 % interval around a value: deviations over examples and seeds, in quadrature."""
    low, high = np.hypot(deviations(replicates), of_seeds) * [-1, 1] + value
    return float(np.clip(low, lowest, highest)), float(np.clip(high, lowest, highest))


def mean_over_seeds(
    values: dict, replicates: dict, highest: float = np.inf
) -> tuple[float, float, float]:
    """A row's value, the mean over its seeds, and its interval.

    Args:
        values: seed -> value.
        replicates: seed -> (R,) values on resampled examples.
        highest: the largest value there is; the lowest is 0.
    """
    value = float(np.mean(list(values.values())))
    resampled = np.mean(list(replicates.values()), axis=0)
    of_seeds = seed_deviation(list(values.values()))
    return value, *interval(value, resampled, of_seeds, 0.0, highest)


@dataclass(frozen=True)
class Noise:
    """What the interval of a difference is made of, at any level.

    Attributes:
        replicates: the difference on resampled examples, (R,).
        seeds: its value on each common seed; without one, the values of each side.
        floor: what it would be between calibrated models.
    """

    replicates: np.ndarray = field(repr=False, compare=False)
    seeds: list[list[float]]
    floor: float

    def of_seeds(self, tails: ArrayLike = TAIL) -> np.ndarray:
        """Half of the interval over seeds."""
        return np.hypot.reduce([seed_deviation(side, tails) for side in self.seeds])


class Difference(NamedTuple):
    """first - second with its interval.

    Attributes:
        num_common: seeds that both sides have, of which alone it is then taken; 0: of each side's
            own.
        p: the lowest level at which the interval excludes 0; NaN without resamples.
        p_holm: the same, corrected for the rows of the table.
        error: its standard error, over examples and seeds.
        noise: what interval and p-value come from.
    """

    value: float
    low: float
    high: float
    num_common: int
    p: float = np.nan
    p_holm: float = np.nan
    error: float = np.nan
    noise: Noise | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """All but the noise, as tables have them."""
        return self[: self._fields.index("noise")]

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def holds(self) -> bool:
        """Whether that is so at 5 % for all rows of the table together."""
        return self.p_holm <= 2 * TAIL


def paired_difference(
    values: tuple[dict, dict], replicates: tuple[dict, dict], floors: tuple[dict, dict]
) -> Difference:
    """first - second on the same examples and, where there are any, the same seeds.

    Args:
        values, replicates: of both sides, as in `mean_over_seeds`.
        floors: seed -> what a calibrated model would have (`report.uncertainty.noise_floors`); 0
            for metrics that have no such bias.
    """
    common = [seed for seed in values[0] if seed in values[1]]
    seeds = [common or list(side) for side in values]

    def mean(sides: tuple[dict, dict]) -> np.ndarray:
        own, other = (
            np.mean([side[seed] for seed in chosen], axis=0)
            for side, chosen in zip(sides, seeds, strict=True)
        )
        return own - other

    if common:
        paired = [[values[0][seed] - values[1][seed] for seed in common]]
    else:
        paired = [list(side.values()) for side in values]

    difference, noise = float(mean(values)), Noise(mean(replicates), paired, float(mean(floors)))
    low, high = interval(difference, noise.replicates, noise.of_seeds())
    return Difference(
        difference,
        low - max(noise.floor, 0),
        high - min(noise.floor, 0),
        len(common),
        p=p_value(difference, noise.floor, noise.replicates, noise.of_seeds),
        error=_standard_error(noise.replicates, paired),
        noise=noise,
    )


def _standard_error(replicates: np.ndarray, of_seeds: Sequence[Sequence[float]]) -> float:
    """Of a difference of means over seeds: over the examples and over the seeds of each side."""
    defined = replicates[np.isfinite(replicates)]
    if not len(defined):
        return np.nan
    spread = [np.var(side, ddof=1) / len(side) for side in of_seeds if len(side) > 1]
    return float((np.var(defined) + sum(spread)) ** 0.5)


def lowest_p(resamples: int) -> float:
    """What no p-value of so many resamples is below: 2 / (R + 1)."""
    return 2 / (resamples + 1)


def p_value(
    difference: float,
    floor: float,
    replicates: np.ndarray,
    of_seeds: Callable[[np.ndarray], np.ndarray],
) -> float:
    """The lowest level at which the interval of `paired_difference` excludes 0.

    Args:
        difference: the estimate.
        floor: what it would be between calibrated models.
        replicates: on resampled examples, (R,).
        of_seeds: tails -> half of the interval over seeds.
    Returns:
        one of some 200 levels between 2 / (R + 1) and 1; NaN if fewer than half of the replicates
        are defined.
    """
    number = int(np.isfinite(replicates).sum())
    if not number or 2 * number < len(replicates):
        return np.nan
    ends = sorted((difference, difference - floor))
    if ends[0] <= 0 <= ends[1]:
        return 1.0
    side = 0 if ends[0] > 0 else 1  # the end of the hull that is nearer to 0
    lowest = min(lowest_p(number), 2 * TAIL)
    levels = np.sort(np.append(np.geomspace(lowest, 1, 200), 2 * TAIL))
    widths = np.hypot(deviations(replicates, levels / 2)[side], of_seeds(levels / 2))
    excluding = levels[abs(ends[side]) > widths]
    return float(excluding[0]) if len(excluding) else 1.0


def holm(p_values: Sequence[float]) -> np.ndarray:
    r"""p-values of one family, corrected: $\min(1, \max_{j \le i} (m - j + 1)\, p_{(j)})$.

    Args:
        p_values: of m comparisons; NaN for those that are none.
    Returns:
        as many, in the same order: below 0.05 are those that hold together at 5 %.
    """
    values = np.asarray(p_values, dtype=float)
    corrected = np.full(len(values), np.nan)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN comes last
    steps = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected
