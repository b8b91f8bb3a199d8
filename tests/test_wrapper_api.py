"""What users write: a subclass with `forward_logits`, from a file of their own."""

import pytest
import torch
from conftest import build

import main
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
    wrapper.eval_n_samples = 0
    assert wrapper.predict(dataset.test_dataloader).log_probs.shape == (37, 1, 5)


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
