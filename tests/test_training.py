"""The loop, through the real entry point, against a bare PEFT loop and against itself."""

import json

import pytest
import torch
from conftest import build, run_folder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import main
from utils.errors import RunError


def history(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def train(flags) -> dict[str, torch.Tensor]:
    """Run `main`; the adapter that it saved."""
    main.main([*flags, "--checkpoint"])
    return load_file(run_folder([*flags, "--checkpoint"]) / "adapter_model.safetensors")


def test_training_equals_a_bare_peft_loop(causal_flags):
    """Reference: PEFT, AdamW and the linear schedule called by hand on the same batches."""
    flags = [
        *causal_flags,
        "--modelwrapper",
        "mle",
        "--max-train-steps",
        "7",
        "--warmup-ratio",
        "0.3",
    ]
    ours = train(flags)
    args, dataset, _ = build(flags)

    torch.manual_seed(args.seed)
    from accelerate.utils import set_seed

    set_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0.3 * 7, 7)
    step = 0
    for epoch in range(2):
        dataset.train_dataloader.batch_sampler.set_position(epoch)
        for batch in dataset.train_dataloader:
            if step == 7:
                break
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, -1, dataset.target_ids]
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Adam turns rounding into steps of lr's size where a gradient is near zero, hence atol.
            torch.testing.assert_close(
                ours[name.replace(".default", "")], parameter.data, rtol=1e-3, atol=2e-4
            )


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_training_learns_and_leaves_every_file(kind, request):
    flags = [
        *request.getfixturevalue(kind),
        "--modelwrapper",
        "map",
        "--n-epochs",
        "6",
        "--checkpoint",
    ]
    metrics = main.main(flags)
    folder = run_folder(flags)
    assert metrics.acc > 0.5, "chance is a third"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "args.json",
        "history.jsonl",
        "metrics.json",
        "predictions.safetensors",
        "log.txt",
        "adapter_model.safetensors",
        "adapter_config.json",
        "bayes_config.json",
    }
    stored = json.loads((folder / "metrics.json").read_text())
    block = stored["datasets"]["bbc_headlines"]
    assert block["n_examples"] == 37 and block["n_draws"] == 1 and stored["updates"] == 30
    assert block["acc"] == metrics.acc and block["nll"] == metrics.nll
    predictions = load_file(folder / "predictions.safetensors")
    assert predictions["log_probs"].shape == (37, 1, 5)
    assert predictions["index"].tolist() == list(range(37))
    losses = [line["nll"] for line in history(folder)]
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert "ACC" in (folder / "log.txt").read_text()


def test_max_train_steps_counts_updates_exactly(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "7"]
    main.main(flags)
    steps = [line["step"] for line in history(run_folder(flags))]
    assert steps == list(range(1, 8))


def test_accumulated_gradients_equal_one_large_batch(causal_flags):
    base = [*causal_flags, "--modelwrapper", "mle", "--n-epochs", "2", "--opt", "sgd"]
    base += ["--limit-train", "37"]
    large = train([*base, "--batch-size", "12", "--log-path", "large"])
    small = train([*base, "--batch-size", "4", "--grad-accum-steps", "3", "--log-path", "small"])
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["mle", "blob"])
def test_gradient_checkpointing_changes_nothing(causal_flags, method, monkeypatch):
    """The forward is run again in backward, with the same noise; `replays` counts that it is."""
    replays = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        lambda *args, **kwargs: replays.append(1) or original(*args, **kwargs),
    )
    base = [*causal_flags, "--modelwrapper", method, "--max-train-steps", "4"]
    base += ["--lora-dropout", "0.2", "--bayes-train-n-samples", "2"]
    plain = train([*base, "--log-path", "plain"])
    assert not replays
    _, _, wrapper = build([*base, "--gradient-checkpointing", "--log-path", "other"])
    assert any(getattr(m, "gradient_checkpointing", False) for m in wrapper.modules())
    checkpointed = train([*base, "--log-path", "checkpointed", "--gradient-checkpointing"])
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value)


def test_the_seed_of_the_data_changes_the_order_only(causal_flags):
    base = [*causal_flags, "--modelwrapper", "mle"]
    _, first, one = build([*base, "--max-train-steps", "1", "--seed-data", "1"])
    _, second, two = build([*base, "--max-train-steps", "1", "--seed-data", "2"])
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = (next(iter(d.train_dataloader))["index"].tolist() for d in (first, second))
    assert a != b


def test_evaluating_while_training_does_not_change_training(causal_flags):
    base = [
        *causal_flags,
        "--modelwrapper",
        "mle",
        "--max-train-steps",
        "5",
        "--lora-dropout",
        "0.2",
    ]
    never = train([*base, "--log-path", "never", "--eval-per-steps", "0"])
    often = train([*base, "--log-path", "often", "--eval-per-steps", "1"])
    for key, value in never.items():
        assert torch.equal(often[key], value), key
    flags = [*base, "--log-path", "often", "--eval-per-steps", "1"]
    assert [line["step"] for line in history(run_folder(flags)) if "eval" in line] == [1, 2, 3, 4]


