"""Tables of sets and selective answers: their cells as text, for every format, and what they say.

Each row of a family has a line for every coverage, and one for every risk. Names of rows come from
files; whoever shows a table escapes them for its format, and the texts here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from report.decided import (
    ANSWERED_BY,
    NO_INTERVAL,
    AnswerLine,
    Asked,
    Mean,
    answer_lines,
    mean,
    set_lines,
)
from report.rows import Family, Report, Row

PROMISED, NO_GUARANTEE = "as calibrated", "no guarantee"
PERHAPS_SEEN = "calibrated on rows that may have been trained on"
INFEASIBLE = "cannot be had"
UNDEFINED = "–"
INTERVALS = (
    "In brackets: 95 % intervals, exact for shares and Student's for sizes; of several seeds with "
    "the noise of both, examples and seeds. "
)
SCALED_ROWS = (
    "“+ temperature”: calibration rows and examples are scaled by the temperature that the run has "
    "fitted, as scripts/predict.py does. "
)


class Entry(NamedTuple):
    """A cell.

    Attributes:
        text: the value.
        interval: in brackets, or "".
        note: of seeds that do not have it, or "".
        sort_by: a number, or NaN.
        about: a tooltip.
    """

    text: str
    interval: str = ""
    note: str = ""
    sort_by: float = math.nan
    about: str = ""

    @property
    def line(self) -> str:
        """All of it, on one line."""
        return " ".join(filter(None, (self.text, self.interval, self.note)))


class Column(NamedTuple):
    """What its head says, and its tooltip."""

    title: str
    about: str


class Line(NamedTuple):
    """Cells of a row of the family; `position` is the row's among the family's."""

    position: int
    row: Row
    entries: list[Entry]


class Table(NamedTuple):
    """One table, without the column of the rows' names."""

    name: str
    caption: str
    columns: list[Column]
    lines: list[Line]


def is_decided(family: Family) -> bool:
    """Whether a run of the family was calibrated."""
    return any(row.decided for row in family.rows)


def decided_tables(family: Family, report: Report) -> list[Table]:
    """Sets and selective answers of a family; none where no run of it was calibrated."""
    if not is_decided(family):
        return []
    asked = report.options.asked
    tables = []
    if asked.coverages:
        lines = list(_lines(family, lambda row: _set_entries(row, asked)))
        tables.append(Table("Prediction sets", _set_caption(family, asked), SET_COLUMNS, lines))
    if asked.max_risks:
        lines = list(_lines(family, lambda row: _answer_entries(row, asked)))
        caption = _answer_caption(family, asked)
        tables.append(Table("Selective answers", caption, ANSWER_COLUMNS, lines))
    return tables


def left_out(family: Family) -> str:
    """The rows that these tables do not have, and why; "" if they have all."""
    without = []
    for row in family.rows:
        # of a run with a temperature, the row that has it
        own = [r for r in row.results if r.temperature == r.evaluation.temperature]
        missing = sum(result.decided is None for result in own)
        if missing:
            some = f" ({missing} of {len(own)} seeds)" if missing < len(own) else ""
            without.append(f"{row.name}{some}")
    if not without:
        return ""
    return (
        f"Not in the tables of sets and selective answers: {', '.join(without)}. There are no "
        "usable predictions of calibration rows; runs keep them with --calibrate auto."
    )


def _lines(family: Family, entries_of: Callable[[Row], Iterator[list[Entry]]]) -> Iterator[Line]:
    for position, row in enumerate(family.rows):
        if row.decided:
            for entries in entries_of(row):
                yield Line(position, row, [*_begin(row), *entries, _guarantee(row)])


def _begin(row: Row) -> list[Entry]:
    """Seeds, draws and calibration rows."""
    row = row.calibrated
    numbers = sorted({d.num_rows for d in row.decided})
    shown = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    number = len(row.results)
    return [
        Entry(str(number), sort_by=number, about=f"seeds {', '.join(row.seeds)}"),
        Entry(row.num_draws, sort_by=row.mean_draws),
        Entry(shown, sort_by=numbers[0]),
    ]


BEGIN = [
    Column("seeds", "number of seeds"),
    Column("draws", "posterior draws of an example"),
    Column("calibration rows", "that were neither trained nor tuned on"),
]
GUARANTEE = Column(
    "promise",
    "whether the calibration rows are of the data set that is evaluated, and were not trained on",
)


def promise_of(rows: Iterable[Row]) -> str:
    """What holds for all seeds of all rows: the least of what holds for each.

    Returns:
        `NO_GUARANTEE` where calibration rows are of another data set than the one that is
        evaluated, `PERHAPS_SEEN` where the run did not know whether the adapter was trained on
        them, else `PROMISED`.
    """
    decided = [one for row in rows for one in row.decided]
    if not all(one.guaranteed for one in decided):
        return NO_GUARANTEE
    return PROMISED if all(one.unseen for one in decided) else PERHAPS_SEEN


