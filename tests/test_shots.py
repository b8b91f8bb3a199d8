"""--num-shots: solved examples before every prompt, and rows that are nothing else then."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import build, run_folder, write_jsonl
from safetensors.torch import load_file
from test_args import BASE, message
from test_dataset import accelerator, multiple_choice
from test_records import RECORD
from test_tokenizers import EMBEDDED, FAMILIES
from transformers import AutoTokenizer

import main
from dataset import MultipleChoice, build_dataset
from dataset.shots import common_beginning, in_turns
from dataset.tasks import INSTRUCTION, MULTIPLE_CHOICE_TASKS
from main import parse_args
from modelwrappers import load_posterior
from modelwrappers.engine.posterior import PosteriorRecord
from utils.embedded import resolve_model
from utils.errors import UsageError
from utils.records import LONGEST_SHOTS, as_record

LONG = ["--max-seq-len", "2000"]
MMLU = ["--testing-set", "test"]


def text_of(dataset, row) -> str:
    return dataset.tokenizer.decode(row["input_ids"])


def indices(rows) -> set[int]:
    return {row["index"] for row in rows}


def mmlu_row(number: int, subject: str, answer: int = 0) -> dict:
    return {
        "question": f"{subject} {number}?",
        "subject": subject,
        "choices": ["a", "b", "c", "d"],
        "answer": answer,
    }


@pytest.fixture(scope="module")
def roomy(tiny_llama, tmp_path_factory) -> str:
    """The tiny model, with positions for longer prompts."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(folder)


# --- the flag -------------------------------------------------------------------------------------


def test_the_number_of_shots_is_a_whole_number_and_0_unless_given():
    assert parse_args(BASE).num_shots == 0
    assert parse_args([*BASE, "--num-shots", "5"]).num_shots == 5
    for value in ("-1", "101", "1.5", "many"):
        assert "--num-shots" in message("--num-shots", value)
    assert "did you mean '--num-shots'" in message("--num-fewshot", "3")


def test_a_classifier_takes_no_shots(classifier_flags):
    flags = [*classifier_flags, "--modelwrapper", "mle", "--num-shots"]
    with pytest.raises(UsageError, match=r"--num-shots 2 .*--dataset-type bertds .*drop"):
        main.parse_args([*flags, "2"])
    assert main.parse_args([*flags, "0"]).num_shots == 0


def store_run(folder, **changes) -> list[str]:
    """The flags of a run on the adapter of another, whose args.json is made up."""
    args = parse_args(BASE).as_dict() | changes
    content = {key: value for key, value in args.items() if value != "absent"}
    (folder / "args.json").write_text(json.dumps({"args": content, "given": {}}))
    return ["--load-lora-path", str(folder), "--modelwrapper", "mle"]


def test_the_shots_of_the_adapters_run_are_taken_over(tmp_path):
    flags = store_run(tmp_path, num_shots=4)
    assert parse_args(flags).num_shots == 4
    assert parse_args([*flags, "--num-shots", "0"]).num_shots == 0
    for older in ("absent", None):
        assert parse_args(store_run(tmp_path, num_shots=older)).num_shots == 0


def test_other_shots_than_the_adapters_hold_out_other_rows(tmp_path):
    flags = [*store_run(tmp_path, num_shots=4, hold_out=True), "--temperature-scaling"]
    assert parse_args(flags).hold_out
    with pytest.raises(UsageError, match=r"--num-shots: other rows than those"):
        parse_args([*flags, "--num-shots", "2"])
    flags = store_run(tmp_path, num_shots="absent", hold_out=True)
    assert parse_args([*flags, "--temperature-scaling"]).hold_out, "a run of before the flag"


# --- what the model reads -------------------------------------------------------------------------

TOPICS = "Topics: business, entertainment, politics, sports, tech.\n\nNews: "


