"""What to label next, against enumeration, closed forms and the laws of its random numbers."""

import logging
import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats
from scipy.stats import entropy

from decisions.acquisition import CRITERIA, acquire
from decisions.information import mutual_information_cap, summarise
from utils.errors import UsageError


def pool(n=8, num_draws=5, num_classes=3, seed=0):
    """Log-probabilities of draws that disagree, (n, N, C)."""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(num_classes, 0.4), (n, num_draws)))


def joint_information(draws, rows):
    """I(y_1, ..., y_k; theta) over every configuration of the labels, by its definition."""
    probs = np.exp(draws[list(rows)])  # (k, N, C)
    joint = np.array(
        [
            np.prod([p[:, c] for p, c in zip(probs, labels, strict=True)], axis=0)
            for labels in product(range(draws.shape[2]), repeat=len(rows))
        ]
    )  # (C^k, N)
    return entropy(joint.mean(1)) - entropy(joint, axis=0).mean()


def greedy_by_hand(draws, k):
    chosen = []
    for _ in range(k):
        left = [i for i in range(len(draws)) if i not in chosen]
        chosen.append(max(left, key=lambda i: joint_information(draws, [*chosen, i])))
    return chosen


# --- BatchBALD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_batchbald_of_three_points_equals_enumeration(seed):
    draws = pool(3, seed=seed)
    found = acquire(draws, 3, "batchbald")
    assert found.indices.tolist() == greedy_by_hand(draws, 3)
    for m in (1, 2, 3):
        expected = joint_information(draws, found.indices[:m])
        assert found.scores[:m].sum() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_batchbald_takes_the_greedy_best_of_a_pool(seed):
    draws = pool(seed=seed)
    assert acquire(draws, 4, "batchbald").indices.tolist() == greedy_by_hand(draws, 4)


def test_batchbald_does_not_pick_a_duplicate_where_bald_does():
    draws = pool(6)
    order = np.argsort(-summarise(draws).mutual_information)
    first, others = draws[order[0]], draws[order[1:]]
    twice = np.concatenate([first[None], first[None], others])
    assert acquire(twice, 2, "bald").indices.tolist() == [0, 1]
    found = acquire(twice, 5, "batchbald").indices.tolist()
    assert found[0] == 0 and 1 not in found[:2]


def test_what_a_row_adds_never_grows_and_the_draws_bound_the_sum():
    scores = acquire(pool(8, num_draws=4), 8, "batchbald").scores
    assert (np.diff(scores) <= 1e-12).all() and scores.sum() <= math.log(4)


def test_sampled_configurations_estimate_what_enumeration_gives():
    """Three are enumerated, so what the third row adds is an unbiased sample."""
    draws = pool(7, num_draws=6)
    exact = acquire(draws, 4, "batchbald")
    of_four = draws[exact.indices]
    found = [acquire(of_four[:3], 3, "batchbald", seed, configurations=3) for seed in range(200)]
    scores = np.array([f.scores for f in found])
    np.testing.assert_allclose(scores[:, :2], np.tile(exact.scores[:2], (200, 1)))
    third = scores[:, 2]
    assert third.std() > 1e-3, "these are samples"
    assert abs(third.mean() - exact.scores[2]) < 4 * third.std() / 200**0.5
    many = acquire(of_four, 4, "batchbald", configurations=26)  # 27 come after the third row
    assert many.scores[:3] == pytest.approx(exact.scores[:3])
    assert many.scores[3] != exact.scores[3] and abs(many.scores[3] - exact.scores[3]) < 0.15


def test_labels_that_are_certain_or_impossible_are_counted():
    """Two draws that exclude each other's class: one label tells all, and the cap is reached."""
    with np.errstate(divide="ignore"):
        draws = np.log(np.array([[[1.0, 0, 0], [0, 1, 0]]] * 3 + [[[0.5, 0.5, 0], [0.5, 0.5, 0]]]))
    for configurations in (4096, 1):
        found = acquire(draws, 4, "batchbald", configurations=configurations)
        np.testing.assert_allclose(found.scores, [math.log(2), 0, 0, 0], atol=1e-12)
    for by in CRITERIA:
        assert not np.isnan(acquire(draws, 4, by).scores).any()


# --- the others -----------------------------------------------------------------------------------


def test_bald_entropy_and_margin_take_the_largest_first():
    draws = pool(30)
    probs = np.exp(draws).mean(1)
    ranked = np.sort(probs, axis=1)
    expected = {
        "bald": entropy(probs, axis=1) - entropy(np.exp(draws), axis=2).mean(1),
        "entropy": entropy(probs, axis=1),
        "margin": 1 - (ranked[:, -1] - ranked[:, -2]),
    }
    for by, scores in expected.items():
        found = acquire(draws, 7, by)
        np.testing.assert_array_equal(found.indices, np.argsort(-scores)[:7])
        np.testing.assert_allclose(found.scores, np.sort(scores)[::-1][:7])


def test_two_classes_are_ranked_alike_by_entropy_and_margin():
    draws = pool(20, num_classes=2)
    entropies, margins = (acquire(draws, 20, by).indices for by in ("entropy", "margin"))
    np.testing.assert_array_equal(entropies, margins)


def test_powerbald_samples_rows_in_proportion_to_their_mutual_information():
    """The first has the law softmax(log I), and a batch that of sampling without replacement."""
    draws = pool(4)
    p = summarise(draws).mutual_information
    p /= p.sum()
    found = [tuple(acquire(draws, 2, "powerbald", seed).indices) for seed in range(3000)]
    first = np.bincount([pair[0] for pair in found], minlength=4)
    assert stats.chisquare(first, 3000 * p).pvalue > 1e-3
    assert stats.chisquare(first, np.full(4, 750)).pvalue < 1e-3, "and not the uniform law"
    pairs = list(permutations(range(4), 2))
    expected = [3000 * p[i] * p[j] / (1 - p[i]) for i, j in pairs]
    assert stats.chisquare([found.count(pair) for pair in pairs], expected).pvalue > 1e-3


