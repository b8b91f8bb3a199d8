"""Temperature scaling against a fine grid, and what a run reports of it."""

import json

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file

import main
from utils.metrics import negative_log_likelihood, posterior_predictive
from utils.temperature import fit_temperature, scale


@pytest.mark.parametrize("draws", [1, 5])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 6.0])
def test_the_fitted_temperature_is_the_best_of_a_fine_grid(draws, sharpness):
    torch.manual_seed(0)
    truth = torch.randn(400, 1, 4)
    labels = torch.distributions.Categorical(logits=truth[:, 0]).sample()
    log_probs = (sharpness * (truth + 0.3 * torch.randn(400, draws, 4))).log_softmax(-1)

    def nll(t):
        return negative_log_likelihood(posterior_predictive(scale(log_probs, t)), labels)

    grid = torch.logspace(-1.2, 1.2, 1500).tolist()
    best = min(grid, key=nll)
    fitted = fit_temperature(log_probs, labels)
    assert fitted == pytest.approx(best, rel=5e-3)
    assert nll(fitted) <= nll(best) + 1e-9


def test_scaling_log_probabilities_is_scaling_logits():
    torch.manual_seed(0)
    logits = torch.randn(7, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(scale(logits.log_softmax(-1), 2.5), (logits / 2.5).log_softmax(-1))


@pytest.mark.parametrize("method", ["mle", "blob", "mcdropout", "deepensemble"])
def test_a_run_reports_the_scaled_row_beside_the_raw_one(causal_flags, method):
    flags = [*causal_flags, "--modelwrapper", method, "--max-train-steps", "6"]
    main.main([*flags, "--temperature-scaling"])
    folder = run_folder(flags)
    block = json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]
    held_out = load_file(folder / "predictions-held_out.safetensors")
    assert len(held_out["labels"]) == 8, "a fifth of 40 rows"
    scaled = block["temperature_scaled"]
    assert scaled["temperature"] == pytest.approx(
        fit_temperature(held_out["log_probs"], held_out["labels"])
    )
    assert scaled["nll"] != block["nll"]
    stored = load_file(folder / "predictions.safetensors")
    again = posterior_predictive(scale(stored["log_probs"], scaled["temperature"]))
    assert scaled["nll"] == pytest.approx(negative_log_likelihood(again, stored["labels"]))


@pytest.mark.parametrize("method", ["laplace", "tfb"])
def test_a_post_hoc_method_is_scaled_on_rows_that_its_adapter_has_not_seen(causal_flags, method):
    first = [*causal_flags, "--modelwrapper", "map", "--max-train-steps", "6", "--hold-out"]
    main.main([*first, "--checkpoint"])
    flags = [*causal_flags, "--modelwrapper", method, "--load-lora-path", str(run_folder(first))]
    flags += ["--temperature-scaling", *(["--th", "0.5"] if method == "tfb" else [])]
    main.main(flags)
    folder = run_folder(flags)
    block = json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]
    held_out = load_file(folder / "predictions-held_out.safetensors")
    assert len(held_out["labels"]) == 8 and block["temperature_scaled"]["temperature"] > 0


def test_held_out_rows_are_not_trained_on_and_hang_on_their_seed_only(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--temperature-scaling"]
    held_out = []
    for more in ([], ["--seed", "5"], ["--batch-size", "3"], ["--seed-split", "1"]):
        _, dataset, _ = build([*flags, *more, "--max-train-steps", "1"])
        trained = {row["index"] for row in dataset.train_rows}
        held_out.append({row["index"] for row in dataset.held_out_rows})
        assert not trained & held_out[-1] and len(trained | held_out[-1]) == 40
    assert held_out[0] == held_out[1] == held_out[2] != held_out[3]


def test_train_val_evaluates_the_held_out_part(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"]
    flags += ["--testing-set", "train_val", "--held-out", "0.25"]
    main.main(flags)
    block = json.loads((run_folder(flags) / "metrics.json").read_text())["datasets"][
        "bbc_headlines"
    ]
    assert block["n_examples"] == 10 and block["split"] == "train_val"
