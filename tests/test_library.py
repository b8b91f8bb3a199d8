"""Methods without a command line, pure losses, answers that travel with the loader, own tensors."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import build, run_folder
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import main
from modelwrappers import WRAPPERS, BLoB, load_posterior
from utils.errors import RunError, UsageError

TARGETS = {"causallm": ["q_proj", "v_proj"], "seqcls": ["query", "value"]}
TRAINED_HERE = ("map", "mcdropout", "deepensemble", "blob")


def base_model(kind: str, request):
    if kind == "causallm":
        return AutoModelForCausalLM.from_pretrained(request.getfixturevalue("tiny_llama"))
    return AutoModelForSequenceClassification.from_pretrained(
        request.getfixturevalue("tiny_bert"), num_labels=3
    )


def in_memory(kind: str, request, name: str = "blob", **settings):
    config = LoraConfig(
        r=4,
        target_modules=TARGETS[kind],
        lora_dropout=0.1 if name == "mcdropout" else 0.0,
        task_type="CAUSAL_LM" if kind == "causallm" else "SEQ_CLS",
    )
    model = base_model(kind, request).requires_grad_(False)
    wrapper = WRAPPERS[name](model, config, **settings)
    wrapper.target_ids = torch.tensor([10, 20, 30]) if kind == "causallm" else None
    return wrapper


def batch_of(rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(4, 12, (rows, 6), generator=generator),
        "attention_mask": torch.ones(rows, 6, dtype=torch.long),
        "labels": torch.randint(3, (rows,), generator=generator),
        "index": torch.arange(rows),
    }


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", TRAINED_HERE)
def test_a_method_is_built_trained_and_predicts_without_a_command_line(
    kind, name, request, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    wrapper = in_memory(kind, request, name, lr=1e-3)
    assert wrapper.run_folder is None and wrapper.args.lr == 1e-3
    wrapper.train()
    batch = batch_of()
    loss = wrapper.loss(batch)
    assert loss.shape == () and loss.requires_grad
    assert all(p.grad is None for p in wrapper.parameters()), "a loss is a forward only"
    step = wrapper.training_step(batch)
    assert step["nll"].isfinite()
    with_gradient = {n for n, p in wrapper.named_parameters() if p.grad is not None}
    parts = ("lora_", "classifier", "pooler")  # a head and its pooler are trained whole
    assert with_gradient and all(any(p in n for p in parts) for n in with_gradient)
    draws = {"map": 1, "deepensemble": 3}.get(name, 5)
    assert wrapper.predict([batch], n_samples=5).log_probs.shape == (4, draws, 3)
    if name in ("mcdropout", "blob"):
        assert wrapper.predict([batch]).log_probs.shape == (4, 10, 3), "the final number"
        assert wrapper.predict([batch], n_samples=0).log_probs.shape == (4, 1, 3)
    assert not list(tmp_path.iterdir()), "nothing is written that nobody asked for"


def test_settings_are_flags_in_any_of_their_spellings(request):
    wrapper = in_memory("seqcls", request, prior_std=0.7, kl_lr=0.5, bayes_eps=0.1)
    assert (wrapper.args.bayes_beta, wrapper.args.bayes_kllr) == (0.7, 0.5)
    rho = next(p for n, p in wrapper.named_parameters() if "lora_A_rho" in n)
    assert rho.max() <= 0.1 and rho.max() > 0.07


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_st": 1.0}, "prior_st.*did you mean"),
        ({"prior_std": -1.0}, "between"),
        ({"prior_std": "much"}, "between"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(request, settings, message):
    with pytest.raises(UsageError, match=message):
        in_memory("seqcls", request, **settings)


def test_args_and_settings_exclude_each_other(classifier_flags, request):
    args = main.parse_args([*classifier_flags, "--modelwrapper", "blob", "--max-train-steps", "1"])
    model = base_model("seqcls", request)
    with pytest.raises(UsageError, match="prior_std"):
        BLoB(model, LoraConfig(target_modules=["query"]), args, prior_std=1.0)


@pytest.mark.parametrize("kind", TARGETS)
def test_fit_evaluate_works_in_memory_and_saves_where_it_is_told(kind, request, tmp_path):
    wrapper = in_memory(kind, request, max_train_steps=3, lr=1e-2, batch_size=4)
    batches = [batch_of(), batch_of()]
    wrapper.prepare_for_fit_evaluate(
        SimpleNamespace(
            train_dataloader=batches,
            test_dataloader=[batch_of()],
            num_samples=8,
            num_labels=3,
            target_ids=torch.tensor([10, 20, 30]),
        )
    )
    metrics = wrapper.fit_evaluate()
    assert wrapper.step == 3 and metrics.nll > 0
    expected = wrapper.predict([batch_of()]).log_probs
    wrapper.answers = ["red", "green", "blue"]
    wrapper.save_pretrained(str(tmp_path / "mine"))
    model = request.getfixturevalue("tiny_llama" if kind == "causallm" else "tiny_bert")
    if kind == "seqcls":  # the head is random, and PEFT saves it
        assert any(
            "classifier" in k for k in load_file(tmp_path / "mine/adapter_model.safetensors")
        )
    again = load_posterior(tmp_path / "mine", model=model, device="cpu")
    assert isinstance(again, BLoB) and again.answers == ["red", "green", "blue"]
    mean = wrapper.predict([batch_of()], n_samples=0).log_probs
    torch.testing.assert_close(again.predict([batch_of()], n_samples=0).log_probs, mean)
    torch.testing.assert_close(again.predict([batch_of()]).log_probs, expected)


def test_another_method_takes_the_adapter_of_a_posterior(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "map", "--max-train-steps", "4", "--checkpoint"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu", modelwrapper="blob")
    assert isinstance(posterior, BLoB) and posterior.final_draws() == 10
    _, dataset, _ = build(flags)
    stored = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    mean = posterior.predict(dataset.test_dataloader, n_samples=0).log_probs
    torch.testing.assert_close(mean, stored, rtol=1e-5, atol=1e-5)


def test_answers_travel_with_the_loader_and_leave_the_wrappers_own_alone(request):
    wrapper = in_memory("causallm", request, "map").eval()
    batch = batch_of()

    class Loader(list):
        target_ids = torch.tensor([30, 20])

    own = wrapper.predict([batch]).log_probs
    other = wrapper.predict(Loader([batch])).log_probs
    assert own.shape[-1] == 3 and other.shape[-1] == 2
    # the same logits, of other answers
    odds = own[..., 2] - own[..., 1]
    torch.testing.assert_close(other[..., 0] - other[..., 1], odds)
    assert wrapper.target_ids.tolist() == [10, 20, 30]
    torch.testing.assert_close(wrapper.predict([batch]).log_probs, own)


def test_draws_come_in_chunks_that_can_be_reduced_one_by_one(request):
    wrapper = in_memory("seqcls", request, eval_batch_size=8, bayes_eps=1.0).eval()
    inputs = wrapper.model_inputs(batch_of())
    with torch.no_grad():
        torch.manual_seed(3)
        whole = wrapper.forward_logits(inputs, n_samples=5)  # (4, 5, 3)
        torch.manual_seed(3)
        sizes, total = [], torch.zeros(4, 3)
        for chunk in wrapper.draw_logits(inputs, 5):
            sizes.append(len(chunk))
            total += chunk.sum(0)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(total / 5, whole.mean(1))


# --- tensors of a method of one's own -------------------------------------------------------------

METHOD = """
import torch
from modelwrappers.wrapperbase import WrapperBase

