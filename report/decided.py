r"""What sets and selective answers turn out to be on examples whose labels are known.

    predictions-calibration.safetensors, of rows that were neither trained nor tuned on
        -> `calibrate` -> `Calibrated`, of one run
        -> `decide`, with the posterior's predictions of a data set -> `Decided`, of one result
        -> `set_lines`, `answer_lines`: means over the seeds of a row of the tables

The statistics are those of `decisions/`; nothing is fitted on the examples that are evaluated.
Where a temperature was fitted, calibration rows and examples are scaled by it, as
`scripts/predict.py` does.

**Intervals** are 95 %. Of one seed they are those of `decisions`: Clopper and Pearson's, exact, for
shares, and Student's for sizes. Of a mean over seeds: the mean distance of the seeds' own limits
from their values, and $t_{0.975, S-1} \, s / \sqrt S$ for the noise of the seeds, in quadrature.
The seeds are evaluated on the same examples, so their deviations may go together; that of the mean
is never larger than the mean of the deviations, so this is wide rather than narrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from decisions import conformal, selective
from decisions.conformal import ConformalThresholds, SetFigures
from decisions.intervals import Interval
from decisions.selective import SelectionFigures, SelectiveThreshold
from report.measure import Examples
from report.predictions import Predictions, read_predictions
from report.runs import Run, Unusable
from report.significance import seed_deviation
from utils.errors import UsageError, quoted
from utils.run_paths import CALIBRATION

ANSWERED_BY = "max_probability"  # of `selective.SCORES`, the one that a point estimate has as well


@dataclass(frozen=True)
class Asked:
    """What sets and selective answers are evaluated for.

    Attributes:
        coverages: of sets.
        set_score: how they are made, one of `conformal.SCORES`.
        max_risks: error rates among the answered.
        confidence: with which those are to hold.
    """

    coverages: tuple[float, ...] = (0.8, 0.9, 0.95)
    set_score: conformal.Score = "lac"
    max_risks: tuple[float, ...] = (0.05, 0.1)
    confidence: float = 0.9


class DrawKind(NamedTuple):
    """Draws of a prediction: the least and the most that a row has, and whether they are pairs."""

    least: int
    most: int
    antithetic: bool

    @classmethod
    def of(cls, predictions: Predictions) -> DrawKind:
        """Of a file's rows."""
        counts = predictions.num_draws
        return cls(int(counts.min()), int(counts.max()), predictions.antithetic)


@dataclass(frozen=True)
class Calibrated:
    """What a run's calibration rows say.

    Attributes:
        dataset: that they are rows of.
        unseen: whether the run knew that the adapter was not trained on them.
        temperature: by which they were scaled, if the run has fitted one.
        draws: with which they were predicted.
        sets: from which every coverage has its sets.
        answers: from which every risk has its rule.
    """

    dataset: str
    unseen: bool
    temperature: float | None
    draws: DrawKind
    sets: ConformalThresholds
    answers: SelectiveThreshold


def calibrate(run: Run, asked: Asked) -> Calibrated:
    """Read a run's calibration rows.

    Args:
        run: with a `calibration`.
        asked: the score of the sets.
    Raises:
        Unusable: the file is missing or damaged, of other rows, or cannot calibrate.
    """
    file = run.calibration
    if file.omitted:
        raise Unusable(f"sets would be made with the run's temperature, but {file.omitted}")
    predictions = read_predictions(file)
    if predictions.split != CALIBRATION:
        raise Unusable(
            f"{file.file.name} is of the split {quoted(predictions.split)}, not of "
            f"{quoted(CALIBRATION)}: other rows may have had a say in the posterior"
        )
    probabilities, right = _answers(Examples.of(predictions, file.temperature))
    keys, labels = predictions.index.tolist(), predictions.labels
    seed = (run.seeds[-1] if run.seeds else None) or 0  # of the posterior's draws
    try:
        return Calibrated(
            dataset=file.dataset,
            unseen=predictions.unseen,
            temperature=file.temperature,
            draws=DrawKind.of(predictions),
            sets=conformal.calibrate(probabilities, labels, asked.set_score, seed=seed, keys=keys),
            answers=selective.calibrate(probabilities.max(1), right, ANSWERED_BY, seed, keys),
        )
    except UsageError as error:
        raise Unusable(f"{file.file.name}: {error}") from None


