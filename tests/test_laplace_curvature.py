"""Laplace's Kronecker factors by a plain loop over tokens, and the exact matrix in its dual."""

import pytest
import torch
from torch import nn

from modelwrappers.lora.curvature import (
    KronCurvature,
    Projection,
    Tape,
    build_curvature,
    softmax_hessian_root,
)
from modelwrappers.lora.laplace_fit import posterior_class


class Pooled(nn.Module):
    """Two matrices on tokens, a mean over those that are no padding, and a softmax."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3, bias=False)
        self.b = nn.Linear(3, 4, bias=False)

    def forward(self, tokens, mask):
        hidden = self.b(torch.tanh(self.a(tokens)))  # (B, T, C)
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pytest.fixture
def pooled():
    """(model, projections, tokens (B, T, 6), mask (B, T)); three rows of different lengths."""
    torch.manual_seed(0)
    model = Pooled()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).float()
    projections = [Projection("a", model.a), Projection("b", model.b)]
    return model, projections, torch.randn(3, 5, 6), mask


def summed(sharing, model, projections, tokens, mask, new=None, rank=2):
    curvature = KronCurvature(projections, rank, sharing)
    with Tape(projections) as tape:
        logits = model(tokens, mask)
    root = softmax_hessian_root(logits)
    root = root if new is None else root * new[:, None, None]
    curvature.add(tape, logits, root, new)
    return curvature


def token_vectors(model, tokens, mask):
    """By hand: {matrix: [(row, token, input a, [gradients g of each column of the root])]}."""
    found = {"a": [], "b": []}
    for n in range(len(tokens)):
        hidden = [t.clone() for t in tokens[n]]
        first = [model.a(t) for t in hidden]
        second_in = [torch.tanh(f) for f in first]
        second = [model.b(h) for h in second_in]
        logits = sum(m * s for m, s in zip(mask[n], second, strict=True)) / mask[n].sum()
        root = softmax_hessian_root(logits[None])[0]  # (C, C - 1)
        for name, outputs, inputs in (("a", first, hidden), ("b", second, second_in)):
            columns = [
                torch.autograd.grad(logits @ root[:, k], outputs, retain_graph=True)
                for k in range(root.shape[1])
            ]
            for t, a in enumerate(inputs):
                found[name].append((n, t, a.detach(), [column[t] for column in columns]))
    return found


def outer_sum(vectors):
    return sum(torch.outer(v, v) for v in vectors)


@pytest.mark.parametrize("sharing", ["reduce", "expand", "published"])
def test_kronecker_factors_are_those_of_a_plain_loop(pooled, sharing):
    model, projections, tokens, mask = pooled
    loops = token_vectors(model, tokens, mask)
    dense = summed(sharing, model, projections, tokens, mask, rank=0)
    for i, name in enumerate(("a", "b")):
        real = [item for item in loops[name] if mask[item[0], item[1]] > 0]
        if sharing == "reduce":
            rows = [[item for item in real if item[0] == n] for n in range(3)]
            means = [torch.stack([item[2] for item in row]).mean(0) for row in rows]
            inputs = outer_sum(means) / 3
            gradients = outer_sum(sum(item[3][k] for item in row) for row in rows for k in range(3))
        else:
            counted, number = (real, 11) if sharing == "expand" else (loops[name], 3)
            inputs = outer_sum(item[2] for item in counted) / number
            gradients = outer_sum(g for item in real for g in item[3])
        torch.testing.assert_close(dense.gradients[i].total, gradients, rtol=1e-4, atol=1e-7)
        number = dense.num_examples[i]
        torch.testing.assert_close(dense.inputs[i].total / number, inputs, rtol=1e-4, atol=1e-7)


def test_published_factors_are_dense_whatever_the_rank(pooled):
    published = summed("published", *pooled)
    assert [gram.total.shape for gram in published.inputs] == [(6, 6), (3, 3)]
    assert summed("expand", *pooled).inputs[0].total.shape == (6, 4), "a sketch of rank 2"


def test_published_factors_leave_out_rows_that_only_fill_a_batch(pooled):
    model, projections, tokens, mask = pooled
    two = summed("published", model, projections, tokens[:2], mask[:2])
    new = torch.tensor([1.0, 1.0, 0.0])
    three = summed("published", model, projections, tokens, mask, new)
    for a, b in zip(two.tensors(), three.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_expand_equals_curvlinops(pooled):
    """Rows of one length, the output's tokens summed by their mean: GGN, KFAC-expand."""
    from curvlinops import FisherType, KFACLinearOperator, KFACType

    model, projections, tokens, _ = pooled
    mask = torch.ones(3, 5)

    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return self.inner(tokens, mask)

    operator = KFACLinearOperator(
        Full(),
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [(tokens, torch.tensor([0, 1, 2]))],
        fisher_type=FisherType.TYPE2,
        kfac_approx=KFACType.EXPAND,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    curvature = summed("expand", model, projections, tokens, mask, rank=0)
    for i, name in enumerate(("inner.a", "inner.b")):
        ours = torch.kron(
            curvature.gradients[i].total, curvature.inputs[i].total / curvature.num_examples[i]
        )
        theirs = torch.kron(operator._gradient_covariances[name], operator._input_covariances[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_exact_posterior_is_that_of_the_dual(pooled):
    r"""$J (H + \lambda)^{-1} J^T = K - K R (I + R^T K R)^{-1} R^T K$, and log det by Sylvester."""
    model, projections, tokens, mask = pooled
    full = build_curvature("full", projections, 0, None)
    with Tape(projections) as tape:
        logits = model(tokens, mask)
    jacobians, root = tape.jacobians(logits), softmax_hessian_root(logits)
    with Tape(projections) as tape:
        logits = model(tokens, mask)
    full.add(tape, logits, root)
    weights = nn.ParameterList([p.weight.double() for p in projections])
    posterior = posterior_class("full")(weights, "classification", prior_precision=0.5)
    posterior.mean = nn.utils.parameters_to_vector(weights).detach()
    posterior.take(full.blocks())
    flat = jacobians.double().flatten(0, 1)  # (N C, P)
    gram = flat @ flat.T / 0.5
    roots = torch.block_diag(*root.double())
    inner = torch.eye(9).double() + roots.T @ gram @ roots
    expected = gram - gram @ roots @ torch.linalg.solve(inner, roots.T @ gram)
    found = posterior.functional_variance(jacobians).double()
    for n in range(3):
        part = expected[4 * n : 4 * n + 4, 4 * n : 4 * n + 4]
        torch.testing.assert_close(found[n], part, rtol=1e-3, atol=1e-5)
    ratio = posterior.log_det_ratio.item()
    assert ratio == pytest.approx(inner.logdet().item(), rel=1e-4)
