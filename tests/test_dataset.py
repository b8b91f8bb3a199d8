"""Rows to batches: prompts, answer tokens, padding, truncation, orders, messages."""

import json
import os
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import topic_rows, write_jsonl

from dataset import MultipleChoice, SequenceClassification
from dataset.batches import EvalBatches, TrainBatches
from dataset.sources import load_rows
from dataset.tasks import CLASSIFICATION_TASKS, MULTIPLE_CHOICE_TASKS
from main import main, parse_args
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
        [
            *("--dataset-type", "mcdataset", "--dataset", task, "--model", model),
            *("--modelwrapper", "mle", "--data-dir", str(folder), "--batch-size", "8"),
            *flags,
        ]
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
        [
            *["--dataset-type", "bertds", "--dataset", "rte", "--modelwrapper", "mle"],
            *("--model", tiny_bert, "--data-dir", str(tmp_path)),
        ]
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
        [
            *["--dataset-type", "bertds", "--dataset", "bbc_headlines", "--modelwrapper", "mle"],
            *("--model", tiny_bert, "--data-dir", data_dir, "--pad-to-max-length"),
        ]
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
        [
            *["--dataset-type", "mcdataset", "--dataset", "obqa", "--modelwrapper", "mle"],
            *("--model", tiny_llama),
        ]
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

    for version, number in ((1, 2096), (2, 2064)):
        articles = bbc_articles(version)
        tests = [article for article in articles if article["split"] == "test"]
        assert (len(articles), len(tests)) == (number, 500)
        assert tests[0]["headline"] == "Continental 'may run out of cash'"
        assert len({article["headline"] for article in articles}) == number


def test_no_training_article_repeats_a_body_and_the_others_are_those_of_before():
    """The test set and the first 243 training articles, which older numbers are of, stay."""
    from utils.embedded import bbc_articles

    old, new = bbc_articles(1), bbc_articles()
    assert new[: 500 + 243] == old[: 500 + 243]
    kept = iter(new)
    left_out = []
    waiting = next(kept)
    for article in old:
        if article == waiting:
            waiting = next(kept, None)
        else:
            left_out.append(article)
    bodies = {article["body"] for article in new}
    assert len(left_out) == 32 and all(article["body"] in bodies for article in left_out)
    train = [article["body"] for article in new if article["split"] == "train"]
    test = {article["body"] for article in new if article["split"] == "test"}
    assert len(set(train)) == len(train) and not test & set(train)
    assert {article["split"] for article in left_out} == {"train"}


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
        [
            *["--dataset-type", "bertds", "--dataset", "rte", "--modelwrapper", "mle"],
            *("--model", tiny_bert, "--data-dir", str(tmp_path)),
            *("--ood-ori-dataset", "bbc_headlines"),
        ]
    )
    with pytest.raises(UsageError, match="cannot change its classes"):
        SequenceClassification(args, accelerator())


# --- files that are damaged, or no files --------------------------------------------------------


def rows_of(folder, task: str = "bbc_headlines", split: str = "train") -> list[dict]:
    found = {**CLASSIFICATION_TASKS, **MULTIPLE_CHOICE_TASKS}[task]
    return [row for _, row in load_rows(None, split, str(folder), task, found.example)]


def refused(folder, words: str, **kwargs) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        rows_of(folder, **kwargs)
    assert len(str(caught.value)) < 1000