def test_the_text_of_a_two_shot_prompt_of_local_rows(roomy, tmp_path):
    rows = [{"text": text, "topic": "tech"} for text in ("one", "two", "three")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a match", "topic": "sports"}])
    dataset = multiple_choice(roomy, tmp_path, "--num-shots", "2", *LONG)
    left = dataset.train_rows[0]["index"]
    first, second = sorted(
        dataset.shots.rows, key=lambda i: dataset.shots.text.index(rows[i]["text"])
    )
    assert {left, first, second} == {0, 1, 2}
    assert text_of(dataset, dataset.test_rows[0]) == (
        f"{TOPICS}{rows[first]['text']}\nTopic: tech\n\n"
        f"{TOPICS}{rows[second]['text']}\nTopic: tech\n\n"
        f"{TOPICS}a match\nTopic:"
    )
    assert len(dataset.train_rows) == 1
    assert text_of(dataset, dataset.train_rows[0]).endswith(f"{TOPICS}{rows[left]['text']}\nTopic:")


def test_the_text_of_a_two_shot_prompt_of_the_embedded_headlines(roomy):
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", roomy]
    flags += ["--modelwrapper", "mle", "--num-shots", "2", "--limit-eval", "1", *LONG]
    flags += ["--bbc-split", "1"]  # which rows are shown depends on how many there are
    dataset = MultipleChoice(parse_args(flags), accelerator())
    assert text_of(dataset, dataset.test_rows[0]) == (
        f"{TOPICS}UKIP could sue Veritas defectors\nTopic: politics\n\n"
        f"{TOPICS}Ireland surge past Scots\nTopic: sports\n\n"
        f"{TOPICS}Continental 'may run out of cash'\nTopic:"
    )


def test_shots_of_a_task_whose_context_is_in_the_middle(roomy, tmp_path):
    row = {"passage": "Water is wet.", "question": "is water wet", "answer": True}
    write_jsonl(tmp_path / "train.jsonl", [row, row])
    write_jsonl(tmp_path / "validation.jsonl", [row | {"passage": "It rains."}])
    head = (
        "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
        "Passage: "
    )
    tail = "\nQuestion: is water wet\nAnswer (true or false):"
    flags = ["--num-shots", "1", *LONG]
    dataset = multiple_choice(roomy, tmp_path, *flags, task="boolq")
    expected = f"{head}Water is wet.{tail} True\n\n{head}It rains.{tail}"
    assert text_of(dataset, dataset.test_rows[0]) == expected
    dataset = multiple_choice(roomy, tmp_path, *flags, "--append-eos", task="boolq")
    assert text_of(dataset, dataset.test_rows[0]) == f"{expected}</s>", "once, at the end"
    swapped = multiple_choice(roomy, tmp_path, *flags, "--boolq-tokens", "swapped", task="boolq")
    assert f"{tail} False\n\n" in text_of(swapped, swapped.test_rows[0]), "as they are trained on"


def test_only_a_rows_own_context_is_cut(roomy, tmp_path):
    rows = [{"text": "bank profit " * 10, "topic": "business"}] * 3
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "goal " * 300, "topic": "sports"}])
    flags = ["--num-shots", "2", "--max-seq-len", "500"]
    dataset = multiple_choice(roomy, tmp_path, *flags)
    text = text_of(dataset, dataset.test_rows[0])
    assert text.startswith(dataset.shots.text) and text.endswith("\nTopic:")
    assert 490 <= len(dataset.test_rows[0]["input_ids"]) <= 500
    assert text.count("bank profit") == 20 and 0 < text.count("goal") < 300


def test_a_prompt_that_does_not_fit_with_its_shots_says_so(roomy, data_dir):
    flags = ["--num-shots", "5", "--max-seq-len", "200"]
    with pytest.raises(UsageError, match=r"solved examples .*--num-shots 5.* --max-seq-len is 200"):
        _ = multiple_choice(roomy, data_dir, *flags).test_rows


def test_a_shot_that_alone_does_not_fit_is_named(roomy, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "bank " * 200, "topic": "business"}] * 2)
    with pytest.raises(
        UsageError, match=r"train.jsonl:\d: .*solved example.* alone has \d+ tokens"
    ):
        _ = multiple_choice(roomy, tmp_path, "--num-shots", "1").train_rows


