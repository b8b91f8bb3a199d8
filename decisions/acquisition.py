r"""Which unlabelled rows to label next, from posterior draws.

Every criterion scores rows by draws $p_n(y | x)$, n = 1..N, of the posterior; a label is worth most
where the draws disagree on it. Mutual information of labels and weights is at most $\log N$ by its
estimate from N draws, for a row and for a batch of rows alike: more draws are needed for more rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from decisions.information import (
    Counts,
    Draws,
    Values,
    expected_entropy,
    mutual_information,
    own_draws,
    predictive_entropy,
)
from utils.errors import UsageError, quoted
from utils.logging import logger

CRITERIA = ("bald", "batchbald", "powerbald", "entropy", "margin", "random")
BY_DRAWS = ("bald", "batchbald", "powerbald")  # nothing to go by with a single one
CONFIGURATIONS = 10_000  # joint answers of a batch that are enumerated; of more a sample is drawn
NEAR_CAP = 0.9  # share of log N from which an estimate is said to be capped
BLOCK = 20_000_000  # numbers at once


class Acquired(NamedTuple):
    """The rows to label.

    Attributes:
        rows: their positions, in the order in which they were chosen, (k,).
        scores: what the criterion gave each of them; of batchbald what it adds to those before it.
    """

    rows: Int[np.ndarray, " k"]
    scores: Float[np.ndarray, " k"]


def acquire(
    draws: Draws, k: int, by: str, seed: int = 0, num_draws: Counts | None = None
) -> Acquired:
    """Choose k rows.

    - bald: mutual information of the label and the weights (Houlsby et al. 2011).
    - batchbald: that of all k labels together and the weights, chosen one by one (Kirsch, van
      Amersfoort and Gal 2019). Draw n must be the same weights in every row.
    - powerbald: bald's score to the power 1 as a weight, drawn without replacement (Kirsch et al.
      2021), which spreads a batch.
    - entropy: of the predictive. margin: a small distance of the two most probable answers.
    - random: the baseline.

    Args:
        draws: log-probabilities, (n, N, C).
        k: how many.
        by: one of `CRITERIA`.
        seed: of random, powerbald, and of batchbald's sample.
        num_draws: how many of the draws each row has, (n,); None: all N.
    Raises:
        UsageError: an unknown criterion, more rows than there are, or a single draw where draws are
            what it goes by.
    """
    check_call(len(draws), draws.shape[1], k, by)
    if by == "batchbald":
        return batch_bald(draws, k, seed, num_draws)
    found = score(draws, by, seed, num_draws)
    if by in BY_DRAWS:
        warn_of_cap(float(_information(draws, num_draws).max()), draws.shape[1])
    order = np.argsort(-found, kind="stable")[:k]
    return Acquired(order, found[order])


def check_call(number: int, num_draws: int, k: int, by: str) -> None:
    """See `acquire`."""
    if by not in CRITERIA:
        raise UsageError(f"criterion {quoted(by)}: it must be one of {', '.join(CRITERIA)}.")
    if not 1 <= k <= number:
        raise UsageError(
            f"{k} rows to label out of {number}: it must be at least 1 and no more than there are."
        )
    if by in BY_DRAWS and num_draws < 2:
        raise UsageError(
            f"{by} goes by the differences of draws, but there is {num_draws}: take more draws, a "
            "method that has a posterior, or entropy, margin or random."
        )


def score(draws: Draws, by: str, seed: int, num_draws: Counts | None = None) -> Values:
    """Of each row alone, (n,): larger is better; of powerbald with its random part."""
    return _SCORES[by](draws, np.random.default_rng(seed), num_draws)


def _information(draws: Draws, num_draws: Counts | None) -> Values:
    return mutual_information(_log_predictive(draws, num_draws), draws, num_draws)


def _log_predictive(draws: Draws, num_draws: Counts | None) -> Float[np.ndarray, "n C"]:
    probs, drawn = own_draws(draws, num_draws)
    with np.errstate(divide="ignore"):  # a class that no draw gives any probability
        return np.log(probs.sum(1) / drawn.sum(1)[:, None])


def _power(draws: Draws, generator: np.random.Generator, num_draws: Counts | None) -> Values:
    r"""$\log I + g$ with Gumbel noise g: its k largest are a draw without replacement by weights
    I."""
    with np.errstate(divide="ignore"):
        log_scores = np.log(_information(draws, num_draws))
    return log_scores + generator.gumbel(size=len(draws))


def _margin(draws: Draws, num_draws: Counts | None) -> Values:
    highest = np.sort(np.exp(_log_predictive(draws, num_draws)), axis=1)
    return highest[:, -2] - highest[:, -1]


_SCORES: dict[str, Callable[[Draws, np.random.Generator, Counts | None], Values]] = {
    "bald": lambda draws, _, number: _information(draws, number),
    "powerbald": _power,
    "entropy": lambda draws, _, number: predictive_entropy(_log_predictive(draws, number)),
    "margin": lambda draws, _, number: _margin(draws, number),
    "random": lambda draws, generator, _: generator.random(len(draws)),
}


def warn_of_cap(information: float, num_draws: int) -> None:
    """Say so where an estimate is about as large as it can be from so many draws."""
    cap = math.log(num_draws)
    if information > NEAR_CAP * cap:
        logger.warning(
            "Mutual information of %.3f nats, but from %d draws no estimate is above log %d = %.3f "
            "nats: rows are told apart no further; take more draws.",
            information,
            num_draws,
            num_draws,
            cap,
        )


def batch_bald(draws: Draws, k: int, seed: int = 0, num_draws: Counts | None = None) -> Acquired:
    r"""Greedy maximisation of $I[y_1, ..., y_k; \theta] = H[y_1, ..., y_k] - \sum_i \mathbb{E} H$.

    A duplicate adds only what a second label of one row would, so it is not chosen where another
    row says more. The joint entropy is exact while a batch has at most `CONFIGURATIONS` joint
    answers; beyond that it is estimated from so many answers drawn from it, as in the paper.

    Args:
        draws: log-probabilities (n, N, C); draw n is the same weights in every row.
        k: how many rows.
        seed: of the sample.
        num_draws: must be the same for every row, or None.
    Raises:
        UsageError: rows have unequal numbers of draws.
    """
    if num_draws is not None and len(set(num_draws.tolist())) > 1:
        raise UsageError(
            "batchbald needs the same draws in every row, but rows have unequal numbers of them "
            "(--draws-adaptive); leave that out."
        )
    number = draws.shape[1] if num_draws is None else int(num_draws[0])
    probs = np.exp(draws[:, :number].astype(float))  # (n, N, C)
    conditional = expected_entropy(draws[:, :number])  # (n,)
    generator = np.random.default_rng(seed)
    joint = np.ones((1, number))  # (configurations, N): of each draw, of the rows chosen so far
    weights: np.ndarray | None = None  # of a sampled configuration; None: all are there
    chosen: list[int] = []
    gains: list[float] = []
    before = 0.0  # mutual information of the rows chosen so far
    for _ in range(k):
        entropies = _joint_entropies(joint, weights, probs)  # (n,)
        information = entropies - conditional - conditional[chosen].sum()
        information[chosen] = -np.inf
        best = int(information.argmax())
        chosen.append(best)
        gains.append(float(information[best] - before))
        before = float(information[best])
        joint, weights = _extended(joint, weights, probs, chosen, generator)
    warn_of_cap(before, number)
    return Acquired(np.array(chosen), np.array(gains))


def _joint_entropies(
    joint: Float[np.ndarray, "M N"],
    weights: Float[np.ndarray, " M"] | None,
    probs: Float[np.ndarray, "n N C"],
) -> Values:
    """Entropy of the chosen rows' answers and one more row's, for each of n rows."""
    n, number, classes = probs.shape
    found = np.empty(n)
    size = max(1, BLOCK // (len(joint) * classes))
    for start in range(0, n, size):
        block = probs[start : start + size]
        columns = block.transpose(1, 0, 2).reshape(number, -1)
        both = (joint @ columns / number).reshape(len(joint), len(block), classes)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(both > 0, -both * np.log(both), 0.0).sum(2)  # (M, rows)
        found[start : start + size] = terms.sum(0) if weights is None else weights @ terms
    return found


def _extended(
    joint: Float[np.ndarray, "M N"],
    weights: Float[np.ndarray, " M"] | None,
    probs: Float[np.ndarray, "n N C"],
    chosen: list[int],
    generator: np.random.Generator,
) -> tuple[Float[np.ndarray, "M N"], Float[np.ndarray, " M"] | None]:
    """The joint with the row that was chosen last: enumerated while it is small, else sampled.

    A sampled answer a weighs 1 / (M q(a)), q its probability: the mean over M answers drawn from q
    of f(a) / q(a) is the sum of f over all answers.
    """
    number, classes = probs.shape[1:]
    if weights is None and len(joint) * classes <= CONFIGURATIONS:
        answers = probs[chosen[-1]].T  # (C, N)
        return (joint[:, None, :] * answers[None]).reshape(-1, number), None
    drawn = generator.integers(number, size=CONFIGURATIONS)
    sampled = np.ones((CONFIGURATIONS, number))
    for row in chosen:
        cumulative = probs[row][drawn].cumsum(1)  # (M, C)
        uniform = generator.random((CONFIGURATIONS, 1)) * cumulative[:, -1:]
        answer = np.minimum((uniform >= cumulative).sum(1), classes - 1)
        sampled *= probs[row].T[answer]
    return sampled, 1.0 / (CONFIGURATIONS * sampled.mean(1))
