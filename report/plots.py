"""The report's figures, as PNG and PDF.

Colours are Okabe and Ito's, which the colour-blind tell apart; every row also has a marker and a
line style of its own, so that a print without colours can be read. A row looks the same in all
figures of a model and the data set that it was trained on.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.signal import convolve  # by Fourier transform where that is faster

from report.decided import Asked, set_lines
from report.decided_tables import promise_of
from report.escape import in_plot
from report.measure import COVERAGE_GRID, ENTROPY_BINS
from report.rows import Family, Result, Row, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
FIGURES = (
    *["reliability", "risk-coverage", "scatter", "draws", "entropy", "sets", "training", "shift"],
)
MOST = 12  # rows in a figure
MOST_POINTS = 2000  # of a training curve
LONGEST_LABEL, LONGEST_TITLE = 34, 140  # characters
Styled = tuple["Row", dict, str]  # a row, its colour and line style, its marker
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a name may hold a $
    "pdf.fonttype": 42,  # text that an editor can still read
}


@dataclass(frozen=True)
class Plot:
    """A figure on disk.

    Attributes:
        caption: of what it is, and what to look for.
        png: the file; the PDF stands beside it.
    """

    name: str
    caption: str
    png: Path


def draw_family(family: Family, places: dict[str, int], stem: str, folder: Path) -> list[Plot]:
    """All plots of one table.

    Args:
        places: of the rows' names, which say how a row looks.
        stem: of the files' names.
    """
    drawn: list[tuple[str, Callable, str]] = []
    if family.labelled:
        drawn += [
            ("reliability", _reliability, RELIABILITY),
            ("risk-coverage", _risk_coverage, RISK_COVERAGE),
            ("scatter", _scatter, SCATTER),
        ]
    if any(len(r.results[0].curves.draws) > 1 for r in family.rows):
        drawn.append(("draws", _draws, DRAWS))
    rows = shown_rows(family)
    if any(with_source(row) for row in rows):
        drawn.append(("entropy", _entropy, ENTROPY))
    title = f"{family.title}: {family.num_examples} examples"
    more = (
        f" Shown are {family.baseline} and those with the lowest {_ranked_by(family)[1]}, "
        f"{len(rows)} of "
        f"{len(family.rows)} rows."
        if len(rows) < len(family.rows)
        else ""
    )
    styled = [(row, *style(places[row.name])) for row in rows]
    return [
        save_plot(name, title, text + more, lambda draw=draw: draw(family, styled), stem, folder)
        for name, draw, text in drawn
    ]


def draw_sets(
    families: list[Family], asked: Asked, places: dict[str, int], stem: str, folder: Path
) -> Plot:
    """Coverage of the sets on a data set and on those that are shifted from it.

    Args:
        families: of one model and source with sets, its own data set first.
        asked: for which coverages.
        places: of the rows' names, which say how a row looks.
        stem: of the files' names.
    """
    title = f"{families[0].title}: sets, score {asked.set_score}"
    return save_plot("sets", title, SETS, lambda: _sets(families, asked, places), stem, folder)


def draw_training(
    training: Training, places: dict[str, int], stem: str, folder: Path
) -> Plot | None:
    """Training curves, if there are any."""
    having = [
        (runs, name, *style(places[name]))
        for name, runs in training.curves.items()
        if any(run["train"] or run["eval"] for run in runs)
    ]
    if not having:
        return None
    more = f" Shown are {MOST} of {len(having)} rows." if len(having) > MOST else ""
    title = f"Training on {training.source}, {training.model}"
    return save_plot(
        "training", title, TRAINING + more, lambda: _training(having[:MOST]), stem, folder
    )


def shown_rows(family: Family) -> list[Row]:
    """At most `MOST` rows, the baseline and those with the lowest NLL, in the table's order.

    Without labels it is the entropy instead of the NLL.
    """
    key, _ = _ranked_by(family)
    kept = sorted(family.rows, key=lambda row: (row.name != family.baseline, row.cells[key].value))[
        :MOST
    ]
    return [row for row in family.rows if row in kept]


def _ranked_by(family: Family) -> tuple[str, str]:
    """Key and name of what says which rows are shown."""
    return ("nll", "NLL") if family.labelled else ("entropy", "entropy")


def style(place: int) -> tuple[dict, str]:
    """(colour and line style, marker) of a row; together other ones for each of 64 places."""
    count = len(COLOURS)
    other = (place + place // count) % count
    return {"color": COLOURS[place % count], "linestyle": LINES[other]}, MARKERS[other]


def save_plot(
    name: str, title: str, caption: str, draw: Callable[[], Figure], stem: str, folder: Path
) -> Plot:
    """A figure as PNG and PDF, and what the page says of it.

    Args:
        name: one of `FIGURES`.
        title, caption: the figure's; the title is the caption's beginning.
        draw: makes it.
        stem: of the files' names.
    """
    png = folder / f"{stem}-{name}.png"
    save_figure(title, draw, png, png.with_suffix(".pdf"))
    return Plot(name, f"{title}. {caption}", png)


def save_figure(title: str, draw: Callable[[], Figure], *files: Path) -> None:
    """Draw a figure in the report's style, and save it in the formats that the files' names say.

    Args:
        title: of the whole figure.
        draw: makes it; it must have a layout engine.
        files: `.png` or `.pdf`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE), warnings.catch_warnings():
        # a name may be in a script that the font has no letters of
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = draw()
        figure.suptitle(in_plot(title, LONGEST_TITLE), fontsize=9)
        figure.get_layout_engine().execute(figure)  # once, not for every file
        figure.set_layout_engine("none")
        for file in files:
            kind = file.suffix[1:]
            # no date inside: the same numbers give the same file
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(file, format=kind, dpi=150, metadata=metadata)
        plt.close(figure)