def test_shots_that_no_record_could_hold_are_an_error(roomy, data_dir, monkeypatch):
    monkeypatch.setattr("dataset.shots.LONGEST_SHOTS", 100)
    with pytest.raises(UsageError, match=r"--num-shots: .* record takes 100"):
        _ = multiple_choice(roomy, data_dir, "--num-shots", "2", *LONG).shots


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, EMBEDDED])
@pytest.mark.parametrize("start", ["", "\n", " ", "  \n\n"], ids=repr)
def test_all_prompts_begin_with_the_tokens_of_the_shots(family, start, data_dir, monkeypatch):
    """Also where a row's prompt begins with what a tokenizer joins with a blank line."""
    path = resolve_model("smollm2-135m") if family == "smollm2" else None
    tokenizer = AutoTokenizer.from_pretrained(path) if path else FAMILIES[family]()
    task = MULTIPLE_CHOICE_TASKS["bbc_headlines"]

    def prompt(row):
        own = task.prompt(row)
        return own._replace(head=(start if "e" in row["text"] else "") + own.head)

    task_with = dataclasses.replace(task, prompt=prompt)
    monkeypatch.setitem(MULTIPLE_CHOICE_TASKS, "bbc_headlines", task_with)
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", "m"]
    flags += ["--modelwrapper", "mle", "--data-dir", data_dir, "--num-shots", "3", *LONG]
    dataset = MultipleChoice(parse_args(flags), accelerator(), tokenizer)
    shots = dataset.shots
    solved = shots.text.removesuffix("\n\n")
    assert list(shots.tokens) == tokenizer(solved).input_ids, "all of them, up to the blank line"
    for rows in (dataset.train_rows, dataset.test_rows, dataset.anchor_rows):
        assert len(rows) > 30
        assert all(tuple(row["input_ids"][: len(shots.tokens)]) == shots.tokens for row in rows)


def test_a_tokenizer_that_joins_rows_and_shots_is_an_error(roomy, data_dir):
    """None that is known does; one that writes the text's length first stands for it."""
    dataset = multiple_choice(roomy, data_dir, "--num-shots", "2", *LONG)
    own = dataset.tokenizer

    class Joins:
        unk_token_id, model_max_length = None, 10**30

        def __call__(self, text, **kwargs):
            encoded = own(text, **kwargs)
            if text.startswith(dataset.shots.text) and len(text) > len(dataset.shots.text) + 1:
                encoded["input_ids"] = [5, *encoded["input_ids"]]
            return encoded

    _ = dataset.shots
    dataset.tokenizer = Joins()
    with pytest.raises(UsageError, match=r"the tokenizer joins .*drop --num-shots"):
        _ = dataset.test_rows


def test_the_common_beginning_of_token_lists():
    assert common_beginning([1, 2, 3], [1, 2, 4, 5]) == (1, 2)
    assert common_beginning([1, 2], [1, 2, 3]) == (1, 2)
    assert common_beginning([], [1]) == () == common_beginning([1], [2])


# --- which rows -----------------------------------------------------------------------------------


def test_groups_take_turns_in_the_order_given():
    assert in_turns([4, 3, 1, 0, 2], "aabbb") == [4, 1, 3, 0, 2]
    assert in_turns(range(4), "aaaa") == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "counts"), [(3, [1, 1, 1]), (7, [2, 2, 3]), (9, [3, 3, 3])])
def test_classes_take_turns(roomy, data_dir, number, counts):
    """The rows have three topics, a third of them each."""
    shots = multiple_choice(roomy, data_dir, "--num-shots", str(number), *LONG).shots
    topics = Counter(line for line in shots.text.splitlines() if line.startswith("Topic:"))
    assert sorted(topics.values()) == counts


