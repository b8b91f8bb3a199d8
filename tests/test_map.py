"""MAP's Gaussian prior: the condition of its optimum, counted once however the rows are divided."""

import json

import pytest
import torch
from conftest import build, kill_and_resume, run_folder
from safetensors.torch import load_file

import main
from modelwrappers import MAP, load_posterior
from modelwrappers.map import GaussianPrior
from utils.errors import UsageError

MAP_FLAGS = ["--modelwrapper", "map", "--eval-per-steps", "0", "--limit-eval", "6"]


def matrices(wrapper) -> dict[str, torch.Tensor]:
    """theta, by a way of its own."""
    return {
        name: p
        for name, p in wrapper.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def adapter(flags) -> dict[str, torch.Tensor]:
    main.main(flags)
    return load_file(run_folder(flags) / "adapter_model.safetensors")


def started(flags):
    """(wrapper, theta_0) before training."""
    _, _, wrapper = build(flags)
    return wrapper, {name: p.detach().clone() for name, p in matrices(wrapper).items()}


def test_gradients_and_value_are_those_of_the_log_density():
    """Reference: autograd through torch.distributions."""
    torch.manual_seed(0)
    names = ("x.lora_A.default.weight", "x.lora_B.default.weight", "score.weight")
    parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in names]
    prior = GaussianPrior(zip(names, parameters, strict=True), 2.5, "init", num_rows=40)
    starts = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data += torch.randn(3, 4)
        p.grad = torch.ones(3, 4)
    value = prior.add_gradients()
    ours = [p.grad.clone() for p in parameters]
    logs, densest = 0.0, 0.0
    for p, start in zip(parameters[:2], starts[:2], strict=True):
        p.grad = None
        density = torch.distributions.Normal(start, 2.5**-0.5)
        logs = logs + density.log_prob(p).sum()
        densest = densest + density.log_prob(start).sum()
    ((densest - logs) / 40).backward()
    for p, grad in zip(parameters[:2], ours[:2], strict=True):
        torch.testing.assert_close(grad, p.grad + 1)
    assert torch.equal(ours[2], torch.ones(3, 4)), "a head that is trained whole is outside"
    torch.testing.assert_close(value, ((densest - logs) / 40).detach().double())


def test_at_the_optimum_the_prior_balances_the_likelihood(causal_flags):
    r"""$\frac\lambda N (\theta - \theta_0) = - \nabla$ mean NLL; lambda makes it convex there."""
    flags = [*causal_flags, *MAP_FLAGS, "--prior-precision", "160", "--limit-train", "8"]
    flags += ["--opt", "sgd", "--lr", "0.04", "--batch-size", "8", "--max-train-steps", "60"]
    wrapper, start = started(flags)
    wrapper.fit(wrapper.train_loader)
    (batch,) = list(wrapper.train_loader)
    wrapper.loss(batch).backward()
    for name, p in matrices(wrapper).items():
        pull = 160 / 8 * (p.detach() - start[name])
        torch.testing.assert_close(pull, -p.grad, rtol=1e-3, atol=1e-5)
    moved = {name: (p - start[name]).abs().max().item() for name, p in matrices(wrapper).items()}
    assert max(moved.values()) > 1e-2, "the likelihood has its say"


def test_a_large_precision_keeps_the_prior_mean(causal_flags):
    """The limit of lambda, under AdamW: it sees the prior as part of the gradient."""
    flags = [*causal_flags, *MAP_FLAGS, "--max-train-steps", "40", "--lr", "2e-2"]
    distance = {}
    for mean, precision in (("init", 1e-6), ("init", 1e7), ("zero", 1e7)):
        prior = ["--prior-precision", str(precision), "--prior-mean", mean]
        wrapper, start = started([*flags, *prior])
        wrapper.fit(wrapper.train_loader)
        centre = {n: s if mean == "init" else torch.zeros_like(s) for n, s in start.items()}
        gaps = [(p.detach() - centre[n]).abs().max() for n, p in matrices(wrapper).items()]
        distance[mean, precision] = max(gaps).item()
    assert distance["init", 1e-6] > 0.1
    # A starts up to 0.18 from the origin; AdamW's last steps are of the learning rate's size
    assert distance["init", 1e7] < 0.03 and distance["zero", 1e7] < 0.03


def test_without_a_precision_map_without_decay_is_mle_bit_for_bit(causal_flags):
    base = [*causal_flags, "--eval-per-steps", "0", "--max-train-steps", "5"]
    mle = adapter([*base, "--modelwrapper", "mle"])
    flags = [*base, "--modelwrapper", "map", "--opt-wd", "0"]
    ours = adapter(flags)
    assert all(torch.equal(ours[key], mle[key]) for key in mle)
    record = json.loads((run_folder(flags) / "bayes_config.json").read_text())
    assert "gaussian_prior" not in record


def test_the_usual_weight_decay_is_next_to_no_prior(causal_flags):
    """docs/methods.md: it shrinks by the sum of the learning rates times the decay, 0.08 %."""
    flags = [*causal_flags, *MAP_FLAGS, "--lr", "1e-3", "--max-train-steps", "160"]
    _, _, wrapper = build([*flags, "--opt-wd", "1e-2"])
    start = {name: p.detach().clone() for name, p in matrices(wrapper).items()}
    wrapper.train()
    for _ in range(160):
        for p in matrices(wrapper).values():
            p.grad = torch.zeros_like(p)
        wrapper.optimizer_step()
    for name, p in matrices(wrapper).items():
        torch.testing.assert_close(p.detach(), start[name] * (1 - 8.05e-4), rtol=1e-5, atol=1e-7)


