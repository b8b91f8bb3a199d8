"""The report's files, and which ones of a folder they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from report.decided_tables import is_decided
from report.escape import file_stem
from report.page import page
from report.plots import FIGURES, draw_family, draw_sets, draw_training
from report.rows import Family, Report
from report.shift import draw_shift, find_shifts
from report.tables import CSV_COLUMNS, comma_separated, latex, markdown
from utils.errors import RunError, UsageError, quoted
from utils.records import MOST_BYTES, Record, read_record

# What each file begins with: a file of this name that begins otherwise is somebody else's.
BEGINNINGS = {
    "tables.md": "Made by ",
    "tables.tex": "% Made by ",
    "tables.csv": ",".join(CSV_COLUMNS[:4]),
    "report.html": '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http',
}
MANIFEST = "report-files.json"
STAGING = ".report-in-progress"
PLOT = rf"^([A-Za-z0-9][A-Za-z0-9.-]*)-(?:{'|'.join(FIGURES)})\.(?:png|pdf)$"


class Manifest(Record):
    """The plots that a report has written; it deletes no file but these."""

    format_version: Literal[1]
    plots: list[Annotated[str, StringConstraints(pattern=PLOT, max_length=255)]]


def check_writable(folder: Path) -> None:
    """Fail before an hour of resampling, not after it.

    Raises:
        UsageError: the folder cannot be made or written, or holds files of a report's names that no
            report has written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--out: {quoted(str(folder))} cannot be written ({reason}); choose another."
        ) from None
    for name, beginning in BEGINNINGS.items():
        if os.path.lexists(folder / name) and not _begins(folder / name, beginning):
            raise UsageError(
                f"--out: {quoted(str(folder / name))} is no file of a report, which would replace "
                "it; move it away, or choose another folder."
            )
    _written_plots(folder)


def _begins(file: Path, beginning: str) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as content:
        return content.read(len(beginning)) == beginning.encode()


def _written_plots(folder: Path) -> list[str]:
    """The plots that earlier reports have written into a folder."""
    if os.path.lexists(folder / MANIFEST):
        remedy = "Remove it, or choose another folder; the plots there then stay."
        return read_record(folder / MANIFEST, Manifest, "--out", remedy).plots
    page = folder / "report.html"  # older reports only name them in the captions
    if not page.is_file() or page.stat().st_size > MOST_BYTES:
        return []
    named = re.findall(r"Files: (\S+), (\S+)\.</", page.read_text("utf-8", errors="replace"))
    return [name for pair in named for name in pair if re.fullmatch(PLOT, name)]


def write(report: Report, folder: Path, made: dict[str, str]) -> Path:
    """Tables, plots and the page.

    All are made aside first and then put in place, each in one step, so what ends this in the
    middle leaves an earlier report as it was. That report's plots go if this one has none of the
    name. Files that no report has written stay: plots get another name.

    Args:
        made: command, commit and time of the report.
    Returns:
        the page's path.
    Raises:
        RunError: a file cannot be written.
    """
    try:
        with _staging(folder) as staging:
            earlier = _written_plots(folder)
            _make(report, staging, made, _stems_of_others(folder, earlier))
            plots = sorted(file.name for file in staging.iterdir() if file.name not in BEGINNINGS)
            # At every moment the manifest names all plots that are there.
            _put_manifest(sorted({*earlier, *plots}), staging, folder)
            for name in [*plots, *BEGINNINGS]:
                _put(name, staging, folder)
            for name in set(earlier) - set(plots):
                if (folder / name).is_file():
                    (folder / name).unlink()
            _put_manifest(plots, staging, folder)
    except OSError as error:
        raise RunError(
            f"--out: {quoted(str(folder))} cannot be written ({error.strerror or error}). Free "
            "some space or choose another folder."
        ) from error
    return folder / "report.html"


def _put(name: str, staging: Path, folder: Path) -> None:
    with open(staging / name, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staging / name, folder / name)


def _put_manifest(plots: list[str], staging: Path, folder: Path) -> None:
    content = {"format_version": 1, "plots": plots}
    (staging / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _put(MANIFEST, staging, folder)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside of `folder`; what a killed report has left in it goes."""
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stems_of_others(folder: Path, written: list[str]) -> set[str]:
    """Beginnings of names, in lower case, under which others keep what could be plots."""
    others = {name.lower() for name in os.listdir(folder)} - {name.lower() for name in written}
    return {match[1] for name in others if (match := re.fullmatch(PLOT, name))}


def _make(report: Report, folder: Path, made: dict[str, str], taken: set[str]) -> None:
    """All files of the report, in an empty folder.

    Args:
        taken: stems of names that no plot may have.
    """
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for family in report.families:
        known = places[family.model, family.source]
        for row in family.rows:
            known.setdefault(row.name, len(known))
    plots, training = {}, {}
    stems, training_stems, shift_stems = set(taken), set(taken), set(taken)
    for position, family in enumerate(report.families):
        source = family.source if family.shifted else ""
        stem = file_stem(stems, family.model, source, family.dataset)
        own = places[family.model, family.source]
        plots[position] = draw_family(family, own, stem, folder)
        asked = report.options.asked
        if is_decided(family) and not family.shifted:
            related = [family, *_shifted_from(family, report)]
            plots[position].append(draw_sets(related, asked, own, stem, folder))
    shifts = []
    for shift in find_shifts(report.families):
        one = shift.first
        stem = file_stem(shift_stems, one.model, shift.source, shift.dataset)
        shifts.append((shift, draw_shift(shift, places[one.model, one.source], stem, folder)))
    for position, curves in enumerate(report.training):
        stem = file_stem(training_stems, curves.model, curves.source)
        plot = draw_training(curves, places[curves.model, curves.source], stem, folder)
        if plot is not None:
            training[position] = plot
    texts = {
        "tables.md": markdown(report, made),
        "tables.tex": latex(report, made),
        "tables.csv": comma_separated(report),
        "report.html": page(report, plots, training, made, shifts),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _shifted_from(family: Family, report: Report) -> list[Family]:
    """The data sets that are shifted from a family's and have sets."""
    return [
        other
        for other in report.families
        if other.shifted
        and (other.model, other.source) == (family.model, family.source)
        and is_decided(other)
    ]
