r"""TFB, training-free Bayesianization of a trained adapter (arXiv 2412.05723).

Per layer $B = U D V^T$; the product stays the same with $B' = U D$ and $A' = V^T A$. A' gets
Gaussian noise with $\Omega_{ij} = \sigma_q / d_i$, so that the noise of the weights is isotropic in
B's column space: $B' (\Omega \circ E) = \sigma_q U E$. One scalar $\sigma_q$ serves the
whole model: the largest one that leaves the predictions of an anchor set within a tolerance, or
with `--iter 0` the value of `--bayes-beta`, without a search. The result is an ordinary posterior
adapter; its draws run on the layer that BLoB's do.

The adapter is a point estimate, or the mean of a Gaussian posterior such as BLoB's, whose own width
is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor

from modelwrappers.engine.posterior import PosteriorRecord, read_posterior_record
from modelwrappers.lora.stochastic import (
    RHO,
    GaussianPosterior,
    posterior_mean,
    spread_tensors,
)
from modelwrappers.wrapperbase import Batch, WrapperBase
from utils.adapter_base import RECORD_FILE
from utils.args import (
    above,
    add_switch,
    add_without_effect,
    compatibility_group,
    whole,
)
from utils.errors import RunError, UsageError
from utils.logging import logger, notice_once
from utils.metrics import negative_log_likelihood, posterior_predictive
from utils.records import Count, Name, Nonnegative, Positive, Record
from utils.registry import names_code

SMALLEST_SIGMA = 0.001
# Flags of BLoB that stand in existing command lines of tfblora.
_UNUSED_VALUES = (
    "--bayes-eps",
    "--bayes-gamma",
    "--bayes-kllr",
    "--bayes-final-beta",
    "--bayes-flipout",
)


class Step(Record):
    """One sigma that the search has tried."""

    sigma_q: Positive
    change: Nonnegative
    accepted: bool


class MadeFrom(Record):
    """The adapter that got the noise.

    Attributes:
        run: the name of its folder.
        method: that made it; None where no record says so.
        taken: all of it, or the mean of a Gaussian posterior.
    """

    run: Name
    method: Name | None
    taken: Literal["point estimate", "posterior mean"]


class Description(Record):
    """TFB's part of bayes_config.json.

    Attributes:
        tolerance: --th.
        search: what was tried, in this order; nothing with --iter 0.
        search_rule: --tfb-search.
        anchors, n_anchors: which rows the search looked at, and how many.
        made_from: None in records of before that was kept.
    """

    parametrisation: Literal["std = lora_A_rho^2"]
    sigma_q: Positive | None
    criterion: Literal["nll", "flips"]
    tolerance: Positive
    search: Annotated[list[Step], Field(max_length=10_000)]
    search_rule: Literal["within", "published"] = "within"
    anchors: Literal["train", "validation", "held-out"] | None = None
    n_anchors: Count | None = None
    made_from: MadeFrom | None = None


class TFB(GaussianPosterior, WrapperBase):
    """Gaussian posterior on A, found by search instead of training."""

    Description = Description
    posterior_flags = ("bayes_inference_notsample", *GaussianPosterior.draw_flags)

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)
        self.attach(adapter_name, self.args.flipout_eval, 1.0)
        self.sigma: float | None = None
        self.search: list[dict[str, float | bool]] = []
        self.criterion, self.tolerance = self.args.tfb_criterion, self.args.th
        self.search_rule = self.args.tfb_search
        self.anchors: str | None = None  # which rows the search looks at
        self.num_anchors: int | None = None
        self.made_from: MadeFrom | None = None
        self._loads_spread = False  # whether the adapter's file has a width of its own

    # --- hooks ------------------------------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser) -> None:
        group = parser.add_argument_group("TFB")
        group.add_argument(
            "--th",
            type=above(0, 1e6),
            help="tolerance of the search (default: 0.003; flips 0.01)",
        )
        group.add_argument(
            "--iter",
            type=whole(0, 1_000),
            default=5,
            help="steps of the bisection; 0: no search, sigma_q is --bayes-beta",
        )
        group.add_argument(
            "--bayes-beta", type=above(0, 1e6), default=0.015, help="largest sigma_q tried"
        )
        group.add_argument(
            "--tfb-criterion",
            choices=["nll", "flips"],
            help="what the tolerance bounds: relative change of the NLL, share of changed answers "
            "(default: nll; tfblora_acc flips)",
        )
        group.add_argument(
            "--tfb-search",
            choices=["within", "published"],
            help="take the largest sigma tried that keeps the tolerance, or search as the "
            "published code does (default: within; original published)",
        )
        group.add_argument(
            "--tfb-anchors",
            choices=["train", "held-out"],
            help="which rows the search looks at (default: train, or those of --testing-set "
            "train_val_val)",
        )
        cls.add_draw_arguments(group, "--flipout")  # it trains nothing: there is but one
        for name in ("--bayes-klreweighting", "--bayes-datasetrescaling"):
            add_switch(compatibility_group(parser), name, help="no effect: nothing is trained")
        add_without_effect(parser, "nothing is trained", *_UNUSED_VALUES)

    @classmethod
    def check_arguments(cls, args) -> None:
        cls.settle_draws(args)
        if args.load_lora_path is None:
            raise UsageError(
                "TFB makes a trained adapter Bayesian, but there is none; pass --load-lora-path "
                '(in Python: load_posterior(folder, modelwrapper="tfb")).'
            )
        if args.max_train_steps or args.n_epochs:
            notice_once("TFB trains nothing: --max-train-steps and --n-epochs have no effect.")
            args.max_train_steps = args.n_epochs = 0
        if args.iter and args.bayes_beta <= SMALLEST_SIGMA:
            raise UsageError(
                f"--bayes-beta is {args.bayes_beta}; the search goes from {SMALLEST_SIGMA} up to "
                "it, so it must be larger. With --iter 0 it is sigma_q itself, without a search."
            )
        for name in _UNUSED_VALUES:
            if getattr(args, name.removeprefix("--").replace("-", "_")) is not None:
                notice_once(f"{name} has no effect: TFB trains nothing.")
        criterion = "flips" if args.modelwrapper == "tfblora_acc" else "nll"
        args.tfb_criterion = args.tfb_criterion or criterion
        args.th = args.th or {"nll": 0.003, "flips": 0.01}[args.tfb_criterion]
        if args.tfb_search is None:
            args.tfb_search = "published" if args.protocol == "original" else "within"
        cls._check_anchors(args)

    @classmethod
    def _check_anchors(cls, args) -> None:
        """Held-out anchors need rows that were held out, and leave those that are evaluated alone.

        Raises:
            UsageError: another flag says otherwise.
        """
        if args.tfb_anchors is None:
            return
        flag = f"--tfb-anchors {args.tfb_anchors}"
        if args.iter == 0:
            notice_once(f"{flag} has no effect: with --iter 0 no anchor is looked at.")
            return
        if args.testing_set == "train_val_val":
            raise UsageError(
                f"{flag} and --testing-set train_val_val, which takes the anchors from the "
                "validation set, contradict; drop one of them."
            )
        if args.tfb_anchors == "train":
            return
        if args.testing_set == "train_val":
            raise UsageError(
                f"{flag} takes the rows that --testing-set train_val evaluates; pass one of them."
            )
        if args.hold_out is False:
            raise UsageError(
                f"{flag} needs rows that the adapter was not trained on, but --hold-out is false; "
                "drop that (the adapter's run must have had --hold-out)."
            )
        args.hold_out = True

    @classmethod
    def tunes_on_held_out(cls, args) -> bool:
        is_searched = args.tfb_anchors == "held-out" and args.iter > 0
        return is_searched or super().tunes_on_held_out(args)

    def method_config(self) -> dict[str, Any]:
        return {
            "parametrisation": "std = lora_A_rho^2",
            "sigma_q": self.sigma,
            "criterion": self.criterion,
            "tolerance": self.tolerance,
            "search": self.search,
            "search_rule": self.search_rule,
            "anchors": self.anchors,
            "n_anchors": self.num_anchors,
            "made_from": self.made_from.model_dump() if self.made_from is not None else None,
        }

    # --- the method -------------------------------------------------------------------------------

    def take_posterior(self, folder: Path, record: PosteriorRecord | None) -> None:
        """Rotate every layer; an adapter that TFB has searched already is taken as it is."""
        found = (
            self.described(record, f"--load-lora-path: {folder / RECORD_FILE}")
            if record is not None
            else None
        )
        if found is None or found.sigma_q is None:
            reparametrise(self, self.active_adapter)
            # until a sigma is found: a width that was made for other axes is none for these
            set_spread(self, self.active_adapter, 0.0)
            self.made_from = self._source(folder)
            return
        self.sigma, self.search = found.sigma_q, [step.model_dump() for step in found.search]
        self.criterion, self.tolerance = found.criterion, found.tolerance
        self.search_rule, self.made_from = found.search_rule, found.made_from
        self.anchors, self.num_anchors = found.anchors, found.n_anchors
        logger.info(
            "TFB: %s has been searched already (sigma_q = %.5f); --th, --iter and other "
            "flags of the search have no effect.",
            folder,
            self.sigma,
        )

    def completed_adapter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._loads_spread = any(key.endswith(RHO) for key in tensors)
        return spread_tensors(self, self.active_adapter) | tensors

    def _source(self, folder: Path) -> MadeFrom:
        """What an adapter that gets its noise here is."""
        method = None
        if (folder / RECORD_FILE).is_file():
            method = read_posterior_record(folder, "--load-lora-path").modelwrapper
            method = method.rpartition(":")[2] if names_code(method) else method  # no path
        if self._loads_spread:
            logger.info(
                "TFB: %s holds a Gaussian posterior%s: its mean is taken, its own width (%s) is "
                "dropped.",
                folder,
                f" of {method}" if method is not None else "",
                RHO,
            )
        taken = "posterior mean" if self._loads_spread else "point estimate"
        return MadeFrom(run=folder.resolve().name or "?", method=method, taken=taken)

    def fit_posterior(self) -> None:
        if self.sigma is not None:
            return
        if self.args.iter == 0:
            self.sigma = self.args.bayes_beta
            set_spread(self, self.active_adapter, self.sigma)
            logger.info("TFB: sigma_q = %.5g (--bayes-beta), without a search", self.sigma)
            return
        self.check_own_data()
        self.sigma = self._searched_sigma(self._anchor_loader())
        logger.info("TFB: sigma_q = %.5f", self.sigma)

    def _anchor_loader(self) -> Iterable[Batch]:
        if self.args.tfb_anchors == "held-out":
            self.anchors = "held-out"
            return self.dataset.held_out_anchor_dataloader
        self.anchors = "validation" if self.args.testing_set == "train_val_val" else "train"
        return self.dataset.anchor_dataloader

    def _searched_sigma(self, anchors: Iterable[Batch]) -> float:
        r"""Bisection on [0.001, --bayes-beta].

        With $c(\sigma)$ the relative change of the anchors' NLL, or the share of changed answers:
        the largest sigma tried with $c(\sigma) \le th$. The published code takes the smallest
        one tried with $c(\sigma) > th$, or --bayes-beta, untried, if there is none; and what it
        holds against th is $c(\sigma) / n$ for the NLL of n anchors, which is $c(\sigma)
        \le n\, th$.

        Raises:
            RunError: not even the smallest meets the tolerance.
        """
        draws = self.args.bayes_eval_n_samples_final
        mean = posterior_predictive(self.predict(anchors, n_samples=0).log_probs)
        labels = mean.argmax(-1)  # the adapter's own answers: no labels are needed
        reference = negative_log_likelihood(mean, labels)
        self.num_anchors = len(labels)
        is_published = self.search_rule == "published"
        by_anchor = is_published and self.criterion == "nll"
        limit = self.tolerance * (self.num_anchors if by_anchor else 1)

        def meets_tolerance(sigma: float) -> bool:
            set_spread(self, self.active_adapter, sigma)
            log_probs = posterior_predictive(self.predict(anchors, draws).log_probs)
            if self.criterion == "nll":
                # the adapter may be sure of every anchor
                difference = abs(negative_log_likelihood(log_probs, labels) - reference)
                change = difference / max(reference, 1e-12)
            else:
                change = (log_probs.argmax(-1) != labels).double().mean().item()
            accepted = change <= limit
            self.search.append({"sigma_q": sigma, "change": change, "accepted": accepted})
            logger.info("TFB: sigma_q %.5f changes the anchors by %.4f", sigma, change)
            return accepted

        # low: the largest sigma that was accepted; high: the smallest that was not
        low, high = SMALLEST_SIGMA, self.args.bayes_beta
        for _ in range(self.args.iter):
            middle = (low + high) / 2
            if meets_tolerance(middle):
                low = middle
            else:
                high = middle
        if not is_published and low == SMALLEST_SIGMA and not meets_tolerance(SMALLEST_SIGMA):
            change = self.search[-1]["change"]
            raise RunError(
                f"no sigma_q meets --th {self.tolerance}: the smallest, {SMALLEST_SIGMA}, "
                f"changes the anchors by {change:.4f}. Raise --th, or take more draws "
                "(--bayes-eval-n-samples-final)."
            )
        sigma = high if is_published else low
        self._tell_where_it_ended(sigma, low, high, limit)
        set_spread(self, self.active_adapter, sigma)
        return sigma

    def _tell_where_it_ended(self, sigma: float, low: float, high: float, limit: float) -> None:
        """A sigma from the last interval at either end of the range is the range's choice."""
        if high == self.args.bayes_beta:
            logger.warning(
                "TFB: the search ended at the upper end of its range, sigma_q = %.5g: no sigma "
                "tried up to --bayes-beta %g changes the anchors by more than %.4g (%.4g at "
                "most). A larger --bayes-beta widens the range.",
                sigma,
                high,
                limit,
                max(step["change"] for step in self.search),
            )
        elif low == SMALLEST_SIGMA:
            logger.warning(
                "TFB: the search ended at the lower end of its range, sigma_q = %.5g: no sigma "
                "tried above %g changes the anchors by %.4g or less, so the posterior is nearly "
                "the adapter itself. A larger --th (%g) lets it leave.",
                sigma,
                SMALLEST_SIGMA,
                limit,
                self.tolerance,
            )


