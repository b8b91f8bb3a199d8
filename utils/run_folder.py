"""A run's folder: what its files say, and how a new run takes an old one's place.

Layout: docs/run-folder.md. The rule that nothing is lost rests on three things:

- A run writes into its folder only where nothing of an earlier run is. Else, with --overwrite, it
  writes into `.next` in there, and the old files stay until the new run has all its results. Then
  `.next` is published: a list of what goes and what comes is written, and carried out; whoever
  opens the folder next carries on with the list if the process dies on the way.
- metrics.json comes last. A folder that has it is finished; one that has not is interrupted.
- Files are known by exact name. What a run has written is listed in its metrics.json; for older
  ones the names follow from its data sets and its method. Nothing else is ever deleted.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from utils.data_set_names import data_set_name
from utils.errors import UsageError
from utils.file_lock import FileLock, Held
from utils.files import (
    disk_errors,
    remove_folder,
    remove_trash,
    sweep_temporaries,
    write_json,
    write_tensors,
)
from utils.run_history import HistoryFile
from utils.run_paths import PARTS, check_name, predictions_file
from utils.run_publication import PUBLICATION_FILE, carry_out
from utils.run_records import (
    ARGS_FILE,
    FORMAT_VERSION,
    HISTORY_FILE,
    LOG_FILE,
    METRICS_FILE,
    differences,
    file_name,
    read_metrics_record,
    read_run_record,
)
from utils.run_state import StateRecord, States

# What every run has, however far it came.
_RECORDS = (ARGS_FILE, HISTORY_FILE, LOG_FILE)


# --- the folder -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a call does with its folder.

    Attributes:
        kept: the run is finished, with these flags: nothing is done.
        staged: the run writes into `.next`, because an earlier one's files are there.
        resumed: it goes on from a state.
    """

    kept: bool = False
    staged: bool = False
    resumed: bool = False


