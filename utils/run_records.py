"""What a run's JSON files say: typed records of args.json and metrics.json, and their comparison.

Readers take every version that was ever written, and refuse a newer one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from utils.errors import UsageError, quoted
from utils.records import Count, Name, Nonnegative, Record, RecordType, as_record, read_json

ARGS_FILE, METRICS_FILE, HISTORY_FILE, LOG_FILE = (
    *("args.json", "metrics.json", "history.jsonl", "log.txt"),
)
FORMAT_VERSION = 1  # of a run's JSON files; those without the key are older, and read as 1
DIVIDED_ANEW = ("bbc_headlines", "bbc_bodies")  # data sets that --bbc-split is about
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


def file_name(name: str) -> str:
    """A path below the run's folder, none of whose parts is hidden."""
    for part in name.split("/"):
        if not part or part.startswith(".") or "\0" in part or "\\" in part:
            raise ValueError("it must be a file's name in the run's folder")
    return name


FileName = Annotated[Name, AfterValidator(file_name)]
FlagValue = Annotated[Any, AfterValidator(_flag_value)]
Flags = Annotated[dict[Name, FlagValue], Field(max_length=10_000)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1.001)]  # a float32's rounding may pass 1


class RunRecord(Record):
    """args.json: what a run was told, and what made it.

    Attributes:
        args: every flag with the value that the run uses; a file made for --config may lack it.
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

    @model_validator(mode="after")
    def _knows_its_division(self) -> RunRecord:
        """A run on the embedded corpus that is older than --bbc-split has read the first one."""
        reads = {str(self.args.get(key)).lower() for key in ("dataset", "ood_ori_dataset")}
        if reads & set(DIVIDED_ANEW) and self.args.get("data_dir") is None:
            self.args.setdefault("bbc_split", 1)
        return self

    @property
    def repeated(self) -> dict[str, Any]:
        """The flags that `--config` passes again: those that were given, or else all.

        The division of the embedded corpus is always among them: its default has changed.
        """
        if "given" not in self.model_fields_set:
            return self.args
        return {key: self.args[key] for key in ("bbc_split",) if key in self.args} | self.given


class Scaled(Record):
    """What the temperature that was fitted on held-out rows makes of a data set's metrics."""

    temperature: FiniteFloat
    acc: Share | None = None
    ece: Share | None = None
    nll: FiniteFloat | None = None
    brier: Annotated[FiniteFloat, Field(ge=0, le=2.001)] | None = None


class Block(Record):
    """A data set's metrics. Those that an overridden `evaluate` does not know are None.

    Attributes:
        unlabelled: whether its rows belong to none of the classes; then there are no metrics.
        n_draws: the most draws that a row has.
        mean_draws: the mean over the rows; None where all have `n_draws`.
    """

    acc: Share | None = None
    ece: Share | None = None
    nll: FiniteFloat | None = None
    brier: Annotated[FiniteFloat, Field(ge=0, le=2.001)] | None = None
    unlabelled: bool = False
    split: Name = "?"
    num_bins: Count | None = None
    seconds: Nonnegative | None = None
    n_examples: Count | None = None
    n_draws: Count | None = None
    mean_draws: Nonnegative | None = None
    temperature_scaled: Scaled | None = None

    @model_validator(mode="after")
    def _has_metrics_where_it_has_labels(self) -> Block:
        for key in ("acc", "ece", "nll", "brier"):
            if (getattr(self, key) is None) != self.unlabelled:
                told = "there are no labels for it" if self.unlabelled else "it is missing"
                raise ValueError(f"'{key}': {told}")
        return self


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
    files: Annotated[list[FileName], Field(max_length=100_000)] | None = None


def read_run_record(path: Path, what: str, record: type[RecordType] = RunRecord) -> RecordType:
    """A run's args.json, whatever version wrote it.

    Args:
        path: of the file.
        what: on whose behalf it is read, for the message: a flag.
        record: its type, where a file of that form says more.
    Raises:
        UsageError: there is none, it is damaged, or a newer version wrote it.
    """
    return _read_versioned(path, record, what, "Restore the file, or make the run again.")


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


# --- whether it is the same run -------------------------------------------------------------------

# Flags that do not change what a run computes, and those that say how it is called or kept.
FREE_FLAGS = {
    *("resume", "overwrite", "config", "tracker", "nowand", "save_per_steps", "device"),
    *("wandb_entity", "wandb_project", "wandb_name", "output_dir", "log_path", "checkpoint_name"),
    *("eval_batch_size", "gradient_checkpointing", "prefix_cache"),  # of a full memory
    *("adapter_dataset", "adapter_hold_out"),  # follow from --load-lora-path
}


def stored_flags(args) -> dict[str, Any]:
    """All flags as args.json has them: JSON's types, anything else as text."""
    return {key: _as_stored(value) for key, value in args.as_dict().items()}


def _as_stored(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_stored(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def differences(args, stored: RunRecord) -> list[str]:
    """What the flags say otherwise than a stored run's, one phrase for each.

    Flags that were passed, here or there, explain the others; so only those are named, if any.
    --checkpoint counts only where it was passed now: it does not change what is computed, and older
    versions did not save the adapter unless told to.
    """
    free = FREE_FLAGS | (
        set() if not args.resume and "checkpoint" in args.given else {"checkpoint"}
    )
    said, followed = [], []
    for key, value in stored_flags(args).items():
        flag = f"--{key.replace('_', '-')}"
        if key in free:
            continue
        if key not in stored.args:
            if key in args.given:
                said.append(f"{flag} is {quoted(value)}, the stored run is of a version without it")
        elif json.dumps(value) != json.dumps(stored.args[key]):
            phrase = f"{flag} is {quoted(value)}, the stored run has {quoted(stored.args[key])}"
            if key in args.given or key in stored.given:
                said.append(phrase)
            else:
                followed.append(f"{phrase} (not passed: its default has changed; pass it)")
    return said or followed
