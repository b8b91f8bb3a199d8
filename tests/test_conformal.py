"""Conformal sets against their definition, crepes and the law of their coverage."""

import math

import numpy as np
import pytest
from crepes import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest, norm

from decisions import conformal
from decisions.calibration import Calibration, Wanted
from utils.errors import UsageError


def rows(number: int, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are off, as a trained model's are, and labels."""
    generator = np.random.default_rng(seed)
    true = generator.dirichlet(np.full(classes, 0.5), number)
    labels = np.array([generator.choice(classes, p=p) for p in true])
    sharpened = true**2 + 1e-3
    return sharpened / sharpened.sum(1, keepdims=True), labels


def by_definition(p: np.ndarray, u: float, score: str) -> list[float]:
    """Score of each answer of one row, from the formula."""
    found = []
    for y in range(len(p)):
        rank = 1 + sum(p[c] > p[y] or (p[c] == p[y] and c < y) for c in range(len(p)))
        above = sum(p[c] for c in range(len(p)) if p[c] > p[y] or (p[c] == p[y] and c < y))
        found.append(
            {
                "lac": 1 - p[y],
                "aps": above + u * p[y],
                "raps": above + u * p[y] + 0.1 * max(0, rank - 1),
            }[score]
        )
    return found


@pytest.mark.parametrize("score", conformal.SCORES)
def test_scores_are_those_of_the_definition(score):
    probs, _ = rows(50)
    probs[0] = [0.25, 0.25, 0.25, 0.25]  # ties
    probs[1] = [0.0, 1.0, 0.0, 0.0]
    uniform = np.random.default_rng(1).random(50)
    expected = [by_definition(p, u, score) for p, u in zip(probs, uniform, strict=True)]
    np.testing.assert_allclose(conformal.scores(probs, score, uniform), expected, atol=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("score", conformal.SCORES)
@pytest.mark.parametrize("level", [0.503, 0.801, 0.903, 0.951])
def test_sets_are_those_of_crepes(score, level, per_class):
    """At levels with (n + 1)(1 - level) no whole number: there it lets one more score in."""
    (probs, labels), (new, _) = rows(199), rows(300, seed=1)
    u, v = np.random.default_rng(2).random(199), np.random.default_rng(3).random(300)
    thresholds = conformal.calibrate(probs, labels, score, level, per_class, u)
    ours = conformal.sets(new, thresholds, v, allow_empty=True)
    own = np.take_along_axis(conformal.scores(probs, score, u), labels[:, None], 1)[:, 0]
    of_new = conformal.scores(new, score, v)
    if per_class:
        theirs = ConformalClassifier().fit(own, bins=labels)
        columns = [
            theirs.predict_set(
                of_new[:, [c]], bins=np.full(300, c), confidence=level, smoothing=False
            )
            for c in range(4)
        ]
        expected = np.hstack(columns)
    else:
        theirs = ConformalClassifier().fit(own)
        expected = theirs.predict_set(of_new, confidence=level, smoothing=False)
    assert np.array_equal(ours, expected.astype(bool))


@pytest.mark.parametrize("score", conformal.SCORES)
def test_coverage_over_calibration_sets_follows_its_law(score):
    """Labels are drawn from known probabilities, so the coverage of each threshold is known."""
    n, level, number = 60, 0.8, 2000
    generator = np.random.default_rng(4)
    pool, _ = rows(400, 3, seed=5)
    true = 0.5 * pool + 0.5 / 3  # what labels are drawn from
    # scores of every row of the pool, with u integrated out on a grid
    grid = (np.arange(64) + 0.5) / 64 if score != "lac" else np.array([0.5])
    all_scores = np.stack(
        [conformal.scores(pool, score, np.full(400, u)) for u in grid]
    )  # (u, row, class)
    flat, weight = all_scores.ravel(), np.broadcast_to(true / (400 * len(grid)), all_scores.shape)
    order = np.argsort(flat)
    cumulative, ordered = np.cumsum(weight.ravel()[order]), flat[order]
    coverages = []
    for _ in range(number):
        chosen = generator.integers(400, size=n)
        draws = generator.random(n)
        labels = (true[chosen].cumsum(1) < draws[:, None]).sum(1).clip(max=2)
        uniform = grid[generator.integers(len(grid), size=n)]
        thresholds = conformal.calibrate(pool[chosen], labels, score, level, uniform=uniform)
        place = np.searchsorted(ordered, thresholds.values[0], side="right")
        coverages.append(cumulative[place - 1])
    k = conformal.place(n, level)
    # 1,200 or more possible scores: ties are few, and the law is continuous
    assert kstest(coverages, beta(k, n + 1 - k).cdf).pvalue > 1e-3
    law = conformal.coverage_law(n, level)
    assert law.mean == pytest.approx(k / (n + 1)) and law.low < level < law.high
    inside = np.mean([law.low <= coverage <= law.high for coverage in coverages])
    assert inside == pytest.approx(0.95, abs=0.02)


def test_every_class_is_covered_with_thresholds_of_its_own():
    hits = np.zeros((200, 3))
    for i in range(200):
        (probs, labels), (new, truth) = rows(150, 3, seed=2 * i), rows(300, 3, seed=2 * i + 1)
        thresholds = conformal.calibrate(probs, labels, "lac", 0.8, per_class=True)
        found = conformal.sets(new, thresholds, allow_empty=True)
        covered = found[np.arange(300), truth]
        hits[i] = [covered[truth == c].mean() for c in range(3)]
    error = hits.std(0) / math.sqrt(200)
    assert (hits.mean(0) > 0.8 - 3 * error).all() and (hits.mean(0) < 0.84).all()


@pytest.mark.parametrize(
    ("level", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)]
)
def test_a_level_says_how_many_rows_it_takes(level, needed):
    assert conformal.rows_needed(level) == needed
    probs, labels = rows(needed)
    assert conformal.place(needed, level) == needed
    conformal.calibrate(probs, labels, "lac", level)
    if needed > 1:
        with pytest.raises(
            UsageError, match=f"takes {needed} calibration rows.*there are {needed - 1}"
        ):
            conformal.calibrate(probs[1:], labels[1:], "lac", level)


def test_a_class_with_too_few_rows_is_named():
    probs, labels = rows(100, 3)
    labels[:] = np.where(labels == 2, 0, labels)
    with pytest.raises(UsageError, match="of class 'tech', but there are 0"):
        conformal.calibrate(probs, labels, "lac", 0.9, True, names=["a", "b", "tech"])


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, math.nan, 2.0])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(UsageError, match="above 0 and below 1"):
        conformal.calibrate(*rows(20), "lac", level)


