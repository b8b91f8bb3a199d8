"""One `Task` record per data set. Adding a data set is adding a record.

Prompt templates and answer keys are those of the published multiple-choice protocol (Laplace-LoRA,
arXiv 2308.13111; BLoB, arXiv 2406.11675). The embedded tasks are this project's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.sources import BBCNews, Hub, HubGroup, Row, Source
from utils.embedded import TOPICS


class Prompt(NamedTuple):
    """What a causal LM reads. Only `context` may be shortened to fit --max-seq-len."""

    head: str
    context: str
    tail: str


@dataclass(frozen=True)
class Task:
    """A data set: where its rows are, how a row reads, and what its answer is.

    Attributes:
        name: as in --dataset.
        source: hub id, or the embedded corpus. `--data-dir` replaces it.
        splits: "train", "val" and "test" (as in --testing-set) to the source's split names. The
            published protocol evaluates on "val".
        columns: the columns that a row must have.
        choices: the answers, in label order: words for a causal LM, class names for a classifier.
        prompt: row -> `Prompt` (multiple choice), or a tuple of one or two sentences (classifier).
        label: row -> index into `choices`; raises ValueError or KeyError on an unknown answer.
        published: where the published runs differ: flag name -> fields of the record to replace.
            "choice_format" for text_first, "boolq_tokens" for swapped.
        eos_published: whether they append end-of-text to the prompt (--append-eos).
        example: a row in the source's schema, written by hand: documentation (`scripts/tasks.py`
            renders it), and what the golden tests render.
    """

    name: str
    source: Source
    splits: dict[str, str]
    columns: tuple[str, ...]
    choices: tuple[str, ...]
    prompt: Callable[[Row], Prompt | tuple[str, ...]]
    label: Callable[[Row], int]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eos_published: bool = False
    example: Row | None = None


LETTERS = ("A", "B", "C", "D", "E")
TRAIN_VALIDATION = {"train": "train", "val": "validation"}
TRAIN_TEST = {"train": "train", "val": "test", "test": "test"}


# --- answers --------------------------------------------------------------------------------------


def letter_or_number(key: str) -> Callable[[Row], int]:
    """An answer key that is a letter from A on, or a number from 1 on (some rows of ARC)."""

    def label(row: Row) -> int:
        answer = str(row[key]).strip()
        return int(answer) - 1 if answer.isdigit() else LETTERS.index(answer)

    return label


def class_index(num_labels: int, key: str = "label") -> Callable[[Row], int]:
    """A class index, as in GLUE. -1 (an unlabelled row of a hidden test set) is an error."""

    def label(row: Row) -> int:
        return range(num_labels).index(int(row[key]))

    return label


def zero_based(key: str) -> Callable[[Row], int]:
    """An index from 0 on, as in MMLU and HellaSwag."""
    return lambda row: int(row[key])


def sciq_label(row: Row) -> int:
    """Where `sciq_choices` has put the right answer."""
    return sciq_choices(row).index(row["correct_answer"])


def boolean_answer(key: str) -> Callable[[Row], int]:
    """True -> 0, False -> 1: the order of the answer words."""

    def label(row: Row) -> int:
        return ("true", "false").index(str(row[key]).lower())

    return label


def topic(row: Row) -> int:
    return TOPICS.index(row["topic"])


# --- prompts --------------------------------------------------------------------------------------

INSTRUCTION = "Return the label of the correct answer for the question below.\n\n"


def multiple_choice(question: str, choices: list[str], form: str = "{letter}) {text}") -> Prompt:
    """Instruction, question, one line per choice, and "Answer:"."""
    if isinstance(choices, str):
        raise ValueError(f"the choices are no list, but {choices!r}")
    if not 0 < len(choices) <= len(LETTERS):
        raise ValueError("no choices" if not choices else f"more than {len(LETTERS)} choices")
    # Rows with answers 1..4 are shown with letters like all others: the answer tokens are letters.
    lines = "\n".join(
        form.format(letter=letter, text=text)
        for letter, text in zip(LETTERS, choices, strict=False)
    )
    return Prompt(f"{INSTRUCTION}Question: {question}\nChoices:\n{lines}\nAnswer:", "", "")


def winogrande_prompt(row: Row) -> Prompt:
    return multiple_choice(row["sentence"], [row["option1"], row["option2"]])


def arc_prompt(row: Row) -> Prompt:
    return multiple_choice(row["question"], row["choices"]["text"])


def obqa_prompt(row: Row) -> Prompt:
    return multiple_choice(row["question_stem"], row["choices"]["text"])


def text_first(question: str) -> Callable[[Row], Prompt]:
    """Choices as the published runs write those of ARC and OBQA, with the rows' own labels."""

    def prompt(row: Row) -> Prompt:
        pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        return multiple_choice(
            row[question], [f"{text}) {label}" for text, label in pairs], "{text}"
        )

    return prompt


