"""Accuracy and calibration against the strength of a shift (Ovadia et al. 2019, arXiv 1906.02530).

    families of one data set, as it is and with errors in its text (`NAME-noisy-K`)
        -> `find_shifts` -> `Shift` -> `draw_shift`, `shift_tables`

Strength 0 is the data set as it is. All strengths must be of the same rows with the same labels:
what differs is the text alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from report.measure import METRICS
from report.plots import Plot, legend, panels, save_plot, short, shown_rows, style
from report.rows import Cell, Family
from utils.data_set_names import noise_of_block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("acc", "nll", "ece")
CAPTION = (
    "Against the strength of the shift: 0 is the data set as it is, 1 to 5 are more and more "
    "errors in the text of the same rows (docs/data.md). Lines: mean over seeds; bands: 95 % "
    "interval over examples and seeds. A method that knows when to doubt keeps its ECE low while "
    "its accuracy falls."
)


@dataclass(frozen=True)
class Shift:
    """One data set at several strengths of errors.

    Attributes:
        dataset: as it is.
        families: strength -> its tables, 0 first where the data set was evaluated as it is.
    """

    dataset: str
    families: dict[int, Family]

    @property
    def first(self) -> Family:
        """Of the weakest shift."""
        return next(iter(self.families.values()))

    @property
    def source(self) -> str:
        """What was trained on, where that is another data set; else empty."""
        return "" if self.dataset == self.first.source else self.first.source

    @property
    def title(self) -> str:
        """Of figure and tables."""
        one = self.first
        trained = f", trained on {self.source}" if self.source else ""
        return f"{self.dataset} ({one.split}{trained}), {one.model}: {one.num_examples} examples"

    def names(self) -> list[str]:
        """Of the rows, in the order of the tables."""
        return list(dict.fromkeys(row.name for f in self.families.values() for row in f.rows))

    def cells(self, name: str, key: str) -> dict[int, Cell]:
        """Strength -> a row's value of a metric, where it has one."""
        return {
            strength: row.cells[key]
            for strength, family in self.families.items()
            for row in family.rows
            if row.name == name and key in row.cells
        }


def find_shifts(families: Iterable[Family]) -> list[Shift]:
    """The data sets that were evaluated with errors in their text, in the order of the tables."""
    found: dict[tuple, dict[int, Family]] = defaultdict(dict)
    names: dict[tuple, str] = {}
    for family in families:
        result = family.rows[0].results[0]
        base, strength = noise_of_block(result.evaluation.dataset)
        key = (family.model, result.run.dataset, base, result.rows)
        found[key][strength or 0] = family
        names.setdefault(key, base)
        if strength is None:
            names[key] = family.dataset  # as the other tables call it
    return [
        Shift(names[key], dict(sorted(by_strength.items())))
        for key, by_strength in found.items()
        if any(by_strength)
    ]


def draw_shift(shift: Shift, places: dict[str, int], stem: str, folder: Path) -> Plot:
    """ACC, NLL and ECE of every row against the strength.

    Args:
        places: of the rows' names, which say how a row looks.
        stem: of the files' names.
    """
    kept = {row.name for row in shown_rows(shift.first)}
    having = [name for name in shift.names() if name in kept]
    left_out = len(shift.names()) - len(having)
    more = f" {left_out} rows are in the tables only." if left_out else ""
    return save_plot(
        "shift", shift.title, CAPTION + more, lambda: _figure(shift, having, places), stem, folder
    )


def _figure(shift: Shift, names: list[str], places: dict[str, int]) -> Figure:
    figure, across = panels(len(SHOWN), 3.1, 2.9)
    for key, ax in zip(SHOWN, across, strict=True):
        for name in names:
            cells = shift.cells(name, key)
            look, marker = style(places[name])
            at, values = list(cells), [cell.value for cell in cells.values()]
            ax.plot(at, values, marker=marker, markersize=4, label=short(name), **look)
            low, high = zip(*((cell.low, cell.high) for cell in cells.values()), strict=True)
            ax.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)
        ax.set(xlabel="strength of the shift", ylabel=METRICS[key].title)
        ax.set_xticks(list(shift.families))
    legend(across[-1])
    return figure


class ShiftTable(NamedTuple):
    """One metric against the strength.

    Attributes:
        head: "method" and the strengths.
        lines: of each row its name and its cells; None where it was not evaluated.
    """

    name: str
    caption: str
    head: list[str]
    lines: list[tuple[str, list[Cell | None]]]


def shift_tables(shift: Shift) -> list[ShiftTable]:
    """ACC, NLL and ECE of every row at every strength."""
    tables = []
    for key in SHOWN:
        lines = []
        for name in shift.names():
            cells = shift.cells(name, key)
            lines.append((name, [cells.get(strength) for strength in shift.families]))
        tables.append(
            ShiftTable(
                f"{METRICS[key].title} against the strength of the shift",
                f"{METRICS[key].title}: {shift.title}. Columns: strength of the errors in the "
                "text, 0 without any. In brackets: 95 % interval over examples and seeds.",
                ["method", *map(str, shift.families)],
                lines,
            )
        )
    return tables
