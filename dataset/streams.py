"""Rows of a file one by one, in constant memory: for files that are predicted, not trained on.

The rules are those of `sources`: a row is an object, a CSV row has the header's number of cells,
nothing stands there twice. What breaks one is given as the reason in the row's place, because a
reader of millions of rows may go on behind it; only what makes the rest unreadable ends the file.
"""

from __future__ import annotations

import codecs
import csv
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dataset.sources import (
    Row,
    _as_row,
    _check_columns,
    _check_ordinary,
    _header,
    _nested,
    _or_none,
    _parse,
)
from utils.errors import UsageError, described, quoted

FORMATS = ("jsonl", "csv", "parquet", "txt")
LONGEST_LINE = 10_000_000  # characters: a row of text, not a file without line ends


class Read(NamedTuple):
    """One row of a file.

    Attributes:
        where: file and line.
        row: its columns; of a line of plain text the text.
        problem: why it is none; `row` is then empty.
    """

    where: str
    row: Row | str
    problem: str | None = None


def format_of(name: str, given: str | None, flag: str) -> str:
    """The format of a file, by its suffix unless it is given.

    Raises:
        UsageError: neither says it.
    """
    suffix = Path(name).suffix.lower().removeprefix(".")
    if given is None and suffix not in FORMATS:
        raise UsageError(
            f"{flag} {quoted(name)}: its name does not say what it holds; let it end in "
            f"{', '.join('.' + form for form in FORMATS)}, or pass {flag}-format."
        )
    return given or suffix


@contextmanager
def opened(name: str) -> Iterator[Path]:
    """The file, which can be read twice; standard input ("-") is kept in a temporary one.

    Raises:
        UsageError: there is no ordinary file of that name.
    """
    if name != "-":
        path = Path(name)
        _check_ordinary(path, "--rows")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        path = Path(folder) / "standard input"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def stream_rows(path: Path, form: str, shown: str, texts: Collection[str] = ()) -> Iterator[Read]:
    """The rows of a file in their order.

    Args:
        path: of the file.
        form: one of `FORMATS`.
        shown: the file's name in messages.
        texts: columns whose cells are text in a CSV, whatever they look like.
    Raises:
        UsageError: the file cannot be read any further.
    """
    try:
        for read in _READERS[form](path, shown):
            if form == "csv":
                cells = {k: v if k in texts else _nested(v) for k, v in read.row.items()}
                read = read._replace(row=cells)
            yield read
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown} cannot be read: {described(error)}") from None


def _lines(path: Path, shown: str) -> Iterator[str]:
    """The lines with their ends, which are kept as they are."""
    with open(path, "rb") as raw:
        begins = raw.read(3)
        raw.seek(len(codecs.BOM_UTF8) if begins == codecs.BOM_UTF8 else 0)
        number = 0
        while True:
            number += 1
            line = raw.readline(4 * LONGEST_LINE)
            if not line:
                return
            if len(line) >= 4 * LONGEST_LINE:
                raise UsageError(f"{shown}:{number}: the line has more than {len(line)} bytes.")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{shown}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of "
                    "the line)."
                ) from None
            if "\0" in text:
                raise UsageError(
                    f"{shown}:{number}: there are NUL characters; is it UTF-16? Convert it to "
                    "UTF-8."
                )
            yield text


def _jsonl(path: Path, shown: str) -> Iterator[Read]:
    for number, line in enumerate(_lines(path, shown), 1):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        try:
            yield Read(where, _as_row(_parse(line, where), where))
        except UsageError as error:
            yield Read(where, {}, str(error))


def _txt(path: Path, shown: str) -> Iterator[Read]:
    for number, line in enumerate(_lines(path, shown), 1):
        if line.strip():
            yield Read(f"{shown}:{number}", line.rstrip("\r\n"))


def _csv(path: Path, shown: str) -> Iterator[Read]:
    lines = _lines(path, shown)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{shown}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # where a quote is not closed, nobody knows where the next row begins
            reason = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(
                f"{where}: the row that begins here cannot be read as CSV: {reason} (a quote "
                'inside of a quoted cell is written "").'
            ) from None
        is_blank = len(cells) == 1 and not cells[0].strip()
        if not cells or (is_blank and (header is None or len(header) > 1)):
            continue
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            problem = f"{where}: the row has {len(cells)} cells, the header has {len(header)}."
            yield Read(where, {}, problem)
            continue
        yield Read(where, {k: v for k, v in zip(header, cells, strict=True) if k})


def _parquet(path: Path, shown: str) -> Iterator[Read]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as content:
            _check_columns(content.schema_arrow.names, shown)
            number = 0
            for batch in content.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    columns = {key: _or_none(value) for key, value in row.items()}
                    yield Read(f"{shown} row {number}", columns)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{shown} cannot be read as parquet: {described(error)}") from None


_READERS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "txt": _txt}
