"""--protocol original: each difference to the published runs, as a flag and in the preset."""

import json

import pytest
import torch
from conftest import build, run_folder, write_jsonl

import main
from dataset.tasks import MULTIPLE_CHOICE_TASKS
from utils.args import PROTOCOLS

ARC_ROW = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
OBQA_ROW = {
    "question_stem": "The sun is",
    "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
    "answerKey": "D",
}
BOOLQ_ROW = {"passage": "Water is wet.", "question": "is water wet", "answer": True}
WINOGRANDE_ROW = {"sentence": "_ ran.", "option1": "A", "option2": "B", "answer": "1"}


def text_of(flags, task, row, tmp_path, *more) -> tuple[str, list[str], int]:
    """(what the model reads, its answers, the label) of one row."""
    write_jsonl(tmp_path / "train.jsonl", [row])
    write_jsonl(tmp_path / "validation.jsonl", [row])
    base = [*flags, "--dataset", task, "--data-dir", str(tmp_path), "--modelwrapper", "mle"]
    _, dataset, _ = build([*base, *more])
    example = dataset.test_rows[0]
    answers = [dataset.tokenizer.decode([t]).strip() for t in dataset.target_ids.tolist()]
    return dataset.tokenizer.decode(example["input_ids"]), answers, example["labels"]


def test_the_preset_fills_in_what_is_not_given(causal_flags, classifier_flags):
    flags = [*causal_flags, "--modelwrapper", "mle"]
    for name, expected in PROTOCOLS.items():
        args = main.parse_args([*flags, "--protocol", name])
        assert {key: getattr(args, key) for key in expected} == expected
    assert main.parse_args(flags).protocol == "corrected"
    args = main.parse_args([*flags, "--protocol", "original", "--shuffle-train"])
    assert args.shuffle_train and args.drop_last
    encoder = main.parse_args(
        [*classifier_flags, "--modelwrapper", "mle", "--protocol", "original"]
    )
    assert encoder.shuffle_train and not encoder.drop_last, "the published encoder runs did so"


def test_choices_with_the_text_first(causal_flags, tmp_path):
    flag = ["--choice-format", "text_first"]
    text, _, label = text_of(causal_flags, "ARC-Easy", ARC_ROW, tmp_path, *flag)
    assert "ice) 1\nfire) 2\nsnow) 3\nAnswer:" in text and label == 1
    text, _, label = text_of(causal_flags, "obqa", OBQA_ROW, tmp_path, *flag)
    assert "w) A\nx) B\ny) C\nz) D\nAnswer:" in text and label == 3
    text, _, _ = text_of(causal_flags, "ARC-Easy", ARC_ROW, tmp_path)
    assert "A) ice\nB) fire\nC) snow\nAnswer:" in text


def test_the_tokens_of_boolq_swapped(causal_flags, tmp_path):
    _, answers, label = text_of(causal_flags, "boolq", BOOLQ_ROW, tmp_path)
    assert answers[label] == "True"
    swapped = ["--boolq-tokens", "swapped"]
    _, answers, label = text_of(causal_flags, "boolq", BOOLQ_ROW, tmp_path, *swapped)
    assert answers[label] == "False"


@pytest.mark.parametrize(
    ("task", "row", "appended"),
    [("boolq", BOOLQ_ROW, True), ("winogrande_s", WINOGRANDE_ROW, True), ("obqa", OBQA_ROW, False)],
)
def test_end_of_text_is_appended_to_boolq_and_winogrande(
    causal_flags, tmp_path, task, row, appended
):
    assert MULTIPLE_CHOICE_TASKS[task].eos_published is appended
    text, _, _ = text_of(causal_flags, task, row, tmp_path, "--append-eos")
    assert text.endswith("</s>") is appended
    text, _, _ = text_of(causal_flags, task, row, tmp_path)
    assert not text.endswith("</s>")


def test_training_in_the_order_of_the_file(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    _, dataset, _ = build([*flags, "--shuffle-train", "false"])
    rows = [int(i) for batch in dataset.train_dataloader for i in batch["index"]]
    assert rows == list(range(40))


def test_the_last_incomplete_batch_dropped(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    _, dataset, wrapper = build([*flags, "--drop-last", "--limit-train", "37"])
    assert len(dataset.train_rows) == len(dataset.test_rows) == 32, "batches of 8"
    assert wrapper.predict(dataset.test_dataloader).index.tolist() == list(range(32))


def test_members_average_logits(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "deepensemble", "--max-train-steps", "2"]
    _, dataset, wrapper = build([*flags, "--ensemble-average", "logits"])
    _, _, other = build(flags)
    for ensemble in (wrapper, other):
        ensemble.step = ensemble.last_step  # as after training: all members count
        torch.manual_seed(0)
        for name, parameter in ensemble.state_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    with torch.no_grad():
        mean = wrapper.eval().forward_logits(batch)
        members = other.eval().forward_logits(batch)
    assert members.std(1).min() > 0, "members differ"
    torch.testing.assert_close(mean, members.mean(1, keepdim=True))


def test_updates_are_rounded_up_to_whole_epochs_at_learning_rate_zero(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "7", "--checkpoint"]
    exact = main.main([*flags, "--log-path", "exact"])
    rounded = [*flags, "--whole-epochs", "--log-path", "rounded"]
    assert main.main(rounded) == exact
    lines = [json.loads(x) for x in (run_folder(rounded) / "history.jsonl").open()]
    assert len(lines) == 10, "40 rows in batches of 8"
    assert [line["lr"]["lora"] for line in lines[7:]] == [0, 0, 0]
