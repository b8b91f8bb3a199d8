"""Rows to batches: prompts, answer tokens, padding, truncation, orders, messages."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import topic_rows, write_jsonl

from dataset import MultipleChoice, SequenceClassification
from dataset.base import EvalBatches, TrainBatches
from dataset.tasks import CLASSIFICATION_TASKS, MULTIPLE_CHOICE_TASKS
from main import parse_args
from utils.errors import UsageError


def accelerator(rank: int = 0, num_processes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        process_index=rank,
        num_processes=num_processes,
        is_local_main_process=True,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )


def multiple_choice(model: str, folder, *flags: str, task: str = "bbc_headlines") -> MultipleChoice:
    args = parse_args(
        f"--dataset-type mcdataset --dataset {task} --model {model} --modelwrapper mle "
        f"--data-dir {folder} --batch-size 8".split()
        + list(flags)
    )
    return MultipleChoice(args, accelerator())


ARC_ROW = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}


def test_prompt_of_a_row_with_numeric_keys_shows_letters():
    task = MULTIPLE_CHOICE_TASKS["ARC-Easy"]
    assert "".join(task.prompt(ARC_ROW)) == (
        "Return the label of the correct answer for the question below.\n\n"
        "Question: Which is hot?\nChoices:\nA) ice\nB) fire\nC) snow\nAnswer:"
    )
    assert task.label(ARC_ROW) == 1
    assert task.label(ARC_ROW | {"answerKey": "C"}) == 2


def test_boolq_true_is_the_first_answer():
    task = MULTIPLE_CHOICE_TASKS["boolq"]
    row = {"passage": "Water is wet.", "question": "is water wet", "answer": True}
    assert task.choices[task.label(row)] == "True"
    assert "".join(task.prompt(row)).endswith("Question: is water wet\nAnswer (true or false):")


def test_every_hub_id_names_its_owner():
    for task in (*MULTIPLE_CHOICE_TASKS.values(), *CLASSIFICATION_TASKS.values()):
        path = getattr(task.source, "path", "embedded/corpus")
        assert path.count("/") == 1, "bare ids are refused by datasets >= 4"


def test_batch_keeps_the_contract(tiny_llama, data_dir):
    batch = next(iter(multiple_choice(tiny_llama, data_dir).train_dataloader))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].shape == batch["index"].shape == (8,)


def test_causal_rows_are_padded_on_the_left(tiny_llama, data_dir):
    batch = next(iter(multiple_choice(tiny_llama, data_dir).train_dataloader))
    mask = batch["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.sum(1) < mask.shape[1]).any()
    assert (mask.diff(dim=1) >= 0).all()


def test_pad_to_max_length_pads_to_it(tiny_llama, data_dir):
    loader = multiple_choice(tiny_llama, data_dir, "--pad-to-max-length").train_dataloader
    assert next(iter(loader))["input_ids"].shape[1] == 300


def test_answers_are_the_tokens_that_follow_the_prompt(tiny_llama, data_dir):
    dataset = multiple_choice(tiny_llama, data_dir)
    decoded = [dataset.tokenizer.decode([token]) for token in dataset.target_ids.tolist()]
    assert decoded == [" business", " entertainment", " politics", " sports", " tech"]


def test_answer_of_several_tokens_is_an_error(tiny_llama, data_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataset.tasks import *\nimport dataclasses\n"
        "BBC = MULTIPLE_CHOICE_TASKS['bbc_headlines']\n"
        "TASK = dataclasses.replace(BBC, choices=('tech', 'xylophone'))\n"
    )
    with pytest.raises(UsageError, match=r"'xylophone'.*not one token"):
        multiple_choice(tiny_llama, data_dir, task=f"{file}:TASK")


def test_a_task_from_a_users_file_is_used(tiny_llama, data_dir, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataset.tasks import *\nimport dataclasses\n"
        "TASK = dataclasses.replace(MULTIPLE_CHOICE_TASKS['bbc_headlines'], name='mine')\n"
    )
    assert multiple_choice(tiny_llama, data_dir, task=f"{file}:TASK").num_samples == 40


def test_truncation_cuts_the_context_only(tiny_llama, tmp_path):
    row = {"text": " ".join(["business politics"] * 50), "topic": "tech"}
    write_jsonl(tmp_path / "train.jsonl", [row])
    dataset = multiple_choice(tiny_llama, tmp_path, "--max-seq-len", "120")
    ids = dataset.train_rows[0]["input_ids"]
    text = dataset.tokenizer.decode(ids)
    assert 110 <= len(ids) <= 120
    assert text.startswith("Topics: business") and text.endswith("\nTopic:")


def test_a_question_that_does_not_fit_is_an_error(tiny_llama, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ARC_ROW])
    dataset = multiple_choice(tiny_llama, tmp_path, "--max-seq-len", "20", task="ARC-Easy")
    with pytest.raises(UsageError, match=r"train.jsonl:1: .*--max-seq-len is 20"):
        _ = dataset.train_rows


def test_sentence_pairs_carry_token_types_where_the_tokenizer_makes_them(tiny_bert, tmp_path):
    rows = [{"sentence1": "bank profit", "sentence2": "the goal", "label": 1}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    args = parse_args(
        f"--dataset-type bertds --dataset rte --model {tiny_bert} --modelwrapper mle "
        f"--data-dir {tmp_path}".split()
    )
    row = SequenceClassification(args, accelerator()).train_rows[0]
    assert len(row["input_ids"]) == 2 + 2 + 3
    assert row["labels"] == 1


def test_local_formats_hold_the_same_rows(tiny_llama, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [ARC_ROW, ARC_ROW | {"answerKey": "A"}]
    for name in ("jsonl", "json", "csv", "parquet"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "jsonl" / "train.jsonl", rows)
    (tmp_path / "json" / "train.json").write_text(json.dumps(rows))
    lines = ["question,choices,answerKey"]
    for row in rows:
        choices = json.dumps(row["choices"]).replace('"', '""')
        lines.append(f'{row["question"]},"{choices}",{row["answerKey"]}')
    (tmp_path / "csv" / "train.csv").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "train.parquet"
    )
    results = [
        multiple_choice(tiny_llama, tmp_path / name, task="ARC-Easy").train_rows
        for name in ("jsonl", "json", "csv", "parquet")
    ]
    assert all(result == results[0] for result in results) and len(results[0]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"text": "a", "topic": "tech"}\n{"text": "b"}\n',
            "train.jsonl:2: column 'topic' is missing",
        ),
        ('{"text": "a", "topic": "cooking"}\n', "train.jsonl:1: unknown label"),
        ("", "train.jsonl has no rows"),
        ('{"text": \n', "train.jsonl:1: not valid JSON"),
        ("[1, 2]\n", "train.jsonl:1: a row must be an object"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tiny_llama, tmp_path, content, words):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(UsageError, match=words):
        _ = multiple_choice(tiny_llama, tmp_path).train_rows


def test_text_in_brackets_is_text(tiny_llama, tmp_path):
    (tmp_path / "train.csv").write_text("text,topic\n[UPDATE] shares rise,business\n{x,tech\n")
    assert multiple_choice(tiny_llama, tmp_path).num_samples == 2


def test_a_list_in_a_csv_cell_is_a_list(tiny_llama, tmp_path):
    """MMLU's choices; the mark in front is Excel's."""
    text = 'question,choices,answer\nWhat?,"[""a"", ""b"", ""c"", ""d""]",2\n'
    (tmp_path / "test.csv").write_text(text, encoding="utf-8-sig")
    flags = ["--testing-set", "test"]
    dataset = multiple_choice(tiny_llama, tmp_path, *flags, task="MMLU-chem")
    prompt = dataset.tokenizer.decode(dataset.test_rows[0]["input_ids"])
    assert "B) b\nC) c" in prompt and dataset.test_rows[0]["labels"] == 2


def test_choices_that_are_no_list_are_an_error(tiny_llama, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"question": "What?", "choices": "abcd", "answer": 2}])
    with pytest.raises(UsageError, match="the choices are no list"):
        _ = multiple_choice(
            tiny_llama, tmp_path, "--testing-set", "test", task="MMLU-chem"
        ).test_rows


def test_a_users_file_that_cannot_be_imported_is_an_error(tiny_llama, tmp_path):
    (tmp_path / "broken.py").write_text("TASK = (\n")
    with pytest.raises(UsageError, match=r"broken.py cannot be imported: SyntaxError"):
        multiple_choice(tiny_llama, tmp_path, task=f"{tmp_path}/broken.py:TASK")


def test_padding_to_the_longest_keeps_to_what_an_encoder_takes(tiny_bert, data_dir):
    args = parse_args(
        f"--dataset-type bertds --dataset bbc_headlines --model {tiny_bert} --modelwrapper mle "
        f"--data-dir {data_dir} --pad-to-max-length".split()
    )
    loader = SequenceClassification(args, accelerator()).test_dataloader
    assert next(iter(loader))["input_ids"].shape[1] == 64, "model_max_length"


def test_a_file_that_is_not_utf8_is_an_error(tiny_llama, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xe9", "topic": "tech"}\n')
    with pytest.raises(UsageError, match=r"train.jsonl is not UTF-8"):
        _ = multiple_choice(tiny_llama, tmp_path).train_rows


def test_an_unreachable_hub_is_found_out_at_once(monkeypatch):
    """A port where nothing listens stands for a machine without network."""
    import time

    import datasets.config
    import huggingface_hub.constants

    from utils.hub import go_offline_if_unreachable

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    go_offline_if_unreachable.cache_clear()
    started = time.perf_counter()
    go_offline_if_unreachable()
    assert time.perf_counter() - started < 4
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    go_offline_if_unreachable.cache_clear()


def test_a_row_without_choices_is_an_error(tiny_llama, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ARC_ROW | {"choices": {"text": [], "label": []}}])
    with pytest.raises(UsageError, match=r"train.jsonl:1: .*no choices"):
        _ = multiple_choice(tiny_llama, tmp_path, task="ARC-Easy").train_rows


@pytest.mark.parametrize("key", ["E", "0", "9", "Z", ""])
def test_an_answer_outside_the_choices_is_an_error(tiny_llama, tmp_path, key):
    row = {"question_stem": "q", "choices": ARC_ROW["choices"], "answerKey": key}
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(UsageError, match=r"train.jsonl:1: unknown label"):
        _ = multiple_choice(tiny_llama, tmp_path, task="obqa").train_rows


def test_missing_split_file_names_what_was_looked_for(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"has none of train.jsonl, train.json"):
        _ = multiple_choice(tiny_llama, tmp_path).train_rows


def test_unknown_data_set_suggests_the_nearest(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'bbc_headlines'"):
        multiple_choice(tiny_llama, tmp_path, task="bbc_headline")


def test_without_network_the_message_names_the_alternatives(tiny_llama):
    args = parse_args(
        f"--dataset-type mcdataset --dataset obqa --model {tiny_llama} --modelwrapper mle".split()
    )
    with pytest.raises(
        UsageError, match=r"allenai/openbookqa.*\n.*--data-dir.*train.jsonl.*bbc_headlines"
    ):
        _ = MultipleChoice(args, accelerator()).train_rows


# --- orders -------------------------------------------------------------------------------------


def test_training_order_is_a_permutation_that_changes_with_epoch_and_seed():
    def order(seed, epoch):
        sampler = TrainBatches(37, 8, seed)
        sampler.set_position(epoch)
        return [row for batch in sampler for row in batch]

    assert sorted(order(1, 0)) == list(range(37))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_training_order_is_the_same_when_entered_in_the_middle():
    sampler = TrainBatches(37, 8, seed=1)
    whole = list(sampler)
    sampler.set_position(0, first_batch=2)
    assert list(sampler) == whole[2:]


def test_ranks_share_a_global_batch():
    one = list(TrainBatches(37, 8, seed=1))
    two = [list(TrainBatches(37, 4, seed=1, rank=rank, num_processes=2)) for rank in (0, 1)]
    assert len(two[0]) == len(two[1]) == len(one)
    for whole, left, right in zip(one, *two, strict=True):
        assert len(left) == len(right)
        assert set(left + right) >= set(whole)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_row_is_evaluated_in_the_same_batch_on_any_number_of_processes(num_processes):
    lengths = [len(row["text"]) for row in topic_rows(37)]
    samplers = [EvalBatches(lengths, 8, rank, num_processes) for rank in range(num_processes)]
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    batches = {tuple(batch) for sampler in samplers for batch in sampler}
    assert batches == {tuple(batch) for batch in EvalBatches(lengths, 8)}
    assert sorted(row for batch in batches for row in batch) == list(range(37))
    widths = [lengths[batch[0]] for batch in EvalBatches(lengths, 8)]
    assert widths == sorted(widths, reverse=True)


def test_embedded_split_never_changes():
    from utils.embedded import bbc_articles

    articles = bbc_articles()
    tests = [article for article in articles if article["split"] == "test"]
    assert (len(articles), len(tests)) == (2096, 500)
    assert tests[0]["headline"] == "Continental 'may run out of cash'"
    assert len({article["headline"] for article in articles}) == 2096


def test_an_adapters_own_answers_are_read_where_the_spaces_agree(tiny_llama, tmp_path):
    def answers(task, source):
        flags = ["--ood-ori-dataset", source]
        return multiple_choice(tiny_llama, tmp_path, *flags, task=task).task.choices

    assert answers("obqa", "ARC-Easy") == tuple("ABCDE")
    assert answers("MMLU-chem", "obqa") == tuple("ABCD")
    assert answers("ARC-Easy", "obqa") == tuple("ABCDE"), "a row may have the answer E"
    assert answers("boolq", "obqa") == ("True", "False")


def test_shifted_data_in_the_same_run_are_read_with_the_same_answers(tiny_llama, tmp_path):
    (tmp_path / "obqa").mkdir()
    flags = ["--ood-datasets", "obqa"]
    dataset = multiple_choice(tiny_llama, tmp_path, *flags, task="ARC-Easy")
    assert dataset.ood_datasets["obqa"].task.choices == tuple("ABCDE")
    assert torch.equal(dataset.ood_datasets["obqa"].target_ids, dataset.target_ids)


def test_a_classifier_cannot_take_other_classes(tiny_bert, tmp_path):
    args = parse_args(
        f"--dataset-type bertds --dataset rte --model {tiny_bert} --modelwrapper mle "
        f"--data-dir {tmp_path} --ood-ori-dataset bbc_headlines".split()
    )
    with pytest.raises(UsageError, match="cannot change its classes"):
        SequenceClassification(args, accelerator())
