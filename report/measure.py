"""Every number of the tables, from one evaluation's predictions; and what each is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from decisions.information import (
    expected_entropy,
    mutual_information,
    predictive_entropy,
    row_blocks,
)
from report import uncertainty as u
from report.predictions import Predictions
from utils.metrics import posterior_predictive
from utils.temperature import scale


class Metric(NamedTuple):
    """A column.

    Attributes:
        key: in tables.csv.
        title: in the other tables.
        better: "low", "high", or "" where neither is.
        about: one line for the page.
        highest: the largest value there is (all are at least 0).
    """

    key: str
    title: str
    better: str
    about: str
    highest: float = np.inf


SCORES = {
    "maxprob": "1 - max probability",
    "entropy": "predictive entropy",
    "mi": "mutual information",
}


def _detection(prefix: str, what: str) -> list[Metric]:
    return [
        *(Metric(f"{prefix}_auroc_{k}", f"AUROC {k}", "high", f"{what}, by {v}", 1)
          for k, v in SCORES.items()),
        *(Metric(f"{prefix}_fpr95_{k}", f"FPR@95 {k}", "low", f"{what}, by {v}", 1)
          for k, v in SCORES.items()),
    ]  # fmt: skip


TABLES: dict[str, tuple[Metric, ...]] = {
    "Accuracy and calibration": (
        Metric("acc", "ACC", "high", "share of correct predictions", 1),
        Metric("ece", "ECE", "low", "top-label, equal-width bins (arXiv 1706.04599)", 1),
        Metric("ece_floor", "ECE if calibrated", "", "of labels drawn from the probabilities", 1),
        Metric("ece_adaptive", "adaptive ECE", "low", "bins of equal counts (arXiv 1508.05154)", 1),
        Metric("ece_classwise", "class-wise ECE", "low", "mean over classes (arXiv 1910.12656)", 1),
        Metric("mce", "MCE", "low", "the worst bin; noisy where bins hold few examples", 1),
        Metric("ece_smooth", "smooth ECE", "low", "kernel instead of bins (arXiv 2309.12236)", 1),
        Metric("nll", "NLL", "low", "negative log-likelihood, nats"),
        Metric("brier", "Brier", "low", "summed over the classes, 0 to 2", 2),
        Metric("brier_calibration", "Brier cal.", "low", "its calibration part", 2),
        Metric("brier_refinement", "Brier ref.", "low", "the rest: what recalibration leaves", 2),
    ),
    "Uncertainty": (
        Metric("entropy", "entropy", "", "of the posterior predictive, nats: total uncertainty"),
        Metric("entropy_expected", "expected entropy", "", "mean entropy of a draw: aleatoric"),
        Metric("mi", "mutual information", "", "the difference of both: epistemic"),
        Metric("mi_jackknife", "MI, corrected", "", "without the bias of few draws"),
        Metric("draw_std", "std over draws", "", "of the predicted class's probability", 0.5),
        Metric("flips", "flip rate", "", "share of (draw, example) pairs against the mean", 1),
    ),
    "Knowing its errors": (
        Metric("aurc", "AURC", "low", "area under the risk-coverage curve", 1),
        Metric("acc_at_50", "ACC at 50 %", "high", "of the most confident half", 1),
        Metric("acc_at_80", "ACC at 80 %", "high", "of the most confident 80 %", 1),
        Metric("acc_at_95", "ACC at 95 %", "high", "of the most confident 95 %", 1),
        *_detection("error", "errors among the predictions"),
    ),
    "Telling shifted from source examples": (*_detection("ood", "shifted from source examples"),),
}
METRICS = {metric.key: metric for metrics in TABLES.values() for metric in metrics}
BLOCKS = 2000  # of examples with equal counts, whose order resampled ranks keep
COVERAGES = {"acc_at_50": 0.5, "acc_at_80": 0.8, "acc_at_95": 0.95}


@dataclass(frozen=True)
class Examples:
    """Predictions with what the metrics need of each example, computed once.

    Draws may fill most of the memory: they stay as they are stored, and are scaled and
    exponentiated block by block.

    Attributes:
        draws: log-probabilities, (n, N, C).
        labels: (n,); -1 where the examples belong to none of the classes.
        log_probs: of the posterior predictive, (n, C).
        temperature: what the logits of every draw are to be divided by, if anything.
        num_draws: how many draws each example has, (n,), the first ones; None: all N.
        antithetic: whether draws 2k and 2k+1 are a pair.
    """

    draws: np.ndarray
    labels: np.ndarray
    log_probs: np.ndarray
    temperature: float | None = None
    num_draws: np.ndarray | None = None
    antithetic: bool = False

    @classmethod
    def of(cls, predictions: Predictions, temperature: float | None = None) -> Examples:
        """With the logits of every draw divided by the temperature, if there is one."""
        draws, num_draws = predictions.draws, predictions.num_draws
        log_probs = [
            posterior_predictive(
                torch.from_numpy(_scaled(draws[rows], temperature)),
                torch.from_numpy(num_draws[rows]),
            ).numpy()
            for rows in row_blocks(len(draws), draws[0].size)
        ]
        return cls(
            draws,
            predictions.labels,
            np.concatenate(log_probs),
            temperature,
            num_draws,
            predictions.antithetic,
        )

    def draw(self, number: int) -> np.ndarray:
        """One draw of all examples, (n, C); NaN for those that do not have it."""
        return _scaled(self.draws[:, number], self.temperature)

    @cached_property
    def probs(self) -> np.ndarray:
        return np.exp(self.log_probs)

    @property
    def labelled(self) -> bool:
        """Whether the examples have labels."""
        return bool((self.labels >= 0).all())

    @cached_property
    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """(confidence, correct)"""
        return u.top_label(self.log_probs, self.labels)

    @cached_property
    def smooth(self) -> tuple[float, float]:
        return u.smooth_calibration_error(*self.top)

    @cached_property
    def ranked_top(self) -> tuple[np.ndarray, np.ndarray]:
        """`top` with the confidences in blocks, for what depends on ranks."""
        return u.in_blocks(self.top[0], BLOCKS), self.top[1]

    @cached_property
    def ranked_scores(self) -> dict[str, np.ndarray]:
        """`scores` in blocks."""
        return {key: u.in_blocks(score, BLOCKS) for key, score in self.scores.items()}

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """What is averaged over the examples."""
        entropy = predictive_entropy(self.log_probs)
        of_draws = []
        for rows in row_blocks(len(self.draws), self.draws[0].size):
            block = _scaled(self.draws[rows], self.temperature)
            own = None if self.num_draws is None else self.num_draws[rows]
            of_draws.append(
                (
                    expected_entropy(block, own),
                    u.jackknifed_information(block, own, self.antithetic),
                    u.draw_deviation(block, own),
                    u.flip_rates(block, own),
                )
            )
        expected, corrected, deviation, flips = map(np.concatenate, zip(*of_draws, strict=True))
        # Without the examples it is not defined for, those that settled first, the mean would be
        # of others.
        defined = {} if np.isnan(corrected).any() else {"mi_jackknife": corrected}
        by_label = {}
        if self.labelled:
            by_label = {
                "acc": self.top[1],
                "nll": u.negative_log_likelihoods(self.log_probs, self.labels),
                "brier": u.brier_scores(self.probs, self.labels),
            }
        return {
            **by_label,
            "entropy": entropy,
            "entropy_expected": expected,
            "mi": mutual_information(entropy, expected),
            "draw_std": deviation,
            "flips": flips,
            **defined,
        }

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Uncertainties that errors and shifted examples are told by; one draw has no MI."""
        scores = {"maxprob": 1 - self.top[0], "entropy": self.values["entropy"]}
        return scores | ({"mi": self.values["mi"]} if self.draws.shape[1] > 1 else {})


