"""A run's training state on disk: whole or not there, and checked before it is believed.

A state is the folder `state/step-NNNNNNNN`: JSON for the structure, safetensors for the tensors,
and each process's random number generators. It gets its name when everything in it is on the disk,
and loses it before anything of it is deleted. So a folder of that name is whole unless somebody
else has damaged it; then the next older one is taken, and nothing is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from utils.errors import UsageError, quoted
from utils.files import disk_errors, remove_folder, remove_trash, sync, write_json, write_tensors
from utils.logging import logger
from utils.records import Count, Name, Record, as_record, check_tensor, read_json, read_tensors

KEPT_STATES = 2
MOST_BYTES_OF_GENERATORS = 2**20
BYTES = (torch.uint8,)
_NAME = re.compile(r"step-(\d{8,15})")


class StateRecord(Record):
    """What a resumed run needs, apart from the random number generators.

    Attributes:
        step: updates done (of the current member, for an ensemble).
        position: epoch, and batches of it that were consumed.
        parameters: name -> value of everything that is trained.
        optimizers, schedulers: their `state_dict`s.
        method: of `WrapperBase.method_state`.
        evaluation_due: whether the evaluation that follows this update is still to be made.
        num_processes: of the run; None in states of older versions.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    step: Annotated[int, Field(ge=1, lt=2**53)]
    position: Annotated[list[Count], Field(min_length=2, max_length=2)]
    parameters: dict[Name, Tensor]
    optimizers: dict[Name, dict[str, Any]]
    schedulers: dict[Name, dict[str, Any]]
    method: dict[str, Any]
    evaluation_due: bool = False
    num_processes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


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
    """The inverse of `split_tensors` (tuples come back as lists).

    Raises:
        UsageError: `split_tensors` makes no such structure, or a tensor is missing.
    """
    if isinstance(structure, list):
        return [join_tensors(value, tensors) for value in structure]
    if not isinstance(structure, Mapping):
        return structure
    kind, content = next(iter(structure.items())) if len(structure) == 1 else (None, None)
    if kind == "__tensor__" and isinstance(content, str):
        if content not in tensors:
            raise UsageError(f"the tensor {quoted(content)} is missing")
        return tensors[content]
    if kind == "__dict__" and isinstance(content, list) and all(map(_is_item, content)):
        return {key: join_tensors(value, tensors) for key, value in content}
    raise UsageError(f"{quoted(structure)} is no part of a state")


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)


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


