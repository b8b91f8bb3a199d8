"""What rows have cost: seconds of training and evaluation, peak memory.

Means over the seeds of a row, and the most memory of any of them. They are what each run measured
itself, on the machine that it had and beside whatever else that was doing: a ratio between rows
says something only where that was the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable

from report.decided_tables import UNDEFINED
from report.rows import Family, Row

HEAD = ("method", "training s", "evaluation s", "peak MiB")
SHORT = ("seconds", "MiB")  # of the terminal


def caption(family: Family) -> str:
    """What the table says of itself."""
    return (
        f"Cost: {family.title}. Seconds of a run's own training, or of fitting a posterior on an "
        "adapter that another run has trained; of its evaluation on this data set; and the peak "
        "memory of the whole run. Means over the seeds, the most memory of any."
    )


def _measured(row: Row) -> tuple[float | None, float | None, int | None]:
    """Seconds of training, seconds of evaluation, bytes; None where no run says."""
    runs = [result.run for result in row.results]
    memory = [run.peak_memory for run in runs if run.peak_memory is not None]
    return (
        _mean(run.training_seconds for run in runs),
        _mean(result.evaluation.stored.seconds for result in row.results),
        max(memory, default=None),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cells(row: Row) -> list[str]:
    """The row's texts behind its name."""
    *seconds, memory = _measured(row)
    return [*(UNDEFINED if s is None else f"{s:.1f}" for s in seconds), _mebibytes(memory)]


def exact_cells(row: Row) -> list[str]:
    """For tables.csv: seconds, seconds, bytes; "" where nothing is known."""
    return ["" if value is None else f"{value:.10g}" for value in _measured(row)]


def short_cells(row: Row) -> list[str]:
    """For the terminal: all seconds, and mebibytes."""
    *seconds, memory = _measured(row)
    known = [value for value in seconds if value is not None]
    return [f"{sum(known):.0f}" if known else UNDEFINED, _mebibytes(memory)]


def _mebibytes(number: int | None) -> str:
    return UNDEFINED if number is None else f"{number / 2**20:.0f}"
