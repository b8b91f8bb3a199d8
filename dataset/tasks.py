"""One `Task` record per data set. Adding a data set is adding a record.

Prompt templates and answer keys are those of the published multiple-choice protocol (Laplace-LoRA,
arXiv 2308.13111; BLoB, arXiv 2406.11675). The embedded tasks are this project's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.sources import BBCNews, Hub, HubGroup, Row, Source
from utils.embedded import TOPICS
from utils.errors import UsageError, quoted
from utils.registry import lookup
from utils.run_paths import PARTS, data_set_name
from utils.table_task import TableTask, is_table


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
        source: hub id, or the embedded corpus; anything with `rows(split)` that gives (where, row),
            or None where `--data-dir`, which replaces it, is always given.
        splits: "train", "val" and "test" (as in --testing-set) to the source's split names. The
            published protocol evaluates on "val". "shots", if the source has such a split, is
            where --num-shots takes its solved examples from; else that is "train".
        columns: the columns that a row must have.
        choices: the answers, in label order: words for a causal LM, class names for a classifier.
        prompt: row -> `Prompt` (multiple choice), or a tuple of one or two sentences (classifier).
        label: row -> index into `choices`; raises ValueError or KeyError on an unknown answer.
        published: where published or older runs differ: flag name -> fields of the record to
            replace. "choice_format" for text_first, "boolq_tokens" for swapped, "bbc_split" for 1.
        eos_published: whether they append end-of-text to the prompt (--append-eos).
        example: a row in the source's schema, written by hand: documentation (`scripts/tasks.py`
            renders it), and what the golden tests render.
        table: what a user's own table asks, where that is what the record was made from
            (`dataset.tables`).
    """

    name: str
    source: Source | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    choices: tuple[str, ...]
    prompt: Callable[[Row], Prompt | tuple[str, ...]]
    label: Callable[[Row], int]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eos_published: bool = False
    example: Row | None = None
    table: TableTask | None = None


LETTERS = ("A", "B", "C", "D", "E")
TRAIN_VALIDATION = {"train": "train", "val": "validation"}
TRAIN_TEST = {"train": "train", "val": "test", "test": "test"}
PUBLISHED_FLAGS = {"choice_format": "text_first", "boolq_tokens": "swapped", "bbc_split": 1}


# --- looking a record up --------------------------------------------------------------------------


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
        UsageError: one of them is unknown, or two have one name.
    """

    def name_of(dataset: str) -> str:
        """Of a table it is known without reading it."""
        return data_set_name(dataset) if is_table(dataset) else find_task(dataset, tasks).name

    taken = {name_of(args.dataset).lower(), data_set_name(args.dataset).lower(), *PARTS}
    for name in args.ood_datasets or ():
        shifted = name_of(name)
        if shifted.lower() in taken:
            raise UsageError(
                f"--ood-datasets {quoted(name)}: the results of a data set are kept under its "
                f"name, and there already are some of {quoted(shifted)} (--dataset is "
                f"{quoted(args.dataset)}); name each data set once, or rename yours."
            )
        taken.add(shifted.lower())


# --- a record of a user's own ---------------------------------------------------------------------


def checked_task(task: Any, spec: str) -> Task:
    """The record that --dataset or --ood-datasets names, after every field was looked at.

    Args:
        task: what stands under that name.
        spec: the name, for the message.
    Returns:
        the record, its lists turned into tuples.
    Raises:
        UsageError: no `Task`, or the first field that breaks its rule.
    """
    if not isinstance(task, Task):
        raise UsageError(f"--dataset {quoted(spec)}: it must be a dataset.tasks.Task record.")
    for name, (rule, holds) in _RULES.items():
        value = getattr(task, name)
        if not holds(value):
            raise UsageError(
                f"--dataset {quoted(spec)}: the field '{name}' is {quoted(value)}; it must be "
                f"{rule}."
            )
    if task.table is not None and tuple(task.choices) != task.table.answers:
        raise UsageError(
            f"--dataset {quoted(spec)}: the fields 'choices' and 'table' have other answers; leave "
            "'table' out: it is for tables, which need no record."
        )
    return dataclasses.replace(task, columns=tuple(task.columns), choices=tuple(task.choices))


def _is_text(value: Any) -> bool:
    """Text with something in it, and nothing that UTF-8 has no bytes for."""
    if not (isinstance(value, str) and value.strip()):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


NAME_RULE = (
    "text of at most 100 bytes, letters, digits and ._+- or spaces after them: it names files"
)


def is_name(value: Any) -> bool:
    """A name that can be a folder's or a part of a file's on any system."""
    if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > 100:
        return False
    return re.fullmatch(r"\w[\w.+ -]*", value) is not None


def _is_split(value: Any) -> bool:
    """A split's name: with --data-dir it is the beginning of a file's name, in that folder."""
    is_path = isinstance(value, str) and any(mark in value for mark in "/\\\0")
    return _is_text(value) and len(value) <= 100 and not is_path


def _are_texts(value: Any, least: int) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) >= least
        and all(map(_is_text, value))
        and len(set(value)) == len(value)
    )


def _is_source(value: Any) -> bool:
    if isinstance(value, Hub):
        return _is_text(value.path) and (value.config is None or _is_text(value.config))
    if isinstance(value, HubGroup):
        return _is_text(value.path) and _are_texts(value.configs, 1)
    is_class = isinstance(value, type)
    return value is None or (not is_class and callable(getattr(value, "rows", None)))


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(key in ("train", "val", "test", "shots") for key in value)
        and any(key != "shots" for key in value)
        and all(map(_is_split, value.values()))
    )


def _are_replacements(value: Any) -> bool:
    """For each flag fields of the record, each as the record's own rule has it."""
    return isinstance(value, Mapping) and all(
        key in PUBLISHED_FLAGS
        and isinstance(fields, Mapping)
        and all(name in _RULES and _RULES[name][1](new) for name, new in fields.items())
        for key, fields in value.items()
    )