HEAD = "text,topic\n"


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("jsonl", "[" * 100_000, "train.jsonl:1: nested deeper"),
        ("jsonl", '{"a":' * 100_000 + "1" + "}" * 100_000, "train.jsonl:1: nested deeper"),
        ("jsonl", '{"text": "a", "topic": "tech", "text": "b"}', "key 'text' stands .* twice"),
        ("jsonl", '{"a": {"b": 1, "b": 2}}', "key 'b' stands .* twice"),
        ("jsonl", '{"x": NaN}', "NaN is no value of JSON"),
        ("jsonl", '{"x": -Infinity}', "-Infinity is no value of JSON"),
        ("jsonl", '{"x": ' + "9" * 5000 + "}", "train.jsonl:1: not valid JSON"),
        ("jsonl", '\n\n{"x": "a\0b"}', "train.jsonl:3: not valid JSON"),
        ("jsonl", " \n\t\n", "has no rows"),
        ("json", "", "not valid JSON"),
        ("json", "[]", "has no rows"),
        ("json", '{"text": "a"}', "must hold a list"),
        ("json", "[" * 100_000 + "]" * 100_000, "nested deeper"),
        ("csv", "", "has no rows"),
        ("csv", HEAD, "has no rows"),
        ("csv", ",\na,tech\n", "train.csv:1: the header names no column"),
        ("csv", "text,topic,text\na,tech,b\n", "train.csv:1: the column 'text' stands there twice"),
        ("csv", HEAD + 'a,tech\n"b,tech\nc,tech\nd,tech\n', "train.csv:3: .*never closed"),
        ("csv", HEAD + '"a,tech\nb,"sports"\n', "train.csv:2: "),
        ("csv", HEAD + "a,tech\na, b,tech\n", "train.csv:3: the row has 3 cells, the header has 2"),
        ("csv", HEAD + "a,tech\nb\n", "train.csv:3: the row has 1 cells"),
        ("csv", HEAD + "a\0,tech\n", "NUL characters"),
        ("parquet", "", "cannot be read as parquet"),
        ("parquet", "PAR1 and no more PAR1", "cannot be read as parquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, suffix, content, words):
    (tmp_path / f"train.{suffix}").write_text(content)
    refused(tmp_path, words)


def test_a_cell_may_be_as_long_as_a_line(tmp_path, monkeypatch):
    text = "x" * 200_000
    (tmp_path / "train.csv").write_text(HEAD + f"{text},tech\n")
    (_, row), *_ = load_rows(None, "train", str(tmp_path), "mine", {"text": "x"})
    assert row["text"] == text
    monkeypatch.setattr("dataset.files.LONGEST_LINE", 100_000)
    refused(tmp_path, "train.csv:2: 100000 characters or more")


def test_utf16_is_no_text_that_is_read(tmp_path):
    (tmp_path / "train.csv").write_bytes((HEAD + "a,tech\n").encode("utf-16"))
    refused(tmp_path, "train.csv is not UTF-8")
    (tmp_path / "train.csv").write_bytes((HEAD + "a,tech\n").encode("utf-16-le"))
    refused(tmp_path, "UTF-16")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_line_ends_and_empty_lines_of_a_csv_change_nothing(tmp_path, end, mark):
    lines = [mark + "text,topic", "", '"a ""b"", c",tech', "   ", "d\u2028e,sports", ""]
    (tmp_path / "train.csv").write_bytes(end.join(lines).encode())
    expected = [
        {"text": 'a "b", c', "topic": "tech"},
        {"text": "d\u2028e", "topic": "sports"},
    ]
    assert rows_of(tmp_path) == expected


def test_the_index_column_of_pandas_is_left_out(tmp_path):
    (tmp_path / "train.csv").write_text(",text,topic\n0,a,tech\n1,b,tech\n")
    assert rows_of(tmp_path) == [{"text": text, "topic": "tech"} for text in "ab"]


@pytest.mark.parametrize("cell", ["[]", "{}", '["a"]', '{"text": 1}', "[" * 100_000])
def test_a_text_column_of_a_csv_is_text_whatever_it_looks_like(tmp_path, cell):
    quoted = cell.replace('"', '""')
    (tmp_path / "train.csv").write_text(f'{HEAD}"{quoted}",tech\n')
    assert rows_of(tmp_path) == [{"text": cell, "topic": "tech"}]


def test_a_line_separator_inside_of_a_string_is_no_line(tmp_path):
    text = '{"text": "a\u2028b\u0085c", "topic": "tech"}\r\n'
    (tmp_path / "train.jsonl").write_bytes(("\ufeff" + text * 2).encode())
    assert rows_of(tmp_path) == [{"text": "a\u2028b\u0085c", "topic": "tech"}] * 2


def test_two_files_of_one_split_are_ambiguous(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", topic_rows(2))
    (tmp_path / "train.csv").write_text(HEAD)
    refused(tmp_path, r"has train.jsonl and train.csv; keep one of them")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "loop", "dangling"])
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(tmp_path, suffix, kind):
    file = tmp_path / f"train.{suffix}"
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(file))
        server.close()
    else:
        file.symlink_to(file if kind == "loop" else tmp_path / "nothing")
    refused(tmp_path, f"train.{suffix}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_message(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", topic_rows(2))
    (tmp_path / "train.jsonl").chmod(0)
    refused(tmp_path, "train.jsonl cannot be read")


