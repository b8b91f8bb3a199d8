"""Files of rows: JSONL, JSON, CSV, parquet and plain lines, read strictly and one row at a time.

A row is an object, a CSV row has the header's number of cells, nothing stands there twice. What
breaks such a rule is given in the row's place, as the reason: who trains on a file stops there, who
predicts millions of rows may go on behind it. Only what makes the rest unreadable ends the file.
"""

from __future__ import annotations

import csv
import math
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from utils.errors import UsageError, described, quoted
from utils.records import parse_json, read_text

Row = dict[str, Any]
FORMATS = ("jsonl", "json", "csv", "parquet", "txt")
MOST_BYTES = 4 * 2**30  # of a file whose rows are all held in memory
LONGEST_LINE = 64 * 2**20  # characters: a row, not a file without line ends


class Read(NamedTuple):
    """What stands where a row should be.

    Attributes:
        where: file and line.
        row: its columns; of a line of plain text the text.
        problem: why it is none; `row` is then empty.
    """

    where: str
    row: Row | str
    problem: str | None = None


def read_rows(file: Path, what: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of a file whose ending, in any case, says what it holds.

    The cells of a CSV are text; those of the other formats have their types.

    Args:
        file: of rows.
        what: the flag that names it, for messages.
    Raises:
        UsageError: it cannot be read, or a row is broken; file and line are named.
    """
    check_file(file, what, MOST_BYTES)
    for where, row, problem in _readable(file, file.suffix.lower()[1:], str(file), what):
        if problem is not None:
            raise UsageError(problem)
        yield where, row


def rows_of_file(file: Path, what: str, texts: Collection[str] = ()) -> list[tuple[str, Row]]:
    """(where, row) of all rows of a file.

    Args:
        file: its suffix says what it holds.
        what: on whose behalf it is read, for the message: a flag.
        texts: columns whose cells are text in a CSV, whatever they look like.
    Raises:
        UsageError: it cannot be read, it has no rows, or the first row that breaks a rule.
    """
    rows = list(read_rows(file, what))
    if file.suffix.lower() == ".csv":
        rows = [(where, _unfolded(row, texts)) for where, row in rows]
    if not rows:
        raise UsageError(f"{file} has no rows; it needs at least one.")
    return rows


def stream_rows(
    file: Path, form: str, shown: str, what: str, texts: Collection[str] = ()
) -> Iterator[Read]:
    """The rows of a file in their order; in constant memory, but for JSON.

    Args:
        file: that `check_file` has seen.
        form: one of `FORMATS`.
        shown: the file's name in messages.
        what: on whose behalf it is read.
        texts: columns whose cells are text in a CSV, whatever they look like.
    Raises:
        UsageError: the file cannot be read any further.
    """
    for read in _readable(file, form, shown, what):
        yield read._replace(row=_unfolded(read.row, texts)) if form == "csv" else read


def _readable(file: Path, form: str, shown: str, what: str) -> Iterator[Read]:
    try:
        yield from _READERS[form](file, shown, what)
    except OSError as error:
        raise UsageError(f"{what}: {shown} cannot be read ({error.strerror}).") from None


def check_file(file: Path, what: str, most_bytes: int | None = None) -> None:
    """It is an ordinary file: a pipe would wait for ever for somebody to write into it.

    Raises:
        UsageError: it is none, or too large.
    """
    try:
        about = file.stat()
    except FileNotFoundError:
        raise UsageError(f"{what}: there is no file {file}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or described(error)
        raise UsageError(f"{what}: {quoted(str(file))} cannot be read ({reason}).") from None
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "no ordinary file"
        raise UsageError(f"{what}: {file} is {kind}; a file is needed.")
    if most_bytes is not None and about.st_size > most_bytes:
        raise UsageError(
            f"{what}: {file} has {about.st_size} bytes; more than {most_bytes} are not read."
        )


@contextmanager
def kept_input() -> Iterator[Path]:
    """Standard input as a file, which can be read twice."""
    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        path = Path(folder) / "rows"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


# --- the formats ----------------------------------------------------------------------------------


def _lines(file: Path, shown: str, what: str) -> Iterator[str]:
    """The lines with their ends as they are: those inside of a cell are part of it.

    Without the mark that Excel and some editors begin with.
    """
    number = 0
    with open(file, encoding="utf-8-sig", newline="") as content:
        try:
            while line := content.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise UsageError(f"{shown}:{number}: {LONGEST_LINE} characters or more.")
                yield line
        except UnicodeDecodeError as error:  # a block of lines is decoded at once
            raise UsageError(
                f"{what}: {shown} is not UTF-8 text ({error.reason}, behind line {number})."
            ) from None


def _read_jsonl(file: Path, shown: str, what: str) -> Iterator[Read]:
    for number, line in enumerate(_lines(file, shown, what), 1):
        if line.strip():
            where = f"{shown}:{number}"
            try:
                yield Read(where, as_row(_parse(line, where), where))
            except UsageError as error:
                yield Read(where, {}, str(error))


def _read_txt(file: Path, shown: str, what: str) -> Iterator[Read]:
    for number, line in enumerate(_lines(file, shown, what), 1):
        if line.strip():
            yield Read(f"{shown}:{number}", line.rstrip("\r\n"))


def _read_json(file: Path, shown: str, what: str) -> Iterator[Read]:
    content = _parse(read_text(file, what, MOST_BYTES).removeprefix("\ufeff"), shown)
    if not isinstance(content, list):
        raise UsageError(f"{shown} must hold a list of objects, one per row.")
    for number, row in enumerate(content, 1):
        where = f"{shown} row {number}"
        try:
            yield Read(where, as_row(row, where))
        except UsageError as error:
            yield Read(where, {}, str(error))


def _read_csv(file: Path, shown: str, what: str) -> Iterator[Read]:
    """Rows of a CSV, strictly: a row has the header's number of cells, and its quotes are closed.

    Columns without a name, such as the index that pandas writes, are left out; so are empty lines.
    """
    header: list[str] | None = None
    for line, cells in _csv_cells(_lines(file, shown, what), shown):
        where = f"{shown}:{line}"
        is_blank = len(cells) == 1 and not cells[0].strip()
        if not cells or (is_blank and (header is None or len(header) > 1)):
            continue  # an empty line
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            problem = (
                f"{where}: the row has {len(cells)} cells, the header has {len(header)}; a comma "
                'inside of a cell needs quotes around it ("a, b"), and every quote its end.'
            )
            yield Read(where, {}, problem)
            continue
        yield Read(where, {k: v for k, v in zip(header, cells, strict=True) if k})


def _csv_cells(lines: Iterator[str], shown: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row, where the line is the row's first."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(_without_nul(lines, shown), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # nobody knows where the next row begins
            reason = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(
                f"{shown}:{line}: the row that begins here cannot be read as CSV: {reason} (a "
                'quote inside of a quoted cell is written "").'
            ) from None
        yield line, cells


def _without_nul(lines: Iterator[str], shown: str) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise UsageError(f"{shown} holds NUL characters; is it UTF-16? Convert it to UTF-8.")
        yield line


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


def _unfolded(row: Row, texts: Collection[str]) -> Row:
    return {key: cell if key in texts else _nested(cell) for key, cell in row.items()}


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


def _read_parquet(file: Path, shown: str, what: str) -> Iterator[Read]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as content:  # no columns out of the folders' names
            _check_columns(content.schema_arrow.names, shown)
            for batch in content.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    columns = {key: _or_none(value) for key, value in row.items()}
                    yield Read(f"{shown} row {number}", columns)
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:
        raise UsageError(f"{shown} cannot be read as parquet: {described(error)}") from None


def _or_none(value: Any) -> Any:
    """pandas writes NaN where a column of numbers has no value."""
    return None if isinstance(value, float) and math.isnan(value) else value


_READERS: dict[str, Callable[[Path, str, str], Iterator[Read]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "txt": _read_txt,
}

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


def as_row(value: Any, where: str) -> Row:
    """The value, if it is an object.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object, but is {type(value).__name__}.")
    return value
