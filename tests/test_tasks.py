"""Golden prompts, labels and answers of every task, on rows written by hand in the hub's schema."""

import pytest

from dataset.tasks import CLASSIFICATION_TASKS, MULTIPLE_CHOICE_TASKS, TOPICS, Prompt

TOPIC_LINE = "Topics: business, entertainment, politics, sports, tech.\n\nNews: "
HEAD = "Return the label of the correct answer for the question below.\n\nQuestion: "
ABCD = {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]}
SCIQ = {
    "question": "What do plants breathe in?",
    "correct_answer": "carbon dioxide",
    "distractor1": "oxygen",
    "distractor2": "helium",
    "distractor3": "steam",
}

# task -> (row, prompt, label)
MULTIPLE_CHOICE = {
    "bbc_headlines": (
        {"text": "Ad sales boost profit", "topic": "business"},
        f"{TOPIC_LINE}Ad sales boost profit\nTopic:",
        0,
    ),
    "bbc_bodies": (
        {"text": "The match ended.", "topic": "sports"},
        f"{TOPIC_LINE}The match ended.\nTopic:",
        3,
    ),
    **{
        f"winogrande_{size}": (
            {"sentence": "Al beat Bo as _ ran.", "option1": "Al", "option2": "Bo", "answer": "1"},
            f"{HEAD}Al beat Bo as _ ran.\nChoices:\nA) Al\nB) Bo\nAnswer:",
            0,
        )
        for size in ("xs", "s", "m", "l", "xl")
    },
    "ARC-Challenge": (
        {
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        f"{HEAD}Which is hot?\nChoices:\nA) ice\nB) fire\nC) snow\nAnswer:",
        1,
    ),
    "ARC-Easy": (
        {
            "question": "Which?",
            "choices": {"text": ["a", "b", "c", "d", "e"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "E",
        },
        f"{HEAD}Which?\nChoices:\nA) a\nB) b\nC) c\nD) d\nE) e\nAnswer:",
        4,
    ),
    "obqa": (
        {"question_stem": "The sun is", "choices": ABCD, "answerKey": "D"},
        f"{HEAD}The sun is\nChoices:\nA) w\nB) x\nC) y\nD) z\nAnswer:",
        3,
    ),
    "boolq": (
        {"passage": "Water is wet.", "question": "is water wet", "answer": True},
        "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
        "Passage: Water is wet.\nQuestion: is water wet\nAnswer (true or false):",
        0,
    ),
    **{
        f"MMLU-{name}": (
            {"question": "2+2?", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "s"},
            f"{HEAD}2+2?\nChoices:\nA) 1\nB) 2\nC) 3\nD) 4\nAnswer:",
            3,
        )
        for name in ("chem", "phy", "bio", "cs", "eng", "law", "health")
    },
    "commonsense_qa": (
        {"question": "Where?", "choices": ABCD, "answerKey": "B"},
        f"{HEAD}Where?\nChoices:\nA) w\nB) x\nC) y\nD) z\nAnswer:",
        1,
    ),
    "sciq": (SCIQ, None, None),
    "hellaswag": (
        {"ctx": "A man sits.", "endings": ["He", "She", "It", "They"], "label": "2"},
        f"{HEAD}Which ending completes this text? A man sits.\n"
        "Choices:\nA) He\nB) She\nC) It\nD) They\nAnswer:",
        2,
    ),
}
PAIR = {"sentence1": "One.", "sentence2": "Two.", "label": 1}
CLASSIFICATION = {
    "bbc_headlines": ({"text": "A", "topic": "tech"}, ("A",), 4),
    "bbc_bodies": ({"text": "A", "topic": "politics"}, ("A",), 2),
    "rte": (PAIR, ("One.", "Two."), 1),
    "mrpc": (PAIR, ("One.", "Two."), 1),
    "wnli": (PAIR, ("One.", "Two."), 1),
    "cola": ({"sentence": "One.", "label": 0}, ("One.",), 0),
    "sst2": ({"sentence": "One.", "label": 1}, ("One.",), 1),
    "mnli": ({"premise": "P", "hypothesis": "H", "label": 2}, ("P", "H"), 2),
    "qnli": ({"question": "Q", "sentence": "S", "label": 0}, ("Q", "S"), 0),
    "qqp": ({"question1": "Q", "question2": "R", "label": 1}, ("Q", "R"), 1),
    "wic": (PAIR | {"word": "place"}, ("place: One.", "Two."), 1),
    "boolq": ({"question": "Q", "passage": "P", "label": 1}, ("Q", "P"), 1),
    "cb": ({"premise": "P", "hypothesis": "H", "label": 2}, ("P", "H"), 2),
    "imdb": ({"text": "Fine.", "label": 1}, ("Fine.",), 1),
    "ag_news": ({"text": "Goal.", "label": 1}, ("Goal.",), 1),
}


def test_every_task_has_a_golden_row():
    assert MULTIPLE_CHOICE.keys() == MULTIPLE_CHOICE_TASKS.keys()
    assert CLASSIFICATION.keys() == CLASSIFICATION_TASKS.keys()


@pytest.mark.parametrize("name", sorted(MULTIPLE_CHOICE.keys() - {"sciq"}))
def test_prompt_and_label_of_multiple_choice(name):
    task = MULTIPLE_CHOICE_TASKS[name]
    row, prompt, label = MULTIPLE_CHOICE[name]
    assert set(task.columns) <= row.keys()
    rendered = task.prompt(row)
    assert isinstance(rendered, Prompt) and "".join(rendered) == prompt
    assert task.label(row) == label < len(task.choices)


@pytest.mark.parametrize("name", sorted(CLASSIFICATION))
def test_sentences_and_label_of_classification(name):
    task = CLASSIFICATION_TASKS[name]
    row, sentences, label = CLASSIFICATION[name]
    assert set(task.columns) <= row.keys()
    assert task.prompt(row) == sentences
    assert task.label(row) == label < len(task.choices)


def test_sciq_shuffles_its_choices_by_the_question_only():
    task = MULTIPLE_CHOICE_TASKS["sciq"]
    labels = []
    for number in range(200):
        row = SCIQ | {"question": f"Question {number}?"}
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
    row = MULTIPLE_CHOICE["boolq"][0] | {"answer": answer}
    assert MULTIPLE_CHOICE_TASKS["boolq"].label(row) == 0


def test_mmlu_groups_load_subject_after_subject(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [MULTIPLE_CHOICE["MMLU-law"][0] | {"subject": config}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = MULTIPLE_CHOICE_TASKS["MMLU-law"].source.rows("test")
    subjects = ["international_law", "jurisprudence", "professional_law"]
    assert asked == [("cais/mmlu", subject, "test") for subject in subjects]
    assert [row["subject"] for _, row in rows] == subjects