@pytest.mark.parametrize("folder", ["{}/nothing", "{}/file", "{}/" + "x" * 300, "a\0b", "\ud800"])
def test_a_folder_that_is_none_is_one_message(tmp_path, folder):
    (tmp_path / "file").touch()
    refused(folder.format(tmp_path), "there is no folder")


def parquet(folder, **columns) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")


def test_parquet_columns_of_other_types_are_named(tiny_llama, tmp_path):
    import datetime

    for value in (b"bytes", datetime.date(2020, 1, 1), 5, {"a": 1}, ["a"], datetime.timedelta(1)):
        parquet(tmp_path, text=[value], topic=["tech"])
        with pytest.raises(UsageError, match=r"train.parquet row 1: .*column 'text' is .*be text"):
            _ = multiple_choice(tiny_llama, tmp_path).train_rows


def test_a_column_that_stands_twice_in_parquet_is_an_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    refused(tmp_path, "the column 'text' stands there twice")


def test_a_folders_name_is_no_column_of_parquet(tmp_path):
    (tmp_path / "topic=tech").mkdir()
    parquet(tmp_path / "topic=tech", text=["a"])
    assert rows_of(tmp_path / "topic=tech") == [{"text": "a"}]


def test_a_missing_number_of_parquet_is_missing(tiny_bert, tmp_path):
    parquet(tmp_path, sentence=["a", "b"], label=[1.0, float("nan")])
    with pytest.raises(UsageError, match="row 2: column 'label' is missing"):
        _ = classifier(tiny_bert, tmp_path, task="sst2").train_rows


# --- values of rows ------------------------------------------------------------------------------


def classifier(model: str, folder, *flags: str, task: str = "bbc_headlines"):
    args = parse_args(
        [
            *("--dataset-type", "bertds", "--dataset", task, "--model", model),
            *("--modelwrapper", "mle", "--data-dir", str(folder)),
            *flags,
        ]
    )
    return SequenceClassification(args, accelerator())


@pytest.mark.parametrize(
    "label", [0.7, True, False, "0.7", "1.0", "one", "²", "١", [1], {}, -1, 2, 1e308, 10**4000, ""]
)
def test_a_label_that_is_no_index_is_named(tiny_bert, tmp_path, label):
    row = {"sentence1": "bank", "sentence2": "goal", "label": label}
    write_jsonl(tmp_path / "train.jsonl", [row | {"label": 1}, row])
    with pytest.raises(UsageError, match=r"train.jsonl:2: unknown label .*'label' is") as caught:
        _ = classifier(tiny_bert, tmp_path, task="rte").train_rows
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("label", [1, 1.0, "1", " 1 "])
def test_whole_numbers_are_labels_also_as_text_or_as_pandas_has_them(tiny_bert, tmp_path, label):
    row = {"sentence1": "bank", "sentence2": "goal", "label": label}
    write_jsonl(tmp_path / "train.jsonl", [row])
    assert classifier(tiny_bert, tmp_path, task="rte").train_rows[0]["labels"] == 1


FOUR = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
BEYOND = [
    ("ARC-Easy", {"question": "q", "choices": FOUR, "answerKey": "E"}),
    ("ARC-Easy", {"question": "q", "choices": FOUR, "answerKey": "5"}),
    ("ARC-Easy", {"question": "q", "choices": FOUR, "answerKey": 5}),
    ("commonsense_qa", {"question": "q", "choices": FOUR, "answerKey": "E"}),
    ("obqa", {"question_stem": "q", "choices": {"text": ["a", "b"]}, "answerKey": "C"}),
    ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": "2"}),
    ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": "-1"}),
]


@pytest.mark.parametrize(("task", "row"), BEYOND)
def test_an_answer_beyond_the_rows_own_choices_is_an_error(tiny_llama, tmp_path, task, row):
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(UsageError, match=r"train.jsonl:1: unknown label .* choice '?-?\d'? of \d"):
        _ = multiple_choice(tiny_llama, tmp_path, task=task).train_rows


@pytest.mark.parametrize(
    "choices",
    [
        [],
        "abcd",
        {"text": []},
        {"label": ["A"]},
        {"text": "ab"},
        {"text": ["a", 5]},
        {"text": ["a", None]},
        {"text": ["a", ["b"]]},
        {"text": ["a"] * 6},
        {"text": ["a", "b"], "label": ["B", "A"]},
        {"text": ["a", "b"], "label": ["A"]},
        {"text": ["a", "b"], "label": "AB"},
        {"text": ["a", "\ud800"]},
        5,
    ],
)
def test_choices_of_another_kind_are_named_by_column(tiny_llama, tmp_path, choices):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "choices": choices, "answerKey": "A"}])
    with pytest.raises(UsageError, match=r"train.jsonl:1: .*column 'choices'"):
        _ = multiple_choice(tiny_llama, tmp_path, task="ARC-Easy").train_rows


