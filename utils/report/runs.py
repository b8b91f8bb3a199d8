"""Finished runs below some folders, and what they predicted; unusable ones with the reason."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from utils.args import NOT_REPEATED, WITHOUT_EFFECT
from utils.errors import UsageError
from utils.records import read_json

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
NOT_RUNS = ("state", "wandb", "tensorboard")  # folders that hold no run
SEED_IN_NAME = re.compile(r"[-_]?seed[-_]?(\d+)")


class Unusable(Exception):
    """A run or a file that the report leaves out; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """Something that was left out, and why."""

    path: Path
    reason: str


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
        fingerprint: of data set, split, index, labels and the number of classes.
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
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no {path}; give folders of runs, such as checkpoints.")
        if not path.is_dir():
            raise UsageError(f"{path} is a file; give a run's folder, or one above it.")
        for folder in _run_folders(path):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                runs.append(read_run(folder))
            except Unusable as error:
                skipped.append(Skipped(folder, str(error)))
    return sorted(runs, key=lambda run: str(run.folder)), skipped


def _run_folders(root: Path) -> Iterator[Path]:
    walked: set[str] = set()
    for folder, children, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in walked:  # a link to a folder above itself has no end
            children.clear()
            continue
        walked.add(os.path.realpath(folder))
        children[:] = sorted(c for c in children if c not in NOT_RUNS and not c.startswith("."))
        if "metrics.json" in files or "args.json" in files:
            yield Path(folder)


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
    file = evaluation.file
    if not file.is_file():
        raise Unusable(f"there is no {file.name}")
    try:
        with safe_open(file, framework="np") as content:
            metadata = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    except Exception as error:
        if isinstance(error, OSError | TypeError) or type(error).__name__ == "SafetensorError":
            raise Unusable(f"{file.name} cannot be read as safetensors ({error})") from None
        raise
    missing = {"log_probs", "labels", "index"} - tensors.keys()
    if missing:
        raise Unusable(f"{file.name} has no {' and no '.join(sorted(missing))}")
    draws, labels, index = (tensors[key] for key in ("log_probs", "labels", "index"))
    if metadata.get("dataset", evaluation.dataset) != evaluation.dataset:
        raise Unusable(f"{file.name} is of {metadata['dataset']}, not of {evaluation.dataset}")
    fits = draws.ndim == 3 and 0 not in draws.shape
    if not fits or not labels.shape == index.shape == draws.shape[:1]:
        shapes = ", ".join(str(tuple(a.shape)) for a in (draws, labels, index))
        raise Unusable(f"{file.name} has shapes {shapes}, not (n, N, C), (n,), (n,)")
    if draws.dtype.kind != "f" or labels.dtype.kind not in "iu" or index.dtype.kind not in "iu":
        raise Unusable(f"{file.name} holds {draws.dtype}, {labels.dtype}, {index.dtype}")
    broken = sum(int((~np.isfinite(block)).any((1, 2)).sum()) for block in row_blocks(draws))
    if broken:
        raise Unusable(f"{file.name} has predictions of {broken} row(s) that are not finite")
    if labels.min() < 0 or labels.max() >= draws.shape[2]:
        raise Unusable(f"{file.name} has labels outside of its {draws.shape[2]} classes")
    if len(np.unique(index)) != len(index):
        raise Unusable(f"{file.name} holds a row of the data set twice")
    if (np.diff(index) < 0).any():
        order = np.argsort(index)
        draws, labels, index = draws[order], labels[order], index[order]
    labels, index = labels.astype(np.int64), index.astype(np.int64)
    mass = (np.logaddexp.reduce(block.astype(float), axis=-1) for block in row_blocks(draws))
    if any(np.abs(block).max() > 1e-3 for block in mass):
        raise Unusable(f"{file.name} holds probabilities that do not add up to 1")
    split = str(metadata.get("split") or evaluation.stored.get("split") or "?")
    examples = np.concatenate([[draws.shape[2]], index, labels]).tobytes()
    fingerprint = zlib.crc32(f"{evaluation.dataset} {split} ".encode() + examples)
    return Predictions(draws, labels, index, split, fingerprint)


def row_blocks(draws: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of (n, N, C) draws in blocks of bounded size."""
    rows = max(1, BLOCK // draws[0].size)
    return (draws[start : start + rows] for start in range(0, len(draws), rows))


def read_history(run: Run) -> dict[str, list[tuple[int, float]]]:
    """(update, NLL) of training and of evaluations while training, without broken lines."""
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "eval": []}
    try:
        lines = (run.folder / "history.jsonl").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return curves
    for line in lines:
        try:
            record = _object(json.loads(line))
        except ValueError:  # a kill may cut a line in half
            continue
        step = _number(record.get("step"))
        for name, source in (("train", record), ("eval", _object(record.get("eval")))):
            nll = _number(source.get("nll"))
            if step is not None and nll is not None:
                curves[name].append((int(step), nll))
    return curves


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
