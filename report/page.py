"""The report as one HTML file: no network, no library, tables that sort, plots inside."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

from report import cost
from report.decided_tables import PROMISE, Entry, Table, decided_tables, is_decided, left_out
from report.escape import LONGEST_TEXT, in_html, shorten
from report.measure import METRICS, TABLES, Metric
from report.plots import Plot
from report.rows import Cell, Family, Report, Row
from report.shift import Shift, shift_tables
from report.tables import (
    DIFFERENCES,
    UNDEFINED,
    bracket,
    caption,
    columns,
    difference_caption,
    has_differences,
    heading,
    number,
    signed,
    verdicts,
)

# The browser itself refuses anything that is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d5d9de;
  --paper: #ffffff; --shade: #f4f6f8; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2a9b1; --line: #3a4048;
  --paper: #16181c; --shade: #1f2329; --link: #7ab7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 88rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem;
  padding-top: .6rem; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
a { color: var(--link); } code { font: .85em ui-monospace, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.meta, figcaption, .note { color: var(--soft); font-size: .86rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.sortable th:first-child { position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 500; min-width: 8rem; }
tbody tr:hover > * { background: var(--shade); }
td small { display: block; color: var(--soft); font-size: .78rem; white-space: nowrap; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--link); }
thead button::after { content: "\\a0\\2195"; color: var(--soft); font-size: .8em; }
th[aria-sort=ascending] button::after { content: "\\a0\\25B2"; }
th[aria-sort=descending] button::after { content: "\\a0\\25BC"; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; background: white;
  border: 1px solid var(--line); border-radius: 4px; padding: 4px; }
figcaption { max-width: 62rem; }
.verdict { background: var(--shade); padding: .6rem 1rem .6rem 2rem; border-radius: 4px; }
.text td { overflow-wrap: anywhere; } .text { width: 100%; }
@page { size: landscape; }
@media print {
  body { max-width: none; font-size: 10pt; } nav, thead button::after { display: none; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  td, th { padding: .15rem .35rem; }
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is undefined stays last
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}
"""


