"""What a posterior keeps of its calibration rows: enough for every set and every bound, later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import entr

from decisions import conformal, selective
from utils.errors import UsageError

TOLERANCE = 1e-6  # of a row's probabilities, which add up to 1


class Calibration(NamedTuple):
    """Predictions of rows that the posterior was neither trained nor tuned on.

    Attributes:
        predictive: probabilities of the posterior predictive, (n, C), scaled by the temperature if
            one was fitted.
        labels: (n,)
        mutual_information: in nats, (n,)
        index: of the rows in their split, (n,)
    """

    predictive: Float[np.ndarray, "n C"]
    labels: Int[np.ndarray, " n"]
    mutual_information: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]

    def set_rule(
        self,
        level: float,
        score: str = "lac",
        per_class: bool = False,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> SetRule:
        """Sets with that coverage; see `decisions.conformal`.

        Raises:
            UsageError: a wrong level or score, or too few rows.
        """
        uniform = conformal.uniforms(seed, "calibration", self.index) if score != "lac" else None
        own = (self.predictive, self.labels, score, level, per_class, uniform, names)
        return SetRule(conformal.calibrate(*own), seed)

    def answer_rule(
        self, max_risk: float, confidence: float, by: str = "max-probability"
    ) -> AnswerRule:
        """Answers with that error rate; see `decisions.selective`.

        Raises:
            UsageError: shares that are none, or a risk that cannot be shown.
        """
        score = confidences(self.predictive, self.mutual_information, by)
        wrong = self.predictive.argmax(1) != self.labels
        return AnswerRule(selective.choose_threshold(score, wrong, max_risk, confidence), by)

    def problem(self, num_classes: int) -> str | None:
        """Why it cannot be the calibration of so many answers, if so; for what a file says."""
        sums = self.predictive.sum(1)
        if self.predictive.shape[1] != num_classes:
            return f"it has {self.predictive.shape[1]} classes, the posterior {num_classes} answers"
        if (self.predictive < 0).any() or (np.abs(sums - 1) > TOLERANCE).any():
            return "its probabilities do not add up to 1"
        if ((self.labels < 0) | (self.labels >= num_classes)).any():
            return f"a label is not between 0 and {num_classes - 1}"
        if (self.mutual_information < 0).any():
            return "a mutual information is negative"
        if (self.index < 0).any() or len(set(self.index.tolist())) < len(self.index):
            return "a row's index is negative, or stands there twice"
        return None


def confidences(
    predictive: Float[np.ndarray, "n C"], mutual_information: Float[np.ndarray, " n"], by: str
) -> Float[np.ndarray, " n"]:
    """See `selective.confidence_scores`."""
    return selective.confidence_scores(predictive, entr(predictive).sum(1), mutual_information, by)


class SetRule(NamedTuple):
    """How sets are made of new rows."""

    thresholds: conformal.Thresholds
    seed: int

    def __call__(
        self, predictive: Float[np.ndarray, "n C"], index: Int[np.ndarray, " n"]
    ) -> Bool[np.ndarray, "n C"]:
        """Which answers each row's set has; none is empty."""
        is_random = self.thresholds.score != "lac"
        uniform = conformal.uniforms(self.seed, "new", index) if is_random else None
        return conformal.sets(predictive, self.thresholds, uniform)

    def promise(self) -> str:
        """What the sets are worth, and on what condition."""
        of, level = self.thresholds, self.thresholds.level
        number = int(of.numbers.min())
        law = conformal.coverage_law(number, level)
        within = "of each class " if len(of.values) > 1 else ""
        return (
            f"Sets ({of.score}): they have the right answer with probability {level:g} or more, "
            f"for rows {within}like the {int(of.numbers.sum())} calibration rows (a calibration "
            f"on {number} rows reaches {law.low:.3f} to {law.high:.3f} in 95 of 100 cases). "
            "Nothing is promised for a single row, or for rows of another kind."
        )


class AnswerRule(NamedTuple):
    """Which new rows are answered."""

    threshold: selective.SelectiveThreshold
    by: str

    def __call__(
        self, predictive: Float[np.ndarray, "n C"], mutual_information: Float[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Whether each row is."""
        return confidences(predictive, mutual_information, self.by) > self.threshold.value

    def promise(self) -> str:
        """What the answers are worth, and on what condition."""
        t = self.threshold
        return (
            f"Answers where {self.by} allows: among the answered at most {t.max_risk:g} are wrong, "
            f"with confidence {t.confidence:g}, for rows like the {t.number} calibration rows, of "
            f"which {t.answered} would be answered and {t.errors} of those wrongly."
        )


class Wanted(NamedTuple):
    """What is asked for beside an answer.

    Attributes:
        coverage: of sets; None: no sets.
        set_score: one of `conformal.SCORES`.
        per_class: whether the coverage holds for the rows of each class.
        max_risk: among answered rows; None: all are answered.
        confidence: with which that holds.
        confidence_by: one of `selective.CONFIDENCES`.
    """

    coverage: float | None = None
    set_score: str = "lac"
    per_class: bool = False
    max_risk: float | None = None
    confidence: float = 0.9
    confidence_by: str = "max-probability"

    def rules(
        self, calibration: Calibration | None, names: Sequence[str], seed: int
    ) -> tuple[SetRule | None, AnswerRule | None]:
        """What decides about sets and answers.

        Args:
            calibration: of the posterior.
            names: its answers.
            seed: of randomised sets.
        Raises:
            UsageError: there is no calibration, or it does not suffice.
        """
        if self.coverage is None and self.max_risk is None:
            return None, None
        if calibration is None:
            raise UsageError(
                "sets and bounded risks need predictions of rows that were not trained on, but the "
                "posterior has none: train with --calibrate auto, or load the adapter of a run "
                "that had --hold-out, with --calibrate auto --max-train-steps 0."
            )
        rule = answers = None
        if self.coverage is not None:
            rule = calibration.set_rule(self.coverage, self.set_score, self.per_class, seed, names)
        if self.max_risk is not None:
            answers = calibration.answer_rule(self.max_risk, self.confidence, self.confidence_by)
        return rule, answers


def wanted(said: Mapping[str, Any]) -> Wanted:
    """What a call asks for by keywords.

    Raises:
        UsageError: an unknown one.
    """
    if unknown := sorted(said.keys() - set(Wanted._fields)):
        raise UsageError(f"unknown: {', '.join(unknown)}; known are {', '.join(Wanted._fields)}.")
    return Wanted(**said)
