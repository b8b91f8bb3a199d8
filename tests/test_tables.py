"""A table of a user's own as a data set: --dataset my.csv --text-column A --label-column L."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_folder, topic_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_args import message
from test_dataset import accelerator
from test_records import RECORD

import main
from dataset import DATASETS, check_data_sets
from dataset.tables import cell_text, classes_of, task_of
from dataset.tasks import Prompt, checked_task
from main import parse_args
from modelwrappers import load_posterior
from modelwrappers.engine.posterior import PosteriorRecord
from scripts import predict
from utils.args import check_own_data
from utils.data_set_names import data_set_name, is_table, same_data_set
from utils.errors import UsageError
from utils.records import as_record
from utils.table_task import Piece, TableTask, pieces_of

KINDS = ("mcdataset", "bertds")
ANSWERS = ["business", "sports", "tech"]


def write_csv(file: Path, rows: list[dict]) -> str:
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def write_parquet(file: Path, rows: list[dict]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def different_rows(number: int) -> list[dict]:
    """Each with a text of its own."""
    rows = topic_rows(number)
    return [row | {"text": f"{row['text']} {i}"} for i, row in enumerate(rows)]


def flags_of(file, *flags: str, kind: str = "mcdataset", text: str = "text") -> list[str]:
    return [
        *("--dataset-type", kind, "--dataset", str(file), "--text-column", *text.split()),
        *("--label-column", "topic", "--modelwrapper", "mle", "--nowand", *flags),
    ]


@pytest.fixture
def models(tiny_llama, tiny_bert) -> dict[str, str]:
    return {"mcdataset": tiny_llama, "bertds": tiny_bert}


@pytest.fixture
def data_set(models):
    """(file, *flags, kind=, text=) -> the data set, as a run builds it."""

    def built(file, *flags: str, kind: str = "mcdataset", text: str = "text"):
        args = parse_args([*flags_of(file, *flags, kind=kind, text=text), "--model", models[kind]])
        check_data_sets(args)
        return DATASETS[kind](args, accelerator())

    return built


@pytest.fixture
def refused(data_set):
    """The message that building the data set ends with."""

    def told(file, *flags: str, **kwargs) -> str:
        with pytest.raises(UsageError) as caught:
            found = data_set(file, *flags, **kwargs)
            _ = found.train_rows, found.test_rows
        return str(caught.value)

    return told


def texts(found, split: str) -> list[str]:
    return [row["text"] for _, row in found.rows_of(split, 0)]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my.csv", "my.CSV", "my.jsonl", "my.json", "my.parquet"])
def test_every_format_gives_the_same_task(data_set, tmp_path, name):
    rows, file = different_rows(30), tmp_path / name
    if file.suffix.lower() == ".csv":
        write_csv(file, rows)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Excel writes it
    elif file.suffix == ".parquet":
        write_parquet(file, rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        write_jsonl(file, rows)
    found = data_set(file)
    assert (found.task.name, list(found.task.choices)) == ("my", ANSWERS)
    train, val = texts(found, "train"), texts(found, "val")
    assert sorted(train + val) == sorted(row["text"] for row in rows)
    (where, row), *_ = found.rows_of("val", 0)
    head = "Choose the topic: business, sports, tech.\n\ntext: "
    assert found.task.prompt(row) == Prompt(head, row["text"], "\ntopic:"), where
    assert found.test_rows[0]["labels"] == ANSWERS.index(row["topic"])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "B", "a"], ["B", "a", "b"]),
        ([10, 9, -1, 9], ["-1", "9", "10"]),
        ([1.0, 2.5, 1, "1"], ["1", "2.5"]),
        ([True, False, True], ["false", "true"]),
        (["1", "nan", "02"], ["02", "1", "nan"]),
        ([" yes ", "no", "yes"], ["no", "yes"]),
    ],
)
def test_classes_are_sorted_and_numbers_by_value(data_set, tmp_path, labels, classes):
    write_jsonl(
        tmp_path / "my.jsonl",
        [{"text": f"match {i}", "topic": labels[i % len(labels)]} for i in range(40)],
    )
    found = data_set(tmp_path / "my.jsonl", kind="bertds")
    assert list(found.task.choices) == classes
    counts = torch.tensor([row["labels"] for row in found.train_rows]).bincount()
    assert len(counts) == len(classes) and counts.min() > 0


def test_booleans_and_numbers_of_parquet_are_classes(data_set, tmp_path):
    for name, values, classes in (("b", [True, False], ["false", "true"]), ("n", [3, 11], None)):
        rows = [{"text": f"match {i}", "topic": values[i % 2]} for i in range(30)]
        found = data_set(write_parquet(tmp_path / f"{name}.parquet", rows), kind="bertds")
        assert list(found.task.choices) == (classes or ["3", "11"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("body,topic\nx,tech\n", ["my.csv:2", "no column 'text'", "'body, topic'"]),
        ("text,topics\nx,tech\n", ["my.csv:2", "no column 'topic'", "did you mean 'topics'"]),
        ("text,topic\nx,tech\n  ,sports\n", ["my.csv:3", "no text in 'text'"]),
        ("text,topic\nx,tech\ny,\n", ["my.csv:3", "the label is missing", "'topic'"]),
        ("text,topic\nx,tech\ny, tech \n", ["'tech' in all 2 rows", "at least two classes"]),
        ("text,topic\n", ["my.csv has no rows"]),
        ("text,topic\nx,tech,1\n", ["my.csv:2", "3 cells, the header has 2"]),
        ('text,topic\nx,"a\nb"\ny,c\n', ["my.csv:2", "free text", "one line"]),
        (f"text,topic\nx,{'a ' * 60}\ny,c\n", ["my.csv:2", "free text", "100"]),
        ("text,topic\nx,tech\nx,sports\n", ["rows of my", "its 2 rows leave none", "--val-file"]),
    ],
)
def test_a_table_that_is_none_is_one_message(refused, tmp_path, content, words):
    (tmp_path / "my.csv").write_text(content)
    told = refused(tmp_path / "my.csv")
    assert all(word in told for word in words), told


def test_a_cell_of_another_type_is_named_by_line_and_column(refused, tmp_path):
    file = tmp_path / "my.jsonl"
    for column, value in (("text", ["a"]), ("topic", {"a": 1}), ("text", "\ud800")):
        rows = [{"text": "x", "topic": "tech"}, {"text": "y", "topic": "sports", column: value}]
        write_jsonl(file, rows)
        told = refused(file)
        assert f"my.jsonl:2: column '{column}'" in told
    write_jsonl(file, [{"text": "x", "topic": "tech"}, {"text": "y"}])
    assert "my.jsonl:2: there is no column 'topic'" in refused(file)
    write_jsonl(file, [{"text": "x", "topic": "tech"}, {"text": None, "topic": "sports"}])
    assert "my.jsonl:2: there is no text in 'text'" in refused(file)


@pytest.mark.parametrize("label", ["0.{:03d}", "the {} of it"])
def test_a_regression_or_free_text_is_no_classification(refused, tmp_path, label):
    rows = [{"text": f"match {i}", "topic": label.format(i)} for i in range(40)]
    told = refused(write_csv(tmp_path / "my.csv", rows))
    assert "40 different values in 40 rows" in told and "regression" in told
    with pytest.raises(UsageError, match="201 different values in 402 rows"):
        classes_of([str(i) for i in range(201)] * 2, "here")
    assert len(classes_of([str(i) for i in range(200)] * 2, "here")) == 200


def test_cells_are_text_as_json_has_them():
    values = [None, True, 1, 1.0, -0.5, 1e300, 2**70, "a"]
    assert list(map(cell_text, values)) == [
        *("", "true", "1", "1", "-0.5", "1e+300", str(2**70), "a")
    ]
    for value in (float("inf"), float("nan"), [1], {}, b"a"):
        with pytest.raises(ValueError, match="must be text"):
            cell_text(value)


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{text} Is it:", [("", False), ("text", True), (" Is it:", False)]),
        (r"a\n{{b}}{c d}", [("a\n{b}", False), ("c d", True), ("", False)]),
        ("{{{a}}}:", [("{", False), ("a", True), ("}:", False)]),
        # what `str.format` would look up is a column's name here, and there is none of it
        ("{a.__class__}", [("", False), ("a.__class__", True), ("", False)]),
        ("{a[0]!r:>9}", [("", False), ("a[0]!r:>9", True), ("", False)]),
    ],
)
def test_a_template_has_columns_braces_and_line_breaks(template, pieces):
    assert list(pieces_of(template)) == [Piece(*piece) for piece in pieces]


@given(st.text(), st.text(st.characters(exclude_characters="{}"), min_size=1))
def test_any_text_can_be_written_in_a_template(text, column):
    escaped = text.replace("{", "{{").replace("}", "}}")
    expected = text.replace(r"\n", "\n")
    assert pieces_of(escaped) == (Piece(expected),)
    before, placeholder, after = pieces_of(f"{escaped}{{{column}}}{escaped}")
    assert (before.text, after.text) == (expected, expected)
    assert placeholder == Piece(column, is_column=True)


@pytest.mark.parametrize("template", ["{", "a}", "{}", "{a", "{{a}", "{a{b}}", "a}}}"])
def test_a_brace_of_no_placeholder_is_an_error(template):
    with pytest.raises(ValueError, match="brace at character"):
        pieces_of(template)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "Topic:"], ["--prompt", "no {text}"]),
        (["--prompt", "{text} {topic}:"], ["--prompt", "the label in it"]),
        (["--prompt", "{text} {:"], ["--prompt", "brace at character 8"]),
        (["--prompt", "{text}\\nTopic: "], ["--prompt ends in white space"]),
        (["--prompt", " "], ["--prompt", "must not be empty"]),
        (["--answer-words", "A", "A"], ["--answer-words", "same word"]),
        (["--answer-words", "A", "B", "--dataset-type", "bertds"], ["--answer-words", "bertds"]),
        (["--text-column", "a", "b", "c"], ["--text-column", "two for pairs", "3"]),
        (["--text-column", "a", "a"], ["'a' is given twice"]),
        (["--text-column", "topic"], ["'topic'", "text and as label"]),
        (["--data-dir", "rows"], ["--data-dir 'rows'", "--dataset 'my.csv'"]),
        (["--val-file", "val.txt"], ["--val-file 'val.txt'", ".parquet"]),
        (["--val-file", "./my.csv"], ["--val-file './my.csv' is --dataset itself"]),
        (["--test-file", "my.csv"], ["--test-file", "--dataset itself"]),
        (["--testing-set", "test"], ["--testing-set test", "--test-file"]),
        (["--dataset", "obqa"], ["--text-column", "--dataset 'obqa' is none"]),
        (["--dataset", "my.txt"], ["--text-column", "--dataset 'my.txt' is none", ".csv"]),
        (["--ood-ori-dataset", "obqa", "--answer-words", "A", "B"], ["--ood-ori", "--answer"]),
    ],
)
def test_flags_of_a_table_that_contradict_are_named(flags, words):
    told = message(*flags, base=[*flags_of("my.csv"), "--model", "m"])
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "my.csv"], ["--text-column and --label-column are missing"]),
        (["--val-file", "v.csv"], ["--val-file is about a table", "'obqa'"]),
        (["--ood-datasets", "v.csv"], ["--ood-datasets 'v.csv' is a table", "'obqa' is none"]),
        (["--ood-ori-dataset", "v.csv"], ["--ood-ori-dataset 'v.csv'", "'obqa' is none"]),
    ],
)
def test_flags_of_a_table_need_one(flags, words):
    told = message(*flags)
    assert all(word in told for word in words), told


def test_the_context_is_the_first_text_column_where_it_stands_first(data_set, tmp_path):
    rows = [row | {"title": f"t{i} {{text}}", "year": i} for i, row in enumerate(topic_rows(30))]
    write_jsonl(tmp_path / "my.jsonl", rows)
    template = r"{{{year}}} {title}:\n{text}\nAgain {text}. Topic:"
    found = data_set(tmp_path / "my.jsonl", "--prompt", template)
    row = rows[3] | {"text": "match {title} {0} %s \\n"}
    assert found.task.prompt(row) == Prompt(
        "{3} t3 {text}:\n",
        "match {title} {0} %s \\n",
        "\nAgain match {title} {0} %s \\n. Topic:",
    )


def test_a_long_row_loses_the_end_of_its_text_and_nothing_else(data_set, tmp_path):
    rows = [row | {"text": "goal coach " * 200} for row in different_rows(10)]
    rows += different_rows(20)
    found = data_set(write_csv(tmp_path / "my.csv", rows), "--prompt", r"A:\n{text}\nTopic:")
    decoded = [found.tokenizer.decode(row["input_ids"]) for row in found.train_rows]
    assert {len(row["input_ids"]) == 300 for row in found.train_rows} == {True, False}
    assert all(text.startswith("A:\n") and text.endswith("\nTopic:") for text in decoded)


def test_a_template_for_a_classifier_is_one_sentence(data_set, tmp_path):
    rows = [row | {"more": "the bank"} for row in different_rows(30)]
    file = write_csv(tmp_path / "my.csv", rows)
    row = {"text": "goal", "more": "coach"}
    pair = data_set(file, kind="bertds", text="text more")
    assert pair.task.prompt(row) == ("goal", "coach")
    words = "[CLS] goal [SEP] coach [SEP]"
    assert pair.tokenizer.decode(pair.encode(row)[0]["input_ids"]) == words
    one = data_set(file, "--prompt", "{more} of {text}", kind="bertds", text="text more")
    assert one.task.prompt(row) == ("coach of goal",)
    assert pair.task.prompt(row | {"more": None}) == ("goal", "")  # one of a pair may be empty
    with pytest.raises(ValueError, match="no text in 'text, more'"):
        pair.task.prompt({"text": " ", "more": ""})
    with pytest.raises(ValueError, match=r"no column 'more'.*The row has 'text, mor'"):
        pair.task.prompt({"text": "goal", "mor": ""})
    both = data_set(file, text="text more").task.prompt(row)
    head = "Choose the topic: business, sports, tech.\n\ntext: "
    assert both == Prompt(head, "goal", "\nmore: coach\ntopic:")


def test_a_line_break_in_a_template_is_kept_as_two_characters():
    args = parse_args([*flags_of("my.csv", "--prompt", "a\n{text}\r\nb:"), "--model", "m"])
    assert args.prompt == r"a\n{text}\nb:"


# --- answers --------------------------------------------------------------------------------------


def test_answers_that_are_no_tokens_lead_to_answer_words(data_set, refused, tmp_path):
    names = {"tech": "very long", "sports": "5 stars", "business": "none of it"}
    rows = [row | {"topic": names[row["topic"]]} for row in different_rows(30)]
    file = write_csv(tmp_path / "my.csv", rows)
    told = refused(file)
    assert "'5 stars' of my is not one token" in told
    assert "--answer-words" in told and "--dataset-type bertds" in told
    assert "'5 stars, none of it, very long'" in told
    told = refused(file, "--answer-words", "A", "B")
    assert "2 words" in told and "'5 stars, none of it, very long'" in told
    found = data_set(file, "--answer-words", "A", "B", "C")
    assert found.task.choices == ("A", "B", "C")
    assert found.task.table.choices == ["5 stars", "none of it", "very long"]
    for _, row in found.rows_of("train", 0):
        assert found.label_of(row, "") == sorted({r["topic"] for r in rows}).index(row["topic"])


# --- the split ------------------------------------------------------------------------------------


def sides(found) -> dict[str, str]:
    return {t: split for split in ("train", "val") for t in texts(found, split)}


def test_a_row_keeps_its_side_whatever_else_is_in_the_file(data_set, tmp_path):
    rows = different_rows(200)
    before = sides(data_set(write_csv(tmp_path / "a.csv", rows)))
    share = list(before.values()).count("val") / len(rows)
    assert 0.1 < share < 0.3
    # other rows, another order, labels, format, name, kind of model and template
    more = [row | {"text": f"new {row['text']}", "topic": "tech"} for row in rows]
    changed = [row | {"topic": "sports"} for row in reversed(rows)]
    write_jsonl(tmp_path / "b.jsonl", more[:100] + changed + more[100:])
    flags = ["--prompt", "{text} of"]
    after = sides(data_set(tmp_path / "b.jsonl", *flags, kind="bertds"))
    assert len(after) == 400 and before.items() <= after.items()
    other = sides(data_set(tmp_path / "a.csv", "--seed-split", "1"))
    assert other.keys() == before.keys() and other != before


def test_the_division_is_the_one_that_was_made_before(data_set, tmp_path):
    """A change of the hash would put rows that an adapter was trained on into its evaluation."""
    rows = [{"text": f"row {i}", "topic": ("tech", "sports")[i % 2]} for i in range(40)]
    found = data_set(write_csv(tmp_path / "my.csv", rows))
    numbers = [int(text.removeprefix("row ")) for text in texts(found, "val")]
    assert numbers == [0, 1, 2, 4, 5, 15, 18, 20, 25, 26, 33, 34, 38]


def test_rows_of_one_text_are_never_on_both_sides(data_set, tmp_path):
    rows = different_rows(40)
    found = data_set(write_csv(tmp_path / "my.csv", rows * 3))
    assert not set(texts(found, "train")) & set(texts(found, "val"))
    assert len(texts(found, "train")) + len(texts(found, "val")) == 120


def test_files_for_validation_and_test_replace_the_division(data_set, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("dataset.tables.notice_once", told.append)
    rows = different_rows(60)
    file = write_csv(tmp_path / "my.csv", rows[:40])
    val = write_csv(tmp_path / "v.csv", rows[40:50])
    write_jsonl(tmp_path / "t.jsonl", rows[48:] + rows[:2])
    found = data_set(file, "--val-file", val)
    assert texts(found, "train") == [row["text"] for row in rows[:40]]
    assert texts(found, "val") == [row["text"] for row in rows[40:50]]
    assert told == []
    test = ["--test-file", str(tmp_path / "t.jsonl"), "--testing-set", "test"]
    found = data_set(file, "--val-file", val, *test)
    assert found.eval_split == "test"
    assert len(found.test_rows) == 14
    assert "--test-file: 2 of 14 rows say the same as a training row" in told[0]
    # without --val-file a part of the table is kept out of training all the same
    found = data_set(file, *test)
    assert 0 < len(texts(found, "train")) < 40 and len(found.test_rows) == 14


def test_a_label_that_the_training_file_lacks_is_named(refused, tmp_path):
    rows = different_rows(40)
    file = write_csv(tmp_path / "my.csv", rows)
    for flag, suffix in (("--val-file", "csv"), ("--test-file", "jsonl")):
        other = tmp_path / f"other.{suffix}"
        changed = [rows[0], rows[1] | {"topic": "sport"}]
        write_csv(other, changed) if suffix == "csv" else write_jsonl(other, changed)
        flags = [flag, str(other), *(["--testing-set", "test"] if "test" in flag else [])]
        told = refused(file, *flags)
        line = {"csv": 3, "jsonl": 2}[suffix]
        assert f"other.{suffix}:{line}: the label 'sport' is none of the classes of my" in told
        assert "did you mean 'sports'" in told and "'business, sports, tech'" in told
    (tmp_path / "other.csv").write_text("text,topic\n")
    assert "--val-file" in refused(file, "--val-file", str(tmp_path / "other.csv"))


def test_held_out_rows_and_shots_come_out_of_the_training_side(data_set, tmp_path):
    file = write_csv(tmp_path / "my.csv", different_rows(80))
    flags = ["--max-seq-len", "400"]
    whole = data_set(file, *flags)
    found = data_set(file, "--hold-out", "--num-shots", "3", "--limit-train", "50", *flags)
    assert len(found.train_rows) + len(found.held_out_rows) == 50 - 3
    assert len(found.test_rows) == len(whole.test_rows)
    assert found.shots.text.count("\ntopic: ") == 3


# --- names and paths ------------------------------------------------------------------------------


def test_a_data_set_is_called_after_its_file():
    assert data_set_name("a/b/my.data.CSV") == "my.data"
    assert data_set_name("~/x.jsonl") == "x"
    assert data_set_name("tasks.py:MINE") == "MINE"
    assert data_set_name("a.py:my.csv") == "my.csv" and not is_table("a.py:my.csv")
    assert data_set_name("obqa") == "obqa"
    assert not is_table("my.txt") and not is_table(".csv") and not is_table(None)
    assert same_data_set("a/../my.csv", "./my.csv") and not same_data_set("my.csv", "my.jsonl")
    assert same_data_set(None, None) and not same_data_set("obqa", None)


def test_a_file_whose_name_can_name_no_folder_is_refused(refused, tmp_path):
    rows = different_rows(30)
    told = refused(write_csv(tmp_path / "my!.csv", rows))
    assert "'my!'" in told and "rename the file" in told
    file = write_csv(tmp_path / "state.csv", rows)
    with pytest.raises(UsageError, match="'state' names a run's folder"):
        run_folder([*flags_of(file), "--model", "m"])


def test_a_missing_file_is_found_out_before_anything_is_loaded(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.base.load_tokenizer", lambda args: pytest.fail("loaded"))
    assert f"--dataset: there is no file {tmp_path}/no.csv" in refused(tmp_path / "no.csv")
    told = refused("~nobody/no.csv")
    assert "--dataset: there is no file '~nobody/no.csv'" in told and "leave a space" in told
    file = write_csv(tmp_path / "my.csv", different_rows(30))
    told = refused(file, "--test-file", "no.parquet")
    assert "--test-file: there is no file no.parquet" in told
    assert "--ood-datasets" in refused(file, "--ood-datasets", "no.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder; a file is needed" in refused(tmp_path / "folder.csv")


# --- shifted data and adapters --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_shifted_table_is_read_whole_with_the_runs_classes(data_set, refused, tmp_path, kind):
    rows = different_rows(60)
    file = write_csv(tmp_path / "my.csv", rows[:40])
    shifted = [row for row in rows[40:] if row["topic"] != "business"]  # lacks a class
    other = write_csv(tmp_path / "later.csv", shifted)
    found = data_set(file, "--ood-datasets", other, kind=kind)
    (later,) = found.ood_datasets.values()
    assert (later.task.name, later.task.choices) == ("later", found.task.choices)
    assert [row["labels"] for row in later.test_rows] == [
        ANSWERS.index(row["topic"]) for row in shifted
    ]
    write_csv(Path(other), [*shifted, shifted[0] | {"topic": "art"}])
    data = data_set(file, "--ood-datasets", other, kind=kind)
    with pytest.raises(UsageError, match=r"later.csv:16: the label 'art' is none of .* of my"):
        _ = data.ood_datasets
    told = refused(file, "--ood-datasets", str(tmp_path / "x" / "my.csv"), kind=kind)
    assert "name each data set once" in told


def test_shots_of_a_shifted_table_are_not_evaluated(data_set, tmp_path):
    file = write_csv(tmp_path / "my.csv", different_rows(40))
    other = write_csv(tmp_path / "later.csv", different_rows(20))
    flags = ["--num-shots", "2", "--max-seq-len", "400"]
    later = data_set(file, "--ood-datasets", other, *flags).ood_datasets["later"]
    assert len(later.test_rows) == 18


def test_an_adapter_of_another_data_set_keeps_its_answers(data_set, refused, tmp_path):
    rows = [row for row in different_rows(40) if row["topic"] != "business"]
    file = write_csv(tmp_path / "my.csv", rows)
    assert list(data_set(file).task.choices) == ["sports", "tech"]
    found = data_set(file, "--ood-ori-dataset", "bbc_headlines")
    topics = ["business", "entertainment", "politics", "sports", "tech"]
    assert list(found.task.choices) == topics
    assert {row["labels"] for row in found.train_rows} == {3, 4}
    rows[0]["topic"] = "A"
    write_csv(Path(file), rows)  # a causal LM may answer otherwise, a classifier may not
    assert data_set(file, "--ood-ori-dataset", "bbc_headlines").task.choices[0] == "A"
    told = refused(file, "--ood-ori-dataset", "bbc_headlines", kind="bertds")
    assert "my.csv:2: the label 'A' is none of the classes of bbc_headlines" in told


# --- runs -----------------------------------------------------------------------------------------


def run_flags(models, kind: str, file, tmp_path, *flags: str, text: str = "text") -> list[str]:
    return [
        *flags_of(file, *flags, kind=kind, text=text),
        *("--model", models[kind], "--output-dir", str(tmp_path / "out"), "--device", "cpu"),
        *("--batch-size", "8", "--lr", "1e-2", "--max-train-steps", "3"),
        *("--bayes-eval-n-samples-final", "3"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_posterior_that_knows_its_task(models, tmp_path, kind):
    rows = [row | {"more": "of the bank"} for row in different_rows(48)]
    file = write_parquet(tmp_path / "my.parquet", rows[:40])
    later = write_csv(tmp_path / "later.csv", rows[40:])
    flags = run_flags(models, kind, file, tmp_path, "--ood-datasets", later, text="text more")
    flags += ["--modelwrapper", "blob", "--temperature-scaling"]
    main.main(flags)
    folder = run_folder(flags)
    assert folder.parts[-2:] == ("my", "default")
    assert list(json.loads((folder / "metrics.json").read_text())["datasets"]) == ["my", "later"]
    assert (folder / "predictions-later.safetensors").is_file()
    # the record: columns and classes, no row and no path of the data
    content = json.loads((folder / "bayes_config.json").read_text())
    assert content["task"] == {
        "name": "my",
        "text_columns": ["text", "more"],
        "label_column": "topic",
        "prompt": None,
        "choices": ANSWERS,
        "answer_words": None,
    }
    assert content["dataset"] == "my"
    shown = "\n".join(content["prompt"]["text"])
    assert "..." in shown and not any(row["text"] in json.dumps(content) for row in rows)
    # and back: the posterior predicts rows by its record alone
    posterior = load_posterior(folder, device="cpu")
    assert posterior.table_task == TableTask(**content["task"])
    task = task_of(posterior.table_task, kind)
    run = DATASETS[kind](parse_args(flags), accelerator())
    assert task.choices == run.task.choices and posterior.answers == list(task.choices)
    where, row = next(iter(run.rows_of("val", 0)))
    assert task.prompt(rows[[r["text"] for r in rows].index(row["text"])]) == run.task.prompt(row)
    stored = load_file(folder / "predictions.safetensors")
    assert stored["labels"].tolist() == [task.label(row) for _, row in run.rows_of("val", 0)], where
    # the same call again keeps the run, and --config repeats it
    main.main(flags)
    main.main(["--config", str(folder / "args.json"), "--log-path", "again"])
    again = load_file(folder.parent / "again" / "predictions.safetensors")
    torch.testing.assert_close(again["log_probs"], stored["log_probs"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_run_takes_the_table_of_the_adapter(models, tmp_path, kind, monkeypatch):
    rows = different_rows(60)
    file = write_csv(tmp_path / "my.csv", rows[:40])
    flags = run_flags(models, kind, file, tmp_path, "--seed-split", "3")
    main.main(flags)
    adapter = str(run_folder(flags))
    later = ["--load-lora-path", adapter, "--nowand", "--device", "cpu", "--modelwrapper", "mle"]
    later += ["--output-dir", str(tmp_path / "later")]
    main.main(later)
    first, second = (load_file(run_folder(f) / "predictions.safetensors") for f in (flags, later))
    torch.testing.assert_close(first["log_probs"], second["log_probs"])
    # otherwise divided, rows that were trained on would be evaluated, however the path is spelled
    monkeypatch.chdir(tmp_path)
    for dataset in ([], ["--dataset", "my.csv"]):
        told = message("--seed-split", "4", *dataset, base=later)
        assert "--seed-split is 4" in told and "trained with 3" in told
    args = parse_args([*later, "--dataset", "./my.csv"])
    assert args.text_column == ["text"]
    check_own_data(args)
    args = parse_args([*later, "--dataset", "./my.csv", "--hold-out", "false"])
    assert args.hold_out is False
    told = message("--dataset", "./my.csv", "--temperature-scaling", base=later)
    assert "was trained on the whole training set" in told
    # all rows of a new file, which lacks a class
    new_rows = [row for row in rows[40:] if row["topic"] != "business"]
    new = write_csv(tmp_path / "new.csv", new_rows)
    args = parse_args([*later, "--test-file", new, "--testing-set", "test"])
    assert len(DATASETS[kind](args, accelerator()).test_rows) == len(new_rows)
    args = parse_args([*later, "--dataset", new])
    assert args.val_file is None and args.label_column == "topic"
    assert list(DATASETS[kind](args, accelerator()).task.choices) == ANSWERS
    Path(file).unlink()
    with pytest.raises(UsageError, match=r"no file .*my.csv.* say by --ood-ori-dataset"):
        DATASETS[kind](args, accelerator())
    assert parse_args([*later, "--dataset", "bbc_bodies"]).text_column is None


def test_the_files_of_the_adapters_run_are_kept_with_its_table(tmp_path):
    flags = [*flags_of("my.csv", "--val-file", "v.csv"), "--model", "m"]
    args = parse_args(flags)
    content = {"args": args.as_dict(), "given": args.given}
    (tmp_path / "args.json").write_text(json.dumps(content))
    later = ["--load-lora-path", str(tmp_path), "--modelwrapper", "mle"]
    assert parse_args(later).val_file == "v.csv"
    # dropped, a part of the rows that were trained on would be evaluated
    assert parse_args([*later, "--dataset", "./my.csv"]).val_file == "v.csv"
    assert parse_args([*later, "--dataset", "other.csv"]).val_file is None


def test_the_pages_example_runs(models, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (content,) = re.findall(r"cat > desks.csv <<'END'\n(.*?)END\n", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("desks.csv").write_text(content, encoding="utf-8")
    for kind in KINDS:
        columns = ["--text-column", "headline", "--label-column", "desk"]
        assert " ".join(["--dataset desks.csv", *columns, "--dataset-type", kind]) in page
        flags = ["--dataset", "desks.csv", *columns, "--dataset-type", kind, "--device", "cpu"]
        flags += ["--model", models[kind], "--modelwrapper", "mle", "--n-epochs", "1", "--nowand"]
        assert main.run(flags) == 0


# --- the record -----------------------------------------------------------------------------------

TASK = {
    "name": "my",
    "text_columns": ["review"],
    "label_column": "label",
    "prompt": "{title}: {review}\\nIs it good:",
    "choices": ["neg", "pos"],
    "answer_words": ["No", "Yes"],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_columns": []}, ["text_columns"]),
        ({"text_columns": ["a", "b", "c"]}, ["text_columns"]),
        ({"text_columns": [" "]}, ["text_columns"]),
        ({"label_column": "review"}, ["text and as label"]),
        ({"prompt": "{review.__class__}"}, ["no {review}"]),
        ({"prompt": "{review} {"}, ["brace"]),
        ({"prompt": "{review} {label}:"}, ["the label in it"]),
        ({"choices": ["pos", "pos"]}, ["same entry twice"]),
        ({"choices": ["pos"]}, ["choices"]),
        ({"answer_words": ["Yes"]}, ["answer_words"]),
        ({"answer_words": ["A", "B", "C"]}, ["3 answer words for 2 classes"]),
        ({"answer_words": [1, 2]}, ["answer_words"]),
        ({"prompt": 7}, ["prompt"]),
    ],
)
def test_a_record_that_breaks_a_rule_is_one_message(changes, words):
    with pytest.raises(UsageError) as caught:
        as_record(TASK | changes, TableTask, "here")
    assert all(word in str(caught.value) for word in words)


def test_a_posteriors_record_holds_its_task_against_its_choices():
    content = RECORD | {"choices": ["No", "Yes"], "target_ids": [5, 6], "task": TASK}
    record = as_record(content, PosteriorRecord, "here")
    assert record.task == TableTask(**TASK)
    assert as_record(json.loads(record.model_dump_json()), PosteriorRecord, "here") == record
    assert "task" not in record.method
    with pytest.raises(UsageError, match="answers of 'task'"):
        as_record(content | {"choices": ["Yes", "No"]}, PosteriorRecord, "here")


def test_a_records_task_reads_new_rows_without_labels():
    task = task_of(TableTask(**TASK), "mcdataset")
    row = {"review": "fine", "title": 1984, "else": 1}
    assert task.prompt(row) == Prompt("1984: ", "fine", "\nIs it good:")
    assert task.choices == ("No", "Yes") and task.label(row | {"label": "pos"}) == 1
    assert TableTask(**TASK).columns == ("review", "title")
    other = dataclasses.replace(task, choices=("Yes", "No"))
    with pytest.raises(UsageError, match="'choices' and 'table' have other answers"):
        checked_task(other, "mine")
    with pytest.raises(UsageError, match=r"'name' is '\.\./x'"):
        task_of(TableTask(**TASK | {"name": "../x"}), "mcdataset")


# --- new rows of a table's posterior --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_a_posterior_of_a_table_answers_rows_of_another_file(kind, tmp_path, request, capsys):
    """From a CSV to answers for a CSV without labels, by the record alone."""
    from conftest import run_folder

    from modelwrappers import load_posterior

    lines = [f'"{row["text"]}",{row["topic"]}' for row in topic_rows(60, seed=4)]
    (tmp_path / "news.csv").write_text("\n".join(["body,desk", *lines]) + "\n")
    base = request.getfixturevalue(kind)
    at = base.index("--data-dir")
    flags = [*base[:at], *base[at + 2 :], "--dataset", str(tmp_path / "news.csv")]
    flags += ["--text-column", "body", "--label-column", "desk", "--log-path", "table"]
    flags += ["--modelwrapper", "map", "--max-train-steps", "4"]
    main.main(flags)
    folder = run_folder(flags)
    (tmp_path / "news.csv").unlink()
    texts = [row["text"] for row in topic_rows(7, seed=5)]
    (tmp_path / "new.csv").write_text(
        "\n".join(["id,body", *(f"{i},{t}" for i, t in enumerate(texts))])
    )
    out = tmp_path / "out.jsonl"
    call = [str(folder), "--rows", str(tmp_path / "new.csv"), "--out", str(out)]
    assert predict.run(call) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["answer"] for r in records} <= {"business", "sports", "tech"}
    again = load_posterior(folder, device="cpu").answer(texts)
    assert [r["probabilities"] for r in records] == [a["probabilities"] for a in again]
