"""For how many seeds a row is better than the baseline: what a single run is likely to show.

An interval says whether means over seeds differ. How often one run shows it is another question: a
small difference that is the same for all seeds is shown by every run.
"""

from __future__ import annotations

from report.collect import seeds_of
from report.measure import METRICS
from report.rows import Family, Report, Row
from report.tables import SHORT, aligned
from utils.errors import one_line


def better_seeds(row: Row, baseline: Row, key: str) -> tuple[int, int]:
    """(seeds in which the row is better, seeds that both have); an equal value is not better."""
    own, other = (
        dict(zip(seeds_of(r), (result.values[key] for result in r.results), strict=True))
        for r in (row, baseline)
    )
    common = own.keys() & other.keys()
    sign = 1 if METRICS[key].better == "high" else -1
    return sum(sign * (own[seed] - other[seed]) > 0 for seed in common), len(common)


def seeds_table(report: Report) -> str:
    """For the terminal: a block for each family that has something to compare."""
    return "\n\n".join(_block(family) for family in report.families if len(family.rows) > 1)


def _block(family: Family) -> str:
    baseline = next(row for row in family.rows if row.name == family.baseline)
    lines = [["method", *(METRICS[key].title for key in SHORT)]]
    for row in family.rows:
        if row is not baseline:
            counts = (better_seeds(row, baseline, key) for key in SHORT)
            lines.append([one_line(row.name), *(f"{own} of {n}" for own, n in counts)])
    title = one_line(f"{family.title}: seeds in which a row is better than {family.baseline}")
    return f"{title}\n{aligned(lines)}"
