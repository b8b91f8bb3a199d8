r"""Is a difference real? Bootstrap over examples and seeds.

**Resamples.** A resample draws n of the n examples with replacement (Efron 1979). All rows of a
table, that is all methods and seeds on the same examples, see the same resamples, so that
differences are paired: what makes an example hard for all cancels. Where a row has several seeds,
they are the outer level: each resample also draws S of the S seeds with replacement, the same seeds
for both sides of a difference (the seeds that both sides have; without a common one each side
draws its own). A row's value is the mean over its seeds of the metric on all examples.

**Intervals** (95 %) are $\hat\theta + q_{2.5, 97.5}(\theta^* - \bar{\theta^*})$: quantiles of the
resampled values around their mean, put around the estimate, and cut to the metric's range. Centring
matters for binned calibration errors: a resample repeats examples and is therefore noisier than the
sample, so $\theta^*$ lies above $\hat\theta$ and the plain percentile interval need not
contain the estimate. The estimate's own bias is not corrected: on few examples a perfectly
calibrated model has a binned ECE well above 0, and its interval lies around that (docs/log.md).

**What they do not say.** With one seed an interval holds the noise of the test examples only; with
two or three, resampling seeds understates how much seeds vary. Nothing is corrected for the number
of comparisons.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from utils.seeding import mix_seed

LEVEL = 0.95
CHUNK = 8_000_000  # weights at once: 64 MB


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
    rngs = [np.random.default_rng(mix_seed("bootstrap examples", seed, key)) for key in sizes]
    rows = max(1, CHUNK // max(sizes.values()))
    for start in range(0, resamples, rows):
        drawn = range(min(rows, resamples - start))
        yield [
            np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in drawn]).astype(float)
            for rng, n in zip(rngs, sizes.values(), strict=True)
        ]


def seed_weights(seeds: tuple, resamples: int, seed: int) -> np.ndarray:
    """The share of each of S seeds in each resample, (R, S); equal seeds get equal resamples."""
    stream = zlib.crc32(repr(seeds).encode())
    rng = np.random.default_rng(mix_seed("bootstrap seeds", seed, stream))
    drawn = rng.integers(0, len(seeds), (resamples, len(seeds)))
    return (drawn[..., None] == np.arange(len(seeds))).mean(1)


def interval(
    value: float, replicates: np.ndarray, lowest: float = -np.inf, highest: float = np.inf
) -> tuple[float, float]:
    """The centred 95 % interval; NaN where fewer than half of the resamples are defined."""
    defined = replicates[np.isfinite(replicates)]
    if not len(defined) or 2 * len(defined) < len(replicates) or not np.isfinite(value):
        return np.nan, np.nan
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(defined - defined.mean(), [tail, 1 - tail])
    return float(np.clip(value + low, lowest, highest)), float(
        np.clip(value + high, lowest, highest)
    )


def mean_over_seeds(
    values: dict, replicates: dict, seeds: tuple, resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """A row's value and its (R,) resampled values.

    Args:
        values: seed -> value.
        replicates: seed -> (R,) values on resampled examples.
        seeds: the seeds to take.
    """
    stacked = np.stack([replicates[s] for s in seeds], axis=1)  # (R, S)
    weights = seed_weights(seeds, resamples, seed)
    with np.errstate(invalid="ignore"):
        resampled = np.where(weights > 0, weights * stacked, 0.0).sum(1)
    return float(np.mean([values[s] for s in seeds])), resampled


def paired_difference(
    values: tuple[dict, dict], replicates: tuple[dict, dict], resamples: int, seed: int
) -> tuple[float, float, float]:
    """(first - second, low, high) on the same examples and, where there are any, the same seeds."""
    first, second = (tuple(sorted(v, key=repr)) for v in values)
    common = tuple(s for s in first if s in second)
    sides = [
        mean_over_seeds(values[i], replicates[i], common or own, resamples, seed)
        for i, own in enumerate((first, second))
    ]
    difference = sides[0][0] - sides[1][0]
    return difference, *interval(difference, sides[0][1] - sides[1][1])


def is_significant(low: float, high: float) -> bool:
    """Whether the interval of a difference excludes 0."""
    return low > 0 or high < 0