# field of a `Task` -> what it must be, in words and as a function
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": (NAME_RULE, is_name),
    "source": (
        "Hub('owner/name', config), HubGroup, an object with a method rows(split), or None",
        _is_source,
    ),
    "splits": (
        "a dict from 'train', 'val' and 'test' (and 'shots', if there is one for --num-shots) to "
        "names of the source's splits, such as {'train': 'train', 'val': 'validation'}",
        _are_splits,
    ),
    "columns": ("a tuple of column names, each once", lambda value: _are_texts(value, 0)),
    "choices": (
        "a tuple of at least two different texts, none of them empty",
        lambda value: _are_texts(value, 2),
    ),
    "prompt": ("a function of a row", callable),
    "label": ("a function of a row", callable),
    "published": (
        "a dict from 'choice_format', 'boolq_tokens' and 'bbc_split' to fields of the record",
        _are_replacements,
    ),
    "eos_published": ("True or False", lambda value: isinstance(value, bool)),
    "example": (
        "a row (a dict), or None",
        lambda value: value is None or isinstance(value, Mapping),
    ),
    "table": ("a TableTask, or None", lambda value: value is None or isinstance(value, TableTask)),
}


# --- values of a row ------------------------------------------------------------------------------


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is text that a tokenizer can take.

    Raises:
        ValueError: it is something else, or has half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {quoted(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair at character {error.start}") from None
    return value


def text_of(row: Row, key: str) -> str:
    """The text of a column."""
    return checked_text(row[key], f"column '{key}'")


def options_of(row: Row, key: str) -> list[str]:
    """The texts of a row's choices: a list, or one under "text" beside their labels, as in ARC.

    Raises:
        ValueError: no list of one to five texts, or labels that are not A, B, C or 1, 2, 3.
    """
    texts, labels = row[key], None
    if isinstance(texts, Mapping):
        texts, labels = texts.get("text"), texts.get("label")
    if not isinstance(texts, list | tuple):
        raise ValueError(f"column '{key}': the choices are no list, but {quoted(texts)}")
    if not 0 < len(texts) <= len(LETTERS):
        problem = "no choices" if not texts else f"more than {len(LETTERS)} choices"
        raise ValueError(f"column '{key}' has {problem}")
    numbers = tuple(str(i + 1) for i in range(len(texts)))
    # in another order the answer key would name another choice than the one shown with its letter
    if labels is not None and (
        not isinstance(labels, list | tuple)
        or tuple(map(str, labels)) not in (LETTERS[: len(texts)], numbers)
    ):
        raise ValueError(
            f"column '{key}': the choices' labels are {quoted(labels)}; they must be A, B, C "
            "and so on, or 1, 2, 3 and so on, one for each choice"
        )
    return [checked_text(text, f"column '{key}': choice {i + 1}") for i, text in enumerate(texts)]


# --- answers --------------------------------------------------------------------------------------


def whole_number(row: Row, key: str, rule: str = "a whole number") -> int:
    """A column's whole number: an integer, 1.0 as pandas has it, or the digits of a CSV.

    Nothing is rounded, and True is no 1.

    Raises:
        ValueError: it is something else.
    """
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
        return int(value)
    raise ValueError(f"column '{key}' is {quoted(value)}; it must be {rule}")


def letter_or_number(key: str) -> Callable[[Row], int]:
    """An answer key that is a letter from A on, or a number from 1 on (some rows of ARC)."""
    rule = f"a letter from {LETTERS[0]} to {LETTERS[-1]}, or a number from 1 on"

    def label(row: Row) -> int:
        answer = row[key].strip() if isinstance(row[key], str) else None
        return LETTERS.index(answer) if answer in LETTERS else whole_number(row, key, rule) - 1

    return label


def class_index(num_labels: int, key: str = "label") -> Callable[[Row], int]:
    """A class index, as in GLUE. -1 (an unlabelled row of a hidden test set) is an error."""

    def label(row: Row) -> int:
        index = whole_number(row, key)
        if not 0 <= index < num_labels:
            raise ValueError(f"column '{key}' is {quoted(index)}; it must be 0 to {num_labels - 1}")
        return index

    return label


def zero_based(key: str) -> Callable[[Row], int]:
    """An index from 0 on, as in MMLU and HellaSwag."""
    return lambda row: whole_number(row, key)


def among(key: str, answer: Callable[[Row], int]) -> Callable[[Row], int]:
    """`answer`, which must be one of the choices that the row itself has in column `key`."""

    def label(row: Row) -> int:
        index, number = answer(row), len(options_of(row, key))
        if not 0 <= index < number:
            raise ValueError(f"the answer is choice {quoted(index + 1)} of {number}")
        return index

    return label


def sciq_label(row: Row) -> int:
    """Where `sciq_choices` has put the right answer."""
    return sciq_choices(row).index(row["correct_answer"])


def boolean_answer(key: str) -> Callable[[Row], int]:
    """True -> 0, False -> 1: the order of the answer words."""

    def label(row: Row) -> int:
        answer = row[key].strip().lower() if isinstance(row[key], str) else row[key]
        if isinstance(answer, bool):
            return int(not answer)
        if answer not in ("true", "false"):
            raise ValueError(f"column '{key}' is {quoted(row[key])}; it must be true or false")
        return ("true", "false").index(answer)

    return label


def topic(row: Row) -> int:
    if row["topic"] not in TOPICS:
        raise ValueError(f"column 'topic' is {quoted(row['topic'])}")
    return TOPICS.index(row["topic"])


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
    """
    question = text_of(row, "question")
    texts = [
        text_of(row, key) for key in ("correct_answer", *(f"distractor{i}" for i in (1, 2, 3)))
    ]
    return sorted(texts, key=lambda text: hashlib.sha256((question + text).encode()).digest())


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


def bbc_prompt(row: Row) -> Prompt:
    # Topic words are asked for, not letters: a 135M model learns words in forty updates and stays
    # near chance on letters.
    words = ", ".join(TOPICS)
    text = text_of(row, "text")
    if not text.strip():
        raise ValueError("column 'text' is empty")
    return Prompt(f"Topics: {words}.\n\nNews: ", text, "\nTopic:")


def wic_sentences(row: Row) -> tuple[str, str]:
    """The word is part of the input: the sentences alone do not say whose sense is asked for."""
    return f"{text_of(row, 'word')}: {text_of(row, 'sentence1')}", text_of(row, "sentence2")


def sentences(*keys: str) -> Callable[[Row], tuple[str, ...]]:
    return lambda row: tuple(text_of(row, key) for key in keys)


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
        prompt=asked("question", "choices"),
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
        published={"bbc_split": {"source": BBCNews(text, version=1)}},
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
        prompt=asked("question_stem", "choices"),
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
        label=among("endings", zero_based("label")),
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
