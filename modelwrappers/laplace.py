r"""Laplace-LoRA (Yang et al., arXiv 2308.13111): a Gaussian posterior around a trained adapter.

Post hoc: $q(\theta) = N(\theta_{MAP}, (H + \Lambda)^{-1})$ over the LoRA matrices, H the
generalised Gauss-Newton matrix of the training set's negative log-likelihood (the Fisher
information of a softmax), and $\Lambda$ the precision of the prior $N(\mu, \Lambda^{-1})$: one
number, or one for each matrix. It is found by maximising the Laplace evidence (MacKay 1992; Immer
et al., arXiv 2104.04975)

    log p(D) ~ log p(D | MAP) - (|MAP - mu|^2_Lambda + log det(H + Lambda) - log det Lambda) / 2

or by the NLL of held-out rows. The predictive is that of the linearised model,
$f(x) \sim N(f_{MAP}(x), J \Sigma J^\top)$ with the full covariance of the C class logits. The
adapter need not be that model's mode under the chosen prior; --laplace-refit goes there (arXiv
2206.08900), and the mean is $f_{MAP}(x) + J (\theta' - \theta_{MAP})$ then.

Curvature and Jacobians come from `lora.curvature`, the mode from `lora.linearised`, posterior
algebra and evidence from laplace-torch (Daxberger et al., arXiv 2106.14806). A classification head
that is trained whole (PEFT's modules_to_save) is outside the posterior: it stays as it was trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from modelwrappers.engine.posterior import PosteriorRecord
from modelwrappers.engine.prediction import gather_rows
from modelwrappers.engine.results import peak_memory
from modelwrappers.lora.backbone import adapter_acts
from modelwrappers.lora.curvature import (
    SHARINGS,
    STRUCTURES,
    Projection,
    Tape,
    block_tensors,
)
from modelwrappers.lora.heads import head_modules
from modelwrappers.lora.laplace_fit import LaplaceFit, posterior_class, slices
from modelwrappers.lora.laplace_prior import (
    add_prior_arguments,
    grid,
    settle_prior,
    settle_start,
    shown_precision,
    tell_end_of_grid,
)
from modelwrappers.lora.laplace_record import Description, Fit, read_factors
from modelwrappers.lora.linearised import draw, probit, standard_normal
from modelwrappers.lora.projections import covered_layers, lora_layers, pairs_of, rows_beyond
from modelwrappers.lora.sharding import shards_base
from modelwrappers.wrapperbase import Batch, WrapperBase
from utils.adapter_base import RECORD_FILE
from utils.args import whole
from utils.errors import UsageError
from utils.logging import logger
from utils.metrics import negative_log_likelihood, posterior_predictive
from utils.records import read_tensors
from utils.seeding import mix_seed

FACTORS_FILE = "laplace.safetensors"
MOST_PARAMETERS_OF_FULL = 5_000
DRAWS = 500  # of the logits' Gaussian, which cost next to nothing


class Laplace(LaplaceFit, WrapperBase):
    """Laplace posterior on a trained adapter, or on one that this run trains first as MAP does."""

    is_stochastic = True
    draws_kind = "antithetic"  # of the logits, see `standard_normal`
    Description = Description
    adapter_files = (*WrapperBase.adapter_files, FACTORS_FILE)
    posterior_file = FACTORS_FILE
    posterior_flags = (
        "laplace_layers",
        "laplace_hessian",
        "laplace_rank",
        "laplace_predictive",
        "bayes_inference_notsample",
    )

    def __init__(
        self, model, peft_config, args=None, accelerator=None, adapter_name="default", **settings
    ) -> None:
        head = head_modules(model)[-1:]
        super().__init__(model, peft_config, args, accelerator, adapter_name, **settings)
        if self.shares_positions:
            raise UsageError(
                "Laplace needs the Jacobian of each example, but this DeBERTa sends one table of "
                "positions for all of them through its adapted layers; choose another model."
            )
        if shards_base(self.accelerator):
            raise UsageError(
                "Laplace takes the gradients of each row by itself, and processes that gather one "
                "base together would wait for each other; launch it without FSDP, e.g. with "
                "configs/accelerate/ddp.yaml."
            )
        if self.args.laplace_refit and self.accelerator.num_processes > 1:
            raise UsageError(
                "--laplace-refit holds the Jacobians of all training rows in one process, but this "
                f"run has {self.accelerator.num_processes}; fit the posterior in one process (what "
                "it saves is then evaluated in any number), or drop --laplace-refit."
            )
        self._head = f"base_model.model.{head[0]}" if head else None
        self.posterior = None  # of laplace-torch; None while the adapter is a point estimate
        self.projections: list[Projection] = []
        self.description: dict[str, Any] = {}
        self.hessian = self.args.laplace_hessian
        # from the trained adapter to the linearised model's mode, (P,); None: they are the same
        self.shift: Float[Tensor, " P"] | None = None
        # LoRA matrix -> its values before training, where they are the prior's mean
        self.prior_start: dict[str, Tensor] | None = None
        if self.args.laplace_prior_mean == "init":
            self.prior_start = {p.name: p.module.weight.detach().clone() for p in self._all_pairs()}

    # --- hooks ------------------------------------------------------------------------------------

    def prepare_for_fit_evaluate(self, dataset, wandb_logger=None) -> None:
        """What cannot be fitted should not wait for the training."""
        super().prepare_for_fit_evaluate(dataset, wandb_logger)
        if self.posterior is None:
            self.projections = self._select_projections()
            posterior_class(self.hessian)
            if not self.num_training_steps:
                self.prior_mean()

    @classmethod
    def add_arguments(cls, parser) -> None:
        group = parser.add_argument_group("Laplace")
        group.add_argument(
            "--laplace-layers",
            choices=["all", "last_layer"],
            default="all",
            help="every LoRA layer (LA), or the output head's only (LLLA)",
        )
        group.add_argument(
            "--laplace-hessian",
            choices=STRUCTURES,
            default="kron",
            help="structure of the curvature",
        )
        group.add_argument(
            "--laplace-curvature",
            choices=SHARINGS,
            help="how Kronecker factors treat a row's tokens: KFAC-reduce, KFAC-expand, or summed "
            "over all tokens and padding as in the published code (default: reduce; published with "
            "--protocol original)",
        )
        group.add_argument(
            "--laplace-rank",
            type=whole(0, 100_000),
            default=64,
            help="rank of Kronecker factors wider than twice as much; 0: exact",
        )
        add_prior_arguments(group)
        group.add_argument(
            "--laplace-predictive",
            choices=["mc", "probit"],
            default="mc",
            help="mean softmax over draws of the logits, or its probit approximation",
        )

    @classmethod
    def check_arguments(cls, args) -> None:
        if args.load_lora_path is None and not (args.max_train_steps or args.n_epochs):
            raise UsageError(
                "Laplace is a posterior around a trained adapter, but there is none: pass "
                "--load-lora-path, or train one first with --max-train-steps or --n-epochs (in "
                'Python: load_posterior(folder, modelwrapper="laplace"), or max_train_steps=N).'
            )
        if args.opt_wd is None:
            args.opt_wd = 1e-5  # as `map`
        if "bayes_eval_n_samples_final" not in args.given:
            args.bayes_eval_n_samples_final = DRAWS
        _settle_curvature(args)
        trains = args.max_train_steps or args.n_epochs
        if not trains and (Path(args.load_lora_path) / FACTORS_FILE).is_file():
            # a posterior that was fitted already: there is nothing to choose any more
            args.laplace_prior_precision = args.laplace_prior_precision or "evidence"
            args.laplace_prior_mean = "zero"
        elif args.laplace_prior_mean == "init":
            settle_start(args)
        settle_prior(args)

    @classmethod
    def tunes_on_held_out(cls, args) -> bool:
        by_validation = args.laplace_prior_precision == "validation"
        return by_validation or super().tunes_on_held_out(args)

    @classmethod
    def prefix_obstacle(cls, args) -> str | None:
        return "the Jacobians of a row go through all of its tokens"

    @classmethod
    def adaptive_obstacle(cls, args) -> str | None:
        return "draws of the logits cost next to nothing; drop it"

    def final_draws(self) -> int:
        draws = super().final_draws()
        return min(draws, 1) if self.args.laplace_predictive == "probit" else draws

    def fit_posterior(self) -> None:
        """Curvature of the training set, then the prior precision; not for a loaded posterior."""
        if self.posterior is not None:
            return
        self.check_own_data()
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        peak_before = peak_memory(device)
        started = time.perf_counter()
        rounds = self.fit_prior_and_mode()
        posterior = self.posterior
        evidence = posterior.log_marginal_likelihood().item()
        precisions = posterior.prior_precision.tolist()
        factors = self.posterior_tensors().values()
        chosen = self.args.laplace_prior_precision
        self.description = Fit(
            hessian=self.hessian,
            curvature=self.args.laplace_curvature,
            prior_precision=precisions if len(precisions) > 1 else precisions[0],
            prior_precision_by="number" if isinstance(chosen, float) else chosen,
            prior_mean=self.args.laplace_prior_mean,
            refit_rounds=rounds,
            log_marginal_likelihood=evidence,
            n_parameters=posterior.n_params,
            n_examples=posterior.n_data,
            factor_bytes=sum(t.numel() * t.element_size() for t in factors),
            seconds=round(time.perf_counter() - started, 3),
            peak_memory_bytes=peak_memory(device),  # of the process, on a GPU of the fit alone
            peak_memory_before_bytes=peak_before,
        ).model_dump()
        logger.info(
            "Laplace: %s curvature of %d parameters from %d rows, %.1f MB, in %.1f s, peak memory "
            "%.0f MB; prior precision %s, log evidence %.2f",
            " ".join(filter(None, (self.hessian, self.args.laplace_curvature))),
            posterior.n_params,
            posterior.n_data,
            self.description["factor_bytes"] / 1e6,
            self.description["seconds"],
            self.description["peak_memory_bytes"] / 1e6,
            shown_precision(posterior.prior_precision),
            evidence,
        )

    def method_config(self) -> dict[str, Any]:
        return {
            "laplace": self.description,
            "projections": [projection.name for projection in self.projections],
            "factors": FACTORS_FILE,
        }

    # --- prediction -------------------------------------------------------------------------------

    def forward_logits(
        self, batch: Batch, sample: bool = True, n_samples: int = 1, **kwargs
    ) -> Float[Tensor, "B N C"]:
        r"""Class logits of the linearised model, draws of $N(f_{MAP}, J \Sigma J^\top)$.

        With --laplace-predictive probit one slice, $f / \sqrt{1 + \frac\pi8 \mathrm{var} f}$.
        With `sample=False` the mean (N = 1): the model's own logits, or after --laplace-refit those
        of the linearised model at its mode. Without a posterior, and where the adapter is merged or
        disabled, the model's own logits.
        """
        is_own = self.posterior is None or not adapter_acts(self)
        if is_own or (not sample and self.shift is None):
            return self.batch_logits(batch).unsqueeze(1)
        if not sample:
            means = [
                self.mean_logits(logits, jacobians)
                for logits, jacobians, _ in self.row_jacobians(batch)
            ]
            return torch.cat(means).unsqueeze(1)
        # Mixed precision is for the model: a covariance in bfloat16 would be none.
        with torch.autocast(self.accelerator.device.type, enabled=False):
            mean, covariance = self.linearised(batch)
        noise = standard_normal(mean, n_samples)
        return self.drawn_logits(mean, covariance, noise)

    def drawn_logits(
        self, mean: Tensor, covariance: Tensor, noise: Tensor
    ) -> Float[Tensor, "B N C"]:
        if self.args.laplace_predictive == "probit":
            return probit(mean, covariance).unsqueeze(1)
        return draw(mean, covariance, noise)

    def linearised(self, batch: Batch) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C C"]]:
        """Mean and covariance of the class logits under the posterior."""
        parts = [
            (self.mean_logits(logits, jacobians), self.logit_covariance(jacobians, beyond))
            for logits, jacobians, beyond in self.row_jacobians(batch)
        ]
        mean, covariance = (torch.cat(column) for column in zip(*parts, strict=True))
        # eigh would raise on a row whose numbers are not finite: it gets no covariance and a mean
        # of NaN, and the evaluation names it.
        broken = ~(covariance.flatten(1).isfinite().all(1) & mean.isfinite().all(1))
        return (
            mean.masked_fill(broken[:, None], torch.nan),
            covariance.masked_fill(broken[:, None, None], 0.0),
        )

    def row_jacobians(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(logits (b, C), Jacobians (b, C, P), Jacobians in head rows outside of the posterior).

        As many rows at a time as training takes, or fewer where the Jacobians are long.
        """
        beyond = rows_beyond(self.projections, self.answer_tokens)
        inside = sum(self.projection_sizes)
        size = max(1, min(self.args.batch_size, 2**28 // (self.num_classes * inside)))
        for rows in slices(batch, size):
            # An evaluation runs in inference mode, whose tensors no gradient may come from.
            with torch.inference_mode(False), torch.enable_grad():
                inputs = {key: value.clone() for key, value in rows.items()}
                with Tape([*self.projections, *beyond]) as tape, self.accelerator.autocast():
                    logits = self.batch_logits(inputs)
                jacobians = tape.jacobians(logits)
            yield logits.detach().float(), jacobians[..., :inside], jacobians[..., inside:]

    def mean_logits(self, logits: Tensor, jacobians: Tensor, shift: Tensor | None = None) -> Tensor:
        """(b, C) at the linearised model's mode, or at another shift of the weights."""
        shift = self.shift if shift is None else shift
        return logits if shift is None else logits + jacobians @ shift.to(jacobians.dtype)

    def logit_covariance(self, jacobians: Tensor, beyond: Tensor) -> Float[Tensor, "b C C"]:
        covariance = self.posterior.functional_variance(jacobians).double()
        if not beyond.shape[-1]:
            return covariance
        # No training example has said anything about these rows: they have the prior's variance.
        beyond = beyond.double()
        precisions = self.posterior.prior_precision.expand(len(self.projections))
        head = next(i for i, p in enumerate(self.projections) if p.rows is not None)
        return covariance + beyond @ beyond.mT / precisions[head].item()

    @property
    def num_classes(self) -> int:
        """C, as far as memory is concerned."""
        return len(self.answer_tokens) if self.is_causal else self.base_model.config.num_labels

    # --- what the posterior covers ----------------------------------------------------------------

    def _pairs(self, layers) -> list[Projection]:
        rows = self.target_ids if self.is_causal else None
        return pairs_of(layers, self.active_adapter, self._head, rows)

    def _all_pairs(self) -> list[Projection]:
        """Whichever a posterior of this adapter may cover."""
        found = lora_layers(self, self.active_adapter)
        return self._pairs(
            [(n, layer) for n, layer in found if self.active_adapter in layer.lora_A]
        )

    def _select_projections(self) -> list[Projection]:
        which, adapter = self.args.laplace_layers, self.active_adapter
        projections = self._pairs(covered_layers(self, adapter, which, self._head))
        number = sum(projection.weight.numel() for projection in projections)
        if self.hessian == "full" and number > MOST_PARAMETERS_OF_FULL:
            raise UsageError(
                f"--laplace-hessian full keeps a square matrix over all parameters, but there are "
                f"{number}, more than {MOST_PARAMETERS_OF_FULL}; pass --laplace-hessian kron, or "
                "--laplace-layers last_layer with --apply-classhead-lora."
            )
        return projections

    # --- the prior by held-out rows ---------------------------------------------------------------

    def best_on_held_out(self, loader: Iterable[Batch], shifts: list[Tensor] | None) -> float:
        """The prior precision of --laplace-grid with the lowest NLL of `loader`'s rows.

        The Jacobians of a batch serve all values, and so do the draws: the curve has no noise of
        its own between its points.

        Args:
            loader: of held-out rows.
            shifts: for each value from the adapter to the linearised model's mode, (P,); None: the
                adapter is the mode.
        """
        values = grid(*self.args.laplace_grid)
        log_probs: list[list[Tensor]] = [[] for _ in values]
        labels, index = [], []
        self.eval()
        for batch in tqdm(loader, desc="prior", disable=not self.accelerator.is_local_main_process):
            batch = send_to_device(batch, self.accelerator.device)
            labels.append(batch["labels"])
            index.append(batch["index"])
            torch.manual_seed(mix_seed("prior", self.args.seed_sampling, int(batch["index"][0])))
            for logits, jacobians, beyond in self.row_jacobians(self.model_inputs(batch)):
                noise = standard_normal(logits, self.args.bayes_eval_n_samples_final)
                for i, value in enumerate(values):
                    self.posterior.prior_precision = value.item()
                    mean = self.mean_logits(logits, jacobians, shifts[i] if shifts else None)
                    drawn = self.drawn_logits(mean, self.logit_covariance(jacobians, beyond), noise)
                    log_probs[i].append(posterior_predictive(drawn.float().log_softmax(-1)))
        gathered = [
            gather_rows(
                self.accelerator,
                torch.cat(of_value).unsqueeze(1),
                torch.cat(labels),
                torch.cat(index),
            )
            for of_value in log_probs
        ]
        nll = [negative_log_likelihood(p.log_probs[:, 0], p.labels) for p in gathered]
        best = values[min(range(len(nll)), key=nll.__getitem__)].item()
        tell_end_of_grid(best, *self.args.laplace_grid)
        return best

    # --- on disk ----------------------------------------------------------------------------------

    def posterior_tensors(self) -> dict[str, Tensor]:
        """The posterior's factors: eigenvectors and eigenvalues, by projection."""
        if self.posterior is None:
            return {}
        tensors = block_tensors(self.posterior.blocks)
        for projection in self.projections:
            if projection.rows is not None:
                tensors["rows"] = projection.rows
        return tensors if self.shift is None else tensors | {"shift": self.shift}

    def take_posterior(self, folder: Path, record: PosteriorRecord | None) -> None:
        """The curvature of an adapter that was fitted already."""
        if record is None:
            return
        where = (
            f"--load-lora-path: {folder / FACTORS_FILE} and {RECORD_FILE} hold no Laplace "
            "posterior over this adapter"
        )
        found = self.described(record, where)
        if found.laplace is None:  # saved before it was fitted
            return
        fit, device = found.laplace, self.accelerator.device
        tensors = read_tensors(folder / FACTORS_FILE, "--load-lora-path")
        head = f"{self._head}.lora_B.weight" if self.is_causal else None
        factors = read_factors(found, tensors, self._all_pairs(), head, where)
        self.description, self.hessian = fit.model_dump(), fit.hessian
        self.projections = factors.projections
        self.shift = None if factors.shift is None else factors.shift.to(device)
        blocks = [[(q.to(device), v.to(device)) for q, v in block] for block in factors.blocks]
        self.posterior = self.build_posterior(blocks)
        self.posterior.prior_precision = fit.precisions.to(device)
        self._take_given_precision(folder)
        logger.info(
            "Laplace: %s has its curvature already (%s, %d parameters, prior precision %s); "
            "flags of the fit but a number for --laplace-prior-precision have no effect.",
            folder,
            self.hessian,
            self.posterior.n_params,
            shown_precision(self.posterior.prior_precision),
        )

    def _take_given_precision(self, folder: Path) -> None:
        """A number for --laplace-prior-precision, in the place of the one that was fitted.

        Raises:
            UsageError: the posterior's mode belongs to that one.
        """
        wanted = self.args.given.get("laplace_prior_precision")
        if not isinstance(wanted, float):
            return
        if self.shift is not None:
            raise UsageError(
                f"--laplace-prior-precision {wanted:g}: the posterior in {folder} was fitted with "
                "--laplace-refit, so its mode belongs to its own prior precision "
                f"({shown_precision(self.posterior.prior_precision)}); fit it again on the adapter."
            )
        self.posterior.prior_precision = wanted
        self.description |= {"prior_precision": wanted, "prior_precision_by": "number"}
        self.description["log_marginal_likelihood"] = None  # that of the fitted precision


def _settle_curvature(args) -> None:
    """Fill in the default of --laplace-curvature.

    Raises:
        UsageError: it contradicts --laplace-hessian or --laplace-rank.
    """
    if args.laplace_hessian != "kron":
        if args.laplace_curvature is not None:
            raise UsageError(
                f"--laplace-curvature {args.laplace_curvature} is a kind of Kronecker factors, but "
                f"--laplace-hessian {args.laplace_hessian} has none; pass --laplace-hessian kron, "
                "or drop --laplace-curvature."
            )
        return
    if args.laplace_curvature is None:
        args.laplace_curvature = "published" if args.protocol == "original" else "reduce"
    if args.laplace_curvature == "published":
        if args.laplace_rank and "laplace_rank" in args.given:
            raise UsageError(
                f"--laplace-rank {args.laplace_rank} truncates the factors, but "
                "--laplace-curvature published (the default of --protocol original) has dense "
                "ones; drop --laplace-rank, or pass --laplace-curvature reduce or expand."
            )
        args.laplace_rank = 0
