"""The base model and its LoRA configuration, from flags.

Weights come from a hub id, a local folder or an embedded alias, plain or quantised; the LoRA
configuration from `--lora-*` and `--target-modules`, or from the adapter that is to be loaded
(`engine.adapter_config` reads it), held against the model here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modelwrappers.lora.blocks import chosen_blocks, find_blocks, shown_blocks
from modelwrappers.lora.exact_4bit import use_exact_4bit
from modelwrappers.lora.heads import head_modules, head_roots, is_linear, is_within
from utils.base_model import REMEDY, load_config, model_path, shown
from utils.errors import UsageError, described, quoted
from utils.logging import logger

MOST_PARAMETERS = 2**42  # of a base model; the largest that are published have a third of it

# model_type of a transformers config -> names of its query, key and value projections. A fused
# projection stands for all three.
ATTENTION_PROJECTIONS: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt"],
        ("q_proj", "k_proj", "v_proj"),
    ),
    **dict.fromkeys(
        ["phi", "smollm3", "olmo", "olmo2", "granite", "cohere", "stablelm"],
        ("q_proj", "k_proj", "v_proj"),
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("query", "key", "value")),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "deberta": ("in_proj", "in_proj", "in_proj"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "modernbert": ("Wqkv", "Wqkv", "Wqkv"),
    "gpt2": ("c_attn", "c_attn", "c_attn"),
    **dict.fromkeys(("phi3",), ("qkv_proj", "qkv_proj", "qkv_proj")),
    **dict.fromkeys(
        ("gpt_neox", "falcon", "bloom"), ("query_key_value", "query_key_value", "query_key_value")
    ),
}


class Base(NamedTuple):
    """A base model, and its layers that are new: its checkpoint has no weights (of that shape)."""

    model: PreTrainedModel
    new_layers: frozenset[str]


def load_model(args, num_labels: int, device: torch.device) -> PreTrainedModel:
    """The model of `load_base`."""
    return load_base(args, num_labels, device).model


def load_base(args, num_labels: int, device: torch.device, stay_on_cpu: bool = False) -> Base:
    """The frozen base model on `device`, in the class that --model-type asks for.

    Args:
        args: parsed flags.
        num_labels: C, for a classification head.
        device: where this process computes.
        stay_on_cpu: leave it there: the device has room for a part of it only.
    Raises:
        UsageError: the model cannot be found, has no weights, or cannot be quantised here.
    """
    name = args.load_model_path or args.model
    is_classifier = args.model_type == "seqcls"
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    head = {"num_labels": num_labels} if is_classifier else {}
    config = load_config(name, args.trust_remote_code, **head)
    kwargs: dict[str, Any] = {
        "config": config,  # the one that was looked at
        "dtype": _dtype(args, device),
        "trust_remote_code": args.trust_remote_code,
        "use_safetensors": True,  # nothing is unpickled
        "output_loading_info": True,
    }
    if is_classifier:  # a head for another number of classes is replaced by a new one
        kwargs["ignore_mismatched_sizes"] = True
    try:
        if type(config) not in auto._model_mapping and not args.trust_remote_code:
            kind = "classifier" if is_classifier else "causal LM"
            raise UsageError(
                f"--model {args.model}: there is no {kind} of the architecture "
                f"'{config.model_type}'; choose another --model or --dataset-type."
            )
        path = model_path(name)
        if type(config) in auto._model_mapping:
            _check_weights(auto, config, Path(path), name)
        if args.quantization != "none":
            kwargs["device_map"] = {"": device}
            kwargs["quantization_config"] = _quantization(args, auto, config, kwargs["dtype"])
        model, info = auto.from_pretrained(path, **kwargs)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # transformers and the hub raise a dozen classes here; to the user it is one thing.
        raise UsageError(
            f"--model {shown(name)} cannot be loaded: {described(error)}\n{REMEDY}"
        ) from None
    if args.quantization == "none" and not stay_on_cpu:
        model.to(device)
    if (model.config.pad_token_id or 0) < 0:  # early Llama conversions: none, written as -1
        model.config.pad_token_id = None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _first(model.config.eos_token_id) or 0
    model.config.use_cache = False
    absent = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    new = {key.rpartition(".")[0] for key in absent}
    roots = head_roots(model)
    lacking = sorted(name for name in new if not is_within(name, roots))
    if lacking:
        kind = "encoder" if is_classifier else "causal LM"
        raise UsageError(
            f"--model {shown(name)}: there are no weights for "
            f"{shown(', '.join(lacking))} (of that shape); it does not hold a complete {kind}."
        )
    if is_classifier and not roots:
        raise UsageError(
            f"--model {shown(name)}: a {type(model).__name__} does not say which part of it is the "
            "classification head, which has to be trained; choose another --model."
        )
    model.requires_grad_(False)
    use_exact_4bit(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Base(model, frozenset(new))


def _check_weights(auto, config: PreTrainedConfig, path: Path, name: str) -> None:
    """Hold the model that config.json describes against the weights, before it takes any memory.

    Raises:
        UsageError: there are none that can be read without unpickling, or config.json describes a
            model of many times their size.
    """
    with torch.device("meta"):
        described_size = sum(p.numel() for p in auto.from_config(config).parameters())
    most = MOST_PARAMETERS
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickled = next(path.glob("*.bin"), None)
            if pickled is None:
                raise UsageError(
                    f"--model {shown(name)} cannot be loaded: no *.safetensors is in it. {REMEDY}"
                )
            raise UsageError(
                f"--model {shown(name)} cannot be loaded: its weights are pickled "
                f"({pickled.name}), and nothing is unpickled here. If you trust them, load them "
                "with transformers and save them again: `save_pretrained` writes safetensors."
            )
        # four-bit weights are stored two to a byte; what a new head adds is small beside that
        most = min(most, 4 * sum(file.stat().st_size for file in files) + 2**24)
    if described_size > most:
        raise UsageError(
            f"--model {shown(name)}: config.json describes a model of {described_size} "
            f"parameters, but its weights are those of at most {most}; one of the two is damaged."
        )


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


def _dtype(args, device: torch.device) -> torch.dtype:
    """auto: bfloat16 for a causal LM on a GPU that has it, float32 elsewhere.

    Half precision crawls on CPUs, and a classification head is trained in its model's data type.
    """
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    is_causal = args.model_type == "causallm"
    if is_causal and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _quantization(args, auto, config, dtype: torch.dtype) -> BitsAndBytesConfig:
    """8 bit, or nf4 with double quantisation, the setting of QLoRA (arXiv 2305.14314).

    A classification head is trained, so it stays as it is; so does lm_head, as transformers has it.
    """
    keep = None
    if args.model_type == "seqcls":
        with torch.device("meta"):
            keep = head_roots(auto.from_config(config))
    if args.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=keep,
    )


# --- LoRA ---------------------------------------------------------------------------------------


def lora_config(args, model: PreTrainedModel, adapter: LoraConfig | None = None) -> LoraConfig:
    """What to adapt, and how: from the flags, or as the adapter of --load-lora-path has it.

    A classification head is never left random: without LoRA on it, it is trained whole and saved
    (`modules_to_save`); with --apply-classhead-lora it gets LoRA on top of trained base weights,
    which ride along in the adapter file (see `WrapperBase.save_pretrained`).

    Args:
        args: parsed flags.
        model: the base model.
        adapter: the configuration of --load-lora-path, where there is one.
    Raises:
        UsageError: an unknown architecture, target modules that are not there, or an adapter that
            does not fit the flags or the model.
    """
    if adapter is not None:
        return _adapter_lora_config(args, model, adapter)
    with_head = args.apply_classhead_lora or args.apply_qkv_head_lora
    if args.target_modules:
        targets = list(dict.fromkeys(args.target_modules))
        heads = [module for module in head_modules(model) if module.split(".")[-1] in targets]
    else:
        heads = head_modules(model) if with_head else []
        targets = _attention_targets(model, with_key=args.apply_qkv_head_lora) + heads
    _check_targets(model, targets, "--target-modules")
    is_classifier = args.model_type == "seqcls"
    whole = [name.removeprefix(f"{model.base_model_prefix}.") for name in head_roots(model)]
    return LoraConfig(
        # Stock PEFT turns the head of a SEQ_CLS adapter into a saved module: with LoRA on the head
        # the task type must stay open, or it would skip those layers when it loads the adapter.
        task_type=("SEQ_CLS" if not heads else None) if is_classifier else "CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=whole if is_classifier and not heads else None,
        **_chosen_layers(args, model, targets),
    )


def _chosen_layers(args, model: PreTrainedModel, targets: list[str]) -> dict[str, Any]:
    """--lora-layers as PEFT has it. A head is no block: PEFT takes it by its full name.

    Raises:
        UsageError: the model has no such blocks, or no target lies in them.
    """
    if args.lora_layers in (None, "all"):
        return {}
    blocks = find_blocks(model)
    if blocks is None:
        raise UsageError(
            f"--lora-layers {args.lora_layers}: this {model.config.model_type} model has no list "
            "of blocks; drop it."
        )
    numbers = chosen_blocks(args.lora_layers, len(blocks.modules))
    layers = {"layers_to_transform": numbers, "layers_pattern": [blocks.pattern]}
    adapted = adapted_blocks(model, LoraConfig(target_modules=targets, **layers))
    if empty := sorted(set(numbers) - adapted):
        raise UsageError(
            f"--lora-layers {args.lora_layers}: no layer to adapt ({', '.join(targets)}) lies in "
            f"block {empty[0]}; name layers of the blocks with --target-modules, or drop it."
        )
    return layers


def adapted_blocks(model: PreTrainedModel, config: LoraConfig) -> set[int]:
    """The blocks of a base model in which a LoRA configuration finds layers.

    Args:
        model: without PEFT's layers.
        config: without patterns (`settle_patterns`).
    """
    blocks = find_blocks(model)
    if blocks is None:
        return set()
    everything = config.target_modules == "all-linear"
    return {
        number
        for name, module in model.named_modules()
        if (number := blocks.number_of(name)) is not None
        and (is_linear(module) if everything else check_target_module_exists(config, name) is True)
    }


def _attention_targets(model: PreTrainedModel, with_key: bool) -> list[str]:
    model_type = model.config.model_type
    if model_type not in ATTENTION_PROJECTIONS:
        names = sorted({n.split(".")[-1] for n, m in model.named_modules() if is_linear(m)})
        raise UsageError(
            f"there is no default for the architecture '{model_type}'; name the layers to adapt "
            f"with --target-modules. Its linear layers are: {', '.join(names)}."
        )
    query, key, value = ATTENTION_PROJECTIONS[model_type]
    return list(dict.fromkeys([query, key, value] if with_key else [query, value]))


def _check_targets(model: PreTrainedModel, targets, origin: str) -> None:
    if isinstance(targets, str):  # a regular expression or "all-linear": PEFT checks those itself
        return
    modules = dict(model.named_modules())
    linear = sorted({name.split(".")[-1] for name, m in modules.items() if is_linear(m)})
    for target in targets:
        matched = [
            name for name in modules if name and (name == target or name.endswith(f".{target}"))
        ]
        others = [name for name in matched if not _takes_lora(modules[name])]
        if others or not matched:
            if others:
                problem = f"{quoted(target)} names '{others[0]}', on which LoRA cannot go"
            else:
                problem = f"this {model.config.model_type} model has no layer {quoted(target)}"
            raise UsageError(f"{origin}: {problem}; its linear layers are: {', '.join(linear)}.")


def _takes_lora(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for it: linear of any quantisation, embedding, convolution."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    name = type(module).__name__
    return isinstance(module, kinds) or name == "Conv1D" or name.endswith("Linear")


def _check_target_flags(args, model: PreTrainedModel, config: LoraConfig) -> None:
    """An adapter has the layers it has; flags that ask for others contradict it."""
    adapted = config.target_modules
    if isinstance(adapted, str):
        return
    covered = {*adapted, *(config.modules_to_save or ())}
    wanted = set(args.target_modules or ())
    for flag in ("apply_classhead_lora", "apply_qkv_head_lora"):
        if getattr(args, flag):
            wanted |= {*_attention_targets(model, with_key=flag == "apply_qkv_head_lora")}
            wanted |= {*head_modules(model)}
    absent = sorted(w for w in wanted if not any(f".{w}".endswith(f".{c}") for c in covered))
    if absent:
        raise UsageError(
            f"the flags ask for LoRA on {', '.join(absent)}, but the adapter {args.load_lora_path} "
            f"covers {', '.join(sorted(covered))}; drop --target-modules, --apply-classhead-lora "
            "and --apply-qkv-head-lora: the adapter knows its layers."
        )


def _check_blocks(args, model: PreTrainedModel, config: LoraConfig) -> None:
    """--lora-layers, if given, are the blocks that the adapter has.

    Raises:
        UsageError: it has others.
    """
    if args.lora_layers is None:
        return
    blocks = find_blocks(model)
    wanted = set(chosen_blocks(args.lora_layers, len(blocks.modules) if blocks else 0))
    adapted = adapted_blocks(model, config)
    if wanted != adapted:
        raise UsageError(
            f"--lora-layers {args.lora_layers}: the adapter {args.load_lora_path} has layers in "
            f"the blocks {shown_blocks(adapted) or 'none'}; drop --lora-layers: the adapter knows "
            "its blocks."
        )


def _adapter_lora_config(args, model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """The configuration of a loaded adapter, held against the flags and the model."""
    origin = f"the adapter {args.load_lora_path}"
    for flag, given, stored in (
        ("--lora-r", args.lora_r, config.r),
        ("--lora-alpha", args.lora_alpha, config.lora_alpha),
    ):
        if given is not None and given != stored:
            raise UsageError(
                f"{flag} is {given}, but {origin} was trained with {stored}; drop {flag}, or pass "
                f"{flag} {stored}."
            )
    settle_patterns(model, config, origin)
    _check_targets(model, config.target_modules, origin)
    _check_target_flags(args, model, config)
    _check_blocks(args, model, config)
    if args.lora_dropout is not None:
        config.lora_dropout = args.lora_dropout
    logger.info(
        "Loaded adapter configuration: r %d, alpha %s, layers %s",
        config.r,
        config.lora_alpha,
        quoted(", ".join(sorted(config.target_modules)), longest=400)
        if isinstance(config.target_modules, list | set)
        else config.target_modules,
    )
    return config


def settle_patterns(model: PreTrainedModel, config: LoraConfig, origin: str) -> None:
    """Replace an adapter's regular expressions by the names of the layers that they match.

    PEFT matches them with `re`, where a pattern can be made to take for ever; RE2 is linear in the
    text. Its language has neither look-around nor back-references.

    Raises:
        UsageError: no expression of RE2, or one that matches no layer.
    """
    names = [name for name, module in model.named_modules() if _is_adaptable(module)]
    if config.exclude_modules is not None:
        excluded = config.exclude_modules
        matches = _pattern(excluded, origin).fullmatch if isinstance(excluded, str) else None
        config.exclude_modules = [
            name
            for name in names
            if (matches(name) if matches else any(f".{name}".endswith(f".{e}") for e in excluded))
        ] or None
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        pattern = _pattern(targets, origin)
        config.target_modules = [name for name in names if pattern.fullmatch(name)]
        if not config.target_modules:
            raise UsageError(
                f"{origin}: its pattern {quoted(targets)} matches no layer of this "
                f"{model.config.model_type} model."
            )
    for key in ("rank_pattern", "alpha_pattern"):  # the first that matches a name's end counts
        patterns = [
            (_pattern(rf"(.*\.)?({pattern})$", origin), value)
            for pattern, value in getattr(config, key).items()
        ]
        found = {}
        for name in names:
            value = next((v for pattern, v in patterns if pattern.match(name)), None)
            if value is not None:
                found[name] = value
        setattr(config, key, found)


def _pattern(expression: str, origin: str):
    """A compiled expression of RE2, of bounded size."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = 8 * 2**20
    try:
        return re2.compile(expression, options=options)
    except (re2.error, UnicodeError) as error:
        raise UsageError(
            f"{origin}: the pattern {quoted(expression)} is none that is matched here ({error}); "
            "look-around and back-references are not, so name the layers instead."
        ) from None


