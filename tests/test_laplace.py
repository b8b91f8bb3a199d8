"""Laplace: curvature, posterior and evidence against closed forms, then the whole method."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file, save_file
from torch import nn

import main
from modelwrappers import load_posterior
from modelwrappers.lora.curvature import (
    DiagonalCurvature,
    FullCurvature,
    GramSum,
    KronCurvature,
    Projection,
    Tape,
    build_curvature,
    softmax_hessian_root,
)
from modelwrappers.lora.laplace_fit import posterior_class
from modelwrappers.lora.linearised import draw, probit
from utils.errors import UsageError

KINDS = ["causal_flags", "classifier_flags"]


def posterior_of(structure, projections, curvature, precision):
    weights = nn.ParameterList([p.weight.double() for p in projections])
    posterior = posterior_class(structure)(weights, "classification", prior_precision=precision)
    posterior.mean = nn.utils.parameters_to_vector(weights).detach()
    posterior.take(curvature.blocks())
    return posterior


# --- a linear model with Gaussian noise, whose posterior is known --------------------------------

STRUCTURES = ("kron", "full")


@pytest.fixture
def regression():
    """(layer at its MAP, x, y, prior precision): y = W x + N(0, 1), W ~ N(0, 1 / precision)."""
    torch.manual_seed(0)
    x, precision = torch.randn(30, 4), 0.7
    y = x @ torch.randn(4, 3) + torch.randn(30, 3)
    layer = nn.Linear(4, 3, bias=False)
    gram = x.T @ x + precision * torch.eye(4)
    layer.weight.data = torch.linalg.solve(gram, x.T @ y).T
    return layer, x, y, precision


def gaussian_curvature(structure, layer, x, batch_size=7):
    """The Hessian of a unit-variance Gaussian likelihood is J^T J: the root is the identity."""
    projections = [Projection("layer", layer)]
    curvature = build_curvature(structure, projections, 0, None)
    for rows in x.split(batch_size):
        with Tape(projections) as tape:
            out = layer(rows)
        curvature.add(tape, out, torch.eye(3).expand(len(rows), -1, -1))
    return projections, curvature


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_predictive_of_a_linear_gaussian_model_is_exact(regression, structure):
    layer, x, _, precision = regression
    posterior = posterior_of(
        structure, *gaussian_curvature(structure, layer, x), precision=precision
    )
    new = torch.randn(5, 4)
    projections = [Projection("layer", layer)]
    with Tape(projections) as tape:
        out = layer(new)
    covariance = posterior.functional_variance(tape.jacobians(out))
    gram = (x.T @ x + precision * torch.eye(4)).double()
    variance = (new.double() @ torch.linalg.inv(gram) * new.double()).sum(-1)
    expected = variance[:, None, None] * torch.eye(3)
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_of_a_linear_gaussian_model_is_exact(regression, structure):
    """log N(y; 0, x x^T / precision + 1), column by column."""
    layer, x, y, precision = regression
    posterior = posterior_of(
        structure, *gaussian_curvature(structure, layer, x), precision=precision
    )
    residual = (y - layer(x)).double().square().sum()
    posterior.loss = 0.5 * residual.detach() + y.numel() / 2 * math.log(2 * math.pi)
    covariance = (x @ x.T / precision + torch.eye(30)).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance)
    expected = exact.log_prob(y.T.double()).sum().item()
    assert posterior.log_marginal_likelihood().item() == pytest.approx(expected, rel=1e-6)


def test_kron_is_the_full_curvature_of_one_layer_whose_logits_have_one_hessian():
    """At weight 0 every row's softmax is uniform, and the average of products is the product."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(11, 4)
    layer.weight.data.zero_()
    projections = [Projection("layer", layer)]
    posteriors, new = [], torch.randn(2, 4)
    for structure in STRUCTURES:
        curvature = build_curvature(structure, projections, 0, None)
        for rows in x.split(4):
            with Tape(projections) as tape:
                logits = layer(rows)
            curvature.add(tape, logits, softmax_hessian_root(logits))
        posteriors.append(posterior_of(structure, projections, curvature, 0.3))
    with Tape(projections) as tape:
        jacobians = tape.jacobians(layer(new))
    kron, full = (p.functional_variance(jacobians) for p in posteriors)
    torch.testing.assert_close(kron, full, rtol=1e-4, atol=1e-6)
    logdets = [p.log_det_posterior_precision.item() for p in posteriors]
    assert logdets[0] == pytest.approx(logdets[1], rel=1e-5)


