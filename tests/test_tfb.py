"""TFB: product and noise covariance, the search's tolerance, saved and loaded."""

import json

import pytest
import torch
from conftest import build, run_folder
from peft.tuners.lora import LoraLayer

import main
from modelwrappers import load_posterior
from modelwrappers.lora.stochastic import RHO
from modelwrappers.tfb import reparametrise, set_spread
from utils.errors import RunError, UsageError
from utils.metrics import negative_log_likelihood, posterior_predictive

KINDS = ["causal_flags", "classifier_flags"]


def trained(flags, *more) -> list[str]:
    """Flags for TFB on an adapter that MAP has trained."""
    first = [*flags, "--modelwrapper", "map", "--max-train-steps", "20", "--checkpoint", *more]
    main.main(first)
    return [*flags, "--modelwrapper", "tfb", "--load-lora-path", str(run_folder(first))]


def layers(wrapper):
    return [m for m in wrapper.modules() if isinstance(m, LoraLayer) and hasattr(m, RHO)]


def plain_lora(flags):
    """The same adapter without TFB."""
    base = flags[: flags.index("--modelwrapper")]
    return build([*base, "--modelwrapper", "mle", *flags[-2:]])[2]


def assert_same_products(ours, reference):
    for layer, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(
            layer.get_delta_weight("default"),
            other.get_delta_weight("default"),
            rtol=1e-4,
            atol=1e-6,
        )


def test_the_product_is_kept_and_the_columns_of_b_are_orthogonal(causal_flags):
    flags = trained(causal_flags)
    plain = plain_lora(flags)
    _, _, wrapper = build(flags)
    plain_layers = [m for m in plain.modules() if isinstance(m, LoraLayer)]
    assert_same_products(layers(wrapper), plain_layers)
    for layer in layers(wrapper):
        b = layer.lora_B["default"].weight
        gram = b.T @ b
        off_diagonal = gram - gram.diag().diag()
        assert off_diagonal.abs().max() < 1e-5 * gram.abs().max()


def test_the_noise_of_the_weights_is_isotropic_in_the_column_space_of_b(causal_flags):
    """Covariance of one input column of s B'(Omega E): s^2 sigma^2 U U^T."""
    _, _, wrapper = build(trained(causal_flags))
    sigma = 0.01
    set_spread(wrapper, "default", sigma)
    layer = layers(wrapper)[0]
    x = torch.zeros(1, layer.in_features)
    x[0, 3] = 1.0
    number = 20000
    wrapper.draws.flipout = "none"
    wrapper.eval()
    with torch.no_grad():
        mean = layer(x)
        with wrapper.sampling(number):
            noise = (layer(x.expand(number, -1)) - mean).double()
    covariance = noise.T @ noise / number
    u, d, _ = torch.linalg.svd(layer.lora_B["default"].weight.double(), full_matrices=False)
    assert (d > 1e-6 * d[0]).all()
    expected = (layer.scaling["default"] * sigma) ** 2 * (u @ u.T)
    assert (covariance - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["nll", "flips"])
def test_the_tolerance_is_kept_and_the_largest_such_sigma_is_taken(kind, criterion, request):
    flags = [*trained(request.getfixturevalue(kind)), "--tfb-criterion", criterion, "--th", "0.04"]
    flags += ["--bayes-beta", "0.05", "--iter", "6", "--anchor-size", "30"]
    _, dataset, wrapper = build(flags)
    assert len(dataset.anchor_rows) == 30
    wrapper.fit_evaluate()
    accepted = [s["sigma_q"] for s in wrapper.search if s["accepted"]]
    rejected = [s["sigma_q"] for s in wrapper.search if not s["accepted"]]
    assert len(wrapper.search) == 6
    assert wrapper.sigma == max(accepted) and all(r > wrapper.sigma for r in rejected)
    # independently: the spread that is in place keeps the tolerance
    mean = posterior_predictive(wrapper.predict(dataset.anchor_dataloader, 0).log_probs)
    labels = mean.argmax(-1)
    drawn = posterior_predictive(wrapper.predict(dataset.anchor_dataloader, 10).log_probs)
    reference = negative_log_likelihood(mean, labels)
    change = {
        "nll": abs(negative_log_likelihood(drawn, labels) - reference) / reference,
        "flips": (drawn.argmax(-1) != labels).double().mean().item(),
    }[criterion]
    assert change <= 0.04  # one anchor of 30 may change


