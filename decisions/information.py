r"""Entropies of posterior draws, and what a label would tell about the weights; all in nats.

Draws are log-probabilities (n, N, C). Where rows have unequal numbers of draws, `num_draws (n,)`
says how many of the N are a row's own, the first ones; what stands behind them is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import entr

Values = Float[np.ndarray, " n"]
Draws = Float[np.ndarray, "n N C"]  # log-probabilities
Counts = Int[np.ndarray, " n"]

BLOCK = 2_000_000  # numbers at once: 16 MB in double precision


def predictive_entropy(log_probs: Float[np.ndarray, "n C"]) -> Values:
    r"""$H[\bar p] = -\sum_c \bar p_c \log \bar p_c$ of the posterior predictive, nats.

    Total uncertainty in the split of Depeweg et al. (2018, arXiv 1710.07283).
    """
    return entr(np.exp(log_probs)).sum(-1)


def expected_entropy(draws: Draws, num_draws: Counts | None = None) -> Values:
    r"""$\frac1N \sum_n H[p_n]$, nats: the uncertainty that remains if the weights were known."""
    probs, drawn = own_draws(draws, num_draws)
    return entr(probs).sum((1, 2)) / drawn.sum(1)


def mutual_information(entropy: Values, expected: Values) -> Values:
    r"""$H[\bar p] - \frac1N \sum_n H[p_n]$, nats: what the label would tell about the weights.

    Epistemic uncertainty, "BALD" (Houlsby et al. 2011, arXiv 1112.5745). 0 for one draw; rounding
    below 0 is cut. Too low by about $\frac{1}{2N} \sum_c \mathrm{Var}_n \, p_n(c) / \bar p_c$ for
    independent draws, so it grows with N; at most $\log N$ (`mutual_information_cap`). The report's
    `jackknifed_information` corrects it.
    """
    return np.maximum(entropy - expected, 0.0)


def mutual_information_cap(num_draws: Counts | int) -> Values | float:
    r"""$\log N$, nats: more than which N draws cannot show, of one label or of many together.

    $I(y_1, \dots, y_k; \theta) \le H[\theta]$, and the entropy of a choice among N draws is $\log
    N$ (Kirsch, van Amersfoort and Gal 2019, arXiv 1906.08158, discuss what that does to batches).
    """
    return np.log(num_draws)


class Summary(NamedTuple):
    r"""What a row's draws say together.

    Attributes:
        log_probs: $\log \frac1N \sum_n p_n$, the posterior predictive, (n, C); -inf for a class
            that all draws find impossible.
        entropy: `predictive_entropy`, (n,).
        expected_entropy: (n,)
        mutual_information: (n,)
    """

    log_probs: Float[np.ndarray, "n C"]
    entropy: Values
    expected_entropy: Values
    mutual_information: Values


def summarise(draws: Draws, num_draws: Counts | None = None) -> Summary:
    """The posterior predictive of each row and its uncertainties, block by block."""
    n, _, num_classes = draws.shape
    log_probs, expected = np.empty((n, num_classes)), np.empty(n)
    for rows in row_blocks(n, draws[0].size):
        own = None if num_draws is None else num_draws[rows]
        probs, drawn = own_draws(draws[rows], own)
        with np.errstate(divide="ignore"):
            log_probs[rows] = np.log(probs.sum(1) / drawn.sum(1)[:, None])
        expected[rows] = expected_entropy(draws[rows], own)
    entropy = predictive_entropy(log_probs)
    return Summary(log_probs, entropy, expected, mutual_information(entropy, expected))


def own_draws(
    draws: Draws, num_draws: Counts | None = None
) -> tuple[Draws, Bool[np.ndarray, "n N"]]:
    """Probabilities of the draws, 0 of those that a row does not have, and which it has."""
    n, most, _ = draws.shape
    drawn = np.arange(most) < (np.full(n, most) if num_draws is None else num_draws)[:, None]
    return np.where(drawn[:, :, None], np.exp(draws, dtype=float), 0.0), drawn


def row_blocks(rows: int, numbers: int) -> Iterator[slice]:
    """The rows in blocks of bounded size, if each of them takes so many numbers."""
    step = max(1, BLOCK // max(numbers, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
