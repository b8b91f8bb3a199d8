r"""Answers only where they are right often enough: selection with a bound on the error rate.

A row is answered if its score S (the larger, the surer) lies above a threshold t. Its risk is the
error rate among the answered, $R(t) = P(\text{wrong} \mid S > t)$. From n calibration rows,
`SelectiveThreshold.rule` chooses $\hat t$ such that

$P(R(\hat t) \le r) \ge 1 - \delta$

over calibration rows that are drawn independently from what is to be answered later (selection with
guaranteed risk: Geifman and El-Yaniv 2017, arXiv 1705.08500). The test is that of "Learn then Test"
(Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing:

1. Sort the calibration rows by score, the surest first; ties are broken by a random number that a
   row's key decides. The candidate $T_k$ is the score of row k + 1, so that exactly k calibration
   rows lie above it; above $T_n = -\infty$ lie all.
2. Test the hypotheses $R(T_k) > r$ for $k = k_0, k_0 + 1, \dots, n$ in this order, each at level
   $\delta$, with the exact p-value $P(\mathrm{Bin}(k, r) \le e_k)$, $e_k$ the errors among the k
   rows. The start is the larger of a quarter of the rows and of the fewest that can pass at all,
   $\lceil \log \delta / \log(1 - r) \rceil$; neither depends on scores or errors. (From the latter
   alone, a single wrong answer among the surest few would end the search, however many rows there
   are: docs/log.md.) Stop at the first that does not pass.
3. The last that passed is $\hat t$. If the first fails, the request is infeasible.

Why it holds although the candidates are scores of the data. With random numbers behind ties the
scores have no atoms, so $R$ is continuous. Call t bad if $R(t) > r$; bad thresholds form open
intervals, at whose ends R = r. The error is possible only if the first bad candidate among those
tested, $T_J$, passes.

- If $J = k_0$: given $T_{k_0}$, the $k_0$ rows above are independent draws from $S > T_{k_0}$, and
  wrong with probability $R(T_{k_0}) > r$. The p-value is too large rather than too small.
- If $J > k_0$: then no row of $T_J$'s interval lies above $T_J$. All J rows lie in whole intervals
  between points where R = r, and the wrong share of each such interval is r exactly (or at points
  where R = r, and then r almost everywhere as well). Given which rows lie in which interval, which
  decides J, they are wrong independently with probability r: $e_J$ is $\mathrm{Bin}(J, r)$.

In both cases $P(p_J \le \delta) \le \delta$. R need not fall as t rises; only the share that is
answered suffers if it does not. Two near misses: given *all* scores, the errors are not binomial
with R(t); and the row whose score is the threshold is no draw from S > t, so it is not counted.
With ties at the threshold, chance decides which of them are answered: to answer all of them, or
none, can break the bound, as `tests/test_selective.py` shows.

The bound is over calibration sets, not for a single row, and for one (r, delta) that was chosen
before looking. It does not hold for shifted data. docs/decisions.md has the conditions in full.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, FiniteFloat, model_validator
from scipy.special import bdtr, betaincinv

from decisions.checks import (
    Keys,
    check_draws,
    check_flags,
    check_keys,
    check_scores,
    exact_share,
)
from decisions.information import summarise
from decisions.intervals import Interval, clopper_pearson
from utils.errors import UsageError, quoted
from utils.records import Count, Record, as_record
from utils.seeding import row_uniforms

Score = Literal["max_probability", "entropy", "mutual_information"]
SCORES: tuple[Score, ...] = ("max_probability", "entropy", "mutual_information")

MOST_ROWS = 100_000  # of calibration; all of them are kept
START = 4  # the search begins at one row in so many
ROUNDING = 1e-9  # relative, of p-values that equal their level: in binary, 1 - 0.95 exceeds 0.05
# Streams of what breaks ties: a new row with a calibration row's key has a number of its own.
CALIBRATION, PREDICTION = "selection calibration", "selection"


class SelectiveRule(NamedTuple):
    """Which rows are answered: those whose score and tie breaker lie above, in this order.

    Attributes:
        threshold: of the score; -inf answers every row.
        tie: of the tie breaker, where the score is the threshold.
        seed: of the tie breakers.
        num_answered: calibration rows above.
        num_errors: of them that are wrong.
        num_rows: calibration rows.
    """

    threshold: float
    tie: float
    seed: int
    num_answered: int
    num_errors: int
    num_rows: int


class SelectiveThreshold(Record):
    """What calibration leaves, from which any risk and confidence has its rule.

    JSON-able (`model_dump`), and checked where it is read (`model_validate`).

    Attributes:
        score: what `scores` are, the larger the surer.
        seed: of the tie breakers.
        scores: of the calibration rows, descending.
        ties: their tie breakers, descending among equal scores.
        errors: whether the answer of each is wrong.
    """

    score: Score
    seed: Count = 0
    scores: Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_ROWS)]
    ties: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(max_length=MOST_ROWS)]
    errors: Annotated[list[bool], Field(max_length=MOST_ROWS)]

    @model_validator(mode="after")
    def _rows_are_those_of_a_calibration(self) -> SelectiveThreshold:
        n = len(self.scores)
        for name in ("ties", "errors"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"there are {n} scores, but {len(getattr(self, name))} {name}")
        if any(a < b for a, b in pairwise(zip(self.scores, self.ties, strict=True))):
            raise ValueError("'scores', and 'ties' among equal ones, must be in descending order")
        return self

    def smallest_risk(self, confidence: float) -> float | None:
        r"""The smallest `max_risk` that has a rule, rounded up to four decimals; None if none has.

        $1 - \delta^{1/z}$ if the first wrong row, the surest first, comes after z that are right,
        and the search begins among these. Else the r with $P(\mathrm{Bin}(k, r) \le e_k) = \delta$
        at the k where it begins: the upper limit of Clopper and Pearson.

        Raises:
            UsageError: the confidence is not between 0 and 1.
        """
        delta = float(1 - exact_share(confidence, "confidence"))
        start = _start(len(self.scores))
        right = self.errors.index(True) if True in self.errors else len(self.errors)
        wrong = sum(self.errors[:start])
        if wrong == start:
            return None
        if wrong == 0:
            exact = -math.expm1(math.log(delta) / right)
        else:
            exact = float(betaincinv(wrong + 1, start - wrong, 1 - delta))
        risks = ((math.floor(exact * 10_000) + step) / 10_000 for step in range(3))
        return next((r for r in risks if 0 < r < 1 and self._passed(r, confidence)), None)

    def rule(self, max_risk: float, confidence: float) -> SelectiveRule:
        """The rule that answers most rows under that bound.

        Args:
            max_risk: r, which the error rate among the answered shall not exceed.
            confidence: 1 - delta, over calibration sets.
        Raises:
            UsageError: a number is not between 0 and 1, or there is no such rule; then it says why
                and which risk has one.
        """
        n, errors = len(self.scores), np.cumsum(self.errors)
        k = self._passed(max_risk, confidence)
        if k == 0:
            raise self._infeasible(max_risk, confidence)
        threshold, tie = (self.scores[k], self.ties[k]) if k < n else (-math.inf, 0.0)
        return SelectiveRule(threshold, tie, self.seed, k, int(errors[k - 1]), n)

    def _passed(self, max_risk: float, confidence: float) -> int:
        """The k of the last hypothesis that passed; 0 if the first did not."""
        n = len(self.scores)
        first = max(_start(n), rows_needed(max_risk, confidence))
        if first > n:
            return 0
        delta = float(1 - exact_share(confidence, "confidence"))
        errors = np.cumsum(self.errors)[first - 1 :]
        p_values = bdtr(errors, np.arange(first, n + 1), float(max_risk))
        failed = np.flatnonzero(p_values > delta * (1 + ROUNDING))
        if len(failed) == 0:
            return n
        return first + int(failed[0]) - 1 if failed[0] > 0 else 0

    def _infeasible(self, max_risk: float, confidence: float) -> UsageError:
        n, needed = len(self.scores), rows_needed(max_risk, confidence)
        asked = f"A risk of at most {quoted(max_risk)} with confidence {quoted(confidence)}"
        if needed > n:
            why = (
                f"{asked} takes {needed} calibration rows even if none of their answers is wrong; "
                f"there are {n}."
            )
        else:
            first = max(_start(n), needed)
            wrong = sum(self.errors[:first])
            why = (
                f"{asked} cannot be shown: of the {first} surest calibration rows by {self.score}, "
                f"with which the search begins, {wrong} {'is' if wrong == 1 else 'are'} wrong. It "
                f"takes {needed} rows even if none is."
            )
        least = self.smallest_risk(confidence)
        if least is None:
            return UsageError(f"{why} No risk can be had with this confidence.")
        return UsageError(
            f"{why} The smallest risk that can be had with this confidence is {least}: ask for a "
            "higher risk or a lower confidence, or calibrate on more rows."
        )


def _start(n: int) -> int:
    """With how many of n rows the search begins, if they can pass at all."""
    return -(-n // START)


def rows_needed(max_risk: float, confidence: float) -> int:
    r"""The fewest answered calibration rows that a bound takes, if none of them is wrong.

    $\lceil \log \delta / \log(1 - r) \rceil$, the smallest k with $(1 - r)^k \le \delta$: 45
    rows for a risk of 0.05 with confidence 0.9.

    Raises:
        UsageError: a number is not between 0 and 1.
    """
    risk = float(exact_share(max_risk, "max risk"))
    delta = float(1 - exact_share(confidence, "confidence"))
    return max(1, math.ceil(math.log(delta) / math.log1p(-risk) * (1 - ROUNDING / 100)))


def selection_score(
    draws: Float[np.ndarray, "n N C"], score: Score, num_draws: Int[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    r"""How sure an answer is, the larger the surer, from log-probabilities of draws.

    `max_probability`: $\max_c \bar p_c$; `entropy`: $-H[\bar p]$; `mutual_information`: $-I$
    (`decisions.information`).

    Args:
        draws: (n, N, C); N is 1 for a single prediction.
        score: which.
        num_draws: how many of them each row has, (n,); None: all N.
    Raises:
        UsageError: another score, draws that are no log-probabilities, or mutual information of a
            single draw.
    """
    if score not in SCORES:
        raise UsageError(f"The score is {quoted(score)}; it must be one of {', '.join(SCORES)}.")
    draws, num_draws = check_draws(draws, num_draws)
    if score == "mutual_information" and num_draws.min() < 2:
        raise UsageError(
            "A single draw has no mutual information; take more draws, or the score "
            "max_probability or entropy."
        )
    found = summarise(draws, num_draws)
    if score == "max_probability":
        return np.exp(found.log_probs.max(1))
    return -(found.entropy if score == "entropy" else found.mutual_information)


def calibrate(
    scores: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    score: Score,
    seed: int = 0,
    keys: Keys | None = None,
) -> SelectiveThreshold:
    """What every risk and confidence is looked up in, from rows that nothing else was fitted on.

    Args:
        scores: of `selection_score`, (n,).
        right: whether the answer of each row is its label, (n,).
        score: what the scores are.
        seed: of the tie breakers.
        keys: of the rows, for these; None: their order.
    Raises:
        UsageError: there are no rows or more than are kept, or an argument is not what it should
            be.
    """
    scores = check_scores(scores)
    n = len(scores)
    right = check_flags(right, "Whether the answers are right", n)
    if not 1 <= n <= MOST_ROWS:
        raise UsageError(
            f"There are {n} calibration rows; it takes at least one and at most {MOST_ROWS}. "
            + ("Hold some out of training." if n == 0 else "Pass a random part of them.")
        )
    ties = row_uniforms(CALIBRATION, seed, check_keys(keys, n))
    order = np.lexsort((-ties, -scores))
    content = {
        "score": score,
        "seed": seed,
        "scores": scores[order].tolist(),
        "ties": ties[order].tolist(),
        "errors": (~right[order]).tolist(),
    }
    return as_record(content, SelectiveThreshold, "Calibration of selective answers")


def answered(
    scores: Float[np.ndarray, " n"], rule: SelectiveRule, keys: Keys
) -> Bool[np.ndarray, " n"]:
    """Which rows are answered.

    Args:
        scores: of `selection_score`, (n,), the same score as in calibration.
        rule: of `SelectiveThreshold.rule`.
        keys: one for each row, integers or strings, such as its number in the file: they decide
            whether a row is answered whose score is the threshold itself.
    Raises:
        UsageError: an argument is not what it should be.
    """
    scores = check_scores(scores)
    keys = check_keys(keys, len(scores))
    found = scores > rule.threshold
    tied = np.flatnonzero(scores == rule.threshold)
    found[tied] = row_uniforms(PREDICTION, rule.seed, (keys[i] for i in tied)) > rule.tie
    return found


class SelectionFigures(NamedTuple):
    """What selective answers turned out to be on labelled rows; intervals are Clopper-Pearson's.

    Attributes:
        num_rows: n.
        num_answered: of them.
        share: of the rows that are answered.
        share_interval: its interval.
        num_errors: wrong among the answered.
        risk: their share; NaN if none is answered.
        risk_interval: its interval.
    """

    num_rows: int
    num_answered: int
    share: float
    share_interval: Interval
    num_errors: int
    risk: float
    risk_interval: Interval


def evaluate_selection(
    chosen: Bool[np.ndarray, " n"], right: Bool[np.ndarray, " n"], confidence: float = 0.95
) -> SelectionFigures:
    """Share answered and achieved risk of rows whose labels are known.

    Args:
        chosen: of `answered`, (n,).
        right: whether the answer of each row is its label, (n,).
        confidence: of the intervals.
    Raises:
        UsageError: there are no rows, or an argument is not what it should be.
    """
    chosen = check_flags(chosen, "Which rows are answered")
    right = check_flags(right, "Whether the answers are right", len(chosen))
    n, answers = len(chosen), int(chosen.sum())
    if n == 0:
        raise UsageError("There are no rows to evaluate; pass at least one.")
    wrong = int((chosen & ~right).sum())
    return SelectionFigures(
        num_rows=n,
        num_answered=answers,
        share=answers / n,
        share_interval=clopper_pearson(answers, n, confidence),
        num_errors=wrong,
        risk=wrong / answers if answers else math.nan,
        risk_interval=clopper_pearson(wrong, answers, confidence),
    )