def test_powerbald_takes_rows_without_information_last_and_by_chance():
    draws = pool(6)
    draws[2:5] = draws[2:5, :1]
    found = [acquire(draws, 6, "powerbald", seed) for seed in range(60)]
    assert all(set(f.indices[:3]) == {0, 1, 5} for f in found)
    assert {f.indices[3] for f in found} == {2, 3, 4}
    for f in found:  # finite, so that they can be written out
        assert np.isfinite(f.scores).all() and f.scores[3] < f.scores[2] - 100


def test_random_takes_every_row_equally_often():
    draws = pool(5)
    found = [tuple(acquire(draws, 2, "random", seed).indices) for seed in range(2000)]
    counts = [found.count(pair) for pair in permutations(range(5), 2)]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("by", CRITERIA)
def test_the_same_seed_chooses_the_same_rows_once_each(by):
    draws = pool(12)
    one, other = acquire(draws, 12, by, seed=3), acquire(draws, 12, by, seed=3)
    np.testing.assert_array_equal(one.indices, other.indices)
    assert sorted(one.indices) == list(range(12)) and one.scores.shape == (12,)


@pytest.mark.parametrize("by", CRITERIA)
def test_rows_in_blocks_and_single_precision_are_chosen_alike(by, monkeypatch):
    draws = pool(20)
    whole = acquire(draws, 5, by)
    monkeypatch.setattr("decisions.information.BLOCK", 50)
    blocks = acquire(draws.astype(np.float32), 5, by)
    np.testing.assert_array_equal(blocks.indices, whole.indices)
    np.testing.assert_allclose(blocks.scores, whole.scores, rtol=1e-4, atol=1e-6)


def test_each_row_counts_with_its_own_draws():
    draws, num_draws = pool(10), np.array([2, 5] * 5)
    draws[::2, 2:] = np.nan
    found = acquire(draws, 10, "bald", num_draws=num_draws)
    for index, score in zip(*found, strict=True):
        own = draws[index : index + 1, : num_draws[index]]
        assert score == pytest.approx(summarise(own).mutual_information[0])
    equal = acquire(draws[:, :2], 3, "batchbald")
    padded = acquire(draws, 3, "batchbald", num_draws=np.full(10, 2))
    np.testing.assert_array_equal(padded.indices, equal.indices)


# --- what is said ---------------------------------------------------------------------------------


@pytest.fixture
def warnings_said():
    """Messages of the project's logger, which may have no way to pytest's."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, handler = logging.getLogger("bayesian_peft"), Kept(logging.WARNING)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_mutual_information_close_to_log_n_is_told(warnings_said):
    certain = np.log(np.clip(np.array([[[1.0, 0], [0, 1]]] * 4), 1e-9, 1))
    acquire(certain, 1, "bald")
    assert "row 0 is 0.69 nats, and 2 draws can show at most log 2 = 0.69" in warnings_said[0]
    warnings_said.clear()
    acquire(certain, 3, "batchbald")
    assert warnings_said[0].startswith("The mutual information of the first 1 of 3 rows is 0.69")


def test_a_batch_that_adds_up_to_more_than_the_draws_can_show_is_told(warnings_said):
    draws = pool(40, num_draws=4)
    assert summarise(draws).mutual_information.max() < 0.9 * mutual_information_cap(4)
    acquire(draws, 1, "bald")
    assert not warnings_said
    acquire(draws, 10, "bald")
    assert "of the 10 chosen rows, added up, is" in warnings_said[0]
    assert "log 4 = 1.39" in warnings_said[0] and "more draws" in warnings_said[0]


def test_draws_that_are_enough_are_not_warned_of(warnings_said):
    acquire(pool(10, num_draws=200), 2, "batchbald")
    acquire(pool(10, num_draws=2), 5, "entropy")
    assert not warnings_said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "bold"}, "'bold'; it must be one of bald, batchbald"),
        ({"k": 9}, "9 rows .* there are 8, so it must be 1 to 8"),
        ({"k": 0}, "0 rows"),
        (
            {"draws": pool()[:, :1], "by": "bald"},
            "bald needs mutual information, and a single draw",
        ),
        ({"draws": pool()[:, :1], "by": "powerbald"}, "choose by entropy, margin or random"),
        ({"num_draws": np.array([5] * 7 + [1]), "by": "batchbald"}, "single draw"),
        ({"num_draws": np.array([5] * 7 + [3]), "by": "batchbald"}, "rows have 3 to 5"),
        ({"num_draws": np.array([5] * 7 + [6])}, "from 1 to 5"),
        ({"num_draws": np.array([5, 5])}, "each of the 8 rows"),
        ({"draws": np.exp(pool())}, "Row 0 .*log_softmax"),
        ({"draws": pool()[0]}, r"shape \(5, 3\)"),
        ({"draws": np.zeros((0, 5, 3))}, r"at least one row"),
        ({"draws": np.full((8, 5, 3), np.nan)}, "Row 0"),
        ({"by": "batchbald", "configurations": 0}, "configurations is 0"),
    ],
)
def test_a_wrong_call_is_told(change, message):
    call = {"draws": pool(), "k": 3, "by": "entropy"}
    acquire(**call)
    with pytest.raises(UsageError, match=message):
        acquire(**{**call, **change})


def test_a_single_draw_is_enough_where_no_mutual_information_is_needed():
    for by in ("entropy", "margin", "random"):
        assert len(acquire(pool(num_draws=1), 3, by).indices) == 3
