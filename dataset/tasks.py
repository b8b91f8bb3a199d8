"""One `Task` record per data set. Adding a data set is adding a record.

Prompt templates and answer keys are those of the published multiple-choice protocol (Laplace-LoRA,
arXiv 2308.13111; BLoB, arXiv 2406.11675). The embedded tasks are in `embedded.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from dataset.columns import (
    LETTERS,
    among,
    boolean_answer,
    class_index,
    letter_or_number,
    options_of,
    sentences,
    text_of,
    zero_based,
)
from dataset.embedded import (
    EMBEDDED_CLASSIFICATION,
    EMBEDDED_MULTIPLE_CHOICE,
    TRAIN_TEST,
)
from dataset.record import Prompt, Task, checked_task
from dataset.shift import clean_of
from dataset.sources import Hub, HubGroup, Row
from utils.data_set_names import data_set_name, is_table, noisy_block, split_noise
from utils.embedded import TOPICS
from utils.errors import UsageError, quoted
from utils.registry import lookup
from utils.run_paths import PARTS

# What a record in a file of a user's own is made with: `from dataset.tasks import *`.
__all__ = [
    "CLASSIFICATION_TASKS",
    "INSTRUCTION",
    "LETTERS",
    "MULTIPLE_CHOICE_TASKS",
    "TOPICS",
    "Hub",
    "HubGroup",
    "Prompt",
    "Row",
    "Task",
    "among",
    "boolean_answer",
    "checked_task",
    "class_index",
    "find_task",
    "letter_or_number",
    "multiple_choice",
    "options_of",
    "sentences",
    "text_of",
    "zero_based",
]

TRAIN_VALIDATION = {"train": "train", "val": "validation"}


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """The record of a data set, by its name in `tasks` or as FILE.py:NAME.

    Raises:
        UsageError: there is none of that name, or a field of it breaks its rule.
    """
    return checked_task(lookup(tasks, name, "data set"), name)


def check_shifted(args, tasks: Mapping[str, Task]) -> None:
    """Hold the names of --dataset and --ood-datasets against each other.

    Each has a block of metrics.json and a file of predictions of its name, which another of that
    name would replace.

    Raises:
        UsageError: one of them is unknown, two have one name, the rows of --dataset have no labels,
            or nobody knows in which columns errors are to be put.
    """
    if not is_table(args.dataset) and (task := find_task(args.dataset, tasks)).label is None:
        raise UsageError(
            f"--dataset {quoted(args.dataset)}: the rows of {task.name} belong to none of its "
            "classes; they are for --ood-datasets, beside the data set that is trained on."
        )
    taken = {_block(args.dataset, tasks).lower(), data_set_name(args.dataset).lower(), *PARTS}
    for name in args.ood_datasets or ():
        shifted = _block(name, tasks)
        if shifted.lower() in taken:
            raise UsageError(
                f"--ood-datasets {quoted(name)}: the results of a data set are kept under its "
                f"name, and there already are some of {quoted(shifted)} (--dataset is "
                f"{quoted(args.dataset)}); name each data set once, or rename yours."
            )
        taken.add(shifted.lower())


def _block(dataset: str, tasks: Mapping[str, Task]) -> str:
    """What the results of a data set are kept under; of a table it is known without reading it."""
    base, strength = split_noise(dataset)
    if is_table(base):
        return data_set_name(dataset)
    task = find_task(base, tasks)
    if strength is None:
        return task.name
    if not task.text_columns:
        raise UsageError(
            f"--ood-datasets {quoted(dataset)}: the record of {task.name} names no columns of free "
            "text ('text_columns') that errors can be put into without changing the answer."
        )
    return noisy_block(task.name, strength)


# --- prompts --------------------------------------------------------------------------------------

INSTRUCTION = "Return the label of the correct answer for the question below.\n\n"


def multiple_choice(question: str, choices: list[str], form: str = "{letter}) {text}") -> Prompt:
    """Instruction, question, one line per choice, and "Answer:"."""
    if not question.strip():
        raise ValueError("the question is empty")
    # Rows with answers 1..4 are shown with letters like all others: the answer tokens are letters.
    lines = "\n".join(
        form.format(letter=letter, text=text)
        for letter, text in zip(LETTERS, choices, strict=False)
    )
    return Prompt(f"{INSTRUCTION}Question: {question}\nChoices:\n{lines}\nAnswer:", "", "")


def winogrande_prompt(row: Row) -> Prompt:
    return multiple_choice(
        text_of(row, "sentence"), [text_of(row, "option1"), text_of(row, "option2")]
    )


def asked(question: str, key: str) -> Callable[[Row], Prompt]:
    """The prompt of a row whose question and choices stand in these two columns."""
    return lambda row: multiple_choice(text_of(row, question), options_of(row, key))


def text_first(question: str) -> Callable[[Row], Prompt]:
    """Choices as the published runs write those of ARC and OBQA, with the rows' own labels."""

    def prompt(row: Row) -> Prompt:
        pairs = zip(options_of(row, "choices"), row["choices"]["label"], strict=True)
        return multiple_choice(
            text_of(row, question), [f"{text}) {label}" for text, label in pairs], "{text}"
        )

    return prompt