class RunFolder:
    """The files of one run, and its training states under `state/`.

    Args:
        path: the run's folder.
        rank, num_processes: of this process; only rank 0 changes what all share.
        adapter_files: the files that the method keeps an adapter in; `{n}` stands for a number.
    """

    def __init__(
        self,
        path: Path,
        rank: int = 0,
        num_processes: int = 1,
        adapter_files: tuple[str, ...] = (),
    ) -> None:
        self.path = Path(path)
        self.rank = rank
        self.num_processes = num_processes
        self.adapter_files = adapter_files
        self.plan = Plan()
        self.is_open = False  # between `begin` and `close`
        self._next = self.path / ".next"
        self._written: set[str] = set()
        self._made: list[Path] = []  # folders
        self._finished = False
        self._lock = FileLock(self.path / ".lock")
        self._history: HistoryFile | None = None
        self._states: States | None = None

    @property
    def files(self) -> Path:
        """Where this run's files are written."""
        return self._next if self.plan.staged else self.path

    @property
    def state(self) -> States:
        """The run's training states."""
        if self._states is None or self._states.folder.parent != self.files:
            self._states = States(self.files / "state", self.rank, self.num_processes)
        return self._states

    @property
    def history(self) -> HistoryFile:
        """The run's history.jsonl, which only rank 0 writes."""
        if self._history is None or self._history.file.parent != self.files:
            self._history = HistoryFile(self.files / HISTORY_FILE)
        return self._history

    @property
    def states(self) -> list[Path]:
        """The folders of this run's states, oldest first."""
        return self.state.all()

    # before anything is written

    def check_writable(self) -> None:
        """Fail before the model is loaded, not after the run. Nothing is left behind.

        Raises:
            UsageError: the folder cannot be created or written.
        """
        try:
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(b"\0" * 4096)
                probe.flush()
        except OSError as error:
            raise UsageError(
                f"the output folder {self.path} cannot be written ({error.strerror}); "
                "choose another with --output-dir."
            ) from None

    def open(self, args) -> Plan:
        """Decide what this call does here; what killed processes have left is finished or swept.

        Raises:
            UsageError: a run with other flags, an interrupted run or the adapter that is to be
                loaded would be replaced; another run is writing here; `--resume` with other flags
                than the stored ones.
        """
        self.check_writable()
        self._check_not_inside_a_run()
        if self.path.is_dir() and not self._is_at_rest_with(args):
            self._take_lock()
            with disk_errors(self.path):
                self._recover(args.overwrite)
        self.plan = self._decide(args)
        return self.plan

    def _check_not_inside_a_run(self) -> None:
        for folder in self.path.absolute().parents:
            others = (METRICS_FILE, HISTORY_FILE, LOG_FILE)
            if (folder / ARGS_FILE).is_file() and any((folder / o).is_file() for o in others):
                raise UsageError(
                    f"{self.path} lies in the folder of another run, {folder}; choose another "
                    "--output-dir or --log-path."
                )
        if self.path.is_dir() and not (self.path / ARGS_FILE).is_file():
            inside = [child for child in self.path.iterdir() if (child / ARGS_FILE).is_file()]
            inside = [child for child in inside if not child.name.startswith(".")]  # not our own
            if inside:
                raise UsageError(
                    f"the folder of another run, {inside[0]}, lies in {self.path}; choose another "
                    "--output-dir or --log-path."
                )

    def _is_at_rest_with(self, args) -> bool:
        """Whether the run is finished, by these flags, and nobody has left anything to do here."""
        finished = (self.path / METRICS_FILE).is_file() and (self.path / ARGS_FILE).is_file()
        if not finished or args.overwrite or self._differences(args, self.path):
            return False
        return not any(p.name == "state" or p.name.startswith(".") for p in self.path.iterdir())

    def _differences(self, args, folder: Path) -> list[str]:
        file = folder / ARGS_FILE
        remedy = "restore it, start over with --overwrite, or pass another --log-path."
        if not file.is_file():
            raise UsageError(
                f"{folder} keeps a run, but its {ARGS_FILE}, which says what it was, is missing: "
                f"{remedy}"
            )
        stored = read_run_record(file, "--resume" if args.resume else "--log-path")
        if not stored.args:
            raise UsageError(f"{file} does not say what the run was: {remedy}")
        return differences(args, stored)

    def _decide(self, args) -> Plan:
        is_finished = (self.path / METRICS_FILE).is_file()
        interrupted = [f for f in (self._next, self.path) if self._is_interrupted(f)]
        if args.overwrite:
            return Plan(staged=is_finished or self._holds_results(self.path))
        refused = []
        for folder in interrupted if args.resume else ():
            if not (differing := self._differences(args, folder)):
                has_state = bool(States(folder / "state", 0, 1).entries())
                return Plan(staged=folder == self._next, resumed=has_state)
            refused.append((folder, differing))
        if is_finished:
            if not (differing := self._differences(args, self.path)):
                return Plan(kept=True)
            refused.append((self.path, differing))
        if not args.resume:
            self._check_own_adapter(args)
        if refused and args.resume:
            folder, differing = refused[0]
            raise UsageError(
                f"--resume: {'; '.join(differing)}. A resumed run keeps its flags (they are in "
                f"{folder / ARGS_FILE}); pass the same ones, or another --log-path for a new run."
            )
        if refused:
            raise UsageError(
                f"{self.path} keeps a finished run with other flags: {'; '.join(refused[0][1])}. "
                "Pass another --log-path, or --overwrite to replace it."
            )
        for folder in interrupted:
            self._check_interrupted(args, folder)
        if not interrupted and self._holds_results(self.path):
            found = [*self._results(self.path), HISTORY_FILE][0]
            raise UsageError(
                f"{self.path} has {found}, which is of no run that is known here and which a "
                "new run would replace; pass another --log-path, or --overwrite."
            )
        return Plan()

    def _check_own_adapter(self, args) -> None:
        source = args.load_lora_path
        if source is not None and Path(source).resolve() == self.path.resolve():
            raise UsageError(
                f"--load-lora-path is this run's own folder, {self.path}: the files of the run "
                "that trained the adapter would be replaced. Pass another --log-path, or "
                "--overwrite."
            )

    def _check_interrupted(self, args, folder: Path) -> None:
        """A run that left nothing to go on from may be started again, by the same flags."""
        states = States(folder / "state", 0, 1)
        has_nothing = not states.entries() and not self._results(folder)
        if has_nothing and folder == self.path and not (other := self._differences(args, folder)):
            return
        whole = states.all()
        at = f" after update {int(whole[-1].name.removeprefix('step-'))}" if whole else ""
        if has_nothing and folder == self.path:
            raise UsageError(
                f"{self.path} keeps a run interrupted before its first state: {'; '.join(other)}. "
                "Pass --overwrite to start over, or another --log-path."
            )
        kept = "the state" if states.entries() else "results, but no state,"
        raise UsageError(
            f"{folder} keeps {kept} of a run interrupted{at}; pass "
            "--resume to go on, --overwrite to start over, or another --log-path."
        )

    # what is there

    def _is_interrupted(self, folder: Path) -> bool:
        """Whether a run has begun in `folder`, left something worth keeping, and has not ended."""
        if not folder.is_dir() or (folder / METRICS_FILE).is_file():
            return False
        begun = (folder / ARGS_FILE).is_file() or bool(States(folder / "state", 0, 1).entries())
        return begun and self._holds_results(folder)

    def _holds_results(self, folder: Path) -> bool:
        """Whether there is more than flags and messages: updates, a state, predictions, adapter."""
        has_updates = (folder / HISTORY_FILE).is_file() and (folder / HISTORY_FILE).stat().st_size
        has_state = States(folder / "state", 0, 1).entries()
        return bool(has_updates or has_state or self._results(folder))

    def _results(self, folder: Path) -> list[str]:
        """Predictions and adapter files of a run."""
        return _existing(folder, self._names(folder) - {*_RECORDS, METRICS_FILE})

    def _names(self, folder: Path) -> set[str]:
        """What the run in `folder` can have written, by exact name: as it says, or as it follows.

        Whoever deletes them all deletes nothing else.
        """
        names: set[str] = {*_RECORDS, METRICS_FILE}
        data_sets: set[str] = set()
        with suppress(UsageError):
            record = read_metrics_record(folder / METRICS_FILE, "--overwrite")
            if record.files is not None:
                return names | set(record.files)
            data_sets |= set(record.datasets)
        with suppress(UsageError):
            flags = read_run_record(folder / ARGS_FILE, "--overwrite").args
            shifted = flags.get("ood_datasets")
            data_sets |= {data_set_name(str(name)) for name in _as_list(shifted)}
        names |= {predictions_file(), *map(predictions_file, PARTS)}
        for data_set in data_sets:
            with suppress(UsageError):
                names.add(predictions_file(check_name(data_set, "data set")))
        for pattern in self.adapter_files:
            names |= _numbered(folder, pattern)
        return names

    # the run begins

    def begin(self, args, record: Mapping[str, Any]) -> None:
        """args.json; what an earlier call without results has left goes.

        Raises:
            UsageError: another run has begun here in the meantime.
        """
        with disk_errors(self.path):
            if not self._lock.is_held:
                self._make_folder()
                self._take_lock()
                if self._decide(args) != self.plan:
                    raise UsageError(f"another run has begun in {self.path}; wait for it.")
            self.is_open = True
            if self.plan.resumed:
                self._written = set(_existing(self.files, self._names(self.files)))
                return
            if self.plan.staged:
                remove_folder(self._next)
                self._next.mkdir()
            else:
                for name in _RECORDS:
                    (self.path / name).unlink(missing_ok=True)
        self.write_json(ARGS_FILE, {"format_version": FORMAT_VERSION, **record})

    def _make_folder(self) -> None:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _take_lock(self) -> None:
        """Hold the folder for as long as this process writes into it.

        Raises:
            UsageError: another process does.
        """
        try:
            self._lock.take()
        except Held as holder:
            raise UsageError(
                f"another run is writing to {self.path} right now ({holder}); wait for it, or pass "
                "another --log-path."
            ) from None
        except OSError as error:
            raise UsageError(
                f"the output folder {self.path} cannot be written ({error.strerror}); "
                "choose another with --output-dir."
            ) from None

    # the run ends

    def finish(self) -> None:
        """The run is complete: its files take the place of an earlier run's; states are dropped."""
        self.history.close()
        if self.rank != 0:
            return
        with disk_errors(self.path):
            if self.plan.staged:
                self._publish()
            else:
                self.state.drop()
        self._finished = True

    def close(self) -> None:
        """Let go of the folder; of a run that failed without a state nothing stays in `.next`."""
        self.history.close()
        if self.rank == 0:
            if (
                self.is_open
                and self.plan.staged
                and not self._finished
                and not self.state.entries()
            ):
                remove_folder(self._next)
            self._lock.release()
            for folder in reversed(self._made):
                with suppress(OSError):  # it has files by now
                    folder.rmdir()
        self._made = []
        self.is_open = False

    def _recover(self, overwrite: bool) -> None:
        """Finish what a killed process had begun, and sweep up after it.

        Args:
            overwrite: what cannot be finished, because somebody has damaged it, may go.
        """
        remove_trash(self.path / ".trash-next")
        if (self._next / METRICS_FILE).is_file() or (self._next / PUBLICATION_FILE).is_file():
            try:
                self._publish()
            except UsageError:
                if not overwrite:
                    raise
                remove_folder(self._next)
        elif self._next.is_dir() and not self._is_interrupted(self._next):
            remove_folder(self._next)
        for folder in (self.path, self._next):
            names = self._names(folder) | {PUBLICATION_FILE}
            for parent in {(folder / name).parent for name in names}:
                sweep_temporaries(parent, {Path(name).name for name in names})
            remove_folder(folder / ".adapter")
            States(folder / "state", 0, 1).sweep()
        if (self.path / METRICS_FILE).is_file():
            States(self.path / "state", 0, 1).drop()

    def _publish(self) -> None:
        """Put the files of `.next` in place of the old run's; can be repeated from any point."""
        file = self._next / PUBLICATION_FILE
        if not file.is_file():
            record = read_metrics_record(self._next / METRICS_FILE, "--overwrite")
            new = set(record.files or ())
            if METRICS_FILE not in new:
                raise UsageError(
                    f"{self._next / METRICS_FILE} does not say what the run has written; "
                    f"pass --overwrite to make the run again."
                )
            delete = _existing(self.path, self._names(self.path) - new)
            replace = sorted(_existing(self._next, new), key=lambda name: name == METRICS_FILE)
            write_json(file, {"delete": delete, "replace": replace})
        carry_out(self._next, self.path)

    # files

    def file(self, name: str) -> Path:
        """Where this run writes its file `name`, which is then listed as its own."""
        self._written.add(file_name(name))
        return self.files / name

    def write_json(self, name: str, content: Any) -> None:
        """Write one of the run's files, atomically."""
        write_json(self.file(name), content)

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]
    ) -> None:
        """Write one of the run's files, atomically."""
        write_tensors(self.file(name), tensors, metadata)

    def write_metrics(self, content: Mapping[str, Any]) -> None:
        """metrics.json, which says that the run is complete, and what it has written."""
        kept = set(_existing(self.files, {*_RECORDS})) | self._written | {METRICS_FILE}
        self.write_json(
            METRICS_FILE,
            {"format_version": FORMAT_VERSION, **content, "files": sorted(kept)},
        )

    def keep_adapter_of(self, source: Path) -> None:
        """If the run has loaded its adapter from its own folder, that is part of the run, too."""
        if source.resolve() == self.path.resolve():
            names = (_numbered(self.path, pattern) for pattern in self.adapter_files)
            self._written |= set(_existing(self.path, set().union(*names)))

    # history

    def append_history(self, record: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl.

        Raises:
            RunError: the disk is full.
        """
        if self.rank != 0:
            return
        self.history.append(record)

    def cut_history(self, last_step: int, evaluation_due: bool = False) -> None:
        """Drop what was logged after the point that a resumed run goes on from.

        Args:
            last_step: the last update that counts.
            evaluation_due: the evaluation after it will be made again.
        """
        if self.rank == 0:
            self.history.cut(last_step, evaluation_due)

    # training state

    def save_state(self, step: int, state: Mapping[str, Any], barrier: Callable[[], None]) -> None:
        """Keep the state of update `step`; see `States.save`."""
        self.history.sync()  # no state of updates that a loss of power has unwritten
        self.state.save(step, state, barrier)

    def load_state(
        self,
        take: Callable[[StateRecord, int], None] = lambda state, step: None,
        agree: Callable[[bool], bool] = bool,
        most_bytes: int = 2**40,
    ) -> tuple[StateRecord, Callable[[], None]] | None:
        """The newest state that can be used; see `States.load`."""
        return self.state.load(take, agree, most_bytes)


def _existing(folder: Path, names: set[str]) -> list[str]:
    return sorted(name for name in names if (folder / name).is_file())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbered(folder: Path, pattern: str) -> set[str]:
    """The files that `pattern` = "member{n}/file" stands for in `folder`; itself without `{n}`."""
    if "{n}" not in pattern:
        return {pattern}
    parent, _, name = pattern.partition("/")
    rule = re.compile(re.escape(parent).replace(re.escape("{n}"), r"\d{1,9}"))
    return {f"{f.name}/{name}" for f in folder.glob("*/") if rule.fullmatch(f.name)}
