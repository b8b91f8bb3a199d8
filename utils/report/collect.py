"""Runs to families of comparable rows: measured, resampled, averaged over seeds, compared.

A family is a table: one model, one data set, the same examples. A row is a method with its
settings; its seeds are averaged. Runs are read one after the other; only their numbers are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from utils.report.measure import METRICS, Curves, Examples, curves, measure, measure_shift
from utils.report.runs import (
    Evaluation,
    Predictions,
    Run,
    Skipped,
    Unusable,
    read_history,
    read_predictions,
    settings_key,
)
from utils.report.significance import (
    Difference,
    mean_over_seeds,
    paired_difference,
    resample,
)
from utils.seeding import mix_seed
from utils.uncertainty import noise_floors

POINT_ESTIMATES = ("mle", "map")  # what other methods are held against, in this order
SHOWN_FLAGS = 4  # of a row's settings, in its name
TOLERANCE = 1e-3  # between metrics.json and what its predictions give


@dataclass(frozen=True)
class Options:
    """Of the report: number of bins and of bootstrap resamples, and the seed of the latter."""

    num_bins: int = 15
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One evaluation of one run, measured.

    Attributes:
        values: metric -> value.
        replicates: metric -> its (R,) values on resampled examples.
        floors: metric -> what it would be if the model were calibrated, where that is not 0.
        temperature: what the logits were divided by, if anything.
    """

    run: Run
    evaluation: Evaluation
    split: str
    fingerprint: int
    num_examples: int
    num_draws: int
    num_classes: int
    temperature: float | None
    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    floors: dict[str, float]
    curves: Curves


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
    def num_draws(self) -> str:
        return ", ".join(map(str, sorted({result.num_draws for result in self.results})))


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


