"""adapter_config.json: PEFT's configuration of an adapter, from the keys supported here."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import Field

from utils.adapter_base import CONFIG_FILE, RECORD_FILE
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.records import Count, Name, Positive, Record, as_record, read_json

# The name of a module, as PEFT's lists have it: PEFT reads some of them as regular expressions.
ModuleName = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\w.\-]+$")]
Pattern = Annotated[str, Field(min_length=1, max_length=10_000)]

# Initialisations that leave the base model's weights alone; the others come with changed ones.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva")
# Keys that change nothing about a loaded adapter: notes, settings of the initialisation, and PEFT's
# names of classes and packages, which it would import. Tying counts where a base model ties what
# the adapter has: `ties_weights`.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Keys of PEFT's first versions that changed nothing about what an adapter computes.
_FORMER = {"merge_weights"}
_HEADS_OF_PEFT = ("classifier", "score")  # what PEFT trains whole in every SEQ_CLS adapter


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
    _check_unknown(content, where)
    values = {key: value for key, value in config.model_dump().items() if value is not None}
    alpha = values["lora_alpha"]
    values["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    # As PEFT does, whose older versions did not write it; what is saved here says it or means it.
    if values.get("task_type") == "SEQ_CLS" and not (folder / RECORD_FILE).is_file():
        values.setdefault("modules_to_save", list(_HEADS_OF_PEFT))
    try:
        return LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"})
    except (ValueError, TypeError) as error:  # PEFT's own rules on what goes together
        raise UsageError(f"{where}: {error}") from None


def ties_weights(folder: Path, what: str) -> bool:
    """Whether the adapter in `folder` shares its layers where the base model ties weights.

    Raises:
        UsageError: there is no adapter_config.json, or it does not hold JSON.
    """
    content = read_json(folder / CONFIG_FILE, what)
    return isinstance(content, dict) and bool(content.get("ensure_weight_tying"))


def _check_unknown(content: dict[str, Any], where: str) -> None:
    """Keys of another version of PEFT are ignored if they are off, or a number, which is said.

    Each key that has ever changed what a loaded adapter computes was a switch, a list, a mapping or
    a text; numbers were settings of such, or of the initialisation.

    Raises:
        UsageError: one of the others is set.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)} | _FORMER
    unknown = {key: content[key] for key in sorted(content.keys() - known) if content[key]}
    for key, value in unknown.items():
        if isinstance(value, bool | str | list | dict):
            version = content.get("peft_version")
            raise UsageError(
                f"{where}: it has {quoted(key)}: {quoted(value)}, which PEFT "
                f"{metadata.version('peft')} does not know{_saved_by(version)}. It may change what "
                "the adapter computes; convert it to plain LoRA with the PEFT that made it, or, if "
                "the key changes nothing about a trained adapter, remove it."
            )
    if unknown:
        logger.warning(
            "%s: keys that are not known are ignored: %s.", where, quoted(", ".join(unknown))
        )


def _saved_by(version: Any) -> str:
    return f" (the adapter is from {quoted(version)})" if isinstance(version, str) else ""
