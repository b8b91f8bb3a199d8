"""How a Laplace posterior is fitted: curvature of the training rows, prior precision, mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from modelwrappers.lora.curvature import (
    Block,
    Curvature,
    Tape,
    build_curvature,
    softmax_hessian_root,
)
from modelwrappers.lora.laplace_prior import (
    CHECKED_ROWS,
    check_start,
    grid,
    maximise_evidence,
    shown_precision,
    warn_if_worse,
)
from modelwrappers.lora.linearised import (
    MOST_LOGITS,
    MOST_NUMBERS,
    LinearisedModel,
    Mode,
    standard_normal,
)
from utils.errors import RunError, UsageError
from utils.logging import logger
from utils.metrics import posterior_predictive
from utils.seeding import mix_seed

MOST_ROUNDS = 10  # of --laplace-refit: mode and prior precision in turn
SETTLED = 0.05  # change of log precisions between rounds

Batch = dict[str, Tensor]


class LaplaceFit:
    """What `Laplace` does to make an adapter a posterior; mixed in before `WrapperBase`.

    The class that it is mixed into has `projections`, `posterior`, `shift`, `hessian`,
    `prior_start`, `num_classes`, `row_jacobians`, `mean_logits`, `logit_covariance`,
    `drawn_logits` and `best_on_held_out`.
    """

    @property
    def projection_sizes(self) -> list[int]:
        """How many parameters each projection has."""
        return [projection.weight.numel() for projection in self.projections]

    def fit_prior_and_mode(self) -> int | None:
        """Curvature and prior precision, and with --laplace-refit the mode that belongs to both.

        Mode and curvature there depend on the precision, and its choice on them; so they take
        turns until it settles. The precision that is kept is the one that the mode belongs to.

        Returns:
            the number of modes that were found; None without --laplace-refit.
        """
        prior_mean = self.prior_mean()
        self.posterior = self._posterior_at(prior_mean, None)
        if not self.args.laplace_refit:
            self._choose_precision()
            self._compare_with_map()
            return None
        model, index = self._linearised_model()
        offset, shifts = self._weights() - prior_mean, None
        if self.args.laplace_prior_precision == "validation":
            values = grid(*self.args.laplace_grid)
            shifts = [model.mode(offset, value[None]).shift.float() for value in values]
        self._choose_precision(shifts)
        precision = self.posterior.prior_precision
        for number in range(1, MOST_ROUNDS + 1):
            mode = model.mode(offset, precision)
            self.shift = mode.shift.float()
            self.posterior = self._posterior_at(prior_mean, mode, index)
            self._choose_precision(shifts)
            after = self.posterior.prior_precision
            logger.info(
                "Laplace: mode %d, of the linearised model under prior precision %s; then %s",
                *(number, shown_precision(precision), shown_precision(after)),
            )
            self.posterior.prior_precision = precision
            if (after / precision).log().abs().max() < SETTLED:
                break
            precision = after
        else:
            logger.warning(
                "Laplace: the prior precision has not settled in %d rounds of --laplace-refit; the "
                "last mode and its precision are kept.",
                MOST_ROUNDS,
            )
        self._compare_with_map()
        return number

    def _weights(self) -> Float[Tensor, " P"]:
        """The trained adapter's, of all projections side by side, float64."""
        return torch.cat([p.weight.flatten() for p in self.projections]).double()

    def prior_mean(self) -> Float[Tensor, " P"]:
        """0, or the adapter's start.

        Raises:
            UsageError: the loaded adapter was trained from another start.
        """
        if self.prior_start is None:
            return torch.zeros_like(self._weights())
        parts = []
        for name, module, rows in self.projections:
            start = self.prior_start[name].to(module.weight.device).float()
            check_start(name, start, module.weight.detach())
            parts.append((start if rows is None else start[rows]).flatten())
        return torch.cat(parts).double()

    def _posterior_at(self, prior_mean: Tensor, mode: Mode | None, index: Iterable[int] = ()):
        """The posterior around the trained adapter, or around the linearised model's mode.

        Args:
            prior_mean: (P,).
            mode: with the logits of the rows that `index` numbers; None: the adapter itself.
        """
        moved = None if mode is None else dict(zip(index, mode.logits.float(), strict=True))
        loader = self.dataset.train_eval_dataloader
        curvature, loss, num_rows = self._sum_curvature(loader, moved)
        posterior = self.build_posterior(curvature.blocks())
        posterior.prior_mean = prior_mean
        posterior.loss, posterior.n_data = loss, num_rows
        if mode is not None:
            posterior.mean = posterior.mean + mode.shift
        return posterior

    def _linearised_model(self) -> tuple[LinearisedModel, list[int]]:
        """Of the training rows, and their numbers in the data set.

        Raises:
            UsageError: there are too many.
        """
        rows, classes, parameters = (
            self.posterior.n_data,
            self.num_classes,
            sum(self.projection_sizes),
        )
        if rows * classes > MOST_LOGITS or rows * classes * parameters > MOST_NUMBERS:
            raise UsageError(
                f"--laplace-refit holds the Jacobians of all training rows: {rows} rows x "
                f"{classes} classes x {parameters} parameters, but it takes at most {MOST_LOGITS} "
                f"rows x classes and {MOST_NUMBERS} numbers; pass a smaller --limit-train, "
                "--laplace-layers last_layer, or drop --laplace-refit."
            )
        parts, labels, index = [], [], []
        self.eval()
        for batch in self.dataset.train_eval_dataloader:
            batch = send_to_device(batch, self.accelerator.device)
            labels.append(batch["labels"])
            index += batch["index"].tolist()
            parts += [part[:2] for part in self.row_jacobians(self.model_inputs(batch))]
        logits, jacobians = (torch.cat(column) for column in zip(*parts, strict=True))
        return LinearisedModel(logits, jacobians, torch.cat(labels), self.projection_sizes), index

    def _sum_curvature(
        self, loader: Iterable[Batch], moved: dict[int, Tensor] | None = None
    ) -> tuple[Curvature, Tensor, int]:
        """(curvature, sum of the NLL, number of rows) of the training set, over all processes.

        Args:
            loader: of the training rows.
            moved: row -> its class logits at the linearised model's mode, (C,); None: the model's.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        rank, sharing = self.args.laplace_rank, self.args.laplace_curvature
        curvature = build_curvature(self.hessian, self.projections, rank, sharing)
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
                for rows in slices(batch, self.args.batch_size):
                    new, labels = rows.pop("new"), rows["labels"]
                    with Tape(self.projections) as tape, accelerator.autocast():
                        logits = self.batch_logits(self.model_inputs(rows)).float()
                    if not logits.isfinite().all():
                        raise RunError(
                            f"the logits of the training rows {rows['index'].tolist()} are not "
                            "numbers; the adapter has diverged, or its data type overflows."
                        )
                    at = logits.detach()
                    if moved is not None:
                        at = torch.stack([moved[row] for row in rows["index"].tolist()])
                    root = softmax_hessian_root(at) * new[:, None, None]
                    curvature.add(tape, logits, root, new)
                    nll = nn.functional.cross_entropy(at, labels, reduction="none")
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

    def build_posterior(self, blocks: list[Block]):
        """laplace-torch's posterior with our curvature in it; its small sums are in float64."""
        weights = nn.ParameterList([p.weight.double() for p in self.projections])
        posterior = posterior_class(self.hessian)(weights, "classification")
        posterior.mean = nn.utils.parameters_to_vector(weights).detach()
        posterior.blocks = blocks
        posterior.take(blocks)
        return posterior

    def _choose_precision(self, shifts: list[Tensor] | None = None) -> None:
        """Give the posterior the prior precision of --laplace-prior-precision.

        Args:
            shifts: for validation with --laplace-refit, see `best_on_held_out`.
        """
        wanted = self.args.laplace_prior_precision
        if wanted == "evidence":
            maximise_evidence(self.posterior, self.args.laplace_prior_structure)
            return
        if wanted == "validation":
            wanted = self.best_on_held_out(self.dataset.held_out_dataloader, shifts)
        self.posterior.prior_precision = wanted

    def _compare_with_map(self) -> None:
        """Warn if the evidence has chosen a posterior that does not even fit the training rows."""
        if self.args.laplace_prior_precision != "evidence":
            return
        every = max(1, self.posterior.n_data // CHECKED_ROWS)
        device = self.accelerator.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # NLL here, of MAP, rows
        position = 0
        self.eval()
        for batch in self.dataset.train_eval_dataloader:
            first, position = -position % every, position + len(batch["labels"])
            rows = send_to_device(
                {key: value[first::every] for key, value in batch.items()}, device
            )
            if not len(rows["labels"]):
                continue
            torch.manual_seed(mix_seed("comparison", self.args.seed_sampling, position))
            start = 0
            for logits, jacobians, beyond in self.row_jacobians(self.model_inputs(rows)):
                labels = rows["labels"][start : (start := start + len(logits))]
                mean = self.mean_logits(logits, jacobians)
                noise = standard_normal(logits, self.args.bayes_eval_n_samples_final)
                drawn = self.drawn_logits(mean, self.logit_covariance(jacobians, beyond), noise)
                predictive = posterior_predictive(drawn.float().log_softmax(-1))
                point = logits.log_softmax(-1)
                for i, log_probs in enumerate((predictive, point)):
                    sums[i] -= log_probs.double().gather(1, labels[:, None]).sum()
                sums[2] += len(labels)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        nll, nll_of_map = (sums[:2] / sums[2]).tolist()
        precision = shown_precision(self.posterior.prior_precision)
        warn_if_worse(nll, nll_of_map, precision, is_refitted=self.shift is not None)


def posterior_class(structure: str):
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


def slices(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch["input_ids"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}