def test_rows_that_serve_as_shots_serve_as_nothing_else(roomy, data_dir):
    flags = ["--num-shots", "6", "--hold-out", "--testing-set", "train_val", *LONG]
    dataset = multiple_choice(roomy, data_dir, *flags)
    parts = [indices(rows) for rows in (dataset.train_rows, dataset.held_out_rows)]
    assert parts[0] | parts[1] == set(range(40)) - dataset.shots.rows
    assert not parts[0] & parts[1] and len(dataset.shots.rows) == 6
    assert indices(dataset.anchor_rows) == parts[0]
    assert indices(dataset.test_rows) == parts[1]
    assert dataset.num_samples == len(parts[0])


def test_other_rows_stay_on_their_side_whatever_the_number_of_shots(roomy, data_dir):
    without = indices(multiple_choice(roomy, data_dir, "--hold-out").held_out_rows)
    assert len(without) == 8
    for number in ("1", "6"):
        dataset = multiple_choice(roomy, data_dir, "--hold-out", "--num-shots", number, *LONG)
        assert indices(dataset.held_out_rows) == without - dataset.shots.rows


def test_more_shots_are_the_fewer_ones_and_others(roomy, data_dir):
    shots = [multiple_choice(roomy, data_dir, "--num-shots", n, *LONG).shots for n in "246"]
    assert shots[2].text.startswith(shots[1].text) and shots[1].text.startswith(shots[0].text)


def test_shots_hang_on_the_seed_of_the_split_only(roomy, data_dir):
    def text(*flags):
        return multiple_choice(roomy, data_dir, "--num-shots", "4", *LONG, *flags).shots.text

    assert text("--seed", "1") == text("--seed", "2", "--seed-data", "3", "--batch-size", "3")
    assert text("--seed-split", "1") != text()


def test_shots_are_of_the_limited_training_set(roomy, data_dir):
    flags = ["--num-shots", "3", "--limit-train", "5", *LONG]
    dataset = multiple_choice(roomy, data_dir, *flags)
    assert dataset.shots.rows < set(range(5))
    assert indices(dataset.train_rows) == set(range(5)) - dataset.shots.rows


def with_splits(monkeypatch, **splits: str) -> None:
    """Let bbc_headlines have these splits."""
    task = dataclasses.replace(MULTIPLE_CHOICE_TASKS["bbc_headlines"], splits=splits)
    monkeypatch.setitem(MULTIPLE_CHOICE_TASKS, "bbc_headlines", task)


def test_a_split_of_shots_leaves_the_training_split_whole(roomy, data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "rows")
    write_jsonl(tmp_path / "rows" / "few.jsonl", [{"text": "a chip", "topic": "tech"}])
    with_splits(monkeypatch, train="train", val="test", shots="few")
    dataset = multiple_choice(roomy, tmp_path / "rows", "--num-shots", "1")
    assert dataset.shots.text == f"{TOPICS}a chip\nTopic: tech\n\n"
    assert len(dataset.train_rows) == 40 and len(dataset.test_rows) == 37
    with_splits(monkeypatch, train="train", val="test", shots="train")
    dataset = multiple_choice(roomy, data_dir, "--num-shots", "2", "--limit-train", "5", *LONG)
    assert dataset.shots.rows == {0, 1} and indices(dataset.train_rows) == {2, 3, 4}


@pytest.mark.parametrize("number", ["5", "6"])
def test_something_must_be_left_to_train_on(roomy, data_dir, number):
    flags = ["--num-shots", number, "--limit-train", "5", *LONG]
    with pytest.raises(UsageError, match=rf"--num-shots {number}: .* 5 rows .*left to train on"):
        _ = multiple_choice(roomy, data_dir, *flags).train_rows


def test_a_row_that_is_evaluated_is_no_shot_even_in_the_same_split(roomy, data_dir, monkeypatch):
    with_splits(monkeypatch, train="train", val="train")
    dataset = multiple_choice(roomy, data_dir, "--num-shots", "4", *LONG)
    assert indices(dataset.test_rows) == set(range(40)) - dataset.shots.rows
    all_but_one = ["--num-shots", "39", "--max-seq-len", "4000"]
    (left,) = indices(multiple_choice(roomy, data_dir, *all_but_one).train_rows)
    dataset = multiple_choice(roomy, data_dir, *all_but_one, "--limit-eval", str(left))
    with pytest.raises(UsageError, match=r"--num-shots 39: all rows .* serve as solved"):
        _ = dataset.test_rows


