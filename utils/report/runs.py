"""Finished runs below some folders, and what they predicted; unusable ones with the reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, FiniteFloat, ValidationError

from utils.args import NOT_REPEATED, WITHOUT_EFFECT
from utils.errors import UsageError, quoted
from utils.records import (
    INTEGERS,
    Count,
    Record,
    check_tensor,
    read_bytes,
    read_json,
    read_tensors_and_metadata,
)
from utils.report.escape import LONGEST_TEXT, shorten

# Flags that say where and how a run was kept, watched or repeated, not what it computed. Two runs
# that differ in nothing else belong to one row of the tables.
NOT_SETTINGS = frozenset(
    {
        *("modelwrapper", "model", "dataset", "testing_set", "limit_eval"),  # of the table itself
        *("seed", "seed_data", "seed_sampling"),
        *("log_path", "checkpoint_name", "output_dir", "checkpoint", "save_per_steps", "device"),
        *("tracker", "nowand", "wandb_entity", "wandb_project", "wandb_name"),
        *("eval_per_steps", "eval_steps", "eval_batch_size", "bayes_eval_n_samples", "num_bins"),
        *("ood_datasets", "ood_ori_dataset", "adapter_dataset"),
        "temperature_scaling",  # what it changes beside a row of its own is --hold-out
        *NOT_REPEATED,
        *WITHOUT_EFFECT,
    }
)
BLOCK = 2_000_000  # numbers of draws at once: 16 MB in double precision
MOST_NUMBERS = 2**30  # of a file's draws: 4 GiB in single precision
MOST_CLASSES = 1000
MOST_HISTORY = 2**28  # bytes of history.jsonl
MOST_NLL = 1e9  # in a plot
NOT_RUNS = ("state", "wandb", "tensorboard")  # folders that hold no run
SEED_IN_NAME = re.compile(r"[-_]?seed[-_]?(\d+)")


class Unusable(Exception):
    """A run or a file that the report leaves out; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """Something that was left out, and why."""

    path: Path
    reason: str

    @property
    def line(self) -> str:
        """Both, for text."""
        path, reason = (shorten(text, LONGEST_TEXT) for text in (str(self.path), self.reason))
        return f"{path}: skipped: {reason}"


@dataclass(frozen=True)
class Evaluation:
    """One data set that a run was evaluated on.

    Attributes:
        file: its predictions.
        shifted: whether it is another data set than the posterior's own.
        temperature: fitted on held-out rows, if the run has --temperature-scaling.
        omitted: why a temperature of metrics.json is not taken, if there is one.
        stored: the block of metrics.json.
        provenance: command, commit, host, started of the run that evaluated; "" where unknown.
    """

    dataset: str
    file: Path
    provenance: dict[str, str]
    shifted: bool
    temperature: float | None
    omitted: str
    stored: dict[str, Any]


Seeds = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    A run that only evaluates what an earlier one of the same method has trained says so of that
    posterior: `dataset`, `seeds` and `posterior` are the earlier run's, and so are the settings,
    apart from the flags that were given.

    Attributes:
        method, model: in full, as in the command.
        dataset: what the posterior was trained on.
        seeds: (--seed, --seed-data, --seed-sampling).
        adapter_seeds: those of the run that trained the loaded adapter, if there is one.
        settings: flags that say what was computed, without those of `NOT_SETTINGS`.
        posterior: tells posteriors apart.
    """

    folder: Path
    method: str
    model: str
    dataset: str
    seeds: Seeds
    adapter_seeds: Seeds | None
    settings: dict[str, Any]
    posterior: str
    started: str
    updates: int | None
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def training_seeds(self) -> Seeds:
        """The seeds of the training, here or of the adapter: what rows have in common."""
        return self.adapter_seeds or self.seeds

    @property
    def seed_name(self) -> str:
        """The seeds in short, and the adapter's where they differ."""
        name = seed_text(self.seeds)
        on = seed_text(self.training_seeds)
        return name if on == name else f"{name} (adapter {on})"


def seed_text(seeds: Seeds) -> str:
    """The seed, and the other two where they differ from it."""
    return "/".join(map(str, seeds if len(set(seeds)) > 1 else seeds[:1]))


