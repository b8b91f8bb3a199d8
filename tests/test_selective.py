"""Bounded error rates: the bound over many calibration sets, and the procedure by brute force."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from decisions import selective
from decisions.calibration import Calibration
from utils.errors import UsageError


def brute_force(score, wrong, risk, delta):
    """The procedure, as its description says it: one rule after the other."""
    rules = [(score > v, v) for v in sorted({*score, -math.inf}, reverse=True)]
    rules = [(int(above.sum()), int(wrong[above].sum()), v) for above, v in rules if above.any()]
    number = 1
    while fewest(risk, delta / (number + 1)) * 2**number <= len(score):
        number += 1
    if fewest(risk, delta) > len(score):
        return None
    best = None
    for j in range(number):
        for m, e, value in rules:
            if m < fewest(risk, delta / number) * 2**j:
                continue
            p = sum(math.comb(m, i) * risk**i * (1 - risk) ** (m - i) for i in range(e + 1))
            if p > delta / number:
                break
            best = min(best or (math.inf, 0, 0), (value, m, e))
    return best


def fewest(risk, delta):
    return next(m for m in range(1, 10_000) if (1 - risk) ** m <= delta)


@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_that_of_the_description(ties):
    found = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        score = generator.random(80)
        score = np.round(score, 1) if ties else score
        wrong = generator.random(80) > 0.6 + 0.4 * score
        expected = brute_force(score, wrong, 0.15, 0.1)
        if expected is None:
            with pytest.raises(UsageError):
                selective.choose_threshold(score, wrong, 0.15, 0.9)
            continue
        found += 1
        t = selective.choose_threshold(score, wrong, 0.15, 0.9)
        assert (t.value, t.answered, t.errors) == expected
        assert selective.report_answers(score, wrong, t).answered[0] == t.answered / 80
    assert found > 10


@pytest.mark.parametrize("steps", [None, 12], ids=["continuous", "tied"])
@pytest.mark.parametrize(
    ("risk", "confidence", "n", "c", "q"), [(0.05, 0.9, 300, 0.6, 3), (0.2, 0.8, 100, 0.8, 1)]
)
def test_the_risk_is_kept_as_often_as_was_promised(steps, risk, confidence, n, c, q, monkeypatch):
    """Errors have probability c (1 - s)^q at score s, which is uniform: so R above t is
    c (1 - t)^q / (q + 1)."""
    generator, number, violated, answered = np.random.default_rng(1), 2000, 0, 0
    monkeypatch.setattr(selective, "_infeasible", lambda *a: "")  # it is told at length
    for _ in range(number):
        s = generator.random(n)
        shown = s if steps is None else np.floor(s * steps) / steps
        wrong = generator.random(n) < c * (1 - s) ** q
        try:
            t = selective.choose_threshold(shown, wrong, risk, confidence)
        except UsageError:
            continue  # nothing is answered, and nothing wrongly
        # the smallest true score that is answered
        lowest = 0.0 if t.value == -math.inf else t.value
        if steps is not None and t.value != -math.inf:
            lowest = t.value + 1 / steps
        violated += c * (1 - lowest) ** q / (q + 1) > risk
        answered += 1
    delta = 1 - confidence
    assert answered > number / 4, "else the bound would be kept by silence"
    assert violated / number <= delta + 3 * math.sqrt(delta * (1 - delta) / number)
    assert violated > 0, "the bound is not much more cautious than it has to be"


@pytest.mark.parametrize(
    ("risk", "confidence", "least"), [(0.05, 0.9, 45), (0.5, 0.5, 1), (0.1, 0.95, 29)]
)
def test_the_fewest_rows_without_an_error(risk, confidence, least):
    assert selective.rows_needed(risk, confidence) == least
    assert (1 - risk) ** least <= 1 - confidence + 1e-12 < (1 - risk) ** (least - 1) + 1e-9
    none_wrong = np.zeros(least, bool)
    assert (
        selective.choose_threshold(np.arange(least), none_wrong, risk, confidence).value
        == -math.inf
    )
    if least > 1:
        too_few = np.arange(least - 1)
        with pytest.raises(UsageError, match=f"at least {least} calibration rows"):
            selective.choose_threshold(too_few, none_wrong[1:], risk, confidence)


def test_what_cannot_be_had_is_told_with_what_can():
    generator = np.random.default_rng(0)
    score, wrong = generator.random(300), generator.random(300) < 0.3
    with pytest.raises(UsageError, match=r"this confidence (0\.\d+) could have been") as error:
        selective.choose_threshold(score, wrong, 0.02, 0.9)
    possible = float(str(error.value).split("confidence ")[-1].split(" could")[0])
    selective.choose_threshold(score, wrong, possible, 0.9)
    with pytest.raises(UsageError):
        selective.choose_threshold(score, wrong, possible - 0.001, 0.9)


def test_all_rows_of_one_score_are_answered_together_or_not_at_all():
    score, wrong = np.zeros(100), np.zeros(100, bool)
    wrong[:3] = True
    t = selective.choose_threshold(score, wrong, 0.1, 0.9)
    assert t.value == -math.inf and t.answered == 100
    assert binom.cdf(3, 100, 0.1) <= 0.1


def test_scores_of_confidence_are_larger_where_the_posterior_is_surer():
    probs = np.array([[0.9, 0.1], [0.6, 0.4]])
    for by in selective.CONFIDENCES:
        sure, unsure = selective.confidence_scores(
            probs, np.array([0.3, 0.6]), np.array([0.01, 0.2]), by
        )
        assert sure > unsure
    with pytest.raises(UsageError, match="must be one of"):
        selective.confidence_scores(probs, probs[:, 0], probs[:, 0], "height")


def test_a_rule_says_what_it_promises():
    n = 100
    predictive = np.tile([0.8, 0.2], (n, 1))
    calibration = Calibration(predictive, np.zeros(n, int), np.zeros(n), np.arange(n))
    told = calibration.answer_rule(0.05, 0.9).promise()
    assert "at most 0.05 are wrong" in told and "confidence 0.9" in told and "100" in told
    told = calibration.set_rule(0.9, "aps").promise()
    assert "probability 0.9 or more" in told and "Nothing is promised for a single row" in told
