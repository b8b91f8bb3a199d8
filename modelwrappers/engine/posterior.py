"""Between a wrapper and its folder or hub repository: what is written, and what is believed.

An adapter's folder has PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, and
`bayes_config.json`, the posterior's record: method, base model, answers, what predicts. All of them
may have been downloaded. They are read as data here and nowhere else: typed, bounded, and without
anything in them that could import, execute or point to a file of their choice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from pydantic import ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from modelwrappers.engine.adapter_config import read_adapter_config
from modelwrappers.engine.calibration import (
    CALIBRATION_FILE,
    CalibrationFacts,
    take_calibration,
    write_calibration,
)
from modelwrappers.engine.model_card import model_card
from utils.adapter_base import CONFIG_FILE, RECORD_FILE
from utils.errors import UsageError, quoted
from utils.files import disk_errors, remove_folder, write_atomically, write_json, write_tensors
from utils.hub import go_offline_if_unreachable
from utils.logging import logger
from utils.records import (
    Count,
    Name,
    Record,
    SolvedExamples,
    as_record,
    read_json,
    read_tensors,
)
from utils.registry import users_code
from utils.table_task import TableTask

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase

ADAPTER_FILE = "adapter_model.safetensors"
TENSORS_FILE = "posterior.safetensors"  # of `posterior_tensors`, where a method names no other
# of every adapter's folder
FILES = (ADAPTER_FILE, CONFIG_FILE, RECORD_FILE, TENSORS_FILE, CALIBRATION_FILE)
FORMAT_VERSION = 1  # of bayes_config.json; keys may be added without another number

# What the posterior was trained on; a posterior is one over the adapter of exactly that model.
BASE_MODEL_FLAGS = ("model", "model_type", "load_model_path", "quantization", "dtype")
# When a row had draws enough in the run's evaluation.
SETTLING_FLAGS = ("draws_adaptive", "draws_tolerance", "draws_error_rate")
# How the run's evaluation drew, so that the posterior's predictions are those that were measured.
EVALUATION_FLAGS = (
    "seed_sampling",
    "eval_batch_size",
    "bayes_inference_notsample",
    *SETTLING_FLAGS,
)
# How a row of the posterior's task becomes tokens.
ROW_FLAGS = (
    "max_seq_len",
    "choice_format",
    "boolq_tokens",
    "append_eos",
    "use_slow_tokenizer",
    "num_shots",
)


# --- bayes_config.json ----------------------------------------------------------------------------


class Scores(Record):
    """A data set's block of metrics, as far as an adapter carries it along."""

    acc: FiniteFloat
    ece: FiniteFloat
    nll: FiniteFloat
    brier: FiniteFloat
    split: Name = "?"
    n_examples: Count | None = None
    n_draws: Count | None = None


class Rows(Record):
    """How a row of the posterior's task becomes tokens (flags of the same names)."""

    max_seq_len: Annotated[int, Field(ge=1, le=10_000_000)] = 300
    choice_format: Literal["letter_first", "text_first"] = "letter_first"
    boolq_tokens: Literal["matched", "swapped"] = "matched"
    append_eos: bool = False
    use_slow_tokenizer: bool = False
    num_shots: Annotated[int, Field(ge=0, le=100)] = 0


class Evaluation(Record):
    """How the run's evaluation drew (flags of the same names).

    Draws that are fresh depend on the seed and on which rows are one batch; with both, predictions
    of the same rows are those of the run.
    """

    seed_sampling: Annotated[int, Field(ge=0, lt=2**63)] = 1
    eval_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    bayes_inference_notsample: bool = False
    draws_adaptive: bool = False
    draws_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    draws_error_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.01


class Prompt(Record):
    """What a row looks like to the model: the task's example, as text and as tokens.

    Attributes:
        tokenizer: the hub id, folder or alias that it was loaded from.
        text: the prompt of a causal LM, `shots` included, or the one or two sentences of a
            classifier. Empty, as `input_ids` are, where the task has no example that fits, but
            shots.
        input_ids: its tokens.
        shots: the text in front of each row's prompt (--num-shots). It holds training rows.
    """

    tokenizer: Name
    text: list[str]
    input_ids: list[Count]
    shots: SolvedExamples = ""