@dataclass(frozen=True)
class Predictions:
    """Draws in the order of their index.

    Attributes:
        draws: log-probabilities, (n, N, C), as they are stored.
        labels: (n,)
        index: (n,) rows in their split.
        split: of the data set.
        fingerprint: of data set, split, index, labels and the number of classes; the lower 32
            bits seed the resamples.
    """

    draws: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    split: str
    fingerprint: int


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Skipped]]:
    """The finished runs at or below `paths`, and what was left out.

    Raises:
        UsageError: a path does not exist.
    """
    runs: list[Run] = []
    skipped: list[Skipped] = []
    walked: set[tuple[int, int]] = set()
    for path in paths:
        if not os.path.exists(path):
            raise UsageError(
                f"there is no {quoted(str(path))}; give folders of runs, such as checkpoints."
            )
        if not os.path.isdir(path):
            raise UsageError(
                f"{quoted(str(path))} is a file; give a run's folder, or one above it."
            )
        for folder in _run_folders(path, walked, skipped):
            try:
                runs.append(read_run(folder))
            except Unusable as error:
                skipped.append(Skipped(folder, str(error)))
    return sorted(runs, key=lambda run: str(run.folder)), skipped


def _run_folders(
    root: Path, walked: set[tuple[int, int]], skipped: list[Skipped]
) -> Iterator[Path]:
    """Folders at or below `root` that a run has begun, those above first.

    Args:
        walked: devices and inodes of folders that are done: links may lead to one twice, or in
            circles. Extended, as is `skipped` with folders that cannot be read.
    """
    waiting = [root]
    while waiting:  # no recursion: folders may be nested deeper than Python's stack
        folder = waiting.pop()
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in walked:
                continue
            walked.add((about.st_dev, about.st_ino))
            names = sorted(os.listdir(folder))
        except OSError as error:
            skipped.append(Skipped(folder, f"the folder cannot be read ({error.strerror})"))
            continue
        if "metrics.json" in names or "args.json" in names:
            yield folder
        waiting += [
            folder / name
            for name in reversed(names)
            if name not in NOT_RUNS and not name.startswith(".") and os.path.isdir(folder / name)
        ]


def settings_key(settings: dict[str, Any]) -> str:
    """Settings as one text that is equal where they are."""
    return json.dumps(settings, sort_keys=True, default=str)


def read_run(folder: Path) -> Run:
    """What a run's folder says of itself.

    Raises:
        Unusable: it is not finished, or a file is damaged.
    """
    try:
        return _read_run(folder)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, OSError) as error:
        # Whatever else a file may hold: one run must not cost the report of all others.
        raise Unusable(f"cannot be understood ({type(error).__name__}: {error})") from None


