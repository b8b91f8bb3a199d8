"""What a set of predictions is worth: pure functions of `(log_probs, labels)`.

`log_probs (n, C)` are natural logarithms of class probabilities, `labels (n,)` class indices. Every
function is computed once over all n examples, in float64 (the ECE's bins in float32).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Metrics(NamedTuple):
    """The four numbers of every table.

    Attributes:
        acc: accuracy, a fraction.
        ece: expected calibration error of the top label, a fraction.
        nll: negative log-likelihood, nats per example.
        brier: multi-class Brier score, summed over the classes, 0 to 2.
    """

    acc: float
    ece: float
    nll: float
    brier: float


def posterior_predictive(
    log_probs: Float[Tensor, "n N C"], num_draws: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n C"]:
    r"""The log of the mean probability over N posterior draws.

    $\log p(y|x) = \operatorname{logsumexp}_n \log p(y|x, \theta_n) - \log N$: probabilities are
    averaged, not logits, and never leave the log domain, so a class that every draw finds
    impossible keeps a finite log-likelihood.

    Args:
        log_probs: log-probabilities of each draw, (n, N, C).
        num_draws: how many each row has, (n,), 1 to N: the mean is over the first so many, and
            what stands behind them is ignored, NaN or not. None: all have N.
    Returns:
        (n, C), float64.
    """
    if num_draws is None:
        return torch.logsumexp(log_probs.double(), dim=1) - math.log(log_probs.shape[1])
    drawn = torch.arange(log_probs.shape[1], device=log_probs.device) < num_draws[:, None]  # (n, N)
    own = log_probs.double().masked_fill(~drawn[:, :, None], -math.inf)
    return torch.logsumexp(own, dim=1) - num_draws.double().log()[:, None]


def accuracy(log_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """The share of examples whose most probable class is the label."""
    return (log_probs.argmax(-1) == labels).double().mean().item()


def expected_calibration_error(
    log_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"], num_bins: int = 15
) -> float:
    r"""Top-label ECE with equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    $\sum_b \frac{n_b}{n} |\mathrm{acc}(b) - \mathrm{conf}(b)|$ over `num_bins` bins of confidence.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # slow

    # Rounding may leave a probability above 1, which torchmetrics would take for logits.
    probs = log_probs.double().exp().clamp(max=1.0)
    ece = multiclass_calibration_error(probs, labels, probs.shape[-1], n_bins=num_bins, norm="l1")
    return ece.item()


def negative_log_likelihood(log_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    r"""$-\frac1n \sum_i \log p(y_i | x_i)$, in nats."""
    return torch.nn.functional.nll_loss(log_probs.double(), labels).item()


def brier_score(log_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    r"""$\frac1n \sum_i \sum_c (p_{ic} - [y_i = c])^2$ (Brier 1950), between 0 and 2."""
    probs = log_probs.double().exp()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - one_hot).square().sum(-1).mean().item()


def score(
    log_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"], num_bins: int = 15
) -> Metrics:
    """All of `Metrics`, once over all examples."""
    return Metrics(
        acc=accuracy(log_probs, labels),
        ece=expected_calibration_error(log_probs, labels, num_bins),
        nll=negative_log_likelihood(log_probs, labels),
        brier=brier_score(log_probs, labels),
    )