class PosteriorRecord(Record):
    """bayes_config.json: what makes an adapter a posterior, and what it takes to predict with it.

    Attributes:
        modelwrapper: the method's name, or FILE.py:CLASS (which is never run on a file's word).
        model, model_type, load_model_path, quantization, dtype: the base model, as in the flags.
        dataset, dataset_type: what it was trained on.
        choices: the C answers, in label order; None if the run did not know them.
        target_ids: the C answer tokens of a causal LM.
        pad_token_id: what fills short rows.
        rows: how a row becomes tokens.
        prompt: the tokenizer, and an example of a row in text and tokens.
        task: what the rows of a user's own table ask; None for every other data set.
        n_draws: N of the final evaluation.
        evaluation: how it drew; None in records of before that was kept.
        temperature: what held-out rows have the logits divided by, if one was fitted.
        tuned: whether a temperature or a prior was chosen by held-out rows.
        held_out_seen: whether this run, or one that its adapter comes from, was evaluated on its
            held-out rows (--testing-set train_val): the adapter may have been chosen by them.
        calibration: of the rows in `CALIBRATION_FILE` beside the record; None: there is none.
        metrics: data set -> what the run measured.
        flags: the method's own flags that it needs again, each under its flag's rules.
        tensors: what `WrapperBase.posterior_tensors` gave, by name; they lie beside the adapter.

    Further keys are the method's own description (`method`), which the method checks
    (`WrapperBase.Description`).
    """

    model_config = ConfigDict(extra="allow")

    format_version: Literal[1]
    modelwrapper: Name
    model: Name
    model_type: Literal["causallm", "seqcls"]
    load_model_path: Name | None = None
    quantization: Literal["none", "8bit", "4bit"] = "none"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dataset: Name
    dataset_type: Name
    choices: Annotated[list[Name], Field(min_length=2, max_length=100_000)] | None
    target_ids: Annotated[list[Count], Field(min_length=2, max_length=100_000)] | None
    pad_token_id: Count | None
    rows: Rows = Rows()
    prompt: Prompt | None = None
    task: TableTask | None = None
    n_draws: Annotated[int, Field(ge=1, le=100_000)]
    evaluation: Evaluation | None = None
    temperature: Annotated[float, Field(gt=1e-3, lt=1e3)] | None = None
    tuned: bool = False
    held_out_seen: bool = False
    calibration: CalibrationFacts | None = None
    metrics: dict[Name, Scores] = Field(default_factory=dict)
    flags: dict[Name, Any] = Field(default_factory=dict)
    tensors: list[Name] = Field(default_factory=list)

    @property
    def method(self) -> dict[str, Any]:
        """The method's own description."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _answers_and_tokens_agree(self) -> PosteriorRecord:
        for name in ("choices", "target_ids"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"'{name}' has the same entry twice")
        if self.choices and self.target_ids and len(self.choices) != len(self.target_ids):
            raise ValueError(
                f"there are {len(self.choices)} choices, but {len(self.target_ids)} target_ids"
            )
        if self.task is not None and self.choices != list(self.task.answers):
            raise ValueError("'choices' are others than the answers of 'task'")
        if self.target_ids is not None and self.model_type != "causallm":
            raise ValueError("'target_ids' are tokens of a causal LM; a classifier has none")
        return self


def read_posterior_record(folder: Path, what: str) -> PosteriorRecord:
    """The record of the posterior in `folder`, whatever version wrote it.

    Raises:
        UsageError: there is none, it is damaged, or a newer version wrote it.
    """
    file = folder / RECORD_FILE
    content = read_json(file, what)
    where = f"{what}: {file}"
    remedy = "Fit or download the posterior again; without this file the adapter loads as its mean."
    if not isinstance(content, dict):
        raise UsageError(f"{where}: it must hold a JSON object. {remedy}")
    version = content.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise UsageError(f"{where}: key 'format_version' is {quoted(version)}, no number. {remedy}")
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{where}: it has format_version {quoted(version)}, which a newer version of this "
            f"project wrote; this one reads up to {FORMAT_VERSION}: update it."
        )
    return as_record(content, PosteriorRecord, where, remedy)


# --- the folder of an adapter ---------------------------------------------------------------------


class Saved(NamedTuple):
    """A folder with an adapter, as far as its JSON files tell; each was read once.

    Attributes:
        folder: where its files lie.
        config: PEFT's configuration of the adapter.
        record: the posterior's; None for an adapter that another project made.
    """

    folder: Path
    config: LoraConfig
    record: PosteriorRecord | None


def read_saved(folder: Path, what: str, record: PosteriorRecord | None = None) -> Saved:
    """What the JSON files of an adapter's folder say.

    Args:
        folder: of the adapter.
        what: on whose behalf it is read.
        record: of the posterior, where it was read already.
    Raises:
        UsageError: there is no adapter, or a file breaks a rule.
    """
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            if (pickled := folder / "adapter_model.bin").is_file():
                raise UsageError(
                    f"{what}: the weights in {folder} are pickled ({pickled.name}), and nothing is "
                    "unpickled here. If you trust them, load them with PEFT and save them again: "
                    "`save_pretrained` writes safetensors."
                )
            raise UsageError(
                f"{what}: there is no {name} in {folder}; it takes a folder that --checkpoint or "
                "PEFT's save_pretrained wrote."
            )
    config = read_adapter_config(folder, what)
    if record is None and (folder / RECORD_FILE).exists():
        record = read_posterior_record(folder, what)
    return Saved(folder, config, record)


def snapshot(repo: str) -> Path:
    """The local copy of a hub repo.

    Raises:
        UsageError: it cannot be read.
    """
    from huggingface_hub import snapshot_download

    go_offline_if_unreachable()
    try:
        return Path(snapshot_download(repo))
    except Exception as error:
        raise UsageError(
            f"load_posterior: {quoted(repo)} is neither a folder nor a hub repo that can be "
            f"read ({type(error).__name__})."
        ) from None


# --- to a folder and back -------------------------------------------------------------------------


def describe(wrapper: WrapperBase, tensors: Mapping[str, Tensor]) -> PosteriorRecord:
    """What makes the adapter Bayesian, and what it takes to predict with it.

    Args:
        tensors: of `posterior_tensors`, which lie beside the record.
    """
    args, task = wrapper.args, wrapper.table_task
    return PosteriorRecord(
        format_version=FORMAT_VERSION,
        modelwrapper=args.modelwrapper,
        **{name: getattr(args, name) for name in BASE_MODEL_FLAGS},
        dataset=task.name if task is not None else args.dataset,  # no path of this machine's
        dataset_type=args.dataset_type,
        choices=wrapper.answers,
        target_ids=wrapper.target_ids.tolist() if wrapper.target_ids is not None else None,
        pad_token_id=wrapper.base_model.config.pad_token_id,
        rows=Rows(**{name: getattr(args, name) for name in ROW_FLAGS}),
        prompt=wrapper.prompt,
        task=task,
        n_draws=max(1, wrapper.final_draws()),
        evaluation=Evaluation(**{name: getattr(args, name) for name in EVALUATION_FLAGS}),
        temperature=wrapper.fitted_temperature,
        tuned=wrapper.is_tuned,
        held_out_seen=wrapper.held_out_seen,
        calibration=wrapper.calibration_facts if wrapper.calibration is not None else None,
        metrics={
            name: Scores.model_validate(block)
            for name, block in wrapper.results.items()
            if not block.get("unlabelled")
        },
        flags={name: getattr(args, name) for name in wrapper.posterior_flags},
        tensors=sorted(tensors),
        **wrapper.method_config(),
    )


def write_posterior(wrapper: WrapperBase, folder: Path) -> None:
    """What PEFT does not know of: record, model card, the method's tensors, a trained head.

    Args:
        folder: has the adapter's files of PEFT.
    """
    tensors = wrapper.posterior_tensors()
    record = describe(wrapper, tensors).model_dump()
    write_json(folder / RECORD_FILE, record)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    if tensors:
        write_tensors(folder / wrapper.posterior_file, tensors, {})
    if wrapper.calibration is not None:
        write_calibration(wrapper.calibration, folder)
    if extra := wrapper.trained_base_tensors():
        file = folder / ADAPTER_FILE
        write_tensors(file, read_tensors(file, "adapter") | extra, {"format": "pt"})


def replace_files(wrapper: WrapperBase, folder: Path) -> list[str]:
    """Save into `folder`, each file replaced in one step; on the main process only.

    Returns:
        the names of the files, relative to `folder`.
    Raises:
        RunError: the disk is full or cannot be written.
    """
    temporary = folder / ".adapter"
    try:
        with disk_errors(folder / ADAPTER_FILE):
            wrapper.save_pretrained(str(temporary))
        # An ensemble's members are subfolders. What describes the files comes after them.
        files = sorted(temporary.rglob("*"), key=lambda file: (file.suffix == ".json", file))
        files = [file for file in files if file.is_file() and file.name != "README.md"]
        for file in files:
            write_atomically(folder / file.relative_to(temporary), file.replace)
    finally:
        remove_folder(temporary)
    logger.info("Adapter saved to %s", folder)
    return [str(file.relative_to(temporary)) for file in files]


def push(wrapper: WrapperBase, repo_id: str, private: bool | None, token, **kwargs) -> str:
    """Send what `save_pretrained` writes to a hub repo, made if it does not exist."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wrapper.save_pretrained(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