def _answers(examples: Examples) -> tuple[Float[np.ndarray, "n C"], Bool[np.ndarray, " n"]]:
    """The posterior predictive, and whether its most probable class is the label.

    Stored draws add up to 1 but for rounding, which half precision shows.
    """
    found = examples.probs / examples.probs.sum(1, keepdims=True)
    return found, found.argmax(1) == examples.labels


@dataclass(frozen=True)
class Decided:
    """What sets and selective answers of one result turned out to be.

    Attributes:
        guaranteed: whether the calibration rows are of the data set that is evaluated.
        unseen: whether it is known that the adapter was not trained on them.
        num_rows: calibration rows.
        sets: coverage -> figures, where there are calibration rows enough.
        answers: risk -> figures, where it can be had.
        smallest_risk: that can be had; None if none can.
    """

    guaranteed: bool
    unseen: bool
    num_rows: int
    sets: dict[float, SetFigures]
    answers: dict[float, SelectionFigures]
    smallest_risk: float | None


def decide(
    calibrated: Calibrated, dataset: str, predictions: Predictions, examples: Examples, asked: Asked
) -> Decided:
    """Make sets and selective answers of a data set, and hold them against its labels.

    Args:
        calibrated: of the same posterior, scaled by the same temperature as `examples`.
        dataset: that is evaluated.
        predictions: of it.
        examples: these, measured.
    Raises:
        Unusable: they have other classes or other draws than the calibration rows.
    """
    probabilities, right = _answers(examples)
    num_classes, drawn = probabilities.shape[1], DrawKind.of(predictions)
    if num_classes != calibrated.sets.num_classes:
        raise Unusable(
            f"the calibration rows have {calibrated.sets.num_classes} classes, those of "
            f"{quoted(dataset)} {num_classes}"
        )
    # where draws end when a row is settled, their numbers may differ by the rows
    numbers = {(kind.least, kind.most) for kind in (drawn, calibrated.draws)}
    differ = len(numbers) > 1 and all(least == most for least, most in numbers)
    if differ or drawn.antithetic != calibrated.draws.antithetic:
        raise Unusable(
            f"the calibration rows have {_told(calibrated.draws)}, those of {quoted(dataset)} "
            f"{_told(drawn)}: what is calibrated on the ones says nothing of the others"
        )
    keys, rules = predictions.index.tolist(), {}
    for risk in asked.max_risks:
        try:
            rules[risk] = calibrated.answers.rule(risk, asked.confidence)
        except UsageError:  # it cannot be shown on these rows; `smallest_risk` says which can
            continue
    sure = probabilities.max(1)
    return Decided(
        guaranteed=dataset == calibrated.dataset,
        unseen=calibrated.unseen,
        num_rows=sum(calibrated.sets.num_rows),
        sets={
            coverage: conformal.evaluate_sets(
                conformal.sets(probabilities, calibrated.sets, coverage, keys),
                predictions.labels,
                right,
            )
            for coverage in asked.coverages
            if calibrated.sets.feasible(coverage)
        },
        answers={
            risk: selective.evaluate_selection(selective.answered(sure, rule, keys), right)
            for risk, rule in rules.items()
        },
        smallest_risk=calibrated.answers.smallest_risk(asked.confidence),
    )


def _told(kind: DrawKind) -> str:
    number = f"{kind.least}" if kind.least == kind.most else f"{kind.least} to {kind.most}"
    return f"{number}{' antithetic' * kind.antithetic} draw{'s' * (kind.most > 1)}"


