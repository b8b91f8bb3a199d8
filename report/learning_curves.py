r"""Learning curves of active learning: what labels are worth by each criterion, over seeds.

**The area under a curve** m(x), x being the number of labels, by the trapezoidal rule and divided
by the range, $A = \frac{1}{x_R - x_0} \int_{x_0}^{x_R} m(x) \, dx$: the mean of the metric over the
range, in the metric's own unit.

**Intervals** are Student's over the seeds, $\bar v \pm t_{0.975, S-1} \, s / \sqrt S$
(`decisions.intervals.mean_interval`). Criteria start from the same rows on the same seed, so a
difference is taken seed by seed, and the interval is that of these S differences. A single seed has
no interval.

All rounds are evaluated on the same examples: intervals hold what initial rows, training and chance
in the choice of rows do, not the noise of those examples. Nothing is corrected for the number of
comparisons.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.integrate import trapezoid

from decisions.intervals import mean_interval
from report.escape import code_in_markdown, in_markdown
from report.measure import METRICS
from report.plots import style
from report.tables import SHORT, aligned, bracket, heading, number, signed
from utils.round_log import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "random"  # what a criterion has to beat
OF_AREAS = ("acc", "nll")
SPREAD = (
    "[low, high]: 95 % interval of the mean over seeds (Student's t), which is wide for few "
    "seeds. It does not hold the noise of the evaluated examples, which are the same for all."
)
COLUMNS = ("kind", "by", "labelled", "metric", "mean", "low", "high", "num_seeds")


class Estimate(NamedTuple):
    """A mean over seeds, and its 95 % interval: NaN for a single seed."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does; False where there is none."""
        return self.low > 0 or self.high < 0


class Curves(NamedTuple):
    """What the rounds of a simulation say together.

    Attributes:
        labelled: numbers of labels, (R + 1,).
        num_seeds: S.
        curves: criterion -> metric -> one estimate for each of `labelled`.
        areas: criterion -> metric -> the area under its curve.
        differences: criterion -> metric -> the area less that of `BASELINE`; empty where that is
            none of the criteria.
    """

    labelled: list[int]
    num_seeds: int
    curves: dict[str, dict[str, list[Estimate]]]
    areas: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]


def area_under_curve(
    labelled: Sequence[int], values: Float[np.ndarray, "S R"]
) -> Float[np.ndarray, " S"]:
    """The mean height of the polygon through the points; see above.

    Args:
        labelled: numbers of labels, increasing, two or more.
        values: the metric at each of them, for each seed.
    """
    return trapezoid(values, labelled) / (labelled[-1] - labelled[0])


