"""What users write: a subclass with `forward_logits`, from a file of their own."""

import copy
import json
import shutil

import pytest
import torch
from conftest import build, run_folder
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import main
from dataset import build_dataset
from modelwrappers import get_wrapper
from utils.errors import UsageError

CLASSIFIER = """
from modelwrappers.wrapperbase import WrapperBase

class CustomWrapper(WrapperBase):
    def __init__(self, model, peft_config, args, accelerator, adapter_name="default"):
        super().__init__(model, peft_config, args, accelerator, adapter_name)

    def forward_logits(self, batch, sample=True, n_samples=1, **kwargs):
        return self.base_model(**batch).logits
"""
CAUSAL = CLASSIFIER.replace(
    "return self.base_model(**batch).logits", "return self.class_logits(self.base_model(**batch))"
)


@pytest.fixture
def custom(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "my_method.py"
        file.write_text(text)
        return f"{file}:CustomWrapper"

    return write


def test_a_classifier_needs_forward_logits_only(classifier_flags, custom):
    flags = [*classifier_flags, "--n-epochs", "6"]
    mine = main.main([*flags, "--modelwrapper", custom(CLASSIFIER)])
    assert mine == main.main([*flags, "--modelwrapper", "mle"])


def test_a_causal_lm_needs_class_logits_only(causal_flags, custom):
    flags = [*causal_flags, "--max-train-steps", "5"]
    mine = main.main([*flags, "--modelwrapper", custom(CAUSAL)])
    ours = main.main([*flags, "--modelwrapper", "mle"])
    assert mine == pytest.approx(ours, abs=2e-3)


def test_a_file_written_for_the_original_imports_wrapperbase(classifier_flags, custom):
    text = CLASSIFIER.replace("from modelwrappers.wrapperbase", "from wrapperbase")
    main.main([*classifier_flags, "--max-train-steps", "2", "--modelwrapper", custom(text)])


def test_every_verb_can_be_overridden(classifier_flags, custom):
    text = (
        CLASSIFIER
        + """
    def prepare_for_fit_evaluate(self, dataset, wandb_logger=None):
        self.called = ["prepare"]
        super().prepare_for_fit_evaluate(dataset, wandb_logger)

    def fit(self, train_loader, eval_loader=None):
        self.called.append("fit")
        super().fit(train_loader, eval_loader)

    def evaluate(self, eval_loader):
        self.called.append("evaluate")
        return super().evaluate(eval_loader)

    def fit_evaluate(self):
        metrics = super().fit_evaluate()
        assert self.called == ["prepare", "fit", "evaluate"], self.called
        return metrics
"""
    )
    main.main([*classifier_flags, "--max-train-steps", "2", "--modelwrapper", custom(text)])


def test_a_training_loop_of_ones_own_uses_the_steps(classifier_flags, custom):
    text = (
        CLASSIFIER
        + """
    def fit(self, train_loader, eval_loader=None):
        self.train()
        for batch in train_loader:
            self.losses = [*getattr(self, "losses", []), float(self.training_step(batch)["nll"])]
            self.optimizer_step()
            self.step += 1

    def fit_evaluate(self):
        metrics = super().fit_evaluate()
        assert len(self.losses) == 5 and self.step == 5
        return metrics
"""
    )
    main.main([*classifier_flags, "--n-epochs", "1", "--modelwrapper", custom(text)])


def test_a_method_has_flags_hooks_and_draws_of_its_own(classifier_flags, custom):
    """A posterior in a dozen lines: noise on the logits, N draws, its own flag."""
    text = """
from contextlib import contextmanager
import torch
from modelwrappers.wrapperbase import WrapperBase

class CustomWrapper(WrapperBase):
    is_stochastic = True
    noise = 0.0

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--noise", type=float, default=0.0)

    @contextmanager
    def sampling(self, n_samples):
        before, self.noise = self.noise, self.args.noise if n_samples else 0.0
        try:
            yield
        finally:
            self.noise = before

    def class_logits(self, output):
        return output.logits + self.noise * torch.randn_like(output.logits)
"""
    name = custom(text)
    flags = [*classifier_flags, "--max-train-steps", "0", "--modelwrapper", name, "--noise", "0.5"]
    _, dataset, wrapper = build(flags)
    draws = wrapper.predict(dataset.test_dataloader).log_probs
    assert draws.shape == (37, 10, 5) and draws.std(1).min() > 0
    again = wrapper.predict(dataset.test_dataloader).log_probs
    assert torch.equal(draws, again), "an evaluation repeats itself"
    assert wrapper.predict(dataset.test_dataloader, n_samples=0).log_probs.shape == (37, 1, 5)


def test_state_dict_keys_are_those_of_peft(causal_flags):
    _, _, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"])
    wrapper.fit_evaluate()
    assert all(key.startswith("base_model.model.") for key in wrapper.state_dict())


def test_a_class_that_is_no_wrapper_is_an_error(custom):
    with pytest.raises(UsageError, match="subclass of WrapperBase"):
        get_wrapper(custom("class CustomWrapper: pass"))


def test_a_file_without_the_class_names_what_it_has(custom):
    with pytest.raises(UsageError, match="has no 'CustomWrapper'; did you mean 'CustomWraper'"):
        get_wrapper(custom("class CustomWraper: pass"))


METHODS = {
    "map": [],
    "mcdropout": ["--lora-dropout", "0.2"],
    "blob": ["--bayes-eps", "0.3"],
    "deepensemble": ["--ensemble-n", "2"],
    "laplace": ["--laplace-rank", "8"],
}


@pytest.mark.parametrize("head", [False, True], ids=["plain head", "LoRA on the head"])
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_of_ones_own_is_trained_whole_saved_and_loaded(
    method, head, classifier_flags, tiny_bert, tmp_path
):
    """A model that transformers has loaded and a LoraConfig by hand, without `load_model`."""
    from accelerate.utils import set_seed

    flags = [*classifier_flags, "--modelwrapper", method, *METHODS[method]]
    args = main.parse_args([*flags, "--max-train-steps", "4"])
    accelerator = main.build_accelerator(args)
    set_seed(1)
    dataset = build_dataset(args, accelerator)
    targets = ["query", "value", *(["classifier"] if head else [])]

    def wrap():
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5)
        model.requires_grad_(False)
        dropout = args.lora_dropout or 0.0
        config = LoraConfig(r=4, target_modules=targets, lora_dropout=dropout)
        return get_wrapper(method)(model, config, args, accelerator)

    wrapper = wrap()
    wrapper.run_folder.path.mkdir(parents=True)
    wrapper.prepare_for_fit_evaluate(dataset)
    before = {name: p.detach().clone() for name, p in wrapper.named_parameters()}
    wrapper.fit_evaluate()
    moved = {n for n, p in wrapper.named_parameters() if not torch.equal(p, before[n])}
    assert any("classifier" in name for name in moved) and any("pooler" in n for n in moved)
    wrapper.save_pretrained(tmp_path / "saved")
    again = wrap()
    again.load_adapter_weights(tmp_path / "saved")
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval().forward_logits(batch, sample=False),
            wrapper.eval().forward_logits(batch, sample=False),
        )


