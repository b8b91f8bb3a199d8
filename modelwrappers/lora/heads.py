"""Output heads: which modules they are, and how a classification head is trained under LoRA."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from transformers import PreTrainedModel


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
        if is_linear(module) and is_within(name, roots)
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


def is_within(name: str, roots: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def _has_weights(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).parameters(), None) is not None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def train_head_under_lora(model: nn.Module, roots: list[str]) -> list[str]:
    """Train the base weights of a classification head that has LoRA on it.

    Without LoRA PEFT trains and saves a copy of the head (`modules_to_save`). PEFT cannot do both
    to one module, and a new head must not stay random: so its base weights are trained in place,
    under the names that PEFT gives them, and ride along in the adapter file.

    Args:
        model: the PEFT model.
        roots: the head's modules in the base model; see `head_roots`.
    Returns:
        the names of the modules that are trained so.
    """
    trained = []
    for name, module in model.named_modules():
        path = f"{name.removeprefix('base_model.model.')}."
        if not any(path.startswith(f"{root}.") for root in roots):
            continue
        has_parameters = next(module.parameters(recurse=False), None) is not None
        is_saved_by_peft = any(part in name for part in (".lora_", ".modules_to_save")) or any(
            hasattr(model.get_submodule(parent), "modules_to_save") for parent in _parents(name)
        )
        if has_parameters and not is_saved_by_peft:
            module.requires_grad_(True)
            trained.append(name)
    return trained


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


class TrainedHead:
    """The part of a PEFT model that trains base weights of a classification head under its LoRA.

    Attributes:
        _trained_base_layers: what `train_head_under_lora` gave.
    """

    _trained_base_layers: list[str]

    def trained_base_tensors(self) -> dict[str, Tensor]:
        """Base weights of a classification head that are trained under its LoRA."""
        return {
            f"{name}.{key}": value
            for name in self._trained_base_layers
            for key, value in self.get_submodule(name).state_dict().items()
        }

    def unnamed_head(self, adapter_name: str) -> list[str]:
        """Layers of a classification head that are trained here, by no word of the adapter's own.

        An adapter that PEFT has trained need not hold them: what its configuration does not name
        was frozen.
        """
        return self._trained_base_layers

    def freeze_head(self, layers: Collection[str], adapter_name: str) -> None:
        """Take layers of `unnamed_head` out of training; biases that PEFT trains stay in it."""
        keeps_biases = self.peft_config[adapter_name].bias == "all"
        for name in layers:
            for key, parameter in self.get_submodule(name).named_parameters(recurse=False):
                parameter.requires_grad_(keeps_biases and key == "bias")
        self._trained_base_layers = [n for n in self._trained_base_layers if n not in layers]