def _scaled(draws: np.ndarray, temperature: float | None) -> np.ndarray:
    """In double precision, with the logits divided by the temperature, if there is one."""
    draws = draws.astype(float)
    return draws if temperature is None else scale(torch.from_numpy(draws), temperature).numpy()


def measure(
    examples: Examples, num_bins: int, weights: np.ndarray | None = None
) -> dict[str, u.Number]:
    """The metrics of one data set; (R,) values each if there are weights (R, n).

    Resampled ranks are those of `BLOCKS` blocks of examples; the values themselves are exact.
    Without labels only the uncertainties are defined.
    """
    e, (confidence, correct) = examples, examples.top
    ranked = e.top if weights is None else e.ranked_top
    scores = e.scores if weights is None else e.ranked_scores
    out = {key: u.mean(values, weights) for key, values in e.values.items()}
    if not e.labelled:
        return out
    out["ece"], out["mce"] = u.calibration_errors(confidence, correct, num_bins, weights)
    out["ece_adaptive"] = u.adaptive_calibration_error(*ranked, num_bins, weights)
    out["ece_classwise"] = u.classwise_calibration_error(e.probs, e.labels, num_bins, weights)
    value, sigma = e.smooth
    out["ece_smooth"] = (
        value if weights is None else u.smooth_error_at(confidence, correct, sigma, weights)
    )
    out["brier_calibration"] = u.brier_calibration(e.probs, e.labels, num_bins, weights)
    out["brier_refinement"] = out["brier"] - out["brier_calibration"]
    out["aurc"] = u.area_under_risk_coverage(*ranked, weights)
    at = u.accuracy_at_coverage(*ranked, np.array(list(COVERAGES.values())), weights)
    out |= dict(zip(COVERAGES, np.moveaxis(at, -1, 0), strict=True))
    for key, score in scores.items():
        out[f"error_auroc_{key}"], out[f"error_fpr95_{key}"] = u.detection(
            score, 1 - correct, weights
        )
    return out


