"""The report's metrics against scikit-learn, torchmetrics, relplot, scipy or a closed form."""

from itertools import pairwise

import numpy as np
import pytest
import relplot
import torch
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from decisions import information
from report import uncertainty as u
from utils.metrics import posterior_predictive, score


@pytest.fixture(scope="module")
def data():
    """Draws (n, N, C), predictive (n, C) and labels of an over-confident posterior."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(601, 1, 4) + torch.randn(601, 7, 4)
    draws = logits.log_softmax(-1)
    labels = torch.distributions.Categorical(logits=0.5 * logits[:, 0]).sample()
    return draws.double().numpy(), posterior_predictive(draws).numpy(), labels.numpy()


def resample(n, seed=0):
    """Indices of a resample, and its row of counts."""
    index = np.random.default_rng(seed).integers(0, n, n)
    return index, np.bincount(index, minlength=n).astype(float)[None]


def test_the_four_numbers_are_those_of_utils_metrics(data):
    _, log_probs, labels = data
    expected = score(torch.tensor(log_probs), torch.tensor(labels), 15)
    confidence, correct = u.top_label(log_probs, labels)
    assert u.mean(correct) == pytest.approx(expected.acc)
    assert u.calibration_errors(confidence, correct)[0] == pytest.approx(expected.ece, abs=1e-6)
    nll = u.negative_log_likelihoods(log_probs, labels)
    assert u.mean(nll) == pytest.approx(expected.nll)
    brier = u.brier_scores(np.exp(log_probs), labels)
    assert u.mean(brier) == pytest.approx(expected.brier)


@pytest.mark.parametrize("num_bins", [5, 15])
def test_ece_and_mce_equal_torchmetrics(data, num_bins):
    _, log_probs, labels = data
    probs, target = torch.tensor(np.exp(log_probs)), torch.tensor(labels)
    ece, mce = u.calibration_errors(*u.top_label(log_probs, labels), num_bins)
    for value, norm in ((ece, "l1"), (mce, "max")):
        expected = multiclass_calibration_error(probs, target, 4, n_bins=num_bins, norm=norm)
        assert value == pytest.approx(expected.item(), abs=1e-6)


def test_classwise_ece_is_the_mean_of_one_against_rest(data):
    _, log_probs, labels = data
    probs = np.exp(log_probs)
    edges, expected = np.linspace(0, 1, 16), 0.0
    for c in range(4):
        for lower, upper in pairwise(edges):
            inside = (probs[:, c] >= lower) & (probs[:, c] < upper)
            if inside.any():
                gap = (labels == c)[inside].mean() - probs[inside, c].mean()
                expected += inside.mean() * abs(gap) / 4
    assert u.classwise_calibration_error(probs, labels) == pytest.approx(expected)


def test_adaptive_ece_equals_equal_counts_sliced_by_hand(data):
    _, log_probs, labels = data
    confidence, correct = u.top_label(log_probs, labels)
    order, n = np.argsort(confidence), len(labels)
    expected = 0.0
    for b in range(15):
        inside = order[round(b * n / 15) : round((b + 1) * n / 15)]
        expected += len(inside) / n * abs(correct[inside].mean() - confidence[inside].mean())
    assert u.adaptive_calibration_error(confidence, correct) == pytest.approx(expected)


def test_adaptive_ece_of_constant_confidence_is_the_gap_to_the_accuracy():
    correct = np.array([1.0] * 6 + [0.0] * 4)
    assert u.adaptive_calibration_error(np.full(10, 0.9), correct) == pytest.approx(0.3)


def test_smooth_ece_equals_relplot_and_so_does_its_resampled_form(data):
    _, log_probs, labels = data
    confidence, correct = u.top_label(log_probs, labels)
    expected, sigma = relplot.smECE(confidence, correct, return_width=True)
    assert u.smooth_calibration_error(confidence, correct) == pytest.approx((expected, sigma))
    assert u.smooth_error_at(confidence, correct, sigma) == pytest.approx(expected, rel=0.02)
    index, weights = resample(len(labels))
    again = relplot.metrics.smECE_sigma(confidence[index], correct[index], sigma)
    value = u.smooth_error_at(confidence, correct, sigma, weights)
    assert value == pytest.approx(again, rel=0.01)


def test_many_examples_are_summed_another_way_to_the_same_numbers(monkeypatch):
    rng, n = np.random.default_rng(0), 300
    confidence, correct = rng.random(n).round(3), (rng.random(n) < 0.7).astype(float)
    weights = rng.poisson(1, (5, n)).astype(float)
    both = []
    for dense in (0, 10**9):
        monkeypatch.setattr(u, "DENSE", dense)
        both.append(
            np.stack(
                [
                    *u.calibration_errors(confidence, correct, 15, weights),
                    u.area_under_risk_coverage(confidence, correct, weights),
                ]
            )
        )
    np.testing.assert_allclose(*both)
    once = u.smooth_error_at(confidence, correct, 0.05, weights)
    four = [np.tile(values, 4) for values in (confidence, correct)]  # more than the grid's points
    again = u.smooth_error_at(*four, 0.05, np.tile(weights, 4))
    np.testing.assert_allclose(once, again)


def test_brier_splits_into_calibration_and_refinement_in_closed_form():
    # Two forecasts in bins of their own: 0.8 comes true 6 times in 10, 0.3 does 3 times in 10.
    p = np.array([0.8] * 10 + [0.3] * 10)
    probs = np.stack([p, 1 - p], 1)
    labels = 1 - np.array([1] * 6 + [0] * 4 + [1] * 3 + [0] * 7)
    calibration = u.brier_calibration(probs, labels, 15)
    assert calibration == pytest.approx(2 * 0.5 * 0.2**2)
    refinement = u.mean(u.brier_scores(probs, labels)) - calibration
    assert refinement == pytest.approx(2 * (0.5 * 0.6 * 0.4 + 0.5 * 0.3 * 0.7))


def test_noise_floors_equal_the_metrics_of_labels_drawn_from_the_model(data):
    probs = np.exp(data[1])
    rng, found = np.random.default_rng(1), []
    for _ in range(80):
        labels = np.array([rng.choice(probs.shape[1], p=p / p.sum()) for p in probs])
        confidence, correct = u.top_label(data[1], labels)
        ece, mce = u.calibration_errors(confidence, correct)
        smooth = u.smooth_calibration_error(confidence, correct)[0] if len(found) < 15 else np.nan
        found.append([
            *(ece, mce, u.adaptive_calibration_error(confidence, correct)),
            *(u.classwise_calibration_error(probs, labels), smooth),
            u.brier_calibration(probs, labels),
        ])  # fmt: skip
    floors = u.noise_floors(probs, 15, 0)
    means, spreads = np.nanmean(found, 0), np.nanstd(found, 0)
    # 60 draws against 80 (15 for the smooth one): within four standard errors
    assert (np.abs(np.array(list(floors.values())) - means) < 4 * spreads / 12**0.5).all()
    assert list(floors) == [
        *("ece", "mce", "ece_adaptive", "ece_classwise", "ece_smooth", "brier_calibration")
    ]


def test_entropies_and_mutual_information_equal_scipy(data):
    draws, log_probs, _ = data
    total = entropy(np.exp(log_probs), axis=-1)
    expected = entropy(np.exp(draws), axis=-1).mean(1)
    np.testing.assert_allclose(information.predictive_entropy(log_probs), total, rtol=1e-6)
    np.testing.assert_allclose(information.expected_entropy(draws), expected, rtol=1e-6)
    # the mean KL divergence of the draws from their mean is the same number
    divergence = (np.exp(draws) * (draws - log_probs[:, None])).sum(-1).mean(1)
    np.testing.assert_allclose(
        information.summarise(draws).mutual_information, divergence, atol=1e-6
    )


def test_draws_that_agree_leave_no_epistemic_uncertainty(data):
    draws = np.repeat(data[0][:, :1], 5, 1)
    assert information.summarise(draws).mutual_information.max() < 1e-12
    assert u.draw_deviation(draws).max() < 1e-12 and not u.flip_rates(draws).any()


def test_spread_and_flips_of_two_draws_in_closed_form():
    draws = np.log([[[0.9, 0.1], [0.3, 0.7]], [[0.9, 0.1], [0.7, 0.3]]])  # means 0.6 and 0.8
    np.testing.assert_allclose(u.draw_deviation(draws), [0.3, 0.1])
    np.testing.assert_allclose(u.flip_rates(draws), [0.5, 0.0])


def test_aurc_equals_the_loop_over_thresholds(data):
    _, log_probs, labels = data
    confidence, correct = u.top_label(log_probs, labels)
    risks = [1 - correct[confidence >= threshold].mean() for threshold in confidence]
    assert u.area_under_risk_coverage(confidence, correct) == pytest.approx(np.mean(risks))


def test_aurc_of_a_perfect_ranking_in_closed_form():
    n, errors = 10, 3
    correct = np.array([1.0] * (n - errors) + [0.0] * errors)
    expected = sum(k / (n - errors + k) for k in range(1, errors + 1)) / n
    assert u.area_under_risk_coverage(np.linspace(1, 0.5, n), correct) == pytest.approx(expected)


def test_accuracy_at_coverage_counts_the_most_confident():
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1.0, 1.0, 0.0, 1.0])
    at = u.accuracy_at_coverage(confidence, correct, np.array([0.5, 0.75, 1.0]))
    np.testing.assert_allclose(at, [1.0, 2 / 3, 0.75])
    assert u.accuracy_at_coverage(np.full(4, 0.5), correct, 0.5) == 0.75, "ties are shared out"


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_fpr95_equal_scikit_learn(data, ties):
    _, log_probs, labels = data
    _, correct = u.top_label(log_probs, labels)
    uncertainty = information.predictive_entropy(log_probs)
    uncertainty = uncertainty.round(1) if ties else uncertainty
    index, counts = resample(len(labels))
    for weights, chosen in ((None, np.arange(len(labels))), (counts, index)):
        auroc, fpr = u.detection(uncertainty, 1 - correct, weights)
        assert auroc == pytest.approx(roc_auc_score(1 - correct[chosen], uncertainty[chosen]))
        # scikit-learn's positives are what is kept: the correct answers, by low uncertainty
        false, true, _ = roc_curve(correct[chosen], -uncertainty[chosen], drop_intermediate=False)
        assert fpr == pytest.approx(false[true >= 0.95].min())


def test_detection_without_errors_is_not_a_number():
    assert np.isnan(u.detection(np.arange(3.0), np.zeros(3))).all()


def test_weights_give_the_value_on_the_resample_itself(data):
    _, log_probs, labels = data
    probs = np.exp(log_probs).round(2)  # ties
    probs[0] = [1.0, 0.0, 0.0, 0.0]
    confidence = probs.max(-1)
    correct = (probs.argmax(-1) == labels).astype(float)
    index, w = resample(len(labels))
    cases = {
        u.mean: (correct,),
        u.calibration_errors: (confidence, correct, 15),
        u.classwise_calibration_error: (probs, labels, 15),
        u.adaptive_calibration_error: (confidence, correct, 15),
        u.brier_calibration: (probs, labels, 15),
        u.area_under_risk_coverage: (confidence, correct),
        u.detection: (1 - confidence, 1 - correct),
    }
    for function, arguments in cases.items():
        weighted = np.ravel(function(*arguments, weights=w))
        chosen = [a[index] if isinstance(a, np.ndarray) else a for a in arguments]
        np.testing.assert_allclose(weighted, np.ravel(function(*chosen)), atol=1e-12)
    at = u.accuracy_at_coverage(confidence, correct, 0.8, w)
    assert at == pytest.approx(u.accuracy_at_coverage(confidence[index], correct[index], 0.8))


def test_no_metric_depends_on_the_order_of_the_examples(data):
    _, log_probs, labels = data
    confidence, correct = u.top_label(np.log(np.exp(log_probs).round(1) + 1e-9), labels)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    for function in (
        u.adaptive_calibration_error,
        u.area_under_risk_coverage,
        u.calibration_errors,
        u.detection,
    ):
        np.testing.assert_allclose(
            function(confidence, correct), function(confidence[shuffled], correct[shuffled])
        )