def sciq_choices(row: Row) -> list[str]:
    """The right answer and the three distractors, in an order that depends on the question only.

    The source names them apart: in any fixed order the answer would always have the same letter.
    Errors in the question (`dataset.shift`) do not change it.
    """
    question = text_of(clean_of(row), "question")
    texts = [
        text_of(row, key) for key in ("correct_answer", *(f"distractor{i}" for i in (1, 2, 3)))
    ]
    return sorted(texts, key=lambda text: hashlib.sha256((question + text).encode()).digest())


def sciq_label(row: Row) -> int:
    """Where `sciq_choices` has put the right answer."""
    return sciq_choices(row).index(row["correct_answer"])


def sciq_prompt(row: Row) -> Prompt:
    return multiple_choice(text_of(row, "question"), sciq_choices(row))


def hellaswag_prompt(row: Row) -> Prompt:
    question = f"Which ending completes this text? {text_of(row, 'ctx')}"
    return multiple_choice(question, options_of(row, "endings"))


def boolq_prompt(row: Row) -> Prompt:
    return Prompt(
        "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
        "Passage: ",
        text_of(row, "passage"),
        f"\nQuestion: {text_of(row, 'question')}\nAnswer (true or false):",
    )


def wic_sentences(row: Row) -> tuple[str, str]:
    """The word is part of the input: the sentences alone do not say whose sense is asked for."""
    return f"{text_of(row, 'word')}: {text_of(row, 'sentence1')}", text_of(row, "sentence2")


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
        text_columns=("sentence",),
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
        prompt=asked("question", "choices"),
        text_columns=("question",),
        label=among("choices", letter_or_number("answerKey")),
        published={"choice_format": {"prompt": text_first("question")}},
        example=example,
    )


def _mmlu(name: str, *subjects: str) -> Task:
    return Task(
        name=f"MMLU-{name}",
        source=HubGroup("cais/mmlu", subjects),
        splits={"val": "test", "test": "test", "shots": "dev"},
        columns=("question", "choices", "answer"),
        choices=LETTERS[:4],
        prompt=asked("question", "choices"),
        text_columns=("question",),
        label=among("choices", zero_based("answer")),
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
        text_columns=tuple(key for key in keys if key != "word"),  # WiC's, whose sense is asked for
        **({"prompt": sentences(*keys)} | other),
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
        # CoLA asks for the errors of a sentence: with others in it the label would be another
        text_columns=() if name == "cola" else keys,
    )


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


MULTIPLE_CHOICE_TASKS = (
    EMBEDDED_MULTIPLE_CHOICE
    | _by_name(
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
            prompt=asked("question_stem", "choices"),
            text_columns=("question_stem",),
            label=among("choices", letter_or_number("answerKey")),
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
            text_columns=("passage", "question"),
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
            prompt=asked("question", "choices"),
            text_columns=("question",),
            label=among("choices", letter_or_number("answerKey")),
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
            text_columns=("question",),
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
            text_columns=("ctx",),
            label=among("endings", zero_based("label")),
            example={
                "ctx": "A man sits down at a piano. He",
                "endings": ["eats it.", "swims away.", "begins to play.", "melts."],
                "label": "2",
            },
        ),
    )
)

CLASSIFICATION_TASKS = EMBEDDED_CLASSIFICATION | _by_name(
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
        text_columns=("text",),
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
        text_columns=("text",),
        label=class_index(4),
        example={"text": "Late goal decides the final", "label": 1},
    ),
)