def page(
    report: Report,
    plots: dict[int, list[Plot]],
    training: dict[int, Plot],
    made: dict[str, str],
    shifts: Sequence[tuple[Shift, Plot]] = (),
) -> str:
    """The whole page.

    Args:
        report: the numbers.
        plots: of each family, by its position.
        training: of each training, by its position.
        made: command, commit and time of the report.
        shifts: data sets at several strengths of errors in their text, each with its figure.
    """
    families = list(enumerate(report.families))
    links = "".join(
        f'<li><a href="#family-{i}">{in_html(family.title)}</a>, {len(family.rows)} row(s), '
        f"{family.num_examples} examples</li>"
        for i, family in families
    )
    sections = "".join(_family(i, family, report, plots.get(i, [])) for i, family in families)
    curves = "".join(
        f"<h3>{in_html(report.training[i].source)}, {in_html(report.training[i].model)}</h3>"
        + _figure(plot)
        for i, plot in training.items()
    )
    left_out = len(report.skipped)
    command = in_html(shorten(made["command"], LONGEST_TEXT))
    body = f"""
<header><h1>Calibration and uncertainty report</h1>
<p class="meta">{report.num_runs} run(s); {left_out} left out{_link_if(left_out, "skipped")}.
Made by <code>{command}</code><br>at commit <code>{in_html(made["commit"])}</code>,
{in_html(made["time"])}. The commands and commits of the runs are under
<a href="#made">What made the numbers</a>; a method's name in a table leads there.</p></header>
<nav><ul>{links}</ul></nav>
{sections}
{_shifts(shifts)}
{f'<h2 id="training">Training</h2>{curves}' if curves else ""}
{_promise(report)}
{_about()}
{_provenance(report)}
{_skipped(report)}
"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Calibration and uncertainty report</title>\n<style>{STYLE}</style></head>\n"
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _link_if(number_of: int, anchor: str) -> str:
    return f' (<a href="#{anchor}">why</a>)' if number_of else ""


def _family(position: int, family: Family, report: Report, plots: list[Plot]) -> str:
    parts = [f'<section><h2 id="family-{position}">{in_html(family.title)}</h2>']
    sentences = verdicts(family)
    if sentences:
        items = "".join(f"<li>{in_html(sentence)}</li>" for sentence in sentences)
        parts.append(f'<ul class="verdict">{items}</ul>')
    parts += [f'<p class="note">{in_html(note)}</p>' for note in family.notes]
    for name, metrics in TABLES.items():
        shown = columns(family, metrics)
        if shown:
            parts.append(f"<h3>{in_html(name)}</h3>")
            parts.append(_table(position, family, shown, caption(family, report, name)))
    if has_differences(family):
        parts.append(f"<h3>Difference from {in_html(family.baseline)}</h3>")
        parts.append(_differences(position, family, difference_caption(family, report)))
    parts.append(f"<h3>Cost</h3>{_costs(position, family)}")
    parts += [_decided_table(position, table) for table in decided_tables(family, report)]
    if is_decided(family) and (missing := left_out(family)):
        parts.append(f'<p class="note">{in_html(missing)}</p>')
    parts += [_figure(plot) for plot in plots]
    return "".join(parts) + "</section>"


def _shifts(shifts: Sequence[tuple[Shift, Plot]]) -> str:
    """Figure and tables of each data set that was evaluated with errors in its text."""
    parts = ['<h2 id="shift">Strength of the shift</h2>'] if shifts else []
    for shift, plot in shifts:
        parts += [f"<h3>{in_html(shift.title)}</h3>", _figure(plot)]
        for table in shift_tables(shift):
            lines = []
            for name, cells in table.lines:
                method = f'<th scope="row" data-value="{in_html(name)}">{in_html(name)}</th>'
                found = "".join(_shift_cell(cell) for cell in cells)
                lines.append(f"<tr>{method}{found}</tr>")
            head = [(title, "") for title in table.head]
            parts.append(f"<h3>{in_html(table.name)}</h3>{_sortable(head, lines, table.caption)}")
    return "".join(parts)


def _shift_cell(cell: Cell | None) -> str:
    if cell is None:
        return f'<td data-value="">{UNDEFINED}</td>'
    return (
        f'<td data-value="{cell.value:.9g}">{number(cell.value)}'
        f"<small>{bracket(cell.low, cell.high)}</small></td>"
    )


def _head(titles: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<th scope="col" title="{in_html(about)}">'
        f'<button type="button">{in_html(title)}</button></th>'
        for title, about in titles
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _method(position: int, number_of: int, row: Row) -> str:
    return (
        f'<th scope="row" data-value="{in_html(row.name)}">'
        f'<a href="#made-{position}-{number_of}">{in_html(row.name)}</a></th>'
    )


def _table(position: int, family: Family, shown: list[Metric], text: str) -> str:
    head = [
        ("method", ""),
        ("seeds", "number of seeds"),
        ("draws", "posterior draws of an example"),
    ]
    head += [(heading(metric), metric.about) for metric in shown]
    lines = []
    for i, row in enumerate(family.rows):
        cells = [
            _method(position, i, row),
            f'<td data-value="{len(row.results)}" title="seeds {in_html(", ".join(row.seeds))}">'
            f"{len(row.results)}</td>",
            f'<td data-value="{row.mean_draws:.9g}">{row.num_draws}</td>',
            *(_cell(row.cells.get(metric.key), family) for metric in shown),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _sortable(head, lines, text)


def _cell(cell: Cell | None, family: Family) -> str:
    if cell is None or not math.isfinite(cell.value):
        return f'<td data-value="">{UNDEFINED}</td>'
    value = number(cell.value) + ("†" if cell.mark == "tied" else "")
    value = f"<strong>{value}</strong>" if cell.mark == "best" else value
    about = f"{family.num_examples} examples"
    if math.isfinite(cell.spread):
        about += f"; standard deviation over seeds {cell.spread:.3f}"
    if cell.floor > 0:
        about += f"; a calibrated model with these probabilities would have {cell.floor:.3f}"
    interval = bracket(cell.low, cell.high)
    return (
        f'<td data-value="{cell.value:.9g}" title="{about}">{value}'
        f"{f'<small>{interval}</small>' if interval else ''}</td>"
    )


def _differences(position: int, family: Family, text: str) -> str:
    head = [("method", ""), *((heading(METRICS[k]), METRICS[k].about) for k in DIFFERENCES)]
    lines = []
    for i, row in enumerate(family.rows):
        if row.name == family.baseline:
            continue
        cells = [_method(position, i, row)]
        for key in DIFFERENCES:
            cell = row.cells.get(key)
            if cell is None or cell.difference is None or not math.isfinite(cell.difference.value):
                cells.append(f'<td data-value="">{UNDEFINED}</td>')
                continue
            found = cell.difference
            shown = signed(found.value)
            if found.holds:
                shown = f"<strong>{shown}</strong>"
            cells.append(
                f'<td data-value="{found.value:.9g}" title="{found.num_common} seed(s) in common, '
                f'p {found.p:.3g}, with Holm {found.p_holm:.3g}">'
                f"{shown}<small>{bracket(found.low, found.high)}</small></td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _sortable(head, lines, text)


def _costs(position: int, family: Family) -> str:
    lines = []
    for i, row in enumerate(family.rows):
        texts = zip(cost.cells(row), cost.exact_cells(row), strict=True)
        cells = (f'<td data-value="{in_html(exact)}">{in_html(text)}</td>' for text, exact in texts)
        lines.append(f"<tr>{_method(position, i, row)}{''.join(cells)}</tr>")
    head = [("method", ""), *((title, "") for title in cost.HEAD[1:])]
    return _sortable(head, lines, cost.caption(family))


def _decided_table(position: int, table: Table) -> str:
    """Sets or selective answers."""
    lines = [
        f"<tr>{_method(position, line.position, line.row)}{''.join(map(_entry, line.entries))}</tr>"
        for line in table.lines
    ]
    link = '<p class="note"><a href="#promise">What is promised, and on which conditions</a></p>'
    head = [("method", ""), *table.columns]
    return f"<h3>{in_html(table.name)}</h3>{_sortable(head, lines, table.caption)}{link}"


def _entry(entry: Entry) -> str:
    value = f"{entry.sort_by:.9g}" if math.isfinite(entry.sort_by) else ""
    below = "".join(f"<small>{in_html(t)}</small>" for t in (entry.interval, entry.note) if t)
    about = f' title="{in_html(entry.about)}"' if entry.about else ""
    return f'<td data-value="{value}"{about}>{in_html(entry.text)}{below}</td>'


def _sortable(head: list[tuple[str, str]], lines: list[str], text: str) -> str:
    return (
        f'<div class="wide"><table class="sortable" aria-label="{in_html(text.partition(".")[0])}">'
        f"{_head(head)}<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note">{in_html(text)}</p>'
    )


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png.read_bytes()).decode()
    files = f"{plot.png.name}, {plot.png.with_suffix('.pdf').name}"
    return (
        f'<figure><img alt="{in_html(plot.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{in_html(plot.caption)} Files: {in_html(files)}.</figcaption></figure>"
    )


def _about() -> str:
    rows = "".join(
        f"<tr><th scope='row'>{in_html(heading(metric))}</th><td>{in_html(name)}</td>"
        f"<td>{in_html(metric.about)}</td></tr>"
        for name, metrics in TABLES.items()
        for metric in metrics
    )
    return (
        '<h2 id="about">What is measured, and how it is tested</h2>'
        '<p class="note">FPR@95: the share of errors (of shifted examples) that is kept at the '
        "threshold that keeps 95 % of the correct answers (of the source examples). Equations and "
        "references are in the docstrings of <code>report/uncertainty.py</code> and "
        "<code>utils/metrics.py</code>. A row “+ temperature” is the run above it with its logits "
        "divided by the temperature that the run fitted on held-out training rows.</p>"
        f'<div class="wide"><table class="text"><tbody>{rows}</tbody></table></div>'
        f"{_paragraphs(METHOD)}"
    )


def _promise(report: Report) -> str:
    """What sets and selective answers are worth, where there are some."""
    if not any(map(is_decided, report.families)):
        return ""
    title = "What sets and selective answers promise"
    return f'<h2 id="promise">{title}</h2>{_paragraphs(PROMISE)}'


def _paragraphs(text: str) -> str:
    return "".join(
        f"<p>{in_html(' '.join(part.split()))}</p>" for part in text.strip().split("\n\n")
    )


METHOD = """
Intervals are 95 %. Examples: resamples draw n of the n examples with replacement, the same ones for
all methods and seeds of a table, so differences are paired; the deviations are the quantiles of the
resampled values (means over the seeds) around their mean. Seeds: with S of them the half-width
t(0.975, S - 1) · s / √S is added in quadrature, s being the standard deviation over seeds of the
value, or of the difference on the seeds that both sides have. Intervals are put around the estimate
and cut to the metric's range. Ranks of more than 2000 examples are resampled in 2000 blocks. Smooth
ECE keeps the sample's bandwidth.