# --- tasks without a training split ---------------------------------------------------------------


def test_mmlu_takes_the_first_rows_of_dev_in_order(roomy, tmp_path):
    dev = [mmlu_row(i, "college_chemistry", i % 2) for i in range(5)]
    write_jsonl(tmp_path / "dev.jsonl", dev)
    write_jsonl(tmp_path / "test.jsonl", [mmlu_row(9, "college_chemistry", 3)])
    flags = ["--num-shots", "2", *MMLU, *LONG]
    dataset = multiple_choice(roomy, tmp_path, *flags, task="MMLU-chem")
    choices = "Choices:\nA) a\nB) b\nC) c\nD) d\nAnswer:"
    assert text_of(dataset, dataset.test_rows[0]) == (
        f"{INSTRUCTION}Question: college_chemistry 0?\n{choices} A\n\n"
        f"{INSTRUCTION}Question: college_chemistry 1?\n{choices} B\n\n"
        f"{INSTRUCTION}Question: college_chemistry 9?\n{choices}"
    )
    five = multiple_choice(roomy, tmp_path, *flags, "--num-shots", "5", task="MMLU-chem")
    assert five.shots.rows == set(range(5))
    with pytest.raises(
        UsageError, match=r"--num-shots 6: MMLU-chem gives 5 rows of its split .dev"
    ):
        _ = multiple_choice(roomy, tmp_path, *flags, "--num-shots", "6", task="MMLU-chem").shots


def test_the_subjects_of_a_group_take_turns(roomy, tmp_path):
    names = ("law_a", "law_b", "law_c")
    write_jsonl(tmp_path / "dev.jsonl", [mmlu_row(i, name) for name in names for i in range(5)])
    flags = ["--num-shots", "4", *MMLU, *LONG]
    shots = multiple_choice(roomy, tmp_path, *flags, task="MMLU-law").shots
    asked = [line for line in shots.text.splitlines() if line.startswith("Question:")]
    assert asked == [f"Question: {name}?" for name in ("law_a 0", "law_b 0", "law_c 0", "law_a 1")]


def test_a_task_with_neither_split_is_refused_before_anything_is_loaded(causal_flags, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataset.tasks import *\nimport dataclasses\n"
        "BBC = MULTIPLE_CHOICE_TASKS['bbc_headlines']\n"
        "ONLY = dataclasses.replace(BBC, name='only', splits={'val': 'test'})\n"
    )
    flags = [*causal_flags, "--modelwrapper", "mle", "--model", "no/model", "--num-shots", "2"]
    for more in (["--dataset", f"{file}:ONLY"], ["--ood-datasets", f"{file}:ONLY"]):
        with pytest.raises(UsageError, match=r"--num-shots 2: .*only has neither .*drop"):
            main.main([*flags, *more])
    assert not (tmp_path / "out").exists()


def test_a_split_of_shots_alone_is_no_data_set(roomy, data_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataset.tasks import *\nimport dataclasses\n"
        "BBC = MULTIPLE_CHOICE_TASKS['bbc_headlines']\n"
        "TASK = dataclasses.replace(BBC, splits={'shots': 'dev'})\n"
    )
    with pytest.raises(UsageError, match=r"the field 'splits' .*'shots', if there is one"):
        multiple_choice(roomy, data_dir, task=f"{file}:TASK")


# --- shifted data ---------------------------------------------------------------------------------


