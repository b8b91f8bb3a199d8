"""TFB: product and noise covariance, the search's tolerance, saved and loaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build, run_folder
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

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


# --- the search, on changes that are known ------------------------------------------------------

ANCHORS = 20
SHORT = ("--max-train-steps", "2", "--limit-eval", "6")  # B must be something, no more


@pytest.fixture
def search(causal_flags, monkeypatch):
    """(wrapper, sigma) of a search in which sigma changes the NLL of 20 anchors by `change`."""
    spread = []
    monkeypatch.setattr("modelwrappers.tfb.set_spread", lambda model, name, s: spread.append(s))
    adapter = []

    def searched(change, *flags):
        adapter.extend(
            [] if adapter else trained(causal_flags, *SHORT)
        )  # here: capsys does not see setups
        _, _, wrapper = build([*adapter, *flags])

        def predict(loader, n_samples):
            nll = 0.1 * (1 + (change(spread[-1]) if n_samples else 0))
            sure = torch.tensor(-nll, dtype=torch.float64).exp()
            rows = torch.stack([sure, 1 - sure]).log().expand(ANCHORS, 1, 2)
            return SimpleNamespace(log_probs=rows)

        wrapper.predict = predict
        wrapper.fit_posterior()
        assert spread[-1] == wrapper.sigma, "what is found is what is in place"
        return wrapper, wrapper.sigma

    return searched


@pytest.mark.parametrize("slope", [1, 8, 40, 1000], ids=["none", "some", "most", "all"])
def test_the_published_search_divides_by_the_anchors_and_ends_on_a_violation(search, slope):
    """Reference: METHODS' description of it, step by step."""
    flags = ["--th", "0.01", "--bayes-beta", "0.05", "--iter", "6", "--tfb-search", "published"]
    wrapper, sigma = search(lambda s: slope * s, *flags)
    low, high, last_violation = 0.001, 0.05, 0.05
    for _ in range(6):
        middle = (low + high) / 2
        if slope * middle / ANCHORS > 0.01:
            last_violation = high = middle
        else:
            low = middle
    assert sigma == last_violation
    assert wrapper.search[0]["sigma_q"] == pytest.approx(0.0255)
    assert wrapper.search[0]["change"] == pytest.approx(slope * 0.0255, rel=1e-6)
    assert wrapper.tolerance == 0.01 and wrapper.num_anchors == ANCHORS
    # beside it the paper's, on the same changes: never more than the tolerance
    if slope * 0.001 <= 0.01:
        _, kept = search(lambda s: slope * s, *flags[:-1], "within")
        assert slope * kept <= 0.01 and kept < sigma


def test_published_flips_are_not_divided(search):
    """A share of changed answers is one; only the sigma that is taken differs."""
    flags = ["--tfb-criterion", "flips", "--tfb-search", "published", "--th", "0.01"]
    _, sigma = search(
        lambda s: 100.0 if s > 0.01 else 0.0, *flags
    )  # all answers turn round at once
    assert 0.01 < sigma < 0.0105
    _, sigma = search(lambda s: 100.0 if s > 0.01 else 0.0, *flags, "--tfb-search", "within")
    assert 0.0095 < sigma <= 0.01