def test_the_root_of_the_softmax_hessian():
    logits = torch.randn(6, 5)
    probs = logits.softmax(-1)
    root = softmax_hessian_root(logits)
    expected = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-5, atol=1e-7)


# --- low rank -------------------------------------------------------------------------------------


def test_a_sketch_of_a_matrix_of_low_rank_is_exact():
    torch.manual_seed(0)
    rows = torch.randn(500, 6) @ torch.randn(6, 80)
    gram = GramSum(80, rank=8, device=torch.device("cpu"))
    for part in rows.split(64):
        gram.add(part)
    vectors, values = gram.eigen()
    assert gram.total.shape == (80, 16) and vectors.shape[1] <= 8
    exact = rows.T @ rows
    error = (vectors * values.float()) @ vectors.T - exact
    assert error.norm() < 1e-4 * exact.norm()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), atol=1e-5, rtol=0)


def test_a_sketch_never_claims_more_than_the_data_say():
    """Nystrom approximates from below, so what is left out has the prior's variance."""
    torch.manual_seed(0)
    rows = torch.randn(400, 60) * torch.logspace(0, -3, 60)
    gram = GramSum(60, rank=10, device=torch.device("cpu"))
    gram.add(rows)
    vectors, values = gram.eigen()
    exact = rows.double().T @ rows.double()
    rest = exact - (vectors.double() * values) @ vectors.double().T
    assert torch.linalg.eigvalsh(rest).min() > -1e-4 * exact.norm()
    best = torch.linalg.eigvalsh(exact)[:-10].norm()  # of all matrices of rank 10
    assert rest.norm() < 1.3 * best


def test_low_rank_factors_act_as_the_dense_matrix_that_they_stand_for():
    torch.manual_seed(0)
    q1, q2 = torch.linalg.qr(torch.randn(4, 4)).Q, torch.linalg.qr(torch.randn(9, 9)).Q[:, :3]
    l1, l2 = torch.rand(4).double(), torch.rand(3).double()
    weights = nn.ParameterList([torch.randn(4, 9).double()])
    posterior = posterior_class("kron")(weights, "classification", prior_precision=0.2)
    posterior.take([[(q1, l1), (q2, l2)]])
    factors = [(q * value.float()) @ q.T for q, value in ((q1, l1), (q2, l2))]
    precision = torch.kron(*factors).double() + 0.2 * torch.eye(36)
    assert posterior.log_det_posterior_precision.item() == pytest.approx(
        precision.logdet().item(), rel=1e-5
    )
    jacobians = torch.randn(3, 2, 36)
    expected = jacobians.double() @ torch.linalg.inv(precision) @ jacobians.double().mT
    torch.testing.assert_close(
        posterior.functional_variance(jacobians).double(), expected, rtol=1e-4, atol=1e-5
    )


# --- a real adapter, against other implementations ------------------------------------------------


def fitted(flags, *more):
    """A wrapper that has trained eight updates and its posterior."""
    _, dataset, wrapper = build(
        [*flags, "--modelwrapper", "laplace", "--max-train-steps", "8", *more]
    )
    wrapper.fit_evaluate()
    return dataset, wrapper.eval()


class Logits(nn.Module):
    """The wrapper as a function of a batch's inputs, for other libraries."""

    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper

    def forward(self, inputs):
        return self.wrapper.batch_logits(inputs)