def panels(count: int, width: float = 3.0, height: float = 2.7, **kwargs) -> tuple[Figure, list]:
    """A figure of so many panels, at most four beside one another; sizes of one in inches."""
    import matplotlib.pyplot as plt

    down = math.ceil(count / 4)
    across = math.ceil(count / down)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across, height * down), squeeze=False, **kwargs
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for ax in flat[:count]:
        ax.tick_params(labelbottom=True)
    figure.set_layout_engine("constrained")
    return figure, flat[:count]


def _mean_curve(row: Row, curve: Callable) -> np.ndarray:
    return np.mean([curve(result.curves) for result in row.results], axis=0)


# --- the figures ----------------------------------------------------------------------------------

RELIABILITY = (
    "Reliability: accuracy (dots, 95 % Wilson intervals) against confidence, bin by bin. On the "
    "diagonal a prediction is as often right as it claims; below it the method is over-confident. "
    "Grey bars: the share of the examples in each bin, with the number over the larger ones; a dot "
    "over a short bar means little. Several seeds: mean over seeds, intervals as if of one."
)


def _reliability(family: Family, rows: list[Styled]) -> Figure:
    figure, axes = panels(len(rows), sharex=True, sharey=True)
    for (row, style, marker), ax in zip(rows, axes, strict=True):
        counts, confidence, right = _mean_curve(row, lambda c: c.bins)
        filled = counts > 0
        n = np.maximum(counts, 1e-12)
        accuracy, at = right / n, confidence / n
        low, high = wilson(right, n)
        edges = np.linspace(0, 1, len(counts) + 1)
        ax.bar(edges[:-1], counts / counts.sum(), np.diff(edges), align="edge", color="0.85")
        for edge, width, count in zip(edges, np.diff(edges), counts, strict=False):
            if count >= 0.08 * counts.sum():
                ax.text(
                    edge + width / 2,
                    count / counts.sum() + 0.01,
                    f"{count:.0f}",
                    ha="center",
                    fontsize=6,
                    color="0.4",
                )
        ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        ax.errorbar(
            at[filled],
            accuracy[filled],
            yerr=np.clip([(accuracy - low)[filled], (high - accuracy)[filled]], 0, 1),
            color=style["color"],
            marker=marker,
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            capsize=2,
        )
        ece = row.cells["ece"]
        ax.set_title(f"{short(row.name)}\nECE {ece.value:.3f} [{ece.low:.3f}, {ece.high:.3f}]")
        ax.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="confidence")
    axes[0].set_ylabel("accuracy; share of examples")
    return figure