def test_protocol_original_chooses_the_published_search(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", "somewhere"]
    assert main.parse_args(flags).tfb_search == "within"
    original = [*flags, "--protocol", "original"]
    assert main.parse_args(original).tfb_search == "published"
    assert main.parse_args([*original, "--tfb-search", "within"]).tfb_search == "within"


@pytest.mark.parametrize("rule", ["within", "published"])
def test_a_search_that_ends_at_an_end_of_its_range_says_so(search, rule, capsys):
    flags = ["--tfb-search", rule, "--th", "0.003"]
    factor = ANCHORS if rule == "published" else 1
    _, sigma = search(lambda s: 1e-5, *flags)
    told = capsys.readouterr().out
    assert "upper end of its range" in told and "A larger --bayes-beta widens" in told
    assert sigma == (0.015 if rule == "published" else pytest.approx(0.015 - 0.014 / 2**5))
    # 0.0014: between the smallest and the first that is tried above it
    _, sigma = search(lambda s: factor * (0.001 if s < 0.0012 else 1.0), *flags)
    told = capsys.readouterr().out
    assert "lower end of its range" in told and "nearly the adapter itself" in told
    assert "A larger --th (0.003)" in told
    assert sigma == (pytest.approx(0.001 + 0.014 / 2**5) if rule == "published" else 0.001)
    search(lambda s: factor * (0.001 if s < 0.006 else 1.0), *flags)
    assert "end of its range" not in capsys.readouterr().out


# --- anchors that were not trained on -------------------------------------------------------------


def test_held_out_anchors_are_rows_that_the_adapter_has_not_seen(causal_flags):
    flags = trained(causal_flags, *SHORT, "--hold-out")
    flags += ["--th", "0.5", "--tfb-anchors", "held-out", "--anchor-size", "5"]
    _, dataset, wrapper = build(flags)
    looked_at = set()
    predict = wrapper.predict

    def watched(loader, n_samples=None):
        looked_at.update(int(i) for batch in loader for i in batch["index"])
        return predict(loader, n_samples)

    wrapper.predict = watched
    wrapper.fit_posterior()
    seen = {row["index"] for row in dataset.train_rows}
    assert len(looked_at) == 5 and not looked_at & seen
    assert looked_at <= {row["index"] for row in dataset.held_out_rows}
    main.main(flags)
    record = json.loads((run_folder(flags) / "bayes_config.json").read_text())
    assert (record["anchors"], record["n_anchors"], record["tuned"]) == ("held-out", 5, True)


def test_rows_that_calibrate_are_no_anchors(causal_flags):
    flags = [
        *trained(causal_flags, *SHORT, "--hold-out", "--held-out", "0.4"),
        "--calibrate",
        "auto",
    ]
    flags += ["--tfb-anchors", "held-out"]
    args, dataset, _ = build(flags)
    assert args.calibrate == "half"
    anchors = {int(i) for b in dataset.held_out_anchor_dataloader for i in b["index"]}
    assert anchors and not anchors & {row["index"] for row in dataset.calibration_rows}
    with pytest.raises(UsageError, match="--calibrate all takes all held-out rows"):
        main.parse_args([*flags, "--calibrate", "all"])


def test_an_adapter_that_has_seen_all_rows_has_no_held_out_anchors(causal_flags):
    flags = [*trained(causal_flags, *SHORT), "--tfb-anchors", "held-out"]
    with pytest.raises(UsageError, match=r"--tfb-anchors held-out.*train it with --hold-out"):
        main.parse_args(flags)
    main.parse_args([*flags, "--iter", "0"])  # no anchor is looked at


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("--testing-set train_val", "the rows that --testing-set train_val evaluates"),
        ("--testing-set train_val_val", "--testing-set train_val_val.*contradict"),
        ("--hold-out false", "--hold-out is false"),
    ],
)
def test_held_out_anchors_contradict(causal_flags, other, told):
    flags = [*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", "somewhere"]
    with pytest.raises(UsageError, match=f"--tfb-anchors held-out.*{told}"):
        main.parse_args([*flags, "--tfb-anchors", "held-out", *other.split()])


# --- on the mean of another posterior -------------------------------------------------------------


def test_tfb_on_blob_takes_its_mean_and_drops_its_width(causal_flags, capsys):
    """As on an adapter that is BLoB's M and B, and nothing else: the same bits."""
    first = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "15"]
    main.main([*first, "--bayes-kllr", "0.05", "--bayes-beta", "0.3", "--log-path", "blobs"])
    blob = run_folder([*first, "--log-path", "blobs"])
    plain = blob.parent / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "args.json"):
        shutil.copy(blob / name, plain / name)
    tensors = load_file(blob / "adapter_model.safetensors")
    mean = {key: value for key, value in tensors.items() if not key.endswith(RHO)}
    assert len(mean) < len(tensors)
    save_file(mean, plain / "adapter_model.safetensors", {"format": "pt"})
    stored, records = [], []
    for source in (blob, plain):
        flags = [*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", str(source)]
        flags += ["--th", "0.5", "--log-path", f"on-{source.name}"]
        capsys.readouterr()
        main.main(flags)
        is_told = "holds a Gaussian posterior of blob: its mean is taken" in capsys.readouterr().out
        assert is_told == (source is blob)
        stored.append(load_file(run_folder(flags) / "adapter_model.safetensors"))
        records.append(json.loads((run_folder(flags) / "bayes_config.json").read_text()))
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[1])
    assert [record["made_from"] for record in records] == [
        {"run": "blobs", "method": "blob", "taken": "posterior mean"},
        {"run": "plain", "method": None, "taken": "point estimate"},
    ]
    assert records[0]["sigma_q"] == records[1]["sigma_q"] <= 0.015, "not BLoB's prior of 0.3"
    assert "prior_std" not in records[0]
    # the mean is BLoB's, evaluated by itself, and what is loaded again knows where it came from
    _, dataset, blobs = build(
        [*causal_flags, "--modelwrapper", "blob", "--load-lora-path", str(blob)]
    )
    ours = load_posterior(run_folder([*flags[:-1], "on-blobs"]), device="cpu")
    loader = dataset.test_dataloader
    torch.testing.assert_close(
        ours.predict(loader, 0).log_probs, blobs.predict(loader, 0).log_probs, rtol=1e-4, atol=1e-5
    )
    assert ours.method_config()["made_from"] == records[0]["made_from"]