def test_shifted_data_have_shots_of_their_own_whole_training_split(roomy, tmp_path):
    for name, word in (("bbc_headlines", "bank"), ("bbc_bodies", "goal")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows = [{"text": f"{word} {split} {i}", "topic": "tech"} for i in range(9)]
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    flags = ["--num-shots", "6", *LONG]
    dataset = multiple_choice(
        roomy, tmp_path, *flags, "--limit-train", "8", "--ood-datasets", "bbc_bodies"
    )
    bodies = dataset.ood_datasets["bbc_bodies"]
    assert dataset.shots.text.count("bank train") == 6 == bodies.shots.text.count("goal train")
    assert len(bodies.test_rows) == 9
    alone = multiple_choice(roomy, tmp_path, *flags, task="bbc_bodies")
    assert bodies.shots == alone.shots, "a second run on the adapter sees the same"
    assert bodies.test_rows == alone.test_rows


# --- the posterior's record -----------------------------------------------------------------------


@pytest.fixture
def trained(causal_flags, roomy):
    flags = [*causal_flags, "--modelwrapper", "map", "--model", roomy, "--num-shots", "3", *LONG]
    flags += ["--max-train-steps", "2"]
    main.main(flags)
    return flags


def test_a_posterior_with_shots_describes_itself(trained):
    folder = run_folder(trained)
    record = json.loads((folder / "bayes_config.json").read_text())
    posterior = load_posterior(folder, device="cpu")
    dataset = build_dataset(main.parse_args(trained), posterior.accelerator)
    prompt = record["prompt"]
    assert record["rows"]["num_shots"] == posterior.args.num_shots == 3
    assert prompt["shots"] == dataset.shots.text
    own = "".join(dataset.task.prompt(dataset.task.example))
    assert prompt["text"] == [prompt["shots"] + own]
    assert dataset.tokenizer(prompt["text"][0]).input_ids == prompt["input_ids"]
    assert posterior.prompt.model_dump() == prompt
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-4, atol=1e-5)


def test_a_run_on_the_adapter_prompts_alike(trained, tmp_path):
    flags = ["--load-lora-path", str(run_folder(trained)), "--modelwrapper", "map"]
    flags += ["--output-dir", str(tmp_path / "later"), "--nowand", "--device", "cpu"]
    _, dataset, wrapper = build(flags)
    assert dataset.args.num_shots == 3
    assert dataset.shots.text == load_posterior(run_folder(trained), device="cpu").prompt.shots
    assert wrapper.prompt.shots == dataset.shots.text


def test_a_record_keeps_shots_also_where_a_task_has_no_example(roomy, data_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataset.tasks import *\nimport dataclasses\n"
        "BBC = MULTIPLE_CHOICE_TASKS['bbc_headlines']\n"
        "TASK = dataclasses.replace(BBC, example=None)\n"
    )
    task = f"{file}:TASK"
    shown = multiple_choice(roomy, data_dir, "--num-shots", "2", *LONG, task=task).shown_example()
    assert shown["shots"].count("Topic:") == 2 and shown["text"] == shown["input_ids"] == []
    assert multiple_choice(roomy, data_dir, task=task).shown_example() is None


def test_a_record_of_before_the_flag_is_one_without_shots():
    prompt = {"tokenizer": "t", "text": ["a"], "input_ids": [1]}
    rows = {"max_seq_len": 100, "append_eos": True}
    record = as_record(RECORD | {"rows": rows, "prompt": prompt}, PosteriorRecord, "here")
    assert record.rows.num_shots == 0 and record.prompt.shots == ""
    assert as_record(RECORD, PosteriorRecord, "here").rows.num_shots == 0


@pytest.mark.parametrize("value", [-1, 101, 1.0, "2", True, None])
def test_a_number_of_shots_in_a_record_keeps_to_its_rule(value):
    with pytest.raises(UsageError, match="num_shots"):
        as_record(RECORD | {"rows": {"num_shots": value}}, PosteriorRecord, "here")


@pytest.mark.parametrize("value", [5, None, ["a"], "x" * (LONGEST_SHOTS + 1)])
def test_shots_in_a_record_are_text_of_bounded_length(value):
    prompt = {"tokenizer": "t", "text": ["a"], "input_ids": [1], "shots": value}
    with pytest.raises(UsageError, match="shots") as caught:
        as_record(RECORD | {"prompt": prompt}, PosteriorRecord, "here")
    assert len(str(caught.value)) < 1000
