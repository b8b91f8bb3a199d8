"""What a posterior keeps of its calibration rows: enough for every set and every bound, later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import entr

from decisions import conformal, selective
from decisions.checks import Keys
from decisions.conformal import ConformalThresholds
from decisions.selective import SelectiveRule
from utils.errors import UsageError, quoted

TOLERANCE = 1e-4  # of a row's probabilities, which add up to 1 in single precision


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
        coverage: float,
        score: conformal.Score = "lac",
        per_class: bool = False,
        seed: int = 0,
    ) -> SetRule:
        """Sets with that coverage; see `decisions.conformal`.

        Raises:
            UsageError: a wrong coverage or score, or too few rows.
        """
        thresholds = conformal.calibrate(
            self.predictive, self.labels, score, per_class, seed, self.index.tolist()
        )
        thresholds.thresholds(coverage)  # there are rows enough
        return SetRule(thresholds, coverage)

    def answer_rule(
        self,
        max_risk: float,
        confidence: float,
        by: selective.Score = "max_probability",
        seed: int = 0,
    ) -> AnswerRule:
        """Answers with that error rate; see `decisions.selective`.

        Raises:
            UsageError: shares that are none, or a risk that cannot be shown.
        """
        if by == "mutual_information" and not self.mutual_information.any():
            raise UsageError(
                "confidence by mutual_information: the posterior has a single prediction for each "
                "row, and so none; choose max_probability or entropy."
            )
        scores = confidences(self.predictive, self.mutual_information, by)
        right = self.predictive.argmax(1) == self.labels
        known = selective.calibrate(scores, right, by, seed, self.index.tolist())
        return AnswerRule(known.rule(max_risk, confidence), by, max_risk, confidence)

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
    predictive: Float[np.ndarray, "n C"],
    mutual_information: Float[np.ndarray, " n"],
    by: selective.Score,
) -> Float[np.ndarray, " n"]:
    """How sure each answer is, (n,), larger for surer ones: `selective.selection_score` of what is
    kept of the draws.

    Raises:
        UsageError: another score.
    """
    if by not in selective.SCORES:
        raise UsageError(
            f"The score is {quoted(by)}; it must be one of {', '.join(selective.SCORES)}."
        )
    if by == "max_probability":
        return predictive.max(1)
    return -(entr(predictive).sum(1) if by == "entropy" else mutual_information)


class SetRule(NamedTuple):
    """How sets are made of new rows."""

    thresholds: ConformalThresholds
    coverage: float

    def __call__(self, predictive: Float[np.ndarray, "n C"], keys: Keys) -> Bool[np.ndarray, "n C"]:
        """Which answers each row's set has; none is empty."""
        return conformal.sets(predictive, self.thresholds, self.coverage, keys)

    def promise(self) -> str:
        """What the sets are worth, and on what condition."""
        of, least = self.thresholds, min(self.thresholds.num_rows)
        low, high = conformal.coverage_law(least, self.coverage).interval
        within = "of each class " if of.per_class else ""
        return (
            f"Sets ({of.score}): they have the right answer with probability {self.coverage:g} or "
            f"more, for rows {within}like the {sum(of.num_rows)} calibration rows (a calibration "
            f"on {least} rows reaches {low:.3f} to {high:.3f} in 95 of 100 cases). Nothing is "
            "promised for a single row, or for rows of another kind."
        )


class AnswerRule(NamedTuple):
    """Which new rows are answered."""

    rule: SelectiveRule
    by: selective.Score
    max_risk: float
    confidence: float

    def __call__(
        self,
        predictive: Float[np.ndarray, "n C"],
        mutual_information: Float[np.ndarray, " n"],
        keys: Keys,
    ) -> Bool[np.ndarray, " n"]:
        """Whether each row is."""
        scores = confidences(predictive, mutual_information, self.by)
        return selective.answered(scores, self.rule, keys)

    def promise(self) -> str:
        """What the answers are worth, and on what condition."""
        rule = self.rule
        return (
            f"Answers where {self.by} allows: among the answered at most {self.max_risk:g} are "
            f"wrong, with confidence {self.confidence:g}, for rows like the {rule.num_rows} "
            f"calibration rows, of which {rule.num_answered} would be answered and "
            f"{rule.num_errors} of those wrongly. Nothing is promised for rows of another kind."
        )


class Wanted(NamedTuple):
    """What is asked for beside an answer.

    Attributes:
        coverage: of sets; None: no sets.
        set_score: one of `conformal.SCORES`.
        per_class: whether the coverage holds for the rows of each class.
        max_risk: among answered rows; None: all are answered.
        confidence: with which that holds.
        confidence_by: one of `selective.SCORES`.
    """

    coverage: float | None = None
    set_score: conformal.Score = "lac"
    per_class: bool = False
    max_risk: float | None = None
    confidence: float = 0.9
    confidence_by: selective.Score = "max_probability"

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
        set_rule = answer_rule = None
        if self.coverage is not None:
            with _naming_classes(names):
                set_rule = calibration.set_rule(self.coverage, self.set_score, self.per_class, seed)
        if self.max_risk is not None:
            answer_rule = calibration.answer_rule(
                self.max_risk, self.confidence, self.confidence_by, seed
            )
        return set_rule, answer_rule


@contextmanager
def _naming_classes(names: Sequence[str]) -> Iterator[None]:
    """Context in which an error says which answers the classes are."""
    try:
        yield
    except UsageError as error:
        told = str(error)
        if "class " not in told:
            raise
        legend = ", ".join(f"{i} is {quoted(name)}" for i, name in enumerate(names[:20]))
        raise UsageError(f"{told} (Class {legend}.)") from None


def wanted(said: Mapping[str, Any]) -> Wanted:
    """What a call asks for by keywords.

    Raises:
        UsageError: an unknown one.
    """
    if unknown := sorted(said.keys() - set(Wanted._fields)):
        raise UsageError(f"unknown: {', '.join(unknown)}; known are {', '.join(Wanted._fields)}.")
    return Wanted(**said)