def collect(
    runs: Iterable[Run],
    skipped: Iterable[Skipped],
    options: Options,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure all runs and compare what is comparable."""
    report = Report(options, [], [], list(skipped), [], 0)
    bundles: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        bundles[run.model, run.dataset].append(run)
    for (model, source), bundle in sorted(bundles.items()):
        names = _row_names(bundle)
        found: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        training: dict[str, list] = defaultdict(list)
        for run in bundle:
            progress(str(run.folder))
            results = _measure_run(run, options, report)
            for result in results:
                scaled = "" if result.temperature is None else " + temperature"
                key = (result.evaluation.shifted, result.evaluation.dataset, result.split)
                found[(*key, result.fingerprint)][names[run.folder] + scaled].append(result)
            if results:
                report.num_runs += 1
                training[names[run.folder]].append(read_history(run))
        for (shifted, dataset, split, _), rows in sorted(found.items()):
            report.families.append(_family(model, source, dataset, split, shifted, rows, options))
            for result in (result for results in rows.values() for result in results):
                result.replicates.clear()  # thousands of runs would fill the memory
        report.training.append(Training(model, source, dict(training)))
    return report


def _measure_run(run: Run, options: Options, report: Report) -> list[Result]:
    """All evaluations of a run, raw and temperature scaled; what is damaged goes to the report."""
    results = []
    sources: dict[bool, tuple[int, Examples]] = {}  # scaled -> fingerprint, examples
    for evaluation in sorted(run.evaluations, key=lambda e: e.shifted):
        try:
            predictions = read_predictions(evaluation)
        except Unusable as error:
            report.skipped.append(Skipped(evaluation.file.parent, str(error)))
            continue
        variants = [None] if evaluation.temperature is None else [None, evaluation.temperature]
        for temperature in variants:
            examples = Examples.of(predictions, temperature)
            scaled = temperature is not None
            if not evaluation.shifted:
                sources[scaled] = predictions.fingerprint, examples
            source = sources.get(scaled) if evaluation.shifted else None
            result = _measure(run, evaluation, predictions, temperature, examples, source, options)
            results.append(result)
            if not scaled:
                report.notes += _disagreements(result, options)
    return results


def _measure(
    run: Run,
    evaluation: Evaluation,
    predictions: Predictions,
    temperature: float | None,
    examples: Examples,
    source: tuple[int, Examples] | None,
    options: Options,
) -> Result:
    own = predictions.fingerprint
    sizes = {own: len(examples.labels)}
    if source is not None:
        sizes[source[0]] = len(source[1].labels)
    values = measure(examples, options.num_bins)
    if source is not None:
        values |= measure_shift(source[1], examples)
    floors = noise_floors(
        examples.probs, options.num_bins, mix_seed("calibrated labels", options.seed, own)
    )
    values["ece_floor"] = floors["ece"]
    chunks = defaultdict(list)
    for weights in resample(sizes, options.resamples, options.seed):
        measured = measure(examples, options.num_bins, weights[0])
        if source is not None:
            measured |= measure_shift(source[1], examples, (weights[1], weights[0]))
        for key, replicates in measured.items():
            chunks[key].append(replicates.astype(np.float32))
    return Result(
        run=run,
        evaluation=evaluation,
        split=predictions.split,
        fingerprint=own,
        num_examples=len(examples.labels),
        num_draws=examples.draws.shape[1],
        num_classes=examples.probs.shape[1],
        temperature=temperature,
        values={key: float(value) for key, value in values.items()},
        replicates={
            key: np.concatenate(chunks[key]) if key in chunks else np.empty(0) for key in values
        },
        floors=floors | {"brier_refinement": -floors["brier_calibration"]},
        curves=curves(examples, options.num_bins),
    )


def _disagreements(result: Result, options: Options) -> list[str]:
    """Where metrics.json says something else than the predictions that it stands beside."""
    stored = result.evaluation.stored
    keys = ["acc", "nll", "brier"] + ["ece"] * (stored.get("num_bins") == options.num_bins)
    return [
        f"{result.evaluation.file}: its predictions give {METRICS[key].title} "
        f"{result.values[key]:.4f}, metrics.json says {stored[key]}"
        for key in keys
        if key in stored
        and not (
            isinstance(stored[key], int | float)
            and abs(stored[key] - result.values[key]) < TOLERANCE
        )
    ]


def _row_names(runs: list[Run]) -> dict[Any, str]:
    """A name for each run's row: its method and, where a method has several, the flags that differ.

    Runs of other settings never share a row.
    """
    by_method: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        by_method[run.method][settings_key(run.settings)] = run.settings
    names: dict[tuple[str, str], str] = {}
    for method, variants in by_method.items():
        flags = sorted({key for settings in variants.values() for key in settings})
        differing = [key for key in flags if len({repr(s.get(key)) for s in variants.values()}) > 1]
        for position, (key, settings) in enumerate(variants.items(), start=1):
            shown = [_flag(flag, settings[flag]) for flag in differing if flag in settings]
            more = f", {len(shown) - SHOWN_FLAGS} more" if len(shown) > SHOWN_FLAGS else ""
            name = f"{method} ({', '.join(shown[:SHOWN_FLAGS])}{more})" if shown else method
            taken = name in names.values()
            names[method, key] = f"{name} #{position}" if taken else name
    return {run.folder: names[run.method, settings_key(run.settings)] for run in runs}


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if value is True:
        return name
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name} {text.rstrip('/').rpartition('/')[2]}"


def _family(
    model: str,
    source: str,
    dataset: str,
    split: str,
    shifted: bool,
    found: dict[str, list[Result]],
    options: Options,
) -> Family:
    def order(name: str) -> tuple:
        method = found[name][0].run.method
        known = POINT_ESTIMATES.index(method) if method in POINT_ESTIMATES else 9
        return known, name

    rows = [Row(name, found[name]) for name in sorted(found, key=order)]
    first = rows[0].results[0]
    baseline = rows[0]
    for row in rows:
        _fill_cells(row, baseline)
    mark_best(rows, options)
    all_seeds = {seed for row in rows for seed in row.seeds}
    notes = [
        f"{row.name} has no seed {', '.join(sorted(all_seeds - set(row.seeds)))}."
        for row in rows
        if all_seeds - set(row.seeds)
    ]
    for row in rows:
        commits = {result.evaluation.provenance["commit"] for result in row.results}
        if len(commits) > 1:
            notes.append(f"The seeds of {row.name} were run at {len(commits)} different commits.")
    return Family(
        model,
        source,
        dataset,
        split,
        shifted,
        first.num_examples,
        first.num_classes,
        baseline.name,
        rows,
        notes,
    )


def _by_seed(row: Row, key: str) -> tuple[dict, dict, dict]:
    """seed -> value, seed -> replicates, seed -> noise floor."""
    return (
        {result.run.seeds: result.values[key] for result in row.results},
        {result.run.seeds: result.replicates[key] for result in row.results},
        {result.run.seeds: result.floors.get(key, 0.0) for result in row.results},
    )


def _fill_cells(row: Row, baseline: Row) -> None:
    for key, metric in METRICS.items():
        if any(key not in result.values for result in row.results):
            continue
        values, replicates, floors = _by_seed(row, key)
        row.cells[key] = Cell(
            *mean_over_seeds(values, replicates, metric.highest),
            spread=float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else np.nan,
            mark="",
            difference=None if row is baseline else _difference(row, baseline, key),
            floor=float(np.mean(list(floors.values()))),
        )


def _difference(row: Row, other: Row, key: str) -> Difference | None:
    if any(key not in result.values for result in other.results):
        return None
    return paired_difference(*zip(_by_seed(row, key), _by_seed(other, key), strict=True))


def mark_best(rows: list[Row], options: Options) -> None:
    """Mark the best row of each metric, or all that cannot be told apart from it.

    "best": the paired difference from every other row excludes 0. Else the best row and every row
    whose paired difference from it contains 0 are "tied".
    """
    if not options.resamples:
        return
    for key, metric in METRICS.items():
        having = [r for r in rows if key in r.cells and np.isfinite(r.cells[key].value)]
        if not metric.better or len(having) < 2:
            continue
        pick = min if metric.better == "low" else max
        best = pick(having, key=lambda row: row.cells[key].value)
        tied = []
        for row in having:
            if row is best:
                continue
            found = _difference(row, best, key)
            # On the seeds that both have, the best one could even be the worse: then they are tied.
            is_worse = found.low > 0 if metric.better == "low" else found.high < 0
            if not is_worse:
                tied.append(row)
        for row in [best, *tied]:
            row.cells[key] = row.cells[key]._replace(mark="tied" if tied else "best")
