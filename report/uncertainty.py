r"""What a posterior says of its own errors: calibration beyond the ECE, uncertainty, selection.

Pure numpy functions beside the four numbers of `utils.metrics`. Two kinds:

- per example: `(log_probs, labels)` or draws to an array `(n,)`; entropies and mutual information
  are in `decisions.information`. Where examples have unequal numbers of draws, `num_draws (n,)`
  says how many of the N are an example's own, the first ones; what stands behind them is ignored;
- of a data set: arrays `(n,)` to one number. Each takes `weights (R, n)` and then returns `(R,)`
  numbers, one per row of weights. A row that counts how often each example was drawn gives exactly
  the value on that resample, repeated examples included, so R bootstrap resamples of n examples
  are a few matrix operations (`report.significance`).

Scores that tie are treated as one block, so no value depends on the order of the examples. What is
undefined (an AUROC without positives) is NaN.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import entr

from decisions.information import Counts, Draws, Values, own_draws

Weights = Float[np.ndarray, "R n"]
Number = float | Float[np.ndarray, " R"]

DENSE = 100_000  # up to which size a sum over groups is a matrix product
SMOOTH_GRID = 1001  # points of the confidence axis that `smooth_calibration_error` smooths over
FLOOR_DRAWS = 60  # label sets that `noise_floors` averages over


# --- per example ----------------------------------------------------------------------------------


def top_label(
    log_probs: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"]
) -> tuple[Values, Values]:
    """The largest probability of each example, and 1.0 where its class is the label."""
    confidence = np.minimum(np.exp(log_probs.max(-1)), 1.0)
    return confidence, (log_probs.argmax(-1) == labels).astype(float)


def negative_log_likelihoods(
    log_probs: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"]
) -> Values:
    r"""$-\log p(y_i | x_i)$ in nats."""
    return -np.take_along_axis(log_probs, labels[:, None], 1)[:, 0]


def brier_scores(probs: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"]) -> Values:
    r"""$\sum_c (p_{ic} - [y_i = c])^2$ (Brier 1950), 0 to 2."""
    return np.square(probs - _one_hot(labels, probs.shape[-1])).sum(-1)


def jackknifed_information(
    draws: Draws, num_draws: Counts | None = None, antithetic: bool = False
) -> Values:
    r"""Mutual information without its first-order bias in the number of draws, nats.

    $G I - \sum_g (1 - m_g / N) I_{-g}$ (Quenouille 1956; for units of unequal size Busing, Meijer
    and Van der Leeden 1999), with I the mutual information of all N draws and $I_{-g}$ the one
    without the $m_g$ draws of unit g. The G units must be independent: single draws, or pairs
    (E, -E) of antithetic ones, where an odd last draw is a unit of its own. What is left of the
    bias is O(1/G^2). The price is variance over draws, of which the jackknife's own estimate,
    $\frac{G-1}{G} \sum_g (I_{-g} - \bar I_{-g})^2$, is too large on average (Efron and Stein 1981).
    Entropy is concave, so but for rounding it is never below I. If the draws decide when they are
    enough, it stays too low: where the first agree, few follow.

    Args:
        draws: (n, N, C).
        num_draws: how many of them each example has, (n,); None: all N.
        antithetic: whether draws 2k and 2k+1 are a pair.
    Returns:
        (n,); NaN for a single unit.
    """
    probs, drawn = own_draws(draws, num_draws)
    starts = np.arange(0, draws.shape[1], 2 if antithetic else 1)
    of_unit = np.add.reduceat(probs, starts, axis=1)  # (n, G, C), sums over the draws of a unit
    entropies = np.add.reduceat(entr(probs).sum(-1), starts, axis=1)  # (n, G)
    sizes = np.add.reduceat(drawn.astype(float), starts, axis=1)  # 0 where an example has no more
    total, entropy, size = (sums.sum(1) for sums in (of_unit, entropies, sizes))
    whole = entr(total / size[:, None]).sum(-1) - entropy / size
    left = size[:, None] - sizes
    # rounding may leave a sum of probabilities below 0, whose entropy would be infinite
    rest = np.maximum(total[:, None] - of_unit, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where the only unit is left out
        means = rest / left[:, :, None]
        without = entr(means).sum(-1) - (entropy[:, None] - entropies) / left
    units = (sizes > 0).sum(1)
    weights = left / size[:, None]
    return units * whole - np.where(sizes > 0, weights * without, 0.0).sum(1)


def draw_deviation(draws: Draws, num_draws: Counts | None = None) -> Values:
    r"""Standard deviation over draws of the predicted class's probability, $\sqrt{\mathrm{Var}_n
    \, p_n(\hat y)}$ with $\hat y = \arg\max_c \bar p_c$ (Gal and Ghahramani 2016, arXiv 1506.02142,
    report such spreads). Between 0 and 1/2; divisor N.

    Of antithetic draws it is the spread of a single draw as well, but known only as well as from
    N/2 pairs: the two of a pair say nearly the same of it.
    """
    probs, drawn = own_draws(draws, num_draws)
    size = drawn.sum(1)
    predicted = probs.sum(1).argmax(-1)
    chosen = np.take_along_axis(probs, predicted[:, None, None], 2)[..., 0]  # (n, N)
    centred = np.where(drawn, chosen - (chosen.sum(1) / size)[:, None], 0.0)
    return np.sqrt(np.square(centred).sum(1) / size)


def flip_rates(draws: Draws, num_draws: Counts | None = None) -> Values:
    r"""Share of the draws whose most probable class is not the posterior predictive's.

    $\frac1N \sum_n [\arg\max_c p_n(c) \ne \arg\max_c \bar p(c)]$, with $\bar p$ the mean of the N
    probabilities; its mean over examples is the share of (draw, example) pairs that flip. This is
    the variation ratio of Freeman (1965) taken around the predictive's class, which need not be the
    mode of the votes. The prediction at the posterior mean of the *weights* is not stored, so it
    is not what the draws are held against. 0 for one draw.
    """
    probs, drawn = own_draws(draws, num_draws)
    predicted = probs.sum(1).argmax(-1)
    flipped = drawn & (draws.argmax(-1) != predicted[:, None])
    return flipped.sum(1) / drawn.sum(1)


# --- of a data set: means -------------------------------------------------------------------------


def mean(values: Values, weights: Weights | None = None) -> Number:
    r"""$\sum_i w_i v_i / \sum_i w_i$."""
    w = _rows(weights, len(values))
    return _number(w @ values / w.sum(1), weights)


# --- of a data set: calibration -------------------------------------------------------------------


def calibration_errors(
    confidence: Values, correct: Values, num_bins: int = 15, weights: Weights | None = None
) -> tuple[Number, Number]:
    r"""ECE and MCE of the top label over equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    $\mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{acc}(b) - \mathrm{conf}(b)|$ and $\mathrm{MCE} =
    \max_b |\mathrm{acc}(b) - \mathrm{conf}(b)|$ over the bins that are not empty. A bin holds
    confidences from its lower edge up to, not including, its upper one.
    """
    w = _rows(weights, len(confidence))
    counts, gaps = _binned_sums(confidence, num_bins, w, None, correct - confidence)
    ece = np.abs(gaps).sum(1) / w.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mce = np.where(counts > 0, np.abs(gaps) / counts, 0.0).max(1)
    return _number(ece, weights), _number(mce, weights)


def classwise_calibration_error(
    probs: Float[np.ndarray, "n C"],
    labels: Int[np.ndarray, " n"],
    num_bins: int = 15,
    weights: Weights | None = None,
) -> Number:
    r"""Class-wise ECE (Kull et al. 2019, arXiv 1910.12656; "static" in arXiv 1904.01685).

    $\frac1C \sum_c \sum_b \frac{n_{bc}}{n} |\bar y_c(b) - \bar p_c(b)|$: each class's probability
    is binned over equal-width bins and held against how often the class is the label.
    """
    w = _rows(weights, len(labels))
    gaps = _one_hot(labels, probs.shape[1]) - probs
    total = sum(
        np.abs(_binned_sums(probs[:, c], num_bins, w, gaps[:, c])[0]).sum(1)
        for c in range(probs.shape[1])
    )
    return _number(total / w.sum(1) / probs.shape[1], weights)


def adaptive_calibration_error(
    confidence: Values, correct: Values, num_bins: int = 15, weights: Weights | None = None
) -> Number:
    r"""Top-label ECE over bins of equal counts (Nguyen and O'Connor 2015, arXiv 1508.05154).

    Bin b holds the examples with ranks from $\lfloor bn/B \rceil$ to $\lfloor (b+1)n/B \rceil$ in
    order of confidence. Examples that tie across an edge are shared out evenly.
    """
    ranked = _Ranked(confidence, _rows(weights, len(confidence)))
    counts, gaps = ranked.cumulative(), ranked.cumulative(correct - confidence)
    errors = [_between_ranks(n, g[None], num_bins)[0] for n, g in zip(counts, gaps, strict=True)]
    return _number(np.array(errors), weights)


def _between_ranks(
    counts: Float[np.ndarray, " blocks"], gaps: Float[np.ndarray, "R blocks"], num_bins: int
) -> Float[np.ndarray, " R"]:
    """Adaptive ECE from sums up to each block: of examples, and of correct - confidence."""
    edges = np.round(np.arange(num_bins + 1) * counts[-1] / num_bins)
    counts = np.append(0.0, counts)
    at_edges = np.array([np.interp(edges, counts, np.append(0.0, row)) for row in gaps])
    return np.abs(np.diff(at_edges)).sum(1) / counts[-1]


def smooth_calibration_error(confidence: Values, correct: Values) -> tuple[float, float]:
    r"""Smooth ECE of the top label (Błasiok and Nakkiran 2023, arXiv 2309.12236), without bins.

    $\int |(K_\sigma * r)(t)| \, dt$, the residuals $r = \mathrm{correct} - \mathrm{confidence}$
    smoothed by a Gaussian that is reflected at 0 and 1, at the $\sigma$ that equals the error
    itself; computed by relplot.

    Returns:
        the error and its bandwidth.
    """
    import relplot  # draws in matplotlib and pandas

    value, sigma = relplot.smECE(confidence, correct, return_width=True)
    return float(value), float(sigma)


def smooth_error_at(
    confidence: Values,
    correct: Values | Weights,
    sigma: float,
    weights: Weights | None = None,
) -> Number:
    r"""The smooth ECE at a given bandwidth: $\int |(K_\sigma * r)(t)| dt / \int K_\sigma * 1$.

    What resamples are worth: they keep the bandwidth of the sample. `correct` may be (R, n) too.
    """
    w = _rows(weights, len(confidence))
    # Linear weights to the two neighbours on the grid, as relplot does.
    position = confidence * (SMOOTH_GRID - 1)
    lower = np.clip(position.astype(int), 0, SMOOTH_GRID - 2)
    share = position - lower
    residual = correct - confidence
    grid = np.linspace(0, 1, SMOOTH_GRID)
    points = np.linspace(0, 1, 201)
    kernel = sum(
        np.exp(-0.5 * np.square((image[:, None] - points) / sigma))
        for image in (grid, -grid, 2 - grid)
    )  # (grid, points)
    if len(confidence) <= SMOOTH_GRID:  # few examples: smooth each of them
        each = (1 - share)[:, None] * kernel[lower] + share[:, None] * kernel[lower + 1]
        residuals, density = (w * residual) @ each, w @ each
    else:
        residuals, density = (
            np.array(
                [
                    np.bincount(lower, row * (1 - share), SMOOTH_GRID)
                    + np.bincount(lower + 1, row * share, SMOOTH_GRID)
                    for row in rows
                ]
            )
            @ kernel
            for rows in (w * residual, w)
        )
    return _number(np.abs(residuals).sum(1) / density.sum(1), weights)


def brier_calibration(
    probs: Float[np.ndarray, "n C"],
    labels: Int[np.ndarray, " n"],
    num_bins: int = 15,
    weights: Weights | None = None,
) -> Number:
    r"""The calibration part of the Brier score (DeGroot and Fienberg 1983; Murphy 1973).

    $\sum_c \sum_b \frac{n_{bc}}{n} (\bar p_c(b) - \bar y_c(b))^2$ over equal-width bins of each
    class's probability. What is left of the score, Brier - calibration, is the refinement:
    $\sum_c \sum_b \frac{n_{bc}}{n} \bar y_c(b)(1 - \bar y_c(b))$ where the probabilities in a bin
    agree, else plus what they vary within bins (Stephenson et al. 2008).
    """
    w = _rows(weights, len(labels))
    gaps = probs - _one_hot(labels, probs.shape[1])
    total = np.zeros(len(w))
    for c in range(probs.shape[1]):
        counts, sums = _binned_sums(probs[:, c], num_bins, w, None, gaps[:, c])
        total += (np.square(sums) / np.maximum(counts, 1e-300)).sum(1)
    return _number(total / w.sum(1), weights)


def noise_floors(probs: Float[np.ndarray, "n C"], num_bins: int, seed: int) -> dict[str, float]:
    r"""What each calibration error would be on average if the probabilities were calibrated.

    Labels are drawn from the probabilities themselves, `FLOOR_DRAWS` times, and the errors of those
    are averaged: $\mathbb E_{y \sim p}[\mathrm{ECE}(p, y)]$ (the null of the consistency bars of
    Bröcker and Smith 2007). Finite samples put it above 0, the further the fewer examples there are
    and the less confident the model is, so two calibrated models can differ in their ECE.

    Returns:
        the floors of "ece", "mce", "ece_adaptive", "ece_classwise", "ece_smooth",
        "brier_calibration".
    """
    n, num_classes = probs.shape
    rng = np.random.default_rng(seed)
    edges = probs.cumsum(1)[:, :-1]
    labels = np.stack(
        [(rng.random((n, 1)) > edges).sum(1, dtype=np.int16) for _ in range(FLOOR_DRAWS)]
    )  # (draws, n)
    confidence = np.minimum(probs.max(1), 1.0)
    correct = (labels == probs.argmax(1)).astype(float)
    residuals = correct - confidence
    bins = bin_of(confidence, num_bins)
    counts, gaps = np.bincount(bins, minlength=num_bins), np.abs(_sums(bins, num_bins, residuals))
    filled = counts > 0
    ranked, ones = _Ranked(confidence, residuals), _Ranked(confidence, np.ones((1, n)))
    adaptive = _between_ranks(ones.cumulative()[0], ranked.cumulative(), num_bins)
    classwise = brier = 0.0
    for c in range(num_classes):
        bins = bin_of(probs[:, c], num_bins)
        sums = _sums(bins, num_bins, (labels == c) - probs[:, c])
        classwise += np.abs(sums).sum(1).mean() / n / num_classes
        sizes = np.maximum(np.bincount(bins, minlength=num_bins), 1)
        brier += (np.square(sums) / sizes).sum(1).mean() / n
    # The bandwidth that equals the error; the root of both lands close to it in a few steps.
    smooth = 0.05
    for _ in range(4):
        at = float(np.mean(smooth_error_at(confidence, correct, smooth, np.ones((1, n)))))
        smooth = max(1e-3, (smooth * at) ** 0.5)
    return {
        "ece": float(gaps.sum(1).mean() / n),
        "mce": float((gaps[:, filled] / counts[filled]).max(1).mean()),
        "ece_adaptive": float(adaptive.mean()),
        "ece_classwise": float(classwise),
        "ece_smooth": at,
        "brier_calibration": float(brier),
    }


# --- of a data set: selection and detection -------------------------------------------------------


def area_under_risk_coverage(
    confidence: Values, correct: Values, weights: Weights | None = None
) -> Number:
    r"""AURC (Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206); lower is better.

    $\frac1n \sum_i r(c_i)$, with $r(t)$ the error rate among the examples whose confidence is at
    least t: the mean error rate over all coverages.
    """
    ranked = _Ranked(-confidence, _rows(weights, len(confidence)))
    kept, errors = ranked.cumulative(), ranked.cumulative(1.0 - correct)
    steps = np.diff(kept, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        risk = np.where(kept > 0, errors / kept, 0.0)
    return _number((steps * risk).sum(1) / kept[:, -1], weights)


def accuracy_at_coverage(
    confidence: Values, correct: Values, coverage: float | Values, weights: Weights | None = None
) -> Number:
    r"""Accuracy of the most confident share `coverage` of the examples (El-Yaniv and Wiener 2010).

    Where examples tie at the threshold, or the share is not a whole number of examples, the last
    ones count in part. Several coverages (K,) give (K,), or (R, K) with weights.
    """
    ranked = _Ranked(-confidence, _rows(weights, len(confidence)))
    rows = []
    for kept, right in zip(ranked.cumulative(), ranked.cumulative(correct), strict=True):
        target = np.asarray(coverage) * kept[-1]
        rows.append(np.interp(target, np.append(0.0, kept), np.append(0.0, right)) / target)
    return _number(np.array(rows), weights)


def detection(
    uncertainty: Values, positive: Values, weights: Weights | None = None
) -> tuple[Number, Number]:
    r"""AUROC and FPR@95 of an uncertainty that should be high where `positive` is 1.

    `positive` marks errors (misclassification detection, Hendrycks and Gimpel 2017, arXiv
    1610.02136) or the examples of a shifted set (OOD detection). The AUROC is the probability that
    a positive has the larger uncertainty, ties counting half. FPR@95 (Liang et al. 2018, arXiv
    1706.02690): at the smallest threshold that keeps 95 % of the others (correct answers, source
    examples), the share of positives that is kept by mistake; lower is better.
    """
    ranked = _Ranked(uncertainty, _rows(weights, len(uncertainty)))
    positives, others = ranked.cumulative(positive), ranked.cumulative(1.0 - positive)
    total, total_others = positives[:, -1], others[:, -1]
    steps = np.diff(positives, axis=1, prepend=0.0)
    # of each positive: the others below it, and half of those that tie with it
    below = others - 0.5 * np.diff(others, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (steps * below).sum(1) / (total * total_others)
        reached = (others >= 0.95 * total_others[:, None] - 1e-9).argmax(1)
        fpr = positives[np.arange(len(reached)), reached] / total
    undefined = (total == 0) | (total_others == 0)
    auroc, fpr = (np.where(undefined, np.nan, v) for v in (auroc, fpr))
    return _number(auroc, weights), _number(fpr, weights)


# --- what they share ------------------------------------------------------------------------------


class _Ranked:
    """Examples by ascending score, those that tie as one block, and sums up to each block.

    Args:
        score: (n,)
        weights: (R, n)
    """

    def __init__(self, score: Values, weights: Weights) -> None:
        blocks, self.block = np.unique(score, return_inverse=True)
        self.num_blocks = len(blocks)
        self.weights = weights

    def cumulative(self, values: Values | None = None) -> Float[np.ndarray, "R blocks"]:
        """Weighted sums of `values` (of ones by default) over all examples up to each block."""
        return np.cumsum(_sums(self.block, self.num_blocks, self.weights, values), axis=1)


def bin_of(values: Values, num_bins: int) -> Int[np.ndarray, " n"]:
    """The equal-width bin of each value between 0 and 1; 1 belongs to the last one."""
    # Edges as numbers, not values times bins: rounding must not move a value across its edge.
    edges = np.linspace(0, 1, num_bins + 1)
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_bins - 1)


def _binned_sums(
    position: Values, num_bins: int, weights: Weights, *columns: Values | None
) -> list[Float[np.ndarray, "R bins"]]:
    """The weighted sum of each column over every equal-width bin of `position`."""
    bins = bin_of(position, num_bins)
    return [_sums(bins, num_bins, weights, column) for column in columns]


def _sums(
    group: Int[np.ndarray, " n"], num_groups: int, weights: Weights, values: Values | None = None
) -> Float[np.ndarray, "R groups"]:
    """The weighted sum of `values` (of ones by default) in each group."""
    if num_groups * len(group) <= DENSE:
        table = np.zeros((len(group), num_groups))
        table[np.arange(len(group)), group] = 1.0 if values is None else values
        return weights @ table
    # bincount reads in order and writes into a small table: faster than sorting or a sparse product
    return np.array(
        [np.bincount(group, row if values is None else row * values, num_groups) for row in weights]
    )


def in_blocks(score: Values, num_blocks: int) -> Values:
    """Each score replaced by the mean of its block, of `num_blocks` with equal counts.

    Ranks that many resamples look at need not be finer than this.
    """
    if len(score) <= num_blocks:
        return score
    ranks = np.empty(len(score), dtype=np.int64)
    ranks[np.argsort(score, kind="stable")] = np.arange(len(score))
    block = ranks * num_blocks // len(score)
    means = np.bincount(block, score, num_blocks) / np.bincount(block, minlength=num_blocks)
    return means[block]


def _one_hot(labels: Int[np.ndarray, " n"], num_classes: int) -> Float[np.ndarray, "n C"]:
    out = np.zeros((len(labels), num_classes))  # an identity matrix of many classes is large
    out[np.arange(len(labels)), labels] = 1.0
    return out


def _rows(weights: Weights | None, n: int) -> Weights:
    return np.ones((1, n)) if weights is None else weights


def _number(values: np.ndarray, weights: Weights | None) -> Number:
    """(R,), or its one value where no weights were given."""
    if weights is not None:
        return values
    return float(values[0]) if values.ndim == 1 else values[0]
