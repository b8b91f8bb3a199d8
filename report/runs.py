"""Finished runs below some folders; unusable ones with the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, ValidationError

from report.escape import LONGEST_TEXT, shorten
from utils.args import NOT_REPEATED, WITHOUT_EFFECT
from utils.data_set_names import data_set_name
from utils.errors import UsageError, quoted
from utils.records import Count, Record, read_bytes
from utils.run_paths import CALIBRATION, NOT_RUNS, predictions_file
from utils.run_records import (
    ARGS_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    Block,
    RunRecord,
    read_metrics_record,
    read_run_record,
)
from utils.temperature import HIGHEST, LOWEST

# Flags that say where and how a run was kept, watched or repeated, not what it computed. Two runs
# that differ in nothing else belong to one row of the tables.
NOT_SETTINGS = frozenset(
    {
        # of the table itself
        *("modelwrapper", "model", "dataset", "testing_set", "limit_eval", "limit_ood"),
        *("seed", "seed_data", "seed_sampling"),
        *("log_path", "checkpoint_name", "output_dir", "checkpoint", "save_per_steps", "device"),
        *("tracker", "nowand", "wandb_entity", "wandb_project", "wandb_name"),
        *("eval_per_steps", "eval_steps", "eval_batch_size", "bayes_eval_n_samples", "num_bins"),
        *("ood_datasets", "ood_ori_dataset", "adapter_dataset"),
        "prefix_cache",  # the same numbers, sooner
        "temperature_scaling",  # what it changes beside a row of its own is --hold-out
        *NOT_REPEATED,
        *WITHOUT_EFFECT,
    }
)
# Settings of a prediction, not of the posterior: those of the run that evaluates it.
OF_EVALUATION = (
    *("bayes_eval_n_samples_final", "flipout_eval", "draws"),
    *("draws_adaptive", "draws_tolerance", "draws_error_rate"),
)
CALIBRATING = ("auto", "all", "half")  # values of --calibrate
MOST_HISTORY = 2**28  # bytes of history.jsonl
MOST_NLL = 1e9  # in a plot
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
        stored: what metrics.json says.
        provenance: command, commit, host, started of the run that evaluated; "" where unknown.
    """

    dataset: str
    file: Path
    provenance: dict[str, str]
    shifted: bool
    temperature: float | None
    omitted: str
    stored: Block


Seeds = tuple[int | None, ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    A run that only evaluates what an earlier one of the same method has trained says so of that
    posterior: `dataset`, `seeds` and `posterior` are the earlier run's, and so are the settings,
    apart from the flags that were given and those of `OF_EVALUATION`.

    Attributes:
        method, model: in full, as in the command.
        dataset: what the posterior was trained on.
        seeds: (--seed, --seed-data, --seed-sampling).
        adapter_seeds: those of the run that trained the loaded adapter, if there is one.
        settings: flags that say what was computed, without those of `NOT_SETTINGS`.
        posterior: tells posteriors apart.
        calibration: predictions of rows that were neither trained nor tuned on, if the run has kept
            them or says that it did; what else it says is that of the run's own data set.
        training_seconds: of this run; of a method on a trained adapter, without training that.
        peak_memory: bytes, of the run's process or GPU. Both are None in files that do not say it.
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
    calibration: Evaluation | None = None
    training_seconds: float | None = None
    peak_memory: int | None = None

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
    except UsageError as error:
        raise Unusable(str(error)) from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, OSError) as error:
        # Whatever else a file may hold: one run must not cost the report of all others.
        raise Unusable(f"cannot be understood ({type(error).__name__}: {error})") from None


