"""Rows as text: the terminal's short table, Markdown, LaTeX (booktabs), CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable

from report import cost
from report.decided_tables import (
    INTERVALS,
    SHORT_HEAD,
    UNDEFINED,
    decided_tables,
    is_decided,
    left_out,
    measured,
    short_lines,
    short_title,
)
from report.escape import (
    LONGEST_TEXT,
    code_in_markdown,
    in_csv,
    in_latex,
    in_markdown,
    shorten,
)
from report.measure import METRICS, TABLES, Metric
from report.power import power_note
from report.rows import Cell, Family, Report, Row
from report.shift import find_shifts, shift_tables
from utils.errors import one_line

SHORT = ("acc", "ece", "nll", "brier")  # of the terminal
SHORT_UNLABELLED = ("entropy", "ood_auroc_maxprob", "ood_auroc_entropy", "ood_auroc_mi")
DIFFERENCES = ("acc", "ece", "ece_smooth", "nll", "brier", "aurc")
ARROWS = {"low": "↓", "high": "↑", "": ""}

BRACKETS = "In brackets: 95 % interval over examples and seeds. "
RULE = (
    "Bold: better than every other row, the paired 95 % interval of each difference excludes 0; "
    "for calibration errors with and without what a calibrated model would have too. "
    "†: where no row is, the best one and those not told apart from it. "
    f"{BRACKETS}"
)


def number(value: float) -> str:
    """Three decimals, 0 without a sign; `UNDEFINED` for what is not a number."""
    return f"{value:z.3f}" if math.isfinite(value) else UNDEFINED


def bracket(low: float, high: float) -> str:
    """The interval, or nothing where there is none."""
    return f"[{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""


def signed(value: float) -> str:
    """With its sign."""
    return f"{value:+.3f}" if math.isfinite(value) else UNDEFINED


def columns(family: Family, metrics: tuple[Metric, ...]) -> list[Metric]:
    """The metrics that some row has a number for."""
    return [
        metric
        for metric in metrics
        if any(
            metric.key in row.cells and math.isfinite(row.cells[metric.key].value)
            for row in family.rows
        )
    ]


def heading(metric: Metric) -> str:
    """The title, with an arrow to where it is better; the two stay on one line."""
    return f"{metric.title}\N{NO-BREAK SPACE}{ARROWS[metric.better]}".strip()


def caption(family: Family, report: Report, name: str) -> str:
    """What every table says of itself."""
    return (
        f"{name}: {family.title}. {family.num_examples} examples, {family.num_classes} classes, "
        f"{report.options.num_bins} bins, {report.options.resamples} resamples. "
        f"{RULE if report.options.resamples else ''}"
    )


def has_differences(family: Family) -> bool:
    """Whether there is a table of differences: there are labels, and rows besides the baseline."""
    return family.labelled and len(family.rows) > 1


def difference_caption(family: Family, report: Report) -> str:
    """What the table of differences says of itself."""
    return (
        f"Difference from {family.baseline}: {family.title}. Paired on the same "
        f"{family.num_examples} examples and the seeds in common: {_in_common(family)}. "
        f"{report.options.resamples} resamples. In brackets: 95 % intervals, each by itself. Bold: "
        f"significant at 5 % by Holm's correction over the {len(family.rows) - 1} rows, for each "
        f"metric by itself. {power_note(family)}"
    ).strip()


def _in_common(family: Family) -> str:
    """How many seeds of each row the baseline has too."""
    common = {
        row.name: row.cells["nll"].difference.num_common
        for row in family.rows
        if row.name != family.baseline
    }
    if len(set(common.values())) == 1:
        (number_of,) = set(common.values())
        return str(number_of or "none, so each side has its own")
    return ", ".join(f"{name} {number_of or 'none'}" for name, number_of in common.items())


def verdicts(family: Family) -> list[str]:
    """Is a row better, in what, and is the difference real: one sentence per metric."""
    sentences = []
    for key in SHORT:
        metric = METRICS[key]
        marked = [row for row in family.rows if key in row.cells and row.cells[key].mark]
        if not marked:
            continue
        pick = min if metric.better == "low" else max
        best = pick(marked, key=lambda row: row.cells[key].value)
        sentence = (
            f"{metric.title}: {best.name} has the best value, {number(best.cells[key].value)}"
        )
        others = [row.name for row in marked if row is not best]
        if not others:
            sentence += ", significantly better than every other row"
        elif len(others) == len(family.rows) - 1:
            sentence += ", but no row can be told apart from it"
        elif len(others) > 4:
            sentence += f", {len(others)} of the other rows cannot be told apart from it"
        else:
            sentence += f", not told apart from it: {', '.join(others)}"
        sentences.append(sentence + ".")
    return sentences


# --- terminal -------------------------------------------------------------------------------------


def terminal(report: Report) -> str:
    """Accuracy, ECE, NLL and Brier score of every row, `best` as **, `tied` as †."""
    blocks = []
    for family in report.families:
        short = SHORT if family.labelled else SHORT_UNLABELLED
        head = ["method", "seeds", "draws", *(METRICS[key].title for key in short), *cost.SHORT]
        lines = [head] + [
            [one_line(row.name), str(len(row.results)), row.num_draws]
            + [_plain(row.cells.get(key), bold="{}*") for key in short]
            + cost.short_cells(row)
            for row in family.rows
        ]
        title = one_line(family.title)
        blocks.append(f"{title}: {family.num_examples} examples\n{aligned(lines)}")
    having = [family for family in report.families if is_decided(family)]
    for family in having:
        lines = [[one_line(row.name), *texts] for row, texts in short_lines(family, report)]
        title = one_line(short_title(family, report))
        blocks.append(f"{title}\n{aligned([SHORT_HEAD, *lines])}")
    blocks += [one_line(text) for text in dict.fromkeys(map(left_out, having)) if text]
    if report.options.resamples:
        blocks.append(
            "[95 % interval]  *: better than every other row, significantly  "
            "†: best, or not told apart from it"
        )
    return "\n\n".join(blocks)


def _plain(cell: Cell | None, bold: str) -> str:
    if cell is None:
        return UNDEFINED
    value = number(cell.value) + ("†" if cell.mark == "tied" else "")
    value = bold.format(value) if cell.mark == "best" else value
    return f"{value} {bracket(cell.low, cell.high)}".strip()


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


# --- Markdown -------------------------------------------------------------------------------------


def markdown(report: Report, made: dict[str, str]) -> str:
    """All tables, each under its caption."""
    command = code_in_markdown(shorten(made["command"], LONGEST_TEXT))
    parts = [f"Made by {command} at commit {in_markdown(made['commit'])}, {made['time']}."]
    for family in report.families:
        parts.append(f"## {in_markdown(family.title)}")
        for name, metrics in TABLES.items():
            shown = columns(family, metrics)
            if not shown:
                continue
            lines = [["method", "seeds", "draws", *map(heading, shown)]]
            for row in family.rows:
                cells = [_plain(row.cells.get(m.key), bold="**{}**") for m in shown]
                name_of_row = in_markdown(row.name)
                lines.append([name_of_row, str(len(row.results)), row.num_draws, *cells])
            text = in_markdown(caption(family, report, name).strip())
            parts += [f"### {name}", text, aligned(lines)]
        if has_differences(family):
            lines = [["method", *(heading(METRICS[key]) for key in DIFFERENCES)]]
            for row in family.rows:
                if row.name != family.baseline:
                    cells = [_plain_difference(row, key, "**{}**") for key in DIFFERENCES]
                    lines.append([in_markdown(row.name), *cells])
            parts.append(f"### Difference from {in_markdown(family.baseline)}")
            parts += [in_markdown(difference_caption(family, report)), aligned(lines)]
        lines = [[*cost.HEAD], *([in_markdown(row.name), *cost.cells(row)] for row in family.rows)]
        parts += ["### Cost", in_markdown(cost.caption(family)), aligned(lines)]
        for table in decided_tables(family, report):
            lines = [["method", *(column.title for column in table.columns)]]
            for line in table.lines:
                cells = (entry.line for entry in line.entries)
                lines.append([in_markdown(line.row.name), *cells])
            parts += [f"### {table.name}", in_markdown(table.caption), aligned(lines)]
        if is_decided(family) and (missing := left_out(family)):
            parts.append(in_markdown(missing))
        parts += [f"- {in_markdown(note)}" for note in family.notes]
    shifts = find_shifts(report.families)
    parts += ["## Strength of the shift"] if shifts else []
    for table in (table for shift in shifts for table in shift_tables(shift)):
        lines = [table.head]
        for name, cells in table.lines:
            lines.append([in_markdown(name), *(_without_mark(cell) for cell in cells)])
        parts += [f"### {table.name}", in_markdown(table.caption), aligned(lines)]
    if report.skipped:
        parts.append("## Left out")
        parts.append("\n".join(f"- {in_markdown(item.line)}" for item in report.skipped))
    return "\n\n".join(parts) + "\n"


def _without_mark(cell: Cell | None) -> str:
    return _plain(cell and cell._replace(mark=""), bold="{}")


def _plain_difference(row: Row, key: str, bold: str) -> str:
    cell = row.cells.get(key)
    if cell is None or cell.difference is None:
        return UNDEFINED
    found = cell.difference
    text = signed(found.value)
    text = bold.format(text) if found.holds else text
    return f"{text} {bracket(found.low, found.high)}".strip()


# --- LaTeX ----------------------------------------------------------------------------------------


def latex(report: Report, made: dict[str, str]) -> str:
    r"""All tables for `\input`; the preamble needs \usepackage{booktabs}."""
    parts = [
        f"% Made by {shorten(made['command'], LONGEST_TEXT)}\n"
        f"% commit {one_line(made['commit'])}, {made['time']}\n"
        "% Needs \\usepackage{booktabs}; intervals are in tables.csv."
    ]
    for family in report.families:
        for name, metrics in TABLES.items():
            shown = columns(family, metrics)
            if not shown:
                continue
            head = ["method", "seeds", "draws", *map(heading, shown)]
            lines = [
                [
                    *map(in_latex, (row.name, str(len(row.results)), row.num_draws)),
                    *(_tex_cell(row.cells.get(m.key)) for m in shown),
                ]
                for row in family.rows
            ]
            text = caption(family, report, name).replace(BRACKETS, "")
            parts.append(_tex_table([in_latex(h) for h in head], lines, text))
        others = [row for row in family.rows if row.name != family.baseline]
        if has_differences(family):
            head = ["method", *(heading(METRICS[key]) for key in DIFFERENCES)]
            lines = [
                [in_latex(row.name)]
                + [_tex_math(_plain_difference(row, key, r"\textbf{{{}}}")) for key in DIFFERENCES]
                for row in others
            ]
            parts.append(
                _tex_table([in_latex(h) for h in head], lines, difference_caption(family, report))
            )
        lines = [[*map(in_latex, (row.name, *cost.cells(row)))] for row in family.rows]
        parts.append(_tex_table([*map(in_latex, cost.HEAD)], lines, cost.caption(family)))
        for table in decided_tables(family, report):
            head = ["method", *(column.title for column in table.columns)]
            lines = [
                [in_latex(line.row.name)]
                + [in_latex(entry._replace(interval="").line) for entry in line.entries]
                for line in table.lines
            ]
            text = table.caption.replace(INTERVALS, "")
            parts.append(_tex_table([in_latex(h) for h in head], lines, text))
    for table in (t for shift in find_shifts(report.families) for t in shift_tables(shift)):
        lines = [
            [in_latex(name), *(_tex_cell(cell and cell._replace(mark="")) for cell in cells)]
            for name, cells in table.lines
        ]
        text = table.caption.partition(" In brackets")[0]
        parts.append(_tex_table(table.head, lines, text))
    return "\n\n".join(parts) + "\n"


def _tex_table(head: list[str], lines: list[list[str]], text: str) -> str:
    rows = " \\\\\n".join(" & ".join(line) for line in lines)
    return (
        f"\\begin{{table}}\n\\centering{_tex_size(len(head))}\n\\caption{{{in_latex(text.strip())}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{' & '.join(head)} \\\\\n"
        f"\\midrule\n{rows} \\\\\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}"
    )


def _tex_size(num_columns: int) -> str:
    return r"\small" if num_columns <= 8 else r"\scriptsize\setlength{\tabcolsep}{3pt}"


def _tex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    value = in_latex(number(cell.value))
    return (
        f"\\textbf{{{value}}}"
        if cell.mark == "best"
        else value + in_latex("†" if cell.mark == "tied" else "")
    )


def _tex_math(text: str) -> str:
    return re.sub(r"([+-])(?=\d)", r"$\1$", text.replace("–", "--"))


# --- CSV ------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *("model", "trained_on", "dataset", "split", "method", "metric", "value", "low", "high"),
    *("std_over_seeds", "if_calibrated", "mark", "baseline"),
    *("difference", "difference_low", "difference_high", "n_common_seeds"),
    *("p", "p_holm", "difference_std_error"),
    *(
        "n_examples",
        "n_draws",
        "mean_draws",
        "n_seeds",
        "seeds",
        "training_seconds",
        "evaluation_seconds",
        "peak_memory_bytes",
        "num_bins",
        "resamples",
        "commits",
        "runs",
    ),
)


def comma_separated(report: Report) -> str:
    """One line per row and metric, with everything that the other tables round or leave out.

    Text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for family in report.families:
        for row in family.rows:
            for key, cell in row.cells.items():
                numbers = (cell.value, cell.low, cell.high, cell.spread, cell.floor or math.nan)
                difference = cell.difference.numbers if cell.difference else (math.nan,) * 7
                compared = (cell.mark, in_csv(family.baseline), *map(_exact, difference))
                counted = len(row.results)
                writer.writerow(_csv_line(report, family, row, key, numbers, compared, counted))
            for key, figure, mark in measured(row, report.options.asked):
                numbers = (*figure[:4], math.nan)
                compared = (mark, *[""] * 8)
                own, counted = row.calibrated, figure.num_seeds
                writer.writerow(_csv_line(report, family, own, key, numbers, compared, counted))
    return out.getvalue()


def _csv_line(
    report: Report,
    family: Family,
    row: Row,
    key: str,
    numbers: Iterable[float],
    compared: Iterable[str],
    num_seeds: int,
) -> list:
    """Of a metric: its value, interval, spread and floor, and how it compares with other rows."""
    commits = sorted({r.evaluation.provenance["commit"] for r in row.results})
    runs = [str(r.run.folder) for r in row.results]
    names = (family.model, family.source, family.dataset, family.split, row.name)
    return [
        *(*map(in_csv, names), key),
        *map(_exact, numbers),
        *compared,
        *(family.num_examples, row.num_draws, _exact(row.mean_draws)),
        num_seeds,
        in_csv(" ".join(row.seeds)),
        *cost.exact_cells(row),
        *(report.options.num_bins, report.options.resamples),
        *(in_csv(" ".join(commits)), in_csv(" ".join(runs))),
    ]


def _exact(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