def recorded(wrapper, batch):
    with Tape(wrapper.projections) as tape:
        logits = wrapper.batch_logits(wrapper.model_inputs(batch))
    return tape, logits


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_equal_functorchs(kind, request):
    flags = [*request.getfixturevalue(kind), "--apply-classhead-lora"]
    dataset, wrapper = fitted(flags)
    batch = {k: v[:3] for k, v in next(iter(dataset.test_dataloader)).items()}
    inputs = wrapper.model_inputs(batch)
    weights = {
        f"wrapper.{name}": p
        for name, p in wrapper.named_parameters()
        if any(p is projection.module.weight for projection in wrapper.projections)
    }
    reference = torch.func.jacrev(
        lambda given: torch.func.functional_call(Logits(wrapper), given, (inputs,))
    )(weights)
    tape, logits = recorded(wrapper, batch)
    ours = tape.jacobians(logits).split([p.weight.numel() for p in wrapper.projections], dim=-1)
    for projection, block in zip(wrapper.projections, ours, strict=True):
        (name,) = [n for n, p in weights.items() if p is projection.module.weight]
        expected = reference[name]
        if projection.rows is not None:
            expected = expected[:, :, projection.rows]
        torch.testing.assert_close(block, expected.flatten(2), rtol=1e-3, atol=1e-5)


