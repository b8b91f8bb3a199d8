"""The base model and its LoRA configuration, from flags.

Weights come from a hub id, a local folder or an embedded alias, plain or quantised; the LoRA
configuration from `--lora-*` and `--target-modules`, or from the adapter that is to be loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from modelwrappers.lora.exact_4bit import use_exact_4bit
from utils.embedded import resolve_model
from utils.errors import UsageError
from utils.hub import go_offline_if_unreachable
from utils.logging import logger

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


def load_model(
    args, num_labels: int, device: torch.device, stay_on_cpu: bool = False
) -> PreTrainedModel:
    """The frozen base model on `device`, in the class that --model-type asks for.

    Args:
        args: parsed flags.
        num_labels: C, for a classification head.
        device: where this process computes.
        stay_on_cpu: leave it there: the device has room for a part of it only.
    Raises:
        UsageError: the model cannot be found, has no weights, or cannot be quantised here.
    """
    path = resolve_model(args.load_model_path or args.model)
    if not Path(path).is_dir():
        go_offline_if_unreachable()
    is_classifier = args.model_type == "seqcls"
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    kwargs: dict[str, Any] = {
        "dtype": _dtype(args, device),
        "trust_remote_code": args.trust_remote_code,
        "output_loading_info": True,
    }
    if is_classifier:  # a head for another number of classes is replaced by a new one
        kwargs |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        if type(config) not in auto._model_mapping and not args.trust_remote_code:
            kind = "classifier" if is_classifier else "causal LM"
            raise UsageError(
                f"--model {args.model}: there is no {kind} of the architecture "
                f"'{config.model_type}'; choose another --model or --dataset-type."
            )
        if args.quantization != "none":
            kwargs["device_map"] = {"": device}
            kwargs["quantization_config"] = _quantization(args, auto, config, kwargs["dtype"])
        model, info = auto.from_pretrained(path, **kwargs)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # transformers and the hub raise a dozen classes here; to the user it is one thing.
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"--model {args.load_model_path or args.model} cannot be loaded: "
            f"{type(error).__name__}: {first_line}\n"
            "It must be a hub id (with network access or a filled cache), a folder with "
            "config.json and model.safetensors, or an embedded model: smollm2-135m, minilm-l6."
        ) from None
    if args.quantization == "none" and not stay_on_cpu:
        model.to(device)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _first(model.config.eos_token_id) or 0
    model.config.use_cache = False
    absent = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    new = sorted({key.rpartition(".")[0] for key in absent})
    roots = head_roots(model)
    incomplete = [name for name in new if not _is_within(name, roots)]
    if incomplete:
        kind = "encoder" if is_classifier else "causal LM"
        more = f" and {len(incomplete) - 5} more" if len(incomplete) > 5 else ""
        raise UsageError(
            f"--model {args.model}: there are no weights for {', '.join(incomplete[:5])}{more}; "
            f"the folder does not hold a complete {kind}."
        )
    if is_classifier and not roots:
        raise UsageError(
            f"--model {args.model}: a {type(model).__name__} does not say which part of it is the "
            "classification head, which has to be trained; choose another --model."
        )
    model.requires_grad_(False)
    use_exact_4bit(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


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


def lora_config(args, model: PreTrainedModel) -> LoraConfig:
    """What to adapt, and how: from the flags, or from the adapter of --load-lora-path.

    A classification head is never left random: without LoRA on it, it is trained whole and saved
    (`modules_to_save`); with --apply-classhead-lora it gets LoRA on top of trained base weights,
    which ride along in the adapter file (see `WrapperBase.save_pretrained`).

    Raises:
        UsageError: an unknown architecture, target modules that are not there, or an adapter that
            does not fit the flags or the model.
    """
    if args.load_lora_path is not None:
        config = _adapter_config(args)
        _check_targets(model, config.target_modules, f"the adapter {args.load_lora_path}")
        _check_target_flags(args, model, config)
        return config
    with_head = args.apply_classhead_lora or args.apply_qkv_head_lora
    if args.target_modules:
        targets = list(args.target_modules)
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
    )


def _attention_targets(model: PreTrainedModel, with_key: bool) -> list[str]:
    model_type = model.config.model_type
    if model_type not in ATTENTION_PROJECTIONS:
        names = sorted({n.split(".")[-1] for n, m in model.named_modules() if _is_linear(m)})
        raise UsageError(
            f"there is no default for the architecture '{model_type}'; name the layers to adapt "
            f"with --target-modules. Its linear layers are: {', '.join(names)}."
        )
    query, key, value = ATTENTION_PROJECTIONS[model_type]
    return list(dict.fromkeys([query, key, value] if with_key else [query, value]))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the output head's linear layers: lm_head, or those between encoder and classes.

    "classifier.dense" and "classifier.out_proj" for RoBERTa, "bert.pooler.dense" and "classifier"
    for BERT, "score" for Llama.
    """
    output = model.get_output_embeddings()
    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    roots = head_roots(model)
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and _is_within(name, roots)
    ]