def _guarantee(row: Row) -> Entry:
    told = promise_of([row])
    return Entry(told, sort_by=float((NO_GUARANTEE, PERHAPS_SEEN, PROMISED).index(told)))


def _entry(figure: Mean, missing: str = "", about: str = "") -> Entry:
    """A mean over seeds; `missing` says what some or all of the seeds do not have."""
    if not math.isfinite(figure.value):
        return Entry(missing or UNDEFINED, about=about)
    if math.isfinite(figure.spread):
        about += f"{'; ' * bool(about)}standard deviation over seeds {figure.spread:.3f}"
    interval = _bracket(figure.low, figure.high)
    return Entry(f"{figure.value:.3f}", interval, missing, figure.value, about)


def _bracket(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""


# --- sets -----------------------------------------------------------------------------------------

SET_COLUMNS = [
    *BEGIN,
    Column("asked", "the coverage that was asked for"),
    Column("coverage", "share of the sets that hold the label"),
    Column("95 % of calibrations", "where the coverage of exchangeable examples then lies"),
    Column("mean size", "classes in a set"),
    Column("size if right", "where the most probable class is the label"),
    Column("size if wrong", "where the most probable class is another one"),
    GUARANTEE,
]


def _set_entries(row: Row, asked: Asked) -> Iterator[list[Entry]]:
    for line in set_lines(row.decided, asked):
        missing = INFEASIBLE if line.short else ""
        if 0 < line.short < len(row.decided):
            missing = f"not by {line.short} of {len(row.decided)} seeds"
        law = line.law if promise_of([row]) == PROMISED else NO_INTERVAL
        yield [
            Entry(f"{line.asked:g}", sort_by=line.asked),
            _entry(line.reached, missing),
            Entry(_bracket(*law) or UNDEFINED, sort_by=law.low),
            _entry(line.size),
            _entry(line.size_right),
            _entry(line.size_wrong),
        ]


def _set_caption(family: Family, asked: Asked) -> str:
    return (
        f"Prediction sets: {family.title}. {family.num_examples} examples, {family.num_classes} "
        f"classes, score {asked.set_score}. {_scaled_rows(family)}{INTERVALS}"
        f"{_conditions(family, 'A set is to hold the label with the probability asked for.')}"
    )


# --- selective answers ----------------------------------------------------------------------------

ANSWER_COLUMNS = [
    *BEGIN,
    Column("max risk", "the share of wrong ones among the answered that was asked for"),
    Column("answered", "share of the examples that are answered"),
    Column("risk", "share of wrong ones among them"),
    GUARANTEE,
]


def _answer_entries(row: Row, asked: Asked) -> Iterator[list[Entry]]:
    for line in answer_lines(row.decided, asked):
        yield [
            Entry(f"{line.asked:g}", sort_by=line.asked),
            _entry(line.answered, _infeasible(line, len(row.decided))),
            _entry(line.risk),
        ]


def _infeasible(line: AnswerLine, num_seeds: int) -> str:
    """What an `AnswerLine` says of seeds that cannot have the risk; "" if all can."""
    if not line.infeasible:
        return ""
    some = line.infeasible < num_seeds
    what = f"not by {line.infeasible} of {num_seeds} seeds" if some else INFEASIBLE
    if line.smallest is None:
        return f"{what}, nor any risk" if not some else what
    smallest = f"smallest risk{' for every seed' * (num_seeds > 1)} {line.smallest:g}"
    return f"{what}; {smallest}" if some else f"{what} ({smallest})"


def _answer_caption(family: Family, asked: Asked) -> str:
    promise = (
        f"Among the answered at most so many are to be wrong, with confidence {asked.confidence:g}."
    )
    return (
        f"Selective answers: {family.title}. {family.num_examples} examples, the surest by "
        f"{ANSWERED_BY.replace('_', ' ')} are answered. {_scaled_rows(family)}{INTERVALS}"
        f"{_conditions(family, promise)}"
    )


def _scaled_rows(family: Family) -> str:
    """What is said where runs have fitted a temperature."""
    decided = [result for row in family.rows for result in row.calibrated.results]
    return SCALED_ROWS if any(result.temperature is not None for result in decided) else ""


def _conditions(family: Family, promise: str) -> str:
    """Whether the promise holds for these examples."""
    told, broken = _told_of(family)
    if told == {NO_GUARANTEE}:
        return f"{promise} No guarantee holds here: the calibration rows are of other data."
    if told == {PERHAPS_SEEN}:
        return (
            f"{promise} No guarantee holds here: the runs did not know whether the adapter was "
            "trained on the calibration rows."
        )
    if PROMISED not in told:
        return f"{promise} No guarantee holds here; the table says why."
    rest = f", but not where the table says {' or '.join(f'“{b}”' for b in broken)}"
    rest = rest if broken else ""
    return f"{promise} That is promised for examples like the calibration rows{rest}."


def _told_of(family: Family) -> tuple[set[str], list[str]]:
    """What holds for the family's rows, and in a fixed order what of it is no promise."""
    told = {promise_of([row]) for row in family.rows if row.decided}
    return told, [text for text in (NO_GUARANTEE, PERHAPS_SEEN) if text in told]


# --- in short, and in full ------------------------------------------------------------------------

SHORT_HEAD = ["method", "seeds", "asked", "reached", "at the price of"]


def short_lines(family: Family, report: Report) -> Iterator[tuple[Row, list[str]]]:
    """The terminal's lines below `SHORT_HEAD`, without the name of their row."""
    asked = report.options.asked
    for row in family.rows:
        if not row.decided:
            continue
        seeds = str(len(row.decided))
        for line in set_lines(row.decided, asked):
            yield row, [seeds, f"coverage {line.asked:g}", *_short(line.reached, line.size, "size")]
        for line in answer_lines(row.decided, asked):
            missing = _infeasible(line, len(row.decided))
            figures = _short(line.risk, line.answered, "answered", missing)
            yield row, [seeds, f"risk {line.asked:g}", *figures]


def short_title(family: Family, report: Report) -> str:
    """What stands above them."""
    asked = report.options.asked
    told, broken = _told_of(family)
    some = "some rows: " if PROMISED in told else ""
    mark = f", {some}{' or '.join(broken)}" if broken else ""
    return (
        f"{family.title}: sets ({asked.set_score}) and selective answers (confidence "
        f"{asked.confidence:g}){mark}"
    )


def _short(reached: Mean, price: Mean, what: str, missing: str = "") -> list[str]:
    if not price.num_seeds:
        return [missing or INFEASIBLE, UNDEFINED]
    return [_entry(reached, missing).line, f"{what} {_entry(price).line}"]


def measured(row: Row, asked: Asked) -> Iterator[tuple[str, Mean, str]]:
    """(key, figure, mark) of everything that these tables say of a row, for tables.csv."""
    decided = row.decided
    if not decided:
        return
    promise = promise_of([row])
    mark = "" if promise == PROMISED else promise
    for line in set_lines(decided, asked):
        own = INFEASIBLE if line.short == len(decided) else mark
        for key in ("reached", "size", "size_right", "size_wrong"):
            name = "coverage" if key == "reached" else key
            yield f"set_{name}_at_{line.asked:g}", getattr(line, key), own
    for line in answer_lines(decided, asked):
        own = INFEASIBLE if line.infeasible == len(decided) else mark
        yield f"answered_at_risk_{line.asked:g}", line.answered, own
        yield f"risk_at_risk_{line.asked:g}", line.risk, own
    for key, numbers in (
        ("smallest_risk", [d.smallest_risk for d in decided]),
        ("calibration_rows", [d.num_rows for d in decided]),
    ):
        known = [(float(number), NO_INTERVAL) for number in numbers if number is not None]
        yield key, mean(known, math.inf), ""


# --- in plain words -------------------------------------------------------------------------------

PROMISE = """
Rows that were held out of training, and by which no temperature and no prior was chosen, calibrate
each run (--calibrate auto). Nothing is fitted on the examples of the tables: coverage and risk are
what was reached on them.

Sets. The threshold for a coverage is a quantile of the calibration rows' scores. If a new row is
exchangeable with them, as if all had been drawn from one source in random order, its set holds the
right answer with the probability asked for or more, whatever the model is worth; a bad model has
large sets. The probability is over the calibration rows and the new row together. One calibration
can reach a little less or a little more: “95 % of calibrations” says from where to where for so
many calibration rows, where scores do not tie. Nothing is promised for a single row, for the rows
of one class, or for the rows where the model is wrong.

Selective answers. The surest rows are answered, as far down as exact binomial tests on the
calibration rows allow. If these were drawn independently from what new rows are drawn from, the
share of wrong ones among the answered is at most the risk asked for, in all but 1 - confidence of
the calibrations. That holds for each risk alone, if it was chosen without the calibration rows: not
for all of a list together, and with less confidence for a risk that was picked because these rows
can show it. Where one “cannot be had”, too many of the surest calibration rows are wrong, or there
are too few rows to show it.

Conditions. New rows must be predicted in the same way: the same number and kind of draws, the same
temperature. Data of another kind than the calibration rows have no guarantee. Such tables say “no
guarantee”, and show what was reached all the same: a coverage far below the one asked for is what
a shift can do. Where a run did not know which rows the adapter was trained on, its tables say
“calibrated on rows that may have been trained on”: if they were, sets and risks promise too much.
"""