class Shifted(WrapperBase):
    shift = torch.zeros(())

    def class_logits(self, output):
        return super().class_logits(output) * self.shift

    def fit_posterior(self):
        if not self.shift:
            self.shift = torch.tensor(3.0)

    def posterior_tensors(self):
        return {"shift": self.shift, "count": torch.tensor([7])}

    def load_posterior_tensors(self, tensors):
        assert tensors["count"].tolist() == [7]
        self.shift = tensors["shift"]
"""


@pytest.fixture
def shifted(causal_flags, tmp_path):
    """A run's flags, and its method."""
    (tmp_path / "mine.py").write_text(METHOD, encoding="utf-8")
    method = f"{tmp_path / 'mine.py'}:Shifted"
    flags = [*causal_flags, "--modelwrapper", method, "--max-train-steps", "2", "--lr", "1e-3"]
    main.main(flags)
    return flags, method


def test_a_methods_own_tensors_are_saved_and_given_back(shifted, causal_flags):
    flags, method = shifted
    folder = run_folder(flags)
    assert load_file(folder / "posterior.safetensors")["shift"] == 3
    assert "posterior.safetensors" in json.loads((folder / "metrics.json").read_text())["files"]
    posterior = load_posterior(folder, device="cpu", modelwrapper=method)
    _, dataset, _ = build(flags)
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-5, atol=1e-5)
    # so does a run on the adapter, and it keeps them
    second = [*causal_flags, "--modelwrapper", method, "--load-lora-path", str(folder)]
    second += ["--log-path", "second", "--checkpoint"]
    main.main(second)
    assert load_file(run_folder(second) / "posterior.safetensors")["shift"] == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "is in one of them only"),
        ({"shift": torch.tensor(3.0)}, "'count' is in one of them only"),
        (
            {"shift": torch.tensor(3.0), "count": torch.tensor([7]), "more": torch.ones(1)},
            "'more' is in one of them only",
        ),
        ({"shift": torch.tensor(float("nan")), "count": torch.tensor([7])}, "'shift' has values"),
        ({"shift": torch.tensor(3.0), "count": torch.tensor([8])}, "load_posterior_tensors"),
    ],
    ids=["missing", "fewer", "more", "nan", "refused by the method"],
)
def test_tensors_that_do_not_fit_are_an_error(shifted, tensors, message):
    flags, method = shifted
    file = run_folder(flags) / "posterior.safetensors"
    file.unlink()
    if tensors is not None:
        save_file(tensors, file)
    with pytest.raises(UsageError, match=message):
        load_posterior(run_folder(flags), device="cpu", modelwrapper=method)


