r"""Prediction sets that hold the label with a chosen probability: split conformal prediction.

From n calibration rows with labels, score each label, $s_i = s(x_i, y_i)$: the larger, the less the
model expected it. At coverage $1 - \alpha$ let $\hat q$ be the k-th smallest of the n scores, with
$k = \lceil (n + 1)(1 - \alpha) \rceil$. The set of a new row is $\{c : s(x, c) \le \hat q\}$. If
the new row is exchangeable with the calibration rows,

$P(y \in \mathrm{set}(x)) \ge k / (n + 1) \ge 1 - \alpha$,

whatever the model is worth (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv 1604.04173).
The probability is over calibration rows, the new row and the random numbers of APS and RAPS. It is
not given what the row looks like, and it says nothing of shifted data. docs/decisions.md has the
conditions in full.

Three scores, with $r(c)$ the rank of class c by probability, 1 for the most probable (the earlier
class among equals), and u uniform on [0, 1), one for each row:

- LAC: $1 - p_c$ (Sadinle, Lei and Wasserman 2019, arXiv 1609.00451). The smallest sets on average.
- APS: $\sum_{j: r(j) < r(c)} p_j + u \, p_c$ (Romano, Sesia and Candès 2020, arXiv 2006.02544).
  Sets grow where the model is unsure; coverage is more even over easy and hard rows.
- RAPS: APS $+ \lambda \max(0, r(c) - k_{reg})$ (Angelopoulos et al. 2021, arXiv 2009.14193): the
  tail of improbable classes costs extra, so sets stay small. The guarantee holds for any $\lambda$
  and $k_{reg}$ that were chosen without the calibration rows. The paper tunes them on further rows;
  here they are fixed, 0.1 and 1, unless the caller chooses.

Per class (Mondrian conformal prediction, Vovk 2012, arXiv 1209.2673), each class has the threshold
of its own calibration rows, and the guarantee holds for the rows of each class.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from scipy.special import betaincinv

from decisions.checks import (
    Keys,
    check_flags,
    check_keys,
    check_labels,
    check_probabilities,
    exact_share,
)
from decisions.intervals import Interval, clopper_pearson, mean_interval
from utils.errors import UsageError, quoted
from utils.records import Count, Nonnegative, Record, as_record
from utils.seeding import row_uniforms

Score = Literal["lac", "aps", "raps"]
SCORES: tuple[Score, ...] = ("lac", "aps", "raps")

MOST_ROWS = 100_000  # of calibration; their scores are kept
RAPS_PENALTY = 0.1
RAPS_RANK = 1
# Streams of the uniform numbers. A row that has the key of a calibration row must not share its
# number, or the two would not be exchangeable with the others.
CALIBRATION, PREDICTION = "conformal calibration", "conformal sets"


class ConformalThresholds(Record):
    """What calibration leaves: the sorted scores, from which any coverage has its threshold.

    JSON-able (`model_dump`), and checked where it is read (`model_validate`).

    Attributes:
        score: which of the three.
        num_classes: C.
        per_class: whether each class has its own threshold.
        seed: of the random numbers of APS and RAPS.
        penalty, rank: lambda and k_reg of RAPS; without effect on the others.
        scores: of the calibration rows' labels, ascending: one list, or one for each class.
    """

    score: Score
    num_classes: Annotated[int, Field(ge=2, le=MOST_ROWS)]
    per_class: bool = False
    seed: Count = 0
    penalty: Nonnegative = RAPS_PENALTY
    rank: Count = RAPS_RANK
    scores: Annotated[
        list[Annotated[list[Nonnegative], Field(max_length=MOST_ROWS)]],
        Field(min_length=1, max_length=MOST_ROWS),
    ]

    @model_validator(mode="after")
    def _scores_are_those_of_a_calibration(self) -> ConformalThresholds:
        lists = self.num_classes if self.per_class else 1
        if len(self.scores) != lists:
            raise ValueError(f"'scores' has {len(self.scores)} lists; there must be {lists}")
        if not 1 <= sum(self.num_rows) <= MOST_ROWS:
            raise ValueError(f"'scores' has {sum(self.num_rows)} rows; 1 to {MOST_ROWS} are read")
        if any(a > b for scores in self.scores for a, b in pairwise(scores)):
            raise ValueError("'scores' must be in ascending order")
        return self

    @property
    def num_rows(self) -> list[int]:
        """Calibration rows behind each threshold: of all, or of each class."""
        return [len(scores) for scores in self.scores]

    def feasible(self, coverage: float) -> bool:
        """Whether there are enough calibration rows for that coverage (`rows_needed`)."""
        return min(self.num_rows) >= rows_needed(coverage)

    def thresholds(self, coverage: float) -> Float[np.ndarray, " 1_or_C"]:
        """The largest score that gets into a set: one for all classes, or one for each.

        Raises:
            UsageError: the coverage is not between 0 and 1, or it takes more calibration rows.
        """
        needed = rows_needed(coverage)
        short = [(c, n) for c, n in enumerate(self.num_rows) if n < needed]
        if short and self.per_class:
            shown = ", ".join(f"class {c} has {n}" for c, n in short[:10])
            shown += f" and {len(short) - 10} more classes have too few" if len(short) > 10 else ""
            raise UsageError(
                f"Coverage {quoted(coverage)} for each class takes {needed} calibration rows of "
                f"every class: {shown}. Ask for a lower coverage, calibrate on more rows, or not "
                "by class."
            )
        if short:
            raise UsageError(
                f"Coverage {quoted(coverage)} takes {needed} calibration rows; there are "
                f"{self.num_rows[0]}. Ask for a lower coverage or calibrate on more rows."
            )
        return np.array([scores[_order(len(scores), coverage) - 1] for scores in self.scores])


def rows_needed(coverage: float) -> int:
    r"""The fewest calibration rows that a coverage takes; of each class, if it is by class.

    The k-th smallest of n scores exists if $k = \lceil (n+1)(1-\alpha) \rceil \le n$. n is an
    integer, so that is $(n+1)(1-\alpha) \le n$, or $n \ge (1-\alpha)/\alpha = 1/\alpha - 1$: 9 rows
    for 0.9, 19 for 0.95. With fewer, only the set of all classes has that coverage.

    Raises:
        UsageError: the coverage is not between 0 and 1.
    """
    level = exact_share(coverage, "coverage")
    return math.ceil(level / (1 - level))


def _order(n: int, coverage: float) -> int:
    """k: which of n sorted scores is the threshold, counted from 1."""
    return math.ceil((n + 1) * exact_share(coverage, "coverage"))


def calibrate(
    probabilities: Float[np.ndarray, "n C"],
    labels: Int[np.ndarray, " n"],
    score: Score = "lac",
    per_class: bool = False,
    seed: int = 0,
    keys: Keys | None = None,
    penalty: float = RAPS_PENALTY,
    rank: int = RAPS_RANK,
) -> ConformalThresholds:
    """Thresholds for every coverage, from rows that nothing else was fitted on.

    Args:
        probabilities: of the posterior predictive, (n, C), as they will be at prediction: the same
            number of draws, the same temperature.
        labels: (n,)
        score: "lac", "aps" or "raps".
        per_class: whether each class gets its own threshold, and its own guarantee.
        seed: of the random numbers of APS and RAPS.
        keys: of the rows, for these numbers; None: their order.
        penalty, rank: lambda and k_reg of RAPS.
    Raises:
        UsageError: there are no rows or more than are kept, or an argument is not what it should
            be. Classes without rows are no error before a coverage is asked for.
    """
    if score not in SCORES:
        raise UsageError(f"The score is {quoted(score)}; it must be one of {', '.join(SCORES)}.")
    if not (0 <= penalty < math.inf and rank >= 0):
        raise UsageError(
            f"RAPS has penalty {quoted(penalty)} and rank {quoted(rank)}; both must be finite and "
            "not negative."
        )
    found = check_probabilities(probabilities)
    n, num_classes = found.shape
    labels = check_labels(labels, n, num_classes)
    if not 1 <= n <= MOST_ROWS:
        raise UsageError(
            f"There are {n} calibration rows; it takes at least one and at most {MOST_ROWS}. "
            + ("Hold some out of training." if n == 0 else "Pass a random part of them.")
        )
    uniform = _uniforms(score, CALIBRATION, seed, check_keys(keys, n))
    scores = _scores(found, score, uniform, penalty, rank)[np.arange(n), labels]
    groups = [scores[labels == c] for c in range(num_classes)] if per_class else [scores]
    content = {
        "score": score,
        "num_classes": num_classes,
        "per_class": per_class,
        "seed": seed,
        "penalty": penalty,
        "rank": rank,
        "scores": [np.sort(group).tolist() for group in groups],
    }
    return as_record(content, ConformalThresholds, "Calibration of sets")


def sets(
    probabilities: Float[np.ndarray, "n C"],
    thresholds: ConformalThresholds,
    coverage: float,
    keys: Keys | None = None,
    allow_empty: bool = False,
) -> Bool[np.ndarray, "n C"]:
    """Which classes the set of each row holds.

    The set of a row does not depend on the rows beside it. A higher coverage gives sets that
    contain those of a lower one (by class, that holds only before empty sets are filled).

    LAC and randomised APS and RAPS can leave a set empty: no class is as probable as the labels of
    the calibration rows were, or chance left the only one out. The guarantee counts such sets in.
    By default they get their most probable class: coverage can only rise by that, so the guarantee
    stays, but it may then lie above `coverage_law`.

    Args:
        probabilities: of the posterior predictive, (n, C).
        thresholds: of `calibrate`.
        coverage: what share of the sets shall hold the label.
        keys: one for each row, integers or strings, such as its number in the file; APS and RAPS
            need them, since a row's random number is a function of the seed and its key.
        allow_empty: whether sets may be empty.
    Raises:
        UsageError: the coverage cannot be had from these calibration rows (it says how many it
            takes), keys are missing, or an argument is not what it should be.
    """
    limits = thresholds.thresholds(coverage)
    found = check_probabilities(probabilities, thresholds.num_classes)
    if keys is None and thresholds.score != "lac":
        raise UsageError(
            f"The score {thresholds.score} draws a random number for each row; pass one key a row, "
            "such as its number in the file, so that its set does not depend on the others."
        )
    keys = check_keys(keys, len(found))
    uniform = _uniforms(thresholds.score, PREDICTION, thresholds.seed, keys)
    scores = _scores(found, thresholds.score, uniform, thresholds.penalty, thresholds.rank)
    inside = scores <= limits
    if not allow_empty:
        empty = np.flatnonzero(~inside.any(1))
        inside[empty, found[empty].argmax(1)] = True
    return inside


def _uniforms(score: Score, stream: str, seed: int, keys: Keys) -> Float[np.ndarray, " n"] | None:
    """One a row; LAC needs none."""
    return None if score == "lac" else row_uniforms(stream, seed, keys)


def _scores(
    probabilities: Float[np.ndarray, "n C"],
    score: Score,
    uniform: Float[np.ndarray, " n"] | None,
    penalty: float,
    rank: int,
) -> Float[np.ndarray, "n C"]:
    """Of every class of every row, as in the module's equations."""
    if uniform is None:
        return 1 - np.minimum(probabilities, 1.0)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, 1)
    # Sums from the most probable class on, without subtracting: equal rows get equal bits.
    before = np.zeros_like(ranked)
    np.cumsum(ranked[:, :-1], axis=1, out=before[:, 1:])
    found = before + uniform[:, None] * ranked
    if score == "raps":
        found += penalty * np.maximum(np.arange(1, ranked.shape[1] + 1) - rank, 0)
    scores = np.empty_like(found)
    np.put_along_axis(scores, order, found, 1)
    return scores


