"""Where rows come from: the hub, local files in the hub's schema, or the embedded corpus.

A row is a plain dict in the hub's own columns. `load_rows` also says where each row stands, so that
a message about a bad row can name its file and line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.embedded import bbc_articles
from utils.errors import UsageError
from utils.hub import go_offline_if_unreachable

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub: its full id and configuration."""

    path: str
    config: str | None = None

    def rows(self, split: str) -> list[tuple[str, Row]]:
        from datasets import load_dataset

        go_offline_if_unreachable()
        try:
            data = load_dataset(self.path, self.config, split=split)
        except Exception as error:
            # datasets raises many classes for "no network", "no such set", "no such split".
            raise UsageError(
                f"the data set {self.path} ({self.config or 'default'}, split {split}) cannot be "
                f"loaded from the hub: {_first_line(error)}\n"
                "Without network access, put the rows in local files and pass --data-dir DIR, with "
                f"DIR/{split}.jsonl (or .json, .csv, .parquet) in the hub's own columns; or use an "
                "embedded data set: --dataset bbc_headlines."
            ) from None
        return [(f"{self.path} [{split}] row {i}", row) for i, row in enumerate(data)]


@dataclass(frozen=True)
class HubGroup:
    """Several configurations of one data set on the hub, one after the other (MMLU's subjects)."""

    path: str
    configs: tuple[str, ...]

    def rows(self, split: str) -> list[tuple[str, Row]]:
        return [row for config in self.configs for row in Hub(self.path, config).rows(split)]


@dataclass(frozen=True)
class BBCNews:
    """The embedded corpus: `text` (headline or body) and `topic` of each article."""

    text: str

    def rows(self, split: str) -> list[tuple[str, Row]]:
        return [
            (
                f"embedded corpus [{split}] '{a['headline']}'",
                {"text": a[self.text], "topic": a["topic"]},
            )
            for a in bbc_articles()
            if a["split"] == split and a[self.text]
        ]


Source = Hub | HubGroup | BBCNews


def load_rows(source: Source, split: str, data_dir: str | None, name: str) -> list[tuple[str, Row]]:
    """(where, row) of one split, from `data_dir` if given, else from the task's own source.

    Several data sets may stand in one `data_dir`, each in a folder of its name.

    Raises:
        UsageError: nothing can be found or read there; the message says what was looked for.
    """
    if data_dir:
        folder = Path(data_dir)
        rows = _local_rows(folder / name if (folder / name).is_dir() else folder, split)
    else:
        rows = source.rows(split)
    if not rows:
        raise UsageError(f"{data_dir or source} has no rows in split '{split}'.")
    return rows


def _local_rows(folder: Path, split: str) -> list[tuple[str, Row]]:
    if not folder.is_dir():
        raise UsageError(f"--data-dir: there is no folder {folder}.")
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.is_file():
            try:
                rows = list(_READERS[suffix](file))
            except csv.Error as error:
                raise UsageError(f"{file} cannot be read as CSV: {error}.") from None
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it."
                ) from None
            if not rows:
                raise UsageError(f"{file} has no rows; it needs at least one.")
            return rows
    wanted = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise UsageError(f"--data-dir: {folder} has none of {wanted}.")


def _read_jsonl(file: Path) -> Iterator[tuple[str, Row]]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield (
                    f"{file}:{number}",
                    _as_row(_parse(line, f"{file}:{number}"), f"{file}:{number}"),
                )


def _read_json(file: Path) -> Iterator[tuple[str, Row]]:
    content = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(content, list):
        raise UsageError(f"{file} must hold a list of objects, one per row.")
    for number, row in enumerate(content, 1):
        yield f"{file} row {number}", _as_row(row, f"{file} row {number}")


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:  # Excel begins with a mark
        reader = csv.DictReader(lines)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            cells = {k: v for k, v in row.items() if k is not None and v is not None}
            yield where, {key: _nested(value) for key, value in cells.items()}


def _nested(cell: str) -> Any:
    """A nested column, such as ARC's or MMLU's choices, is JSON in its cell; the rest is text."""
    if cell.startswith(("{", "[")):
        try:
            value = json.loads(cell)
        except ValueError:
            return cell
        if isinstance(value, dict) or all(isinstance(item, str) for item in value):
            return value  # a list of anything else is text in brackets
    return cell


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:
        raise UsageError(f"{file} cannot be read as parquet: {_first_line(error)}") from None
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: not valid JSON ({error}).") from None


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object, but is {type(value).__name__}.")
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
