r"""A Gaussian posterior on LoRA's A, for every kind of layer; only this file touches PEFT's seam.

A LoRA layer computes $W_0 x + s B A x$. Here $q(A) = \prod_{ij} N(A_{ij} | M_{ij}, \Omega_{ij}^2)$:
the mean M is PEFT's own `lora_A` weight, the standard deviation is $\Omega = G \circ G$ with G
stored beside it as `lora_A_rho` (the name that published adapters use). B stays a point estimate.
N draws are one forward: the caller stacks the batch N times, each layer splits it again.

PEFT's `LoraVariant` is officially private (0.21): `tests/test_stochastic_lora.py` holds the
contract for each backend, requirements.txt pins the versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from modelwrappers.lora.draws import (
    FLIPOUT,
    Draws,
    FlipSigns,
    NoisyProjection,
    random_signs,
)
from utils.errors import RunError, UsageError

if TYPE_CHECKING:
    from modelwrappers.engine.prediction import Batch, Predictions

RHO = "lora_A_rho"
# Layers of PEFT whose forward consults `lora_variant`. Others (AWQ, AQLM, EETQ, INC, convolutions,
# mixture-of-experts parameters) would silently compute the mean.
SUPPORTED_LAYERS = ("Linear", "Linear8bitLt", "Linear4bit", "Embedding")


class GaussianLora(LoraVariant):
    r"""LoRA whose A is Gaussian: $W_0 x + s B (M x + u \circ ((\Omega \circ E)(t \circ x)))$.

    E is standard Gaussian, one per draw; t and u are Flipout's signs; one dropout mask serves both
    terms. PEFT calls the methods on the instance that `lora_variant[adapter]` holds.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def forward(
        self, module, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs
    ) -> Tensor:
        """The layer's output.

        Args:
            x: (N*B, ..., in) inputs, or (N*B, T) token ids of an embedding.
            result: what the base layer gives for them, (N*B, ..., out).
        """
        if active_adapter in module.lora_embedding_A:
            delta = self._embedding(module, active_adapter, x)
        else:
            delta = self._linear(module, active_adapter, x)
        return result + delta * module.scaling[active_adapter]

    def _linear(self, module, adapter: str, x: Tensor) -> Tensor:
        self._check_rows(x)
        weight = module.lora_A[adapter].weight  # (r, in)
        x = module.lora_dropout[adapter](x)
        hidden = nn.functional.linear(x, weight)  # (N*B, ..., r)
        draws = self.draws
        if draws.n_samples:
            std = getattr(module, RHO)[adapter].square()
            noise = std * draws.noise(id(module), weight.shape, weight)  # (N, r, in)
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                x, noise = x.to(dtype), noise.to(dtype)
            signs_in = random_signs(x.shape, draws.flipout, x.device)
            signs_out = random_signs(hidden.shape, draws.flipout, x.device)
            hidden = hidden + NoisyProjection.apply(x, noise, signs_in, signs_out)
        return module.lora_B[adapter](hidden)

    def _check_rows(self, x: Tensor) -> None:
        if self.draws.n_samples and x.shape[0] % self.draws.n_samples:
            raise RunError(
                f"a stochastic layer got {x.shape[0]} rows for {self.draws.n_samples} draws: this "
                "architecture sends something else than the batch through it; leave the layer out "
                "with --target-modules, or take one draw per forward (--eval-batch-size 1)."
            )

    def _embedding(self, module, adapter: str, ids: Tensor) -> Tensor:
        self._check_rows(ids)
        mean = module.lora_embedding_A[adapter].T  # (V, r)
        hidden = nn.functional.embedding(ids, mean)  # (N*B, T, r)
        draws = self.draws
        if draws.n_samples:
            # A token is a one-hot input: only the columns of A that occur need noise.
            used, position = ids.unique(return_inverse=True)
            if not draws.is_fixed:
                noise = draws.noise(id(module), (len(used), mean.shape[1]), mean)  # (N, U, r)
            else:
                noise = draws.noise(id(module), tuple(mean.shape), mean)[:, used]
            std = getattr(module, RHO)[adapter].T[used].square()  # (U, r)
            position = position.view(draws.n_samples, -1)  # (N, B*T)
            rows = torch.arange(draws.n_samples, device=ids.device)[:, None]
            noisy = (std * noise)[rows, position].view(hidden.shape)
            # The input's sign and the output's are one sign per component here.
            signs = random_signs(hidden.shape, draws.flipout, ids.device)
            hidden = hidden + FlipSigns.apply(noisy, signs)
        delta = hidden @ module.lora_embedding_B[adapter].T
        scale = module._get_embed_scale()
        return delta if scale is None else delta * scale.to(delta.dtype)

    # Merging is into the mean: a merged model is the deterministic one.

    def merge_safe(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight)

    def merge_unsafe(self, module, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight)

    def unmerge(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight)


# --- the posterior of a model ---------------------------------------------------------------------