def wilson(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % score intervals of a proportion (Wilson 1927); trials need not be whole numbers."""
    z = 1.959964
    p = successes / trials
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    return centre - half, centre + half


RISK_COVERAGE = (
    "Risk and coverage: the error rate when only the most confident share of the examples is "
    "answered. A curve that falls towards the left knows its errors; one that rises there is sure "
    "where it is wrong. The right end is the plain error rate."
)


def _risk_coverage(family: Family, rows: list[Styled]) -> Figure:
    figure, (ax,) = panels(1, 6.6, 3.2)
    for row, style, _ in rows:
        label = f"{short(row.name)} (AURC {row.cells['aurc'].value:.3f})"
        ax.plot(COVERAGE_GRID, _mean_curve(row, lambda c: c.risk), label=label, **style)
    ax.set(xlabel="coverage", ylabel="error rate", xlim=(0, 1), ylim=(0, None))
    legend(ax)
    return figure


SCATTER = (
    "Accuracy and calibration: up and to the left is better. Where the 95 % intervals are wide "
    "against the distances, the order of the methods says little; the tables test the differences "
    "on the same examples, which is sharper than comparing intervals."
)


def _scatter(family: Family, rows: list[Styled]) -> Figure:
    figure, (ax,) = panels(1, 5.8, 3.2)
    for row, style, marker in rows:
        ece, acc = row.cells["ece"], row.cells["acc"]
        ax.errorbar(
            ece.value,
            acc.value,
            xerr=_around(ece),
            yerr=_around(acc),
            marker=marker,
            color=style["color"],
            linestyle="",
            elinewidth=0.8,
            capsize=2,
            label=short(row.name),
        )
    ax.set(xlabel="ECE", ylabel="accuracy")
    legend(ax)
    return figure


def _around(cell) -> list[list[float]]:
    """How far the interval reaches down and up."""
    ends = cell.value - cell.low, cell.high - cell.value
    return [[max(0.0, end) if math.isfinite(end) else 0.0] for end in ends]


DRAWS = (
    "Number of draws: NLL and ECE of the mean of the first 1, 2, ... draws. Where the curve is "
    "flat, more draws are not worth their time. An example that has fewer counts with all it has. "
    "Point estimates are a single point."
)


def _draws(family: Family, rows: list[Styled]) -> Figure:
    figure, axes = panels(2, 4.4, 3.0)
    for column, (ax, title) in enumerate(zip(axes, ("NLL", "ECE"), strict=True), start=1):
        for row, style, marker in rows:
            curves = [result.curves.draws for result in row.results]
            common = reduce(np.intersect1d, [curve[:, 0] for curve in curves])
            points = np.mean([curve[np.isin(curve[:, 0], common)] for curve in curves], axis=0)
            ax.plot(
                points[:, 0],
                points[:, column],
                marker=marker,
                markersize=4,
                label=short(row.name),
                **style,
            )
        ax.set(xlabel="draws", ylabel=title)
        if ax.get_xlim()[1] > 40:  # else the few draws of other rows lie on one another
            ax.set_xscale("log")
            # matplotlib would write powers of ten as formulas, which are switched off here
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(lambda value, _: "")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    legend(axes[1])
    return figure


ENTROPY = (
    "Entropy of the predictions on source (filled) and shifted examples (line), as shares of the "
    "examples. A method that notices the shift moves the line to the right of the filled area; "
    "the AUROC says how well the two can be told apart. Shifted data that are easier than the "
    "source need not look uncertain."
)


def _entropy(family: Family, rows: list[Styled]) -> Figure:
    rows = [styled for styled in rows if with_source(styled[0])]
    figure, axes = panels(len(rows), sharex=True, sharey=True)
    for (row, style, _), ax in zip(rows, axes, strict=True):
        results = with_source(row)
        own = np.mean([result.source.entropy for result in results], axis=0)
        shifted = np.mean([result.curves.entropy for result in results], axis=0)
        source_edges, edges = (
            np.linspace(0, math.log(max(num_classes, 2)), ENTROPY_BINS + 1)
            for num_classes in (results[0].source.num_classes, family.num_classes)
        )
        ax.stairs(own, source_edges, fill=True, color="0.8", label=short(family.source))
        ax.stairs(shifted, edges, color=style["color"], linewidth=1.4, label=short(family.dataset))
        auroc = row.cells.get("ood_auroc_entropy")
        told = f"\nAUROC {auroc.value:.3f}" if auroc else ""
        ax.set_title(f"{short(row.name)}{told}")
        ax.set(xlabel="entropy (nats)")
    axes[0].set_ylabel("share of examples")
    axes[0].legend(frameon=False)
    return figure


def with_source(row: Row) -> list[Result]:
    """Of a shifted set: the results whose source examples were evaluated too."""
    return [result for result in row.results if result.source is not None]


SETS = (
    "Coverage that was reached against the one that was asked for, with 95 % intervals. On the "
    "diagonal sets hold the label as often as promised; above it they are larger than they need to "
    "be. Where data are shifted from the calibration rows nothing is promised: below the diagonal "
    "the sets are too small for them. Points stand beside one another so that they can be told "
    "apart. Several seeds: the mean."
)


def _sets(families: list[Family], asked: Asked, places: dict[str, int]) -> Figure:
    figure, axes = panels(len(families), 3.4, 3.0, sharex=True, sharey=True)
    low, high = min(asked.coverages), max(asked.coverages)
    margin = max(0.03, 0.1 * (high - low))
    ends = max(0.0, low - margin), min(1.0, high + margin)
    closest = min(np.diff(asked.coverages), default=1.0)
    for family, ax in zip(families, axes, strict=True):
        rows = [row for row in shown_rows(family) if row.decided]
        ax.plot(ends, ends, color="0.5", linewidth=0.8)
        for place, row in enumerate(rows):
            step = min(0.006, 0.6 * closest / len(rows))
            beside = step * (place - (len(rows) - 1) / 2)
            lines = [line for line in set_lines(row.decided, asked) if line.reached.num_seeds]
            found = [line.reached for line in lines]
            colours, marker = style(places[row.name])
            ax.errorbar(
                [line.asked + beside for line in lines],
                [mean.value for mean in found],
                yerr=[
                    [mean.value - mean.low for mean in found],
                    [mean.high - mean.value for mean in found],
                ],
                marker=marker,
                markersize=4,
                linewidth=1,
                elinewidth=0.8,
                capsize=2,
                label=short(row.name),
                **colours,
            )
        told = textwrap.fill(promise_of(rows), 36)
        ax.set_title(f"{short(family.dataset)}\n{told}")
        ax.set(xlabel="coverage asked for")
    axes[0].set(xlim=ends, ylim=(None, 1.01), ylabel="coverage reached")
    legend(axes[-1], axes)
    return figure


TRAINING = (
    "Training: NLL of the batches over the updates, smoothed (running mean over a twentieth of the "
    "run), mean over seeds; markers: NLL of the evaluations while training. A training curve that "
    "goes on falling while the markers rise is over-fitting. Ensembles show all members in turn."
)


def _training(having: list[tuple[list[dict], str, dict, str]]) -> Figure:
    figure, (ax,) = panels(1, 6.6, 3.2)
    for runs, name, style, marker in having:
        steps, nll = _mean_of(run["train"] for run in runs)
        if len(steps):
            width = max(1, len(nll) // 20)
            ends = convolve(np.ones_like(nll), np.ones(width), "same")
            smooth = convolve(nll, np.ones(width), "same") / ends
            shown = slice(None, None, max(1, len(steps) // MOST_POINTS))
            ax.plot(steps[shown], smooth[shown], label=short(name), linewidth=1.3, **style)
        steps, nll = _mean_of(run["eval"] for run in runs)
        if len(steps):
            ax.plot(steps, nll, marker=marker, linestyle="", color=style["color"], markersize=4)
    ax.set(xlabel="update", ylabel="NLL (nats)", ylim=(0, None))
    legend(ax)
    return figure


def _mean_of(curves) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over the curves that have each step."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, nll in curve:
            by_step.setdefault(step, []).append(nll)
    steps = sorted(by_step)
    return np.array(steps), np.array([np.mean(by_step[step]) for step in steps])


def short(name: str) -> str:
    """A name for a legend."""
    return in_plot(name, LONGEST_LABEL)


def legend(ax: Axes, axes: Iterable[Axes] = ()) -> None:
    """Beside `ax`, as curves lie everywhere in it: of what is drawn there or in any of `axes`."""
    shown = {}
    for each in (*axes, ax):
        handles, labels = each.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    ax.legend(
        shown.values(), shown.keys(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