class States:
    """The training states of one run, in `folder`."""

    def __init__(self, folder: Path, rank: int, num_processes: int) -> None:
        self.folder = folder
        self.rank = rank
        self.num_processes = num_processes
        self._damaged: set[Path] = set()  # they are no reason to drop a whole one

    def entries(self) -> list[Path]:
        """Everything that is or was meant to be a state, also what is damaged."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.startswith("step-"))

    def all(self) -> list[Path]:
        """The folders with a state's name, oldest first."""
        named = [path for path in self.entries() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(named, key=_step)

    def save(self, step: int, state: Mapping[str, Any], barrier: Callable[[], None]) -> None:
        """Keep the state of update `step`; then drop all but the newest `KEPT_STATES`.

        Every process writes its own random number generators, the main one everything else.
        """
        temporary = self.folder / f".step-{step:08d}"
        if self.rank == 0:
            with disk_errors(temporary):
                remove_folder(temporary)
            structure, tensors = split_tensors({**state, "num_processes": self.num_processes})
            write_json(temporary / "state.json", structure)
            write_tensors(temporary / "state.safetensors", tensors, {"step": str(step)})
        barrier()
        structure, tensors = split_tensors(rng_state())
        write_json(temporary / f"rng-{self.rank}.json", structure)
        write_tensors(temporary / f"rng-{self.rank}.safetensors", tensors, {})
        barrier()
        if self.rank == 0:
            final = self.folder / f"step-{step:08d}"
            with disk_errors(final):
                remove_folder(final)  # a damaged one that the run was not resumed from
                temporary.rename(final)
                sync(self.folder)
                sync(self.folder.parent)
                self._damaged.discard(final)
                whole = [path for path in self.all() if path not in self._damaged]
                for old in whole[:-KEPT_STATES]:
                    remove_folder(old)

    def load(
        self,
        take: Callable[[StateRecord, int], None],
        agree: Callable[[bool], bool],
        most_bytes: int,
    ) -> tuple[StateRecord, Callable[[], None]] | None:
        """The newest state that is whole and fits, and a function that puts the generators back.

        Args:
            take: puts a state (of the update that its folder names) in place; raises `UsageError`
                on one that does not fit.
            agree: whether all processes say so; they must go on from the same update.
            most_bytes: that its tensors can have.
        Raises:
            UsageError: there are states, but none can be used, or another number of processes made
                them. Nothing is deleted.
        """
        whole = self.all()
        problems = [f"{p.name} is no state's name" for p in self.entries() if p not in whole]
        for folder in reversed(whole):
            problem, found = None, None
            try:
                found = self._read(folder, take, most_bytes)
            except UsageError as error:
                problem = error
            if agree(found is not None):
                return found
            if isinstance(problem, _OtherProcesses):
                raise UsageError(str(problem))
            self._damaged.add(folder)
            problems.append(f"{folder.name}: {problem or 'another process cannot use it'}")
            logger.info("--resume: %s cannot be used (%s).", folder, problem)
        if problems:
            raise UsageError(
                f"--resume: {self.folder} holds no state that can be used: {'; '.join(problems)}. "
                "Nothing was deleted; pass --overwrite to start over, or another --log-path."
            )
        return None

    def _read(
        self, folder: Path, take: Callable[[StateRecord, int], None], most_bytes: int
    ) -> tuple[StateRecord, Callable[[], None]]:
        content = self._join(folder, "state", most_bytes)
        state = as_record(content, StateRecord, f"{folder.name}/state.json")
        found = state.num_processes or len(list(folder.glob("rng-*.json")))
        if found != self.num_processes:
            raise _OtherProcesses(
                f"--resume: the state in {folder} was made by {found} process(es), this run has "
                f"{self.num_processes}; launch it with the same number."
            )
        generators = self._join(folder, f"rng-{self.rank}", MOST_BYTES_OF_GENERATORS)
        _check_generators(generators, f"{folder.name}/rng-{self.rank}.safetensors")
        take(state, _step(folder))
        return state, lambda: set_rng_state(generators)

    def _join(self, folder: Path, name: str, most_bytes: int) -> Any:
        structure = read_json(folder / f"{name}.json", "state")
        file = folder / f"{name}.safetensors"
        if file.is_file() and file.stat().st_size > most_bytes:
            raise UsageError(
                f"{file} has {file.stat().st_size} bytes; a state of this run has at most "
                f"{most_bytes}."
            )
        return join_tensors(structure, read_tensors(file, "state"))

    def drop(self) -> None:
        """Delete the states; what is not ours stays, and then the folder, too."""
        for folder in self.all():
            remove_folder(folder)
        self.sweep()
        with suppress(OSError):
            self.folder.rmdir()

    def sweep(self) -> None:
        """Delete what killed processes have left of saving or deleting a state."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            name = path.name.removeprefix(".trash-").removeprefix(".")
            if path.name != name and _NAME.fullmatch(name):
                remove_trash(path)


class _OtherProcesses(UsageError):
    """The states are whole, but of another number of processes."""


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


# --- whether a state fits -----------------------------------------------------------------------


def _check_generators(state: Any, where: str) -> None:
    if not isinstance(state, Mapping) or set(state) - {"cpu", "cuda"} or "cpu" not in state:
        raise UsageError(f"{where}: it must hold the states of the generators 'cpu' and 'cuda'.")
    for key, value in state.items():
        like = torch.get_rng_state() if key == "cpu" else None
        if not isinstance(value, Tensor):
            raise UsageError(f"{where}: {key} is no tensor.")
        check_tensor({key: value}, key, (like.numel() if like is not None else None,), where, BYTES)
    try:
        torch.Generator().set_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_initialized():
            torch.Generator("cuda").set_state(state["cuda"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: no state of a generator ({error}).") from None


def check_parameters(stored: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Names, shapes and types are those of the run's parameters, values are finite.

    Raises:
        UsageError: they are of another model or method, or damaged.
    """
    if stored.keys() != current.keys():
        odd = sorted(stored.keys() ^ current.keys())
        raise UsageError(
            f"it is of another model or method: {quoted(odd[0])} is in one of them only."
        )
    for name, value in current.items():
        check_tensor(stored, name, tuple(value.shape), "parameters", (value.dtype,))


def check_optimizer(stored: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's `state_dict` is one of `optimizer`.

    What torch's Adam, AdamW and SGD keep of a parameter has its shape; of others only the groups
    are looked at.

    Raises:
        UsageError: it is not.
    """
    check_alike(stored.get("param_groups"), optimizer.state_dict()["param_groups"], "param_groups")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    if numbers != list(range(len(parameters))):
        raise UsageError("optimizers: the parameters are numbered in another way.")
    state = stored.get("state")
    if not isinstance(state, Mapping) or not set(state) <= set(numbers):
        raise UsageError("optimizers: there is a state of other parameters.")
    adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    if not adam and not isinstance(optimizer, torch.optim.SGD):
        return
    for number, kept in state.items():
        if not isinstance(kept, Mapping):
            raise UsageError(f"optimizers: {quoted(kept)} is no state of a parameter.")
        if adam and not {"step", "exp_avg", "exp_avg_sq"} <= kept.keys():
            raise UsageError(f"optimizers: the state of parameter {number} is incomplete.")
        for key, value in kept.items():
            if not isinstance(value, Tensor):
                if value is not None:  # SGD without momentum
                    raise UsageError(f"optimizers: {quoted(key)} is {quoted(value)}, no tensor.")
                continue
            parameter = parameters[number]
            shape = () if key == "step" else tuple(parameter.shape)
            dtypes = (torch.float32,) if key == "step" else (parameter.dtype,)
            check_tensor(kept, key, shape, f"optimizers, parameter {number}", dtypes)
            if key in ("step", "exp_avg_sq") and (value < 0).any():
                raise UsageError(f"optimizers: {key} of parameter {number} is negative.")


def check_alike(stored: Any, current: Any, where: str) -> None:
    """Both have the same keys, lengths and types all the way down, and no number is NaN.

    Raises:
        UsageError: they differ.
    """
    if isinstance(current, Mapping):
        if not isinstance(stored, Mapping) or stored.keys() != current.keys():
            raise UsageError(f"{where}: {quoted(stored)} has other keys than {quoted(current)}.")
        for key, value in current.items():
            check_alike(stored[key], value, f"{where}.{key}")
    elif isinstance(current, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(current):
            raise UsageError(f"{where}: {quoted(stored)} is no list of {len(current)}.")
        for one, other in zip(stored, current, strict=True):
            check_alike(one, other, where)
    elif isinstance(current, int | float) and not isinstance(current, bool):
        is_number = isinstance(stored, int | float) and not isinstance(stored, bool)
        if not is_number or not -(2.0**63) < stored < 2.0**63:
            raise UsageError(f"{where}: {quoted(stored)} is no finite number.")
        if isinstance(current, int) and not isinstance(stored, int):
            raise UsageError(f"{where}: {quoted(stored)} is no whole number.")
    elif type(stored) is not type(current):
        raise UsageError(f"{where}: {quoted(stored)} is of another type than {quoted(current)}.")