def _read_run(folder: Path) -> Run:
    if not os.path.lexists(folder / METRICS_FILE):
        steps = [re.fullmatch(r"step-(\d+)", s.name) for s in (folder / "state").glob("step-*")]
        last = max((int(step[1]) for step in steps if step), default=None)
        at = "" if last is None else f" (interrupted after update {last})"
        raise Unusable(f"not finished: there is no metrics.json{at}")
    metrics = read_metrics_record(folder / METRICS_FILE, METRICS_FILE)
    has_args = os.path.lexists(folder / ARGS_FILE)
    stored = read_run_record(folder / ARGS_FILE, ARGS_FILE) if has_args else RunRecord(args={})
    args = {"seed": metrics.seed, **stored.args}
    method = metrics.modelwrapper or _text(args, "modelwrapper")
    model = metrics.model or _text(args, "model")
    if not method or not model:
        raise Unusable("metrics.json names no modelwrapper or no model")
    dataset = _data_set(args) or next(iter(metrics.datasets))
    if dataset not in metrics.datasets:
        raise Unusable(f"metrics.json has no block for the run's data set {quoted(dataset)}")
    posterior = _posterior_of(args, folder)
    settings = posterior.settings
    if not has_args:  # nothing but its name tells it from other runs
        settings = {"folder": SEED_IN_NAME.sub("", folder.name)}
    own = _settings(args)
    # what an evaluation of an earlier run's posterior has set otherwise
    changed = {*stored.given, *OF_EVALUATION} & own.keys() - {"load_lora_path", "calibrate"}
    command = stored.run.get("command")
    command = " ".join(map(str, command)) if isinstance(command, list) else ""
    provenance = {
        "command": shorten(command, LONGEST_TEXT),
        **{key: shorten(str(stored.run.get(key) or "")) for key in ("commit", "host", "started")},
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
        updates=metrics.updates,
        training_seconds=metrics.training_seconds,
        peak_memory=metrics.peak_memory_bytes,
    )
    for name, block in metrics.datasets.items():
        temperature = block.temperature_scaled and block.temperature_scaled.temperature
        omitted = ""
        if temperature is not None and run.dataset != dataset:
            omitted = f"was fitted on {shorten(dataset)}, not on {shorten(run.dataset)}"
        elif temperature is not None and not LOWEST / 2 <= temperature <= 2 * HIGHEST:
            omitted = f"is {temperature}; those that a run fits lie between {LOWEST} and {HIGHEST}"
        stem = "predictions" if name == dataset else f"predictions-{name.replace('/', '-')}"
        run.evaluations.append(
            Evaluation(
                dataset=name,
                file=folder / f"{stem}.safetensors",
                provenance=provenance,
                shifted=name != run.dataset,
                temperature=None if omitted else temperature,
                omitted=omitted and f"the temperature of {shorten(name)} {omitted}",
                stored=block,
            )
        )
    file = folder / predictions_file(CALIBRATION)
    # an older run may have been evaluated on a data set of that name
    if CALIBRATION not in metrics.datasets and (
        os.path.lexists(file) or args.get("calibrate") in CALIBRATING
    ):
        own = next(e for e in run.evaluations if e.dataset == dataset)
        run = replace(run, calibration=replace(own, file=file))
    return run


def _text(args: dict[str, Any], flag: str) -> str:
    """A flag's text; "" where it has none.

    Raises:
        Unusable: it is something else.
    """
    value = args.get(flag)
    if value is not None and not isinstance(value, str):
        raise Unusable(f"args.json: the flag '{flag}' is {quoted(value)}; a text is needed")
    return value or ""


def _seed(args: dict[str, Any], flag: str) -> int | None:
    """A flag's seed; --seed where it has none.

    Raises:
        Unusable: it is something else.
    """
    value = args.get(flag, args.get("seed"))
    is_seed = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if value is not None and not is_seed:
        name = flag.replace("_", "-")
        raise Unusable(f"{name} is {quoted(value)}, not a number from 0 to 2^63 - 1")
    return value


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
    seeds = tuple(_seed(args, flag) for flag in ("seed", "seed_data", "seed_sampling"))
    own = _Posterior(_data_set(args), seeds, None, _settings(args))
    path = _text(args, "load_lora_path")
    if not path:
        return own
    adapter, adapter_args = _adapter(path, folder)
    if adapter_args and depth < 9:  # a run cannot be its own adapter, but a file can say so
        loaded = _posterior_of(adapter_args, adapter, depth + 1)
    else:
        named = [int(digits) for digits in SEED_IN_NAME.findall(path) if len(digits) < 19]
        loaded = _Posterior("", (named[-1],) * 3 if named else (), None, {})
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
    above = () if os.path.isabs(path) else folder.absolute().parents
    for base in (*above, Path()):
        try:
            return base / path, read_run_record(base / path / ARGS_FILE, ARGS_FILE).args
        except UsageError:
            continue
    return Path(path), {}


def _data_set(args: dict[str, Any], flag: str = "dataset") -> str:
    return data_set_name(_text(args, flag))


def _settings(args: dict[str, Any]) -> dict[str, Any]:
    settings = {
        key: SEED_IN_NAME.sub("", value) if isinstance(value, str) else value
        for key, value in args.items()
        if key not in NOT_SETTINGS
    }
    if "calibrate" in settings:
        # With half of the held-out rows others are left to tune on; else it changes nothing.
        settings["calibrate"] = "half" if settings["calibrate"] == "half" else "no"
    return settings


History = dict[str, list[tuple[int, float]]]


def read_history(run: Run) -> History:
    """(update, NLL) of training and of evaluations while training, without broken lines.

    Raises:
        Unusable: there is a history, but it cannot be read.
    """
    curves: History = {"train": [], "eval": []}
    file = run.folder / HISTORY_FILE
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
