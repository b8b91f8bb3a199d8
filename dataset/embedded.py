"""Tasks on the embedded corpus of BBC news: headlines, bodies, and a topic that training never saw.

    bbc_headlines, bbc_bodies    five topics
    bbc_unseen_topic             headlines of four topics, all but "tech"
    bbc_unseen_topic:ood         those of "tech": of none of the four classes, for --ood-datasets

These tasks are this project's own.
"""

from __future__ import annotations

from collections.abc import Callable

from dataset.columns import sentences, text_of
from dataset.record import Prompt, Task
from dataset.sources import BBCNews, Row
from utils.embedded import TOPICS
from utils.errors import quoted

TRAIN_TEST = {"train": "train", "val": "test", "test": "test"}
UNSEEN = "tech"  # of the five, what the others are most easily taken for
BBC_HEADLINE = {"text": "Airline profit rises", "topic": "business"}
BBC_BODY = {"text": "The match ended in a draw after extra time.", "topic": "sports"}
BBC_UNSEEN = {"text": "Phone makers agree on a chip", "topic": UNSEEN}


def topic_among(topics: tuple[str, ...]) -> Callable[[Row], int]:
    """The index of a row's topic."""

    def label(row: Row) -> int:
        if row["topic"] not in topics:
            raise ValueError(f"column 'topic' is {quoted(row['topic'])}")
        return topics.index(row["topic"])

    return label


def bbc_prompt(topics: tuple[str, ...]) -> Callable[[Row], Prompt]:
    """The prompt that asks for one of these topics."""
    # Topic words are asked for, not letters: a 135M model learns words in forty updates and stays
    # near chance on letters.
    words = ", ".join(topics)

    def prompt(row: Row) -> Prompt:
        text = text_of(row, "text")
        if not text.strip():
            raise ValueError("column 'text' is empty")
        return Prompt(f"Topics: {words}.\n\nNews: ", text, "\nTopic:")

    return prompt


Reading = Callable[[tuple[str, ...]], Callable[[Row], Prompt | tuple[str, ...]]]


def _bbc(
    name: str, text: str, reading: Reading, example: Row, topics: tuple[str, ...] = TOPICS
) -> Task:
    """Headlines or bodies of some topics."""
    return Task(
        name=name,
        source=BBCNews(text, topics=topics),
        splits=TRAIN_TEST,
        columns=("text", "topic"),
        choices=topics,
        prompt=reading(topics),
        label=topic_among(topics),
        published={"bbc_split": {"source": BBCNews(text, version=1, topics=topics)}},
        example=example,
        text_columns=("text",),
    )


def _tasks(reading: Reading) -> dict[str, Task]:
    known = tuple(topic for topic in TOPICS if topic != UNSEEN)
    unseen = Task(
        name="bbc_unseen_topic-ood",
        source=BBCNews("headline", topics=(UNSEEN,)),
        splits={"val": "test", "test": "test"},
        columns=("text",),
        choices=known,
        prompt=reading(known),
        label=None,
        example=BBC_UNSEEN,
        text_columns=("text",),
    )
    return {
        "bbc_headlines": _bbc("bbc_headlines", "headline", reading, BBC_HEADLINE),
        "bbc_bodies": _bbc("bbc_bodies", "body", reading, BBC_BODY),
        "bbc_unseen_topic": _bbc("bbc_unseen_topic", "headline", reading, BBC_HEADLINE, known),
        "bbc_unseen_topic:ood": unseen,
    }


EMBEDDED_MULTIPLE_CHOICE = _tasks(bbc_prompt)
EMBEDDED_CLASSIFICATION = _tasks(lambda topics: sentences("text"))
