"""Golden prompts, labels and answers of every task, on rows written by hand in the hub's schema."""

import runpy
import sys

import pytest
from conftest import ROOT

from dataset.tasks import (
    CLASSIFICATION_TASKS,
    MULTIPLE_CHOICE_TASKS,
    TOPICS,
    Prompt,
    checked_task,
    letter_or_number,
)

TOPIC_LINE = "Topics: business, entertainment, politics, sports, tech.\n\nNews: "
HEAD = "Return the label of the correct answer for the question below.\n\nQuestion: "

# task -> what its example row has to read like, and the label
MULTIPLE_CHOICE = {
    "bbc_headlines": (f"{TOPIC_LINE}Airline profit rises\nTopic:", 0),
    "bbc_bodies": (f"{TOPIC_LINE}The match ended in a draw after extra time.\nTopic:", 3),
    **{
        f"winogrande_{size}": (
            f"{HEAD}Ann lent Eve a ladder because _ had to paint a wall.\n"
            "Choices:\nA) Ann\nB) Eve\nAnswer:",
            1,
        )
        for size in ("xs", "s", "m", "l", "xl")
    },
    "ARC-Challenge": (f"{HEAD}Which is hot?\nChoices:\nA) ice\nB) fire\nC) snow\nAnswer:", 1),
    "ARC-Easy": (
        f"{HEAD}Which one can fly?\n"
        "Choices:\nA) a stone\nB) a fish\nC) a tree\nD) a chair\nE) a gull\nAnswer:",
        4,
    ),
    "obqa": (
        f"{HEAD}The sun is\nChoices:\nA) a planet\nB) a moon\nC) a comet\nD) a star\nAnswer:",
        3,
    ),
    "boolq": (
        "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
        "Passage: Water is wet.\nQuestion: is water wet\nAnswer (true or false):",
        0,
    ),
    **{
        f"MMLU-{name}": (
            f"{HEAD}Which of these belongs to {subject}?\n"
            "Choices:\nA) a recipe\nB) a song\nC) a map of the sea\nD) this question\nAnswer:",
            3,
        )
        for name, subject in {
            "chem": "college chemistry",
            "phy": "college physics",
            "bio": "college biology",
            "cs": "college computer science",
            "eng": "electrical engineering",
            "law": "international law",
            "health": "anatomy",
        }.items()
    },
    "commonsense_qa": (
        f"{HEAD}Where does a book stand?\n"
        "Choices:\nA) oven\nB) shelf\nC) pond\nD) engine\nE) cloud\nAnswer:",
        1,
    ),
    "sciq": (  # its choices stand in an order that depends on the question
        f"{HEAD}What do plants take from the air?\n"
        "Choices:\nA) helium\nB) carbon dioxide\nC) oxygen\nD) steam\nAnswer:",
        1,
    ),
    "hellaswag": (
        f"{HEAD}Which ending completes this text? A man sits down at a piano. He\n"
        "Choices:\nA) eats it.\nB) swims away.\nC) begins to play.\nD) melts.\nAnswer:",
        2,
    ),
}
CLASSIFICATION = {
    "bbc_headlines": (("Airline profit rises",), 0),
    "bbc_bodies": (("The match ended in a draw after extra time.",), 3),
    "rte": (("Al owns two dogs.", "Al owns a dog."), 0),
    "mrpc": (("It rained all day.", "All day it rained."), 1),
    "wnli": (("Eve thanked Ann because she had helped.", "Ann had helped."), 1),
    "cola": (("Dog the barks.",), 0),
    "sst2": (("a warm and funny film",), 1),
    "mnli": (("Nobody came.", "The room was full."), 2),
    "qnli": (("Who won?", "The home team won."), 0),
    "qqp": (("How far is it?", "What is the distance?"), 1),
    "wic": (("bank: A bank lends.", "The bank is wet."), 0),
    "boolq": (("is water wet", "Water is wet."), 1),
    "cb": (("I doubt that he came.", "He came."), 1),
    "imdb": (("I would see it again.",), 1),
    "ag_news": (("Late goal decides the final",), 1),
}


for key, text, label in (
    ("bbc_unseen_topic", "Airline profit rises", 0),
    ("bbc_unseen_topic:ood", "Phone makers agree on a chip", None),
):
    topics = "business, entertainment, politics, sports"
    MULTIPLE_CHOICE[key] = f"Topics: {topics}.\n\nNews: {text}\nTopic:", label
    CLASSIFICATION[key] = (text,), label


def answer_of(task):
    """The label of a record's own example; None where its rows belong to no class."""
    return None if task.label is None else task.label(task.example)


def test_every_task_has_a_golden_row():
    assert MULTIPLE_CHOICE.keys() == MULTIPLE_CHOICE_TASKS.keys()
    assert CLASSIFICATION.keys() == CLASSIFICATION_TASKS.keys()


@pytest.mark.parametrize("name", sorted(MULTIPLE_CHOICE))
def test_prompt_and_label_of_multiple_choice(name):
    task = MULTIPLE_CHOICE_TASKS[name]
    prompt, label = MULTIPLE_CHOICE[name]
    assert set(task.columns) <= task.example.keys()
    rendered = task.prompt(task.example)
    assert isinstance(rendered, Prompt) and "".join(rendered) == prompt
    assert answer_of(task) == label and (label is None or label < len(task.choices))


