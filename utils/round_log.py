"""What a simulation of active learning leaves while it grows: one line per round, each at once.

simulation.json   the flags of the first call, what made it, and a digest of the training rows
rounds.jsonl      one `Round` per line, in the order of the plan

A kill leaves whole lines and at most one that was being written; `--resume` drops that one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, FiniteFloat

from utils.args import Args
from utils.errors import UsageError, quoted
from utils.file_lock import FileLock, Held
from utils.files import disk_errors, sweep_temporaries, sync, write_json
from utils.records import Count, Name, Nonnegative, Record, as_record, parse_json, read_text
from utils.run_records import FORMAT_VERSION, RunRecord, Share, differences, read_run_record

SETTINGS_FILE, ROUNDS_FILE, LOCK_FILE = "simulation.json", "rounds.jsonl", ".simulation.lock"
REMEDY = "Restore the file, or pass --overwrite to start over."


class Round(Record):
    """One training of the simulation: what it was trained on, what it was worth, what it asked for.

    Attributes:
        seed, by, round: which one it is; round 0 is trained on the initial rows.
        labelled: how many rows it was trained on: the initial ones, and all that the rounds before
            it have acquired.
        initial: the initial rows in round 0, by their index in the training split; else none.
        acquired: the rows that it chose to have labelled next, the first one first; none in the
            last round.
        acc, ece, nll, brier: on the evaluation split (`utils.metrics.Metrics`).
        num_draws: of the pool's predictions; None where nothing was predicted.
        seconds: of training, evaluation, and the prediction of the pool.
    """

    seed: Count
    by: Name
    round: Count
    labelled: Count
    initial: list[Count]
    acquired: list[Count]
    acc: Share
    ece: Share
    nll: FiniteFloat
    brier: Nonnegative
    num_draws: Count | None
    seconds: Nonnegative


class SimulationRecord(RunRecord):
    """simulation.json.

    Attributes:
        training_rows: SHA-256 of their tokens and labels; None in files of older versions.
    """

    training_rows: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Split(NamedTuple):
    """The training rows of one seed.

    Attributes:
        initial: labelled from the beginning.
        pool: that can be acquired.
    """

    initial: list[int]
    pool: list[int]


class Plan(NamedTuple):
    """All rounds of a simulation.

    Attributes:
        splits: of each seed.
        criteria: each of which every seed goes through.
        rounds: how often rows are acquired; one training more than that.
        acquire: K, rows each time.
    """

    splits: Mapping[int, Split]
    criteria: Collection[str]
    rounds: int
    acquire: int

    def keys(self) -> Iterator[tuple[int, str, int]]:
        """(seed, criterion, round) in the order in which they are made."""
        for seed in self.splits:
            for by in self.criteria:
                for number in range(self.rounds + 1):
                    yield seed, by, number

    @property
    def size(self) -> int:
        """How many rounds there are."""
        return len(self.splits) * len(self.criteria) * (self.rounds + 1)

    def rows_of(self, key: tuple[int, str, int], before: Sequence[Round]) -> list[int]:
        """What the round `key` is trained on, in the order of acquisition.

        Args:
            before: the rounds up to the one before it.
        """
        seed, _, number = key
        acquired = (row for found in before[len(before) - number :] for row in found.acquired)
        return [*self.splits[seed].initial, *acquired]

    def problem(self, before: Sequence[Round], found: Round) -> str | None:
        """Why a round is not the one that follows those before it, if so."""
        key = next(islice(self.keys(), len(before), None), None)
        if (found.seed, found.by, found.round) != key:
            return "it is no round of the simulation, or one is missing before it"
        rows = self.rows_of(key, before)
        initial = rows if found.round == 0 else []
        if found.initial != initial or found.labelled != len(rows):
            return "it was trained on other rows than those that were labelled by then"
        wanted = self.acquire if found.round < self.rounds else 0
        new = set(found.acquired)
        is_new = new <= set(self.splits[found.seed].pool) - set(rows)
        if len(new) != len(found.acquired) or len(new) != wanted or not is_new:
            return f"'acquired' must be {wanted} different rows of the pool"
        return None


class RoundLog:
    """The rounds of a simulation on disk.

    Args:
        folder: where they lie.
        plan: that they follow.
        made: names of the files that are made of them in the end.
    Attributes:
        done: the rounds so far.
    """

    def __init__(self, folder: Path, plan: Plan, made: Collection[str]) -> None:
        self.folder, self.plan = folder, plan
        self.done: list[Round] = []
        self._made = made
        self._settings, self._rounds = folder / SETTINGS_FILE, folder / ROUNDS_FILE
        self._lock = FileLock(folder / LOCK_FILE)

    def close(self) -> None:
        """Let other processes write the folder."""
        self._lock.release()

    def open(self, args: Args, stored: dict[str, Any]) -> None:
        """Begin, or go on after the last round that is there; nobody else writes until `close`.

        Args:
            args: all flags, `resume` and `overwrite` among them.
            stored: what simulation.json says of this call, if it is the first one.
        Raises:
            UsageError: there is a result already and neither flag was given, the stored one has
                other flags or is damaged, another process is writing it, or a file of another
                program would be replaced.
            )
                other flags or other training rows or is damaged, or a file of another program
                would be replaced.
        """
        self._take_lock()
        is_begun = self._settings.exists()
        if not is_begun:
            self._check_names()
        elif args.resume:
            self._go_on(args, stored.get("training_rows"))
            return
        elif not args.overwrite:
            raise UsageError(
                f"--out {quoted(str(self.folder))} has the result of a simulation: pass --resume "
                "to go on from it, --overwrite to start over, or choose another folder."
            )
        with disk_errors(self.folder):
            # the settings last: what a kill in here leaves still is a simulation's folder
            for name in (ROUNDS_FILE, *self._made, SETTINGS_FILE):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(self.folder, (SETTINGS_FILE, *self._made))
        write_json(self._settings, {"format_version": FORMAT_VERSION, **stored})

    def _take_lock(self) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.take()
            except Held as holder:
                raise UsageError(
                    f"--out {quoted(str(self.folder))}: another process is writing it ({holder}); "
                    "wait for it, or choose another folder."
                ) from None

    def _check_names(self) -> None:
        for name in (ROUNDS_FILE, *self._made):
            if os.path.lexists(self.folder / name):
                raise UsageError(
                    f"--out: {quoted(str(self.folder / name))} is there, but no {SETTINGS_FILE} of "
                    "a simulation that would have made it; move it away, or choose another folder."
                )

    def _go_on(self, args: Args, rows: str | None) -> None:
        record = read_run_record(self._settings, "--resume", SimulationRecord)
        if changed := differences(args, record):
            raise UsageError(
                f"--resume: {'; '.join(changed)}. Repeat the flags of the first call, or pass "
                "--overwrite instead to start over."
            )
        if self._rounds.is_symlink():
            raise UsageError(
                f"--resume: {quoted(str(self._rounds))} is a link, which is not written through. "
                f"{REMEDY}"
            )
        if len({record.training_rows, rows} - {None}) > 1:
            raise UsageError(
                f"--resume: the training rows are others than those of the simulation in "
                f"{quoted(str(self.folder))}: as many, but with other texts, labels or tokens. "
                "Restore the rows of the first call, or pass --overwrite instead to start over."
            )
        if not self._rounds.exists():
            return
        text = read_text(self._rounds, "--resume")
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            where = f"--resume: {self._rounds}:{number}"
            found = as_record(parse_json(line, where), Round, where, REMEDY)
            if (problem := self.plan.problem(self.done, found)) is not None:
                raise UsageError(f"{where}: {problem}. {REMEDY}")
            self.done.append(found)
        if whole != text:  # a line that was being written when the process was killed
            with disk_errors(self._rounds):
                os.truncate(self._rounds, len(whole.encode()))

    def append(self, found: Round) -> None:
        """Keep a round, which is on the disk when this returns.

        Raises:
            RunError: the disk is full.
        """
        with disk_errors(self._rounds), open(self._rounds, "a", encoding="utf-8") as file:
            file.write(json.dumps(found.model_dump(), allow_nan=False) + "\n")
            file.flush()
            sync(self._rounds)
        self.done.append(found)
