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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from modelwrappers.lora.draws import (
    FLIPOUT,
    KINDS,
    Draws,
    NoisyProjection,
    rows_of,
)
from utils.errors import RunError, UsageError

if TYPE_CHECKING:
    from modelwrappers.engine.prediction import Batch

RHO = "lora_A_rho"
# Layers of PEFT whose forward consults `lora_variant`. Others (AWQ, AQLM, EETQ, INC, convolutions,
# mixture-of-experts parameters) would silently compute the mean.
SUPPORTED_LAYERS = ("Linear", "Linear8bitLt", "Linear4bit", "Embedding")


class GaussianLora(LoraVariant):
    r"""LoRA whose A is Gaussian: $W_0 x + s B (M x + u \circ ((\Omega \circ E)(t \circ x)))$.

    E is standard Gaussian, one per draw; t and u are Flipout's signs; one dropout mask serves both
    terms. PEFT calls the methods on the instance that `lora_variant[adapter]` holds.
    """

    def __init__(self, draws: Draws, place: int) -> None:
        """Args: the draws of all layers, and which of these this one is."""
        self.draws = draws
        self.place = place

    def forward(
        self, module, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs
    ) -> Tensor:
        """The layer's output.

        Args:
            x: (N*B, ..., in) inputs, or (N*B, T) token ids of an embedding.
            result: what the base layer gives for them, (N*B, ..., out).
        """
        scaling = module.scaling[active_adapter]
        if active_adapter in module.lora_embedding_A:
            return result + self._embedding(module, active_adapter, x) * scaling
        hidden = self._hidden(module, active_adapter, x)
        weight = module.lora_B[active_adapter].weight
        is_plain = module.lora_B[active_adapter].bias is None and not _autocast(x)
        if is_plain and result.dtype == hidden.dtype == weight.dtype:
            # product, scaling and sum in one operation
            rows = torch.addmm(rows_of(result), rows_of(hidden), weight.T, alpha=scaling)
            return rows.view(result.shape)
        return result + module.lora_B[active_adapter](hidden) * scaling

    def _hidden(self, module, adapter: str, x: Tensor) -> Float[Tensor, "rows ... r"]:
        """What B is applied to."""
        self._check_rows(x)
        weight = module.lora_A[adapter].weight  # (r, in)
        x = module.lora_dropout[adapter](x)
        draws = self.draws
        if not draws.n_samples:
            return nn.functional.linear(x, weight)
        noise = draws.noise(id(module), weight.shape, weight)  # (N, r, in)
        if _autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        signs_in = draws.random_signs(self.place, "in", x.shape, x)
        signs_out = draws.random_signs(self.place, "out", (*x.shape[:-1], len(weight)), x)
        rho = getattr(module, RHO)[adapter]
        return NoisyProjection.apply(x, weight, rho, noise, signs_in, signs_out)

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
            signs = draws.random_signs(self.place, "out", hidden.shape, hidden)
            hidden = hidden + (noisy if signs is None else noisy * signs)
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


