r"""BLoB: Bayesian low-rank adaptation by backpropagation (arXiv 2406.11675, NeurIPS 2024).

Mean and standard deviation of LoRA's A are trained together. The ELBO's two terms have an optimizer
each; one update is, in this order:

1. backward of the NLL; AdamW steps on M and B (and a trained head), never on G;
2. backward of $\pi KL$ at the updated M; SGD steps on M with $\pi\, \partial KL / \partial M$ and
   on G with $\partial NLL / \partial G + \pi\, \partial KL / \partial G$.

Both follow linear warm-up and decay. The KL's weight is $\pi_i = 2^i / (2^{M+1} - 1)$ over cycles
of M updates (`--bayes-klreweighting`), else $1/M$.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwrappers.lora.stochastic import (
    RHO,
    GaussianPosterior,
    add_kl_gradients,
    kl_divergence,
    posterior_parameters,
    spread_tensors,
)
from modelwrappers.wrapperbase import WrapperBase
from utils.args import above, add_switch, add_without_effect, between
from utils.errors import RunError, UsageError, quoted
from utils.logging import logger, notice_once
from utils.optim import build_optimizer, linear_schedule
from utils.records import Count, Record, as_record


class _Counter(Record):
    """Updates of the KL's weight, in a state."""

    kl_step: Count


class BLoB(GaussianPosterior, WrapperBase):
    """Gaussian posterior on A, trained by backpropagation."""

    learning_rate_flags = ("--lr", "--bayes-kllr")
    posterior_flags = (
        *("bayes_beta", "flipout", "bayes_inference_notsample"),
        *GaussianPosterior.draw_flags,
    )

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)
        self.attach(adapter_name, self.args.flipout, self.args.bayes_eps)
        self.means: list[nn.Parameter] = []  # filled when everything is on its device
        self.rhos: list[nn.Parameter] = []
        self.kl_step = 0  # updates of the KL's weight done
        self.num_kl_batches = 1

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        group = parser.add_argument_group("BLoB")
        group.add_argument(
            *("--prior-std", "--bayes-beta"),
            dest="bayes_beta",
            type=between(1e-6, 1e6),
            default=0.2,
            help="standard deviation of the prior",
        )
        group.add_argument(
            *("--kl-lr", "--bayes-kllr"),
            dest="bayes_kllr",
            type=between(0, 1e28),
            default=0.02,
            help="learning rate of the KL",
        )
        group.add_argument(
            "--bayes-eps", type=above(0, 10), default=0.05, help="G starts in [eps/sqrt(2), eps]"
        )
        add_switch(group, "--bayes-klreweighting", help="KL weight doubles within each cycle")
        add_switch(group, "--bayes-datasetrescaling", help="cycle length from the data set's size")
        group.add_argument(
            "--bayes-gamma",
            type=between(1, 1_000),
            default=8.0,
            help="exponent of --bayes-datasetrescaling",
        )
        cls.add_flipout_argument(group)
        add_without_effect(parser, "the prior's width is --prior-std", "--bayes-final-beta")
        add_without_effect(parser, "signs per token are the default", "--bayes-flipout")

    @classmethod
    def check_arguments(cls, args) -> None:
        cls.settle_draws(args)
        if args.bayes_final_beta is not None:
            notice_once("--bayes-final-beta has no effect: the prior's width is --prior-std.")
        if args.bayes_flipout is not None:
            notice_once(
                "--bayes-flipout has no effect: signs per token are the default, see --flipout."
            )

    def configure_optimizers(self) -> None:
        args = self.args
        self.means, self.rhos = posterior_parameters(self, self.active_adapter)
        on_nll = [(name, p) for name, p in self.trainable_parameters() if f".{RHO}." not in name]
        self.optimizers = {
            "lora": build_optimizer(on_nll, args.opt, args.lr, args.opt_wd, args.adam_epsilon),
            "kl": torch.optim.SGD([*self.means, *self.rhos], lr=args.bayes_kllr),
        }
        self.schedulers = {
            key: linear_schedule(optimizer, self.num_training_steps, args.warmup_ratio)
            for key, optimizer in self.optimizers.items()
        }
        self.num_kl_batches = self._cycle_length()

    def optimizer_step(self) -> dict[str, float | Tensor]:
        lora, kl = self.optimizers["lora"], self.optimizers["kl"]
        lora.step()
        lora.zero_grad(set_to_none=True)  # G keeps the NLL's gradient
        self.kl_step += 1
        weight = self.kl_weight(self.kl_step)
        value = kl_divergence(self.means, self.rhos, self.args.bayes_beta)
        add_kl_gradients(self.means, self.rhos, self.args.bayes_beta, weight)
        kl.step()
        kl.zero_grad(set_to_none=True)
        for scheduler in self.schedulers.values():
            scheduler.step()
        return {"kl": value, "kl_weight": weight}

    def method_state(self) -> dict[str, Any]:
        return {"kl_step": self.kl_step}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self.kl_step = as_record(state, _Counter, "method").kl_step

    def method_config(self) -> dict[str, Any]:
        return {
            "prior_std": self.args.bayes_beta,
            "parametrisation": "std = lora_A_rho^2",
        }

    # --- the KL's weight --------------------------------------------------------------------------

    def _cycle_length(self) -> int:
        """M, in updates: an epoch, or, with --bayes-datasetrescaling, by the data set's size.

        100 n^(pi/gamma) / (processes x batch size), as published; accumulated batches count as one.
        """
        args = self.args
        if self.train_loader is None:
            raise RunError(
                "BLoB's optimizers follow the data set: call prepare_for_fit_evaluate first."
            )
        if not args.bayes_datasetrescaling:
            return max(1, -(-len(self.train_loader) // args.grad_accum_steps))
        scale = 100 * self.dataset.num_samples ** (math.pi / args.bayes_gamma)
        rows = args.batch_size * args.grad_accum_steps
        return max(1, int(scale / self.accelerator.num_processes / rows))

    def kl_weight(self, step: int) -> float:
        """pi of the update `step`, counted from 1; a cycle's weights add up to 1 (nearly)."""
        length = self.num_kl_batches
        if not self.args.bayes_klreweighting:
            return 1 / length
        position = (step - 1) % length + 1
        # 2^i / (2^(M+1) - 1), divided through by 2^(M+1): M may be in the thousands
        return 2.0 ** (position - length - 1) / (1 - 2.0 ** -(length + 1))

    # --- adapters on disk -------------------------------------------------------------------------

    def completed_adapter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        spreads = [key for key in tensors if key.endswith(RHO)]
        flat = next((key for key in spreads if (tensors[key] == 0).any()), None)
        if flat is not None and (self.args.max_train_steps or self.args.n_epochs):
            raise UsageError(
                f"--load-lora-path: {quoted(flat)} has entries of 0, a posterior of no width, "
                "whose KL to any prior is infinite: it cannot be trained by BLoB. Evaluate it, or "
                "train on the adapter that it was made from."
            )
        if spreads:
            return tensors
        logger.info(
            "The adapter has no %s: it is a point estimate. Its spread starts from --bayes-eps %g.",
            RHO,
            self.args.bayes_eps,
        )
        return tensors | spread_tensors(self, self.active_adapter)
