r"""What draws agree on and what they do not: entropies and mutual information, per row.

Draws are log-probabilities (n, N, C). Where rows have unequal numbers of them, `num_draws (n,)`
says how many of the N are a row's own, the first ones; what stands behind them is ignored.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import entr

Values = Float[np.ndarray, " n"]
Draws = Float[np.ndarray, "n N C"]  # log-probabilities
Counts = Int[np.ndarray, " n"]


def predictive_entropy(log_probs: Float[np.ndarray, "n C"]) -> Values:
    r"""$H[\bar p] = -\sum_c \bar p_c \log \bar p_c$ of the posterior predictive, nats.

    Total uncertainty in the split of Depeweg et al. (2018, arXiv 1710.07283).
    """
    return entr(np.exp(log_probs)).sum(-1)


def expected_entropy(draws: Draws, num_draws: Counts | None = None) -> Values:
    r"""$\frac1N \sum_n H[p_n]$, nats: the uncertainty that remains if the weights were known."""
    probs, drawn = own_draws(draws, num_draws)
    return entr(probs).sum((1, 2)) / drawn.sum(1)


def mutual_information(
    log_probs: Float[np.ndarray, "n C"], draws: Draws, num_draws: Counts | None = None
) -> Values:
    r"""$H[\bar p] - \frac1N \sum_n H[p_n]$, nats: what the label would tell about the weights.

    Epistemic uncertainty, "BALD" (Houlsby et al. 2011, arXiv 1112.5745). 0 for one draw; rounding
    below 0 is cut. Too low by about $\frac{1}{2N} \sum_c \mathrm{Var}_n \, p_n(c) / \bar p_c$ for
    independent draws, so it grows with N; at most $\log N$. `jackknifed_information` of the
    report corrects it.
    """
    found = predictive_entropy(log_probs) - expected_entropy(draws, num_draws)
    return np.maximum(found, 0.0)


def own_draws(draws: Draws, num_draws: Counts | None) -> tuple[Draws, Bool[np.ndarray, "n N"]]:
    """Probabilities of the draws, 0 of those that an example does not have, and which it has."""
    n, most, _ = draws.shape
    drawn = np.arange(most) < (np.full(n, most) if num_draws is None else num_draws)[:, None]
    return np.where(drawn[:, :, None], np.exp(draws), 0.0), drawn
