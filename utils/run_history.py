"""history.jsonl: a line per update, and per evaluation while training, each in a single write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import RunError, UsageError
from utils.files import disk_errors, write_atomically
from utils.records import Count, Record, as_record, parse_json


class _Line(Record):
    """A line of the file, as far as a resumed run must know it."""

    step: Count
    eval: dict[str, Any] | None = None


class HistoryFile:
    """The history of a run, opened with the first line that is added to it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, in a single write.

        Raises:
            RunError: the disk is full.
        """
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self.file, flags, 0o666)
            line = json.dumps(record).encode() + b"\n"
            if os.write(self._descriptor, line) < len(line):
                raise OSError("there is room for a part of a line only")
        except OSError as error:
            raise RunError(
                f"cannot write {self.file}: {error}. Free some space; --resume goes on from the "
                "last state."
            ) from error

    def sync(self) -> None:
        """Have the lines so far survive a loss of power.

        Raises:
            RunError: the disk is full.
        """
        if self._descriptor is not None:
            with disk_errors(self.file):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Another line would open it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def cut(self, last_step: int, evaluation_due: bool = False) -> None:
        """Drop what was logged after the point that a resumed run goes on from.

        Args:
            last_step: the last update that counts.
            evaluation_due: the evaluation after it will be made again.
        """
        if not self.file.is_file():
            return

        def counts(line: bytes) -> bool:
            try:
                record = as_record(parse_json(line.decode(), "line"), _Line, "line")
            except (UsageError, UnicodeDecodeError):  # the line that a kill has cut in half
                return False
            is_due = evaluation_due and record.eval is not None and record.step == last_step
            return record.step <= last_step and not is_due

        def write(temporary: Path) -> None:
            with open(self.file, "rb") as old, open(temporary, "wb") as new:
                new.writelines(line for line in old if line.endswith(b"\n") and counts(line))

        write_atomically(self.file, write)