def _read_run(folder: Path) -> Run:
    if not (folder / "metrics.json").is_file():
        steps = [re.fullmatch(r"step-(\d+)", s.name) for s in (folder / "state").glob("step-*")]
        last = max((int(step[1]) for step in steps if step), default=None)
        at = "" if last is None else f" (interrupted after update {last})"
        raise Unusable(f"not finished: there is no metrics.json{at}")
    metrics = _read_object(folder / "metrics.json")
    stored = _read_object(folder / "args.json") if (folder / "args.json").is_file() else {}
    args, given, made = (_object(stored.get(key)) for key in ("args", "given", "run"))
    method = metrics.get("modelwrapper") or args.get("modelwrapper")
    model = metrics.get("model") or args.get("model")
    blocks = metrics.get("datasets")
    if not isinstance(method, str) or not isinstance(model, str):
        raise Unusable("metrics.json names no modelwrapper or no model")
    if not isinstance(blocks, dict) or not blocks:
        raise Unusable("metrics.json has no 'datasets'")
    dataset = _data_set(args) or next(iter(blocks))
    if dataset not in blocks:
        raise Unusable(f"metrics.json has no block for the run's data set {dataset}")
    args = {"seed": metrics.get("seed"), **args}
    for name in ("seed", "seed_data", "seed_sampling"):
        if not isinstance(args.get(name), int | str | None):
            raise Unusable(f"{name.replace('_', '-')} is {args[name]}, not a number")
    posterior = _posterior_of(args, folder)
    settings = posterior.settings
    if not stored:  # nothing but its name tells it from other runs
        settings = {"folder": SEED_IN_NAME.sub("", folder.name)}
    own = _settings(args)
    # what an evaluation of an earlier run's posterior has set otherwise
    changed = {*given, "bayes_eval_n_samples_final"} & own.keys() - {"load_lora_path"}
    command = made.get("command")
    provenance = {
        "command": " ".join(map(str, command)) if isinstance(command, list) else "",
        **{key: str(made.get(key) or "") for key in ("commit", "host", "started")},
    }
    run = Run(
        folder=folder,
        method=method,
        model=model,
        dataset=posterior.dataset or dataset,
        seeds=posterior.seeds,
        adapter_seeds=posterior.adapter_seeds,
        settings=settings | {key: own[key] for key in changed},
        posterior=f"{method} {posterior.seeds} {posterior.adapter_seeds} {settings_key(settings)}",
        started=provenance["started"],
        updates=metrics.get("updates") if isinstance(metrics.get("updates"), int) else None,
    )
    for name, block in blocks.items():
        stem = "predictions" if name == dataset else f"predictions-{name}"
        block = _object(block)
        temperature = _number(_object(block.get("temperature_scaled")).get("temperature"))
        omitted = ""
        if temperature is not None and run.dataset != dataset:
            omitted = f"the temperature of {name} was fitted on {dataset}, not on {run.dataset}"
        if omitted or (temperature is not None and temperature <= 0):
            temperature = None
        file = folder / f"{stem}.safetensors"
        shifted = name != run.dataset
        run.evaluations.append(
            Evaluation(name, file, provenance, shifted, temperature, omitted, block)
        )
    return run


@dataclass(frozen=True)
class _Posterior:
    """What tells one posterior from others, beside method and model; see `Run`."""

    dataset: str
    seeds: Seeds
    adapter_seeds: Seeds | None
    settings: dict[str, Any]


def _posterior_of(args: dict[str, Any], folder: Path, depth: int = 0) -> _Posterior:
    """The posterior that a run with these flags has evaluated.

    Without training of its own it is that of the adapter's run, if the method is the same. Paths
    are tried from the run's folder upwards and then from here.
    """
    seed = args.get("seed")
    seeds = (seed, args.get("seed_data", seed), args.get("seed_sampling", seed))
    own = _Posterior(_data_set(args), seeds, None, _settings(args))
    path = args.get("load_lora_path")
    if not isinstance(path, str):
        return own
    adapter, adapter_args = _adapter(path, folder)
    if adapter_args and depth < 9:  # a run cannot be its own adapter, but a file can say so
        loaded = _posterior_of(adapter_args, adapter, depth + 1)
    else:
        named = SEED_IN_NAME.findall(path)
        loaded = _Posterior("", (int(named[-1]),) * 3 if named else (), None, {})
    if args.get("max_train_steps") or args.get("n_epochs"):
        return replace(own, adapter_seeds=(loaded.adapter_seeds or loaded.seeds) or None)
    source = _data_set(args, "ood_ori_dataset") or _data_set(args, "adapter_dataset")
    dataset = source or loaded.dataset or own.dataset
    if adapter_args.get("modelwrapper") == args.get("modelwrapper"):
        return replace(loaded, dataset=dataset)
    return replace(
        own, dataset=dataset, adapter_seeds=(loaded.adapter_seeds or loaded.seeds) or None
    )


