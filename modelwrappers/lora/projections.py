"""Which LoRA matrices of an adapter a Laplace posterior covers."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from modelwrappers.lora.curvature import Projection
from modelwrappers.lora.stochastic import variant_name
from utils.errors import UsageError


def lora_layers(model: nn.Module, adapter: str) -> list[tuple[str, LoraLayer]]:
    """(name, layer) of those that the adapter is in."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.scaling
    ]


def covered_layers(
    model: nn.Module, adapter: str, which: str, head: str | None
) -> list[tuple[str, LoraLayer]]:
    """The layers of --laplace-layers.

    Args:
        model: the PEFT model.
        adapter: PEFT's name for it.
        which: `all` or `last_layer`.
        head: the name of the output head's last linear layer.
    Raises:
        UsageError: there is none, or one that is no pair of linear maps.
    """
    found = lora_layers(model, adapter)
    if which == "last_layer":
        found = [(name, layer) for name, layer in found if name == head]
        if not found:
            raise UsageError(
                "--laplace-layers last_layer is the posterior over the output head's LoRA, but "
                "the adapter has none there; train it with --apply-classhead-lora, or pass "
                "--laplace-layers all."
            )
    for name, layer in found:
        if layer.lora_variant.get(adapter) is not None:
            raise UsageError(
                f"Laplace covers plain LoRA, but {name} is {variant_name(layer, adapter)}; "
                "take map, mle or mcdropout, or an adapter of plain LoRA."
            )
        is_plain = adapter in layer.lora_A
        if not is_plain or layer.lora_bias.get(adapter):
            raise UsageError(
                f"Laplace covers plain LoRA on linear layers, but {name} is an embedding or "
                "has a bias of its own (lora_bias); leave it out with --target-modules."
            )
    return found


def pairs_of(
    layers: list[tuple[str, LoraLayer]],
    adapter: str,
    head: str | None,
    target_ids: Tensor | None,
) -> list[Projection]:
    """A and B of each layer; of a causal LM's head the rows of its answer tokens only.

    Class logits depend on few of the rows of such a head.

    Args:
        layers: linear ones.
        adapter: PEFT's name for it.
        head: the name of the output head's last linear layer.
        target_ids: the answer tokens of a causal LM; None for a classifier.
    """
    projections = []
    for name, layer in layers:
        rows = target_ids if name == head else None
        projections += [
            Projection(f"{name}.lora_A.weight", layer.lora_A[adapter]),
            Projection(f"{name}.lora_B.weight", layer.lora_B[adapter], rows),
        ]
    return projections


def rows_beyond(projections: list[Projection], answer_tokens: Tensor | None) -> list[Projection]:
    """The head's rows of answer tokens that the posterior was not fitted on."""
    beyond = []
    for name, module, rows in projections:
        if rows is not None:
            others = answer_tokens[~torch.isin(answer_tokens, rows)]
            beyond += [Projection(name, module, others)] if len(others) else []
    return beyond