def _autocast(x: Tensor) -> bool:
    """Whether mixed precision is on; the meta device has none, and raises where it is asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


# --- the posterior of a model ---------------------------------------------------------------------


class GaussianPosterior:
    """What methods share whose posterior is Gaussian on A; stands before `WrapperBase`.

    Attributes:
        draws: of all stochastic layers; `attach` makes and attaches it.
        draw_flags: what a saved posterior needs again to draw as its run did.
    """

    is_stochastic = True
    draws: Draws
    draw_flags: ClassVar[tuple[str, ...]] = ("flipout_eval", "draws")

    def attach(self, adapter: str, flipout: str, eps: float) -> None:
        """Give the LoRA layers a posterior, and draws as the flags have them.

        Args:
            flipout: in training.
            eps: see `attach_posterior`.
        """
        antithetic = self.args.draws == "antithetic"
        self.draws = Draws(flipout, self.args.flipout_eval, antithetic)
        attach_posterior(self, adapter, eps, self.draws)
        if "example" in (flipout, self.args.flipout_eval):
            check_rows_are_seen(self)
        if antithetic and self.shares_positions and self.args.flipout_eval != "none":
            raise UsageError(
                "--draws antithetic needs both draws of a pair in one forward, or no random signs; "
                f"this model takes one draw per forward and --flipout-eval is "
                f"{self.args.flipout_eval}: pass --flipout-eval none, or --draws independent."
            )

    @classmethod
    def add_flipout_argument(cls, group) -> None:
        """Add --flipout, of training, and `add_draw_arguments` to the method's group of flags."""
        group.add_argument(
            "--flipout",
            choices=FLIPOUT,
            default="token",
            help="what gets its own random signs in training",
        )
        cls.add_draw_arguments(group)

    @classmethod
    def add_draw_arguments(cls, group, *spellings: str) -> None:
        """Add --draws and --flipout-eval to the method's group of flags.

        Args:
            spellings: others of --flipout-eval.
        """
        group.add_argument(
            *("--flipout-eval", *spellings),
            dest="flipout_eval",
            choices=FLIPOUT,
            help="what gets its own random signs at prediction (default: example, or none where "
            "--flipout is; with --protocol original as --flipout)",
        )
        group.add_argument(
            "--draws",
            choices=KINDS,
            default="independent",
            help="antithetic: in pairs of opposite noise, for a mean of less variance",
        )

    @classmethod
    def settle_draws(cls, args) -> None:
        """Fill in --flipout-eval: signs per token are right for training only.

        Raises:
            UsageError: --draws antithetic, and no pair of draws.
        """
        number = args.bayes_eval_n_samples_final
        if args.draws == "antithetic" and (args.bayes_inference_notsample or number < 2):
            other = "--bayes-inference-notsample takes no draw"
            if not args.bayes_inference_notsample:
                other = f"--bayes-eval-n-samples-final is {number}"
            raise UsageError(
                f"--draws antithetic takes draws in pairs, but {other}; drop one of them."
            )
        if args.flipout_eval is None:
            flipout = getattr(args, "flipout", "token")
            is_kept = flipout == "none" or args.protocol == "original"
            args.flipout_eval = flipout if is_kept else "example"

    @classmethod
    def recorded_flags(cls, flags: Mapping[str, Any]) -> dict[str, Any]:
        """As the base's. Older records have one --flipout for training and prediction."""
        return super().recorded_flags({"flipout_eval": flags.get("flipout", "token"), **flags})

    @classmethod
    def prefix_obstacle(cls, args) -> str | None:
        signs = getattr(args, "flipout_eval", None) or args.flipout
        if signs == "none" or args.bayes_inference_notsample:
            return None
        return f"--flipout-eval {signs} gives each row weights of its own; pass --flipout-eval none"

    @property
    def draws_kind(self) -> str:
        return "antithetic" if self.draws.antithetic else "independent"

    def sampling(self, n_samples: int) -> AbstractContextManager:
        """The hook of `WrapperBase`: stacked copies see different A."""
        return self.draws.stacked(n_samples, self.training)

    def noisy_modules(self) -> list[nn.Module]:
        return [
            module
            for module in self.modules()
            if isinstance(module, LoraLayer)
            and isinstance(module.lora_variant.get(self.active_adapter), GaussianLora)
        ]

    def from_draw(self, first: int) -> AbstractContextManager:
        return self.draws.starting_at(first)

    def evaluation_draws(self, n_samples: int) -> AbstractContextManager:
        """Without flipout a draw is one set of weights for a whole data set."""
        if self.draws.flipout_eval != "none" or n_samples == 0:
            return nullcontext()
        return self.draws.fixed(n_samples, self.args.seed_sampling)

    def draw_logits(
        self, batch: Batch, n_samples: int, first: int | None = None
    ) -> Iterator[Float[Tensor, "n B C"]]:
        """As the base's; without flipout a draw is one set of weights for all rows."""
        one_for_all = self.draws.flipout_eval == "none" and not self.training
        if not one_for_all or self.draws.is_fixed:
            yield from super().draw_logits(batch, n_samples, first)
            return
        with self.draws.fixed(n_samples, int(torch.randint(2**31, ()))):
            yield from super().draw_logits(batch, n_samples, first)

    @property
    def rows_share_draws(self) -> bool:
        return self.draws.flipout_eval == "none" and self.draws.is_fixed


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
                f"the layer {name} is {variant_name(module, adapter)}, and a Gaussian posterior "
                "goes on plain LoRA only: take map, mle or mcdropout, or an adapter of plain LoRA."
            )
    draws.num_layers = max(draws.num_layers, len(layers))  # it may be shared with another adapter
    for place, (_, module) in enumerate(layers):
        if not hasattr(module, RHO):
            setattr(module, RHO, nn.ParameterDict())
            module.adapter_layer_names = (*module.adapter_layer_names, RHO)
        mean = posterior_mean(module, adapter)
        rho = torch.empty_like(mean).uniform_(eps / math.sqrt(2), eps)
        getattr(module, RHO)[adapter] = nn.Parameter(rho, requires_grad=mean.requires_grad)
        module.lora_variant[adapter] = GaussianLora(draws, place)


def variant_name(module: LoraLayer, adapter: str) -> str:
    """What is not plain LoRA about a layer, for a message."""
    if adapter in module.lora_magnitude_vector:
        return "DoRA (use_dora), which divides by the norm of each row of its weights"
    return f"a {type(module.lora_variant[adapter]).__name__}"


# Layers that see all tokens of a batch as one list, without rows: model type -> names.
FLATTENED = {"opt": ("fc1", "fc2")}


def check_rows_are_seen(model: GaussianPosterior) -> None:
    """Signs per example need layers that see which tokens are of one row.

    Raises:
        UsageError: an adapted layer does not.
    """
    kind = model.get_base_model().config.model_type
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, LoraLayer) and last in FLATTENED.get(kind, ()):
            raise UsageError(
                f"{kind} sends all tokens of a batch through {last} as one list, so random signs "
                "per example would be signs per token there: pass --flipout-eval none (or token), "
                f"or --target-modules without {last}."
            )


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