def test_empty_sets_get_the_most_probable_answer_unless_told_otherwise():
    probs = np.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])
    thresholds = conformal.Thresholds("lac", 0.5, np.array([0.2]), np.array([9]))
    assert conformal.sets(probs, thresholds, allow_empty=True).sum(1).tolist() == [0, 1]
    assert conformal.sets(probs, thresholds)[0].tolist() == [True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(conformal.SCORES), st.integers(2, 5))
def test_sets_grow_with_the_level_and_follow_a_permutation_of_the_classes(seed, score, classes):
    (probs, labels), (new, _) = rows(60, classes, seed), rows(20, classes, seed + 1)
    u, v = (
        conformal.uniforms(seed, "calibration", np.arange(60)),
        np.random.default_rng(0).random(20),
    )
    found = [
        conformal.sets(new, conformal.calibrate(probs, labels, score, level, uniform=u), v, True)
        for level in (0.3, 0.6, 0.9)
    ]
    assert (found[0] <= found[1]).all() and (found[1] <= found[2]).all()
    order = np.random.default_rng(seed).permutation(classes)
    inverse = np.argsort(order)
    permuted = conformal.calibrate(probs[:, order], inverse[labels], score, 0.6, uniform=u)
    assert np.array_equal(conformal.sets(new[:, order], permuted, v, True), found[1][:, order])


def test_a_rows_uniform_number_is_its_own():
    whole = conformal.uniforms(3, "new", np.arange(500))
    assert conformal.uniforms(3, "new", np.array([7, 499])).tolist() == whole[[7, 499]].tolist()
    assert not np.array_equal(conformal.uniforms(3, "calibration", np.arange(500)), whole)
    assert kstest(whole, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) < 4 / math.sqrt(500)


def test_a_report_of_sets_has_the_exact_interval():
    probs, labels = rows(40)
    found = probs > 0.3
    report = conformal.report_sets(found, probs, labels)
    covered = found[np.arange(40), labels]
    low, high = report.coverage[1:]
    k = covered.sum()
    assert beta.cdf(low, k, 41 - k) == pytest.approx(0.025)
    assert beta.cdf(high, k + 1, 40 - k) == pytest.approx(0.975)
    sizes = found.sum(1)
    spread = norm.ppf(0.975) * sizes.std(ddof=1) / math.sqrt(40)
    assert report.size == pytest.approx(
        (sizes.mean(), sizes.mean() - spread, sizes.mean() + spread)
    )
    right = probs.argmax(1) == labels
    assert report.size_right == sizes[right].mean() and report.size_wrong == sizes[~right].mean()
    assert report.of_class[1] == covered[labels == 1].mean()
    assert conformal.share(0, 0)[1:] == (0.0, 1.0)
    assert conformal.share(0, 5)[1] == 0.0 and conformal.share(5, 5)[2] == 1.0


def test_rules_without_calibration_rows_say_what_to_do():
    with pytest.raises(UsageError, match="--calibrate auto"):
        Wanted(coverage=0.9).rules(None, ["a", "b"], 0)
    assert Wanted().rules(None, ["a", "b"], 0) == (None, None)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"predictive": np.full((3, 2), 0.6)}, "add up"),
        ({"predictive": np.array([[1.5, -0.5]] * 3)}, "add up"),
        ({"labels": np.array([0, 1, 2])}, "label"),
        ({"labels": np.array([0, -1, 1])}, "label"),
        ({"index": np.array([0, 0, 1])}, "index"),
        ({"mutual_information": np.array([0.0, -1.0, 0.0])}, "mutual information"),
        ({}, None),
    ],
)
def test_what_a_file_says_of_calibration_rows_is_looked_at(changed, problem):
    whole = Calibration(np.full((3, 2), 0.5), np.array([0, 1, 1]), np.zeros(3), np.arange(3))
    found = whole._replace(**changed).problem(2)
    assert found is None if problem is None else problem in found
    assert "classes" in whole.problem(5)