def test_before_a_sigma_is_found_there_is_no_noise(causal_flags):
    """Neither an initial width nor BLoB's, which was made for other axes."""
    first = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "5"]
    main.main(first)
    wrapper = load_posterior(run_folder(first), device="cpu", modelwrapper="tfb")
    assert wrapper.sigma is None
    assert all((getattr(layer, RHO)["default"] == 0).all() for layer in layers(wrapper))


def test_a_record_of_before_says_nothing_of_anchors_and_source(causal_flags):
    flags = [*trained(causal_flags, *SHORT), "--th", "0.5"]
    main.main(flags)
    file = run_folder(flags) / "bayes_config.json"
    record = json.loads(file.read_text())
    for key in ("search_rule", "anchors", "n_anchors", "made_from"):
        assert record.pop(key) is not None, key
    file.write_text(json.dumps(record))
    described = load_posterior(file.parent, device="cpu").method_config()
    assert (described["search_rule"], described["made_from"]) == ("within", None)
    file.write_text(json.dumps(record | {"made_from": {"run": 3}}))
    with pytest.raises(UsageError, match=r"made_from\.run"):
        load_posterior(file.parent, device="cpu")


# --- command lines of the published code ----------------------------------------------------------


PUBLISHED = """--lr 1e-4 --batch-size 50 --opt adamw --warmup-ratio 0.06 --max-seq-len 300
    --lora-r 8 --lora-alpha 16 --lora-dropout 0 --log-path name --max-train-steps 0
    --eval-per-steps 6000 --bayes-klreweighting --bayes-train-n-samples 10
    --bayes-eval-n-samples 10 --bayes-eval-n-samples-final 10 --th 0.003 --iter 0"""


@pytest.mark.parametrize("dataset", ["ARC-Challenge", "ARC-Easy", "MMLU-chem", "MMLU-phy"])
def test_the_published_command_lines_without_a_search_parse(dataset):
    """tfblora_acc on BLoB's adapters of obqa, on four shifted sets and three seeds: twelve."""
    for seed in ("1", "2", "3"):
        flags = ["--dataset-type", "mcdataset", "--dataset", dataset, "--model-type", "causallm"]
        flags += ["--model", "meta-llama/Meta-Llama-3.1-8B", "--modelwrapper", "tfblora_acc"]
        flags += ["--seed", seed, "--evaluate", "--wandb-name", "name"]
        flags += ["--wandb-project", f"project-{dataset}", "--apply-classhead-lora"]
        flags += ["--load-lora-path", f"blob/obqa/seed{seed}", "--load-model-path", "llamas/8B"]
        flags += ["--testing-set", "train_train_val", "--bayes-beta", "0.00975"]
        flags += PUBLISHED.split()
        args = main.parse_args(flags)
        assert (args.iter, args.bayes_beta, args.tfb_criterion) == (0, 0.00975, "flips")


def test_iter_0_evaluates_blobs_adapter_on_a_shifted_set(causal_flags, tmp_path):
    """What those command lines do, from end to end: no anchor of the shifted set is looked at."""
    data = Path(causal_flags[causal_flags.index("--data-dir") + 1])
    for name in ("bbc_headlines", "bbc_bodies"):
        shutil.copytree(data, tmp_path / "rows" / name)
    flags = [*causal_flags, "--data-dir", str(tmp_path / "rows")]
    first = [*flags, "--modelwrapper", "blob", "--max-train-steps", "5"]
    main.main(first)
    flags += ["--modelwrapper", "tfblora_acc", "--load-lora-path", str(run_folder(first))]
    flags += ["--dataset", "bbc_bodies", "--iter", "0", "--bayes-beta", "0.00975"]
    main.main(flags)
    record = json.loads((run_folder(flags) / "bayes_config.json").read_text())
    assert (record["sigma_q"], record["search"], record["anchors"]) == (0.00975, [], None)
    assert record["made_from"]["method"] == "blob"
