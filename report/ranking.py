r"""Which of several candidates predicts rows best that no run was trained on, and how sure that is.

Every candidate has a run for each seed, all of them evaluated on the same n rows. Its score is the
mean over its seeds. Two standard errors stand beside it, because they answer different questions:

- over rows: that of the mean over seeds when n rows are drawn anew, with the adapters as they are
  (the standard deviation over bootstrap resamples of the rows);
- over seeds: $s / \sqrt S$ for S >= 2 seeds, what another training would change.

Neither says whether a candidate is worse than the best one, as hard rows are hard for both. That
does the difference to the best one, paired over rows and seeds, with the 95 % interval of
`report.significance`. An interval that holds 0 means: not distinguishable from the best.

The score of the best candidate is too good by what choosing gains; the test rows are for that.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from report import uncertainty as u
from report.decided_tables import UNDEFINED
from report.escape import in_csv, in_markdown
from report.measure import METRICS, Examples
from report.predictions import read_predictions
from report.runs import Unusable, read_run
from report.significance import Difference, paired_difference, resample, seed_of_examples
from report.tables import aligned, bracket, number, signed
from utils.errors import UsageError, quoted
from utils.run_paths import predictions_file
from utils.run_records import METRICS_FILE, read_metrics_record

SCORES = ("nll", "ece", "acc", "brier")
SEED = 0  # of the resamples
TIED = "not distinguishable from the best"


class Scored(NamedTuple):
    """A finished run on the held-out rows.

    Attributes:
        fingerprint: of the rows, their labels and the data set.
        num_rows: n.
        values: of each of `SCORES`.
        replicates: of the score that ranks, on resampled rows, (R,).
        floor: what that score would be if the model were calibrated, where that is not 0.
        seconds: of training and evaluation.
        peak_memory: bytes; None where the run did not say.
    """

    fingerprint: int
    num_rows: int
    values: dict[str, float]
    replicates: np.ndarray
    floor: float
    seconds: float
    peak_memory: int | None


class Ranked(NamedTuple):
    """A candidate.

    Attributes:
        name: of the candidate.
        seeds: that were run.
        values: of each of `SCORES`, means over the seeds.
        se_rows, se_seeds: standard errors of the score that ranks; NaN for one seed.
        difference: to the best candidate; None on that one itself.
        verdict: "best", `TIED` or "worse".
        seconds: of training and evaluation, mean over the seeds.
        peak_memory: the most bytes of any seed; None where no run says.
    """

    name: str
    seeds: list[int]
    values: dict[str, float]
    se_rows: float
    se_seeds: float
    difference: Difference | None
    verdict: str
    seconds: float
    peak_memory: int | None


def score_run(folder: Path, by: str, num_bins: int = 15, resamples: int = 1000) -> Scored:
    """What a finished run is worth on the evaluated rows of its --dataset.

    Args:
        folder: of the run.
        by: one of `SCORES`, the one that ranks.
        num_bins: of the ECE.
        resamples: R.
    Raises:
        UsageError: the run is not finished, or a file of it is damaged.
    """
    try:
        run = read_run(folder)
        # not by `run.dataset`: that is what a loaded adapter was trained on
        own = folder / predictions_file()
        evaluation = next(e for e in run.evaluations if e.file == own)
        predictions = read_predictions(evaluation)
    except Unusable as error:
        raise UsageError(
            f"{quoted(str(folder))} cannot be ranked: {error}. Delete the folder and run the sweep "
            "again with --resume."
        ) from None
    examples = Examples.of(predictions)
    n, rows = len(examples.labels), predictions.fingerprint
    chunks = [
        _scores(examples, num_bins, weights)[by]
        for (weights,) in resample({rows: n}, resamples, SEED)
    ]
    floor = 0.0
    if by == "ece":
        seed = seed_of_examples("calibrated labels", SEED, rows)
        floor = u.noise_floors(examples.probs, num_bins, seed)["ece"]
    metrics = read_metrics_record(folder / METRICS_FILE, "the sweep")
    seconds = sum(block.seconds or 0.0 for block in metrics.datasets.values())
    return Scored(
        rows,
        n,
        {key: float(value) for key, value in _scores(examples, num_bins).items()},
        np.concatenate(chunks),
        floor,
        (metrics.training_seconds or 0.0) + seconds,
        metrics.peak_memory_bytes,
    )


def _scores(
    examples: Examples, num_bins: int, weights: np.ndarray | None = None
) -> dict[str, u.Number]:
    """`SCORES`, (R,) each with weights (R, n)."""
    per_row = {
        "nll": u.negative_log_likelihoods(examples.log_probs, examples.labels),
        "acc": examples.top[1],
        "brier": u.brier_scores(examples.probs, examples.labels),
    }
    ece, _ = u.calibration_errors(*examples.top, num_bins, weights)
    return {key: u.mean(values, weights) for key, values in per_row.items()} | {"ece": ece}


def rank(found: Mapping[str, Mapping[int, Scored]], by: str) -> list[Ranked]:
    """The candidates, the best one first.

    Args:
        found: candidate -> seed -> its run; every candidate has the same seeds.
        by: one of `SCORES`.
    Raises:
        UsageError: runs were evaluated on different rows.
    """
    if len({run.fingerprint for runs in found.values() for run in runs.values()}) > 1:
        raise UsageError(
            "the candidates were not evaluated on the same rows, so their scores cannot be "
            "compared; was the data set changed? Start over in another --out."
        )
    is_low = METRICS[by].better == "low"
    means = {name: _mean(run.values[by] for run in runs.values()) for name, runs in found.items()}
    order = sorted(found, key=lambda name: means[name] if is_low else -means[name])
    return [_ranked(name, found[name], found[order[0]], by, is_low) for name in order]


def _ranked(
    name: str, runs: Mapping[int, Scored], best: Mapping[int, Scored], by: str, is_low: bool
) -> Ranked:
    own = [run.values[by] for run in runs.values()]
    difference, verdict = None, "best"
    if runs is not best:
        sides = (runs, best)
        difference = paired_difference(
            tuple({seed: run.values[by] for seed, run in side.items()} for side in sides),
            tuple({seed: run.replicates for seed, run in side.items()} for side in sides),
            tuple({seed: run.floor for seed, run in side.items()} for side in sides),
        )
        is_worse = difference.low > 0 if is_low else difference.high < 0
        verdict = "worse" if is_worse else TIED
    peaks = [run.peak_memory for run in runs.values() if run.peak_memory is not None]
    return Ranked(
        name,
        list(runs),
        {key: _mean(run.values[key] for run in runs.values()) for key in SCORES},
        float(np.std(np.mean([run.replicates for run in runs.values()], axis=0))),
        float(np.std(own, ddof=1) / len(own) ** 0.5) if len(own) > 1 else math.nan,
        difference,
        verdict,
        _mean(run.seconds for run in runs.values()),
        max(peaks, default=None),
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# --- as text --------------------------------------------------------------------------------------


def lines_of(ranked: list[Ranked], by: str) -> list[list[str]]:
    """Head and one line per candidate, for the terminal and for Markdown."""
    others = [key for key in SCORES if key != by]
    title = METRICS[by].title
    head = [
        *("candidate", "seeds", title, "SE rows", "SE seeds", "to the best", ""),
        *(METRICS[key].title for key in others),
        *("seconds", "MiB"),
    ]
    lines = [head]
    for row in ranked:
        found = row.difference
        to_best = "" if found is None else f"{signed(found.value)} {bracket(*found[1:3])}".strip()
        memory = UNDEFINED if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
        lines.append(
            [
                *(row.name, str(len(row.seeds)), number(row.values[by])),
                *(number(row.se_rows), number(row.se_seeds), to_best, row.verdict),
                *(number(row.values[key]) for key in others),
                *(f"{row.seconds:.1f}", memory),
            ]
        )
    return lines


def terminal(ranked: list[Ranked], by: str) -> str:
    """The table, without anything to explain it."""
    return aligned(lines_of(ranked, by))


def markdown(
    ranked: list[Ranked], by: str, num_rows: int, failed: Mapping[str, str], command: str
) -> str:
    """The table under its caption, and what could not be ranked.

    Args:
        ranked: the candidates.
        by: the score that ranks.
        num_rows: that were held out.
        failed: candidate -> why it has no place.
        command: that made it.
    """
    caption = (
        f"{num_rows} rows held out of training; the test rows were not looked at. SE: standard "
        "errors, over rows and over seeds. To the best: the paired difference with its 95 % "
        "interval over rows and seeds (with one seed, over rows only), not corrected for the "
        "number of candidates. The best score is too good by what choosing gains. Seconds: of one "
        "run's training and evaluation; MiB: "
        "the peak of its process."
    )
    lines = [[in_markdown(name), *numbers] for name, *numbers in lines_of(ranked, by)]
    parts = [f"# Sweep by {METRICS[by].title}", f"Made by {in_markdown(command)}."]
    parts += [caption, aligned(lines)]
    if failed:
        parts.append("## Failed")
        parts.append(
            "\n".join(f"- {in_markdown(name)}: {in_markdown(why)}" for name, why in failed.items())
        )
    return "\n\n".join(parts) + "\n"


CSV_COLUMNS = (
    *("candidate", "seeds", *SCORES, "ranked_by", "se_rows", "se_seeds"),
    *("difference", "difference_low", "difference_high", "verdict", "seconds"),
    *("peak_memory_bytes", "failed"),
)


def comma_separated(ranked: list[Ranked], by: str, failed: Mapping[str, str]) -> str:
    """The same with all digits; a failed candidate has its reason and no numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in ranked:
        difference = ("", "", "") if row.difference is None else row.difference[:3]
        writer.writerow(
            [
                *(in_csv(row.name), " ".join(map(str, row.seeds))),
                *(f"{row.values[key]:.6g}" for key in SCORES),
                *(by, *map(_exact, (row.se_rows, row.se_seeds, *difference)), row.verdict),
                *(f"{row.seconds:.3f}", "" if row.peak_memory is None else row.peak_memory, ""),
            ]
        )
    for name, why in failed.items():
        blank = [""] * (len(CSV_COLUMNS) - 2)
        writer.writerow([in_csv(name), *blank, in_csv(why)])
    return out.getvalue()


def _exact(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else ""