def estimate(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> Estimate:
    """The mean of one value per seed, with its interval cut to where values can lie."""
    low = high = math.nan
    if len(values) > 1:
        low, high = mean_interval(np.asarray(values), lowest, highest)
    return Estimate(float(np.mean(values)), low, high, len(values))


def curves_of(rounds: Sequence[Round]) -> Curves:
    """The curves of a complete simulation: every criterion has the same seeds and rounds."""
    criteria = list(dict.fromkeys(found.by for found in rounds))
    seeds = list(dict.fromkeys(found.seed for found in rounds))
    labelled = sorted({found.labelled for found in rounds})
    at = {(found.by, found.seed, found.labelled): found for found in rounds}

    def values(by: str, metric: str) -> Float[np.ndarray, "S R"]:
        return np.array([[getattr(at[by, s, x], metric) for x in labelled] for s in seeds])

    curves = {
        by: {
            metric: [estimate(column, 0.0, METRICS[metric].highest) for column in heights.T]
            for metric in SHORT
            for heights in [values(by, metric)]
        }
        for by in criteria
    }
    areas = {
        by: {metric: area_under_curve(labelled, values(by, metric)) for metric in OF_AREAS}
        for by in criteria
    }
    others = [by for by in criteria if by != BASELINE and BASELINE in criteria]
    return Curves(
        labelled,
        len(seeds),
        curves,
        {
            by: {m: estimate(of_seeds, 0.0, METRICS[m].highest) for m, of_seeds in own.items()}
            for by, own in areas.items()
        },
        {by: {m: estimate(areas[by][m] - areas[BASELINE][m]) for m in OF_AREAS} for by in others},
    )


# --- text -----------------------------------------------------------------------------------------


def curve_table(curves: Curves, intervals: Sequence[str] = SHORT) -> str:
    """A row for each number of labels and criterion; `intervals` names the metrics that have one.

    It is Markdown, and aligned for a terminal.
    """
    head = ["labels", "by", *(heading(METRICS[metric]) for metric in SHORT)]
    lines = [
        [str(x), by] + [_shown(own[metric][i], metric in intervals) for metric in SHORT]
        for i, x in enumerate(curves.labelled)
        for by, own in curves.curves.items()
    ]
    return aligned([head, *lines])


def area_table(curves: Curves) -> str:
    """The areas under the curves, and what they are more or less than random's."""
    head = ["by", *(f"area of {heading(METRICS[metric])}" for metric in OF_AREAS)]
    head += [f"{METRICS[m].title}, less {BASELINE}" for m in OF_AREAS if curves.differences]
    lines = []
    for by, own in curves.areas.items():
        line = [by, *(_shown(own[metric]) for metric in OF_AREAS)]
        if curves.differences:
            differences = curves.differences.get(by, {})
            line += [
                _shown(differences[m], sign=True) if m in differences else "" for m in OF_AREAS
            ]
        lines.append(line)
    return aligned([head, *lines])


def _shown(value: Estimate, with_interval: bool = True, sign: bool = False) -> str:
    shown = signed(value.mean) if sign else number(value.mean)
    return f"{shown} {bracket(value.low, value.high) if with_interval else ''}".strip()


def verdicts(curves: Curves) -> list[str]:
    """Each criterion held against random, as far as the intervals go and no further."""
    sentences = []
    for by, own in curves.differences.items():
        for metric, found in own.items():
            title = METRICS[metric].title
            if found.num_seeds < 2:
                told = "a single seed says nothing about others"
            elif not found.excludes_zero:
                told = f"not told apart from {BASELINE}"
            else:
                is_better = (found.mean > 0) == (METRICS[metric].better == "high")
                told = f"{'better' if is_better else 'worse'}, the interval excludes 0"
            sentences.append(
                f"{by} less {BASELINE}, area of {title}: {_shown(found, sign=True)} "
                f"({_seeds(found.num_seeds)}): {told}."
            )
    return sentences


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def terminal(curves: Curves) -> str:
    """Curves with the intervals of accuracy and NLL, areas, and what they say."""
    parts = [
        f"Mean over {_seeds(curves.num_seeds)}. {_spread(curves)}",
        curve_table(curves, OF_AREAS),
        area_table(curves),
        "\n".join(verdicts(curves)),
    ]
    return "\n\n".join(filter(None, parts))


def _spread(curves: Curves) -> str:
    return SPREAD if curves.num_seeds > 1 else "A single seed has no interval."


def markdown(curves: Curves, title: str, made: Mapping[str, str]) -> str:
    """curves.md.

    Args:
        title: of the simulation.
        made: `command` and `commit`.
    """
    parts = [
        f"# {in_markdown(title)}",
        f"Made by {code_in_markdown(made['command'])} at commit {in_markdown(made['commit'])}.",
        f"Mean over {_seeds(curves.num_seeds)}. {_spread(curves)}",
        "![Learning curves: each metric against the number of labels](curves.png)",
        "## Learning curves",
        curve_table(curves),
        "## Areas under the curves",
        "The mean of the metric over the range of labels (trapezoidal rule, divided by the range).",
        area_table(curves),
    ]
    if curves.differences:
        parts.append("\n".join(f"- {sentence}" for sentence in verdicts(curves)))
        parts.append(
            "Differences are paired: on the same seed all criteria begin with the same rows. "
            "Nothing is corrected for the number of comparisons."
        )
    return "\n\n".join(parts) + "\n"


def comma_separated(curves: Curves) -> str:
    """curves.csv: one line for each estimate; a single seed's interval is empty."""
    lines: list[tuple] = []
    for by, own in curves.curves.items():
        for metric, points in own.items():
            for x, point in zip(curves.labelled, points, strict=True):
                lines.append(("curve", by, x, metric, *point))
    for kind, table in (("area", curves.areas), ("difference", curves.differences)):
        for by, own in table.items():
            lines += [(kind, by, "", metric, *found) for metric, found in own.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if value != value else value for value in line] for line in lines)
    return text.getvalue()


# --- the plot -------------------------------------------------------------------------------------


def draw(curves: Curves) -> Figure:
    """Each metric against the number of labels, with a band for the interval."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHORT), figsize=(3 * len(SHORT), 3.1))
    figure.set_layout_engine("constrained")
    for ax, metric in zip(axes, SHORT, strict=True):
        for place, (by, own) in enumerate(curves.curves.items()):
            look, marker = style(place)
            mean, low, high = np.array([point[:3] for point in own[metric]]).T
            ax.plot(curves.labelled, mean, marker=marker, markersize=4, label=by, **look)
            ax.fill_between(curves.labelled, low, high, color=look["color"], alpha=0.15, lw=0)
        ax.set_xlabel("labels")
        ax.set_title(heading(METRICS[metric]))
    axes[0].legend()
    return figure
