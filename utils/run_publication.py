"""How a new run's files take an old one's place: by a list that can be carried out again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from utils.files import remove_folder, sync
from utils.records import Record, read_record
from utils.run_records import METRICS_FILE, FileName
from utils.run_state import States

PUBLICATION_FILE = "publish.json"


class Publication(Record):
    """`.next/publish.json`: what goes from the run's folder, and what comes from `.next`."""

    delete: list[FileName]
    replace: list[FileName]


def carry_out(source: Path, target: Path) -> None:
    """Do what the list in `source` says, from whatever point it was interrupted at.

    Args:
        source: has the new files and their list; goes when all are in place.
        target: the run's folder.
    Raises:
        UsageError: the list is damaged.
    """
    plan = read_record(source / PUBLICATION_FILE, Publication, "--overwrite")
    for name in plan.delete:
        (target / name).unlink(missing_ok=True)
        with suppress(OSError):  # only a folder of its own, and only when it is empty
            if "/" in name:
                (target / name).parent.rmdir()
    States(target / "state", 0, 1).drop()
    for name in plan.replace:
        if not (source / name).is_file():
            continue  # it is in place already
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name == METRICS_FILE:
            sync(target)
        os.replace(source / name, target / name)
    sync(target)
    remove_folder(source)