def mmlu_prompt(row: Row) -> Prompt:
    return multiple_choice(row["question"], row["choices"])


def commonsense_qa_prompt(row: Row) -> Prompt:
    return multiple_choice(row["question"], row["choices"]["text"])


def sciq_choices(row: Row) -> list[str]:
    """The right answer and the three distractors, in an order that hangs on the question only.

    The source names them apart: in any fixed order the answer would always have the same letter.
    """
    texts = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
    return sorted(
        texts, key=lambda text: hashlib.sha256((row["question"] + text).encode()).digest()
    )


def sciq_prompt(row: Row) -> Prompt:
    return multiple_choice(row["question"], sciq_choices(row))


def hellaswag_prompt(row: Row) -> Prompt:
    return multiple_choice(f"Which ending completes this text? {row['ctx']}", row["endings"])


def boolq_prompt(row: Row) -> Prompt:
    return Prompt(
        "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
        "Passage: ",
        row["passage"],
        f"\nQuestion: {row['question']}\nAnswer (true or false):",
    )


def bbc_prompt(row: Row) -> Prompt:
    # Topic words are asked for, not letters: a 135M model learns words in forty updates and stays
    # near chance on letters.
    words = ", ".join(TOPICS)
    return Prompt(f"Topics: {words}.\n\nNews: ", row["text"], "\nTopic:")


def wic_sentences(row: Row) -> tuple[str, str]:
    """The word is part of the input: the sentences alone do not say whose sense is asked for."""
    return f"{row['word']}: {row['sentence1']}", row["sentence2"]


def sentences(*keys: str) -> Callable[[Row], tuple[str, ...]]:
    return lambda row: tuple(row[key] for key in keys)


# --- the records ----------------------------------------------------------------------------------


def _lettered(*texts: str) -> dict[str, list[str]]:
    """The column `choices` of ARC, OBQA and CommonsenseQA."""
    return {"text": list(texts), "label": list(LETTERS[: len(texts)])}