def _is_adaptable(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding)


def adapter_acts(model: nn.Module) -> bool:
    """Whether a forward goes through LoRA: it is there, and neither merged nor disabled."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and not any(layer.merged or layer.disable_adapters for layer in layers)


def settle_generate(model: PreTrainedModel, posterior: str | None) -> None:
    """Let `generate` of a posterior raise, by whatever way it is reached, until it is built.

    The base model generates with the adapter that PEFT has put into it, so this is where it would
    use a single set of weights without a word. Point estimates generate as PEFT's do.

    Args:
        model: the base model.
        posterior: the method's name, or None for a point estimate.
    """
    model.__dict__.pop("generate", None)  # of an earlier wrapper around the same model
    if posterior is not None and hasattr(model, "generate"):
        model.generate = partial(_generate, model, posterior)


def _generate(model: PreTrainedModel, method: str, *args, **kwargs):
    """`model.generate`, unless the adapter in it is a posterior whose draws differ."""
    if adapter_acts(model):
        raise UsageError(
            f"generate: the adapter is a posterior ({method}), and text cannot be generated from "
            "its draws yet; a single set of weights would be used without saying so. To have just "
            "that, call merge_adapter() first (the posterior mean; of an ensemble the active "
            "member), or generate with the base model inside of disable_adapter()."
        )
    return type(model).generate(model, *args, **kwargs)


def facts_of(model: PreTrainedModel) -> dict[str, Any]:
    """The flags that a model answers by itself, for a use without a command line."""
    is_causal = model.get_output_embeddings() is not None
    return {
        "model": model.config._name_or_path or type(model).__name__,
        "model_type": "causallm" if is_causal else "seqcls",
    }