Calibration errors (ECE, adaptive, class-wise and smooth ECE, MCE, the Brier score's parts) are
biased upwards by noise, the more the fewer examples there are and the less confident a model is:
two calibrated models can differ. “ECE if calibrated” is the mean ECE of labels drawn from the row's
own probabilities; the other errors' are in their tooltips and in tables.csv. The bias lies between
0 and this. So the interval of a difference of such errors spans two: around the difference as it
is, and around the one with what calibrated models would have taken off. It is significant only if
both exclude 0. ACC, NLL and the Brier score have no such bias.

Limits: with one seed an interval holds the noise of the test examples only; with two the t quantile
is 12.7, so little is significant. The interval of a single calibration error lies around the value
with its bias. Intervals, and the marks * and † that follow from them, are not corrected for the
number of comparisons. Bold differences are: at 5 % over all rows of the table, by Holm's method,
for each metric by itself; p-values are in their tooltips and in tables.csv.
"""


def _provenance(report: Report) -> str:
    rows = []
    for i, family in enumerate(report.families):
        for j, row in enumerate(family.rows):
            for k, result in enumerate(row.results):
                made = result.evaluation.provenance
                anchor = f' id="made-{i}-{j}"' if k == 0 else ""
                scaled = (
                    f"<br>logits divided by {result.temperature:.3f}" if result.temperature else ""
                )
                updates = result.run.updates
                told = f"{updates} updates" if updates is not None else ""
                shown = "<br>".join(
                    in_html(text) for text in (made["started"], made["host"], told) if text
                )
                rows.append(
                    f"<tr{anchor}><td>{in_html(family.dataset)}: {in_html(row.name)}, seed "
                    f"{in_html(result.run.seed_name)}{scaled}</td>"
                    f"<td><code>{in_html(made['command'] or 'unknown')}</code></td>"
                    f"<td><code>{in_html(made['commit'] or 'unknown')}</code></td><td>{shown}</td>"
                    f"<td>{in_html(str(result.evaluation.file))}</td></tr>"
                )
    return (
        '<h2 id="made">What made the numbers</h2><div class="wide"><table class="text"><thead><tr>'
        "<th>row</th><th>command</th><th>commit</th><th>when, where</th><th>file</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _skipped(report: Report) -> str:
    parts = []
    if report.skipped:
        rows = "".join(
            f"<tr><td>{in_html(str(s.path))}</td><td>skipped: {in_html(s.reason)}</td></tr>"
            for s in report.skipped
        )
        parts.append(
            f'<h2 id="skipped">Left out</h2><div class="wide"><table class="text">'
            f"<tbody>{rows}</tbody></table></div>"
        )
    if report.notes:
        items = "".join(f"<li>{in_html(note)}</li>" for note in report.notes)
        parts.append(f'<h2 id="notes">Stored metrics that disagree</h2><ul>{items}</ul>')
    return "".join(parts)
