"""A run's folder, and a training state that survives a kill at any moment.

Layout: the README's section "A run's folder".
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, FiniteFloat, model_validator
from torch import Tensor

from utils.errors import RunError, UsageError, quoted
from utils.files import write_atomically, write_json, write_tensors
from utils.logging import logger
from utils.records import (
    Count,
    Name,
    Nonnegative,
    Record,
    RecordType,
    as_record,
    read_json,
    read_tensors,
)

KEPT_STATES = 2
ARGS_FILE, METRICS_FILE, HISTORY_FILE, LOG_FILE = (
    *("args.json", "metrics.json", "history.jsonl", "log.txt"),
)
FORMAT_VERSION = 1  # of a run's JSON files; those without the key are older, and read as 1
LONGEST_ARGUMENT = 2**17  # characters: what Linux passes to a program


# --- what the files say -------------------------------------------------------------------------


def _flag_value(value: Any) -> Any:
    """A flag's value as JSON has it: a scalar, or a list of scalars."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, bool | int | float | str | None):
            raise ValueError("a flag is a text, a number, true, false, null or a list of those")
        if isinstance(item, str) and len(item) > LONGEST_ARGUMENT:
            raise ValueError(f"a flag has at most {LONGEST_ARGUMENT} characters")
    return value


FlagValue = Annotated[Any, AfterValidator(_flag_value)]
Flags = Annotated[dict[Name, FlagValue], Field(max_length=10_000)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1.001)]  # a float32's rounding may pass 1


class RunRecord(Record):
    """args.json: what a run was told, and what made it.

    Attributes:
        args: every flag with the value that the run uses; empty in a --config made by hand.
        given: those that were passed; empty in the oldest files.
        run: command, commit, host, start time and versions of libraries.
    """

    args: Flags = Field(default_factory=dict)
    given: Flags = Field(default_factory=dict)
    run: Annotated[dict[Name, Any], Field(max_length=1_000)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> RunRecord:
        if not self.model_fields_set & {"args", "given"}:
            raise ValueError("it has neither an object 'args' nor an object 'given'")
        return self

    @property
    def repeated(self) -> dict[str, Any]:
        """The flags that `--config` passes again: those that were given, or else all."""
        return self.given if "given" in self.model_fields_set else self.args


class Scaled(Record):
    """What the temperature that was fitted on held-out rows makes of a data set's metrics."""

    temperature: FiniteFloat
    acc: Share | None = None
    ece: Share | None = None
    nll: FiniteFloat | None = None
    brier: Annotated[FiniteFloat, Field(ge=0, le=2.001)] | None = None


class Block(Record):
    """A data set's metrics. Those that an overridden `evaluate` does not know are None."""

    acc: Share
    ece: Share
    nll: FiniteFloat
    brier: Annotated[FiniteFloat, Field(ge=0, le=2.001)]
    split: Name = "?"
    num_bins: Count | None = None
    seconds: Nonnegative | None = None
    n_examples: Count | None = None
    n_draws: Count | None = None
    temperature_scaled: Scaled | None = None


class MetricsRecord(Record):
    """metrics.json: what a finished run has measured.

    Attributes:
        datasets: data set -> its metrics; the run's own first.
        files: what the run has written into its folder; None in files of older versions.
    """

    modelwrapper: Name | None = None
    model: Name | None = None
    seed: int | None = None
    updates: Count | None = None
    training_seconds: Nonnegative | None = None
    peak_memory_bytes: Count | None = None
    datasets: Annotated[dict[Name, Block], Field(min_length=1, max_length=10_000)]
    files: Annotated[list[Name], Field(max_length=100_000)] | None = None


def read_run_record(path: Path, what: str) -> RunRecord:
    """A run's args.json, whatever version wrote it.

    Args:
        path: of the file.
        what: on whose behalf it is read, for the message: a flag.
    Raises:
        UsageError: there is none, it is damaged, or a newer version wrote it.
    """
    return _read_versioned(path, RunRecord, what, "Restore the file, or make the run again.")


def read_metrics_record(path: Path, what: str) -> MetricsRecord:
    """A run's metrics.json, whatever version wrote it; see `read_run_record`."""
    return _read_versioned(path, MetricsRecord, what, "Restore the file, or make the run again.")


def _read_versioned(path: Path, record: type[RecordType], what: str, remedy: str) -> RecordType:
    content = read_json(path, what)
    where = f"{what}: {path}"
    version = content.get("format_version", 1) if isinstance(content, dict) else 1
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UsageError(f"{where}: key 'format_version' is {quoted(version)}, no count. {remedy}")
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{where}: it has format_version {quoted(version)}, which a newer version of this "
            f"project wrote; this one reads up to {FORMAT_VERSION}: update it."
        )
    return as_record(content, record, where, remedy)


