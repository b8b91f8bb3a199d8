"""From batches to log-probabilities: draws in chunks, rows of all processes, each once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import send_to_device
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from modelwrappers.engine.adaptive import Settling, settled_draws
from modelwrappers.engine.prefix import sharing_prefix
from utils.errors import RunError
from utils.seeding import mix_seed
from utils.temperature import scale

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase

Batch = dict[str, Tensor]


class _Rows(NamedTuple):
    log_probs: Float[Tensor, "n N C"]
    labels: Int[Tensor, " n"]
    index: Int[Tensor, " n"]


class Predictions(_Rows):
    """What a posterior says of a data set, in the data set's own order.

    It unpacks into log-probabilities, labels and index.

    Attributes:
        log_probs: log-probabilities of each draw, (n, N, C), float32.
        labels: (n,)
        index: (n,) rows in their split.
        num_draws: how many of the N draws each row has, (n,), the first ones; the others are NaN.
            None: every row has all.
    """

    num_draws: Int[Tensor, " n"] | None = None

    def __new__(
        cls, log_probs: Tensor, labels: Tensor, index: Tensor, num_draws: Tensor | None = None
    ) -> Predictions:
        predictions = super().__new__(cls, log_probs, labels, index)
        predictions.num_draws = num_draws
        return predictions

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by name."""
        extra = {} if self.num_draws is None else {"num_draws": self.num_draws}
        return self._asdict() | extra


# --- draws ----------------------------------------------------------------------------------------


def draws_for(verb: Callable, n_samples: int | None) -> dict[str, int]:
    """The keyword that asks `predict` or `evaluate` for a number of draws, where it takes one.

    A user's own of the form `evaluate(self, eval_loader)` decides by itself.
    """
    takes = n_samples is not None and "n_samples" in inspect.signature(verb).parameters
    return {"n_samples": n_samples} if takes else {}


def with_draws(logits: Tensor) -> Float[Tensor, "B N C"]:
    """A subclass may return (B, C): one draw."""
    return logits.unsqueeze(1) if logits.dim() == 2 else logits


# --- rows -----------------------------------------------------------------------------------------


def predict(
    wrapper: WrapperBase,
    loader: Iterable[Batch],
    n_samples: int,
    settling: Settling | None = None,
) -> Predictions:
    """Log-probabilities of every draw for every row, on all processes, in row order.

    The draws are seeded by --seed-sampling and the batch: an evaluation repeats itself, does not
    disturb training, and does not depend on the number of processes.

    Args:
        wrapper: whose `forward_logits` gives (B, N, C) or (B, C).
        loader: batches with labels and index; its `target_ids`, if it has any, are the answers.
        n_samples: N; 0 for the posterior mean.
        settling: when a row has enough of them; None: when it has N.
    Raises:
        RunError: there is no batch, or a logit is not finite; the rows are named.
    """
    accelerator, device = wrapper.accelerator, wrapper.accelerator.device
    was_training = wrapper.training
    wrapper.eval()
    parts: list[tuple[Tensor, ...]] = []
    if settling is not None and n_samples <= settling.first:
        settling = None
    try:
        forked = [device] if device.type == "cuda" else []
        with (
            # before the inference mode, whose tensors no gradient may come through
            wrapper.answering(getattr(loader, "target_ids", None)),
            torch.random.fork_rng(devices=forked),
            torch.inference_mode(),
            wrapper.evaluation_draws(n_samples),
            sharing_prefix(wrapper, n_samples),
        ):
            for batch in tqdm(
                loader,
                desc="evaluate",
                leave=False,
                disable=not accelerator.is_local_main_process,
                mininterval=1.0,
            ):
                batch = send_to_device(batch, device, non_blocking=True)
                torch.manual_seed(
                    mix_seed("evaluation", wrapper.args.seed_sampling, int(batch["index"][0]))
                )
                with accelerator.autocast():
                    log_probs, number = _of_batch(wrapper, batch, n_samples, settling)
                if wrapper.temperature is not None and settling is None:
                    log_probs = scale(log_probs, wrapper.temperature).float()
                parts.append((log_probs, batch["labels"], batch["index"], number))
    finally:
        wrapper.train(was_training)
    if not parts:
        raise RunError("the evaluation loader gave no batch.")
    predictions = gather_rows(accelerator, *map(torch.cat, zip(*parts, strict=True)))
    if settling is None:
        predictions.num_draws = None
    broken = _has_broken_draw(predictions)
    if broken.any():
        raise RunError(
            f"the predictions of rows {predictions.index[broken].tolist()[:20]} are not numbers; "
            f"the model has diverged (lower {', '.join(wrapper.learning_rate_flags)}) or the data "
            "type overflows (--dtype float32)."
        )
    return predictions


