r"""Laplace-LoRA (Yang et al., arXiv 2308.13111): a Gaussian posterior around a trained adapter.

Post hoc: $q(\theta) = N(\theta_{MAP}, (H + \lambda I)^{-1})$ over the LoRA matrices, H the
generalised Gauss-Newton matrix of the training set's negative log-likelihood (the Fisher
information of a softmax), and $\lambda$ the precision of the prior $N(0, \lambda^{-1} I)$, by
maximising the Laplace evidence (MacKay 1992; Immer et al., arXiv 2104.04975)

    log p(D) ~ log p(D | MAP) - (lambda |MAP|^2 + log det(H + lambda I) - P log lambda) / 2

or by the NLL of held-out rows. The predictive is that of the linearised model,
$f(x) \sim N(f_{MAP}(x), J \Sigma J^\top)$ with the full covariance of the C class logits.

Curvature and Jacobians come from `lora_curvature`, posterior algebra and evidence from
laplace-torch (Daxberger et al., arXiv 2106.14806).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from pydantic import Field, FiniteFloat, field_validator, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from modelwrappers.engine.posterior import PosteriorRecord
from modelwrappers.engine.prediction import gather_rows
from modelwrappers.engine.results import peak_memory
from modelwrappers.lora.backbone import adapter_acts
from modelwrappers.lora.curvature import (
    CURVATURES,
    Projection,
    Tape,
    block_tensors,
    read_blocks,
    softmax_hessian_root,
)
from modelwrappers.lora.heads import head_modules
from modelwrappers.lora.sharding import shards_base
from modelwrappers.lora.stochastic import variant_name
from modelwrappers.wrapperbase import Batch, WrapperBase
from utils.adapter_base import RECORD_FILE
from utils.args import between, whole
from utils.errors import RunError, UsageError, quoted
from utils.logging import logger
from utils.metrics import negative_log_likelihood, posterior_predictive
from utils.records import (
    Count,
    Name,
    Nonnegative,
    Positive,
    Record,
    check_tensor,
    read_tensors,
)
from utils.seeding import mix_seed

FACTORS_FILE = "laplace.safetensors"
MOST_PARAMETERS_OF_FULL = 5_000
DRAWS = 500  # of the logits' Gaussian, which cost next to nothing
# Values of the prior precision that --laplace-prior-precision validation tries.
GRID = torch.logspace(-2, 6, 33, dtype=torch.float64)


def _prior_precision(text: str) -> str | float:
    return text if text in ("evidence", "validation") else between(1e-12, 1e12)(text)


class Fit(Record):
    """How a posterior was fitted: what is needed again, and what is told."""

    hessian: Literal["kron", "diag", "full"]
    prior_precision: Annotated[Positive, Field(le=1e30)]
    log_marginal_likelihood: FiniteFloat | None = None
    n_parameters: Count | None = None
    n_examples: Count | None = None
    factor_bytes: Count | None = None
    seconds: Nonnegative | None = None
    peak_memory_bytes: Count | None = None
    peak_memory_before_bytes: Count | None = None


class Description(Record):
    """Laplace's part of bayes_config.json.

    Attributes:
        laplace: the fit; None while the adapter is a point estimate.
        projections: the LoRA matrices that the posterior covers, in the order of its factors.
    """

    laplace: Fit | None
    projections: list[Name]

    @field_validator("laplace", mode="before")
    @classmethod
    def _nothing_fitted(cls, value: Any) -> Any:
        return None if value == {} else value

    @model_validator(mode="after")
    def _covers_something(self) -> Description:
        if self.laplace is not None and not self.projections:
            raise ValueError("'projections' names no LoRA matrix")
        if len(set(self.projections)) < len(self.projections):
            raise ValueError("'projections' names a LoRA matrix twice")
        return self


class Laplace(WrapperBase):
    """Laplace posterior on a trained adapter, or on one that this run trains first as MAP does."""

    is_stochastic = True
    draws_kind = "antithetic"  # of the logits, see `_standard_normal`
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
        self._head = f"base_model.model.{head[0]}" if head else None
        self.posterior = None  # of laplace-torch; None while the adapter is a point estimate
        self.projections: list[Projection] = []
        self.description: dict[str, Any] = {}
        self.hessian = self.args.laplace_hessian

    # --- hooks ------------------------------------------------------------------------------------

    def prepare_for_fit_evaluate(self, dataset, wandb_logger=None) -> None:
        """What cannot be fitted should not wait for the training."""
        super().prepare_for_fit_evaluate(dataset, wandb_logger)
        if self.posterior is None:
            self.projections = self._select_projections()
            _posterior_class(self.hessian)

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
            choices=sorted(CURVATURES),
            default="kron",
            help="structure of the curvature",
        )
        group.add_argument(
            "--laplace-rank",
            type=whole(0, 100_000),
            default=64,
            help="rank of Kronecker factors wider than twice as much; 0: exact",
        )
        group.add_argument(
            "--laplace-prior-precision",
            type=_prior_precision,
            default="evidence",
            metavar="{evidence,validation,NUMBER}",
            help="how the prior's precision is found, or its value",
        )
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
        if args.laplace_prior_precision == "validation":
            if args.hold_out is False:
                raise UsageError(
                    "--laplace-prior-precision validation needs rows that were not trained on, but "
                    "the training set is whole (--hold-out false, or so the adapter's run was "
                    "made); train with --hold-out, or pass evidence."
                )
            args.hold_out = True

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
        curvature, loss, num_rows = self._sum_curvature(self.dataset.train_eval_dataloader)
        self.posterior = self._build_posterior(curvature.blocks())
        self.posterior.loss, self.posterior.n_data = loss, num_rows
        self._set_prior_precision()
        evidence = self.posterior.log_marginal_likelihood().item()
        factors = self.posterior_tensors().values()
        self.description = {
            "hessian": self.hessian,
            "prior_precision": self.posterior.prior_precision.item(),
            "log_marginal_likelihood": evidence,
            "n_parameters": self.posterior.n_params,
            "n_examples": num_rows,
            "factor_bytes": sum(t.numel() * t.element_size() for t in factors),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(device),  # of the process, on a GPU of the fit alone
            "peak_memory_before_bytes": peak_before,
        }
        logger.info(
            "Laplace: %s curvature of %d parameters from %d rows, %.1f MB, in %.1f s, peak memory "
            "%.0f MB; prior precision %.4g, log evidence %.2f",
            self.hessian,
            self.posterior.n_params,
            num_rows,
            self.description["factor_bytes"] / 1e6,
            self.description["seconds"],
            self.description["peak_memory_bytes"] / 1e6,
            self.description["prior_precision"],
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
        Without a posterior, with `sample=False`, and where the adapter is merged or disabled, the
        model's own logits (N = 1).
        """
        if self.posterior is None or not sample or not adapter_acts(self):
            return self.batch_logits(batch).unsqueeze(1)
        # Mixed precision is for the model: a covariance in bfloat16 would be none.
        with torch.autocast(self.accelerator.device.type, enabled=False):
            mean, covariance = self.linearised(batch)
        if self.args.laplace_predictive == "probit":
            return _probit(mean, covariance).unsqueeze(1)
        return _draws(mean, covariance, _standard_normal(mean, n_samples))

    def linearised(self, batch: Batch) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C C"]]:
        """Mean and covariance of the class logits under the posterior."""
        parts = [
            (logits, self._covariance(jacobians, beyond))
            for logits, jacobians, beyond in self._jacobians(batch)
        ]
        mean, covariance = (torch.cat(column) for column in zip(*parts, strict=True))
        # eigh would raise on a row whose numbers are not finite: it gets no covariance and a mean
        # of NaN, and the evaluation names it.
        broken = ~(covariance.flatten(1).isfinite().all(1) & mean.isfinite().all(1))
        return (
            mean.masked_fill(broken[:, None], torch.nan),
            covariance.masked_fill(broken[:, None, None], 0.0),
        )

    def _jacobians(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(logits (b, C), Jacobians (b, C, P), Jacobians in head rows outside of the posterior).

        As many rows at a time as training takes, or fewer where the Jacobians are long.
        """
        beyond = self._unfitted_rows()
        classes = self.num_classes
        size = max(1, min(self.args.batch_size, 2**28 // (classes * self.posterior.n_params)))
        for rows in _slices(batch, size):
            # An evaluation runs in inference mode, whose tensors no gradient may come from.
            with torch.inference_mode(False), torch.enable_grad():
                inputs = {key: value.clone() for key, value in rows.items()}
                with Tape([*self.projections, *beyond]) as tape, self.accelerator.autocast():
                    logits = self.batch_logits(inputs)
                jacobians = tape.jacobians(logits)
            inside = self.posterior.n_params
            yield logits.detach().float(), jacobians[..., :inside], jacobians[..., inside:]

    def _covariance(self, jacobians: Tensor, beyond: Tensor) -> Float[Tensor, "b C C"]:
        covariance = self.posterior.functional_variance(jacobians).double()
        # No training example has said anything about these rows: they have the prior's variance.
        beyond = beyond.double()
        return covariance + beyond @ beyond.mT / self.posterior.prior_precision.item()

    @property
    def num_classes(self) -> int:
        """C, as far as memory is concerned."""
        return len(self.answer_tokens) if self.is_causal else self.base_model.config.num_labels

    # --- what the posterior covers ----------------------------------------------------------------

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        """The layers of --laplace-layers.

        Raises:
            UsageError: there is none, or one that is no pair of linear maps.
        """
        adapter, found = self.active_adapter, self._lora_layers()
        if self.args.laplace_layers == "last_layer":
            found = [(name, layer) for name, layer in found if name == self._head]
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

    def _lora_layers(self) -> list[tuple[str, LoraLayer]]:
        return [
            (name, layer)
            for name, layer in self.named_modules()
            if isinstance(layer, LoraLayer) and self.active_adapter in layer.scaling
        ]

    def _pairs(self, layers: list[tuple[str, LoraLayer]]) -> list[Projection]:
        adapter = self.active_adapter
        projections = []
        for name, layer in layers:
            # Class logits depend on few of the rows of a causal LM's head.
            rows = self.target_ids if self.is_causal and name == self._head else None
            projections += [
                Projection(f"{name}.lora_A.weight", layer.lora_A[adapter]),
                Projection(f"{name}.lora_B.weight", layer.lora_B[adapter], rows),
            ]
        return projections

    def _select_projections(self) -> list[Projection]:
        projections = self._pairs(self._layers())
        number = sum(projection.weight.numel() for projection in projections)
        if self.hessian == "full" and number > MOST_PARAMETERS_OF_FULL:
            raise UsageError(
                f"--laplace-hessian full keeps a square matrix over all parameters, but there are "
                f"{number}, more than {MOST_PARAMETERS_OF_FULL}; pass --laplace-hessian kron, or "
                "--laplace-layers last_layer with --apply-classhead-lora."
            )
        return projections

    def _unfitted_rows(self) -> list[Projection]:
        """The head's rows of answer tokens that the posterior was not fitted on."""
        beyond = []
        for name, module, rows in self.projections:
            if rows is not None:
                others = self.answer_tokens[~torch.isin(self.answer_tokens, rows)]
                beyond += [Projection(name, module, others)] if len(others) else []
        return beyond

    # --- fitting ----------------------------------------------------------------------------------

    def _sum_curvature(self, loader: Iterable[Batch]) -> tuple[Any, Tensor, int]:
        """(curvature, sum of the NLL, number of rows) of the training set, over all processes."""
        accelerator, device = self.accelerator, self.accelerator.device
        curvature = CURVATURES[self.hessian](self.projections, self.args.laplace_rank)
        loss = torch.zeros((), device=device, dtype=torch.float64)
        seen: set[int] = set()
        was_training = self.training
        self.eval()
        try:
            for batch in tqdm(
                loader, desc="curvature", disable=not accelerator.is_local_main_process
            ):
                batch = send_to_device(batch, device)
                batch["new"] = self._first_seen(batch["index"], seen)
                for rows in _slices(batch, self.args.batch_size):
                    new, labels = rows.pop("new"), rows["labels"]
                    with Tape(self.projections) as tape, accelerator.autocast():
                        logits = self.batch_logits(self.model_inputs(rows)).float()
                    if not logits.isfinite().all():
                        raise RunError(
                            f"the logits of the training rows {rows['index'].tolist()} are not "
                            "numbers; the adapter has diverged, or its data type overflows."
                        )
                    root = softmax_hessian_root(logits) * new[:, None, None]
                    curvature.add(tape, logits, root)
                    nll = nn.functional.cross_entropy(logits.detach(), labels, reduction="none")
                    loss += (nll * new).sum()
        finally:
            self.train(was_training)
        if accelerator.num_processes > 1:
            for total in (loss, *curvature.tensors()):
                total.copy_(accelerator.reduce(total, reduction="sum"))
        return curvature, loss, len(seen)

    def _first_seen(self, index: Tensor, seen: set[int]) -> Float[Tensor, " B"]:
        """1 for rows that no process has had before, 0 for those that fill up a last batch."""
        accelerator = self.accelerator
        everywhere = index[None]
        if accelerator.num_processes > 1:
            padded = accelerator.pad_across_processes(index, pad_index=-1)
            everywhere = accelerator.gather(padded[None])
        new = torch.ones(len(index), device=index.device)
        for process, rows in enumerate(everywhere.tolist()):
            if process == accelerator.process_index:
                new = torch.tensor([float(r not in seen) for r in index.tolist()]).to(index.device)
            seen.update(row for row in rows if row >= 0)
        return new

    def _build_posterior(self, blocks: list[list[tuple[Tensor, Tensor]]]):
        """laplace-torch's posterior with our curvature in it; its small sums are in float64."""
        weights = nn.ParameterList([p.weight.double() for p in self.projections])
        posterior = _posterior_class(self.hessian)(weights, "classification")
        posterior.mean = nn.utils.parameters_to_vector(weights).detach()
        posterior.blocks = blocks
        posterior.take(blocks)
        return posterior

    def _set_prior_precision(self) -> None:
        wanted = self.args.laplace_prior_precision
        if wanted == "evidence":
            with warnings.catch_warnings():  # it warns of a default that evidence does not use
                warnings.simplefilter("ignore")
                self.posterior.optimize_prior_precision(
                    method="marglik", prior_structure="scalar", n_steps=300
                )
        elif wanted == "validation":
            self.posterior.prior_precision = self._best_on(self.dataset.held_out_dataloader)
        else:
            self.posterior.prior_precision = wanted

    def _best_on(self, loader: Iterable[Batch]) -> float:
        """The prior precision of `GRID` with the lowest NLL of `loader`'s rows.

        The Jacobians of a batch serve all values, and so do the draws: the curve has no noise of
        its own between its points.
        """
        log_probs: list[list[Tensor]] = [[] for _ in GRID]
        labels, index = [], []
        draws = self.args.bayes_eval_n_samples_final
        self.eval()
        for batch in tqdm(loader, desc="prior", disable=not self.accelerator.is_local_main_process):
            batch = send_to_device(batch, self.accelerator.device)
            labels.append(batch["labels"])
            index.append(batch["index"])
            torch.manual_seed(mix_seed("prior", self.args.seed_sampling, int(batch["index"][0])))
            for logits, jacobians, beyond in self._jacobians(self.model_inputs(batch)):
                noise = _standard_normal(logits, draws)
                for values, precision in zip(log_probs, GRID, strict=True):
                    self.posterior.prior_precision = precision.item()
                    covariance = self._covariance(jacobians, beyond)
                    if self.args.laplace_predictive == "probit":
                        drawn = _probit(logits, covariance).unsqueeze(1)
                    else:
                        drawn = _draws(logits, covariance, noise)
                    values.append(posterior_predictive(drawn.float().log_softmax(-1)))
        gathered = [
            gather_rows(
                self.accelerator,
                torch.cat(values).unsqueeze(1),
                torch.cat(labels),
                torch.cat(index),
            )
            for values in log_probs
        ]
        nll = [negative_log_likelihood(p.log_probs[:, 0], p.labels) for p in gathered]
        return GRID[min(range(len(nll)), key=nll.__getitem__)].item()

    # --- on disk ----------------------------------------------------------------------------------

    def posterior_tensors(self) -> dict[str, Tensor]:
        """The posterior's factors: eigenvectors and eigenvalues, by projection."""
        if self.posterior is None:
            return {}
        tensors = block_tensors(self.posterior.blocks)
        for projection in self.projections:
            if projection.rows is not None:
                tensors["rows"] = projection.rows
        return tensors

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
        self._take_factors(found, read_tensors(folder / FACTORS_FILE, "--load-lora-path"), where)
        given = self.args.given
        if isinstance(given.get("laplace_prior_precision"), float):
            self.posterior.prior_precision = given["laplace_prior_precision"]
            self.description["prior_precision"] = given["laplace_prior_precision"]
        logger.info(
            "Laplace: %s has its curvature already (%s, %d parameters, prior precision %.4g); "
            "flags of the fit but a number for --laplace-prior-precision have no effect.",
            folder,
            self.hessian,
            self.posterior.n_params,
            self.posterior.prior_precision.item(),
        )

    def _take_factors(self, found: Description, tensors: dict[str, Tensor], where: str) -> None:
        """The posterior that `posterior_tensors` and `method_config` describe.

        Raises:
            UsageError: they do not fit each other or the adapter.
        """

        def refuse(reason: str) -> NoReturn:
            raise UsageError(
                f"{where}: {reason}; fit the posterior again on the adapter that it was made from."
            )

        device = self.accelerator.device
        self.description, self.hessian = found.laplace.model_dump(), found.laplace.hessian
        head = f"{self._head}.lora_B.weight"
        modules = {p.name: p.module for p in self._pairs(self._lora_layers())}
        rows = None
        if "rows" in tensors:
            rows = check_tensor(tensors, "rows", (None,), where, (torch.int64,)).to(device)
            tensors = {key: value for key, value in tensors.items() if key != "rows"}
        self.projections = []
        for name in found.projections:
            if name not in modules:
                refuse(
                    f"{RECORD_FILE} names {quoted(name)}, which is no LoRA matrix of the adapter"
                )
            is_head = name == head and self.is_causal
            if is_head and rows is None:
                refuse("the tensor 'rows', the head's answer tokens, is missing")
            height = len(modules[name].weight)
            if is_head and not (
                0 < len(rows) == len(rows.unique()) and rows.min() >= 0 and rows.max() < height
            ):
                refuse(f"'rows' must be different numbers below {height}, rows of the head")
            self.projections.append(Projection(name, modules[name], rows if is_head else None))
        shapes = [tuple(projection.weight.shape) for projection in self.projections]
        if self.hessian != "kron":
            shapes = [(sum(math.prod(shape) for shape in shapes),)]
        blocks = read_blocks(tensors, shapes, self.hessian == "diag", where, refuse)
        blocks = [[(q.to(device), v.to(device)) for q, v in block] for block in blocks]
        self.posterior = self._build_posterior(blocks)
        self.posterior.prior_precision = found.laplace.prior_precision


def _posterior_class(structure: str):
    """laplace-torch's class for a structure of the curvature, imported where it is needed.

    Raises:
        UsageError: the library is not there.
    """
    try:
        from modelwrappers.lora.laplace_torch import POSTERIORS
    except ImportError as error:
        raise UsageError(
            f"Laplace needs laplace-torch, which cannot be imported ({error}); run: "
            "pip install --no-deps -r requirements-laplace.txt"
        ) from None
    return POSTERIORS[structure]


def _slices(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch["input_ids"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}


def _standard_normal(mean: Tensor, n_samples: int) -> Float[Tensor, "B N C"]:
    """Pairs of opposite sign: odd parts of what is averaged have no noise."""
    shape = (mean.shape[0], (n_samples + 1) // 2, mean.shape[1])
    half = torch.randn(shape, dtype=torch.float64, device=mean.device)
    return torch.stack([half, -half], dim=2).flatten(1, 2)[:, :n_samples]


def _draws(mean: Tensor, covariance: Tensor, noise: Tensor) -> Float[Tensor, "B N C"]:
    """f = mean + S e with S S^T the covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)  # (B, C, C)
    return (mean.double().unsqueeze(1) + noise @ root.mT).float()


def _probit(mean: Tensor, covariance: Tensor) -> Float[Tensor, "B C"]:
    """MacKay's approximation of the mean softmax (1992) as laplace-torch has it.

    It takes each logit's own variance, the part that all logits share included.
    """
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (mean / (1 + math.pi / 8 * variance).sqrt()).float()
