"""The tensors of an adapter's file: what a wrapper takes, what it can do without, what it refuses.

Loaded is what `PeftModel.from_pretrained` would load, so that the logits are the same; where that
cannot be, the file is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from modelwrappers.engine.adapter_config import ties_weights
from modelwrappers.engine.posterior import ADAPTER_FILE
from utils.adapter_base import CONFIG_FILE, RECORD_FILE
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.records import check_tensor, read_tensors

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase

_PREFIX = "base_model.model."


def load_weights(wrapper: WrapperBase, folder: Path, adapter_name: str) -> None:
    """Fill an adapter from a folder that this project, PEFT or the original code wrote.

    Keys of the original carry their prefix twice and may bring the base model's whole head; the one
    is undone, the other left out. A part of the head that the adapter does not hold was frozen when
    it was trained: it stays as the base model has it, if the base model's checkpoint has it.

    Raises:
        UsageError: a tensor is missing or has another shape (another architecture or rank), a part
            of the head would be random, or the file holds what is not taken here and would count.
    """
    tensors = wrapper.completed_adapter(read_adapter_tensors(folder, "--load-lora-path"))
    head = wrapper.trained_base_tensors()
    expected = head | get_peft_model_state_dict(
        wrapper, adapter_name=adapter_name, save_embedding_layers=False
    )
    frozen = _frozen_layers(wrapper, tensors, expected, folder, adapter_name)
    tensors = {k: v for k, v in expected.items() if _layer_of(k) in frozen} | tensors
    try:
        check_adapter_tensors(tensors, expected, folder, wrapper.args.model)
        _check_rest(wrapper, tensors, expected, folder)
    except UsageError:
        _check_tying(wrapper, folder)
        raise
    wrapper.load_state_dict({key: tensors[key] for key in head}, strict=False)
    adapter = {key: tensors[key] for key in expected.keys() - head.keys()}
    set_peft_model_state_dict(wrapper, adapter, adapter_name=adapter_name)
    wrapper.freeze_head(frozen, adapter_name)


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


def _layer_of(key: str) -> str:
    """The module of a tensor; PEFT lists the biases of a saved one, and of what it replaces, too"""
    name = key.rpartition(".")[0]
    return name.removesuffix(".modules_to_save").removesuffix(".original_module")


def _frozen_layers(
    wrapper: WrapperBase,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    folder: Path,
    adapter_name: str,
) -> list[str]:
    """Layers of the head that the adapter neither names nor holds: PEFT had left them frozen.

    Raises:
        UsageError: the base model's checkpoint has not got such a layer either.
    """
    if wrapper.new_layers is None:  # whatever is in this model: it may be random
        return []
    # bias="all" saves the biases of frozen layers, too
    has_biases = wrapper.peft_config[adapter_name].bias == "all"
    held = {_layer_of(k) for k in tensors if not (has_biases and k.endswith(".bias"))}
    known = {_layer_of(key) for key in expected}
    frozen = [name for name in wrapper.unnamed_head(adapter_name) if name in known - held]
    for name in frozen:
        layer = name.removeprefix(_PREFIX).removesuffix(".base_layer")
        if layer in wrapper.new_layers:
            model = wrapper.args.model
            raise UsageError(
                f"--load-lora-path: {folder} holds no weights for {layer}, nor does {model}: it "
                "would stay random. It was saved without its trained head: train it with that "
                "layer among PEFT's modules_to_save, or pass as --model the checkpoint that it was "
                "trained on, if that has it."
            )
    if frozen:
        logger.info(
            "%s holds no weights for %s, which was frozen when it was trained: they are the base "
            "model's, and stay frozen.",
            folder,
            ", ".join(name.removeprefix(_PREFIX) for name in frozen),
        )
    return frozen


def _check_rest(
    wrapper: WrapperBase,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """What else the file holds changes nothing: it is of a posterior, or as the base model has it.

    Raises:
        UsageError: it is a variant of LoRA that is not known, or PEFT would replace weights of the
            base model by others.
    """
    rest = tensors.keys() - expected.keys()
    method, model = wrapper.args.modelwrapper, wrapper.args.model
    if of_lora := sorted(key for key in rest if ".lora_" in key):
        other = next((k for k in of_lora if not k.endswith(wrapper.posterior_suffixes)), None)
        if other is not None and not (folder / RECORD_FILE).is_file():
            raise UsageError(
                f"--load-lora-path: {folder} holds {quoted(other)}, which --modelwrapper {method} "
                "does not take: its predictions would not be the adapter's. It is of a variant of "
                "LoRA that is not supported here, or of a layer that adapter_config.json or this "
                "method leaves out; convert it to plain LoRA with PEFT first, or pass "
                "--modelwrapper map."
            )
        logger.info(
            "%s holds more than --modelwrapper %s takes (%s): its point estimate or mean is taken.",
            folder,
            method,
            quoted(of_lora[0]),
        )
    own = wrapper.state_dict()
    for key in sorted(rest & own.keys()):
        if own[key].is_floating_point() and not _agree(tensors[key], own[key]):
            raise UsageError(
                f"--load-lora-path: {quoted(key)} in {folder} is of the base model, but other than "
                f"that of {model} (shape {tuple(tensors[key].shape)}, there "
                f"{tuple(own[key].shape)}): it was trained on another model, or with a vocabulary "
                "that was extended. Pass as --model the one that it was trained on."
            )


def _check_tying(wrapper: WrapperBase, folder: Path) -> None:
    """What does not fit may be an adapter that tied layers of the base model share.

    Raises:
        UsageError: it is one.
    """
    tied = getattr(wrapper.base_model.model.config, "tie_word_embeddings", False)
    if tied and ties_weights(folder, "--load-lora-path"):
        raise UsageError(
            f'--load-lora-path: {folder / CONFIG_FILE} has "ensure_weight_tying": true, and '
            f"{wrapper.args.model} ties its embedding and its output layer: an adapter that both "
            "share is not supported here. Train it without ensure_weight_tying, or with neither "
            "layer among target_modules and modules_to_save."
        ) from None


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, to the precision of the coarser type."""
    if first.shape != second.shape or not first.is_floating_point():
        return False
    coarser = max(torch.finfo(first.dtype).eps, torch.finfo(second.dtype).eps)
    first, second = first.float().to(second.device), second.float()
    return torch.allclose(first, second, rtol=2 * coarser, atol=1e-6)
