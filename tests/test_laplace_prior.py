"""Laplace's prior and the mode under it against closed forms, then through the entry point."""

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file, save_file
from torch import nn

import main
from modelwrappers import load_posterior
from modelwrappers.lora.laplace_fit import posterior_class
from modelwrappers.lora.laplace_prior import (
    check_start,
    grid,
    maximise_evidence,
    tell_end_of_grid,
    warn_if_worse,
)
from modelwrappers.lora.laplace_record import Description
from modelwrappers.lora.linearised import LinearisedModel
from utils.errors import UsageError
from utils.logging import logger

# --- evidence, prior mean and mode, against dense algebra -----------------------------------------


@pytest.fixture
def two_blocks():
    """(posterior with Kronecker factors of two matrices, its dense curvature, sizes)."""
    torch.manual_seed(0)
    shapes, blocks, dense = [(3, 4), (2, 3)], [], []
    for shape in shapes:
        block = []
        for width in shape:
            root = torch.randn(width, width, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(root @ root.T)
            block.append((vectors, values))
        blocks.append(block)
        factors = [(q * v) @ q.T for q, v in block]
        dense.append(torch.kron(*factors))
    weights = nn.ParameterList([torch.randn(shape, dtype=torch.float64) for shape in shapes])
    posterior = posterior_class("kron")(weights, "classification")
    posterior.mean = nn.utils.parameters_to_vector(weights).detach()
    posterior.take(blocks)
    posterior.loss = torch.tensor(7.0, dtype=torch.float64)
    return posterior, torch.block_diag(*dense), [12, 6]


def evidence_by_determinants(posterior, dense, precisions, prior_mean):
    """log p(D) with dense matrices."""
    prior = torch.diag(precisions)
    delta = posterior.mean - prior_mean
    ratio = (dense + prior).logdet() - prior.logdet()
    return (-posterior.loss - (delta @ prior @ delta + ratio) / 2).item()


def test_the_evidence_of_one_precision_a_matrix_is_that_of_the_dense_determinants(two_blocks):
    posterior, dense, sizes = two_blocks
    values = torch.tensor([0.3, 5.0], dtype=torch.float64)
    spread = torch.repeat_interleave(values, torch.tensor(sizes))
    expected = evidence_by_determinants(posterior, dense, spread, torch.zeros(18))
    assert posterior.log_marginal_likelihood(values).item() == pytest.approx(expected, rel=1e-10)


def test_layerwise_precisions_are_a_maximum_of_the_evidence_and_no_worse_than_one(two_blocks):
    posterior, _, _ = two_blocks
    maximise_evidence(posterior, "scalar")
    scalar = posterior.log_marginal_likelihood().item()
    maximise_evidence(posterior, "layerwise")
    found = posterior.prior_precision.clone()
    best = posterior.log_marginal_likelihood(found).item()
    assert len(found) == 2 and best >= scalar
    for i in range(2):
        for factor in (0.7, 1.4):
            other = found.clone()
            other[i] *= factor
            assert posterior.log_marginal_likelihood(other).item() < best


def test_a_prior_mean_is_a_shift_of_the_weights(two_blocks):
    posterior, dense, _ = two_blocks
    prior_mean = torch.randn(18, dtype=torch.float64)
    posterior.prior_mean = prior_mean
    shifted = posterior.log_marginal_likelihood(torch.tensor(0.8)).item()
    spread = torch.full((18,), 0.8, dtype=torch.float64)
    expected = evidence_by_determinants(posterior, dense, spread, prior_mean)
    assert shifted == pytest.approx(expected, rel=1e-6)
    posterior.mean, posterior.prior_mean = posterior.mean - prior_mean, torch.zeros(18).double()
    assert posterior.log_marginal_likelihood(torch.tensor(0.8)).item() == pytest.approx(shifted)


def random_model(scale: float = 1.0):
    """(logits, Jacobians, labels) of 7 rows, 3 classes and matrices of 12 and 6 weights."""
    torch.manual_seed(1)
    return torch.randn(7, 3), scale * torch.randn(7, 3, 18), torch.randint(3, (7,))


@pytest.mark.parametrize("scale", [1.0, 30.0])  # of the latter a full step of Newton overshoots
@pytest.mark.parametrize("precisions", [[0.05], [0.3, 5.0]])
def test_at_the_mode_the_gradient_of_the_linearised_model_is_zero(precisions, scale):
    logits, jacobians, labels = random_model(scale)
    precisions = torch.tensor(precisions, dtype=torch.float64)
    offset = torch.randn(18, dtype=torch.float64)
    model = LinearisedModel(logits, jacobians, labels, [12, 6])
    mode = model.mode(offset, precisions)
    spread = torch.repeat_interleave(precisions.expand(2), torch.tensor([12, 6]))
    weights = mode.shift.clone().requires_grad_(True)
    moved = logits.double() + jacobians.double() @ weights
    torch.testing.assert_close(mode.logits, moved.detach())
    prior = ((weights + offset).square() * spread).sum() / 2
    loss = nn.functional.cross_entropy(moved, labels, reduction="sum") + prior
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-6 * scale


def test_an_adapter_that_is_the_mode_stays_where_it_is():
    logits, jacobians, labels = random_model()
    residual = nn.functional.one_hot(labels, 3) - logits.double().softmax(-1)
    offset = torch.einsum("ncp,nc->p", jacobians.double(), residual) / 0.7
    model = LinearisedModel(logits, jacobians, labels, [12, 6])
    shift = model.mode(offset, torch.tensor([0.7], dtype=torch.float64)).shift
    assert shift.abs().max() < 1e-6


# --- the method -----------------------------------------------------------------------------------

KINDS = ["causal", "classifier"]


@pytest.fixture(scope="module")
def adapters(tiny_llama, tiny_bert, data_dir, tmp_path_factory) -> dict[str, list[str]]:
    """Flags for Laplace on adapters that MAP has trained: nothing is said again."""
    kinds = {
        "causal": ["--dataset-type", "mcdataset", "--model", tiny_llama],
        "classifier": ["--dataset-type", "bertds", "--model", tiny_bert],
    }
    kinds["held_out"] = [*kinds["causal"], "--hold-out"]
    found = {}
    for kind, flags in kinds.items():
        out = ["--output-dir", str(tmp_path_factory.mktemp(kind)), "--device", "cpu", "--nowand"]
        first = ["--dataset", "bbc_headlines", "--data-dir", data_dir, "--limit-train", "24"]
        first += ["--batch-size", "8", "--lr", "1e-2", "--max-train-steps", "10", "--seed", "5"]
        first += ["--modelwrapper", "map", "--apply-classhead-lora", "--checkpoint"]
        first = [*flags, *out, *first, "--eval-per-steps", "0", "--limit-eval", "8"]
        main.main(first)
        folder = str(run_folder(first))
        found[kind] = ["--modelwrapper", "laplace", "--load-lora-path", folder, *out]
        found[kind] += ["--limit-eval", "8", "--bayes-eval-n-samples-final", "50"]
    return found


@pytest.fixture(scope="module")
def refitted(adapters) -> dict[str, list[str]]:
    """Flags of runs that have moved the last layer to its mode under the precision 0.5."""
    runs = {}
    for kind in KINDS:
        runs[kind] = [*adapters[kind], "--laplace-layers", "last_layer", "--laplace-refit"]
        runs[kind] += ["--laplace-prior-precision", "0.5", "--checkpoint", "--log-path", "refitted"]
        main.main(runs[kind])
    return runs


def copied(flags, tmp_path, at="--load-lora-path") -> tuple[list[str], Path]:
    """The same flags with a copy of the folder that is loaded, and the copy."""
    place = flags.index(at) + 1
    folder = Path(shutil.copytree(flags[place], tmp_path / "copy"))
    return [*flags[:place], str(folder), *flags[place + 1 :]], folder


def laplace_record(flags) -> dict:
    return json.loads((run_folder(flags) / "bayes_config.json").read_text())["laplace"]


@pytest.mark.parametrize("kind", KINDS)
def test_refit_moves_to_the_mode_of_the_prior_and_predicts_from_there(kind, refitted):
    """The last layer, which is LLLA, on both kinds of model; saved and loaded."""
    flags = refitted[kind]
    record = laplace_record(flags)
    assert (record["refit_rounds"], record["prior_precision_by"]) == (1, "number")
    posterior, dataset = load_posterior(run_folder(flags), device="cpu"), build(flags)[1]
    assert len(posterior.projections) == 2
    gradient = 0.5 * (posterior.posterior.mean + posterior.shift.double())
    for batch in dataset.train_eval_dataloader:
        start = 0
        for logits, jacobians, _ in posterior.row_jacobians(posterior.model_inputs(batch)):
            labels = batch["labels"][start : (start := start + len(logits))]
            at = posterior.mean_logits(logits, jacobians)
            residual = at.softmax(-1) - nn.functional.one_hot(labels, at.shape[1])
            gradient += torch.einsum("ncp,nc->p", jacobians, residual).double()
    assert posterior.shift.abs().max() > 1e-2
    assert gradient.abs().max() < 2e-3
    stored = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    predicted = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(predicted, stored, rtol=1e-3, atol=1e-3)
    mean = posterior.predict(dataset.test_dataloader, n_samples=0).log_probs[:, 0]
    batch = next(iter(dataset.test_dataloader))
    expected = posterior.linearised(posterior.model_inputs(batch))[0].log_softmax(-1)
    torch.testing.assert_close(mean[batch["index"]], expected, rtol=1e-4, atol=1e-5)


def test_refit_alternates_with_the_evidence_until_it_settles(adapters):
    flags = [*adapters["classifier"], "--laplace-refit", "--laplace-hessian", "diag"]
    _, _, wrapper = build(flags)
    wrapper.fit_posterior()
    kept = wrapper.posterior.prior_precision.item()
    rounds = wrapper.description["refit_rounds"]
    assert 1 < rounds < 10, "one round would be a mode under the first precision"
    maximise_evidence(wrapper.posterior, "scalar")
    assert wrapper.posterior.prior_precision.item() == pytest.approx(kept, rel=0.06)


def test_validation_of_refit_compares_the_modes_of_its_precisions(adapters):
    flags = [*adapters["held_out"], "--laplace-refit", "--laplace-layers", "last_layer"]
    flags += ["--laplace-grid", "0.1", "10", "--laplace-predictive", "probit"]
    _, dataset, wrapper = build(flags)
    wrapper.fit_posterior()
    assert wrapper.description["prior_precision_by"] == "validation"
    chosen = wrapper.posterior.prior_precision.item()
    model, _ = wrapper._linearised_model()
    nll = {}
    for value in grid(0.1, 10.0):
        wrapper.shift = model.mode(wrapper._weights(), value[None]).shift.float()
        wrapper.posterior.prior_precision = value.item()
        nll[value.item()] = wrapper.evaluate(dataset.held_out_dataloader).nll
    assert min(nll, key=nll.get) == chosen


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "unasked", "layers"])
def test_a_mode_that_does_not_fit_its_record_is_an_error(refitted, tmp_path, damage):
    folder = Path(shutil.copytree(run_folder(refitted["classifier"]), tmp_path / "posterior"))
    tensors = load_file(folder / "laplace.safetensors")
    config = json.loads((folder / "bayes_config.json").read_text())
    if damage == "missing":
        del tensors["shift"]
    elif damage == "shape":
        tensors["shift"] = tensors["shift"][:-1].contiguous()
    elif damage == "nan":
        tensors["shift"][0] = torch.nan
    elif damage == "unasked":
        config["laplace"]["refit_rounds"] = None
    else:
        config["laplace"]["prior_precision"] = [1.0, 2.0, 3.0]
    save_file(tensors, folder / "laplace.safetensors")
    (folder / "bayes_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="hold no Laplace posterior over this adapter"):
        load_posterior(folder, device="cpu")


def test_another_precision_for_a_refitted_mode_is_an_error(refitted):
    flags, folder = refitted["classifier"], run_folder(refitted["classifier"])
    out = flags[flags.index("--output-dir") :][:2]
    again = ["--modelwrapper", "laplace", "--load-lora-path", str(folder), "--nowand", *out]
    with pytest.raises(UsageError, match="its mode belongs to its own prior precision"):
        build([*again, "--log-path", "again", "--laplace-prior-precision", "3"])


def test_rows_beyond_the_bound_of_refit_are_an_error(adapters, monkeypatch):
    monkeypatch.setattr("modelwrappers.lora.laplace_fit.MOST_LOGITS", 100)
    _, _, wrapper = build([*adapters["classifier"], "--laplace-refit"])
    with pytest.raises(UsageError, match=r"24 rows x 5 classes .* --limit-train"):
        wrapper.fit_posterior()


def test_refit_in_several_processes_is_an_error(adapters, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(UsageError, match="this run has 2; fit the posterior in one process"):
        build([*adapters["classifier"], "--laplace-refit"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_of_a_loaded_adapter_is_made_again_from_its_runs_seed(kind, adapters):
    flags = [*adapters[kind], "--laplace-prior-mean", "init"]
    first = json.loads((Path(flags[3]) / "args.json").read_text())["run"]["command"][1:]
    untrained = build([*first, "--log-path", "untrained"])[2]
    start = {name: p.detach().clone() for name, p in untrained.named_parameters()}
    _, _, wrapper = build(flags)
    for name, _, _ in wrapper.projections:
        own = start[name.replace(".weight", ".default.weight")]
        assert torch.equal(wrapper.prior_start[name], own)
        assert own.any() == ("lora_A" in name), "B starts at 0"
    prior_mean = wrapper.prior_mean()
    assert (wrapper._weights() - prior_mean).norm() < 0.7 * prior_mean.norm()
    with pytest.raises(UsageError, match=r"--seed 6: --laplace-prior-mean init .* --seed 5"):
        main.parse_args([*flags, "--seed", "6"])


def test_the_start_of_an_adapter_that_is_trained_here_is_the_prior_mean(classifier_flags):
    flags = [*classifier_flags, "--modelwrapper", "laplace", "--max-train-steps", "2"]
    _, _, wrapper = build([*flags, "--laplace-prior-mean", "init", "--limit-eval", "8"])
    before = torch.cat([p.weight.flatten() for p in wrapper.projections]).double()
    wrapper.fit_evaluate()
    torch.testing.assert_close(wrapper.posterior.prior_mean, before)
    assert not torch.equal(wrapper.posterior.mean, before)
    assert wrapper.description["prior_mean"] == "init"
    distance = (wrapper.posterior.mean - before).square().sum()
    scatter = distance * wrapper.posterior.prior_precision.item()
    torch.testing.assert_close(wrapper.posterior.scatter, scatter)


def test_a_start_that_the_adapter_was_not_trained_from_is_an_error(adapters, tmp_path):
    flags, folder = copied([*adapters["classifier"], "--laplace-prior-mean", "init"], tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "query.lora_A" in key)
    torch.manual_seed(9)
    tensors[key] = torch.randn_like(tensors[key]) * tensors[key].std()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="nothing in common with the start"):
        build(flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_lora_path": "other"}, "began with another adapter .'other'."),
        ({"seed": "5"}, "seed is '5', no whole number"),
        ({"seed": 2**40}, "seed must be"),
        (None, "there is no args.json beside it"),
    ],
)
def test_a_start_that_nothing_tells_is_an_error(adapters, tmp_path, change, message):
    flags = [*adapters["classifier"], "--laplace-prior-mean", "init"]
    with pytest.raises(UsageError, match="has two starts"):
        main.parse_args([*flags, "--max-train-steps", "3"])
    flags, folder = copied(flags, tmp_path)
    record = json.loads((folder / "args.json").read_text())
    if change is None:
        (folder / "args.json").unlink()
        flags += [
            word for key in ("dataset", "model") for word in (f"--{key}", record["args"][key])
        ]
        flags += ["--dataset-type", "bertds"]
    else:
        record["args"] |= change
        (folder / "args.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=message):
        main.parse_args(flags)


def test_unrelated_matrices_are_no_start_of_each_other():
    torch.manual_seed(0)
    start = torch.randn(8, 64)
    check_start("A", start, start + 3 * torch.randn(8, 64))
    check_start("B", torch.zeros(8, 4), torch.randn(8, 4))
    with pytest.raises(UsageError, match="cosine"):
        check_start("A", start, torch.randn(8, 64))


@pytest.mark.parametrize(("hessian", "curvature"), [("kron", "published"), ("diag", None)])
def test_the_record_names_curvature_and_prior(adapters, hessian, curvature):
    flags = [*adapters["classifier"], "--laplace-prior-structure", "layerwise", "--checkpoint"]
    flags += ["--laplace-hessian", hessian, "--log-path", hessian]
    flags += ["--laplace-curvature", curvature] if curvature else []
    main.main(flags)
    record = laplace_record(flags)
    assert record["curvature"] == curvature
    assert record["prior_precision_by"] == "evidence" and record["prior_mean"] == "zero"
    posterior = load_posterior(run_folder(flags), device="cpu")
    assert posterior.posterior.prior_precision.tolist() == record["prior_precision"]
    assert len(record["prior_precision"]) == len(posterior.projections) > 2
    stored = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    predicted = posterior.predict(build(flags)[1].test_dataloader).log_probs
    torch.testing.assert_close(predicted, stored, rtol=1e-3, atol=1e-3)


def test_records_of_before_there_was_a_choice_are_read_as_they_were_meant():
    old = {"laplace": {"hessian": "kron", "prior_precision": 2.0}, "projections": ["a", "b"]}
    fit = Description.model_validate(old).laplace
    assert (fit.curvature, fit.prior_mean, fit.refit_rounds) == (None, "zero", None)
    assert fit.precisions.tolist() == [2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"hessian": "diag", "curvature": "expand"},
        {"prior_precision": [1.0]},
        {"prior_precision": []},
        {"prior_precision": [1.0, -2.0]},
        {"hessian": "full", "prior_precision": [1.0, 2.0]},
        {"refit_rounds": 0},
        {"curvature": "other"},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change):
    good = {"hessian": "kron", "curvature": "reduce", "prior_precision": [1.0, 2.0]}
    Description.model_validate({"laplace": good, "projections": ["a", "b"]})
    changed = {"laplace": good | {"curvature": None} | change, "projections": ["a", "b"]}
    with pytest.raises(ValueError, match=r"prior_precision|curvature|refit_rounds"):
        Description.model_validate(changed)


@pytest.fixture
def said():
    """A function that gives, and forgets, what was logged since it was called last."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)

    def read() -> str:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text

    yield read
    logger.removeHandler(handler)


# --- flags ----------------------------------------------------------------------------------------


def laplace_args(flags, *more):
    flags = [*flags, "--modelwrapper", "laplace", "--max-train-steps", "4"]
    return main.parse_args([*flags, *more])


def test_the_default_precision_is_that_of_held_out_rows_where_there_are_some(
    causal_flags, adapters
):
    def chosen(*more):
        return laplace_args(causal_flags, *more).laplace_prior_precision

    assert chosen() == "evidence"
    assert chosen("--hold-out") == "validation"
    assert chosen("--temperature-scaling") == "validation"
    assert chosen("--calibrate", "auto") == "evidence", "its rows are for sets and risks"
    assert chosen("--hold-out", "--testing-set", "train_val") == "evidence", "they are evaluated"
    assert chosen("--hold-out", "--laplace-prior-precision", "evidence") == "evidence"
    assert main.parse_args(adapters["causal"]).laplace_prior_precision == "evidence"
    args = main.parse_args(adapters["held_out"])
    assert (args.laplace_prior_precision, args.hold_out) == ("validation", True)
    args = main.parse_args([*adapters["held_out"], "--seed-split", "3"])
    assert args.laplace_prior_precision == "evidence", "other rows than those held out there"


def test_a_posterior_that_is_loaded_chooses_nothing(refitted):
    """So its calibration stays: nothing is tuned on the rows that it has held out."""
    flags = refitted["causal"]
    out = flags[flags.index("--output-dir") :][:2]
    again = ["--modelwrapper", "laplace", "--load-lora-path", str(run_folder(flags)), "--nowand"]
    args = main.parse_args([*again, *out, "--hold-out", "false"])
    assert args.laplace_prior_precision == "evidence"


def test_the_curvature_is_the_published_one_in_the_original_protocol(causal_flags):
    args = laplace_args(causal_flags)
    assert (args.laplace_curvature, args.laplace_rank) == ("reduce", 64)
    args = laplace_args(causal_flags, "--protocol", "original")
    assert (args.laplace_curvature, args.laplace_rank) == ("published", 0)
    args = laplace_args(causal_flags, "--protocol", "original", "--laplace-hessian", "diag")
    assert args.laplace_curvature is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--laplace-hessian diag --laplace-curvature expand",
            "--laplace-curvature expand .* --laplace-hessian diag",
        ),
        ("--laplace-curvature published --laplace-rank 8", "--laplace-rank 8 .* published"),
        (
            "--laplace-prior-structure layerwise --laplace-hessian full",
            "layerwise .* --laplace-hessian full",
        ),
        (
            "--laplace-prior-structure layerwise --laplace-prior-precision validation",
            "--laplace-prior-precision validation .* fit these rows' noise",
        ),
        (
            "--laplace-prior-structure layerwise --laplace-prior-precision 3",
            "one number for all weights",
        ),
        ("--laplace-grid 1 10", "--laplace-grid .* that is evidence here"),
        ("--hold-out --laplace-grid 10 1", "--laplace-grid 10 1"),
        ("--hold-out --laplace-grid 0 1", "--laplace-grid"),
    ],
)
def test_flags_that_contradict_each_other_are_an_error(causal_flags, more, message):
    with pytest.raises(UsageError, match=message):
        laplace_args(causal_flags, *more.split())


def test_a_grid_comes_back_from_a_stored_run(causal_flags, tmp_path):
    given = {"hold_out": True, "laplace_grid": [0.5, 8.0]}
    config = tmp_path / "args.json"
    config.write_text(json.dumps({"given": given}))
    assert laplace_args(causal_flags, "--config", str(config)).laplace_grid == [0.5, 8.0]
    config.write_text(json.dumps({"given": given | {"laplace_grid": [0.5]}}))
    with pytest.raises(UsageError, match="--laplace-grid takes 2 values"):
        laplace_args(causal_flags, "--config", str(config))


def test_the_grid_has_its_ends_and_four_values_a_decade():
    values = grid(1e-2, 1e6)
    assert len(values) == 33 and (values[0].item(), values[-1].item()) == (1e-2, 1e6)
    assert (values[4] / values[0]).item() == pytest.approx(10)
    assert grid(1.0, 1.1).tolist() == [1.0, 1.1]


def test_a_choice_at_the_end_of_the_grid_names_the_flag(said):
    tell_end_of_grid(7.0, 0.3, 40.0)
    assert not said()
    tell_end_of_grid(2.0, 0.5, 2.0)
    out = said()
    assert "upper end" in out and "--laplace-grid 0.5 200" in out
    tell_end_of_grid(0.3, 0.3, 9.0)
    out = said()
    assert "lower end" in out and "--laplace-grid 0.003 9" in out


def test_evidence_that_fits_the_training_rows_worse_is_told(said):
    warn_if_worse(0.55, 0.5, "4")
    assert not said()
    warn_if_worse(0.65, 0.5, "4")
    out = said()
    assert "0.150 more than the point estimate's" in out
    assert "--hold-out" in out and "--laplace-refit" in out
    warn_if_worse(0.65, 0.5, "4", is_refitted=True)
    assert "--laplace-refit" not in said()


def test_the_evidences_posterior_is_held_against_the_training_rows(adapters, said):
    """At a precision of 1e-9 the posterior says nothing about what it was fitted on."""
    _, _, wrapper = build([*adapters["classifier"], "--laplace-layers", "last_layer"])
    wrapper.fit_posterior()
    wrapper.posterior.prior_precision = 1e9
    said()
    wrapper._compare_with_map()
    assert "too wide" not in said()
    wrapper.posterior.prior_precision = 1e-9
    wrapper._compare_with_map()
    assert "too wide" in said()