class SourceHistogram(NamedTuple):
    """What the plot of entropies shows of the source: `Curves.entropy`, and its classes."""

    entropy: np.ndarray
    num_classes: int


@dataclass(frozen=True)
class Source:
    """What shifted examples are held against: the scores of source examples, without the draws."""

    fingerprint: int
    num_examples: int
    scores: dict[str, np.ndarray]
    ranked_scores: dict[str, np.ndarray]
    histogram: SourceHistogram

    @classmethod
    def of(cls, examples: Examples, fingerprint: int) -> Source:
        """Of measured examples."""
        histogram = SourceHistogram(entropy_histogram(examples), examples.probs.shape[1])
        size = len(examples.labels)
        return cls(fingerprint, size, examples.scores, examples.ranked_scores, histogram)


def measure_shift(
    source: Source, shifted: Examples, weights: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, u.Number]:
    """Source against shifted examples; each set is resampled by weights of its own."""
    positive = np.repeat([0.0, 1.0], [source.num_examples, len(shifted.labels)])
    both = None if weights is None else np.concatenate(weights, axis=1)
    own, other = (e.scores if weights is None else e.ranked_scores for e in (source, shifted))
    out = {}
    for key in own.keys() & other.keys():
        score = np.concatenate([own[key], other[key]])
        out[f"ood_auroc_{key}"], out[f"ood_fpr95_{key}"] = u.detection(score, positive, both)
    return out


# --- what plots show ------------------------------------------------------------------------------


COVERAGE_GRID = np.linspace(0.02, 1.0, 50)
ENTROPY_BINS = 30


@dataclass(frozen=True)
class Curves:
    """What the plots of one evaluation need, small enough to keep for thousands of runs.

    Attributes:
        bins: examples, summed confidence and correct answers of each bin, (3, bins).
        risk: error rate at each of `COVERAGE_GRID`.
        entropy: share of the examples in each of `ENTROPY_BINS` bins from 0 to log C.
        draws: (K, 3) number of draws, NLL and ECE of the mean of the first so many; an example that
            has fewer counts with all it has. Empty without labels, and then `bins` and `risk` mean
            nothing.
    """

    bins: np.ndarray
    risk: np.ndarray
    entropy: np.ndarray
    draws: np.ndarray


def curves(examples: Examples, num_bins: int) -> Curves:
    """The plots' numbers of one evaluation."""
    confidence, correct = examples.top
    bins = u.bin_of(confidence, num_bins)
    columns = (np.ones_like(correct), confidence, correct)
    return Curves(
        bins=np.stack([np.bincount(bins, column, num_bins) for column in columns]),
        risk=1 - np.asarray(u.accuracy_at_coverage(confidence, correct, COVERAGE_GRID)),
        entropy=entropy_histogram(examples),
        draws=np.array(list(_by_draws(examples, num_bins)) if examples.labelled else []),
    )


def entropy_histogram(examples: Examples) -> np.ndarray:
    """Share of the examples in each of `ENTROPY_BINS` bins from 0 to log C."""
    most = np.log(max(examples.probs.shape[1], 2))
    counts, _ = np.histogram(examples.values["entropy"] / most, ENTROPY_BINS, (0, 1 + 1e-9))
    return counts / len(examples.labels)


def _by_draws(examples: Examples, num_bins: int) -> Iterator[tuple[float, float, float]]:
    labels, total = examples.labels, examples.draws.shape[1]
    shown = range(total) if total <= 20 else np.unique(np.geomspace(1, total, 20).astype(int)) - 1
    num_draws = np.full(len(labels), total) if examples.num_draws is None else examples.num_draws
    running = examples.draw(0)
    for number in range(total):
        if number:
            drawn = num_draws > number
            running[drawn] = np.logaddexp(running[drawn], examples.draw(number)[drawn])
        if number in shown:
            log_probs = running - np.log(np.minimum(num_draws, number + 1))[:, None]
            ece, _ = u.calibration_errors(*u.top_label(log_probs, labels), num_bins)
            yield number + 1, u.mean(u.negative_log_likelihoods(log_probs, labels)), ece