@pytest.mark.parametrize("name", sorted(CLASSIFICATION))
def test_sentences_and_label_of_classification(name):
    task = CLASSIFICATION_TASKS[name]
    sentences, label = CLASSIFICATION[name]
    assert set(task.columns) <= task.example.keys()
    assert task.prompt(task.example) == sentences
    assert answer_of(task) == label and (label is None or label < len(task.choices))


def test_sciq_shuffles_its_choices_by_the_question_only():
    task = MULTIPLE_CHOICE_TASKS["sciq"]
    labels = []
    for number in range(200):
        row = task.example | {"question": f"Question {number}?"}
        text = "".join(task.prompt(row))
        label = task.label(row)
        assert f"{'ABCD'[label]}) carbon dioxide\n" in text
        assert "".join(task.prompt(row)) == text
        labels.append(label)
    assert all(30 < labels.count(letter) < 70 for letter in range(4))


def test_the_published_sizes_of_the_answer_space():
    sizes = {name: len(task.choices) for name, task in MULTIPLE_CHOICE_TASKS.items()}
    assert sizes["boolq"] == sizes["winogrande_s"] == 2
    assert sizes["obqa"] == sizes["MMLU-chem"] == 4
    assert sizes["ARC-Easy"] == sizes["commonsense_qa"] == len(TOPICS) == 5


@pytest.mark.parametrize("answer", [True, "True", "true"])
def test_booleans_may_be_text(answer):
    task = MULTIPLE_CHOICE_TASKS["boolq"]
    assert task.label(task.example | {"answer": answer}) == 0


def test_mmlu_groups_load_subject_after_subject(monkeypatch):
    import datasets

    asked = []
    task = MULTIPLE_CHOICE_TASKS["MMLU-law"]

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [task.example | {"subject": config}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = task.source.rows("test")
    subjects = ["international_law", "jurisprudence", "professional_law"]
    assert asked == [("cais/mmlu", subject, "test") for subject in subjects]
    assert [row["subject"] for _, row in rows] == subjects


def test_every_built_in_record_keeps_the_rules_for_a_users_own():
    for task in (*MULTIPLE_CHOICE_TASKS.values(), *CLASSIFICATION_TASKS.values()):
        assert checked_task(task, task.name) == task


@pytest.mark.parametrize("answer", ["²", "١", "½", "0.5", "a", "AB", "", None, True, 1.5, ["A"]])
def test_answer_keys_are_letters_or_whole_numbers(answer):
    with pytest.raises(ValueError, match="a letter from A to E, or a number from 1 on"):
        letter_or_number("x")({"x": answer})


@pytest.mark.parametrize("answer", [1, 0, 1.0, "1", "yes", "", None, ["true"], {"a": 1}])
def test_booleans_are_no_numbers(answer):
    task = MULTIPLE_CHOICE_TASKS["boolq"]
    with pytest.raises(ValueError, match=r"'answer' is .*must be true or false"):
        task.label(task.example | {"answer": answer})


# --- scripts/tasks.py -----------------------------------------------------------------------------


@pytest.fixture
def tasks_script(monkeypatch, capsys):
    """Exit code, output and error of `python scripts/tasks.py NAMES`."""

    def run(*names: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tasks.py", *names])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "tasks.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_the_list_of_tasks_renders_a_users_own(tasks_script, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom dataset.tasks import *\n"
        "ONE = dataclasses.replace(MULTIPLE_CHOICE_TASKS['obqa'], name='mine', source=None)\n"
        "TWO = dataclasses.replace(CLASSIFICATION_TASKS['rte'], name='obqa', example=None)\n"
    )
    code, out, err = tasks_script(f"{tmp_path}/mine.py:ONE", f"{tmp_path}/mine.py:TWO", "BOOLQ")
    assert code == 0 and err == ""
    first, second, third, fourth = out.split("\n## ")
    assert first.startswith("## mine (mcdataset)") and "D) a star\nAnswer: D" in first
    assert second.startswith("obqa\n") and "The record has no example." in second
    assert third.startswith("boolq (mcdataset)") and fourth.startswith("boolq (bertds)")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("obqx", "did you mean 'obqa'?"),
        ("{}/nothing.py:X", "there is no file"),
        ("{}/mine.py:X", "has no 'X'"),
        ("{}/mine.py:NUMBER", "must be a dataset.tasks.Task record"),
        ("{}/mine.py:BROKEN", "the example of obqa: ZeroDivisionError"),
    ],
)
def test_the_list_of_tasks_answers_bad_names_in_one_line(tasks_script, tmp_path, name, words):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom dataset.tasks import *\nNUMBER = 5\n"
        "OBQA = MULTIPLE_CHOICE_TASKS['obqa']\n"
        "BROKEN = dataclasses.replace(OBQA, prompt=lambda row: 1 / 0)\n"
    )
    code, out, err = tasks_script(name.format(tmp_path))
    assert code == 2 and words in err and out == ""