@pytest.mark.parametrize("text", [5, 0.5, True, ["a"], {"a": 1}, "\ud800", "a\udfffb", "", " \n"])
def test_a_text_column_without_text_is_named(tiny_llama, tiny_bert, tmp_path, text):
    write_jsonl(tmp_path / "train.jsonl", [{"text": text, "topic": "tech"}])
    for kind, model in ((multiple_choice, tiny_llama), (classifier, tiny_bert)):
        with pytest.raises(UsageError, match=r"train.jsonl:1: .*(column 'text'|no text)"):
            _ = kind(model, tmp_path).train_rows


def test_one_of_two_sentences_may_be_empty(tiny_bert, tmp_path):
    """Some of QQP's are."""
    row = {"question1": "bank", "question2": "", "label": 0}
    write_jsonl(tmp_path / "train.jsonl", [row])
    assert classifier(tiny_bert, tmp_path, task="qqp").num_samples == 1


def test_a_row_of_three_megabytes_is_cut_in_the_message(tiny_bert, tmp_path):
    write_jsonl(
        tmp_path / "train.jsonl", [{"extra": "x" * 3_000_000, "text": "a", "topic": "cooking"}]
    )
    with pytest.raises(UsageError, match=r"train.jsonl:1") as caught:
        _ = classifier(tiny_bert, tmp_path).train_rows
    assert len(str(caught.value)) < 1000


# --- lengths --------------------------------------------------------------------------------------