def same_length(rows: int, length: int = 6) -> dict[str, torch.Tensor]:
    """Token ids without padding, which KFAC libraries would count."""
    torch.manual_seed(3)
    return {
        "input_ids": torch.randint(4, 12, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(5, (rows,)),
    }


def test_kronecker_factors_equal_curvlinops(classifier_flags):
    """One full batch without padding: GGN, KFAC-reduce."""
    from curvlinops import FisherType, KFACLinearOperator, KFACType

    _, wrapper = fitted(classifier_flags, "--laplace-rank", "0")
    batch = same_length(7)
    for parameter in wrapper.parameters():
        parameter.requires_grad_(False)
    for projection in wrapper.projections:
        projection.module.weight.requires_grad_(True)
    model = Logits(wrapper)
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        [p for p in model.parameters() if p.requires_grad],
        [(wrapper.model_inputs(batch), batch["labels"])],
        fisher_type=FisherType.TYPE2,
        kfac_approx=KFACType.REDUCE,
        check_deterministic=False,
        batch_size_fn=lambda inputs: inputs["input_ids"].shape[0],
    )
    operator.compute_kronecker_factors()
    tape, logits = recorded(wrapper, batch)
    curvature = KronCurvature(wrapper.projections, 0)
    curvature.add(tape, logits, softmax_hessian_root(logits))
    modules = {id(module): name for name, module in model.named_modules()}
    for i, projection in enumerate(wrapper.projections):
        name = modules[id(projection.module)]
        if "layer.1.attention.self.query" in name:
            continue  # the last layer's query matters at [CLS] only: we leave out the rest
        ours = torch.kron(
            curvature.gradients[i].total, curvature.inputs[i].total / curvature.num_examples[i]
        )
        theirs = torch.kron(operator._gradient_covariances[name], operator._input_covariances[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 + 1e-4 * theirs.max().item())


def test_the_full_curvature_equals_curvlinops_and_has_the_diagonal(classifier_flags):
    from curvlinops import GGNLinearOperator

    flags = [*classifier_flags, "--apply-classhead-lora", "--lora-r", "2"]
    _, wrapper = fitted(flags, "--laplace-layers", "last_layer", "--laplace-hessian", "full")
    batch = same_length(7)
    weights = [projection.module.weight for projection in wrapper.projections]
    for parameter in wrapper.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    operator = GGNLinearOperator(
        Logits(wrapper),
        nn.CrossEntropyLoss(reduction="sum"),
        weights,
        [(wrapper.model_inputs(batch), batch["labels"])],
        check_deterministic=False,
        batch_size_fn=lambda inputs: inputs["input_ids"].shape[0],
    )
    expected = operator @ torch.eye(operator.shape[0])
    full = FullCurvature(wrapper.projections)
    diagonal = DiagonalCurvature(wrapper.projections)
    for curvature in (full, diagonal):
        tape, logits = recorded(wrapper, batch)
        curvature.add(tape, logits, softmax_hessian_root(logits))
    torch.testing.assert_close(full.gram.total, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(diagonal.total, expected.diag(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_curvature_does_not_depend_on_batches_and_padding(kind, structure, request):
    flags = [*request.getfixturevalue(kind), "--apply-classhead-lora"]
    flags += ["--laplace-hessian", structure, "--lora-dropout", "0.1"]
    dataset, wrapper = fitted(flags)
    totals = []
    for batch_size in (1, 5, 16):
        dataset.args.__dict__["eval_batch_size"] = batch_size
        loader = dataset.eval_loader(dataset.train_rows)
        curvature, loss, number = wrapper._sum_curvature(loader)
        assert number == 40
        totals.append([loss, *curvature.tensors()])
    for other in totals[1:]:
        for a, b in zip(totals[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


# --- the predictive -------------------------------------------------------------------------------


def test_draws_of_the_logits_have_the_mean_and_the_covariance():
    torch.manual_seed(0)
    root = torch.randn(2, 3, 3).double()
    root[1, :, 2] = 0.0  # singular
    mean, covariance = torch.randn(2, 3), root @ root.mT
    drawn = draw(mean, covariance, torch.randn(2, 200_000, 3).double()).double()
    torch.testing.assert_close(drawn.mean(1), mean.double(), atol=0.02, rtol=0)
    centred = drawn - drawn.mean(1, keepdim=True)
    torch.testing.assert_close(centred.mT @ centred / 200_000, covariance, atol=0.1, rtol=0.02)


def test_probit_is_near_the_exact_mean_of_two_classes():
    """For two classes the mean of softmax(f) is a one-dimensional integral."""
    mean, variance = torch.tensor([[1.2, 0.0]]), 2.0
    covariance = torch.zeros(1, 2, 2)
    covariance[0, 0, 0] = variance
    grid = torch.linspace(-12, 12, 20001).double()
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    exact = (density * torch.sigmoid(1.2 + math.sqrt(variance) * grid)).sum() * (24 / 20000)
    exact = exact.item()
    assert probit(mean, covariance).softmax(-1)[0, 0].item() == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_linearised_predictive_is_j_sigma_j(kind, request):
    """All by hand: Jacobians by autograd, the dense inverse of the full Gauss-Newton matrix."""
    flags = [*request.getfixturevalue(kind), "--lora-r", "1", "--laplace-hessian", "full"]
    dataset, wrapper = fitted(flags, "--laplace-prior-precision", "3.0")
    weights = [projection.module.weight for projection in wrapper.projections]

    def jacobians_of(batch):
        logits = wrapper.batch_logits(wrapper.model_inputs(batch))
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, weights, retain_graph=True)])
            for f in logits.flatten()
        ]
        return logits.detach(), torch.stack(rows).unflatten(0, logits.shape).double()

    precision = 3.0 * torch.eye(sum(w.numel() for w in weights)).double()
    for batch in dataset.train_eval_dataloader:
        logits, jacobians = jacobians_of(batch)
        probs = logits.double().softmax(-1)
        hessian = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        precision += torch.einsum("ncp,ncd,ndq->pq", jacobians, hessian, jacobians)
    batch = next(iter(dataset.test_dataloader))
    logits, jacobians = jacobians_of(batch)
    mean, covariance = wrapper.linearised(wrapper.model_inputs(batch))
    torch.testing.assert_close(mean, logits)
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    torch.testing.assert_close(covariance, expected, rtol=1e-2, atol=1e-5)


# --- the method -----------------------------------------------------------------------------------


def trained(flags, *more) -> list[str]:
    """Flags for Laplace on an adapter that MAP has trained: nothing is said again."""
    first = [*flags, "--modelwrapper", "map", "--max-train-steps", "20", "--checkpoint", *more]
    main.main(first)
    out = flags[flags.index("--output-dir") :][:2]
    folder = str(run_folder(first))
    return ["--modelwrapper", "laplace", "--load-lora-path", folder, "--nowand", *out]


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_becomes_a_posterior_without_flags_said_again(kind, quantization, request):
    """On every base; saved and loaded, its predictions are the same."""
    flags = trained(
        request.getfixturevalue(kind), "--quantization", quantization, "--apply-classhead-lora"
    )
    flags = [*flags, "--checkpoint", "--laplace-rank", "8"]
    main.main(flags)
    folder = run_folder(flags)
    config = json.loads((folder / "bayes_config.json").read_text())["laplace"]
    assert config["prior_precision"] > 0 and config["n_examples"] == 40
    assert config["peak_memory_bytes"] > 0 and config["factor_bytes"] > 0
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    assert stored.shape == (37, 500, 5) and stored.std(1).max() > 1e-3
    tolerance = {"rtol": 1e-3, "atol": 1e-3 if quantization == "none" else 2e-2}
    again = ["--modelwrapper", "laplace", "--load-lora-path", str(folder), "--log-path", "again"]
    _, dataset, again = build([*again, "--nowand", "--laplace-hessian", "diag"])
    again.fit_posterior()  # keeps the stored posterior
    assert again.hessian == "kron"
    predicted = again.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(predicted, stored, **tolerance)
    posterior = load_posterior(folder, device="cpu")
    predicted = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(predicted, stored, **tolerance)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_every_structure_of_the_last_layer_is_saved_and_loaded(causal_flags, structure):
    flags = trained(causal_flags, "--apply-classhead-lora")
    flags += ["--laplace-layers", "last_layer", "--laplace-hessian", structure, "--checkpoint"]
    main.main(flags)
    folder = run_folder(flags)
    names = json.loads((folder / "bayes_config.json").read_text())["projections"]
    assert len(names) == 2 and all("lm_head" in name for name in names)
    posterior = load_posterior(folder, device="cpu")
    dataset = build(flags)[1]
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    predicted = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(predicted, stored, rtol=1e-3, atol=1e-4)
    assert posterior.projections[1].rows.tolist() == dataset.target_ids.tolist()


def test_training_in_the_same_command_is_map_and_then_laplace(causal_flags):
    both = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "20", "--checkpoint"]
    main.main(both)
    first = trained(causal_flags)
    plain = load_file(run_folder(both) / "adapter_model.safetensors")
    reference = load_file(f"{first[3]}/adapter_model.safetensors")
    assert all(torch.equal(plain[key], reference[key]) for key in reference)
    main.main([*first, "--log-path", "chain"])
    a = load_file(run_folder(both) / "predictions.safetensors")["log_probs"]
    b = load_file(run_folder([*first, "--log-path", "chain"]) / "predictions.safetensors")
    torch.testing.assert_close(a, b["log_probs"], rtol=1e-3, atol=1e-4)


def test_the_prior_precision_of_validation_has_the_lowest_nll_of_held_out_rows(causal_flags):
    flags = trained(causal_flags, "--hold-out")
    flags += ["--laplace-prior-precision", "validation", "--laplace-predictive", "probit"]
    _, dataset, wrapper = build(flags)
    assert (len(dataset.train_rows), len(dataset.held_out_rows)) == (32, 8)
    wrapper.fit_posterior()
    assert wrapper.description["n_examples"] == 32

    def held_out_nll(precision):
        wrapper.posterior.prior_precision = precision
        return wrapper.evaluate(dataset.held_out_dataloader).nll

    chosen = wrapper.posterior.prior_precision.item()
    best = held_out_nll(chosen)
    assert all(best <= held_out_nll(value) + 1e-6 for value in (1e-2, 1.0, 30.0, 1e3, 1e6))


def test_the_prior_precision_of_evidence_is_a_maximum(causal_flags):
    _, _, wrapper = build(trained(causal_flags))
    wrapper.fit_posterior()
    chosen = wrapper.posterior.prior_precision.item()
    evidence = {
        factor: wrapper.posterior.log_marginal_likelihood(torch.tensor(chosen * factor)).item()
        for factor in (0.5, 1.0, 2.0)
    }
    assert evidence[1.0] > max(evidence[0.5], evidence[2.0])


def test_answers_that_were_not_trained_have_the_priors_variance(causal_flags):
    """Other answer tokens of the head: their rows of B are independent of the data."""
    flags = [*trained(causal_flags, "--apply-classhead-lora"), "--laplace-layers", "last_layer"]
    _, dataset, wrapper = build([*flags, "--laplace-prior-precision", "2.0"])
    wrapper.fit_posterior()
    inputs = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    known = wrapper.linearised(inputs)[1]
    tokens = wrapper.target_ids
    wrapper.target_ids = torch.cat([tokens[:2], torch.tensor([1, 2])])
    covariance = wrapper.linearised(inputs)[1]
    torch.testing.assert_close(covariance[:, :2, :2], known[:, :2, :2], rtol=1e-4, atol=1e-7)
    assert (wrapper.get_submodule(wrapper._head).lora_B["default"].weight[1:3] == 0).all()
    head = wrapper.get_submodule(wrapper._head)
    hidden = []
    hook = head.lora_B["default"].register_forward_pre_hook(lambda m, x: hidden.append(x[0]))
    with torch.no_grad():
        wrapper.batch_logits(inputs)
    hook.remove()
    own = (head.scaling["default"] * hidden[0][:, -1].double()).square().sum(-1) / 2.0
    for new in (2, 3):  # these rows of B are 0, so A adds nothing
        torch.testing.assert_close(covariance[:, new, new], own, rtol=1e-4, atol=1e-6)
    assert covariance[:, 2, 3].abs().max() < 1e-6


OTHER_ANSWERS = """
import dataclasses
from dataset.tasks import MULTIPLE_CHOICE_TASKS

choices = ("True", "False", "A", "B", "C")
OTHER = dataclasses.replace(MULTIPLE_CHOICE_TASKS["bbc_bodies"], name="other", choices=choices)
"""


def test_shifted_data_with_other_answers_are_evaluated(causal_flags, data_dir, tmp_path):
    (tmp_path / "task.py").write_text(OTHER_ANSWERS)
    for name in ("bbc_headlines", "other"):
        shutil.copytree(data_dir, tmp_path / "data" / name)
    flags = [*trained(causal_flags, "--apply-classhead-lora"), "--laplace-layers", "last_layer"]
    flags += ["--ood-datasets", f"{tmp_path}/task.py:OTHER", "--data-dir", str(tmp_path / "data")]
    flags += ["--dataset", "bbc_headlines"]
    main.main(flags)
    stored = load_file(run_folder(flags) / "predictions-other.safetensors")["log_probs"]
    assert stored.shape == (37, 500, 5) and stored.std(1).min() > 0


def test_the_mean_is_the_adapters_own_prediction(causal_flags):
    flags = trained(causal_flags)
    stored = load_file(f"{flags[3]}/predictions.safetensors")["log_probs"]
    main.main([*flags, "--bayes-inference-notsample"])
    mean = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    torch.testing.assert_close(mean, stored, rtol=1e-4, atol=1e-5)


# --- wrong calls ----------------------------------------------------------------------------------


def test_laplace_without_an_adapter_is_an_error(causal_flags):
    with pytest.raises(UsageError, match="around a trained adapter, but there is none"):
        main.parse_args([*causal_flags, "--modelwrapper", "laplace"])


def test_a_last_layer_without_lora_on_the_head_is_an_error(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "4"]
    with pytest.raises(UsageError, match="--apply-classhead-lora"):
        build([*flags, "--laplace-layers", "last_layer"])


def test_a_full_matrix_that_is_too_large_is_an_error(causal_flags, monkeypatch):
    monkeypatch.setattr("modelwrappers.laplace.MOST_PARAMETERS_OF_FULL", 100)
    with pytest.raises(UsageError, match="--laplace-hessian kron"):
        build([*trained(causal_flags), "--laplace-hessian", "full"])


def test_validation_on_rows_that_were_trained_on_is_an_error(causal_flags):
    flags = [*trained(causal_flags), "--laplace-prior-precision", "validation"]
    with pytest.raises(UsageError, match="train it with --hold-out"):
        main.parse_args(flags)
    with pytest.raises(UsageError, match="train it with --hold-out"):
        main.parse_args([*flags, "--hold-out"])


def test_validation_on_another_split_than_the_adapters_is_an_error(causal_flags):
    flags = [*trained(causal_flags, "--hold-out"), "--laplace-prior-precision", "validation"]
    with pytest.raises(UsageError, match="--seed-split: other rows"):
        main.parse_args([*flags, "--seed-split", "3"])


def test_fitting_on_shifted_data_is_an_error(causal_flags):
    _, _, wrapper = build([*trained(causal_flags), "--dataset", "bbc_bodies"])
    with pytest.raises(UsageError, match="--ood-datasets bbc_bodies"):
        wrapper.fit_posterior()


def test_an_ensemble_is_not_taken_for_an_adapter(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "deepensemble", "--ensemble-n", "2", "--checkpoint"]
    main.main([*flags, "--max-train-steps", "2"])
    again = ["--modelwrapper", "laplace", "--load-lora-path", str(run_folder(flags)), "--nowand"]
    with pytest.raises(UsageError, match=r"ensemble of 2 members; .* takes one of them"):
        build([*again, *causal_flags[causal_flags.index("--output-dir") :][:2]])


@pytest.fixture(scope="module")
def stored_posterior(tiny_llama, data_dir, tmp_path_factory) -> Path:
    """The folder of a run that has fitted a posterior."""
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", tiny_llama]
    flags += ["--data-dir", data_dir, "--output-dir", str(tmp_path_factory.mktemp("out"))]
    flags = trained([*flags, "--batch-size", "8", "--lr", "1e-2", "--nowand", "--device", "cpu"])
    main.main([*flags, "--laplace-rank", "8"])
    return run_folder(flags)


@pytest.mark.parametrize(
    "damage",
    [
        *("shape", "missing", "unknown", "nan", "negative", "skewed", "type"),
        *("precision", "structure", "projection", "twice"),
    ],
)
def test_factors_that_do_not_fit_are_an_error(stored_posterior, tmp_path, damage):
    folder = Path(shutil.copytree(stored_posterior, tmp_path / "posterior"))
    file, description = folder / "laplace.safetensors", folder / "bayes_config.json"
    tensors, config = load_file(file), json.loads(description.read_text())
    if damage == "shape":
        tensors["0.1.vectors"] = tensors["0.1.vectors"][:-1].contiguous()
    elif damage == "missing":
        del tensors["0.1.values"]
    elif damage == "unknown":
        tensors["what"] = torch.ones(1)
    elif damage == "nan":
        tensors["0.1.values"][0] = math.nan
    elif damage == "negative":
        tensors["0.1.values"][0] = -1.0
    elif damage == "skewed":
        tensors["0.1.vectors"][0] += 1.0
    elif damage == "type":
        tensors["0.1.values"] = tensors["0.1.values"].long()
    elif damage == "projection":
        config["projections"][0] = "lm_head"
    elif damage == "twice":
        config["projections"][0] = config["projections"][1]
    elif damage == "precision":
        config["laplace"]["prior_precision"] = -1
    else:
        del config["laplace"]["hessian"]
    save_file(tensors, file)
    description.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="hold no Laplace posterior over this adapter"):
        load_posterior(folder, device="cpu")


