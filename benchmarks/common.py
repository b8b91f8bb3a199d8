"""Timing of things run alternately in one process, as ratios of medians."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

BATCH, TOKENS = 4, 68  # rows and tokens of the measured batch


def alternate(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step; each round runs every one once, every other round backwards."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps) if number % 2 == 0 else list(reversed(steps))
        for name in names:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def growth_of_memory(work: Callable[[], object]) -> int:
    """Bytes by which `work` raises this process's peak of resident memory (Linux).

    For a process of its own: memory that was freed before would be used again.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
