"""A long job's output, one row after the other: resumable while it grows, complete when it is seen.

.NAME.partial/rows.jsonl   the rows so far, in their order
.NAME.partial/state.json   how many of them count, and what job they belong to
NAME                       the finished file, which replaces what was there in one step
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from utils.errors import UsageError, quoted
from utils.file_lock import FileLock, Held
from utils.files import (
    disk_errors,
    remove_folder,
    sweep_temporaries,
    write_atomically,
    write_json,
)
from utils.records import Count, Name, Record, parse_json, read_record

FORMATS = ("jsonl", "csv", "parquet")
LONGEST_NAME = 200  # bytes: files with longer names lie beside it while it is written
MOST_IN_MEMORY = 10_000  # rows of a parquet file that are one group of it


class _State(Record):
    """Of an interrupted job: the job, the input's rows that are done, and the bytes they fill."""

    job: Name
    rows: Count
    size: Count


class RowOutput:
    """The output file of one job.

    Args:
        path: of the finished file.
        form: one of `FORMATS`.
        job: tells jobs apart: only a job of the same name is gone on with.
    Attributes:
        done: how many rows of the input are in it.
    """

    def __init__(self, path: Path, form: str, job: str) -> None:
        self.path, self.form, self.job = path, form, job
        self.done = 0
        self._folder = path.with_name(f".{path.name}.partial")
        self._rows, self._state = self._folder / "rows.jsonl", self._folder / "state.json"
        self._lock = FileLock(self._folder / "lock")

    def open(self, resume: bool, overwrite: bool) -> None:
        """Begin, or go on where an interrupted job of the same name ended.

        Raises:
            UsageError: there is another job's beginning, or the folder cannot be written.
        """
        self._take_lock()
        sweep_temporaries(self.path.parent, {self.path.name})
        is_begun = self._state.exists()
        if is_begun and not (resume or overwrite):
            raise UsageError(
                f"an interrupted run has left a part of {self.path}: pass --resume to go on from "
                "it, or --overwrite to start over."
            )
        try:
            if is_begun and resume:
                self._go_on()
                return
            for file in (self._state, self._rows):
                file.unlink(missing_ok=True)
            self._rows.touch()
        except OSError as error:
            raise UsageError(
                f"--out {quoted(str(self.path))} cannot be written ({error.strerror}); choose "
                "another place."
            ) from None
        self._keep_state(0)

    def _take_lock(self) -> None:
        """Hold the output for as long as this process writes it.

        Raises:
            UsageError: another process does, or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        except Held as holder:
            raise UsageError(
                f"another process is writing {self.path} ({holder}); wait for it, or choose "
                "another --out."
            ) from None
        except OSError as error:
            raise UsageError(
                f"--out {quoted(str(self.path))} cannot be written ({error.strerror}); choose "
                "another place."
            ) from None

    def close(self) -> None:
        """Let others have it."""
        self._lock.release()

    def _go_on(self) -> None:
        state = read_record(self._state, _State, "--resume", "Pass --overwrite to start over.")
        if state.job != self.job:
            raise UsageError(
                f"--resume: the part of {self.path} that is there was made from other rows, by "
                "another posterior or with other flags; pass --overwrite to start over."
            )
        if (
            self._rows.is_symlink()
            or not self._rows.is_file()
            or self._rows.stat().st_size < state.size
        ):
            raise UsageError(
                f"--resume: {self._rows} has lost rows since; pass --overwrite to start over."
            )
        os.truncate(self._rows, state.size)  # of a row that was being written, too
        self.done = state.rows

    def append(self, records: Iterable[dict[str, Any]], number: int) -> None:
        """Add records, which answer for the next `number` rows of the input.

        Raises:
            RunError: the disk is full.
        """
        with disk_errors(self.path), open(self._rows, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done += number
        self._keep_state(self._rows.stat().st_size)

    def _keep_state(self, size: int) -> None:
        write_json(self._state, {"job": self.job, "rows": self.done, "size": size})

    def records(self) -> Iterator[dict[str, Any]]:
        """The records so far."""
        with open(self._rows, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                record = parse_json(line, f"{self._rows}:{number}")
                if not isinstance(record, dict):
                    raise UsageError(f"{self._rows}:{number}: no record; pass --overwrite.")
                yield record

    def finish(self, chosen: Callable[[], Iterable[dict[str, Any]]] | None = None) -> None:
        """Write the finished file, and forget how it was made.

        Args:
            chosen: gives the records that it has; None: all.
        Raises:
            RunError: the disk is full.
        """
        records = self.records if chosen is None else chosen
        write_atomically(self.path, lambda temporary: WRITERS[self.form](temporary, records))
        remove_folder(self._folder)


def check_place(path: Path) -> None:
    """A file can be made there, as far as can be known before.

    Raises:
        UsageError: it cannot.
    """
    above = path.parent
    try:
        while not above.exists():
            above = above.parent
        problem = None
        if path.is_symlink():
            problem = f"it is a link, to {path.resolve()}: name that"
        elif path.is_dir():
            problem = "it is a folder"
        elif path.exists() and not path.is_file():
            problem = "it is no ordinary file"
        elif len(os.fsencode(path.name)) > LONGEST_NAME:
            problem = f"its name has more than {LONGEST_NAME} bytes"
        elif not above.is_dir():
            problem = f"{above} is no folder"
        elif not os.access(above, os.W_OK):
            problem = f"nothing can be written in {above}"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        raise UsageError(
            f"--out {quoted(str(path))} cannot be written: {problem}; choose another place."
        )


# --- formats --------------------------------------------------------------------------------------

Records = Callable[[], Iterable[dict[str, Any]]]  # gives them anew with every call


def _write_jsonl(path: Path, records: Records) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records():
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class _LineFeeds:
    """A file that gets each row of a CSV with a line feed alone at its end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> None:
        """Called once per row."""
        self._file.write(row.removesuffix("\r\n") + "\n")


def _write_csv(path: Path, records: Records) -> None:
    columns = _columns(records)
    with open(path, "w", encoding="utf-8", newline="") as file:
        # The csv module quotes a cell for a character of the line's end, and for no other end: a
        # carriage return inside of a cell would end the row for most readers, ours among them.
        writer = csv.DictWriter(_LineFeeds(file), columns, restval="", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(map(flat, records()))


def _write_parquet(path: Path, records: Records) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = _columns(records)
    types = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(k, types.get(kind, pyarrow.string())) for k, kind in kinds.items()])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []

        def write() -> None:
            rows = [
                {k: str(v) if kinds[k] is str and v is not None else v for k, v in row.items()}
                for row in group
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            group.clear()

        for record in records():
            group.append(flat(record))
            if len(group) == MOST_IN_MEMORY:
                write()
        write()


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """Nested objects as columns of their own, `probabilities.sports`; lists as JSON."""
    row: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= {f"{key}.{inner}": _cell(v) for inner, v in value.items()}
        else:
            row[key] = _cell(value)
    return row


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _columns(records: Records) -> dict[str, type]:
    """Every column, in the order in which they come, and the type that holds all of its values."""
    kinds: dict[str, type] = {}
    for record in records():
        for key, value in flat(record).items():
            kind = type(value)
            if kind is int and not -(2**63) <= value < 2**63:
                kind = str
            if value is None:
                kinds.setdefault(key, type(None))
            elif kinds.get(key, type(None)) in (kind, type(None)):
                kinds[key] = kind
            else:
                numbers = {kinds[key], kind} == {int, float}
                kinds[key] = float if numbers else str
    return kinds


WRITERS: dict[str, Callable[[Path, Records], None]] = {
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
}