# --- means over seeds -----------------------------------------------------------------------------


class Mean(NamedTuple):
    """A figure, averaged over the seeds that have it.

    Attributes:
        low, high: the interval; NaN for what has none.
        spread: standard deviation over the seeds; NaN for one.
        num_seeds: that have it.
    """

    value: float
    low: float
    high: float
    spread: float
    num_seeds: int


NO_INTERVAL = Interval(np.nan, np.nan)
NOTHING = Mean(np.nan, np.nan, np.nan, np.nan, 0)


def mean(figures: Iterable[tuple[float, Interval]], highest: float) -> Mean:
    """The mean over seeds; the module says what its interval is.

    Args:
        figures: value and interval of each seed; those that are NaN do not count.
        highest: the largest value there is; the lowest is 0.
    """
    having = [(value, found) for value, found in figures if np.isfinite(value)]
    if not having:
        return NOTHING
    values = [value for value, _ in having]
    average = float(np.mean(values))
    down = np.mean([value - found.low for value, found in having])
    up = np.mean([found.high - value for value, found in having])
    low, high = np.hypot([down, up], seed_deviation(values)) * [-1, 1] + average
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    low, high = (float(np.clip(end, 0.0, highest)) for end in (low, high))
    return Mean(average, low, high, spread, len(values))


class SetLine(NamedTuple):
    """Sets of a row of the tables at one coverage.

    Attributes:
        asked: coverage.
        reached: share of the sets that hold the label.
        law: where the coverage lies in 95 of 100 calibrations on so many rows, if the examples are
            like them; of the seed with the fewest rows.
        size: mean number of classes in a set.
        size_right, size_wrong: the same where the point answer is right, and where it is wrong.
        short: seeds that have too few calibration rows.
    """

    asked: float
    reached: Mean
    law: Interval
    size: Mean
    size_right: Mean
    size_wrong: Mean
    short: int


def set_lines(decided: Sequence[Decided], asked: Asked) -> Iterator[SetLine]:
    """One for each coverage, of the seeds of a row."""
    for coverage in asked.coverages:
        having = [(d.sets[coverage], d.num_rows) for d in decided if coverage in d.sets]
        if not having:
            yield SetLine(coverage, NOTHING, NO_INTERVAL, *(NOTHING,) * 3, len(decided))
            continue
        found = [figures for figures, _ in having]
        most = len(found[0].class_rows)
        yield SetLine(
            asked=coverage,
            reached=mean(((f.coverage, f.coverage_interval) for f in found), 1.0),
            law=conformal.coverage_law(min(n for _, n in having), coverage).interval,
            size=mean(((f.size, f.size_interval) for f in found), most),
            size_right=mean(((f.size_right, NO_INTERVAL) for f in found), most),
            size_wrong=mean(((f.size_wrong, NO_INTERVAL) for f in found), most),
            short=len(decided) - len(found),
        )


class AnswerLine(NamedTuple):
    """Selective answers of a row of the tables at one risk.

    Attributes:
        asked: the most that may be wrong.
        answered: share of the examples.
        risk: share of the answered that are wrong; of the seeds that answer any.
        infeasible: seeds whose calibration rows cannot show it.
        smallest: risk that all seeds can have; None if one of them can have none.
    """

    asked: float
    answered: Mean
    risk: Mean
    infeasible: int
    smallest: float | None


def answer_lines(decided: Sequence[Decided], asked: Asked) -> Iterator[AnswerLine]:
    """One for each risk, of the seeds of a row."""
    smallest = [d.smallest_risk for d in decided]
    for risk in asked.max_risks:
        found = [d.answers[risk] for d in decided if risk in d.answers]
        yield AnswerLine(
            asked=risk,
            answered=mean(((f.share, f.share_interval) for f in found), 1.0),
            risk=mean(((f.risk, f.risk_interval) for f in found), 1.0),
            infeasible=len(decided) - len(found),
            smallest=None if None in smallest else max(smallest),
        )