# --- what it is worth -----------------------------------------------------------------------------


class CoverageLaw(NamedTuple):
    """Which coverage a set of n calibration rows leads to, as a distribution: Beta(a, b).

    Attributes:
        a, b: its parameters.
        mean: a / (a + b), at least the coverage that was asked for.
        interval: the central part that holds `confidence` of it.
    """

    a: int
    b: int
    mean: float
    interval: Interval


def coverage_law(n: int, coverage: float, confidence: float = 0.95) -> CoverageLaw:
    r"""The coverage that sets have once their n calibration rows are fixed: Beta(k, n + 1 - k).

    $P(y \in \mathrm{set}(x) \mid \text{calibration rows})$ varies from calibration set to
    calibration set, with $k = \lceil (n+1)(1-\alpha) \rceil$ and mean $k / (n + 1)$ (Vovk 2012,
    arXiv 1209.2673). Exact if scores do not tie; where they do, or where empty sets are filled,
    coverage is larger. By class, n is the number of that class's rows.

    Args:
        n: calibration rows.
        coverage: what was asked for.
        confidence: of the interval.
    Raises:
        UsageError: the coverage takes more rows, or a number is not between 0 and 1.
    """
    tail = float(1 - exact_share(confidence, "confidence")) / 2
    if n < rows_needed(coverage):
        raise UsageError(
            f"Coverage {quoted(coverage)} takes {rows_needed(coverage)} calibration rows; there "
            f"are {n}. Ask for a lower coverage or calibrate on more rows."
        )
    a = _order(n, coverage)
    b = n + 1 - a
    low, high = betaincinv(a, b, tail), betaincinv(a, b, 1 - tail)
    return CoverageLaw(a, b, a / (n + 1), Interval(float(low), float(high)))


