"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599), the baseline to beat."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from utils.metrics import negative_log_likelihood, posterior_predictive

LOWEST, HIGHEST = 0.05, 20.0


def scale(log_probs: Float[Tensor, "n N C"], temperature: float) -> Float[Tensor, "n N C"]:
    r"""Draws with their logits divided by T: $\operatorname{log softmax}(\log p / T)$.

    The same as scaling the logits: they differ from log-probabilities by a constant per row. Draws
    that a row does not have, all NaN, stay so.
    """
    return (log_probs.double() / temperature).log_softmax(-1)


def fit_temperature(
    log_probs: Float[Tensor, "n N C"],
    labels: Int[Tensor, " n"],
    num_draws: Int[Tensor, " n"] | None = None,
) -> float:
    """The T in [0.05, 20] with the lowest NLL of the posterior predictive on held-out predictions.

    Args:
        log_probs: of every draw, (n, N, C).
        labels: (n,)
        num_draws: how many of them each row has, (n,); None: all N.
    """
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:
        scaled = posterior_predictive(scale(log_probs, math.exp(log_temperature)), num_draws)
        return negative_log_likelihood(scaled, labels)

    # The NLL of one draw is convex in 1/T, that of several need not be: begin at a grid's best.
    grid = torch.linspace(math.log(LOWEST), math.log(HIGHEST), 25).tolist()
    best = min(range(len(grid)), key=lambda i: nll(grid[i]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x)
