"""Where rows come from: the hub, local files in the hub's schema, or the embedded corpus.

A row is a plain dict in the hub's own columns, or in those of a user's own table, which `read_rows`
reads (`dataset.tables` makes a task of it). `load_rows` also says where each row stands, so that
a message about a bad row can name its file and line. A file gives all of its rows or an error:
nothing that cannot be read is passed over.
"""

from __future__ import annotations

import csv
import io
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from utils.embedded import bbc_articles
from utils.errors import UsageError, described, quoted
from utils.hub import go_offline_if_unreachable
from utils.records import parse_json, read_text
from utils.registry import users_code
from utils.table_task import SUFFIXES

Row = dict[str, Any]
MOST_BYTES = 4 * 2**30  # of one file of rows; all of them are held in memory


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
            return [(f"{self.path} [{split}] row {i}", row) for i, row in enumerate(data)]
        except Exception as error:
            # datasets raises many classes for "no network", "no such set", "no such split".
            raise UsageError(
                f"the data set {self.path} ({self.config or 'default'}, split {split}) cannot be "
                f"loaded from the hub: {described(error)}\n"
                "Without network access, put the rows in local files and pass --data-dir DIR, with "
                f"DIR/{split}.jsonl (or .json, .csv, .parquet) in the hub's own columns; or use an "
                "embedded data set: --dataset bbc_headlines."
            ) from None


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


def load_rows(
    source: Source | None,
    split: str,
    data_dir: str | None,
    name: str,
    example: Mapping[str, Any] | None = None,
) -> list[tuple[str, Row]]:
    """(where, row) of one split, from `data_dir` if given, else from the task's own source.

    Several data sets may stand in one `data_dir`, each in a folder of its name.

    Args:
        source: where the rows are, without a `data_dir`.
        split: the source's name of it.
        data_dir: the folder of local files, if any.
        name: the task's.
        example: a row. A column that has text in it is text in a CSV, too, whatever it looks like.
    Raises:
        UsageError: nothing can be found or read there; the message says what was looked for.
    """
    if data_dir:
        folder = Path(data_dir)
        folder = folder / name if is_folder(folder / name) else folder
        texts = {key for key, value in (example or {}).items() if isinstance(value, str)}
        return _local_rows(folder, split, texts)
    if source is None:
        raise UsageError(f"{name} names no source of its rows; pass --data-dir DIR.")
    with users_code(f"the rows of {name}"):  # a source may be a user's own class
        rows = [(str(where), _as_row(row, str(where))) for where, row in source.rows(split)]
    if not rows:
        raise UsageError(f"{quoted(repr(source))} has no rows in split '{split}'.")
    return rows


def is_folder(path: Path) -> bool:
    """Whether there is a folder that can be looked into; never an error."""
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a parent that may not be entered
        return False


# --- local files ----------------------------------------------------------------------------------


def _local_rows(folder: Path, split: str, texts: set[str]) -> list[tuple[str, Row]]:
    if not is_folder(folder):
        raise UsageError(f"--data-dir: there is no folder {quoted(str(folder))} that can be read.")
    names = [f"{split}{suffix}" for suffix in SUFFIXES]
    try:
        # listed, not asked for one by one: a link that leads nowhere is a mistake, not an absence
        present = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UsageError(f"--data-dir: {folder} cannot be read ({error.strerror}).") from None
    found = [name for name in names if name in present]
    if not found:
        raise UsageError(f"--data-dir: {folder} has none of {', '.join(names)}.")
    if len(found) > 1:
        raise UsageError(
            f"--data-dir: {folder} has {' and '.join(found)}; keep one of them, so that it is "
            "clear which rows are meant."
        )
    file = folder / found[0]
    rows = list(read_rows(file, "--data-dir"))
    if file.suffix == ".csv":
        rows = [
            (where, {key: cell if key in texts else _nested(cell) for key, cell in row.items()})
            for where, row in rows
        ]
    if not rows:
        raise UsageError(f"{file} has no rows; it needs at least one.")
    return rows