def _adapter(path: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a loaded adapter, and its run's flags; none if they are not there any more."""
    for base in (*folder.absolute().parents, Path()):
        try:
            return base / path, _object(_read_object(base / path / "args.json").get("args"))
        except Unusable:
            continue
    return Path(path), {}


def _data_set(args: dict[str, Any], flag: str = "dataset") -> str:
    return str(args.get(flag) or "").rpartition(":")[2]


def _settings(args: dict[str, Any]) -> dict[str, Any]:
    return {
        key: SEED_IN_NAME.sub("", value) if isinstance(value, str) else value
        for key, value in args.items()
        if key not in NOT_SETTINGS
    }


def read_predictions(evaluation: Evaluation) -> Predictions:
    """The stored draws, checked.

    Raises:
        Unusable: the file is missing, cut short, of another data set, or its numbers are none.
    """
    try:
        return _read_predictions(evaluation)
    except UsageError as error:
        raise Unusable(str(error)) from None
    except MemoryError:
        raise Unusable(f"{evaluation.file.name} does not fit into the memory") from None


def _read_predictions(evaluation: Evaluation) -> Predictions:
    name = shorten(evaluation.file.name)
    if not os.path.lexists(evaluation.file):
        raise Unusable(f"there is no {name}")
    wanted = ("log_probs", "labels", "index")
    tensors, metadata = read_tensors_and_metadata(evaluation.file, name, wanted, MOST_NUMBERS)
    dataset = metadata.get("dataset", evaluation.dataset)
    if dataset != evaluation.dataset:
        raise Unusable(f"{name} is of {quoted(dataset)}, not of {quoted(evaluation.dataset)}")
    log_probs = check_tensor(tensors, "log_probs", (None, None, None), name)
    n, _, num_classes = log_probs.shape
    if 0 in log_probs.shape:
        raise Unusable(f"{name} has shape {tuple(log_probs.shape)}: it holds no predictions")
    if num_classes > MOST_CLASSES:
        raise Unusable(f"{name} has {num_classes} classes; at most {MOST_CLASSES} are measured")
    labels, index = (
        check_tensor(tensors, key, (n,), name, INTEGERS).long().numpy()
        for key in ("labels", "index")
    )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise Unusable(f"{name} has labels outside of its {num_classes} classes")
    if index.min() < 0:
        raise Unusable(f"{name} has a row of a negative index")
    order = np.argsort(index, kind="stable")
    if (np.diff(index[order]) == 0).any():
        raise Unusable(f"{name} holds a row of the data set twice")
    if log_probs.dtype == torch.bfloat16:  # numpy has no such type
        log_probs = log_probs.float()
    draws = log_probs.numpy()
    mass = (np.logaddexp.reduce(block.astype(float), axis=-1) for block in row_blocks(draws))
    if any(np.abs(block).max() > 1e-3 for block in mass):
        raise Unusable(f"{name} holds probabilities that do not add up to 1")
    if (np.diff(index) < 0).any():
        draws, labels, index = draws[order], labels[order], index[order]
    split = str(metadata.get("split") or evaluation.stored.get("split") or "?")
    examples = np.concatenate([[num_classes], index, labels]).tobytes()
    described = f"{evaluation.dataset} {split} ".encode(errors="backslashreplace") + examples
    digest = int.from_bytes(hashlib.sha256(described).digest()[:8])
    return Predictions(draws, labels, index, split, digest << 32 | zlib.crc32(described))


def row_blocks(draws: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of (n, N, C) draws in blocks of bounded size."""
    rows = max(1, BLOCK // draws[0].size)
    return (draws[start : start + rows] for start in range(0, len(draws), rows))


History = dict[str, list[tuple[int, float]]]


def read_history(run: Run) -> History:
    """(update, NLL) of training and of evaluations while training, without broken lines.

    Raises:
        Unusable: there is a history, but it cannot be read.
    """
    curves: History = {"train": [], "eval": []}
    file = run.folder / "history.jsonl"
    if not os.path.lexists(file):
        return curves
    try:
        content = read_bytes(file, file.name, MOST_HISTORY)
    except UsageError as error:
        raise Unusable(f"no training curves: {error}") from None
    for line in content.splitlines():
        try:
            record = _HistoryLine.model_validate_json(line)
        except ValidationError:  # a kill may cut a line in half
            continue
        for name, nll in (("train", record.nll), ("eval", record.eval and record.eval.nll)):
            if nll is not None:
                curves[name].append((record.step, nll))
    return curves


class _Measured(Record):
    """What a line of the history says of an evaluation."""

    nll: Annotated[FiniteFloat, Field(ge=-MOST_NLL, le=MOST_NLL)] | None = None


class _HistoryLine(_Measured):
    """A line of history.jsonl, as far as the report shows it."""

    step: Count
    eval: _Measured | None = None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file, file.name)
    except UsageError as error:
        raise Unusable(str(error)) from None
    if not isinstance(content, dict):
        raise Unusable(f"{file.name} holds no JSON object")
    return content


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:  # an integer without end
        return None
