"""Row files, labels, names and records under generated input: rows or one message, never less.

The same inputs every time (`derandomize`), a few seconds in all.
"""

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataset.sources import load_rows
from dataset.tasks import (
    CLASSIFICATION_TASKS,
    MULTIPLE_CHOICE_TASKS,
    Task,
    boolean_answer,
    checked_task,
    class_index,
    letter_or_number,
    options_of,
    zero_based,
)
from utils.errors import UsageError
from utils.registry import lookup

TABLE = {**CLASSIFICATION_TASKS, **MULTIPLE_CHOICE_TASKS}


def examples(number: int):
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["A", "F", "1", "1 ", "0.7", "²", "١", "true", "\ud800", 10**400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        st.lists(children, max_size=6),
        st.dictionaries(st.sampled_from(["text", "label", "x"]), children, max_size=3),
    ),
    max_leaves=4,
)


def read(content: bytes, suffix: str, example: dict | None = None) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"train.{suffix}").write_bytes(content)
        return [row for _, row in load_rows(None, "train", folder, "mine", example)]


def as_csv(rows: list[dict], line_end: str = "\n") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


ROWS = st.lists(st.fixed_dictionaries({"text": TEXT, "topic": TEXT}), min_size=1, max_size=5)


@examples(80)
@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_rows_come_back_from_every_format_as_they_were(rows, line_end, with_mark):
    mark = b"\xef\xbb\xbf" if with_mark else b""
    lines = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read(mark + lines.encode(), "jsonl") == rows
    assert read(mark + json.dumps(rows).encode(), "json") == rows
    assert read(as_parquet(rows), "parquet") == rows
    assume(not any("\0" in value for row in rows for value in row.values()))
    assert read(mark + as_csv(rows, line_end), "csv", rows[0]) == rows


@examples(80)
@given(st.sampled_from(["jsonl", "json", "csv", "parquet"]), st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_message(suffix, content):
    try:
        assert read(content, suffix)
    except UsageError as error:
        assert len(str(error)) < 1000


WORD = st.text("ab1", min_size=1, max_size=4)
WORDS = st.lists(st.fixed_dictionaries({"text": WORD, "topic": WORD}), min_size=1, max_size=5)


@examples(150)
@given(WORDS, st.data())
def test_a_damaged_csv_is_never_fewer_rows_in_silence(rows, data):
    """One character is lost or put in: there is a message, or a row for every line that is left."""
    text = as_csv(rows).decode()
    at = data.draw(st.integers(0, len(text) - 1))
    put_in = data.draw(st.sampled_from(["", '"', ",", "x"]))
    damaged = text[:at] + put_in + text[at + (put_in == "") :]
    try:
        found = read(damaged.encode(), "csv", rows[0])
    except UsageError:
        return
    assert len(found) == len(damaged.splitlines()) - 1


@examples(150)
@given(st.text('",\n\rab', max_size=30))
def test_any_csv_text_has_all_its_characters_in_its_rows(text):
    try:
        found = read(f"text,topic\n{text}".encode(), "csv", {"text": "", "topic": ""})
    except UsageError:
        return
    letters = sum(character in "ab" for character in text)
    assert letters == sum(v.count("a") + v.count("b") for row in found for v in row.values())


@examples(60)
@given(VALUES)
def test_any_json_value_is_a_row_or_one_message(value):
    try:
        assert read(json.dumps(value).encode("utf-8", "surrogatepass"), "jsonl") == [value]
    except UsageError as error:
        assert len(str(error)) < 1000


LABELS = {
    "class_index": (class_index(3, "x"), range(3)),
    "letter_or_number": (letter_or_number("x"), None),
    "zero_based": (zero_based("x"), None),
    "boolean": (boolean_answer("x"), range(2)),
}


@pytest.mark.parametrize("name", LABELS)
@examples(150)
@given(value=VALUES)
def test_a_label_is_what_the_value_says_or_an_error(name, value):
    label, among = LABELS[name]
    try:
        found = label({"x": value})
    except ValueError as error:
        assert "column 'x'" in str(error)
        return
    assert type(found) is int and (among is None or found in among)
    if name in ("class_index", "zero_based"):
        number = int(value) if isinstance(value, str) else value
        assert not isinstance(value, bool) and found == number


@examples(100)
@given(VALUES)
def test_choices_are_texts_or_an_error(value):
    try:
        texts = options_of({"x": value}, "x")
    except ValueError as error:
        assert "column 'x'" in str(error)
    else:
        assert 0 < len(texts) <= 5 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("name", sorted(MULTIPLE_CHOICE_TASKS))
@examples(15)
@given(data=st.data())
def test_a_built_in_task_raises_nothing_but_value_errors(name, data):
    task = MULTIPLE_CHOICE_TASKS[name]
    row = task.example | {data.draw(st.sampled_from(task.columns)): data.draw(VALUES)}
    for function in filter(None, (task.prompt, task.label)):
        try:
            result = function(row)
        except ValueError:
            continue
        assert isinstance(result, int | tuple)


@examples(150)
@given(st.text(max_size=40) | st.sampled_from(["", "../x", "/", "x" * 10_000, "a.py:", ".py:B"]))
def test_any_name_is_looked_up_or_one_message(name):
    try:
        assert lookup(TABLE, name, "data set").name.lower() == name.lower()
    except UsageError as error:
        assert len(str(error)) < 2000 and "data set" in str(error)


FIELDS = {
    "name": VALUES | st.sampled_from(["../x", "a/b", ".", "", "\0", "mine"]),
    "source": VALUES,
    "splits": VALUES | st.dictionaries(st.sampled_from(["train", "val", "x"]), VALUES),
    "columns": VALUES,
    "choices": VALUES | st.lists(st.text(max_size=3), max_size=4),
    "prompt": VALUES,
    "label": VALUES,
    "published": VALUES | st.dictionaries(st.sampled_from(["choice_format", "x"]), VALUES),
    "eos_published": VALUES,
    "example": VALUES,
}


@pytest.mark.parametrize("field", FIELDS)
@examples(60)
@given(data=st.data())
def test_a_record_with_any_value_in_a_field_is_taken_whole_or_named(field, data):
    whole = vars(MULTIPLE_CHOICE_TASKS["obqa"])
    value = data.draw(FIELDS[field])
    try:
        task = checked_task(Task(**(whole | {field: value})), "mine.py:TASK")
    except UsageError as error:
        assert f"the field '{field}'" in str(error) and "mine.py:TASK" in str(error)
        return
    assert "/" not in task.name and len(set(task.choices)) == len(task.choices) >= 2
