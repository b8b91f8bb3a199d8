"""Files as typed records: whatever they hold, the answer has its type or is one clear message."""

import argparse
import json
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import main
from modelwrappers import WRAPPERS
from modelwrappers.engine.adapter_config import AdapterConfig
from modelwrappers.engine.posterior import PosteriorRecord
from utils.args import build_parser, flag_value, stored_value
from utils.errors import LONGEST_MESSAGE, RunError, UsageError, printable, quoted
from utils.records import (
    MOST_DEPTH,
    as_record,
    check_tensor,
    parse_json,
    read_json,
    read_record,
    read_tensors,
)

many = settings(max_examples=100, deadline=None, derandomize=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
RECORD = {
    "format_version": 1,
    "modelwrapper": "blob",
    "model": "m",
    "model_type": "causallm",
    "load_model_path": None,
    "quantization": "none",
    "dtype": "auto",
    "dataset": "d",
    "dataset_type": "mcdataset",
    "choices": ["a", "b"],
    "target_ids": [1, 2],
    "pad_token_id": 0,
    "n_draws": 10,
    "metrics": {"d": {"acc": 0.5, "ece": 0.1, "nll": 1.0, "brier": 0.4, "split": "val"}},
    "flags": {"flipout": "token"},
    "prior_std": 0.2,
}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
ACTIONS = [
    action
    for cls in dict.fromkeys(WRAPPERS.values())
    for action in build_parser(cls.add_arguments)._actions
    if action.dest != "help"
]


# --- JSON -----------------------------------------------------------------------------------------


@many
@given(st.text())
def test_any_text_is_json_or_a_usage_error(text):
    try:
        content = parse_json(text, "here")
    except UsageError as error:
        assert str(error).startswith("here: ")
    else:
        assert content is None or isinstance(content, bool | int | float | str | list | dict)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("depth", [MOST_DEPTH + 2, 900, 100_000])
def test_deep_nesting_is_an_error(opening, depth):
    closing = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[opening]
    for text in (opening * depth + "1" + closing * depth, opening * depth):
        with pytest.raises(UsageError):
            parse_json(text, "here")


def test_numbers_without_end_are_an_error():
    with pytest.raises(UsageError, match="not valid JSON"):
        parse_json("1" * 5000, "here")


def test_a_record_is_what_its_type_says():
    record = as_record(RECORD, PosteriorRecord, "here")
    assert record.choices == ["a", "b"] and record.method == {"prior_std": 0.2}
    assert record.temperature is None and record.rows.max_seq_len == 300
    assert as_record(json.loads(record.model_dump_json()), PosteriorRecord, "here") == record


@pytest.mark.parametrize(
    ("record", "base"), [(PosteriorRecord, RECORD), (AdapterConfig, ADAPTER)], ids=["own", "peft"]
)
def test_any_value_under_any_key_is_taken_or_named(record, base):
    keys = st.sampled_from(sorted(record.model_fields))

    @many
    @given(keys, json_values)
    def check(key, value):
        content = json.loads(json.dumps(base | {key: value}))
        try:
            as_record(content, record, "here")
        except UsageError as error:
            assert str(error).startswith("here: ") and len(str(error)) < 1000
            assert "\n" not in str(error)

    check()


@many
@given(json_values)
def test_any_json_as_a_record_is_a_usage_error(value):
    with pytest.raises(UsageError):
        as_record(value, PosteriorRecord, "here")


def test_a_message_names_key_value_and_rule():
    for key, value, words in [
        ("n_draws", 0, ["'n_draws'", "is 0", "greater than or equal to 1"]),
        ("n_draws", "10", ["'n_draws'", "'10'", "integer"]),
        ("choices", ["a", 3], ["'choices.1'", "is 3", "string"]),
        ("choices", ["a", "a"], ["'choices' has the same entry twice"]),
        ("target_ids", [1, 2, 3], ["2 choices, but 3 target_ids"]),
    ]:
        with pytest.raises(UsageError) as error:
            as_record(RECORD | {key: value}, PosteriorRecord, "here", "Do this.")
        assert all(word in str(error.value) for word in words), str(error.value)
        assert str(error.value).endswith("Do this.")


def test_what_is_no_ordinary_file_is_an_error(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(10**10)
    names = [".", "pipe", "loop", "latin", "large", "none", "\0", "\ud800", "x" * 300]
    for name in names:
        with pytest.raises(UsageError, match="here"):
            read_json(tmp_path / name, "here")
        with pytest.raises(UsageError, match="here"):
            read_record(tmp_path / name, PosteriorRecord, "here")
        with pytest.raises(UsageError, match="here"):
            read_tensors(tmp_path / name, "here")


# --- flags ----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(ACTIONS), json_values)
def test_any_stored_value_of_any_flag_keeps_the_flags_rules(action, value):
    try:
        taken = stored_value(action, value, "here")
    except UsageError as error:
        assert str(error).startswith("here: ") and len(str(error)) < 2000
        return
    if taken is None:
        return
    assert action.dest != "trust_remote_code" or taken is False
    for item in taken if isinstance(taken, list) else [taken]:
        assert ".py:" not in str(item)
        assert action.choices is None or item in action.choices
        assert isinstance(item, bool) == isinstance(value, bool)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(ACTIONS), st.data())
def test_a_stored_value_is_what_the_command_line_gave(action, data):
    """Each value that a flag takes survives the way through args.json."""
    texts = st.sampled_from(["1", "0", "2", "0.5", "1e-3", "true", "false", "none", "nll", "a b"])
    text = data.draw(texts | st.sampled_from(sorted(map(str, action.choices or ["x"]))))
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser._add_action(action)
    try:
        parsed = getattr(parser.parse_args([f"{action.option_strings[0]}={text}"]), action.dest)
    except argparse.ArgumentError:
        return
    stored = json.loads(json.dumps(parsed))
    assert flag_value(action, stored, "here") == parsed


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(sorted({s for action in ACTIONS for s in action.option_strings}))
        | st.text(max_size=8)
        | st.sampled_from(["1", "-1", "0.5", "nan", "inf", "1e400", "true", "", "\0", "mle", "x"]),
        max_size=12,
    )
)
def test_any_command_line_is_parsed_or_a_usage_error(argv):
    if any(word in ("-h", "--help", "--config") for word in argv):
        return
    try:
        main.parse_args(argv)
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize(
    "flags",
    [
        "--num-bins 10000000000",
        "--lora-r 100000000",
        f"--max-train-steps {'9' * 400}",
        "--lr 1e30",
        "--lr nan",
        "--bayes-eval-n-samples-final 99999999",
        "--max-seq-len 1e5",
        "--lora-alpha inf",
        "--seed 0x10",
    ],
)
def test_sizes_that_no_machine_has_are_an_error(flags):
    base = [
        "--dataset-type",
        "mcdataset",
        "--dataset",
        "obqa",
        "--model",
        "m",
        "--modelwrapper",
        "mle",
    ]
    with pytest.raises(UsageError, match=flags.split()[0]):
        main.parse_args([*base, *flags.split()])


