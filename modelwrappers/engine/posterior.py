"""Between a wrapper and its folder or hub repository: what is written, and what is believed.

An adapter's folder has PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, and
`bayes_config.json`, the posterior's record: method, base model, answers, what predicts. All of them
may have been downloaded. They are read as data here and nowhere else: typed, bounded, and without
anything in them that could import, execute or point to a file of their choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from utils.errors import UsageError, quoted
from utils.hub import go_offline_if_unreachable
from utils.logging import logger
from utils.records import (
    Count,
    Name,
    Positive,
    Record,
    as_record,
    check_tensor,
    read_json,
    read_tensors,
)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "bayes_config.json"
FORMAT_VERSION = 1  # of bayes_config.json; keys may be added without another number

# What the posterior was trained on; a posterior is one over the adapter of exactly that model.
BASE_MODEL_FLAGS = ("model", "model_type", "load_model_path", "quantization", "dtype")
# How a row of the posterior's task becomes tokens.
ROW_FLAGS = ("max_seq_len", "choice_format", "boolq_tokens", "append_eos", "use_slow_tokenizer")


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
        n_draws: N of the final evaluation.
        temperature: what held-out rows have the logits divided by, if one was fitted.
        metrics: data set -> what the run measured.
        flags: the method's own flags that it needs again, each under its flag's rules.

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
    n_draws: Annotated[int, Field(ge=1, le=100_000)]
    temperature: Annotated[float, Field(gt=1e-3, lt=1e3)] | None = None
    metrics: dict[Name, Scores] = Field(default_factory=dict)
    flags: dict[Name, Any] = Field(default_factory=dict)

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


# --- adapter_config.json --------------------------------------------------------------------------

# The name of a module, as PEFT's lists have it: PEFT reads some of them as regular expressions.
ModuleName = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\w.\-]+$")]
Pattern = Annotated[str, Field(min_length=1, max_length=10_000)]

# Initialisations that leave the base model's weights alone; the others come with changed ones.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva")
# Keys that change nothing about a loaded adapter: notes, settings of the initialisation, and PEFT's
# names of classes and packages, which it would import.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


class AdapterConfig(Record):
    """adapter_config.json, as far as this project supports what it can say."""

    peft_type: Name
    task_type: Name | None = None
    r: Annotated[int, Field(ge=1, le=16_384)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=10_000)] | Pattern
    exclude_modules: list[ModuleName] | Pattern | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[ModuleName] | None = None
    layers_to_transform: list[Count] | Count | None = None
    layers_pattern: list[ModuleName] | ModuleName | None = None
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1, le=16_384)]] | None = None
    alpha_pattern: dict[Pattern, Positive] | None = None


def read_adapter_config(folder: Path, what: str) -> LoraConfig:
    """PEFT's configuration of the adapter in `folder`, from the keys of `AdapterConfig` only.

    Patterns are still in it: `backbone.settle_patterns` turns them into names of layers.

    Raises:
        UsageError: it is no LoRA adapter, it is damaged, or it needs something of PEFT that is not
            supported here.
    """
    file = folder / CONFIG_FILE
    content = read_json(file, what)
    where = f"{what}: {file}"
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind not in (None, "LORA"):
        kind = kind if isinstance(kind, str) and kind.isalnum() else quoted(kind)
        raise UsageError(f"{what}: {folder} holds a {kind} adapter, not LoRA.")
    if isinstance(content, dict):  # null and "" stand for what is not set
        needed = ("peft_type", "r", "lora_alpha", "target_modules")
        content = {k: v for k, v in content.items() if k in needed or v not in (None, "")}
    config = as_record(content, AdapterConfig, where)
    start = content.get("init_lora_weights")
    if not (start is None or isinstance(start, bool) or start in _PLAIN_INITS):
        raise UsageError(
            f"{where}: it was initialised with {quoted(start)}, which changes the base model's "
            "weights as well; convert it to plain LoRA with PEFT first."
        )
    for field in dataclasses.fields(LoraConfig):
        key = field.name
        is_known = key in AdapterConfig.model_fields or key in _WITHOUT_EFFECT
        if not is_known and content.get(key):
            raise UsageError(
                f"{where}: it uses PEFT's {key} ({quoted(content[key])}), which is not supported "
                "here; only plain LoRA, rsLoRA and DoRA are."
            )
    unknown = sorted(content.keys() - {field.name for field in dataclasses.fields(LoraConfig)})
    if unknown:
        logger.info("%s: unknown keys are ignored: %s.", file, quoted(", ".join(unknown)))
    values = {key: value for key, value in config.model_dump().items() if value is not None}
    alpha = values["lora_alpha"]
    values["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    try:
        return LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"})
    except (ValueError, TypeError) as error:  # PEFT's own rules on what goes together
        raise UsageError(f"{where}: {error}") from None


# --- where an adapter lies ------------------------------------------------------------------------


def adapter_folder(args) -> Path:
    """The local folder of --load-lora-path, downloaded first if it lies in a hub repo.

    Raises:
        UsageError: there is no adapter there.
    """
    path = args.load_lora_path
    if args.load_lora_huggingface_repo:
        path = _downloaded(args.load_lora_huggingface_repo, path.strip("/"))
    folder = Path(path)
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise UsageError(
                f"--load-lora-path {args.load_lora_path}: there is no {name} in {folder}; it takes "
                "a folder that --checkpoint or PEFT's save_pretrained wrote."
            )
    return folder


def _downloaded(repo: str, path: str) -> Path:
    """The folder `path` of a hub repo."""
    from huggingface_hub import snapshot_download

    if ".." in Path(path).parts or not path:
        raise UsageError(
            f"--load-lora-path {quoted(path)}: it must be a folder inside of the hub repo {repo}."
        )
    go_offline_if_unreachable()
    try:
        return Path(snapshot_download(repo, allow_patterns=[f"{path}/*"])) / path
    except Exception as error:
        raise UsageError(
            f"--load-lora-huggingface-repo {repo} cannot be read: "
            f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}\n"
            "Without network access pass a local folder as --load-lora-path alone."
        ) from None


# --- tensors --------------------------------------------------------------------------------------

_PREFIX = "base_model.model."


def read_adapter_tensors(folder: Path, what: str) -> dict[str, Tensor]:
    """The tensors of an adapter file; the original's keys, whose prefix stands twice, repaired."""
    tensors = read_tensors(folder / ADAPTER_FILE, what)
    return {
        _PREFIX + key[2 * len(_PREFIX) :] if key.startswith(2 * _PREFIX) else key: value
        for key, value in tensors.items()
    }


def check_adapter_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path, model: str
) -> None:
    """Hold an adapter's tensors against those of the model's LoRA layers.

    Args:
        tensors: of the file.
        expected: what the layers have.
        folder: where the file lies.
        model: the base model's name.
    Raises:
        UsageError: one is missing, has another shape, is of no floating type or not finite.
    """
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise UsageError(
            f"--load-lora-path: {folder} has no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: it was made for "
            f"another architecture than {model}, or saved without its trained head."
        )
    for key, value in expected.items():
        if tensors[key].shape != value.shape:
            raise UsageError(
                f"--load-lora-path: {key} in {folder} has shape {tuple(tensors[key].shape)}, "
                f"{model} needs {tuple(value.shape)}; the adapter was made for "
                "another architecture, rank or number of classes."
            )
        check_tensor(tensors, key, tuple(value.shape), f"--load-lora-path: {folder / ADAPTER_FILE}")
