"""Runs to families of comparable rows: measured, resampled, averaged over seeds, compared.

A family is a table: one model, one data set, the same examples. A row is a method with its
settings; its seeds are averaged. Runs are read one after the other; only their numbers are kept.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from report.decided import Calibrated, Decided, calibrate, decide
from report.escape import distinct, shorten
from report.measure import METRICS, Examples, Source, curves, measure, measure_shift
from report.predictions import Predictions, read_predictions
from report.rows import Cell, DrawCounts, Family, Options, Report, Result, Row, Training
from report.runs import (
    Evaluation,
    Run,
    Skipped,
    Unusable,
    read_history,
    seed_text,
    settings_key,
)
from report.significance import (
    Difference,
    holm,
    mean_over_seeds,
    paired_difference,
    resample,
    seed_of_examples,
)
from report.uncertainty import noise_floors

POINT_ESTIMATES = ("mle", "map")  # what other methods are held against, in this order
SHOWN_FLAGS = 4  # of a row's settings, in its name
MOST_REASONS = 20  # of a folder, why something is left out
SCALED = " + temperature"  # after a row's name
NOT_DECIDED = "no sets and selective answers"
MOST_PARTS = 8  # of a path that are looked at, and of a flag's values that are shown
TOLERANCE = 1e-3  # between metrics.json and what its predictions give
UNEQUAL_DRAWS = (
    "Numbers or kinds of draws differ, from row to row or from example to example. Plain mutual "
    "information grows with the number of draws (and so does, by less, the std over draws), and "
    "antithetic pairs converge faster: only the corrected one can be compared. AUROC and FPR@95 by "
    "mutual information rank by the plain one."
)
OF_NO_CLASS = (
    "These examples belong to none of the classes: there is no accuracy or calibration of them, "
    "only how uncertain a method is and how well that tells them from the source examples."
)
SETTLED = (
    "Examples have draws until they are settled. Those whose first draws happen to agree have few, "
    "which leaves even the corrected mutual information somewhat too low."
)


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
    models = {model for model, _ in bundles}
    tails = shortest_tails(model for model in models if os.path.isabs(model))
    shown = distinct({model: tails.get(model) or model for model in models})
    measured = {e.dataset for same in bundles.values() for run in same for e in run.evaluations}
    sets = distinct({name: name for name in measured | {source for _, source in bundles}})
    for (model, source), bundle in sorted(bundles.items()):
        names = _row_names(bundle)
        found: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        training: dict[str, list] = defaultdict(list)
        posteriors: dict[str, list[Run]] = defaultdict(list)
        for run in sorted(bundle, key=lambda run: (run.started, str(run.folder)), reverse=True):
            posteriors[run.posterior].append(run)  # the newest first
        for same in sorted(posteriors.values(), key=lambda same: str(same[0].folder)):
            results = _measure_posterior(same, names, options, report, progress)
            for result in results:
                scaled = "" if result.temperature is None else SCALED
                key = (result.evaluation.shifted, result.evaluation.dataset, result.split)
                name = names[result.run.folder] + scaled
                found[(*key, result.fingerprint)][name].append(result)
            having = {result.run.folder: result.run for result in results}
            report.num_runs += len(having)
            for folder, run in having.items():
                try:
                    training[names[folder]].append(read_history(run))
                except Unusable as error:
                    report.skipped.append(Skipped(folder, str(error)))
        for (shifted, dataset, split, _), rows in sorted(found.items()):
            for results in rows.values():
                results.sort(key=lambda result: str(result.run.folder))
            titles = shown[model], sets[source], sets[dataset], shorten(split)
            report.families.append(_family(*titles, shifted, rows, options))
            for result in (result for results in rows.values() for result in results):
                result.replicates.clear()  # thousands of runs would fill the memory
        report.training.append(Training(shown[model], sets[source], dict(training)))
    report.skipped = list(_bounded(report.skipped))
    return report


def _bounded(skipped: list[Skipped]) -> Iterator[Skipped]:
    """The first `MOST_REASONS` of each folder, and how many more: a run may name many sets."""
    number: Counter[Path] = Counter(item.path for item in skipped)
    shown: Counter[Path] = Counter()
    for item in skipped:
        shown[item.path] += 1
        if shown[item.path] <= MOST_REASONS:
            yield item
        elif shown[item.path] == number[item.path]:
            yield Skipped(item.path, f"and {number[item.path] - MOST_REASONS} more of this folder")


def _measure_posterior(
    runs: list[Run],
    names: dict[Path, str],
    options: Options,
    report: Report,
    progress: Callable[[str], None],
) -> list[Result]:
    """All evaluations of one posterior, raw and temperature scaled, the newer runs first.

    What is damaged, and what a newer run has measured on the same examples, goes to the report.
    Shifted examples are held against the source examples of their own run, or the newest one's; so
    are sets and selective answers made by the calibration rows of either.
    """
    calibrated = _calibrations(runs, names, options, report)
    results: list[Result] = []
    taken: dict[tuple, Evaluation] = {}
    sources: dict[tuple[Path | None, bool], Source] = {}
    pairs = [(run, evaluation) for run in runs for evaluation in run.evaluations]
    for run, evaluation in sorted(pairs, key=lambda pair: pair[1].shifted):
        progress(str(evaluation.file.parent))
        if evaluation.omitted:
            report.skipped.append(Skipped(evaluation.file.parent, evaluation.omitted))
        try:
            predictions = read_predictions(evaluation)
        except Unusable as error:
            report.skipped.append(Skipped(evaluation.file.parent, str(error)))
            continue
        for temperature in dict.fromkeys([None, evaluation.temperature]):
            scaled = temperature is not None
            key = (names[run.folder], run.seeds, predictions.fingerprint, scaled)
            if key in taken:
                newer = taken[key].file.parent
                reason = (
                    f"{evaluation.dataset}{' + temperature' * scaled}: the same method, settings, "
                    f"seed and examples as {newer}, which is newer"
                )
                report.skipped.append(Skipped(evaluation.file.parent, reason))
                continue
            taken[key] = evaluation
            examples = Examples.of(predictions, temperature)
            source = None
            if evaluation.shifted:
                source = sources.get((run.folder, scaled), sources.get((None, scaled)))
            decided = None
            # where there is a temperature, whoever predicts has it
            if temperature == evaluation.temperature and examples.labelled:
                by_run, by_row = ((k, temperature) for k in (run.folder, names[run.folder]))
                rows = calibrated.get(by_run, calibrated.get(by_row))
                decided = rows and _decide(rows, evaluation, predictions, examples, options, report)
            result = _measure(run, evaluation, predictions, temperature, examples, source, options)
            results.append(replace(result, decided=decided))
            if not evaluation.shifted:
                source = Source.of(examples, predictions.fingerprint)
                sources.setdefault((run.folder, scaled), source)
                sources.setdefault((None, scaled), source)
            report.notes += _disagreements(result, options)
    return results


def _calibrations(
    runs: list[Run], names: dict[Path, str], options: Options, report: Report
) -> dict[tuple[Path | str, float | None], Calibrated]:
    """(folder of the run, temperature) -> its calibration; (name of its row, temperature) -> the
    newest run's, for runs that only evaluate what another one has calibrated.

    Rows of one name have the same settings of evaluation, as the number of draws.
    """
    found: dict[tuple[Path | str, float | None], Calibrated] = {}
    for run in runs:
        if run.calibration is None:
            continue
        try:
            rows = calibrate(run, options.asked)
        except Unusable as error:
            report.skipped.append(Skipped(run.folder, f"{NOT_DECIDED}: {error}"))
            continue
        for key in (run.folder, names[run.folder]):
            found.setdefault((key, rows.temperature), rows)
    return found


def _decide(
    rows: Calibrated,
    evaluation: Evaluation,
    predictions: Predictions,
    examples: Examples,
    options: Options,
    report: Report,
) -> Decided | None:
    try:
        return decide(rows, evaluation.dataset, predictions, examples, options.asked)
    except Unusable as error:
        reason = f"{NOT_DECIDED} on {shorten(evaluation.dataset)}: {error}"
        report.skipped.append(Skipped(evaluation.file.parent, reason))
        return None


def _measure(
    run: Run,
    evaluation: Evaluation,
    predictions: Predictions,
    temperature: float | None,
    examples: Examples,
    source: Source | None,
    options: Options,
) -> Result:
    own = predictions.fingerprint
    sizes = {own: len(examples.labels)}
    if source is not None:
        sizes[source.fingerprint] = source.num_examples
    values = measure(examples, options.num_bins)
    if source is not None:
        values |= measure_shift(source, examples)
    floors = {}
    if examples.labelled:
        seed = seed_of_examples("calibrated labels", options.seed, own)
        floors = noise_floors(examples.probs, options.num_bins, seed)
        floors["brier_refinement"] = -floors["brier_calibration"]
        values["ece_floor"] = floors["ece"]
    chunks = defaultdict(list)
    for weights in resample(sizes, options.resamples, options.seed):
        measured = measure(examples, options.num_bins, weights[0])
        if source is not None:
            measured |= measure_shift(source, examples, (weights[1], weights[0]))
        for key, replicates in measured.items():
            chunks[key].append(replicates.astype(np.float32))
    return Result(
        run=run,
        evaluation=evaluation,
        split=predictions.split,
        fingerprint=own,
        num_examples=len(examples.labels),
        draws=DrawCounts.of(predictions),
        num_classes=examples.probs.shape[1],
        temperature=temperature,
        values={key: float(value) for key, value in values.items()},
        replicates={
            key: np.concatenate(chunks[key]) if key in chunks else np.empty(0) for key in values
        },
        floors=floors,
        curves=curves(examples, options.num_bins),
        source=None if source is None else source.histogram,
        rows=predictions.rows,
    )


def _disagreements(result: Result, options: Options) -> list[str]:
    """Where metrics.json says something else than the predictions that it stands beside."""
    block = result.evaluation.stored
    keys = ["acc", "nll", "brier"] + ["ece"] * (block.num_bins == options.num_bins)
    scored = block if result.temperature is None else block.temperature_scaled
    return [
        f"{result.evaluation.file}: its predictions give {METRICS[key].title} "
        f"{result.values[key]:.4f}, metrics.json says {stored}"
        for key in keys
        if (stored := getattr(scored, key)) is not None
        and abs(stored - result.values[key]) >= TOLERANCE
    ]


def _row_names(runs: list[Run]) -> dict[Path, str]:
    """A name for each run's row: its method and, where a method has several, the flags that differ.

    Runs of other settings never share a row. A flag that a run does not know, as it is older, tells
    it apart only where the others' values differ.
    """
    by_method: dict[tuple[str, bool], list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.method, "folder" in run.settings].append(run)
    methods = shortest_tails({run.method for run in runs})
    names: dict[Path, str] = {}
    taken: dict[str, tuple] = {}
    for (method, _), same in by_method.items():
        values: dict[str, set[str]] = defaultdict(set)
        for run in same:
            for key, value in run.settings.items():
                values[key].add(repr(value))
        differing = sorted(key for key, found in values.items() if len(found) > 1)
        paths = shortest_tails(
            {v for r in same for k in differing if isinstance(v := r.settings.get(k), str)}
        )
        for run in same:
            settings = {key: run.settings[key] for key in differing if key in run.settings}
            shown = [_flag(k, v, paths) for k, v in settings.items() if v is not None]
            more = f", {len(shown) - SHOWN_FLAGS} more" if len(shown) > SHOWN_FLAGS else ""
            name = methods[method] or method
            name += f" ({', '.join(shown[:SHOWN_FLAGS])}{more})" if shown else ""
            name = unique = shorten(name)
            key, number = (method, settings_key(settings)), 2
            while any(taken.setdefault(text, key) != key for text in (unique, unique + SCALED)):
                unique, number = f"{name} #{number}", number + 1
            names[run.folder] = unique
    return names


def shortest_tails(names: Iterable[str]) -> dict[str, str]:
    """The last parts of each path, or of FILE:NAME, as many as tell it from the others."""
    tails: dict[str, list[str]] = {}
    for name in names:
        whole = name.rstrip("/")
        starts = [match.end() for match in re.finditer("[/:]", whole)][-MOST_PARTS:]
        tails[name] = [whole[start:] for start in [*reversed(starts), 0]]
    having = Counter(tail for found in tails.values() for tail in set(found))
    return {
        name: next((tail for tail in found if having[tail] == 1), found[-1])
        for name, found in tails.items()
    }


def _flag(name: str, value: Any, paths: dict[str, str]) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"{name} {str(value).lower()}"
    values = value if isinstance(value, list) else [value]
    texts = (paths.get(v, v) if isinstance(v, str) else str(v) for v in values[:MOST_PARTS])
    more = f" and {len(values) - MOST_PARTS} more" if len(values) > MOST_PARTS else ""
    return shorten(f"{name} {' '.join(texts)}{more}")


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
    correct_differences(rows)
    mark_best(rows, options)
    trained = {
        row.name: {seed_text(result.run.training_seeds) for result in row.results} for row in rows
    }
    all_seeds = set().union(*trained.values())
    notes = [
        f"{name} has no seed {', '.join(sorted(all_seeds - seeds))}."
        for name, seeds in trained.items()
        if all_seeds - seeds
    ]
    if any(r.source and r.source.num_classes != r.num_classes for row in rows for r in row.results):
        notes.append(
            "Source and shifted examples have different numbers of classes, which alone changes "
            "entropies and probabilities: AUROC and FPR@95 say little."
        )
    if first.evaluation.stored.unlabelled:
        notes.append(OF_NO_CLASS)
    for row in rows:
        commits = {result.evaluation.provenance["commit"] for result in row.results}
        if len(commits) > 1:
            notes.append(f"The seeds of {row.name} were run at {len(commits)} different commits.")
    # a point estimate has one draw, and nothing that would depend on their number
    drawn = [r.draws for row in rows for r in row.results if r.draws.most > 1]
    settled = any(count.least < count.most for count in drawn)
    if settled or len({(count.most, count.antithetic) for count in drawn}) > 1:
        notes.append(UNEQUAL_DRAWS)
    if settled:
        notes.append(SETTLED)
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


def seeds_of(row: Row) -> list[tuple]:
    """What tells the results of a row apart, in their order, and is the same in other rows.

    The seeds of the training are what rows have in common: of the adapter where one was loaded.
    Where a row has several results of one, the run's own seeds stand beside it.
    """
    seeds = [result.run.training_seeds for result in row.results]
    if len(set(seeds)) < len(seeds):
        return [(result.run.seeds, result.run.training_seeds) for result in row.results]
    return seeds


def _by_seed(row: Row, key: str) -> tuple[dict, dict, dict]:
    """seed -> value, seed -> replicates, seed -> noise floor."""
    seeds = seeds_of(row)
    parts = zip(
        *((r.values[key], r.replicates[key], r.floors.get(key, 0.0)) for r in row.results),
        strict=True,
    )
    return tuple(dict(zip(seeds, part, strict=True)) for part in parts)


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


def correct_differences(rows: list[Row]) -> None:
    """Holm's correction of each metric's differences from the baseline, over the rows."""
    for key in METRICS:
        having = [row for row in rows if key in row.cells and row.cells[key].difference is not None]
        corrected = holm([row.cells[key].difference.p for row in having])
        for row, p in zip(having, corrected, strict=True):
            cell = row.cells[key]
            row.cells[key] = cell._replace(difference=cell.difference._replace(p_holm=float(p)))


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
