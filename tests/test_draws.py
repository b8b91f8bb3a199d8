"""How draws are taken at prediction: signs, antithetic pairs, fixed draws; flags and records."""

import json

import pytest
import torch
from conftest import build, run_folder
from peft import LoraConfig
from safetensors import safe_open
from test_branch import batch_for, wrapper_on

import main
from modelwrappers import load_posterior
from modelwrappers.lora.draws import Draws
from modelwrappers.lora.stochastic import attach_posterior
from utils.errors import UsageError

CALL = "--dataset-type mcdataset --dataset bbc_headlines --model m --modelwrapper"


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "training", "prediction"),
    [
        ("blob", "token", "example"),
        ("blob --flipout example", "example", "example"),
        ("blob --flipout none", "none", "none"),
        ("blob --flipout-eval none", "token", "none"),
        ("blob --flipout none --flipout-eval token", "none", "token"),
        ("blob --protocol original", "token", "token"),
        ("blob --protocol original --flipout-eval example", "token", "example"),
        ("tfb --load-lora-path x", None, "example"),
        ("tfb --load-lora-path x --flipout none", None, "none"),
        ("tfblora --load-lora-path x --protocol original", None, "token"),
    ],
)
def test_training_and_prediction_have_signs_of_their_own(flags, training, prediction):
    args = main.parse_args([*CALL.split(), *flags.split()])
    assert args.flipout_eval == prediction
    assert getattr(args, "flipout", None) == training