def test_missing_flags_are_named_together():
    with pytest.raises(UsageError) as error:
        main.parse_args([])
    for flag in ("--modelwrapper", "--dataset", "--model", "--dataset-type"):
        assert flag in str(error.value)


# --- tensors --------------------------------------------------------------------------------------


def test_a_tensor_is_looked_at_before_it_is_used():
    good = {"a": torch.ones(2, 3)}
    assert check_tensor(good, "a", (2, None), "here") is good["a"]
    for tensors, shape in [
        ({}, (2, 3)),
        (good, (3, 2)),
        (good, (2, 3, 1)),
        (good, ()),
        ({"a": torch.ones(2, 3, dtype=torch.int64)}, (2, 3)),
        ({"a": torch.ones(2, 3, dtype=torch.bool)}, (2, 3)),
        ({"a": torch.ones(2, 3).to(torch.float8_e5m2)}, (2, 3)),
        ({"a": torch.ones(2, 3, dtype=torch.complex64)}, (2, 3)),
        ({"a": torch.full((2, 3), torch.nan)}, (2, 3)),
        ({"a": torch.full((2, 3), torch.inf)}, (2, 3)),
    ]:
        with pytest.raises(UsageError, match=r"^here: .*'a'"):
            check_tensor(tensors, "a", shape, "here")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 120), st.booleans())
def test_any_bytes_as_a_tensor_file_are_read_or_a_usage_error(tmp_path_factory, noise, at, cut):
    file = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    save_file({"a": torch.arange(6.0)}, file)
    whole = file.read_bytes()
    damaged = whole[:at] + noise + (b"" if cut else whole[at + len(noise) :])
    file.write_bytes(damaged)
    try:
        tensors = read_tensors(file, "here")
    except UsageError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


# --- messages -------------------------------------------------------------------------------------


@many
@given(st.text())
def test_messages_have_nothing_that_a_terminal_obeys(text):
    for kind in (UsageError, RunError):
        shown = str(kind(text))
        assert len(shown) <= 8 * LONGEST_MESSAGE + 100
        assert not any(
            unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
            for character in shown
        )
    assert "\n" not in quoted(text) and len(quoted(text)) <= 130
    assert printable(printable(text)) == printable(text)


def test_long_messages_keep_beginning_and_end():
    message = str(UsageError("value " + "x" * 3_000_000 + " remedy"))
    assert len(message) < LONGEST_MESSAGE + 100
    assert message.startswith("value xxx") and message.endswith("xxx remedy")


@pytest.mark.parametrize(
    "value",
    [10**5000, [1] * 10**6, {"a": "x" * 10**6}, "\x1b[31m", "a\nb"],
    ids=["number", "list", "dict", "escape", "lines"],
)
def test_any_value_is_quoted_on_one_short_line(value):
    assert len(quoted(value)) < 150 and "\n" not in quoted(value) and "\x1b" not in quoted(value)
