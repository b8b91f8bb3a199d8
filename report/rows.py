"""What a report holds: results of runs, rows of several seeds, families of comparable rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from report.decided import Asked, Decided
from report.measure import Curves, SourceHistogram
from report.predictions import Predictions
from report.runs import Evaluation, Run, Skipped
from report.significance import Difference


@dataclass(frozen=True)
class Options:
    """Of the report: number of bins and of bootstrap resamples, and the seed of the latter.

    Attributes:
        asked: for which sets and selective answers are evaluated.
    """

    num_bins: int = 15
    resamples: int = 1000
    seed: int = 0
    asked: Asked = field(default_factory=Asked)


class DrawCounts(NamedTuple):
    """How many draws the examples of a result have: on average, at least and at most.

    Attributes:
        antithetic: whether they come in pairs (E, -E), which a single draw does not.
    """

    mean: float
    least: int
    most: int
    antithetic: bool

    @classmethod
    def of(cls, predictions: Predictions) -> DrawCounts:
        """Of the draws that a run has kept."""
        counts = predictions.num_draws
        least, most = int(counts.min()), int(counts.max())
        return cls(float(counts.mean()), least, most, predictions.antithetic and most > 1)


@dataclass(frozen=True)
class Result:
    """One evaluation of one run, measured.

    Attributes:
        values: metric -> value.
        replicates: metric -> its (R,) values on resampled examples.
        floors: metric -> what it would be if the model were calibrated, where that is not 0.
        temperature: what the logits were divided by, if anything.
        source: what shifted examples are held against, if there is something.
        decided: sets and selective answers, if the posterior was calibrated.
        rows: `Predictions.rows`.
    """

    run: Run
    evaluation: Evaluation
    split: str
    fingerprint: int
    num_examples: int
    draws: DrawCounts
    num_classes: int
    temperature: float | None
    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    floors: dict[str, float]
    curves: Curves
    source: SourceHistogram | None
    decided: Decided | None = None
    rows: int = 0


class Cell(NamedTuple):
    """A row's value of a metric.

    Attributes:
        low, high: the 95 % interval.
        spread: standard deviation over seeds; NaN for one seed.
        mark: "best" if better than every other row, "tied" if not told apart from the best one.
        difference: from the family's baseline; None on that row itself.
        floor: what the metric would be if the model were calibrated; 0 where that is no question.
    """

    value: float
    low: float
    high: float
    spread: float
    mark: str
    difference: Difference | None
    floor: float


@dataclass
class Row:
    """A method with its settings on one data set; `cells` by metric."""

    name: str
    results: list[Result]
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def seeds(self) -> list[str]:
        return [result.run.seed_name for result in self.results]

    @property
    def calibrated(self) -> Row:
        """The row without the seeds that have no sets and selective answers."""
        return Row(self.name, [result for result in self.results if result.decided is not None])

    @property
    def decided(self) -> list[Decided]:
        """Sets and selective answers of the seeds that have them."""
        return [result.decided for result in self.calibrated.results]

    @property
    def mean_draws(self) -> float:
        """Draws of an example, on average over examples and seeds."""
        return float(np.mean([result.draws.mean for result in self.results]))

    @property
    def num_draws(self) -> str:
        """As "10", "3, 10" where seeds differ, "6.3 (4 to 10)" where examples do; and the kind."""
        texts = []
        for antithetic in (False, True):
            counts = [r.draws for r in self.results if r.draws.antithetic == antithetic]
            if not counts:
                continue
            text = ", ".join(map(str, sorted({count.most for count in counts})))
            if any(count.least < count.most for count in counts):
                mean, least, most, _ = zip(*counts, strict=True)
                text = f"{np.mean(mean):.1f} ({min(least)} to {max(most)})"
            texts.append(f"{text} antithetic" if antithetic else text)
        return ", ".join(texts)


@dataclass
class Family:
    """The rows that can be compared: one model, one data set, the same examples."""

    model: str
    source: str
    dataset: str
    split: str
    shifted: bool
    num_examples: int
    num_classes: int
    baseline: str
    rows: list[Row]
    notes: list[str]

    @property
    def labelled(self) -> bool:
        """Whether the examples have labels; else only uncertainties are measured."""
        return not self.rows[0].results[0].evaluation.stored.unlabelled

    @property
    def title(self) -> str:
        trained = f", shifted from {self.source}" if self.shifted else ""
        return f"{self.dataset} ({self.split}{trained}), {self.model}"


@dataclass
class Training:
    """NLL over the updates, by row name: "train" and "eval" curves of each run."""

    model: str
    source: str
    curves: dict[str, list[dict[str, list[tuple[int, float]]]]]


@dataclass
class Report:
    """Everything that is shown."""

    options: Options
    families: list[Family]
    training: list[Training]
    skipped: list[Skipped]
    notes: list[str]
    num_runs: int