# --- nested state <-> safetensors + JSON --------------------------------------------------------


def split_tensors(state: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Separate a nested state dict into JSON-able structure and a flat dict of tensors.

    Dict keys that are integers (as in `Optimizer.state_dict()`) are kept apart from strings.
    """
    if isinstance(state, Tensor):
        return {"__tensor__": prefix}, {prefix: state}
    tensors: dict[str, Tensor] = {}
    if isinstance(state, Mapping):
        items = []
        for key, value in state.items():
            structure, found = split_tensors(value, f"{prefix}/{key}" if prefix else str(key))
            items.append([key, structure])
            tensors |= found
        return {"__dict__": items}, tensors
    if isinstance(state, list | tuple):
        values = []
        for position, value in enumerate(state):
            structure, found = split_tensors(value, f"{prefix}/{position}")
            values.append(structure)
            tensors |= found
        return values, tensors
    return state, tensors


def join_tensors(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists)."""
    if isinstance(structure, Mapping):
        if "__tensor__" in structure:
            return tensors[structure["__tensor__"]]
        return {key: join_tensors(value, tensors) for key, value in structure["__dict__"]}
    if isinstance(structure, list):
        return [join_tensors(value, tensors) for value in structure]
    return structure


def rng_state() -> dict[str, Any]:
    """The state of torch's random number generators on the CPU and on this process's GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


# --- the folder ---------------------------------------------------------------------------------


def run_folder_path(args) -> Path:
    """`<output-dir>/<modelwrapper>/<model>/<dataset>/<name>`.

    `<name>` is --checkpoint-name where it was set, else --log-path. A local model folder stands
    under its last component; a hub id keeps its owner.
    """
    method = args.modelwrapper.rpartition(":")[2].lower()
    model = str(args.model)
    if os.path.isabs(model) or model.startswith(".") or Path(model).is_dir():
        model = Path(model).resolve().name
    name = args.checkpoint_name if args.checkpoint_name != "default" else args.log_path
    return Path(args.output_dir) / method / model / args.dataset.rpartition(":")[2] / name


class RunFolder:
    """The files of one run, and its training states under `state/step-NNNNNNNN/`."""

    def __init__(self, path: Path, rank: int = 0, num_processes: int = 1) -> None:
        self.path = Path(path)
        self.rank = rank
        self.num_processes = num_processes
        self._history = None

    @property
    def states(self) -> list[Path]:
        """Complete states, oldest first."""
        return sorted((self.path / "state").glob("step-*"))

    def check_writable(self) -> None:
        """Fail before the model is loaded, not after the run.

        Raises:
            UsageError: the folder cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"\0" * 4096)
                probe.flush()
        except OSError as error:
            raise UsageError(
                f"the output folder {self.path} cannot be written ({error.strerror}); "
                "choose another with --output-dir."
            ) from None

    def check_against_earlier_run(self, args) -> None:
        """Hold `args` against what the folder already keeps.

        Raises:
            UsageError: `--resume` with other flags than the stored ones; an interrupted run's state
                that a new run would replace; or the folder of the adapter that is to be loaded.
        """
        stored_file = self.path / "args.json"
        if args.resume:
            if not stored_file.is_file():
                return
            stored = read_json(stored_file, "--resume")["args"]
            free = {"resume", "overwrite", "config", "tracker", "nowand", "save_per_steps"}
            free |= {"wandb_entity", "wandb_project", "wandb_name", "output_dir", "device"}
            free |= {"eval_batch_size", "gradient_checkpointing"}  # the remedies of a full memory
            differing = [
                f"--{key.replace('_', '-')} is {getattr(args, key)!r}, the stored run has {value!r}"
                for key, value in stored.items()
                if key not in free and hasattr(args, key) and getattr(args, key) != value
            ]
            if differing:
                raise UsageError(
                    f"--resume: {'; '.join(differing)}. A resumed run keeps its flags (they are in "
                    f"{stored_file}); pass the same ones, or another --log-path for a new run."
                )
        elif (
            args.load_lora_path is not None
            and Path(args.load_lora_path).resolve() == self.path.resolve()
            and not args.overwrite
        ):
            raise UsageError(
                f"--load-lora-path is this run's own folder, {self.path}: the files of the run "
                "that trained the adapter would be replaced. Pass another --log-path, or "
                "--overwrite."
            )
        elif self.states and not args.overwrite:
            step = int(self.states[-1].name.removeprefix("step-"))
            raise UsageError(
                f"{self.path} keeps the state of a run interrupted after update {step}; pass "
                "--resume to go on, --overwrite to start over, or another --log-path."
            )
        elif (self.path / "metrics.json").is_file():
            logger.info("%s holds an earlier run: its files are replaced.", self.path)

    def finished(self) -> dict[str, Any] | None:
        """The metrics of each data set, if a run came to its end here."""
        file = self.path / "metrics.json"
        if self.states or not file.is_file():
            return None
        return read_json(file, "--resume")["datasets"]

    def clear(self, keep_adapter: bool) -> None:
        """Forget an earlier run's states and results, before a new run begins."""
        shutil.rmtree(self.path / "state", ignore_errors=True)
        patterns = ["history.jsonl", "metrics.json", "predictions*.safetensors", "log.txt"]
        if not keep_adapter:
            patterns += ["adapter_*", "bayes_config.json", "member*/adapter_*"]
            patterns += ["laplace.safetensors"]
        for pattern in patterns:
            for file in self.path.glob(pattern):
                file.unlink()

    # history

    def append_history(self, record: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl, in a single write."""
        if self.rank != 0:
            return
        if self._history is None:
            self._history = open(self.path / "history.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        try:
            self._history.write(json.dumps(record) + "\n")
            self._history.flush()
        except OSError as error:
            raise RunError(
                f"cannot write {self.path / 'history.jsonl'}: {error}. Free some space; --resume "
                "goes on from the last state."
            ) from error

    def cut_history(self, last_step: int) -> None:
        """Drop what was logged after the update that a resumed run goes on from."""
        file = self.path / "history.jsonl"
        if self.rank != 0 or not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line that the kill cut in half
                continue
            if record.get("step", 0) <= last_step:
                kept.append(line + "\n")
        write_atomically(file, lambda temporary: temporary.write_text("".join(kept), "utf-8"))

    # training state

    def save_state(self, step: int, state: Mapping[str, Any], barrier: Callable[[], None]) -> None:
        """Keep the state of update `step`; then drop all but the newest `KEPT_STATES`.

        Every process writes its own random number generators, the main one everything else. The
        folder gets its name when all have finished, so a state that can be seen is complete.
        """
        temporary = self.path / "state" / f".step-{step:08d}"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            structure, tensors = split_tensors(state)
            write_json(temporary / "state.json", structure)
            write_tensors(temporary / "state.safetensors", tensors, {"step": str(step)})
        barrier()
        structure, tensors = split_tensors(rng_state())
        write_json(temporary / f"rng-{self.rank}.json", structure)
        write_tensors(temporary / f"rng-{self.rank}.safetensors", tensors, {})
        barrier()
        if self.rank == 0:
            final = self.path / "state" / f"step-{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in self.states[:-KEPT_STATES]:
                shutil.rmtree(old)

    def load_state(self) -> tuple[dict[str, Any], Callable[[], None]] | None:
        """The newest state, and a function that puts this process's generators back; or None.

        Raises:
            UsageError: the state was made by another number of processes.
        """
        if not self.states:
            return None
        newest = self.states[-1]
        found = len(list(newest.glob("rng-*.json")))
        if found != self.num_processes:
            raise UsageError(
                f"--resume: the state in {newest} was made by {found} process(es), this run has "
                f"{self.num_processes}; launch it with the same number."
            )

        def read(name: str) -> Any:
            structure = read_json(newest / f"{name}.json", "--resume")
            return join_tensors(structure, read_tensors(newest / f"{name}.safetensors", "--resume"))

        state, rng = read("state"), read(f"rng-{self.rank}")
        return state, lambda: set_rng_state(rng)

    def drop_states(self) -> None:
        """A finished run needs no state."""
        if self.rank == 0:
            shutil.rmtree(self.path / "state", ignore_errors=True)