def read_rows(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of a file whose ending, in any case, is one of `SUFFIXES`.

    The cells of a CSV are text; those of the other formats have their types.

    Args:
        file: of rows.
        what: the flag that names it, for messages.
    Raises:
        UsageError: it cannot be read, or a row is broken; file and line are named.
    """
    return _READERS[file.suffix.lower()](file, what)


def _text(file: Path, what: str) -> str:
    """The file's text, without the mark that Excel and some editors begin with."""
    return read_text(file, what, MOST_BYTES).removeprefix("\ufeff")


def _read_jsonl(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    # not splitlines(), which also cuts at line separators that JSON allows inside of a string
    for number, line in enumerate(io.StringIO(_text(file, what), newline=None), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, _as_row(_parse(line, where), where)


def _read_json(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    content = _parse(_text(file, what), str(file))
    if not isinstance(content, list):
        raise UsageError(f"{file} must hold a list of objects, one per row.")
    for number, row in enumerate(content, 1):
        yield f"{file} row {number}", _as_row(row, f"{file} row {number}")


def _read_csv(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV, strictly: a row has the header's number of cells, and its quotes are closed.

    Columns without a name, such as the index that pandas writes, are left out; so are empty lines.
    """
    text = _text(file, what)
    if "\0" in text:
        raise UsageError(f"{file} holds NUL characters; is it UTF-16? Convert it to UTF-8.")
    header: list[str] | None = None
    for line, cells in _csv_cells(file, text):
        where = f"{file}:{line}"
        is_blank = len(cells) == 1 and not cells[0].strip()
        if not cells or (is_blank and (header is None or len(header) > 1)):
            continue  # an empty line
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            raise UsageError(
                f"{where}: the row has {len(cells)} cells, the header has {len(header)}; a comma "
                'inside of a cell needs quotes around it ("a, b"), and every quote its end.'
            )
        yield where, {k: v for k, v in zip(header, cells, strict=True) if k}


def _csv_cells(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row, where the line is the row's first."""
    # with line ends as they are: those inside of quotes are part of the cell
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(
                f"{file}:{line}: the row that begins here cannot be read as CSV: {reason} (a quote "
                'inside of a quoted cell is written "").'
            ) from None
        yield line, cells


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    _check_columns([name for name in names if name], where)
    if not any(names):
        raise UsageError(f"{where}: the header names no column.")
    return names


def _check_columns(names: list[str], where: str) -> None:
    twice = _first_repeated(names)
    if twice is not None:
        raise UsageError(f"{where}: the column {quoted(twice)} stands there twice.")


def _nested(cell: str) -> Any:
    """A nested column, such as ARC's or MMLU's choices, is JSON in its cell; the rest is text."""
    if cell.startswith(("{", "[")):
        try:
            value = _parse(cell, "")
        except UsageError:
            return cell
        if isinstance(value, dict) or all(isinstance(item, str) for item in value):
            return value  # a list of anything else is text in brackets
    return cell


def _read_parquet(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    _check_ordinary(file, what)
    try:
        with pyarrow.parquet.ParquetFile(file) as content:  # no columns out of the folders' names
            table = content.read()
        names = table.column_names
        rows = table.to_pylist()
    except Exception as error:
        raise UsageError(f"{file} cannot be read as parquet: {described(error)}") from None
    _check_columns(names, str(file))
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", {key: _or_none(value) for key, value in row.items()}


def _or_none(value: Any) -> Any:
    """pandas writes NaN where a column of numbers has no value."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_ordinary(file: Path, what: str) -> None:
    """A pipe would wait for ever for somebody to write into it."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{what}: {file} cannot be read ({reason}).") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{what}: {file} is no ordinary file; a file is needed.")


# --- JSON -----------------------------------------------------------------------------------------


def _parse(text: str, where: str) -> Any:
    return parse_json(text, where, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, if no key stands in it twice: the last one would win in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = _first_repeated([key for key, _ in pairs])
        raise ValueError(f"the key {quoted(twice)} stands in an object twice")
    return content


def _first_repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON; write null where there is none")


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object, but is {type(value).__name__}.")
    return value


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