def _of_batch(
    wrapper: WrapperBase, batch: Batch, n_samples: int, settling: Settling | None
) -> tuple[Float[Tensor, "B N C"], Int[Tensor, " B"]]:
    """Log-probabilities of a batch's draws, and how many of them each row has."""
    inputs = wrapper.model_inputs(batch)
    if settling is not None:
        # whether a row is settled depends on the temperature that it is told at
        draw, temperature = wrapper.draw_logits, wrapper.temperature
        return settled_draws(draw, inputs, n_samples, settling, temperature)
    logits = wrapper.forward_logits(inputs, sample=n_samples > 0, n_samples=max(1, n_samples))
    log_probs = with_draws(logits).float().log_softmax(-1)  # (B, N, C)
    return log_probs, torch.full_like(batch["labels"], log_probs.shape[1])


def _has_broken_draw(predictions: Predictions) -> Bool[Tensor, " n"]:
    """Rows with a draw whose log-probabilities are not all finite."""
    finite = predictions.log_probs.isfinite().all(-1)  # (n, N)
    if predictions.num_draws is not None:  # draws that were not made are no numbers
        made = torch.arange(finite.shape[1]) < predictions.num_draws[:, None]
        finite = finite == made
    return ~finite.all(1)


def gather_rows(
    accelerator, log_probs: Tensor, labels: Tensor, index: Tensor, num_draws: Tensor | None = None
) -> Predictions:
    """All processes' rows on the CPU, each once, sorted by index."""
    num_draws = torch.full_like(labels, log_probs.shape[1]) if num_draws is None else num_draws
    if accelerator.num_processes > 1:
        num_draws = accelerator.gather(accelerator.pad_across_processes(num_draws))
        index = accelerator.gather(accelerator.pad_across_processes(index, pad_index=-1))
        labels = accelerator.gather(accelerator.pad_across_processes(labels))
        log_probs = accelerator.gather(accelerator.pad_across_processes(log_probs))
    index, order = index.cpu().sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    keep = order[first & (index >= 0)]
    num_draws = num_draws.cpu()[keep]
    return Predictions(
        log_probs.cpu()[keep][:, : int(num_draws.max())],
        labels.cpu()[keep],
        index[first & (index >= 0)],
        num_draws,
    )


def padded_on_the_left(inputs: Batch) -> Batch:
    """Every row moved to the right by the padding behind its last token.

    Raises:
        RunError: a row has no token (told where that costs no wait for a GPU).
    """
    mask = inputs["attention_mask"]
    if mask.device.type == "cpu" and not mask.any(-1).all():
        raise RunError("a row of the batch is padding only: attention_mask is 0 everywhere in it.")
    width = mask.shape[-1]
    behind = mask.flip(-1).ne(0).int().argmax(-1, keepdim=True)  # (B, 1)
    source = (torch.arange(width, device=mask.device) - behind) % width  # (B, T)
    return {
        key: value.gather(-1, source) if value.shape == mask.shape else value
        for key, value in inputs.items()
    }