def test_the_originals_names_choose_the_criterion(causal_flags):
    flags = [*causal_flags, "--load-lora-path", "somewhere", "--max-train-steps", "10000"]
    flags += [
        "--th",
        "0.003",
        "--iter",
        "5",
        "--bayes-klreweighting",
        "--testing-set",
        "train_train_val",
    ]
    args = main.parse_args([*flags, "--modelwrapper", "tfblora"])
    assert (args.tfb_criterion, args.max_train_steps) == ("nll", 0)
    assert main.parse_args([*flags, "--modelwrapper", "tfblora_acc"]).tfb_criterion == "flips"


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_an_ordinary_posterior_adapter(kind, request):
    flags = [*trained(request.getfixturevalue(kind)), "--checkpoint", "--th", "0.5"]
    main.main(flags)
    folder = run_folder(flags)
    config = json.loads((folder / "bayes_config.json").read_text())
    assert config["sigma_q"] > 0 and config["search"]
    posterior = load_posterior(folder, device="cpu")
    _, dataset, _ = build(flags)
    from safetensors.torch import load_file

    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-3, atol=1e-4)
    # BLoB reads it like any of its own
    base = request.getfixturevalue(kind)
    _, _, blob = build([*base, "--modelwrapper", "blob", "--load-lora-path", str(folder)])
    for ours, theirs in zip(layers(blob), layers(posterior), strict=True):
        assert torch.equal(getattr(ours, RHO)["default"], getattr(theirs, RHO)["default"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_bases(kind, quantization, request):
    flags = trained(request.getfixturevalue(kind), "--quantization", quantization)
    metrics = main.main([*flags, "--quantization", quantization, "--th", "0.1"])
    assert metrics.nll < 1.3, "knowing nothing costs ln 5 = 1.6"


def test_an_adapter_with_zero_b_is_an_error(causal_flags):
    _, _, wrapper = build([*causal_flags, "--modelwrapper", "mle"])  # as it was initialised
    folder = wrapper.run_folder.path
    wrapper.save_adapter(folder)
    with pytest.raises(UsageError, match=r"B of the layer .* is zero"):
        build([*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", str(folder)])


def test_a_head_with_fewer_classes_than_ranks(classifier_flags):
    """B of the head is (5, 8): five directions, the other three rows of A are empty."""
    flags = trained(classifier_flags, "--apply-classhead-lora")
    plain = plain_lora(flags)
    _, dataset, wrapper = build([*flags, "--th", "0.5"])
    reference = [m for m in plain.modules() if isinstance(m, LoraLayer)]
    assert min(layer.out_features for layer in layers(wrapper)) == 5
    assert_same_products(layers(wrapper), reference)
    wrapper.fit_evaluate()
    assert wrapper.predict(dataset.test_dataloader).log_probs.std(1).max() > 0


def test_a_direction_that_b_lacks_gets_no_noise(causal_flags):
    _, _, wrapper = build(trained(causal_flags))
    layer = layers(wrapper)[0]
    layer.lora_B["default"].weight.data[:, 1:] = 0.0
    reparametrise(wrapper, "default")
    set_spread(wrapper, "default", 0.01)
    rho = getattr(layer, RHO)["default"]
    assert rho.isfinite().all() and (rho[0] > 0).all() and (rho[1:] == 0).all()


def test_a_tolerance_that_no_sigma_meets_is_an_error(causal_flags):
    flags = [*trained(causal_flags), "--th", "1e-12"]
    with pytest.raises(RunError, match=r"no sigma_q meets --th 1e-12.*Raise --th"):
        main.main(flags)


def test_without_flipout_a_draw_is_one_set_of_weights_for_the_whole_data_set(causal_flags):
    """Neither its predictions nor the search depend on how the rows were batched."""
    flags = [*trained(causal_flags), "--flipout", "none", "--th", "0.5", "--bayes-beta", "0.5"]
    results, searches = [], []
    for size in ("5", "64"):
        _, dataset, wrapper = build([*flags, "--eval-batch-size", size, "--log-path", size])
        wrapper.fit_evaluate()
        searches.append([step["change"] for step in wrapper.search])
        results.append(wrapper.predict(dataset.test_dataloader).log_probs)
    assert results[0].std(1).max() > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert searches[0] == pytest.approx(searches[1], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("sigma", [0.02, 0.0004])
def test_iter_0_takes_bayes_beta_as_sigma_without_a_search(causal_flags, sigma, capsys):
    """It need not exceed the smallest sigma of a search, and no anchor is looked at."""
    flags = [*trained(causal_flags), "--iter", "0", "--bayes-beta", str(sigma), "--checkpoint"]
    _, _, wrapper = build([*flags, "--log-path", "without-search"])
    wrapper.dataset = None
    wrapper.fit_posterior()
    assert f"sigma_q = {sigma} (--bayes-beta), without a search" in capsys.readouterr().out
    for layer in layers(wrapper):  # every column of B' times its row's noise has the length sigma
        lengths = layer.lora_B["default"].weight.norm(dim=0)
        std = getattr(layer, RHO)["default"][:, 0].square()
        torch.testing.assert_close((lengths * std)[lengths > 1e-6], torch.tensor(sigma).expand(8))
    main.main(flags)
    config = json.loads((run_folder(flags) / "bayes_config.json").read_text())
    assert config["sigma_q"] == sigma and config["search"] == []
    assert load_posterior(run_folder(flags), device="cpu").sigma == sigma


def test_a_search_needs_room_and_says_that_iter_0_does_without(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", "somewhere"]
    with pytest.raises(UsageError, match=r"--bayes-beta is 0\.0004.*--iter 0"):
        main.parse_args([*flags, "--bayes-beta", "0.0004"])


def test_tfb_without_an_adapter_is_an_error(causal_flags):
    with pytest.raises(UsageError, match="pass --load-lora-path"):
        main.parse_args([*causal_flags, "--modelwrapper", "tfb"])