def load_posterior_of(wrapper: WrapperBase, saved: Saved, is_own: bool) -> None:
    """Weights, then whatever makes them the method's posterior.

    Args:
        saved: the folder's content.
        is_own: whether this method made it and nothing is trained on top; else the adapter counts.
    Raises:
        UsageError: the record or a file of the posterior is damaged.
    """
    wrapper.load_adapter_weights(saved.folder)
    record = saved.record if is_own else None
    wrapper.fitted_temperature = record.temperature if record is not None else None
    if record is not None:
        wrapper.is_tuned = wrapper.is_tuned or is_tuned(record)
        take_calibration(wrapper, saved)
    wrapper.take_posterior(saved.folder, record)
    if saved.record is not None:
        wrapper.held_out_seen = wrapper.held_out_seen or has_seen_held_out(saved.record)
    wrapper.recorded_answers = saved.record.choices if saved.record is not None else None


def check_classes(wrapper: WrapperBase, task) -> None:
    """A classifier that is not trained any more answers with the classes that it has.

    Raises:
        UsageError: the data set's classes are others than those of the loaded posterior.
    """
    own, theirs = wrapper.recorded_answers, list(task.choices)
    trains = wrapper.args.max_train_steps or wrapper.args.n_epochs
    if wrapper.is_causal or trains or own is None or theirs == own:
        return
    raise UsageError(
        f"--dataset {quoted(task.name)} has the classes {quoted(', '.join(theirs))}, but the "
        f"classifier in {wrapper.args.load_lora_path} was trained for {quoted(', '.join(own))}: "
        "take rows of those classes, or name its data set by --ood-ori-dataset."
    )