def without_limit(model: str, folder):
    """The model, with a tokenizer that knows no limit (as many have it, 10^30)."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("model_max_length")
    file.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("family", "most"), [("tiny_bert", 96), ("tiny_roberta", 95)])
def test_an_encoder_reads_as_many_tokens_as_it_has_positions(request, tmp_path, family, most):
    model = without_limit(request.getfixturevalue(family), tmp_path / "model")
    rows = [{"text": "bank " * 500, "topic": "business"}, {"text": "goal", "topic": "sports"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    dataset = classifier(model, tmp_path, "--max-seq-len", "400")
    assert [len(row["input_ids"]) for row in dataset.train_rows] == [most, 3]
    flags = ["--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", model]
    flags += ["--data-dir", str(tmp_path), "--max-seq-len", "400", "--modelwrapper", "mle"]
    flags += ["--output-dir", str(tmp_path / "out"), "--device", "cpu", "--nowand"]
    main([*flags, "--max-train-steps", "1", "--batch-size", "2", "--pad-to-max-length"])


def test_multiple_choice_keeps_to_what_model_and_tokenizer_take(tiny_llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "tech " * 900, "topic": "tech"}])
    long = ["--max-seq-len", "2000"]

    def length() -> int:
        dataset = multiple_choice(str(model), tmp_path / "data", *long)
        row = dataset.train_rows[0]["input_ids"]
        assert dataset.tokenizer.decode(row).endswith("\nTopic:")
        return len(row)

    assert 500 < length() <= 512, "the model's positions"
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 200}))
    assert 190 < length() <= 200, "the tokenizer's limit"


def test_a_question_that_the_model_cannot_take_says_whose_limit_it_is(tiny_llama, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ARC_ROW | {"question": "what " * 600}])
    with pytest.raises(UsageError, match=r"the question alone .* the model has 512 positions"):
        _ = multiple_choice(
            tiny_llama, tmp_path, "--max-seq-len", "2000", task="ARC-Easy"
        ).train_rows


@pytest.mark.parametrize("most", ["1", "2"])
def test_a_length_that_leaves_no_text_is_an_error(tiny_bert, data_dir, most):
    with pytest.raises(UsageError, match=rf"--max-seq-len is {most}, which leaves nothing"):
        _ = classifier(tiny_bert, data_dir, "--max-seq-len", most).train_rows


# --- a task of a user's own -----------------------------------------------------------------------

OWN = (
    "import dataclasses, sys\nfrom dataset.tasks import *\n"
    "TASK = dataclasses.replace(MULTIPLE_CHOICE_TASKS['bbc_headlines'], {})\n"
)


def own_task(folder, fields: str) -> str:
    file = folder / f"mine{hash(fields) % 10**9}.py"
    file.write_text(OWN.format(fields))
    return f"{file}:TASK"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "5"),
        ("name", "''"),
        ("name", "'../x'"),
        ("name", "'a/b'"),
        ("name", "'.'"),
        ("name", "'x' * 300"),
        ("name", "'a\\0b'"),
        ("source", "'bbc'"),
        ("source", "Hub(5)"),
        ("source", "HubGroup('a/b', 'c')"),
        ("splits", "'train'"),
        ("splits", "{}"),
        ("splits", "{'train': '../train'}"),
        ("splits", "{'training': 'train'}"),
        ("splits", "{'train': 5}"),
        ("columns", "'text'"),
        ("columns", "('text', 5)"),
        ("choices", "'ABCD'"),
        ("choices", "('a',)"),
        ("choices", "('a', 'a')"),
        ("choices", "('a', 5)"),
        ("choices", "('a', '')"),
        ("choices", "('a', '\\ud800')"),
        ("choices", "None"),
        ("prompt", "'text'"),
        ("label", "3"),
        ("published", "{'x': {}}"),
        ("published", "{'choice_format': {'x': 1}}"),
        ("published", "{'boolq_tokens': {'choices': 'AB'}}"),
        ("eos_published", "1"),
        ("text_columns", "'text'"),
        ("example", "'row'"),
    ],
)
def test_a_field_of_a_users_record_that_breaks_its_rule_is_named(
    tiny_llama, data_dir, tmp_path, field, value
):
    task = own_task(tmp_path, f"{field}={value}")
    with pytest.raises(UsageError, match=rf"mine\d+.py:TASK': the field '{field}' is .*must be"):
        multiple_choice(tiny_llama, data_dir, task=task)


def test_lists_of_a_users_record_are_as_good_as_tuples(tiny_llama, data_dir, tmp_path):
    task = own_task(tmp_path, "choices=list(TOPICS), columns=['text', 'topic']")
    assert multiple_choice(tiny_llama, data_dir, task=task).num_samples == 40


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("prompt=lambda row: None", "gives None; a causal LM reads a Prompt"),
        ("prompt=lambda row: 'abc'", "gives 'abc'; a causal LM reads a Prompt"),
        ("prompt=lambda row: ('a', 'b')", "a causal LM reads a Prompt"),
        ("prompt=lambda row: ('a', 'b', 'c')", "a causal LM reads a Prompt"),
        ("prompt=lambda row: Prompt('a', 5, 'c')", "the prompt's context is 5; it must be text"),
        ("prompt=lambda row: Prompt('a', '\\ud800', 'c')", "half a surrogate"),
        ("prompt=lambda row: Prompt('', '', '')", "no tokens"),
        ("prompt=lambda row: row['nothing']", "KeyError: 'nothing'"),
        ("prompt=lambda row: 1 / 0", "ZeroDivisionError"),
        ("prompt=lambda row: sys.exit(0)", "SystemExit: 0"),
        ("label=lambda row: sys.exit()", "SystemExit"),
        ("label=lambda row: True", "the label is True"),
        ("label=lambda row: 0.0", "TypeError"),
        ("label=lambda row: '1'", "TypeError"),
        ("label=lambda row: None", "TypeError"),
        ("label=lambda row: 5", "5 is not between 0 and 4"),
        ("label=lambda row: -1", "-1 is not between"),
        ("label=lambda row: row[::2]", "TypeError|KeyError"),
    ],
)
def test_what_a_users_functions_give_is_checked_row_by_row(
    tiny_llama, data_dir, tmp_path, function, words
):
    dataset = multiple_choice(tiny_llama, data_dir, task=own_task(tmp_path, function))
    with pytest.raises(UsageError, match=rf"train.jsonl:1: .*({words})"):
        _ = dataset.train_rows


@pytest.mark.parametrize("value", ["__import__('numpy').int64(2)", "__import__('torch').tensor(2)"])
def test_indices_of_other_libraries_are_labels(tiny_llama, data_dir, tmp_path, value):
    task = own_task(tmp_path, f"label=lambda row: {value}")
    row = multiple_choice(tiny_llama, data_dir, task=task).train_rows[0]
    assert type(row["labels"]) is int and row["labels"] == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            "MULTIPLE_CHOICE_TASKS['bbc_headlines'].prompt",
            "a Prompt is for --dataset-type mcdataset",
        ),
        ("lambda row: row['text']", "a tuple of one or two sentences"),
        ("lambda row: ('a', 'b', 'c')", "a tuple of one or two sentences"),
        ("lambda row: ()", "there is no text in it"),
        ("lambda row: ('a', None)", "sentence 2 is None; it must be text"),
        ("lambda row: None", "a tuple of one or two sentences"),
    ],
)
def test_a_classifier_reads_sentences_and_nothing_else(
    tiny_bert, data_dir, tmp_path, prompt, words
):
    """A Prompt's three parts would be read as sentence, second sentence, and nothing."""
    task = own_task(tmp_path, f"prompt={prompt}")
    with pytest.raises(UsageError, match=rf"train.jsonl:1: .*{words}"):
        _ = classifier(tiny_bert, data_dir, task=task).train_rows


