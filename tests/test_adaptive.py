"""Draws until a row is settled: the stated rates hold, and what is kept says how many were made."""

import json
import math

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file

import main
from modelwrappers.engine.adaptive import Settling, is_settled, settled_draws
from utils.errors import UsageError
from utils.metrics import posterior_predictive, score

ROWS, CLASSES = 4000, 5


def logits_of(kind: str, most: int, antithetic: bool) -> torch.Tensor:
    """(rows, N, classes) of rows that are sure, unsure, and of every kind between."""
    generator = torch.Generator().manual_seed(7)

    def normal(number: int = most) -> torch.Tensor:
        noise = torch.randn(ROWS, number, CLASSES, generator=generator)
        if not antithetic:
            return noise
        half = noise[:, : (number + 1) // 2]
        return torch.stack([half, -half], dim=2).flatten(1, 2)[:, :number]

    mean = 3 * torch.randn(ROWS, 1, CLASSES, generator=generator)
    if kind == "normal":
        return mean + 2 * torch.rand(ROWS, 1, 1, generator=generator) * normal()
    # each draw has one of two answers, in a share of the draws that differs by row
    share = torch.rand(ROWS, 1, generator=generator)
    other = (torch.rand(ROWS, most, generator=generator) < share)[..., None]
    return torch.where(other, mean.roll(1, -1), mean) * 2 + 0.2 * normal()


def drawn(
    logits: torch.Tensor, settling: Settling, temperature=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `settled_draws` makes of rows whose draws are known beforehand."""

    def draw(batch, number: int, first: int):
        yield logits[batch["input_ids"][:, 0], first : first + number].transpose(0, 1)

    batch = {"input_ids": torch.arange(len(logits))[:, None]}
    return settled_draws(draw, batch, logits.shape[1], settling, temperature)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("most", [10, 64])
@pytest.mark.parametrize("kind", ["normal", "two answers"])
def test_answers_differ_from_those_of_all_draws_in_less_than_the_stated_rate(
    kind, most, antithetic
):
    logits = logits_of(kind, most, antithetic)
    settling = Settling(error_rate=0.02, tolerance=0.05, antithetic=antithetic)
    log_probs, numbers = drawn(logits, settling)
    settled = posterior_predictive(log_probs, numbers)
    whole = posterior_predictive(logits.log_softmax(-1))
    assert (numbers < most).float().mean() > 0.05  # else nothing is tested
    assert (settled.argmax(-1) != whole.argmax(-1)).double().mean() < 0.02
    if kind == "normal":
        answer = settled.argmax(-1, keepdim=True)
        off = (settled.exp() - whole.exp()).gather(1, answer).abs() > settling.tolerance
        assert off.double().mean() < 0.02


def test_the_looks_share_the_error_rate_out():
    stages = list(Settling(error_rate=0.01).stages(40))
    assert [number for number, _ in stages] == [4, 8, 16, 32, 40]
    assert all(share > 0 for _, share in stages[:-1]) and stages[-1][1] == 0
    assert sum(share for _, share in stages) < 0.01
    assert list(Settling().stages(4)) == [(4, 0.0)]


def test_the_interval_is_students_for_a_sample_of_a_finite_population():
    """By hand, for one row and two classes: s sqrt(1/n - 1/N) times the quantile."""
    from scipy.stats import t

    probs = torch.tensor([0.80, 0.90, 0.85, 0.95, 0.90, 0.86, 0.91, 0.87]).double()
    row = torch.stack([probs, 1 - probs], dim=-1)[None]
    half = t.isf(0.005, 7) * probs.std().item() * math.sqrt(1 / 8 - 1 / 32)
    for tolerance, expected in ((half * 1.001, True), (half * 0.999, False)):
        settling = Settling(error_rate=0.01, tolerance=tolerance)
        assert is_settled(row, 32, 0.01, settling).tolist() == [expected]


def test_pairs_are_what_is_independent_of_antithetic_draws():
    """Draws that cancel in pairs are settled at once, if it is known that they are pairs."""
    noise = torch.tensor([0.2, -0.2, 0.1, -0.1, 0.3, -0.3, 0.15, -0.15])
    probs = 0.6 + noise
    row = torch.stack([probs, 1 - probs], dim=-1)[None]
    assert not is_settled(row, 64, 0.01, Settling(tolerance=0.05))
    assert is_settled(row, 64, 0.01, Settling(tolerance=0.05, antithetic=True))
    one_pair = Settling(tolerance=0.5, antithetic=True)
    assert not is_settled(row[:, :2], 64, 0.01, one_pair)  # which has no spread to judge by


def test_rows_that_are_left_are_stacked_anew():
    logits = logits_of("normal", 32, False)[:40]
    logits[:20] = torch.tensor([9.0, 0, 0, 0, 0])  # settled as soon as anything is
    sizes = []

    def draw(batch, number, first):
        sizes.append((len(batch["input_ids"]), number, first))
        yield logits[batch["input_ids"][:, 0], first : first + number].transpose(0, 1)

    batch = {"input_ids": torch.arange(40)[:, None]}
    log_probs, numbers = settled_draws(draw, batch, 32, Settling())
    assert sizes[0] == (40, 4, 0) and sizes[1][1:] == (4, 4) and sizes[2][1:] == (8, 8)
    assert sizes[2][0] <= 20 and (numbers[:20] <= 8).all()
    for row in range(40):
        made = int(numbers[row])
        expected = logits[row, :made].log_softmax(-1)
        torch.testing.assert_close(log_probs[row, :made], expected)
        assert log_probs[row, made:].isnan().all()


@pytest.mark.parametrize("method", ["blob", "mcdropout"])
def test_a_run_keeps_the_draws_that_were_made_and_says_how_many(method, causal_flags):
    flags = [*causal_flags, "--modelwrapper", method, "--max-train-steps", "8"]
    flags += ["--draws-adaptive", "--draws-tolerance", "0.3", "--bayes-eval-n-samples-final", "40"]
    flags += ["--lora-layers", "last:1"] * (method == "blob")
    metrics = main.main(flags)
    folder = run_folder(flags)
    stored = load_file(folder / "predictions.safetensors")
    numbers = stored["num_draws"]
    assert stored["log_probs"].shape[1] == numbers.max() and numbers.min() < numbers.max()
    made = torch.arange(int(numbers.max())) < numbers[:, None]
    assert torch.equal(stored["log_probs"].isfinite().all(-1), made)
    predictive = posterior_predictive(stored["log_probs"], numbers)
    assert score(predictive, stored["labels"]) == pytest.approx(metrics, abs=1e-6)
    block = json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]
    assert block["mean_draws"] == pytest.approx(numbers.double().mean().item())
    assert block["n_draws"] == numbers.max()


def test_a_fixed_draw_is_the_same_whether_or_not_other_rows_need_it(causal_flags):
    """Without signs the n-th draw of a row is that of an evaluation with all draws."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "8"]
    flags += ["--flipout-eval", "none", "--bayes-eps", "0.3", "--draws-adaptive"]
    flags += ["--bayes-eval-n-samples-final", "32", "--draws-tolerance", "0.3"]
    _, dataset, wrapper = build(flags)
    wrapper.fit(dataset.train_dataloader)
    settled = wrapper.predict(dataset.test_dataloader)
    whole = wrapper.predict(dataset.test_dataloader, n_samples=32)
    assert settled.num_draws.min() < 32 and whole.num_draws is None
    for ours, theirs, number in zip(
        settled.log_probs, whole.log_probs, settled.num_draws, strict=True
    ):
        torch.testing.assert_close(ours[:number], theirs[:number], rtol=1e-4, atol=1e-5)


def test_few_draws_are_all_made(causal_flags):
    """An evaluation while training has one draw, and the first stage has four."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "2", "--draws-adaptive"]
    _, dataset, wrapper = build(flags)
    predictions = wrapper.predict(dataset.test_dataloader, n_samples=4)
    assert predictions.num_draws is None and predictions.log_probs.shape[1] == 4


def test_rows_are_settled_at_the_temperature_that_they_are_told_at():
    logits = logits_of("normal", 32, False)
    _, numbers = drawn(logits, Settling())
    sharper, fewer = drawn(logits, Settling(), temperature=4.0)
    made = torch.arange(sharper.shape[1]) < fewer[:, None]
    torch.testing.assert_close(sharper[made], (logits / 4).log_softmax(-1)[made])
    assert fewer.double().mean() < numbers.double().mean()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("deepensemble", "--draws-adaptive and --modelwrapper deepensemble: an ensemble predicts"),
        ("laplace --max-train-steps 1", "draws of the logits cost next to nothing"),
        ("map", "a single set of weights has no draws to add"),
        ("blob --bayes-eval-n-samples-final 4", "for the first time after 4 draws"),
        ("blob --bayes-inference-notsample", "a single set of weights has no draws to add"),
    ],
)
def test_what_has_no_draws_to_add_is_refused(flags, message):
    call = "--dataset-type mcdataset --dataset bbc_headlines --model m --draws-adaptive"
    with pytest.raises(UsageError, match=message):
        main.parse_args([*call.split(), "--modelwrapper", *flags.split()])


def test_its_settings_alone_have_no_effect_and_say_so():
    call = "--dataset-type mcdataset --dataset bbc_headlines --model m --modelwrapper blob"
    with pytest.raises(UsageError, match=r"--draws-tolerance is part of .* --draws-adaptive"):
        main.parse_args([*call.split(), "--draws-tolerance", "0.1"])


def test_a_method_that_takes_all_draws_for_made_is_refused(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from modelwrappers.blob import BLoB\n"
        "class Own(BLoB):\n"
        "    def evaluate(self, eval_loader):\n"
        "        return super().evaluate(eval_loader)\n"
        "class Older(BLoB):\n"
        "    def draw_logits(self, batch, n_samples):\n"
        "        return super().draw_logits(batch, n_samples)\n"
    )
    call = "--dataset-type mcdataset --dataset bbc_headlines --model m --draws-adaptive"
    for name, message in (("Own", "its own evaluate takes all"), ("Older", "takes no `first`")):
        with pytest.raises(UsageError, match=message):
            main.parse_args([*call.split(), "--modelwrapper", f"{file}:{name}"])
