r"""Which rows to label next: active learning from posterior draws.

The criteria, each the larger the better, with $\bar p$ the posterior predictive of a row:

- `bald`: mutual information $I(y; \theta)$ (Houlsby et al. 2011, arXiv 1112.5745).
- `batchbald`: the rows that are worth most together, $I(y_1, \dots, y_k; \theta)$, one after the
  other (Kirsch, van Amersfoort and Gal 2019, arXiv 1906.08158).
- `powerbald`: $\log I + g$ with g standard Gumbel noise, drawn once for each row; rows are sampled
  without replacement in proportion to I, so that a batch is not many copies of one row (Kirsch et
  al. 2021, arXiv 2106.12059, with $\beta = 1$).
- `entropy`: $H[\bar p]$, also of what no label could settle (uncertainty sampling, Lewis and Gale
  1994).
- `margin`: 1 less the difference of the two largest probabilities (Scheffer, Decomain and Wrobel
  2001).
- `random`: what the others have to beat.

Rows with equal scores are taken in their order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import entr

from decisions.checks import Keys, check_draws, check_keys
from decisions.information import (
    Counts,
    Draws,
    Values,
    expected_entropy,
    mutual_information_cap,
    row_blocks,
    summarise,
)
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.seeding import mix_seed, row_uniforms

Criterion = Literal["bald", "batchbald", "powerbald", "entropy", "margin", "random"]
CRITERIA: tuple[Criterion, ...] = (
    *("bald", "batchbald", "powerbald", "entropy", "margin", "random"),
)
OF_INFORMATION = ("bald", "batchbald", "powerbald")

CONFIGURATIONS = 4096  # of a batch's labels that are enumerated, or else sampled
NEAR_CAP = 0.9  # of log N
ROUNDING = 1e-12  # of a mutual information that is 0
NO_INFORMATION = 1e-300  # its weight by powerbald: behind all others, and chance decides among them


class Acquired(NamedTuple):
    """Rows in the order in which they were chosen.

    Attributes:
        indices: (k,)
        scores: (k,) what each was chosen by, all finite: the criterion; of `powerbald` with its
            noise (for a row without mutual information about -690); of `batchbald` what the row
            adds to the mutual information of those before it, nats; of `random` random numbers.
    """

    indices: Int[np.ndarray, " k"]
    scores: Float[np.ndarray, " k"]


def acquire(
    draws: Draws,
    k: int,
    by: Criterion,
    seed: int = 0,
    num_draws: Counts | None = None,
    configurations: int = CONFIGURATIONS,
    keys: Keys | None = None,
) -> Acquired:
    """The k rows to label.

    Warns where the mutual information is close to log N, the most that N draws can show.

    Args:
        draws: log-probabilities of the pool, (n, N, C). For `batchbald` draw number j must be the
            same weights in every row (fixed draws: they are, with noise of a whole data set).
        k: rows, 1 to n.
        by: one of `CRITERIA`.
        seed: of the random numbers.
        num_draws: how many draws each row has, (n,); None: all N.
        keys: of the rows, integers or strings, which decide what is random about each of them
            (`powerbald`, `random`); None: their order.
        configurations: of the batch's labels that `batchbald` enumerates; where there are more, it
            samples about so many.
    Raises:
        UsageError: an argument is not what it should be, mutual information is asked of a single
            draw, or `batchbald` of rows with unequal numbers of draws.
    """
    if by not in CRITERIA:
        raise UsageError(f"The criterion is {quoted(by)}; it must be one of {', '.join(CRITERIA)}.")
    draws, num_draws = check_draws(draws, num_draws)
    least, most = num_draws.min(), num_draws.max()
    check_request(len(draws), int(least), k, by)
    if configurations < 1:
        raise UsageError(f"configurations is {quoted(configurations)}; it must be 1 or more.")
    if by == "batchbald":
        if least < most:
            raise UsageError(
                f"batchbald needs the same draws for every row, and the rows have {least} to "
                f"{most}; predict with a fixed number of draws, or choose by bald or powerbald."
            )
        rng = np.random.default_rng(mix_seed("acquisition", seed))
        return _batch(draws[:, :most], k, rng, configurations)
    scores = row_scores(draws, by, seed, num_draws, keys)
    chosen = np.argsort(-scores, kind="stable")[:k]
    if by in OF_INFORMATION:
        information = _single_scores(draws, by, num_draws)
        fullest = int(np.argmax(information / mutual_information_cap(num_draws)))
        row = check_keys(keys, len(draws))[fullest]
        warn_near_cap(
            information[fullest], num_draws[fullest], f"The mutual information of row {row}"
        )
        together = f"The mutual information of the {k} chosen rows, added up,"
        warn_near_cap(information[chosen].sum(), most, together)
    return Acquired(chosen, scores[chosen])


def check_request(n: int, num_draws: int, k: int, by: Criterion) -> None:
    """So many rows can be chosen out of n by that criterion.

    Args:
        n: rows.
        num_draws: the fewest that a row has.
        k: rows to choose.
        by: one of `CRITERIA`.
    Raises:
        UsageError: they cannot.
    """
    if not 1 <= k <= n:
        raise UsageError(
            f"{quoted(k)} rows shall be chosen; there are {n}, so it must be 1 to {n}."
        )
    if by in OF_INFORMATION and num_draws < 2:
        raise UsageError(
            f"{by} needs mutual information, and a single draw has none; take more draws, or "
            "choose by entropy, margin or random."
        )


def row_scores(
    draws: Draws,
    by: Criterion,
    seed: int = 0,
    num_draws: Counts | None = None,
    keys: Keys | None = None,
) -> Values:
    """What each row is worth by itself, (n,), all finite; not of `batchbald`.

    It does not depend on the other rows, so a pool may be scored in parts. See `acquire`.
    """
    n = len(draws)
    uniform = row_uniforms(f"acquisition by {by}", seed, check_keys(keys, n))
    if by == "random":
        return uniform
    scores = _single_scores(draws, by, num_draws)
    if by != "powerbald":
        return scores
    noise = -np.log(-np.log(np.maximum(uniform, 2.0**-54)))  # Gumbel's; uniform may be 0
    return np.log(np.where(scores > ROUNDING, scores, NO_INFORMATION)) + noise


def _single_scores(draws: Draws, by: Criterion, num_draws: Counts | None) -> Values:
    """What each row is worth by itself, without noise, (n,)."""
    found = summarise(draws, num_draws)
    if by == "entropy":
        return found.entropy
    if by == "margin":
        second, first = np.sort(np.exp(found.log_probs), axis=1)[:, -2:].T
        return 1 - (first - second)
    return found.mutual_information


def warn_near_cap(information: float, num_draws: int, what: str) -> None:
    """Say it where N draws cannot show much more than this: mutual information of at most log N."""
    cap = mutual_information_cap(num_draws)
    if information >= NEAR_CAP * cap:
        logger.warning(
            f"{what} is {information:.2f} nats, and {num_draws} draws can show at most log "
            f"{num_draws} = {cap:.2f}: what lies beyond cannot be told apart. Take more draws."
        )


def _batch(draws: Draws, k: int, rng: np.random.Generator, configurations: int) -> Acquired:
    r"""BatchBALD, greedily, by the chain rule of mutual information.

    A row adds $I(y; \theta \mid y_1, \dots, y_m) = \sum_{y_{1:m}} p(y_{1:m}) \, H[\sum_n w_n p_n]
    - \frac1N \sum_n H[p_n]$ to the m rows before it, where $w_n \propto \prod_i p_n(y_i)$ are the
    weights of the draws after the labels $y_{1:m}$. The sum is over all configurations of the
    batch's labels while there are few of them; then over a sample: each draw gives equally many,
    and a configuration grows with the batch. The greedy choice is within 1 - 1/e of the best batch.
    """
    n, num_draws, num_classes = draws.shape
    blocks = list(row_blocks(n, num_draws * num_classes))
    aleatoric = np.concatenate([expected_entropy(draws[rows]) for rows in blocks])
    batch: _Enumerated | _Sampled = _Enumerated(num_draws)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < k:
        gain = batch.predictive_entropies(draws) - aleatoric
        gain[chosen] = -np.inf
        row = int(np.argmax(gain))
        chosen.append(row)
        gains.append(max(float(gain[row]), 0.0))  # below 0 by rounding or sampling only
        if isinstance(batch, _Enumerated) and batch.size * num_classes > configurations:
            batch = _Sampled(num_draws, configurations, rng)
            for earlier in chosen[:-1]:
                batch.add(draws[earlier])
        batch.add(draws[row])
    joint = np.cumsum(gains)
    full = int(np.argmax(joint >= NEAR_CAP * mutual_information_cap(num_draws))) + 1
    warn_near_cap(
        joint[full - 1], num_draws, f"The mutual information of the first {full} of {k} rows"
    )
    return Acquired(np.array(chosen), np.array(gains))


class _Configurations:
    """Labels of the batch so far: what each draw says of them, and how much each counts.

    Attributes:
        log_likelihood: (M, N), of configuration m under draw n.
    """

    log_likelihood: Float[np.ndarray, "M N"]

    @property
    def size(self) -> int:
        """M."""
        return len(self.log_likelihood)

    def masses(self) -> Float[np.ndarray, " M"]:
        """What the configurations count, summing to 1."""
        raise NotImplementedError

    def predictive_entropies(self, draws: Draws) -> Values:
        """The entropy of each row's label once the batch's labels are known, on average, (n,)."""
        n, num_draws, num_classes = draws.shape
        relative = np.exp(self.log_likelihood - self.log_likelihood.max(1, keepdims=True))
        weights = relative / relative.sum(1, keepdims=True)  # (M, N)
        masses = self.masses()
        found = []
        for rows in row_blocks(n, max(self.size, num_draws) * num_classes):
            probs = np.exp(draws[rows], dtype=float)  # (b, N, C)
            flat = probs.transpose(1, 0, 2).reshape(num_draws, -1)  # (N, b C)
            entropies = entr(weights @ flat).reshape(self.size, -1, num_classes).sum(2)  # (M, b)
            found.append(masses @ entropies)
        return np.concatenate(found)


class _Enumerated(_Configurations):
    """All C^m of them that are possible."""

    def __init__(self, num_draws: int) -> None:
        self.log_likelihood = np.zeros((1, num_draws))

    def masses(self) -> Float[np.ndarray, " M"]:
        found = np.exp(self.log_likelihood).mean(1)
        return found / found.sum()  # stored probabilities add up to 1 but for rounding

    def add(self, log_probs: Float[np.ndarray, "N C"]) -> None:
        """One more row: each configuration with each of its labels."""
        grown = self.log_likelihood[:, None] + log_probs.T.astype(float)  # (M, C, N)
        grown = grown.reshape(-1, grown.shape[2])
        self.log_likelihood = grown[grown.max(1) > -np.inf]


class _Sampled(_Configurations):
    """Drawn from the posterior predictive of the batch: draw by draw, label by label."""

    def __init__(self, num_draws: int, about: int, rng: np.random.Generator) -> None:
        self.source = np.tile(np.arange(num_draws), -(-about // num_draws))  # (M,)
        self.log_likelihood = np.zeros((len(self.source), num_draws))
        self.rng = rng

    def masses(self) -> Float[np.ndarray, " M"]:
        return np.full(self.size, 1 / self.size)

    def add(self, log_probs: Float[np.ndarray, "N C"]) -> None:
        """One more row: a label for each configuration, from the draw that it comes from."""
        log_probs = log_probs.astype(float)
        edges = np.exp(log_probs).cumsum(1)
        edges /= edges[:, -1:]
        uniform = self.rng.random((self.size, 1))
        labels = (uniform >= edges[self.source, :-1]).sum(1)
        self.log_likelihood = self.log_likelihood + log_probs.T[labels]