def test_a_loaded_posterior_is_saved_as_it_is_and_takes_another_prior(causal_flags):
    flags = [*trained(causal_flags), "--checkpoint", "--laplace-hessian", "diag"]
    main.main(flags)
    out = flags[flags.index("--output-dir") :][:2]
    again = ["--modelwrapper", "laplace", "--load-lora-path", str(run_folder(flags)), "--nowand"]
    again += [*out, "--log-path", "again", "--checkpoint", "--laplace-prior-precision", "123"]
    main.main(again)
    posterior = load_posterior(run_folder(again), device="cpu")
    assert posterior.hessian == "diag"
    assert posterior.posterior.prior_precision.item() == 123
    records = [
        json.loads((run_folder(made) / "bayes_config.json").read_text())["laplace"]
        for made in (flags, again)
    ]
    assert [record["prior_precision_by"] for record in records] == ["evidence", "number"]
    assert isinstance(records[0]["log_marginal_likelihood"], float)
    assert records[1]["log_marginal_likelihood"] is None, "it was that of the other precision"


def test_an_adapter_that_has_diverged_is_an_error(causal_flags):
    flags = trained(causal_flags)
    file = f"{flags[3]}/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, file)
    with pytest.raises(UsageError, match="not numbers"):
        build(flags)


def test_a_prior_precision_that_is_no_number_is_an_error(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "4"]
    with pytest.raises(UsageError, match="prior-precision"):
        main.parse_args([*flags, "--laplace-prior-precision", "small"])


def test_an_fsdp_launch_is_an_error(causal_flags, monkeypatch):
    monkeypatch.setattr("modelwrappers.laplace.shards_base", lambda accelerator: True)
    with pytest.raises(UsageError, match="without FSDP"):
        build([*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "4"])


def test_lora_on_an_embedding_is_an_error(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "4"]
    with pytest.raises(UsageError, match="embed_tokens"):
        build([*flags, "--target-modules", "q_proj", "embed_tokens"])
