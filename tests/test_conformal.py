"""Conformal sets against crepes, the definition by hand, and the exact laws of their coverage."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from crepes import ConformalClassifier
from crepes.extras import hinge
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from decisions.conformal import (
    CALIBRATION,
    MOST_ROWS,
    PREDICTION,
    SCORES,
    ConformalThresholds,
    calibrate,
    coverage_law,
    evaluate_sets,
    rows_needed,
    sets,
)
from decisions.intervals import clopper_pearson, mean_interval
from utils.errors import UsageError
from utils.records import as_record
from utils.seeding import row_uniforms


def task(n, num_classes=4, seed=0, concentration=0.5):
    """Probabilities (n, C) and labels of an over-confident model."""
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(size=(n, num_classes)) / concentration
    true = np.exp(logits)
    true /= true.sum(1, keepdims=True)
    claimed = true**1.5 / (true**1.5).sum(1, keepdims=True)
    labels = (rng.random((n, 1)) > true.cumsum(1)[:, :-1]).sum(1)
    return claimed, labels


def score_by_hand(row, c, score, u, penalty=0.1, rank=1):
    """The equations, one class of one row at a time."""
    if score == "lac":
        return 1 - row[c]
    above = [j for j in range(len(row)) if row[j] > row[c] or (row[j] == row[c] and j < c)]
    found = sum(sorted((row[j] for j in above), reverse=True)) + u * row[c]
    if score == "raps":
        found += penalty * max(0, len(above) + 1 - rank)
    return found


# --- thresholds and sets --------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.51, 0.8, 0.913])
def test_lac_sets_equal_those_of_crepes(coverage):
    probs, labels = task(400)
    classes = np.arange(4)
    reference = ConformalClassifier().fit(hinge(probs[:150], classes, labels[:150]))
    expected = reference.predict_set(hinge(probs[150:]), confidence=coverage, smoothing=False)
    found = sets(probs[150:], calibrate(probs[:150], labels[:150]), coverage, allow_empty=True)
    np.testing.assert_array_equal(found, np.array(expected, dtype=bool))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_sets_of_each_class_equal_the_mondrian_ones_of_crepes(score, coverage):
    """A class is in the set where its p-value among its own calibration rows exceeds alpha."""
    probs, labels = task(400)
    found = sets(
        probs[150:],
        calibrate(probs[:150], labels[:150], score, per_class=True),
        coverage,
        keys=range(150, 400),
        allow_empty=True,
    )
    u = row_uniforms(CALIBRATION, 0, range(150))
    alphas = [score_by_hand(probs[i], labels[i], score, u[i]) for i in range(150)]
    reference = ConformalClassifier().fit(np.array(alphas), bins=labels[:150])
    u = row_uniforms(PREDICTION, 0, range(150, 400))
    for c in range(4):
        column = [score_by_hand(p, c, score, x) for p, x in zip(probs[150:], u, strict=True)]
        p_values = reference.predict_p(np.array(column), bins=np.full(250, c), smoothing=False)
        np.testing.assert_array_equal(found[:, c], p_values > 1 - coverage + 1e-9)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_sets_are_those_of_the_definition(score, per_class):
    """k-th smallest score with k counted in fractions, then class by class; ties in probability."""
    probs, labels = task(90, num_classes=3, seed=1)
    probs[::3] = np.array([0.25, 0.5, 0.25])
    keys = [f"row {i}" for i in range(90)]
    thresholds = calibrate(
        probs[:60], labels[:60], score, per_class, seed=7, keys=keys[:60], penalty=0.3, rank=2
    )
    found = sets(probs[60:], thresholds, 0.7, keys=keys[60:], allow_empty=True)
    u = row_uniforms(CALIBRATION, 7, keys[:60])
    own = [score_by_hand(probs[i], labels[i], score, u[i], 0.3, 2) for i in range(60)]
    u = row_uniforms(PREDICTION, 7, keys[60:])
    for c in range(3):
        mine = sorted(s for s, y in zip(own, labels, strict=False) if y == c or not per_class)
        limit = mine[math.ceil((len(mine) + 1) * Fraction(7, 10)) - 1]
        for i in range(30):
            expected = score_by_hand(probs[60 + i], c, score, u[i], 0.3, 2) <= limit
            assert found[i, c] == expected, (i, c)


def test_the_threshold_of_five_scores_in_closed_form():
    probs = np.array([[p, 1 - p] for p in (0.9, 0.8, 0.7, 0.6, 0.5)])
    thresholds = calibrate(probs, np.zeros(5, int))
    np.testing.assert_allclose(thresholds.scores[0], [0.1, 0.2, 0.3, 0.4, 0.5])
    for coverage, k in ((0.01, 1), (0.5, 3), (0.51, 4), (2 / 3, 4), (0.8, 5)):
        assert thresholds.thresholds(coverage) == pytest.approx(k / 10), coverage


def test_a_coverage_is_the_decimal_that_was_written():
    """100 * 0.55 is 55.00000000000001 in binary, which would take the 56th score."""
    assert math.ceil(100 * 0.55) == 56
    assert coverage_law(99, 0.55).a == 55
    assert math.ceil(0.8 / (1 - 0.8)) == 5
    assert rows_needed(0.8) == 4


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 999))
def test_the_rows_that_a_coverage_takes_are_enough_and_one_fewer_is_not(thousandths):
    needed = rows_needed(thousandths / 1000)
    level = Fraction(thousandths, 1000)
    assert math.ceil((needed + 1) * level) <= needed
    assert needed == 1 or math.ceil(needed * level) > needed - 1


def test_too_few_rows_are_told_with_the_number_that_it_takes():
    probs, labels = task(18)
    thresholds = calibrate(probs, labels)
    assert thresholds.feasible(0.94) and not thresholds.feasible(0.95)
    sets(probs, thresholds, 0.94)
    with pytest.raises(UsageError, match=r"0\.95 takes 19 calibration rows; there are 18"):
        sets(probs, thresholds, 0.95)


def test_a_class_with_too_few_rows_is_named_and_one_without_any_too():
    probs, _ = task(40)
    labels = np.repeat([0, 1, 3], [20, 15, 5])
    thresholds = calibrate(probs, labels, per_class=True)
    assert thresholds.num_rows == [20, 15, 0, 5]
    with pytest.raises(UsageError, match=r"takes 9 .* every class: class 2 has 0, class 3 has 5"):
        sets(probs, thresholds, 0.9)
    with pytest.raises(UsageError, match=r"takes 1 .* every class: class 2 has 0"):
        sets(probs, thresholds, 0.5)
    assert sets(probs, calibrate(probs, labels), 0.9).shape == (40, 4), "not by class it is fine"


def test_empty_sets_get_the_most_probable_class_unless_they_may_be_empty():
    calibrated = calibrate(np.tile([0.9, 0.1], (20, 1)), np.zeros(20, int))
    probs = np.array([[0.95, 0.05], [0.55, 0.45], [0.4, 0.6]])
    empty = sets(probs, calibrated, 0.9, allow_empty=True)
    np.testing.assert_array_equal(empty, [[True, False], [False, False], [False, False]])
    filled = sets(probs, calibrated, 0.9)
    np.testing.assert_array_equal(filled, [[True, False], [True, False], [False, True]])


def test_probabilities_of_0_and_1_are_scored_like_any_others():
    """Certain and right has LAC score 0 and APS score u; certain and wrong has the largest."""
    probs, labels = np.tile([1.0, 0.0, 0.0], (30, 1)), np.repeat([0, 2], [27, 3])
    lac, aps = calibrate(probs, labels), calibrate(probs, labels, "aps")
    assert lac.scores[0] == [0.0] * 27 + [1.0] * 3
    assert aps.scores[0][:27] == sorted(row_uniforms(CALIBRATION, 0, range(27)))
    assert aps.scores[0][27:] == [1.0] * 3
    for thresholds in (lac, aps):
        few = sets(probs, thresholds, 0.8, keys=range(30))
        np.testing.assert_array_equal(few, np.tile([True, False, False], (30, 1)))
        assert sets(probs, thresholds, 0.95, keys=range(30)).all()


def test_a_rows_set_does_not_depend_on_the_rows_beside_it():
    probs, labels = task(300)
    thresholds = calibrate(probs[:100], labels[:100], "aps")
    keys = [f"id-{i}" for i in range(100, 300)]
    together = sets(probs[100:], thresholds, 0.8, keys)
    order = np.random.default_rng(0).permutation(200)
    shuffled = sets(probs[100:][order], thresholds, 0.8, [keys[i] for i in order])
    np.testing.assert_array_equal(shuffled, together[order])
    alone = [sets(probs[100 + i][None], thresholds, 0.8, [keys[i]])[0] for i in range(200)]
    np.testing.assert_array_equal(alone, together)
    others = sets(probs[100:], thresholds, 0.8, range(200))
    assert (others != together).any(), "other keys are other random numbers"


def test_calibration_does_not_depend_on_the_order_of_rows_that_have_keys():
    probs, labels = task(50)
    order = np.random.default_rng(0).permutation(50)
    keyed = calibrate(probs, labels, "raps", keys=list(range(50)))
    shuffled = calibrate(probs[order], labels[order], "raps", keys=order.tolist())
    assert shuffled == keyed == calibrate(probs, labels, "raps")


def test_random_numbers_of_rows_are_uniform_and_belong_to_stream_seed_and_key():
    found = row_uniforms("a", 0, range(20_000))
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / 20_000**0.5
    for other in (row_uniforms("b", 0, range(20_000)), row_uniforms("a", 1, range(20_000))):
        assert abs(np.corrcoef(found, other)[0, 1]) < 4 / 20_000**0.5
    np.testing.assert_array_equal(row_uniforms("a", 0, ["7", "\ud800"])[0], found[7])
    assert row_uniforms("a", 0, []).shape == (0,)


PROBABILITIES = st.integers(2, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 6), min_size=classes, max_size=classes).filter(any),
        min_size=12,
        max_size=30,
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PROBABILITIES, st.sampled_from(SCORES), st.integers(1, 91), st.integers(1, 91))
def test_sets_are_nested_in_the_coverage(rows, score, one, other):
    """Coarse probabilities, so that ties and zeros are common."""
    probs = np.array(rows, dtype=float)
    probs /= probs.sum(1, keepdims=True)
    thresholds = calibrate(probs, probs.argmin(1), score)
    low, high = (c / 100 for c in sorted((one, other)))
    for allow_empty in (False, True):
        small, large = (
            sets(probs, thresholds, c, range(len(probs)), allow_empty) for c in (low, high)
        )
        assert not (small & ~large).any()
        assert allow_empty or small.any(1).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(PROBABILITIES, st.randoms(use_true_random=False), st.booleans())
def test_a_permutation_of_the_classes_permutes_lac_sets(rows, random, per_class):
    probs = np.array(rows, dtype=float)
    probs /= probs.sum(1, keepdims=True)
    labels = np.arange(len(probs)) % probs.shape[1]
    order = np.array(random.sample(range(probs.shape[1]), probs.shape[1]))
    coverage = 0.5
    plain = sets(probs, calibrate(probs, labels, "lac", per_class), coverage, allow_empty=True)
    permuted = calibrate(probs[:, order], np.argsort(order)[labels], "lac", per_class)
    found = sets(probs[:, order], permuted, coverage, allow_empty=True)
    np.testing.assert_array_equal(found, plain[:, order])


# --- coverage -------------------------------------------------------------------------------------


def coverages_of_fresh_calibration_sets(score, n=50, coverage=0.9, repeats=2000):
    """The true coverage of each calibration set, where it is known in closed form.

    Two classes, p uniform on [0, 1] and true: P(1 - p_y <= q) = 2 q - q^2, and the randomised
    score of APS is uniform, so its coverage is the threshold itself.
    """
    rng = np.random.default_rng(0)
    p = rng.random((repeats, n))
    labels = (rng.random((repeats, n)) > p).astype(int)
    found = [
        calibrate(np.stack([a, 1 - a], 1), y, score, seed=i).thresholds(coverage)[0]
        for i, (a, y) in enumerate(zip(p, labels, strict=True))
    ]
    q = np.array(found)
    return q if score == "aps" else 2 * q - q**2


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_the_true_coverage_of_2000_calibration_sets_follows_the_beta_distribution(score):
    found = coverages_of_fresh_calibration_sets(score)
    law = coverage_law(50, 0.9)
    assert (law.a, law.b) == (46, 5)
    assert stats.kstest(found, stats.beta(law.a, law.b).cdf).pvalue > 1e-3
    # a neighbouring order statistic is told apart, so the test can fail
    for a in (45, 47):
        assert stats.kstest(found, stats.beta(a, 51 - a).cdf).pvalue < 1e-6
    low, high = law.interval
    assert abs(((found >= low) & (found <= high)).mean() - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


@pytest.mark.parametrize("score", SCORES)
def test_covered_rows_of_2000_random_splits_follow_the_beta_binomial(score):
    """Of a finite pool without ties, the covered of m test rows are beta-binomial, exactly."""
    n, m, coverage, splits = 60, 40, 0.8, 2000
    probs, labels = task(n + m)
    rng = np.random.default_rng(0)
    covered = np.empty(splits, int)
    for split in range(splits):
        order = rng.permutation(n + m)
        own, test = order[:n], order[n:]
        thresholds = calibrate(probs[own], labels[own], score, seed=split, keys=own.tolist())
        found = sets(probs[test], thresholds, coverage, test.tolist(), allow_empty=True)
        covered[split] = found[np.arange(m), labels[test]].sum()
    law = coverage_law(n, coverage)
    expected = stats.betabinom(m, law.a, law.b)
    edges = np.array([-1, 25, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 40])
    shares = np.diff(expected.cdf(edges))
    counts = np.histogram(covered, edges + 0.5)[0]
    assert shares.min() * splits > 20
    assert stats.chisquare(counts, shares * splits).pvalue > 1e-3


def test_each_class_has_its_coverage_only_if_it_is_asked_for_by_class():
    """A rare class that the model hardly believes in."""
    rng, found = np.random.default_rng(0), {False: [], True: []}
    for split in range(300):
        labels = (rng.random(600) < 0.15).astype(int)
        p = np.where(labels == 1, rng.beta(2, 3, 600), rng.beta(1, 5, 600))
        probs = np.stack([1 - p, p], 1)
        for per_class, coverages in found.items():
            thresholds = calibrate(probs[:300], labels[:300], "lac", per_class, seed=split)
            inside = sets(probs[300:], thresholds, 0.9, allow_empty=True)
            coverages.append(inside[np.arange(300), labels[300:]][labels[300:] == 1].mean())
    by_class = np.array(found[True])
    error = by_class.std() / 300**0.5
    # the mean of k / (n + 1) over the class's row numbers lies between 0.9 and 0.9 + 1 / 30
    assert 0.9 - 3 * error < by_class.mean() < 0.9 + 1 / 30 + 3 * error
    assert np.mean(found[False]) < 0.8


def test_ties_can_only_raise_the_coverage():
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        probs = np.array([[0.9, 0.1], [0.6, 0.4]])[rng.integers(2, size=400)]
        labels = (rng.random(400) > probs[:, 0]).astype(int)
        inside = sets(probs[200:], calibrate(probs[:200], labels[:200]), 0.7, allow_empty=True)
        found.append(inside[np.arange(200), labels[200:]].mean())
    assert np.mean(found) > 0.75 - 3 * np.std(found) / 300**0.5  # 0.75 hold the score 0.4 at least


def test_the_coverage_law_equals_scipy():
    law = coverage_law(200, 0.85, confidence=0.9)
    expected = stats.beta(171, 30)
    assert law.mean == pytest.approx(expected.mean()) and law.mean >= 0.85
    assert law.interval == pytest.approx(expected.interval(0.9))
    with pytest.raises(UsageError, match="takes 9 calibration rows; there are 8"):
        coverage_law(8, 0.9)


# --- figures --------------------------------------------------------------------------------------


def test_the_figures_of_sets_equal_those_counted_by_hand():
    inside = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    labels, right = np.array([0, 2, 1, 0]), np.array([True, False, False, True])
    found = evaluate_sets(inside, labels, right, confidence=0.9)
    assert (found.num_rows, found.coverage, found.size) == (4, 0.5, 1.5)
    assert (found.size_right, found.size_wrong, found.empty, found.single) == (0.5, 2.5, 0.25, 0.25)
    np.testing.assert_array_equal(found.class_rows, [2, 1, 1])
    np.testing.assert_array_equal(found.class_coverage, [0.5, 1.0, 0.0])
    exact = stats.binomtest(2, 4).proportion_ci(0.9, "exact")
    assert found.coverage_interval == pytest.approx((exact.low, exact.high))
    assert found.size_interval == (0, 3), "1.5 with 1.52 to either side, cut to what sizes can be"
    assert found.class_intervals[1] == pytest.approx((0.05, 1.0))


def test_a_class_or_kind_of_answer_without_rows_is_no_number():
    found = evaluate_sets(np.ones((3, 2), bool), np.zeros(3, int), np.ones(3, bool))
    assert np.isnan(found.class_coverage[1]) and found.class_intervals[1] == (0, 1)
    assert np.isnan(found.size_wrong) and found.size_right == 2
    alone = evaluate_sets(np.ones((1, 2), bool), np.zeros(1, int), np.ones(1, bool))
    assert alone.size_interval == (0, 2)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_clopper_pearson_equals_scipy(counts):
    expected = stats.binomtest(*counts).proportion_ci(0.95, "exact")
    assert clopper_pearson(*counts) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_mean_equals_scipy():
    values = np.array([1, 2, 3, 1, 2])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert mean_interval(values, 0, 5, 0.8) == pytest.approx(tuple(expected))


def test_intervals_without_data_are_all_there_can_be():
    assert clopper_pearson(0, 0) == (0, 1)
    assert mean_interval(np.array([2.0]), 0, 5) == (0, 5)


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_thresholds_come_back_from_json_to_the_bit(score, per_class):
    probs, labels = task(80)
    thresholds = calibrate(probs, labels, score, per_class, seed=3)
    content = json.loads(json.dumps(thresholds.model_dump()))
    again = as_record(content, ConformalThresholds, "bayes_config.json")
    assert again == thresholds
    np.testing.assert_array_equal(
        sets(probs, again, 0.8, range(80)), sets(probs, thresholds, 0.8, range(80))
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score", "hinge"),
        ("score", None),
        ("num_classes", 1),
        ("num_classes", 10**9),
        ("num_classes", 3.0),
        ("per_class", 1),
        ("per_class", True),  # with one list
        ("seed", -1),
        ("penalty", -0.1),
        ("penalty", math.inf),
        ("rank", -1),
        ("rank", "1"),
        ("scores", []),
        ("scores", [[]]),
        ("scores", [[0.2, 0.1]]),
        ("scores", [[0.1], [0.2]]),
        ("scores", [[math.nan]]),
        ("scores", [[math.inf]]),
        ("scores", [[-0.1]]),
        ("scores", [["0.1"]]),
        ("scores", [[0.5] * (MOST_ROWS + 1)]),
        ("scores", "0.1"),
    ],
)
def test_a_record_with_a_wrong_value_is_refused_by_name(key, value):
    content = {"score": "lac", "num_classes": 3, "scores": [[0.1, 0.2]]}
    as_record(content, ConformalThresholds, "bayes_config.json")
    with pytest.raises(UsageError, match=r"bayes_config\.json: .*" + key):
        as_record({**content, key: value}, ConformalThresholds, "bayes_config.json")


def test_more_rows_over_all_classes_than_are_read_are_refused():
    half = [0.5] * (MOST_ROWS // 2 + 1)
    content = {"score": "lac", "num_classes": 2, "per_class": True, "scores": [half, half]}
    with pytest.raises(UsageError, match="100002 rows"):
        as_record(content, ConformalThresholds, "bayes_config.json")


# --- wrong calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "naive"}, "'naive'; it must be one of lac, aps, raps"),
        ({"probabilities": np.zeros((0, 3)), "labels": []}, "0 calibration rows.*Hold some out"),
        ({"probabilities": np.full(3, 0.5)}, r"shape \(3,\)"),
        ({"probabilities": np.full((3, 1), 1.0)}, "two classes"),
        ({"probabilities": np.log(np.full((3, 3), 1 / 3))}, "Row 0 .* take exp"),
        ({"probabilities": np.array([[0.5, 0.5, 0], [0, 0, 1], [np.nan, 0, 1]])}, "Row 2"),
        ({"labels": [0, 1]}, "each of the 3 rows"),
        ({"labels": [0.0, 1.0, 2.0]}, "float64"),
        ({"labels": [0, 1, 3]}, "label of row 2 is 3; with 3 classes"),
        ({"labels": [0, -1, 2]}, "label of row 1 is -1"),
        ({"seed": -1}, "'seed' is -1"),
        ({"keys": [1, 2]}, "2 keys for 3 rows"),
        ({"score": "raps", "penalty": -1.0}, "penalty -1.0"),
        ({"score": "raps", "penalty": math.nan}, "penalty nan"),
        ({"score": "raps", "rank": -2}, "rank -2"),
    ],
)
def test_a_wrong_calibration_is_told(change, message):
    call = {"probabilities": np.eye(3), "labels": [0, 1, 2]}
    calibrate(**call)
    with pytest.raises(UsageError, match=message):
        calibrate(**{**call, **change})


@pytest.mark.parametrize("coverage", [0, 1, 1.5, -0.1, math.nan, "high", None])
def test_a_coverage_outside_of_0_to_1_is_told(coverage):
    thresholds = calibrate(np.eye(3), [0, 1, 2])
    with pytest.raises(UsageError, match=r"coverage is .*between 0 and 1"):
        sets(np.eye(3), thresholds, coverage)


def test_wrong_sets_are_told():
    thresholds = calibrate(np.eye(3), [0, 1, 2], "aps")
    with pytest.raises(UsageError, match="pass one key a row"):
        sets(np.eye(3), thresholds, 0.5)
    with pytest.raises(UsageError, match="of 2 classes, and the thresholds of 3"):
        sets(np.eye(2), thresholds, 0.5, range(2))
    with pytest.raises(UsageError, match="shape"):
        evaluate_sets(np.zeros((0, 3), bool), [], [])
    with pytest.raises(UsageError, match="Whether the answers are right"):
        evaluate_sets(np.ones((2, 3), bool), [0, 1], [0.5, 1])
    assert sets(np.zeros((0, 3)), thresholds, 0.5, []).shape == (0, 3), "no rows are no error"