def test_early_stop_ends_a_longer_schedule(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "20"]
    flags += ["--early-stop-steps", "5"]
    main.main(flags)
    lines = history(run_folder(flags))
    assert len(lines) == 5
    assert lines[-1]["lr"]["lora"] == pytest.approx(1e-2 * (20 - 4) / 20)


def test_nan_loss_stops_the_run_with_step_and_rows(causal_flags, monkeypatch):
    from modelwrappers.wrapperbase import WrapperBase

    original = WrapperBase.batch_logits

    def poisoned(self, batch):
        logits = original(self, batch)
        return logits * float("nan") if self.training and self.step == 3 else logits

    monkeypatch.setattr(WrapperBase, "batch_logits", poisoned)
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "7"]
    with pytest.raises(RunError, match=r"nan at update 4, on the rows \[\d+(, \d+){7}\]"):
        main.main(flags)
    assert len(history(run_folder(flags))) == 3


def test_a_diverging_kl_is_named_as_such(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "7"]
    with pytest.raises(
        RunError, match=r"at update 2.*or lower the learning rates \(--lr, --bayes-kllr\)"
    ):
        main.main([*flags, "--bayes-kllr", "1e25"])


def test_only_lora_parameters_move(causal_flags):
    _, _, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"])
    before = {name: p.detach().clone() for name, p in wrapper.named_parameters()}
    wrapper.fit_evaluate()
    moved = {n for n, p in wrapper.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert {n for n in before if "lora_" in n} == moved


def test_padding_does_not_change_a_prediction(causal_flags):
    """Rows of one length or padded to 300: the same class probabilities."""
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "0"]
    _, dataset, wrapper = build(flags)
    _, padded, _ = build([*flags, "--pad-to-max-length"])
    a = wrapper.predict(dataset.test_dataloader).log_probs
    b = wrapper.predict(padded.test_dataloader).log_probs
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logits_to_keep_gives_the_logits_of_the_whole_sequence(causal_flags):
    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "0"])
    wrapper.eval()
    inputs = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    whole = wrapper.class_logits(wrapper.base_model(**inputs))
    torch.testing.assert_close(wrapper.batch_logits(inputs), whole, rtol=1e-5, atol=1e-6)


def test_evaluate_restores_the_mode_it_found(causal_flags):
    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "0"])
    for mode in (True, False):
        wrapper.train(mode)
        wrapper.evaluate(dataset.test_dataloader)
        assert wrapper.training is mode


def test_config_runs_a_stored_run_again(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "4"]
    first = main.main(flags)
    stored = run_folder(flags) / "args.json"
    assert main.main(["--config", str(stored), "--log-path", "again"]) == first


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
@pytest.mark.parametrize("method", ["map", "blob"])
def test_shifted_data_is_evaluated_in_the_same_run_as_in_two_steps(kind, method, request, tmp_path):
    """Train on headlines, test on bodies: --ood-datasets, and --load-lora-path as a second run."""
    from conftest import topic_rows, write_jsonl

    for name, seed in (("bbc_headlines", 0), ("bbc_bodies", 5)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", topic_rows(40, seed))
        write_jsonl(tmp_path / name / "test.jsonl", topic_rows(21, seed + 1))
    flags = [*request.getfixturevalue(kind), "--data-dir", str(tmp_path), "--modelwrapper", method]
    trained = [*flags, "--max-train-steps", "6", "--checkpoint", "--ood-datasets", "bbc_bodies"]
    main.main(trained)
    folder = run_folder(trained)
    blocks = json.loads((folder / "metrics.json").read_text())["datasets"]
    assert blocks.keys() == {"bbc_headlines", "bbc_bodies"}
    one = load_file(folder / "predictions-bbc_bodies.safetensors")
    assert blocks["bbc_bodies"]["n_examples"] == len(one["labels"]) == 21
    second = [*flags, "--dataset", "bbc_bodies", "--load-lora-path", str(folder)]
    second += ["--max-train-steps", "0"]
    main.main(second)
    two = load_file(run_folder(second) / "predictions.safetensors")
    torch.testing.assert_close(one["log_probs"], two["log_probs"], rtol=1e-5, atol=1e-6)


def test_a_classifier_is_not_evaluated_on_other_classes(classifier_flags):
    from utils.errors import UsageError

    flags = [*classifier_flags, "--modelwrapper", "mle", "--ood-datasets", "rte"]
    flags += ["--max-train-steps", "1"]
    with pytest.raises(UsageError, match=r"--ood-datasets rte has the classes entailment"):
        main.main(flags)