def test_a_record_says_what_a_row_looks_like(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "map", "--max-train-steps", "1"]
    main.main(flags)
    record = json.loads((run_folder(flags) / "bayes_config.json").read_text())
    _, dataset, wrapper = build([*flags, "--log-path", "again"])
    prompt = record["prompt"]
    assert prompt["tokenizer"] == wrapper.args.model
    assert dataset.task.example["text"] in prompt["text"][0]
    assert dataset.tokenizer.decode(prompt["input_ids"]).startswith(prompt["text"][0][:20])
    assert load_posterior(run_folder(flags), device="cpu").prompt.model_dump() == prompt


def test_verbs_that_come_too_early_say_what_is_missing(request):
    wrapper = in_memory("seqcls", request)
    with pytest.raises(RunError, match="prepare_for_fit_evaluate"):
        wrapper.fit([batch_of()])
    with pytest.raises(RunError, match="prepare_for_fit_evaluate"):
        wrapper.fit_evaluate()
    causal = in_memory("causallm", request, "map")
    causal.target_ids = None
    with pytest.raises(RunError, match="target_ids"):
        causal.training_step(batch_of())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"load_lora_path": "somewhere"}, "load_posterior"),
        ({"lora_r": 99}, "LoraConfig"),
        ({"quantization": "4bit"}, "the model that you pass"),
        ({"limit_eval": 3}, "the data set"),
        ({"held_out_fraction": 0.3}, "the data set"),
        ({"tracker": "wandb"}, "wandb run"),
        ({"output_dir": "here"}, "save_pretrained"),
        ({"resume": True}, "save_pretrained"),
        ({"modelwrapper": "map"}, "the class"),
    ],
)
def test_a_setting_that_could_have_no_effect_is_refused(request, setting, message):
    with pytest.raises(UsageError, match=message):
        in_memory("seqcls", request, **setting)


@pytest.mark.parametrize("name", ["tfb", "laplace"])
def test_post_hoc_methods_start_from_a_saved_adapter(name, classifier_flags):
    flags = [*classifier_flags, "--modelwrapper", "map", "--max-train-steps", "6"]
    main.main(flags)
    _, dataset, _ = build([*flags, "--log-path", "again"])
    posterior = load_posterior(run_folder(flags), device="cpu", modelwrapper=name)
    posterior.prepare_for_fit_evaluate(dataset)
    posterior.fit_posterior()
    draws = posterior.predict(dataset.test_dataloader, n_samples=4).log_probs
    assert draws.shape == (37, 4, 5) and draws.std(1).max() > 0


def test_no_attribute_says_how_many_draws(request):
    wrapper = in_memory("seqcls", request)
    with pytest.raises(UsageError, match="n_samples"):
        wrapper.eval_n_samples = 3
