"""Errors in a text at five strengths (`TASK:noisy:K`), and rows of no class."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
import torch
from conftest import run_folder, topic_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import main
from dataset.shift import NEIGHBOURS, RATES, NoisyRow, noisy_row, noisy_text
from dataset.tasks import CLASSIFICATION_TASKS, MULTIPLE_CHOICE_TASKS
from utils.data_set_names import (
    STRENGTHS,
    data_set_name,
    noise_of_block,
    noisy_block,
    split_noise,
)
from utils.embedded import bbc_articles
from utils.errors import UsageError

HEADLINES = [article["headline"] for article in bbc_articles()[:300]]


def distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


# --- the text -------------------------------------------------------------------------------------


def test_errors_are_those_of_the_text_and_of_nothing_else():
    """Recorded: a text has the same errors on every machine and in every version of Python."""
    text = "Ann lent Eve a ladder because _ had to paint a wall."
    assert noisy_text(text, 1) == "Ann lent Eve a ladder because _ ha to pang a wall."
    assert noisy_text(text, 5) == "Ann lent Efe paddrr a bese _ to pang a wll."


def test_a_stronger_shift_is_further_from_the_text():
    means = [0.0]
    for strength in STRENGTHS:
        means.append(np.mean([distance(t, noisy_text(t, strength)) for t in HEADLINES]))
    assert all(later > earlier * 1.2 for earlier, later in itertools.pairwise(means))
    assert means[1] > 0.1 and means[5] < 15


def test_every_error_of_a_weaker_shift_is_one_of_a_stronger():
    """Letters, in a text of one word: of swaps there are exceptions, as `dataset.shift` says."""
    for text in ("internationalisation", "telecommunications", "Counterrevolutionary"):
        wrong = [
            {i for i, letter in enumerate(text) if letter not in noisy_text(text, k)}
            for k in STRENGTHS
        ]
        assert all(weak <= strong for weak, strong in itertools.pairwise(wrong))


def test_letters_and_words_go_wrong_at_the_stated_rates():
    words = [f"{a}{b}{c}" for a in "bcdfghjkl" for b in "aeiou" for c in "mnprst"]
    text = " ".join(words * 20)
    number = len(words) * 20
    for strength, rate in RATES.items():
        noisy = [len(w) for w in noisy_text(text, strength).split()]
        assert 1 - len(noisy) / number == pytest.approx(rate, rel=0.25), "words that are dropped"
        # three letters, of which the last one left is never dropped
        assert 3 - np.mean(noisy) == pytest.approx(3 * rate, rel=0.25), "letters that are dropped"


def test_letters_are_mistyped_as_their_neighbours():
    assert set(NEIGHBOURS["g"]) == set("fhtyvb") and set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a, others in NEIGHBOURS.items() for b in others)
    seen = {noisy_text("g" * length, 5).replace("g", "") for length in range(1, 60)}
    assert set("".join(seen)) <= set("fhtyvb") and len(set("".join(seen))) > 3


def test_what_is_no_letter_stays():
    for text in ("", "   ", "12 345 6.7", "_ ___ _", "?!"):
        assert all(noisy_text(text, strength) == text for strength in STRENGTHS)
    blank = "Ann lent Eve a ladder because _ had to paint a wall."
    for number in range(200):
        words = noisy_text(f"{blank} {number}", 5).split()
        assert words.count("_") == 1 and words[-1] == str(number)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.sampled_from(STRENGTHS))
def test_no_text_breaks_and_none_is_emptied(text, strength):
    noisy = noisy_text(text, strength)
    assert noisy == noisy_text(text, strength)
    assert bool(noisy.strip()) == bool(text.strip())
    assert any(map(str.isalpha, noisy)) == any(map(str.isalpha, text))
    assert sorted(c for c in noisy if c.isdigit()) == sorted(c for c in text if c.isdigit()) or any(
        any(map(str.isalpha, word)) and any(map(str.isdigit, word)) for word in text.split()
    )


def test_a_mark_goes_where_its_letter_goes():
    text = " ".join(unicodedata.normalize("NFD", "éàüñçöîåêõ")[i:] for i in (0, 2, 4, 6)) * 5
    for number in range(50):
        noisy = noisy_text(f"{text} {number}", 5)
        marks = [i for i, c in enumerate(noisy) if unicodedata.combining(c)]
        assert all(i and noisy[i - 1].isalpha() for i in marks)
    assert noisy_text("日本語テキスト" * 30, 5) != "日本語テキスト" * 30
    assert set(noisy_text("日本語テキスト" * 30, 5)) == set("日本語テキスト"), "none is mistyped"


# --- the rows of a task ---------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [MULTIPLE_CHOICE_TASKS, CLASSIFICATION_TASKS])
def test_labels_and_answers_of_every_task_stay(tasks):
    changed = set()
    for name, task in tasks.items():
        for strength in STRENGTHS:
            noisy = noisy_row(task.example, task.text_columns, strength)
            others = task.example.keys() - set(task.text_columns)
            assert all(noisy[key] == task.example[key] for key in others)
            if task.label is not None:
                assert task.label(noisy) == task.label(task.example)
            prompt, clean = "".join(task.prompt(noisy)), "".join(task.prompt(task.example))
            if prompt != clean:
                changed.add(name)
            for line in clean.splitlines():
                if line.startswith(("A)", "B)", "C)", "D)", "E)", "Topics:", "Answer:")):
                    assert line in prompt.splitlines()
    assert len(changed) > len(tasks) / 2, "short examples may have no error at any strength"
    assert all(task.text_columns or name == "cola" for name, task in tasks.items())
    assert all(set(task.text_columns) <= set(task.example) for task in tasks.values())


def test_sciq_keeps_the_order_of_its_choices():
    task = MULTIPLE_CHOICE_TASKS["sciq"]
    for number in range(30):
        row = task.example | {"question": f"What do plants take from the air around them? {number}"}
        noisy = noisy_row(row, task.text_columns, 5)
        assert isinstance(noisy, NoisyRow) and noisy["question"] != row["question"]
        assert task.label(noisy) == task.label(row)


def data_of(flags, *more):
    args = main.parse_args([*flags, "--modelwrapper", "mle", "--max-train-steps", "1", *more])
    main.check_names(args)
    return main.build_dataset(args, main.build_accelerator(args))


def texts_of(data):
    return [data.tokenizer.decode(row["input_ids"]) for row in data.test_rows]


def test_the_rows_are_those_of_the_data_set_as_it_is(causal_flags, tmp_path):
    rows = topic_rows(30, 3)
    for order in (rows, rows[::-1]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", topic_rows(8))
        write_jsonl(folder / "test.jsonl", order)
        names = ["bbc_headlines:noisy:1", "BBC_headlines:noisy:5"]
        flags = ["--data-dir", str(folder), "--ood-datasets", *names, "--limit-eval", "30"]
        data = data_of(causal_flags, *flags)
        assert list(data.ood_datasets) == ["bbc_headlines-noisy-1", "bbc_headlines-noisy-5"]
        strong = data.ood_datasets["bbc_headlines-noisy-5"]
        for key in ("labels", "index"):
            assert [r[key] for r in strong.test_rows] == [r[key] for r in data.test_rows]
        if order is rows:
            first = texts_of(strong)
            assert first != texts_of(data) and texts_of(data)[0].startswith("Topics: business")
            assert all(text.startswith("Topics: business, ent") for text in first)
        else:
            assert texts_of(strong) == first[::-1], "errors do not depend on the position"
    assert data.noise is None and strong.train_rows != data.train_rows


def test_solved_examples_have_no_errors(causal_flags):
    flags = ["--ood-datasets", "bbc_headlines:noisy:5", "--num-shots", "2", "--max-seq-len", "400"]
    data = data_of(causal_flags, *flags)
    (noisy,) = data.ood_datasets.values()
    assert noisy.shots == data.shots and texts_of(noisy) != texts_of(data)
    assert all(text.startswith(data.shots.text) for text in texts_of(noisy))


def test_held_out_rows_can_have_errors_too(classifier_flags):
    flags = ["--ood-datasets", "bbc_headlines:noisy:5", "--testing-set", "train_val"]
    data = data_of(classifier_flags, *flags)
    (noisy,) = data.ood_datasets.values()
    assert [row["index"] for row in noisy.test_rows] == [row["index"] for row in data.test_rows]
    assert texts_of(noisy) != texts_of(data)


def test_a_table_has_errors_in_its_text_columns(classifier_flags, tmp_path):
    file = tmp_path / "mine.csv"
    rows = [f"{row['text']} and more of the same,{row['topic']}" for row in topic_rows(40)]
    file.write_text("\n".join(["text,topic", *rows]) + "\n")
    at = classifier_flags.index("--data-dir")
    flags = [*classifier_flags[:at], *classifier_flags[at + 2 :]]
    columns = ["--text-column", "text", "--label-column", "topic"]
    flags += ["--dataset", str(file), *columns, "--ood-datasets", f"{file}:noisy:4"]
    data = data_of(flags)
    (noisy,) = data.ood_datasets.values()
    assert list(data.ood_datasets) == ["mine-noisy-4"]
    assert [row["index"] for row in noisy.test_rows] == [row["index"] for row in data.test_rows]
    assert texts_of(noisy) != texts_of(data)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_a_run_keeps_a_block_and_predictions_of_every_strength(kind, request):
    names = [f"bbc_headlines:noisy:{strength}" for strength in (1, 5)]
    flags = [*request.getfixturevalue(kind), "--modelwrapper", "blob", "--max-train-steps", "2"]
    flags += ["--bayes-eval-n-samples-final", "2", "--ood-datasets", *names]
    main.main(flags)
    folder = run_folder(flags)
    blocks = json.loads((folder / "metrics.json").read_text())["datasets"]
    assert list(blocks) == ["bbc_headlines", "bbc_headlines-noisy-1", "bbc_headlines-noisy-5"]
    assert len({block["nll"] for block in blocks.values()}) == 3
    files = ["predictions", "predictions-bbc_headlines-noisy-5"]
    own, noisy = (load_file(folder / f"{name}.safetensors") for name in files)
    assert torch.equal(own["labels"], noisy["labels"])
    assert torch.equal(own["index"], noisy["index"])


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_a_run_predicts_rows_of_no_class(kind, request, tmp_path):
    for name, seed in (("bbc_unseen_topic", 0), ("bbc_unseen_topic-ood", 5)):
        (tmp_path / name).mkdir()
        rows = [row for row in topic_rows(30, seed) if (row["topic"] == "tech") == bool(seed)]
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    flags = [*request.getfixturevalue(kind), "--data-dir", str(tmp_path), "--modelwrapper", "mle"]
    flags += ["--dataset", "bbc_unseen_topic", "--max-train-steps", "2", "--temperature-scaling"]
    flags += ["--ood-datasets", "bbc_unseen_topic:ood", "bbc_unseen_topic:ood:noisy:2"]
    main.main(flags)
    folder = run_folder(flags)
    blocks = json.loads((folder / "metrics.json").read_text())["datasets"]
    assert list(blocks)[1:] == ["bbc_unseen_topic-ood", "bbc_unseen_topic-ood-noisy-2"]
    block = blocks["bbc_unseen_topic-ood"]
    assert block["unlabelled"] and "acc" not in block and block["n_examples"] == 10
    assert block["temperature_scaled"].keys() == {"temperature"}
    stored = load_file(folder / "predictions-bbc_unseen_topic-ood.safetensors")
    assert stored["log_probs"].shape == (10, 1, 4) and (stored["labels"] == -1).all()
    card = json.loads((folder / "bayes_config.json").read_text())
    assert list(card["metrics"]) == ["bbc_unseen_topic"]
    main.main(flags)  # a finished run is read, and kept


def test_the_unseen_topic_is_in_no_training_row():
    known = MULTIPLE_CHOICE_TASKS["bbc_unseen_topic"]
    unseen = MULTIPLE_CHOICE_TASKS["bbc_unseen_topic:ood"]
    topics = {row["topic"] for split in ("train", "test") for _, row in known.source.rows(split)}
    assert topics == set(known.choices) == set(unseen.choices)
    own, other = known.source.rows("test"), unseen.source.rows("test")
    assert len(own) + len(other) == 500 and {row["topic"] for _, row in other} == {"tech"}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bbc_headlines:noisy:9", "'9'; it must be one of 1, 2, 3, 4, 5"),
        ("bbc_headlines:noisy:x", "'x'; it must be one of"),
        ("bbc_headlines:noisy", "''; it must be one of"),
        ("bbc_headlines:noisy:", "''; it must be one of"),
        ("bbc_headlines:noisy:0", "'0'; it must be"),
        ("bbc_headlines:noisy:-1", "'-1'; it must be"),
        ("bbc_headlines:noisy:1.0", "'1.0'; it must be"),
        ("bbc_headlines:noisy:٣", "it must be one of"),
        ("bbc_headlines:noisy:1:noisy:2", "put into a text once"),
        (":noisy:1", "no data set stands before"),
        ("x:noisy", "''; it must be"),
        ("x:noisy:1", "unknown data set 'x'"),
        ("mine.csv:noisy:1", "'mine.csv:noisy:1' is a table"),
        ("nowhere.py:T:noisy:1", "there is no file 'nowhere.py'"),
        ("bbc_headlines:noisy:1\0", "must have no control characters"),
        ("../x:noisy:1", "unknown data set"),
    ],
)
def test_a_broken_name_is_one_message(classifier_flags, tmp_path, name, words):
    with pytest.raises(UsageError) as caught:
        data_of(classifier_flags, "--ood-datasets", name)
    assert words in str(caught.value) and len(str(caught.value)) < 1500


def test_rows_with_errors_are_only_evaluated(classifier_flags, capsys):
    flags = [*classifier_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    assert main.run([*flags, "--dataset", "bbc_headlines:noisy:3"]) == 2
    told = capsys.readouterr().err
    assert "--ood-datasets 'bbc_headlines:noisy:3'" in told and "Traceback" not in told
    with pytest.raises(UsageError, match="--ood-ori-dataset 'obqa:noisy:1'"):
        main.parse_args([*flags, "--ood-ori-dataset", "obqa:noisy:1"])
    with pytest.raises(UsageError, match="belong to none of its classes"):
        data_of(classifier_flags, "--dataset", "bbc_unseen_topic:ood")


def test_a_strength_is_named_once_and_only_where_there_is_free_text(classifier_flags):
    twice = ["bbc_headlines:noisy:1", "BBC_HEADLINES:noisy:1"]
    with pytest.raises(UsageError, match="there already are some of 'bbc_headlines-noisy-1'"):
        data_of(classifier_flags, "--ood-datasets", *twice)
    with pytest.raises(UsageError, match="cola names no columns of free text"):
        data_of(classifier_flags, "--ood-datasets", "cola:noisy:1")


@pytest.mark.parametrize(
    ("flag", "block"),
    [
        ("bbc_headlines", "bbc_headlines"),
        ("bbc_headlines:noisy:3", "bbc_headlines-noisy-3"),
        ("a/b.c/my data.csv:noisy:1", "my data-noisy-1"),
        ("a/b.py:TASK", "TASK"),
        ("a/b.py:TASK:noisy:2", "TASK-noisy-2"),
        ("a/b.py:noisy", "noisy"),
        ("bbc_unseen_topic:ood", "bbc_unseen_topic-ood"),
        ("bbc_unseen_topic:ood:noisy:4", "bbc_unseen_topic-ood-noisy-4"),
        ("x:noisy:1.csv", "x:noisy:1"),
    ],
)
def test_a_block_is_called_after_the_flag(flag, block):
    assert data_set_name(flag) == block
    base, strength = split_noise(flag)
    if strength is not None:
        assert noise_of_block(block) == (data_set_name(base), strength)
        assert noisy_block(data_set_name(base), strength) == block
