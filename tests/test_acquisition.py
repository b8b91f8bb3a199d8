"""What to label next, against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from decisions import acquisition
from decisions.acquisition import acquire
from utils.errors import UsageError
from utils.logging import logger


def some_draws(n: int, number: int = 6, classes: int = 3, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(n, number, classes))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def joint_information(draws: np.ndarray, rows: tuple[int, ...]) -> float:
    """I[y_rows; draw] by enumerating every joint answer."""
    p = np.exp(draws)
    joint, conditional = 0.0, 0.0
    for answer in itertools.product(range(p.shape[2]), repeat=len(rows)):
        of_draw = np.prod([p[r, :, c] for r, c in zip(rows, answer, strict=True)], axis=0)
        mean = of_draw.mean()
        joint -= mean * math.log(mean)
    for r in rows:
        conditional -= (p[r] * draws[r]).sum(-1).mean()
    return joint - conditional


def test_batchbald_is_that_of_enumeration_for_three_rows():
    draws = some_draws(7)
    found = acquire(draws, 3, "batchbald")
    chosen, before = [], 0.0
    for _ in range(3):
        rest = [r for r in range(7) if r not in chosen]
        values = {r: joint_information(draws, (*chosen, r)) for r in rest}
        best = max(values, key=values.get)
        chosen.append(best)
        assert found.scores[len(chosen) - 1] == pytest.approx(values[best] - before, abs=1e-9)
        before = values[best]
    assert found.rows.tolist() == chosen


def test_a_sample_of_joint_answers_comes_near_to_all_of_them(monkeypatch):
    draws = some_draws(6, classes=3, seed=2)
    exact = acquire(draws, 5, "batchbald")
    monkeypatch.setattr(acquisition, "CONFIGURATIONS", 26)  # the third row's answers are drawn
    few = acquire(draws, 2, "batchbald")
    assert few.rows.tolist() == exact.rows[:2].tolist()
    p = np.exp(draws)
    generator = np.random.default_rng(0)
    monkeypatch.setattr(acquisition, "CONFIGURATIONS", 8000)
    ones = np.ones((9000, 6))  # too many to enumerate further
    joint, weights = acquisition._extended(ones, None, p, [0, 1, 2], generator)
    estimate = acquisition._joint_entropies(joint, weights, p)
    conditional = [-(p[r] * draws[r]).sum(-1).mean() for r in range(6)]
    expected = [
        joint_information(draws, (0, 1, 2, r)) + sum(conditional[i] for i in (0, 1, 2, r))
        for r in range(6)
    ]
    np.testing.assert_allclose(estimate, expected, rtol=0.02)


def test_a_duplicate_is_not_labelled_twice_where_bald_does():
    draws = some_draws(6, seed=3)
    best = int(acquire(draws, 1, "bald").rows[0])
    draws = np.concatenate([draws, draws[[best]]])
    assert set(acquire(draws, 2, "bald").rows.tolist()) == {best, 6}
    rows = acquire(draws, 2, "batchbald").rows.tolist()
    assert len({best, 6} & set(rows)) == 1


def test_powerbald_draws_rows_with_probabilities_in_proportion_to_their_information():
    draws = some_draws(5, seed=4)
    information = np.array([joint_information(draws, (r,)) for r in range(5)])
    first = [int(acquire(draws, 1, "powerbald", seed).rows[0]) for seed in range(4000)]
    found = np.bincount(first, minlength=5) / 4000
    expected = information / information.sum()
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(found - expected) < 4 * error).all()


def test_simple_criteria_are_their_formulas():
    draws = some_draws(30, seed=5)
    mean = np.exp(draws).mean(1)
    entropy = -(mean * np.log(mean)).sum(1)
    ordered = np.sort(mean, 1)
    information = [joint_information(draws, (r,)) for r in range(30)]
    for by, expected in (
        ("entropy", entropy),
        ("margin", ordered[:, -2] - ordered[:, -1]),
        ("bald", information),
    ):
        found = acquire(draws, 4, by)
        assert found.rows.tolist() == np.argsort(expected)[::-1][:4].tolist(), by
        np.testing.assert_allclose(found.scores, np.sort(expected)[::-1][:4], atol=1e-9)
    assert (
        acquire(draws, 4, "random", 1).rows.tolist() != acquire(draws, 4, "random", 2).rows.tolist()
    )
    assert len(set(acquire(draws, 30, "random").rows.tolist())) == 30


def test_rows_with_fewer_draws_are_judged_by_their_own():
    draws = some_draws(8, seed=6)
    number = np.array([6, 3, 6, 2, 6, 6, 4, 6])
    hidden = draws.copy()
    for i, own in enumerate(number):
        hidden[i, own:] = np.nan
    scores = acquisition.score(hidden, "bald", 0, number)
    expected = [joint_information(draws[:, :own], (i,)) for i, own in enumerate(number)]
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    with pytest.raises(UsageError, match="unequal"):
        acquire(hidden, 2, "batchbald", num_draws=number)


@pytest.mark.parametrize(
    ("k", "by", "number", "message"),
    [
        (9, "bald", 6, "9 rows to label out of 8"),
        (0, "bald", 6, "at least 1"),
        (2, "height", 6, "must be one of"),
        (2, "bald", 1, "goes by the differences of draws"),
        (2, "batchbald", 1, "goes by the differences of draws"),
    ],
)
def test_a_wrong_call_is_told(k, by, number, message):
    with pytest.raises(UsageError, match=message):
        acquire(some_draws(8, number), k, by)


def test_an_estimate_at_the_log_of_the_draws_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(logger, "warning", lambda *a: told.append(a[0] % a[1:]))
    certain = np.log(np.full((4, 2, 2), 1e-9))  # two draws that contradict each other
    certain[:, 0, 0] = certain[:, 1, 1] = math.log(1 - 1e-9)
    acquire(certain, 2, "bald")
    assert "log 2 = 0.693" in told[0]
    told.clear()
    acquire(some_draws(8, 60), 2, "bald")
    assert not told
