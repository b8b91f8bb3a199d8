"""The report's files."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from utils.errors import UsageError
from utils.files import write_atomically
from utils.report.collect import Report
from utils.report.page import page
from utils.report.plots import draw_family, draw_training
from utils.report.tables import comma_separated, latex, markdown


def check_writable(folder: Path) -> None:
    """Fail before an hour of resampling, not after it.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").write_bytes(b"")
        (folder / ".probe").unlink()
    except OSError as error:
        raise UsageError(
            f"--out: {folder} cannot be written ({error.strerror}); choose another."
        ) from None


def write(report: Report, folder: Path, made: dict[str, str]) -> Path:
    """Tables, plots and the page; each file is replaced in one step.

    Args:
        made: command, commit and time of the report.
    Returns:
        the page's path.
    """
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for family in report.families:
        known = places[family.model, family.source]
        for row in family.rows:
            known.setdefault(row.name, len(known))
    plots, training = {}, {}
    stems: set[str] = set()
    training_stems: set[str] = set()
    for position, family in enumerate(report.families):
        stem = _stem(stems, family.model, family.source if family.shifted else "", family.dataset)
        plots[position] = draw_family(family, places[family.model, family.source], stem, folder)
    for position, curves in enumerate(report.training):
        stem = _stem(training_stems, curves.model, curves.source)
        plot = draw_training(curves, places[curves.model, curves.source], stem, folder)
        if plot is not None:
            training[position] = plot
    texts = {
        "tables.md": markdown(report, made),
        "tables.tex": latex(report, made),
        "tables.csv": comma_separated(report),
        "report.html": page(report, plots, training, made),
    }
    for name, text in texts.items():
        write_atomically(
            folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8")
        )
    return folder / "report.html"


def _stem(taken: set[str], *names: str) -> str:
    """A file name from names; another number where it is taken."""
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(filter(None, names))).strip("-.")[:80]
    unique, number = stem, 2
    while unique in taken:
        unique, number = f"{stem}-{number}", number + 1
    taken.add(unique)
    return unique
