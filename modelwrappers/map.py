r"""Maximum likelihood and maximum a posteriori: plain LoRA, the baseline of every other method.

MLE minimises the mean negative log-likelihood of the answer, and nothing else. MAP adds a prior on
the adapter, one of two:

- `--prior-precision` $\lambda$: a Gaussian one on the LoRA matrices (MacKay 1992),
  $\mathrm{NLL} + \frac{\lambda}{2N} |\theta - \theta_0|^2$ with N the number of training rows. It
  is part of the gradient that the optimizer sees, so its optimum is the posterior's mode, the one
  that a Laplace approximation under the same prior is around.
- else AdamW's decoupled weight decay (arXiv 1711.05101), `--opt-wd`, by default 1e-5, the value of
  the published runs. It shrinks by the sum of learning rate times decay over the updates, which is
  next to nothing in a short run, and is the gradient of no prior under AdamW's step sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from modelwrappers.engine.posterior import PosteriorRecord
from modelwrappers.wrapperbase import WrapperBase
from utils.adapter_base import RECORD_FILE
from utils.args import above
from utils.errors import UsageError
from utils.logging import notice_once
from utils.records import Count, Positive, Record

# PEFT's own list of what a LoRA layer trains, but DoRA's magnitudes, which are no entries of A or B
MATRICES = frozenset(LoraLayer.adapter_layer_names) - {"lora_magnitude_vector"}


class Prior(Record):
    """The Gaussian prior that an adapter was trained under.

    Attributes:
        precision: lambda.
        mean: theta_0: the origin, or where training began.
        n_parameters: entries of the matrices that it is over.
        n_examples: N.
    """

    precision: Positive
    mean: Literal["zero", "init"]
    n_parameters: Count
    n_examples: Count


class Description(Record):
    """MAP's part of bayes_config.json; None: there is no Gaussian prior."""

    gaussian_prior: Prior | None = None


class MAP(WrapperBase):
    """Point estimate of the adapter; named `map` or, without any prior, `mle`."""

    Description = Description

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)
        self.prior: GaussianPrior | None = None  # of the loop
        self.described_prior: Prior | None = None

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        group = parser.add_argument_group("prior")
        group.add_argument(
            "--prior-precision",
            type=above(0, 1e12),
            metavar="LAMBDA",
            help="of a Gaussian prior on the LoRA matrices (default: none; --opt-wd instead)",
        )
        group.add_argument(
            "--prior-mean",
            choices=["zero", "init"],
            help="its mean: the origin, or where training begins (default: init)",
        )

    @classmethod
    def check_arguments(cls, args) -> None:
        if _precision(args) is None:
            if (mean := getattr(args, "prior_mean", None)) is not None:
                raise UsageError(
                    f"--prior-mean {mean} is part of a Gaussian prior; pass its "
                    "--prior-precision, too, or drop it."
                )
            if args.modelwrapper == "map" and args.opt_wd is None:
                args.opt_wd = 1e-5
            return
        flag = f"--prior-precision {args.prior_precision:g}"
        if args.modelwrapper == "mle":
            raise UsageError(
                f"{flag}: maximum likelihood has no prior; pass --modelwrapper map, or drop it."
            )
        if args.opt_wd:
            raise UsageError(
                f"{flag} and --opt-wd {args.opt_wd:g} are two priors on the same parameters, the "
                "second as decoupled weight decay; drop --opt-wd, or pass --opt-wd 0."
            )
        args.prior_mean = args.prior_mean or "init"
        if not (args.max_train_steps or args.n_epochs):
            notice_once(f"{flag} has no effect: nothing is trained.")

    def begin_loop(self, steps_before: int = 0) -> None:
        """With a prior around what is trained now, which every process has alike by then.

        A resumed run has built the same start again, from its seed or --load-lora-path, before the
        state replaces it.
        """
        super().begin_loop(steps_before)
        args = self.args
        if _precision(args) is None:
            return
        num_rows = self.dataset.num_samples
        self.prior = GaussianPrior(
            self.trainable_parameters(), args.prior_precision, args.prior_mean, num_rows
        )
        self.described_prior = Prior(
            precision=args.prior_precision,
            mean=args.prior_mean,
            n_parameters=sum(p.numel() for p in self.prior.parameters),
            n_examples=num_rows,
        )

    def optimizer_step(self) -> dict[str, float | Tensor]:
        if self.prior is None:
            return super().optimizer_step()
        value = self.prior.add_gradients()
        return {"prior": value, **super().optimizer_step()}

    def method_config(self) -> dict[str, Any]:
        if self.described_prior is None:
            return {}
        return {"gaussian_prior": self.described_prior.model_dump()}

    def take_posterior(self, folder: Path, record: PosteriorRecord | None) -> None:
        super().take_posterior(folder, record)
        if record is not None:
            found = self.described(record, f"--load-lora-path: {folder / RECORD_FILE}")
            self.described_prior = found.gaussian_prior


def _precision(args) -> float | None:
    """--prior-precision; a subclass may have flags of its own instead of this method's."""
    return getattr(args, "prior_precision", None)


class GaussianPrior:
    """The prior's share of the objective, and of its gradient.

    Args:
        named_parameters: (name, parameter) of all that is trained; A and B are picked out. Biases
            and the weights of a classification head that is trained whole are outside the prior.
        precision: lambda.
        mean: "init": theta_0 is what the parameters are now; "zero": the origin.
        num_rows: N, the number of training rows.
    Attributes:
        parameters: the matrices that the prior is over.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        precision: float,
        mean: str,
        num_rows: int,
    ) -> None:
        self.parameters = [p for name, p in named_parameters if MATRICES & set(name.split("."))]
        self.weight = precision / num_rows
        self._means: list[Tensor] | None = None
        if mean == "init":
            self._means = [p.detach().clone() for p in self.parameters]

    def add_gradients(self) -> Tensor:
        r"""Add $\frac\lambda N (\theta - \theta_0)$ to `.grad`, once an update.

        To be called between the last backward and the optimizer's step: the gradients are those of
        all batches and processes by then, so the prior counts once however many there are, and the
        optimizer sees it as it sees the likelihood.

        Returns:
            the share of the objective, $\frac{\lambda}{2N} |\theta - \theta_0|^2$: a scalar.
        """
        with torch.no_grad():
            away = [p.detach() for p in self.parameters]
            if self._means is not None:
                away = torch._foreach_sub(away, self._means)
            for parameter in self.parameters:
                if parameter.grad is None:  # a layer that no row of the update went through
                    parameter.grad = torch.zeros_like(parameter)
            torch._foreach_add_([p.grad for p in self.parameters], away, alpha=self.weight)
            squares = torch.stack(torch._foreach_norm(away)).double().square().sum()
            return self.weight / 2 * squares