class GaussianPosterior:
    """What methods share whose posterior is Gaussian on A; stands before `WrapperBase`.

    Attributes:
        draws: of all stochastic layers; the method sets it and attaches it (`attach_posterior`).
    """

    is_stochastic = True
    draws: Draws

    @staticmethod
    def add_flipout_argument(group) -> None:
        """Add --flipout to the method's group of flags."""
        group.add_argument(
            "--flipout", choices=FLIPOUT, default="token", help="what gets its own random signs"
        )

    def sampling(self, n_samples: int) -> AbstractContextManager:
        """The hook of `WrapperBase`: stacked copies see different A."""
        return self.draws.stacked(n_samples)

    def predict(self, eval_loader: Iterable[Batch], n_samples: int | None = None) -> Predictions:
        """As the base's; without flipout a draw is one set of weights for the whole data set."""
        n_samples = self.final_draws() if n_samples is None else n_samples
        if self.draws.flipout != "none" or n_samples == 0:
            return super().predict(eval_loader, n_samples)
        with self.draws.fixed(n_samples, self.args.seed_sampling):
            return super().predict(eval_loader, n_samples)


def attach_posterior(model: nn.Module, adapter: str, eps: float, draws: Draws) -> None:
    r"""Give every LoRA layer a Gaussian posterior, $G \sim U(\epsilon / \sqrt 2, \epsilon)$.

    Args:
        model: a PEFT model.
        adapter: the adapter's name.
        eps: upper end of G's initial values; the standard deviation is G squared.
        draws: shared by all layers.
    Raises:
        UsageError: a layer's backend would skip the noise, or is a LoRA variant already.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
    for name, module in layers:
        kind = type(module).__name__
        if kind not in SUPPORTED_LAYERS:
            raise UsageError(
                f"the layer {name} is a PEFT {kind}, which would skip the noise of the posterior; "
                f"supported are {', '.join(SUPPORTED_LAYERS)}: load the base model unquantised or "
                "with --quantization 8bit or 4bit, or choose other --target-modules."
            )
        if adapter in module.lora_variant:
            raise UsageError(
                f"the layer {name} already is a {type(module.lora_variant[adapter]).__name__}; a "
                "Gaussian posterior goes on plain LoRA only."
            )
    for _, module in layers:
        if not hasattr(module, RHO):
            setattr(module, RHO, nn.ParameterDict())
            module.adapter_layer_names = (*module.adapter_layer_names, RHO)
        mean = posterior_mean(module, adapter)
        rho = torch.empty_like(mean).uniform_(eps / math.sqrt(2), eps)
        getattr(module, RHO)[adapter] = nn.Parameter(rho, requires_grad=mean.requires_grad)
        module.lora_variant[adapter] = GaussianLora(draws)


def posterior_mean(module: LoraLayer, adapter: str) -> nn.Parameter:
    """M of a layer: PEFT's own lora_A."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter]
    return module.lora_A[adapter].weight


def posterior_parameters(
    model: nn.Module, adapter: str
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(all M, all G) of the model's stochastic layers, in the same order."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and isinstance(module.lora_variant.get(adapter), GaussianLora)
    ]
    return (
        [posterior_mean(module, adapter) for module in layers],
        [getattr(module, RHO)[adapter] for module in layers],
    )


def spread_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """All G under the names that an adapter file has for them."""
    return {
        name.removesuffix(f".{adapter}"): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(f".{RHO}.{adapter}")
    }


def kl_divergence(means: list[Tensor], rhos: list[Tensor], prior_std: float) -> Tensor:
    r"""KL from the posterior to the prior $N(0, \sigma_p^2)$, summed over all entries and layers.

    $\sum \log(\sigma_p / \Omega) + (\Omega^2 + M^2) / (2 \sigma_p^2) - 1/2$, with $\Omega = G^2$
    (BLoB, arXiv 2406.11675: it equals the KL of the full weights' posterior to a low-rank prior).

    Returns:
        a float64 scalar.
    """
    with torch.no_grad():
        squares = torch.stack(torch._foreach_norm(means)).double().square().sum()
        variances = torch.stack(torch._foreach_norm(torch._foreach_pow(rhos, 2))).double()
        logs = torch._foreach_log(torch._foreach_abs(rhos))
        log_std = 2 * torch.stack([log.sum() for log in logs]).double().sum()
        count = sum(rho.numel() for rho in rhos)
        quadratic = (squares + variances.square().sum()) / (2 * prior_std**2)
        return count * (math.log(prior_std) - 0.5) - log_std + quadratic


def add_kl_gradients(
    means: list[nn.Parameter], rhos: list[nn.Parameter], prior_std: float, weight: float
) -> None:
    r"""Add `weight` times the gradient of `kl_divergence` to `.grad`, in closed form.

    $\partial KL / \partial M = M / \sigma_p^2$ and
    $\partial KL / \partial G = 2 G^3 / \sigma_p^2 - 2 / G$.
    """
    with torch.no_grad():
        for parameter in (*means, *rhos):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        precision = 1 / prior_std**2
        torch._foreach_add_(
            [p.grad for p in means], [p.data for p in means], alpha=weight * precision
        )
        gradients = [p.grad for p in rhos]
        values = [p.data for p in rhos]
        torch._foreach_add_(gradients, torch._foreach_pow(values, 3), alpha=2 * weight * precision)
        torch._foreach_sub_(gradients, torch._foreach_reciprocal(values), alpha=2 * weight)