def test_a_wrapper_takes_the_signs_of_its_mode(tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--lora-layers", "all", "--draws", "antithetic")
    with wrapper.eval().sampling(4):
        assert (wrapper.draws.signs, wrapper.draws.in_pairs) == ("example", True)
    with wrapper.train().sampling(4):
        assert (wrapper.draws.signs, wrapper.draws.in_pairs) == ("token", False)
        with wrapper.sampling(4):
            assert wrapper.draws.signs == "token"


def test_a_saved_posterior_draws_as_its_run_did(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "2"]
    flags += ["--flipout-eval", "none", "--draws", "antithetic", "--draws-adaptive"]
    main.main([*flags, "--bayes-eval-n-samples-final", "16", "--draws-tolerance", "0.2"])
    posterior = load_posterior(run_folder(flags), device="cpu")
    args = posterior.args
    # how many draws a row gets is the caller's to say: `log_probs` has no gaps unless asked for
    assert (args.flipout_eval, args.draws, args.draws_adaptive) == ("none", "antithetic", False)
    assert posterior.final_draws() == 16
    with safe_open(run_folder(flags) / "predictions.safetensors", "pt") as file:
        assert file.metadata()["draws"] == "antithetic"


@pytest.mark.parametrize("more", ["--bayes-inference-notsample", "--bayes-eval-n-samples-final 1"])
def test_pairs_of_no_two_draws_are_refused(more):
    with pytest.raises(
        UsageError, match=f"--draws antithetic takes draws in pairs, but {more[:27]}"
    ):
        main.parse_args([*CALL.split(), "blob", "--draws", "antithetic", *more.split()])


def test_a_stored_run_of_before_has_one_spelling_of_tfbs_signs(tmp_path):
    file = tmp_path / "args.json"
    stored = {"modelwrapper": "tfb", "flipout": "none", "load_lora_path": "x"}
    stored |= {"dataset": "bbc_headlines", "dataset_type": "mcdataset", "model": "m"}
    file.write_text(json.dumps({"args": stored, "given": stored}))
    assert main.parse_args(["--config", str(file)]).flipout_eval == "none"


METHOD = """
from modelwrappers.lora.draws import Draws
from modelwrappers.lora.stochastic import GaussianPosterior, attach_posterior
from modelwrappers.wrapperbase import WrapperBase

class Own(GaussianPosterior, WrapperBase):
    def __init__(self, model, config, args=None, accelerator=None, adapter_name="default", **more):
        super().__init__(model, config, args, accelerator, adapter_name, **more)
        self.draws = Draws(self.args.flipout)
        attach_posterior(self, adapter_name, 0.5, self.draws)

    @classmethod
    def add_arguments(cls, parser):
        ADD
"""


@pytest.mark.parametrize(
    "add",
    [
        'cls.add_flipout_argument(parser.add_argument_group("own"))',
        'parser.add_argument("--flipout", default="none")',
    ],
)
def test_a_gaussian_method_of_before_still_runs(add, causal_flags, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(METHOD.replace("ADD", add))
    flags = [*causal_flags, "--modelwrapper", f"{file}:Own", "--max-train-steps", "2"]
    main.main(flags)
    assert (run_folder(flags) / "metrics.json").is_file()


@pytest.mark.parametrize("flipout", ["token", "none"])
def test_a_record_from_before_predicts_with_the_signs_of_its_time(flipout, causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "2"]
    main.main(flags)
    file = run_folder(flags) / "bayes_config.json"
    record = json.loads(file.read_text())
    record["flags"] = {"bayes_beta": 0.2, "flipout": flipout, "bayes_inference_notsample": False}
    file.write_text(json.dumps(record))
    args = load_posterior(run_folder(flags), device="cpu").args
    assert (args.flipout_eval, args.draws, args.draws_adaptive) == (flipout, "independent", False)


def test_pairs_that_cannot_share_their_signs_are_refused(tmp_path):
    from test_backbone import ENCODERS, make
    from transformers import AutoModelForSequenceClassification

    settings = ENCODERS["deberta"][0]
    folder = make("deberta", settings, tmp_path, AutoModelForSequenceClassification)
    flags = ("--lora-layers", "all", "--draws", "antithetic")
    with pytest.raises(UsageError, match=r"--draws antithetic .* pass --flipout-eval none"):
        wrapper_on(folder, "seqcls", *flags)
    wrapper = wrapper_on(folder, "seqcls", *flags, "--flipout-eval", "none")
    draws = draws_of(wrapper, 4)
    assert draws.shape[1] == 4 and draws.std(1).max() > 0


# --- antithetic pairs -----------------------------------------------------------------------------


def draws_of(wrapper, n_samples: int) -> torch.Tensor:
    with torch.inference_mode():
        torch.manual_seed(3)
        return wrapper.forward_logits(batch_for(wrapper), n_samples=n_samples)


@pytest.mark.parametrize("signs", ["token", "example", "none"])
@pytest.mark.parametrize("number", [1, 4, 5])
def test_the_two_draws_of_a_pair_differ_from_the_mean_in_opposite_directions(signs, number):
    """On one linear layer, whose output is linear in the noise, their mean is the mean's output."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    draws = Draws("none", signs, antithetic=True)
    attach_posterior(model, "default", 1.0, draws)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        mean = model(x)
        with draws.stacked(number, training=False):
            stacked = model(torch.cat([x] * number)).unflatten(0, (number, 2))
    for first in range(0, number - 1, 2):
        torch.testing.assert_close((stacked[first] + stacked[first + 1]) / 2, mean)
        assert (stacked[first] - mean).abs().max() > 1e-3
    if number > 3:
        assert (stacked[0] - stacked[2]).abs().max() > 1e-3  # pairs are independent


def test_pairs_stay_together_however_few_rows_fit_into_a_forward(tiny_llama):
    """Where the posterior is narrow the mean of a pair is the mean but for its curvature."""
    for size in ("1", "3", "8", "64"):
        flags = ("--lora-layers", "all", "--draws", "antithetic", "--eval-batch-size", size)
        torch.manual_seed(0)
        wrapper = wrapper_on(tiny_llama, "causallm", *flags, "--bayes-eps", "0.05")
        draws = draws_of(wrapper, 6)
        with torch.inference_mode():
            mean = wrapper.forward_logits(batch_for(wrapper), sample=False)
        pairs = draws.unflatten(1, (3, 2))
        spread = (pairs - mean.unsqueeze(2)).abs().mean()
        assert (pairs.mean(2) - mean).abs().mean() < 0.1 * spread


def test_the_mean_of_antithetic_draws_has_the_lower_variance(tiny_bert):
    means = {}
    for kind in ("independent", "antithetic"):
        torch.manual_seed(0)
        flags = ("--lora-layers", "all", "--draws", kind, "--eval-batch-size", "200")
        wrapper = wrapper_on(tiny_bert, "seqcls", *flags, "--bayes-eps", "0.4")
        batch = batch_for(wrapper)
        batch["input_ids"] %= wrapper.base_model.config.vocab_size
        with torch.inference_mode():
            torch.manual_seed(1)
            many = [
                wrapper.forward_logits(batch, n_samples=4).softmax(-1).mean(1) for _ in range(60)
            ]
        means[kind] = torch.stack(many)
    independent, antithetic = means["independent"], means["antithetic"]
    error = independent.std(0) / 60**0.5
    assert ((independent.mean(0) - antithetic.mean(0)).abs() < 5 * error + 1e-4).all()  # unbiased
    assert antithetic.var(0).mean() < 0.5 * independent.var(0).mean()


# --- fixed draws ----------------------------------------------------------------------------------


def test_without_signs_a_draw_is_the_same_for_all_rows_in_any_number_of_forwards(tiny_llama):
    results = []
    for size in ("1", "7", "64"):
        torch.manual_seed(0)
        flags = ("--lora-layers", "last:1", "--flipout-eval", "none", "--eval-batch-size", size)
        results.append(draws_of(wrapper_on(tiny_llama, "causallm", *flags), 5))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


def test_fixed_draws_can_be_taken_from_any_number_on(tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--lora-layers", "all", "--flipout-eval", "none")
    batch = batch_for(wrapper)
    with torch.inference_mode(), wrapper.evaluation_draws(6):
        whole = torch.cat(list(wrapper.draw_logits(batch, 6)))
        late = torch.cat(list(wrapper.draw_logits(batch, 2, first=3)))
        early = torch.cat(list(wrapper.draw_logits(batch, 3, first=0)))
    torch.testing.assert_close(late, whole[3:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(early, whole[:3], rtol=1e-4, atol=1e-5)


def test_signs_per_example_leave_each_rows_marginal_as_it_is(causal_flags):
    """Mean and spread over many draws are those without signs; those per token are too narrow."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "6"]
    flags += ["--bayes-eps", "0.4", "--bayes-kllr", "0", "--eval-batch-size", "2000"]
    _, dataset, wrapper = build(flags)
    wrapper.fit(dataset.train_dataloader)
    spread = {}
    for signs in ("none", "example", "token"):
        wrapper.draws.flipout_eval = signs
        log_probs = wrapper.predict(dataset.test_dataloader, n_samples=300).log_probs
        spread[signs] = log_probs.std(1).mean().item()
    # without signs all rows have the same 300 draws, and the spread a standard error of 4 %
    assert spread["example"] == pytest.approx(spread["none"], rel=0.12)
    assert spread["token"] < 0.9 * spread["example"]


# --- placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora-layers", "last:1"),
        ("--lora-layers", "last:1", "--draws", "antithetic"),
        ("--lora-layers", "all", "--flipout-eval", "none"),
    ],
    ids=" ".join,
)
def test_no_tensor_of_a_draw_is_left_on_the_cpu(flags, tiny_llama):
    """On the meta device a tensor that was left behind raises; it needs no GPU."""
    wrapper = wrapper_on(tiny_llama, "causallm", *flags)
    wrapper.get_base_model().set_attn_implementation("eager")  # SDPA's mask asks for a number
    batch = {key: value.to("meta") for key, value in batch_for(wrapper).items()}
    wrapper.to("meta")
    wrapper.target_ids = wrapper.target_ids.to("meta")
    with torch.no_grad():
        assert wrapper.forward_logits(batch, n_samples=3).shape == (5, 3, 5)