def head_roots(model: PreTrainedModel) -> list[str]:
    """Modules that turn an encoder's output into classes: all outside of it, and its pooler.

    They have to be trained whole: see `lora_config` and `WrapperBase`. A pooler counts because it
    plays the part of the dense layer in RoBERTa's head, and because sentence encoders (MiniLM among
    them) ship one that was never trained. A causal LM has none, nor has a model in which encoder
    and head cannot be told apart.
    """
    if model.get_output_embeddings() is not None or model.base_model is model:
        return []
    prefix = model.base_model_prefix
    outside = [name for name, _ in model.named_children() if name != prefix]
    inside = [f"{prefix}.pooler"] if getattr(model.base_model, "pooler", None) is not None else []
    return [name for name in inside + outside if _has_weights(model, name)]


def _is_within(name: str, roots: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def _has_weights(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).parameters(), None) is not None


def _check_targets(model: PreTrainedModel, targets, origin: str) -> None:
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):  # a regular expression or "all-linear": PEFT checks those itself
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if _is_linear(m)})
            raise UsageError(
                f"{origin}: this {model.config.model_type} model has no layer '{target}'; its "
                f"linear layers are: {', '.join(linear)}."
            )


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


# --- an adapter that is already there ------------------------------------------------------------


def adapter_folder(args) -> Path:
    """The local folder of --load-lora-path, downloaded first if it lies in a hub repo.

    Raises:
        UsageError: there is no adapter there.
    """
    path = args.load_lora_path
    if args.load_lora_huggingface_repo:
        from huggingface_hub import snapshot_download

        go_offline_if_unreachable()
        try:
            root = snapshot_download(
                args.load_lora_huggingface_repo, allow_patterns=[f"{path.strip('/')}/*"]
            )
        except Exception as error:
            raise UsageError(
                f"--load-lora-huggingface-repo {args.load_lora_huggingface_repo} cannot be read: "
                f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}\n"
                "Without network access pass a local folder as --load-lora-path alone."
            ) from None
        path = Path(root) / path.strip("/")
    folder = Path(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UsageError(
                f"--load-lora-path {args.load_lora_path}: there is no {name} in {folder}; it takes "
                "a folder that --checkpoint or PEFT's save_pretrained wrote."
            )
    return folder


def _adapter_config(args) -> LoraConfig:
    folder = adapter_folder(args)
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        if kind != "LORA":
            raise UsageError(f"--load-lora-path: {folder} holds a {kind} adapter, not LoRA.")
        config = LoraConfig.from_pretrained(str(folder))
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise UsageError(
            f"--load-lora-path: {folder} holds no LoRA configuration ({error})."
        ) from None
    for flag, given, stored in (
        ("--lora-r", args.lora_r, config.r),
        ("--lora-alpha", args.lora_alpha, config.lora_alpha),
    ):
        if given is not None and given != stored:
            raise UsageError(
                f"{flag} is {given}, but the adapter in {folder} was trained with {stored}; drop "
                f"{flag}, or pass {flag} {stored}."
            )
    if args.lora_dropout is not None:
        config.lora_dropout = args.lora_dropout
    config.inference_mode = False
    logger.info(
        "Loaded adapter configuration: r %d, alpha %s, layers %s",
        config.r,
        config.lora_alpha,
        config.target_modules
        if isinstance(config.target_modules, str)
        else ", ".join(sorted(config.target_modules)),
    )
    return config