def _winogrande(size: str) -> Task:
    name = f"winogrande_{size}"
    return Task(
        name=name,
        source=Hub("allenai/winogrande", name),
        splits=TRAIN_VALIDATION,
        columns=("sentence", "option1", "option2", "answer"),
        choices=LETTERS[:2],
        prompt=winogrande_prompt,
        label=letter_or_number("answer"),
        eos_published=True,
        example={
            "sentence": "Ann lent Eve a ladder because _ had to paint a wall.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
    )


def _arc(name: str, example: Row) -> Task:
    return Task(
        name=name,
        source=Hub("allenai/ai2_arc", name),
        splits=TRAIN_VALIDATION | {"test": "test"},
        columns=("question", "choices", "answerKey"),
        choices=LETTERS,
        prompt=arc_prompt,
        label=letter_or_number("answerKey"),
        published={"choice_format": {"prompt": text_first("question")}},
        example=example,
    )


def _mmlu(name: str, *subjects: str) -> Task:
    return Task(
        name=f"MMLU-{name}",
        source=HubGroup("cais/mmlu", subjects),
        splits={"val": "test", "test": "test"},
        columns=("question", "choices", "answer"),
        choices=LETTERS[:4],
        prompt=mmlu_prompt,
        label=zero_based("answer"),
        example={
            "question": f"Which of these belongs to {subjects[0].replace('_', ' ')}?",
            "subject": subjects[0],
            "choices": ["a recipe", "a song", "a map of the sea", "this question"],
            "answer": 3,
        },
    )


def _super_glue(name: str, choices: tuple[str, ...], example: Row, **other) -> Task:
    keys = tuple(key for key in example if key != "label")
    return Task(
        name=name,
        source=Hub("aps/super_glue", name),
        splits=TRAIN_VALIDATION,
        columns=(*keys, "label"),
        choices=choices,
        label=class_index(len(choices)),
        example=example,
        **({"prompt": sentences(*keys)} | other),
    )


def _bbc(
    name: str, text: str, as_prompt: Callable[[Row], Prompt | tuple[str, ...]], example: Row
) -> Task:
    return Task(
        name=name,
        source=BBCNews(text),
        splits=TRAIN_TEST,
        columns=("text", "topic"),
        choices=TOPICS,
        prompt=as_prompt,
        label=topic,
        example=example,
    )


def _glue(name: str, choices: tuple[str, ...], example: Row) -> Task:
    keys = tuple(key for key in example if key != "label")
    return Task(
        name=name,
        source=Hub("nyu-mll/glue", name),
        splits={"train": "train", "val": "validation_matched" if name == "mnli" else "validation"},
        columns=(*keys, "label"),
        choices=choices,
        prompt=sentences(*keys),
        label=class_index(len(choices)),
        example=example,
    )


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


BBC_HEADLINE = {"text": "Airline profit rises", "topic": "business"}
BBC_BODY = {"text": "The match ended in a draw after extra time.", "topic": "sports"}

MULTIPLE_CHOICE_TASKS = _by_name(
    _bbc("bbc_headlines", "headline", bbc_prompt, BBC_HEADLINE),
    _bbc("bbc_bodies", "body", bbc_prompt, BBC_BODY),
    *(_winogrande(size) for size in ("xs", "s", "m", "l", "xl")),
    _arc(
        "ARC-Challenge",
        {  # some rows number their choices
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ),
    _arc(
        "ARC-Easy",
        {  # a few rows have five choices
            "question": "Which one can fly?",
            "choices": _lettered("a stone", "a fish", "a tree", "a chair", "a gull"),
            "answerKey": "E",
        },
    ),
    Task(
        name="obqa",
        source=Hub("allenai/openbookqa", "main"),
        splits=TRAIN_VALIDATION | {"test": "test"},
        columns=("question_stem", "choices", "answerKey"),
        choices=LETTERS[:4],
        prompt=obqa_prompt,
        label=letter_or_number("answerKey"),
        published={"choice_format": {"prompt": text_first("question_stem")}},
        example={
            "question_stem": "The sun is",
            "choices": _lettered("a planet", "a moon", "a comet", "a star"),
            "answerKey": "D",
        },
    ),
    Task(
        name="boolq",
        source=Hub("google/boolq"),
        splits=TRAIN_VALIDATION,
        columns=("passage", "question", "answer"),
        choices=("True", "False"),
        prompt=boolq_prompt,
        label=boolean_answer("answer"),
        published={"boolq_tokens": {"choices": ("False", "True")}},
        eos_published=True,
        example={"passage": "Water is wet.", "question": "is water wet", "answer": True},
    ),
    _mmlu("chem", "college_chemistry"),
    _mmlu("phy", "college_physics"),
    _mmlu("bio", "college_biology"),
    _mmlu(
        "cs",
        "college_computer_science",
        "high_school_computer_science",
        "computer_security",
        "machine_learning",
    ),
    _mmlu("eng", "electrical_engineering"),
    _mmlu("law", "international_law", "jurisprudence", "professional_law"),
    _mmlu(
        "health",
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    Task(
        name="commonsense_qa",
        source=Hub("tau/commonsense_qa"),
        splits=TRAIN_VALIDATION,
        columns=("question", "choices", "answerKey"),
        choices=LETTERS,
        prompt=commonsense_qa_prompt,
        label=letter_or_number("answerKey"),
        example={
            "question": "Where does a book stand?",
            "choices": _lettered("oven", "shelf", "pond", "engine", "cloud"),
            "answerKey": "B",
        },
    ),
    Task(
        name="sciq",
        source=Hub("allenai/sciq"),
        splits=TRAIN_VALIDATION | {"test": "test"},
        columns=("question", "correct_answer", "distractor1", "distractor2", "distractor3"),
        choices=LETTERS[:4],
        prompt=sciq_prompt,
        label=sciq_label,
        example={
            "question": "What do plants take from the air?",
            "correct_answer": "carbon dioxide",
            "distractor1": "oxygen",
            "distractor2": "helium",
            "distractor3": "steam",
        },
    ),
    Task(
        name="hellaswag",
        source=Hub("Rowan/hellaswag"),
        splits=TRAIN_VALIDATION,
        columns=("ctx", "endings", "label"),
        choices=LETTERS[:4],
        prompt=hellaswag_prompt,
        label=zero_based("label"),
        example={
            "ctx": "A man sits down at a piano. He",
            "endings": ["eats it.", "swims away.", "begins to play.", "melts."],
            "label": "2",
        },
    ),
)

CLASSIFICATION_TASKS = _by_name(
    _bbc("bbc_headlines", "headline", sentences("text"), BBC_HEADLINE),
    _bbc("bbc_bodies", "body", sentences("text"), BBC_BODY),
    _glue(
        "rte",
        ("entailment", "not_entailment"),
        {"sentence1": "Al owns two dogs.", "sentence2": "Al owns a dog.", "label": 0},
    ),
    _glue(
        "mrpc",
        ("not_equivalent", "equivalent"),
        {"sentence1": "It rained all day.", "sentence2": "All day it rained.", "label": 1},
    ),
    _glue("cola", ("unacceptable", "acceptable"), {"sentence": "Dog the barks.", "label": 0}),
    _glue("sst2", ("negative", "positive"), {"sentence": "a warm and funny film", "label": 1}),
    _glue(
        "mnli",
        ("entailment", "neutral", "contradiction"),
        {"premise": "Nobody came.", "hypothesis": "The room was full.", "label": 2},
    ),
    _glue(
        "wnli",
        ("not_entailment", "entailment"),
        {
            "sentence1": "Eve thanked Ann because she had helped.",
            "sentence2": "Ann had helped.",
            "label": 1,
        },
    ),
    _glue(
        "qnli",
        ("entailment", "not_entailment"),
        {"question": "Who won?", "sentence": "The home team won.", "label": 0},
    ),
    _glue(
        "qqp",
        ("not_duplicate", "duplicate"),
        {"question1": "How far is it?", "question2": "What is the distance?", "label": 1},
    ),
    _super_glue(
        "wic",
        ("False", "True"),
        {"word": "bank", "sentence1": "A bank lends.", "sentence2": "The bank is wet.", "label": 0},
        prompt=wic_sentences,
    ),
    _super_glue(
        "boolq",
        ("False", "True"),
        {"question": "is water wet", "passage": "Water is wet.", "label": 1},
    ),
    _super_glue(
        "cb",
        ("entailment", "contradiction", "neutral"),
        {"premise": "I doubt that he came.", "hypothesis": "He came.", "label": 1},
    ),
    Task(
        name="imdb",
        source=Hub("stanfordnlp/imdb"),
        splits=TRAIN_TEST,
        columns=("text", "label"),
        choices=("negative", "positive"),
        prompt=sentences("text"),
        label=class_index(2),
        example={"text": "I would see it again.", "label": 1},
    ),
    Task(
        name="ag_news",
        source=Hub("fancyzhx/ag_news"),
        splits=TRAIN_TEST,
        columns=("text", "label"),
        choices=("World", "Sports", "Business", "Sci/Tech"),
        prompt=sentences("text"),
        label=class_index(4),
        example={"text": "Late goal decides the final", "label": 1},
    ),
)
