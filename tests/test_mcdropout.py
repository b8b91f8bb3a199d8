"""MC dropout: moments of the masks, and only LoRA's."""

import pytest
import torch
from conftest import build, run_folder
from peft.tuners.lora import LoraLayer

import main
from utils.errors import UsageError


def test_moments_of_one_layer_are_those_of_bernoulli_masks(causal_flags):
    """Mean s BAx, variance s^2 p/(1-p) sum_i (BA)_oi^2 x_i^2."""
    flags = [*causal_flags, "--modelwrapper", "mcdropout", "--lora-dropout", "0.3"]
    _, _, wrapper = build(flags)
    wrapper.eval()
    layer = next(m for m in wrapper.modules() if isinstance(m, LoraLayer))
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(1, layer.in_features)
    product = layer.get_delta_weight("default").detach()
    with torch.no_grad():
        base = layer.base_layer(x)
        number = 20000
        with wrapper.sampling(number):
            samples = layer(x.expand(number, -1)) - base
        with wrapper.sampling(0):
            mean = layer(x) - base
    variance = 0.3 / 0.7 * (product.square() @ x[0].square())
    torch.testing.assert_close(mean[0], product @ x[0], rtol=1e-4, atol=1e-4)
    error = (samples.mean(0) - mean[0]).abs() / (variance / number).sqrt()
    assert error.max() < 5
    torch.testing.assert_close(
        samples.var(0) / variance, torch.ones(len(variance)), atol=0.06, rtol=0
    )


def test_only_loras_dropout_is_on_at_prediction(classifier_flags):
    _, _, wrapper = build([*classifier_flags, "--modelwrapper", "mcdropout"])
    wrapper.eval()
    with wrapper.sampling(3):
        on = {
            n for n, m in wrapper.named_modules() if isinstance(m, torch.nn.Dropout) and m.training
        }
    assert on and all("lora_dropout" in name for name in on)
    assert not any(m.training for m in wrapper.modules()), "and off again afterwards"


def test_the_default_dropout_is_a_tenth(causal_flags):
    assert main.parse_args([*causal_flags, "--modelwrapper", "mcdropout"]).lora_dropout == 0.1


def test_dropout_zero_is_an_error_that_says_what_to_pass(causal_flags):
    with pytest.raises(UsageError, match=r"--lora-dropout is 0; pass e.g. --lora-dropout 0.1"):
        main.parse_args([*causal_flags, "--modelwrapper", "mcdropout", "--lora-dropout", "0"])


def test_an_adapter_without_dropout_is_the_same_error(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1", "--checkpoint"]
    main.main(flags)
    loaded = [
        *causal_flags,
        "--modelwrapper",
        "mcdropout",
        "--load-lora-path",
        str(run_folder(flags)),
    ]
    with pytest.raises(UsageError, match="--lora-dropout is 0"):
        build(loaded)