def test_accumulated_batches_count_the_prior_once(causal_flags):
    flags = [*causal_flags, *MAP_FLAGS, "--prior-precision", "20", "--opt", "sgd", "--lr", "0.5"]
    flags += ["--n-epochs", "2", "--limit-train", "38"]  # the last update has fewer rows
    whole = adapter([*flags, "--batch-size", "4", "--log-path", "whole"])
    halves = ["--batch-size", "2", "--grad-accum-steps", "2", "--log-path", "halves"]
    parts = adapter([*flags, *halves])
    other = adapter([*flags, "--batch-size", "4", "--prior-precision", "40", "--log-path", "twice"])
    assert max((other[key] - whole[key]).abs().max() for key in whole) > 1e-2
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)


def test_mixed_precision_leaves_the_prior_in_float32(causal_flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    _, _, wrapper = build([*causal_flags, *MAP_FLAGS, "--max-train-steps", "2"])
    prior = GaussianPrior(wrapper.trainable_parameters(), 1.0, "init", 40)
    for p in prior.parameters:
        p.grad, p.data = None, p.data + 1e-4  # bfloat16 would lose it
    with wrapper.accelerator.autocast():
        value = prior.add_gradients()
    for p in prior.parameters:
        torch.testing.assert_close(p.grad, torch.full_like(p, 1e-4 / 40), rtol=1e-2, atol=0)
    count = sum(p.numel() for p in prior.parameters)
    assert value.item() == pytest.approx(count * 1e-8 / 80, rel=1e-2)


@pytest.mark.parametrize("again", [False, True])
def test_killed_and_resumed_keeps_the_start_bit_for_bit(causal_flags, monkeypatch, again):
    """theta_0 is that of the seed, or the loaded adapter, and not where the state stands."""
    flags = [*causal_flags, *MAP_FLAGS, "--prior-precision", "20", "--max-train-steps", "8"]
    if again:
        first = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "5"]
        main.main(first)
        flags += ["--load-lora-path", str(run_folder(first))]
    flags += ["--save-per-steps", "2"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    reference = adapter(whole)
    kill_and_resume(cut, MAP, lambda wrapper: wrapper.global_step == 5, monkeypatch)
    resumed = load_file(run_folder(cut) / "adapter_model.safetensors")
    assert all(torch.equal(resumed[key], reference[key]) for key in reference)


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_the_record_says_which_prior_and_keeps_it(kind, request):
    flags = [*request.getfixturevalue(kind), *MAP_FLAGS, "--prior-precision", "2.5"]
    flags += ["--max-train-steps", "3", "--hold-out"]
    _, start = started(flags)
    main.main(flags)
    folder = run_folder(flags)
    expected = {
        "precision": 2.5,
        "mean": "init",
        "n_parameters": sum(p.numel() for p in start.values()),  # a classifier's head is not in it
        "n_examples": 32,  # 8 of 40 are held out
    }
    said = json.loads((folder / "bayes_config.json").read_text())["gaussian_prior"]
    assert said == expected
    arguments = json.loads((folder / "args.json").read_text())["args"]
    assert (arguments["prior_precision"], arguments["prior_mean"]) == (2.5, "init")
    assert arguments["opt_wd"] == 0, "one prior"
    lines = [json.loads(line) for line in (folder / "history.jsonl").open()]
    values = [line["prior"] for line in lines]
    assert values[0] == 0 and values[-1] > 0, "at the start theta is theta_0"
    # evaluated again, and loaded in Python
    again = [*flags[: -len(["--max-train-steps", "3", "--hold-out"])], "--log-path", "again"]
    main.main([*again, "--load-lora-path", str(folder)])
    said = json.loads((run_folder(again) / "bayes_config.json").read_text())["gaussian_prior"]
    assert said == expected
    assert load_posterior(folder, device="cpu").method_config() == {"gaussian_prior": expected}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            "--modelwrapper map --prior-precision 2 --opt-wd 1e-2",
            "--prior-precision 2 and --opt-wd 0",
        ),
        ("--modelwrapper mle --prior-precision 2", "has no prior; pass --modelwrapper map"),
        ("--modelwrapper map --prior-mean zero", "pass its --prior-precision"),
        ("--modelwrapper map --prior-precision 0", "greater than 0"),
        ("--modelwrapper map --prior-precision nan", "--prior-precision"),
    ],
)
def test_contradictions_name_both_flags(causal_flags, flags, told):
    with pytest.raises(UsageError, match=told):
        main.parse_args([*causal_flags, "--max-train-steps", "1", *flags.split()])


def test_a_record_with_a_broken_prior_is_refused(causal_flags):
    flags = [*causal_flags, *MAP_FLAGS, "--prior-precision", "2", "--max-train-steps", "1"]
    main.main(flags)
    file = run_folder(flags) / "bayes_config.json"
    record = json.loads(file.read_text())
    record["gaussian_prior"]["precision"] = -1
    file.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"gaussian_prior\.precision"):
        load_posterior(file.parent, device="cpu")


def test_map_in_python_takes_the_prior_as_settings(tiny_llama):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapper = MAP(model, config, prior_precision=3.0, max_train_steps=2)
    assert (wrapper.args.prior_mean, wrapper.args.opt_wd) == ("init", 0)
