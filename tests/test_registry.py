"""Names, and a user's own files: whatever their code does, the run answers with one message."""

import shutil
import sys

import pytest

import main
from utils.errors import UsageError
from utils.registry import did_you_mean, load_from_file, lookup


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys\nsys.exit()", "SystemExit"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit('done')", "SystemExit: done"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class Own(BaseException): pass\nraise Own('x')", "Own: x"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("x = (", "SyntaxError"),
        ("x = 1\nx.y", r"AttributeError: .* \(line 2\)"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E"),
        ("raise ValueError('x' * 3_000_000)", "xxx"),
        ("\0", "SyntaxError|ValueError|null bytes"),
        ("def __getattr__(name): raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_users_file_that_fails_is_one_message(tmp_path, code, words):
    (tmp_path / "mine.py").write_text(code)
    before = set(sys.modules)
    with pytest.raises(UsageError, match=words) as caught:
        load_from_file(f"{tmp_path}/mine.py:TASK", "data set")
    assert "mine.py" in str(caught.value) and len(str(caught.value)) < 1500
    assert "__getattr__" in code or not {m for m in set(sys.modules) - before if "user" in m}


def test_a_real_ctrl_c_is_none_of_the_files_errors(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_from_file(f"{tmp_path}/mine.py:TASK", "data set")


@pytest.mark.parametrize("flag", ["--dataset", "--modelwrapper"])
def test_a_file_that_ends_the_interpreter_does_not_end_the_run_as_finished(
    causal_flags, tmp_path, flag, capsys
):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)")
    given = {"--modelwrapper": "mle"} | {flag: f"{tmp_path}/mine.py:THING"}
    assert main.run([*causal_flags, *(word for pair in given.items() for word in pair)]) == 2
    assert "SystemExit: 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_method_that_ends_the_interpreter_is_a_failed_run(causal_flags, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom modelwrappers.wrapperbase import WrapperBase\n"
        "class Mine(WrapperBase):\n"
        "    def training_step(self, batch):\n        sys.exit(0)\n"
    )
    flags = [*causal_flags, "--modelwrapper", f"{tmp_path}/mine.py:Mine", "--max-train-steps", "1"]
    assert main.run(flags) == 1
    assert "sys.exit()" in capsys.readouterr().err


def test_help_still_ends_with_0():
    with pytest.raises(SystemExit) as caught:
        main.run(["--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    "spec", ["{}/nothing.py:X", "{}/folder.py:X", "a\0.py:X", "\ud800.py:X", "x" * 300 + ".py:X"]
)
def test_a_file_that_is_none_is_one_message(tmp_path, spec):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UsageError, match=r"no file|cannot be read"):
        load_from_file(spec.format(tmp_path), "data set")


def test_a_name_after_the_colon_is_needed(tmp_path):
    (tmp_path / "mine.py").write_text("TASK = 1\n")
    with pytest.raises(UsageError, match="no name follows the colon"):
        load_from_file(f"{tmp_path}/mine.py:", "data set")
    with pytest.raises(UsageError, match="has no 'Task'; did you mean 'TASK'"):
        load_from_file(f"{tmp_path}/mine.py:Task", "data set")


def test_files_of_similar_paths_are_two_modules(tmp_path):
    for folder, name, value in (("a", "b_c", 1), ("a_b", "c", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(f"X = {value}\n")
    assert load_from_file(f"{tmp_path}/a/b_c.py:X", "data set") == 1
    assert load_from_file(f"{tmp_path}/a_b/c.py:X", "data set") == 2


def test_one_file_is_one_module(tmp_path):
    (tmp_path / "mine.py").write_text("class X: pass\n")
    first = load_from_file(f"{tmp_path}/mine.py:X", "method")
    shutil.copy(tmp_path / "mine.py", tmp_path / "other.py")
    assert load_from_file(f"{tmp_path}/./mine.py:X", "method") is first
    assert load_from_file(f"{tmp_path}/other.py:X", "method") is not first


def test_suggestions_do_not_depend_on_case():
    assert did_you_mean("arc_easy", ["ARC-Easy", "obqa"]) == "; did you mean 'ARC-Easy'?"


@pytest.mark.parametrize("name", ["", "/my/folder", "../x", "x" * 10_000, "\x1b[2J\n", "\ud800"])
def test_an_unknown_name_is_shown_as_it_is_and_short(name):
    with pytest.raises(UsageError, match="unknown data set") as caught:
        lookup({"obqa": 1}, name, "data set")
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["/my/folder", "../x", "bbc", "x" * 10_000, "a\0b"])
def test_an_unknown_data_set_leaves_nothing_behind(causal_flags, tmp_path, name):
    flags = [*causal_flags, "--modelwrapper", "mle", "--dataset", name]
    assert main.run(flags) == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()