# --- generating text ------------------------------------------------------------------------------

PROMPT = torch.tensor([[5, 6, 7, 8]])


def generated(model) -> list[int]:
    length = PROMPT.shape[1]
    tokens = model.generate(input_ids=PROMPT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return tokens[0, length:].tolist()


@pytest.mark.parametrize("method", ["map", "mle"])
def test_a_point_estimate_generates_as_pefts_models_do(method, causal_flags):
    _, _, wrapper = build([*causal_flags, "--modelwrapper", method, "--max-train-steps", "20"])
    wrapper.fit_evaluate()
    wrapper.eval()
    with torch.no_grad():
        tokens = PROMPT
        for _ in range(3):
            tokens = torch.cat([tokens, wrapper(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert generated(wrapper) == generated(wrapper.base_model) == tokens[0, 4:].tolist()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "map"])
def test_a_posterior_does_not_generate_from_its_mean_in_silence(method, causal_flags, tiny_llama):
    _, _, wrapper = build(
        [*causal_flags, "--modelwrapper", method, *METHODS[method], "--max-train-steps", "20"]
    )
    wrapper.fit_evaluate()
    wrapper.eval()
    ways = (wrapper, wrapper.base_model, wrapper.get_base_model())
    for way in (*ways, copy.deepcopy(wrapper.base_model)):
        with pytest.raises(UsageError, match=rf"posterior \({method}\).*merge_adapter\(\)"):
            generated(way)
    base = generated(AutoModelForCausalLM.from_pretrained(tiny_llama).eval())
    with wrapper.disable_adapter():
        assert [generated(way) for way in ways] == [base] * 3
    wrapper.merge_adapter()
    mean = generated(wrapper)
    wrapper.unmerge_adapter()
    with pytest.raises(UsageError, match="cannot be generated"):
        generated(wrapper)
    assert generated(wrapper.merge_and_unload()) == mean


def test_a_posterior_of_which_the_mean_is_wanted_generates_from_it(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--bayes-inference-notsample"]
    _, _, wrapper = build(flags)
    assert len(generated(wrapper.eval())) == 3


def test_a_loaded_tfb_posterior_does_not_generate_from_its_mean_in_silence(causal_flags):
    first = [*causal_flags, "--modelwrapper", "map", "--max-train-steps", "5", "--checkpoint"]
    main.main(first)
    folder = str(run_folder(first))
    _, _, wrapper = build([*causal_flags, "--modelwrapper", "tfb", "--load-lora-path", folder])
    with pytest.raises(UsageError, match=r"posterior \(tfb\)"):
        generated(wrapper.eval())


def test_a_wrapper_around_a_model_that_was_a_posteriors_generates_again(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob"]
    _, _, wrapper = build(flags)
    config = wrapper.peft_config["default"]
    model = wrapper.unload()
    args = main.parse_args([*causal_flags, "--modelwrapper", "map"])
    plain = get_wrapper("map")(model, config, args, main.build_accelerator(args))
    assert len(generated(plain.eval())) == 3


def test_a_base_model_without_padding_token_written_as_minus_one(
    causal_flags, tiny_llama, tmp_path
):
    """As early Llama conversions have it; the run ends with its adapter and its record."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    flags = [*causal_flags, "--model", str(folder), "--modelwrapper", "mle"]
    main.main([*flags, "--max-train-steps", "2"])
    assert (run_folder([*flags, "--max-train-steps", "2"]) / "bayes_config.json").is_file()


@pytest.mark.parametrize(
    ("value", "code"), [("torch.tensor", 0), ("lambda v: v * float('nan')", 1)], ids=["0-d", "nan"]
)
def test_what_a_methods_own_evaluate_returns_becomes_numbers(causal_flags, tmp_path, value, code):
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\nfrom wrapperbase import WrapperBase\n\n\nclass Own(WrapperBase):\n"
        "    def evaluate(self, loader):\n"
        f"        return type(m := super().evaluate(loader))(*map({value}, m))\n"
    )
    flags = [*causal_flags, "--modelwrapper", f"{file}:Own", "--max-train-steps", "2"]
    assert main.run(flags) == code
    if code == 0:
        assert main.run(flags) == 0, "it is finished, and metrics.json can be read"


def test_verbs_without_a_number_of_draws_decide_by_themselves(classifier_flags, custom):
    """As methods were written before `predict` and `evaluate` took one."""
    text = (
        CLASSIFIER
        + """
    is_stochastic = True
    called = []

    def predict(self, eval_loader):
        self.called.append("predict")
        return super().predict(eval_loader)

    def evaluate(self, eval_loader):
        self.called.append("evaluate")
        return super().evaluate(eval_loader)

    def fit_evaluate(self):
        metrics = super().fit_evaluate()
        assert self.called == ["evaluate", "predict"] * 3, self.called
        return metrics
"""
    )
    flags = ["--max-train-steps", "5", "--eval-per-steps", "2", "--modelwrapper", custom(text)]
    main.main([*classifier_flags, *flags])


def test_a_training_step_may_train_on_more_rows_than_it_was_given(classifier_flags, custom):
    text = (
        CLASSIFIER
        + """
    def training_step(self, batch):
        import torch

        twice = {key: torch.cat([value, value]) for key, value in batch.items()}
        logits = self.training_logits(twice)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, twice["labels"])
        self.backward(loss)
        return {"nll": loss.detach()}
"""
    )
    flags = [*classifier_flags, "--max-train-steps", "3", "--modelwrapper", custom(text)]
    main.main(flags)
    lines = (run_folder(flags) / "history.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("acc" not in json.loads(line) for line in lines)
