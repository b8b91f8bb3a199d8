r"""MC dropout (Gal and Ghahramani, arXiv 1506.02142) on the adapter.

LoRA's dropout stays on at prediction; each draw is a mask. The backbone's own dropout is off.
N masks are one forward of the batch stacked N times: a mask is drawn for every row anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from modelwrappers.wrapperbase import WrapperBase
from utils.errors import UsageError


class MCDropout(WrapperBase):
    """LoRA whose dropout masks are posterior draws."""

    is_stochastic = True
    posterior_flags = ("bayes_inference_notsample",)

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        _check_dropout(peft_config.lora_dropout)
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)

    @classmethod
    def check_arguments(cls, args) -> None:
        if args.lora_dropout is None and args.load_lora_path is None:
            args.lora_dropout = 0.1
        if args.lora_dropout is not None:
            _check_dropout(args.lora_dropout)

    def noisy_modules(self) -> list[nn.Module]:
        """LoRA's dropout layers."""
        return [
            mask
            for layer in self.modules()
            if isinstance(layer, LoraLayer)
            for mask in layer.lora_dropout.values()
            if isinstance(mask, nn.Dropout)
        ]

    @contextmanager
    def sampling(self, n_samples: int) -> Iterator[None]:
        # DoRA applies its mask only where the layer itself is in training; a layer's `train` would
        # clear the norms that DoRA keeps, so its own mode alone is set.
        modules = [*self.noisy_modules(), *self._dora_layers()]
        before = [module.training for module in modules]
        for module in modules:
            module.training = n_samples > 0
        try:
            yield
        finally:
            for module, mode in zip(modules, before, strict=True):
                module.training = mode

    def _dora_layers(self) -> list[LoraLayer]:
        return [
            layer
            for layer in self.modules()
            if isinstance(layer, LoraLayer) and self.active_adapter in layer.lora_magnitude_vector
        ]


def _check_dropout(probability: float) -> None:
    if probability == 0:
        raise UsageError(
            "MC dropout samples the LoRA dropout masks, but --lora-dropout is 0; pass e.g. "
            "--lora-dropout 0.1"
        )
