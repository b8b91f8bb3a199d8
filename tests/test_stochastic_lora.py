"""The stochastic layer on every backend: moments, draws, PEFT's own verbs."""

import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from modelwrappers.lora.draws import (
    Draws,
    NoisyProjection,
    random_signs,
)
from modelwrappers.lora.exact_4bit import use_exact_4bit
from modelwrappers.lora.stochastic import (
    add_kl_gradients,
    attach_posterior,
    kl_divergence,
    posterior_parameters,
)
from utils.errors import UsageError

IN, OUT, VOCABULARY = 64, 48, 30


class Net(nn.Module):
    """One layer of the backend in question, named `layer` (or `lm_head`)."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {
            "Linear": lambda: nn.Linear(IN, OUT),
            "Linear8bitLt": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False),
            "Linear4bit": lambda: Linear4bit(
                IN, OUT, compute_dtype=torch.float32, quant_type="nf4"
            ),
            "Embedding": lambda: nn.Embedding(VOCABULARY, OUT),
            "lm_head": lambda: nn.Linear(IN, OUT, bias=False),
        }
        self.name = "lm_head" if backend == "lm_head" else "layer"
        # transformers sets these on models that it quantises; PEFT chooses its layers by them
        self.is_loaded_in_8bit = backend == "Linear8bitLt"
        self.is_loaded_in_4bit = backend == "Linear4bit"
        setattr(self, self.name, layers[backend]())
        self.to("cpu")  # quantises
        use_exact_4bit(self)

    def forward(self, x):
        return getattr(self, self.name)(x)


BACKENDS = ("Linear", "Linear8bitLt", "Linear4bit", "Embedding", "lm_head")


def make(backend: str, flipout: str = "none", eps: float = 0.5, dropout: float = 0.0):
    net = Net(backend)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[net.name],
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    model = get_peft_model(net, config)
    draws = Draws(flipout)
    attach_posterior(model, "default", eps, draws)
    return model.eval(), draws


def inputs(backend: str, rows: int = 3, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if backend == "Embedding":
        return torch.randint(VOCABULARY, (rows, tokens), generator=generator)
    return torch.randn(rows, tokens, IN, generator=generator)


def stochastic_layer(model):
    net = model.base_model.model
    return getattr(net, net.name)


def draw(model, draws, x, n: int) -> torch.Tensor:
    """(n, rows, tokens, out)"""
    with torch.no_grad(), draws.stacked(n):
        return model(torch.cat([x] * n)).unflatten(0, (n, len(x)))


def analytic_variance(model, x) -> torch.Tensor:
    """s^2 sum_r B_or^2 sum_i Omega_ri^2 x_i^2: the variance of one output component."""
    layer = stochastic_layer(model)
    variance = layer.lora_A_rho["default"].detach() ** 4  # (r, in)
    if layer.lora_embedding_A:
        hidden = nn.functional.embedding(x, variance.T)
        weight_b = layer.lora_embedding_B["default"].detach()
    else:
        hidden = x.square() @ variance.T
        weight_b = layer.lora_B["default"].weight.detach()
    return layer.scaling["default"] ** 2 * hidden @ weight_b.square().T


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_is_the_backends_own(backend):
    model, _ = make(backend)
    expected = "Linear" if backend == "lm_head" else backend
    assert type(stochastic_layer(model)).__name__ == expected


@pytest.mark.parametrize("flipout", ["token", "example", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_of_the_output_are_the_analytic_ones(backend, flipout):
    model, draws = make(backend, flipout)
    x = inputs(backend)
    mean = model(x).detach()
    number = 4000
    samples = draw(model, draws, x, number)
    variance = analytic_variance(model, x)
    error = (samples.mean(0) - mean).abs() / (variance / number).sqrt()
    assert error.max() < 5.5, "standard errors"
    # The variance of 4000 Gaussians has a relative standard deviation of sqrt(2/4000) = 2.2 %.
    torch.testing.assert_close(samples.var(0) / variance, torch.ones_like(mean), atol=0.13, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_flipout_a_forward_is_one_draw_of_the_weights(backend):
    """Two rows with the same input see the same weights; two draws do not."""
    model, draws = make(backend, "none")
    x = inputs(backend)[:1].repeat_interleave(2, 0)
    samples = draw(model, draws, x, 3)
    torch.testing.assert_close(samples[:, 0], samples[:, 1])
    assert not torch.allclose(samples[0], samples[1])


@pytest.mark.parametrize(
    ("flipout", "rows_differ", "tokens_differ"),
    [("token", True, True), ("example", True, False), ("none", False, False)],
)
def test_flipout_decorrelates_what_it_says(flipout, rows_differ, tokens_differ):
    model, draws = make("Linear", flipout)
    x = torch.ones(2, 2, IN)
    sample = draw(model, draws, x, 1)[0]
    assert torch.allclose(sample[0, 0], sample[1, 0]) is not rows_differ
    assert torch.allclose(sample[0, 0], sample[0, 1]) is not tokens_differ


@pytest.mark.parametrize("width", [5, 8, 70])
def test_random_signs_are_fair_and_independent(width):
    torch.manual_seed(0)
    signs = random_signs((200, 30, width), torch.empty(0, dtype=torch.float64))
    assert signs.shape == (200, 30, width) and torch.equal(signs.abs(), torch.ones_like(signs))
    assert (signs.mean((0, 1)) * math.sqrt(6000)).abs().max() < 4.5
    correlation = torch.corrcoef(signs.flatten(0, 1).T) - torch.eye(width)
    assert correlation.abs().max() < 0.07


def test_signs_are_those_of_a_context_whatever_drew_noise_in_between():
    draws = Draws("token")
    like = torch.empty(0)

    def signs(place=0, side="in", width=64):
        return draws.random_signs(place, side, (4, 3, width), like)

    draws.num_layers = 2
    with draws.stacked(1):
        first = signs()
        state = torch.get_rng_state()
        narrow = signs(width=8)
        assert torch.equal(torch.get_rng_state(), state), "checkpointing draws the same noise again"
        assert torch.equal(signs(), first)
        others = {"width": narrow, "side": signs(side="out")[..., :8], "layer": signs(1)[..., :8]}
        for name, other in others.items():
            assert not torch.equal(first[..., :8], other), name
        for side, step in (("in", 2), ("out", 1)):
            rows = signs(0, side).flatten(0, 1), signs(1, side).flatten(0, 1)
            assert torch.equal(rows[1][:-step], rows[0][step:]), "further down in one table"
        with draws.stacked(1):
            assert torch.equal(signs(), first), "a context of the same number"
            with torch.inference_mode():
                assert torch.equal(signs(), first) and signs().is_inference()
        with draws.stacked(0), draws.stacked(1):
            assert not torch.equal(signs(), first)
        assert torch.equal(signs(), first) and not signs().is_inference()
    with draws.stacked(1):
        assert not torch.equal(signs(), first), "the next forward"


def test_a_context_of_pairs_in_one_of_the_same_number_has_signs_of_its_own():
    draws = Draws("example", "example", antithetic=True)
    with draws.stacked(2, training=True):
        draws.random_signs(0, "in", (6, 2, 32), torch.empty(0))
        with draws.stacked(2, training=False):
            pair = draws.random_signs(0, "in", (6, 2, 32), torch.empty(0)).unflatten(0, (2, 3))
    assert torch.equal(pair[0], pair[1])


def test_adapters_that_share_draws_have_rows_enough_for_the_larger_one():
    net = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, IN))
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "1", "2"]))
    draws = Draws("token")
    attach_posterior(model, "default", 0.5, draws)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["1"]))
    attach_posterior(model, "second", 0.5, draws)
    with draws.stacked(2):
        assert model(torch.ones(4, 3, IN)).shape == (4, 3, IN)


ATTENTION = {
    "none": torch.eye(3),
    "to earlier tokens": torch.ones(3, 3).tril(),
    "to all tokens": torch.ones(3, 3),
    "to the next token": torch.ones(3, 3).triu(1).tril(1),
}


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_noise_of_tokens_and_layers_is_uncorrelated(attention):
    """Two layers of one input and two behind them, at three tokens.

    The largest one is 0.18 if a layer begins one row further down for its input, too, and tokens
    read the next one; with one set of signs for all layers it is 0.17 without any attention.
    """
    torch.manual_seed(0)
    number, width = 60_000, 2  # r is 2, too
    draws, weight = Draws("token"), torch.zeros(2, width)
    draws.num_layers = 4
    up = torch.tensor([[1.0, 0.6], [0.5, 1.0]])
    x = torch.ones(1, 3, width).expand(number, 3, width)
    deltas = []
    with draws.stacked(number):
        for place in range(4):
            noise = draws.noise(place, (2, width), weight)
            signs = (
                draws.random_signs(place, "in", x.shape, x),
                draws.random_signs(place, "out", (number, 3, 2), x),
            )
            deltas.append(NoisyProjection.apply(x, weight, torch.ones(2, width), noise, *signs))
            if place:  # the first two read the same x
                x = x + attention @ (deltas[-1] @ up)
    values = torch.stack(deltas, 1).flatten(1)  # (draws, layer x token x r)
    # behind the second layer noise has heavy tails, and a correlation of it would need many draws
    values = values.sign() * values.abs().sqrt()
    correlation = torch.corrcoef(values.T) - torch.eye(24)
    assert correlation.abs().max() < 0.05


@pytest.mark.parametrize("flipout", ["token", "example", "none"])
def test_gradients_of_the_noisy_projection_are_numerically_right(flipout):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 40, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    rho = torch.rand(5, 40, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 5, 40, dtype=torch.float64)
    signs = (None, None)
    if flipout != "none":
        rest = 3 if flipout == "token" else 1
        signs = random_signs((4, rest, 40), x), random_signs((4, rest, 5), x)
    assert torch.autograd.gradcheck(
        lambda *values: NoisyProjection.apply(*values, noise, *signs), (x, mean, rho)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked_draws_of_a_fixed_noise_equal_draws_one_by_one(backend):
    model, draws = make(backend, "none")
    x = inputs(backend)
    with draws.fixed(4, seed=3):
        together = draw(model, draws, x, 4)
    with draws.fixed(4, seed=3):
        one_by_one = torch.cat([draw(model, draws, x, 1) for _ in range(4)])
    tolerance = 0.05 if backend == "Linear8bitLt" else 1e-5  # its rows share a quantisation
    torch.testing.assert_close(together, one_by_one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_plain_lora(backend):
    model, _ = make(backend)
    x = inputs(backend)
    ours = model(x)
    stochastic_layer(model).lora_variant.clear()
    torch.testing.assert_close(ours, model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_save_and_load_keep_mean_and_spread(backend, tmp_path):
    model, _ = make(backend)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    # Stock PEFT reads the posterior mean and leaves the spread.
    stock = PeftModel.from_pretrained(Net(backend), tmp_path).eval()
    x = inputs(backend)
    torch.testing.assert_close(stock(x), model(x))
    other, _ = make(backend, eps=0.1)
    other.load_adapter(tmp_path, "default")
    for mine, theirs in zip(
        posterior_parameters(model, "default"), posterior_parameters(other, "default"), strict=True
    ):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize("backend", ["Linear", "Embedding", "lm_head"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_into_the_mean_and_can_be_undone(backend, safe):
    model, draws = make(backend)
    x = inputs(backend)
    before = model(x).detach()
    model.merge_adapter(safe_merge=safe)
    merged = draw(model, draws, x, 2)
    assert torch.equal(merged[0], merged[1]), "merged is deterministic"
    torch.testing.assert_close(merged[0], before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*draw(model, draws, x, 2))


@pytest.mark.parametrize("backend", ["Linear8bitLt", "Linear4bit"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_into_a_quantised_weight_is_what_peft_makes_of_plain_lora(backend, safe):
    """PEFT quantises the merged weight anew: the mean, up to one more rounding."""
    ours, _ = make(backend)
    plain, _ = make(backend)
    stochastic_layer(plain).lora_variant.clear()
    for model in (ours, plain):
        model.merge_adapter(safe_merge=safe)
    x = inputs(backend)
    merged = ours(x)
    torch.testing.assert_close(merged, plain(x))
    mean, _ = make(backend)
    error = (merged - mean(x)).abs().mean() / mean(x).abs().mean()
    assert error < {"Linear8bitLt": 0.02, "Linear4bit": 0.15}[backend], "one more quantisation"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disabled_adapter_is_the_base_model(backend):
    model, draws = make(backend)
    x = inputs(backend)
    with model.disable_adapter():
        samples = draw(model, draws, x, 2)
    torch.testing.assert_close(samples[0], Net(backend)(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(samples[0], samples[1]) or backend == "Linear8bitLt"


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_adapter_is_switched_to_and_deleted(backend):
    model, draws = make(backend)
    x = inputs(backend)
    ours = model(x).detach()
    model.add_adapter(
        "plain", LoraConfig(r=2, target_modules=["layer", "lm_head"], init_lora_weights=False)
    )
    model.set_adapter("plain")
    assert not stochastic_layer(model).lora_A_rho["default"].requires_grad
    assert torch.equal(*draw(model, draws, x, 2)) or backend == "Linear8bitLt"
    assert not torch.allclose(model(x), ours)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), ours)
    assert stochastic_layer(model).lora_A_rho["default"].requires_grad
    model.delete_adapter("default")
    assert "default" not in stochastic_layer(model).lora_A_rho


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_mean_and_spread(backend):
    model, draws = make(backend, "token", dropout=0.1)
    model.train()
    x = inputs(backend)
    with draws.stacked(2):
        model(torch.cat([x] * 2)).square().mean().backward()
    (mean,), (rho,) = posterior_parameters(model, "default")
    assert mean.grad.abs().sum() > 0 and rho.grad.abs().sum() > 0


def test_autocast_runs_forward_and_backward():
    model, draws = make("Linear", "token")
    with draws.stacked(2), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.cat([inputs("Linear")] * 2)).float().square().mean().backward()
    (mean,), (rho,) = posterior_parameters(model, "default")
    assert mean.grad.isfinite().all() and rho.grad.abs().sum() > 0


def test_a_backend_that_would_skip_the_noise_is_refused():
    net = nn.Sequential(nn.Conv1d(4, 4, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UsageError, match="Conv1d, which would skip the noise"):
        attach_posterior(model, "default", 0.05, Draws())


def test_another_lora_variant_is_refused():
    model = get_peft_model(Net("Linear"), LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    with pytest.raises(UsageError, match=r"DoRA \(use_dora"):
        attach_posterior(model, "default", 0.05, Draws())


def test_initial_spread_is_uniform_as_published():
    model, _ = make("Linear", eps=0.05)
    _, (rho,) = posterior_parameters(model, "default")
    assert rho.min() >= 0.05 / math.sqrt(2) and rho.max() <= 0.05
    assert rho.mean().item() == pytest.approx(0.05 * (1 + 1 / math.sqrt(2)) / 2, rel=0.02)


# --- KL ------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions_and_its_gradient_autograd():
    torch.manual_seed(0)
    means = [torch.randn(4, 9, requires_grad=True), torch.randn(3, 5, requires_grad=True)]
    rhos = [(0.3 * torch.rand(m.shape) - 0.1).requires_grad_() for m in means]  # both signs
    expected = sum(
        reference_kl(Normal(m.double(), g.double().square()), Normal(0.0, 0.2)).sum()
        for m, g in zip(means, rhos, strict=True)
    )
    value = kl_divergence(means, rhos, 0.2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(0.3 * expected, [*means, *rhos])
    rhos[0].grad = torch.ones_like(rhos[0])  # what the NLL has left there is kept
    add_kl_gradients(means, rhos, 0.2, 0.3)
    torch.testing.assert_close(rhos[0].grad - 1, gradients[2], rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip([*means, rhos[1]], [*gradients[:2], gradients[3]], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