def test_a_source_of_a_users_own_gives_rows(tiny_llama, tmp_path):
    source = "type('S', (), {'rows': lambda self, split: [('here', %s)]})()"
    row = "{'text': 'a', 'topic': 'tech'}"
    flags = ["--dataset-type", "mcdataset", "--model", tiny_llama, "--modelwrapper", "mle"]

    def dataset(row: str) -> MultipleChoice:
        task = own_task(tmp_path, f"source={source % row}")
        return MultipleChoice(parse_args([*flags, "--dataset", task]), accelerator())

    assert dataset(row).num_samples == 1
    with pytest.raises(UsageError, match="here: a row must be an object, but is str"):
        _ = dataset("'text'").train_rows
    task = own_task(tmp_path, "source=None")
    with pytest.raises(UsageError, match="names no source of its rows; pass --data-dir"):
        _ = MultipleChoice(parse_args([*flags, "--dataset", task]), accelerator()).train_rows


# --- names that would share a block of metrics.json -----------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        ["bbc_headlines"],
        ["BBC_Headlines"],
        ["bbc_bodies", "bbc_bodies"],
        ["bbc_bodies", "BBC_BODIES"],
        ["{same}"],
        ["bbc_bodies", "{bodies}"],
        ["{held_out}"],
    ],
)
def test_shifted_sets_of_one_name_are_refused(causal_flags, tmp_path, others):
    files = {
        "same": own_task(tmp_path, "name='bbc_headlines'"),
        "bodies": own_task(tmp_path, "name='Bbc_Bodies'"),
        "held_out": own_task(tmp_path, "name='held_out'"),
    }
    names = [name.format(**files) for name in others]
    flags = [*causal_flags, "--modelwrapper", "mle", "--ood-datasets", *names]
    with pytest.raises(UsageError, match=r"--ood-datasets .* there already are some of"):
        main(flags)
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_record_in_a_file_keeps_its_name_from_shifted_sets(causal_flags, tmp_path):
    task = own_task(tmp_path, "name='mine'")
    for other in (task, own_task(tmp_path, "name='TASK'"), own_task(tmp_path, "name='Mine'")):
        flags = [*causal_flags, "--modelwrapper", "mle", "--dataset", task, "--ood-datasets", other]
        with pytest.raises(UsageError, match="there already are some of"):
            main(flags)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def reachable(monkeypatch):
    """Asks anew, of an address of the test's own; whatever is found out is forgotten again."""
    import datasets.config
    import huggingface_hub.constants

    from utils.hub import go_offline_if_unreachable

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def ask(address: str) -> bool:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        go_offline_if_unreachable.cache_clear()
        go_offline_if_unreachable(timeout=0.5)
        return not huggingface_hub.constants.HF_HUB_OFFLINE

    yield ask
    go_offline_if_unreachable.cache_clear()


def test_a_hub_that_takes_connections_and_says_nothing_is_not_waited_for(reachable):
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.perf_counter()
        assert not reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.perf_counter() - started < 2


def test_a_hub_that_answers_is_reachable(reachable):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        assert reachable(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    "address", ["", "hub", "http://", "http://host:port", "ftp://host", "http://["]
)
def test_an_address_that_is_none_is_one_message(reachable, address):
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        reachable(address)


def test_errors_of_the_hub_are_one_short_line(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise RuntimeError("x" * 3_000_000 + "\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UsageError, match="RuntimeError: xxx") as caught:
        MULTIPLE_CHOICE_TASKS["obqa"].source.rows("train")
    assert len(str(caught.value)) < 1500 and "more" not in str(caught.value)