class SetFigures(NamedTuple):
    """What sets turned out to be on labelled rows.

    Attributes:
        num_rows: n.
        coverage: share of the sets that hold the label, and its Clopper-Pearson interval, for the
            calibration set that there was.
        coverage_interval: its interval.
        size: mean number of classes in a set.
        size_interval: Student's.
        size_right, size_wrong: the same where the most probable class is the label, and where it
            is not; NaN without such rows.
        empty: share of empty sets.
        single: share of sets with one class.
        class_rows: rows of each class, (C,).
        class_coverage: coverage among them, (C,), NaN for a class without rows.
        class_intervals: Clopper-Pearson, one for each class.
    """

    num_rows: int
    coverage: float
    coverage_interval: Interval
    size: float
    size_interval: Interval
    size_right: float
    size_wrong: float
    empty: float
    single: float
    class_rows: Int[np.ndarray, " C"]
    class_coverage: Float[np.ndarray, " C"]
    class_intervals: list[Interval]


def evaluate_sets(
    inside: Bool[np.ndarray, "n C"],
    labels: Int[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    confidence: float = 0.95,
) -> SetFigures:
    """Coverage and size of sets whose labels are known.

    Args:
        inside: of `sets`, (n, C).
        labels: (n,)
        right: whether the point answer of each row is its label, (n,).
        confidence: of the intervals.
    Raises:
        UsageError: there are no rows, or an argument is not what it should be.
    """
    inside = np.asarray(inside, dtype=bool)
    if inside.ndim != 2 or len(inside) == 0:
        raise UsageError(f"The sets have shape {inside.shape}; they must be (rows, classes).")
    n, num_classes = inside.shape
    labels = check_labels(labels, n, num_classes)
    right = check_flags(right, "Whether the answers are right", n)
    covered, sizes = inside[np.arange(n), labels], inside.sum(1)
    class_rows = np.bincount(labels, minlength=num_classes)
    class_hits = np.bincount(labels[covered], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        class_coverage = class_hits / class_rows
    return SetFigures(
        num_rows=n,
        coverage=float(covered.mean()),
        coverage_interval=clopper_pearson(int(covered.sum()), n, confidence),
        size=float(sizes.mean()),
        size_interval=mean_interval(sizes, 0.0, float(num_classes), confidence),
        size_right=_mean(sizes[right]),
        size_wrong=_mean(sizes[~right]),
        empty=float((sizes == 0).mean()),
        single=float((sizes == 1).mean()),
        class_rows=class_rows,
        class_coverage=class_coverage,
        class_intervals=[
            clopper_pearson(int(hits), int(rows), confidence)
            for hits, rows in zip(class_hits, class_rows, strict=True)
        ],
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
