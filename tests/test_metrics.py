"""Metrics against closed forms and independent implementations."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch.distributions import Categorical

from utils.metrics import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    posterior_predictive,
    score,
)


@pytest.fixture
def predictions():
    torch.manual_seed(0)
    log_probs = (3 * torch.randn(501, 4)).log_softmax(-1)
    return log_probs, torch.randint(4, (501,))


def test_accuracy_and_nll_equal_scikit_learn(predictions):
    log_probs, labels = predictions
    probs = log_probs.double().exp().numpy()
    assert accuracy(log_probs, labels) == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert negative_log_likelihood(log_probs, labels) == pytest.approx(
        log_loss(labels, probs, labels=range(4)), rel=1e-6
    )


def test_brier_score_equals_scikit_learn(predictions):
    log_probs, labels = predictions
    probs = log_probs.double().exp()
    probs = (probs / probs.sum(-1, keepdim=True)).numpy()
    expected = brier_score_loss(labels, probs, labels=range(4), scale_by_half=False)
    assert brier_score(log_probs, labels) == pytest.approx(expected, rel=1e-6)


def test_brier_score_of_a_certain_mistake_is_two():
    log_probs = torch.tensor([[1.0 - 1e-12, 1e-12]]).log()
    assert brier_score(log_probs, torch.tensor([1])) == pytest.approx(2.0)


def test_ece_equals_bins_counted_by_hand(predictions):
    log_probs, labels = predictions
    confidence, predicted = log_probs.double().exp().max(-1)
    expected = 0.0
    for lower in range(15):
        inside = (confidence > lower / 15) & (confidence <= (lower + 1) / 15)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert expected_calibration_error(log_probs, labels) == pytest.approx(expected, abs=1e-6)


def test_ece_of_constant_confidence_is_the_gap_to_the_accuracy():
    log_probs = torch.tensor([[0.9, 0.1]]).log().repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert expected_calibration_error(log_probs, labels) == pytest.approx(0.3, abs=1e-6)


def test_posterior_predictive_is_the_mean_of_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(7, 5, 3)
    mean = torch.stack([Categorical(logits=logits[:, n]).probs for n in range(5)]).mean(0)
    result = posterior_predictive(logits.log_softmax(-1))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result.exp().float(), mean)


def test_posterior_predictive_stays_finite_where_probabilities_underflow():
    log_probs = torch.tensor([[[0.0, -200.0], [0.0, -201.0]]])
    result = posterior_predictive(log_probs)
    assert result[0, 1] == pytest.approx(math.log((math.exp(-0.0) + math.exp(-1.0)) / 2) - 200.0)


def test_identical_draws_equal_one_draw(predictions):
    log_probs, labels = predictions
    ten = posterior_predictive(log_probs[:, None].expand(-1, 10, -1))
    assert score(ten, labels) == pytest.approx(score(log_probs, labels), abs=1e-9)