def is_tuned(record: PosteriorRecord) -> bool:
    """Whether held-out rows have had a say in the posterior already."""
    return record.tuned or record.temperature is not None


def has_seen_held_out(record: PosteriorRecord) -> bool:
    """Whether the adapter may have been chosen by its held-out rows, whoever loads it."""
    # records from before this was kept say what was evaluated last
    evaluated = {scores.split for scores in record.metrics.values()}
    return record.held_out_seen or "train_val" in evaluated


def give_back(wrapper: WrapperBase, record: PosteriorRecord, file: Path) -> None:
    """`load_posterior_tensors` of a method, with what a file holds.

    Raises:
        UsageError: the file has not the tensors that the record names, a value is not finite, or
            the method cannot take them.
    """
    tensors = read_tensors(file, "--load-lora-path") if file.is_file() else {}
    if odd := sorted(set(record.tensors) ^ set(tensors)):
        raise UsageError(
            f"--load-lora-path: {file} and {RECORD_FILE} do not fit each other: {quoted(odd[0])} "
            "is in one of them only. Fit or download the posterior again."
        )
    if not tensors:
        return
    for key in tensors:
        if tensors[key].is_floating_point() and not tensors[key].isfinite().all():
            raise UsageError(f"{file}: {quoted(key)} has values that are not finite.")
    with users_code(f"{file}: {type(wrapper).__name__}.load_posterior_tensors"), torch.no_grad():
        wrapper.load_posterior_tensors(dict(tensors))