def _layers(model, adapter: str) -> list[tuple[str, LoraLayer]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in getattr(module, RHO, {})
    ]


def _weight_b(module: LoraLayer, adapter: str) -> Tensor:
    if adapter in module.lora_embedding_B:
        return module.lora_embedding_B[adapter]
    return module.lora_B[adapter].weight


def reparametrise(model, adapter: str) -> None:
    r"""Write every layer's product as $B' A'$ with orthogonal columns in B': $U D$ and $V^T A$.

    Raises:
        UsageError: a layer's B is zero, so there is no direction to put noise into.
    """
    for name, module in _layers(model, adapter):
        weight_a, weight_b = posterior_mean(module, adapter), _weight_b(module, adapter)
        # k = min(out, r) directions; a head of few classes has fewer than r
        u, d, vt = torch.linalg.svd(weight_b.detach().double(), full_matrices=False)
        if d[0] == 0:
            raise UsageError(
                f"TFB: B of the layer {name} is zero, so the adapter was never trained; train it."
            )
        rotated = vt @ weight_a.detach().double()  # (k, in)
        weight_b.data.zero_()
        weight_a.data.zero_()
        weight_b.data[:, : len(d)] = (u * d).to(weight_b.dtype)
        weight_a.data[: len(d)] = rotated.to(weight_a.dtype)


def set_spread(model, adapter: str, sigma: float) -> None:
    r"""$\Omega_{ij} = \sigma_q / d_i$, with $d_i$ the length of the i-th column of B'.

    A direction that B does not have ($d_i$ next to nothing) gets no noise.
    """
    for _, module in _layers(model, adapter):
        d = _weight_b(module, adapter).detach().double().norm(dim=0)  # (r,)
        std = torch.where(d > 1e-6 * d.max(), sigma / d.clamp(min=1e-30), 0.0)
        rho = getattr(module, RHO)[adapter]
        rho.data.copy_(std.sqrt()[:, None].expand_as(rho))
