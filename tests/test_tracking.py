"""Trackers record without asking; the process has a name; what is logged is text."""

import io
import json
import logging
import os
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from utils.logging import _Formatter, init_tracker, logger, name_process, setup_logging


def test_tensorboard_gets_losses_and_final_metrics(causal_flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    flags = [flag for flag in flags if flag != "--nowand"] + ["--tracker", "tensorboard"]
    metrics = main.main(flags)
    events = EventAccumulator(str(run_folder(flags) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/nll")] == [1, 2, 3]
    assert events.Scalars("final/acc")[0].value == pytest.approx(metrics.acc)


def test_wandb_without_credentials_goes_offline_with_a_notice(causal_flags, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(run_folder([*causal_flags, "--modelwrapper", "mle"]).parent))
    flags = [flag for flag in causal_flags if flag != "--nowand"]
    flags += ["--modelwrapper", "mle", "--max-train-steps", "2", "--tracker", "wandb"]
    main.main(flags)
    assert capsys.readouterr().out.count("wandb has no credentials") == 1
    assert list((run_folder(flags) / "wandb").glob("offline-run-*"))


# --- wandb starts only where it is set up or asked for --------------------------------------------

CALL = ["--dataset-type", "mcdataset", "--dataset", "obqa", "--model", "m", "--modelwrapper", "mle"]


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """A machine where nobody has used wandb; gives its home."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nobody_who_has_not_set_wandb_up_gets_it(unset, causal_flags, monkeypatch, capsys):
    monkeypatch.setattr("utils.logging._told", set())
    flags = [flag for flag in causal_flags if flag != "--nowand"]
    flags += ["--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    assert capsys.readouterr().out.count("No tracker: wandb is not set up here.") == 1
    assert not (run_folder(flags) / "wandb").exists()
    main.main([*flags, "--tracker", "none", "--overwrite"])
    assert "No tracker" not in capsys.readouterr().out, "it was said"


@pytest.mark.parametrize(
    ("name", "value", "tracker"),
    [
        ("WANDB_API_KEY", "k" * 40, "wandb"),
        ("WANDB_IDENTITY_TOKEN_FILE", "token", "wandb"),
        ("WANDB_MODE", "offline", "wandb"),
        ("WANDB_MODE", "disabled", "none"),
        ("WANDB_BASE_URL", "https://wandb.example", "none"),
    ],
)
def test_wandbs_environment_sets_it_up(unset, monkeypatch, name, value, tracker):
    monkeypatch.setenv(name, value)
    assert main.parse_args(CALL).tracker == tracker
    assert main.parse_args([*CALL, "--nowand"]).tracker == "none"


@pytest.mark.parametrize(
    ("file", "content", "tracker"),
    [
        (".netrc", "machine api.wandb.ai login user password key", "wandb"),
        (".netrc", "machine elsewhere.example login user password key", "none"),
        (".netrc", "machine", "none"),
        ("_netrc", "machine api.wandb.ai login user password key", "wandb"),
        (".config/wandb/settings", "[default]\nentity = team\n", "wandb"),
        (".config/wandb/settings", "[default]\nbase_url = https://api.wandb.ai\n", "none"),
        ("wandb/settings", "[default]\nmode = offline\n", "wandb"),
        ("wandb/settings", "[default]\nmode = disabled\n", "none"),
        ("wandb/settings", "no settings\0", "none"),
    ],
)
def test_files_of_wandb_set_it_up(unset, file, content, tracker):
    path = unset / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o600)
    assert main.parse_args(CALL).tracker == tracker


@pytest.mark.parametrize("flag", ["--wandb-project", "--wandb-entity", "--wandb-name"])
def test_a_flag_of_wandb_asks_for_it(unset, flag):
    assert main.parse_args([*CALL, flag, "x"]).tracker == "wandb"
    assert main.parse_args([*CALL, flag, "x", "--tracker", "none"]).tracker == "none"
    assert main.parse_args([*CALL, flag, "x", "--nowand"]).tracker == "none"


def test_a_stored_run_with_wandb_still_has_it(unset):
    file = unset / "args.json"
    stored = vars(main.parse_args([*CALL, "--tracker", "wandb"]))
    file.write_text(json.dumps({"args": {"tracker": "wandb"}, "given": stored["given"]}))
    assert main.parse_args(["--config", str(file)]).tracker == "wandb"


def test_a_users_own_wandb_run_is_logged_to(causal_flags):
    from conftest import build

    class Logger:
        def __init__(self):
            self.lines = []

        def log(self, values):
            self.lines.append(values)

    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"])
    logger = Logger()
    wrapper.prepare_for_fit_evaluate(dataset, logger)
    wrapper.fit_evaluate()
    assert [line["train/nll"] > 0 for line in logger.lines[:2]] == [True, True]
    assert "final/ece" in logger.lines[-1]


def test_the_process_is_named_after_the_run(causal_flags, monkeypatch):
    titles = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    main.main([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"])
    assert len(titles) == 1 and "mle" in titles[0] and "bbc_headlines" in titles[0]


def test_args_json_says_what_made_the_run(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    stored = json.loads((run_folder(flags) / "args.json").read_text())
    assert stored["args"]["lr"] == 1e-2
    known = {"command", "commit", "host", "started", "python", "libraries", "num_processes"}
    assert set(stored["run"]) == known
    assert stored["run"]["libraries"]["peft"]


# --- what the terminal and log.txt say ------------------------------------------------------------

HOSTILE = "a\nUsageError: forged\x1b[2J\r\u202e\ud800\0"


@pytest.fixture
def logged(tmp_path, capsys):
    """Log a message with arguments; gives (standard output, log.txt)."""

    def log(message, *values):
        setup_logging(True)
        setup_logging(True, tmp_path / "log.txt")
        logger.info(message, *values)
        setup_logging(True)
        return capsys.readouterr().out, (tmp_path / "log.txt").read_text()

    return log


def test_a_logged_name_can_neither_forge_a_record_nor_move_the_cursor(logged):
    for text in logged("%s on %s: ACC 1", HOSTILE, HOSTILE):
        assert not re.search(r"[\x1b\r\0\u202e\ud800]", text) and r"\x1b[2J" in text
        assert text.count("\n") == 3, "two breaks of the names, and the record's end"
        assert [line[:2] == "  " for line in text.splitlines()] == [False, True, True]


def test_messages_of_several_lines_stay_so(logged):
    terminal, _ = logged("first\nsecond")
    assert terminal == "first\n  second\n"


@given(st.text())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_text_is_one_record_of_printable_lines(text):
    first, *others = (
        _Formatter("%(message)s")
        .format(logging.LogRecord("a", logging.INFO, "b", 1, "%s", (text,), None))
        .split("\n")
    )
    assert all(line.startswith("  ") for line in others)
    for character in first + "".join(others):
        assert character == "\t" or unicodedata.category(character) not in {"Cc", "Cf", "Cs"}


def test_a_terminal_of_few_letters_shows_the_rest_as_numbers(monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    setup_logging(True)
    logger.info("0.5 ± 0.1")
    written = raw.getvalue()
    monkeypatch.undo()
    setup_logging(True)
    assert written == b"0.5 \\xb1 0.1\n" and not capsys.readouterr().err


def test_setting_up_again_leaves_no_handler_and_no_open_file(tmp_path):
    setup_logging(True)
    before = len(logger.handlers)
    for number in range(5):
        setup_logging(True, tmp_path / f"{number}.txt")
    open_files = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    assert [name for name in open_files if str(tmp_path) in name] == [str(tmp_path / "4.txt")]
    setup_logging(True)
    assert len(logger.handlers) == before


def test_what_is_remembered_for_a_log_file_has_an_end(monkeypatch, capsys):
    monkeypatch.setattr("utils.logging.MOST_KEPT", 3)
    setup_logging(True)
    for number in range(9):
        logger.info(number)
    (memory,) = [h for h in logger.handlers if hasattr(h, "records")]
    assert [record.msg for record in memory.records] == [0, 1, 2]
    setup_logging(True)


@pytest.mark.parametrize("name", ["\0", "\ud800", "a\nb", "x" * 100_000])
def test_a_process_has_a_name_whatever_the_model_is_called(name, monkeypatch):
    titles = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    name_process(SimpleNamespace(modelwrapper="mle", model=name, dataset="d"))
    (title,) = titles
    assert title.isprintable() and len(title) < 300
    title.encode()


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--wandb-project", value) for value in ("a/b", "a:b", "p" * 129, "a\nb", "100%")),
        *(("--wandb-name", value) for value in ("n" * 129, "\ud800", "\0", "\x1b[2J")),
        ("--wandb-entity", "e" * 129),
    ],
)
def test_a_name_that_wandb_refuses_is_refused_before_the_model_is_read(
    causal_flags, monkeypatch, capsys, flag, value
):
    monkeypatch.setattr("modelwrappers.build_wrapper", None)
    flags = [name for name in causal_flags if name != "--nowand"]
    assert main.run([*flags, "--modelwrapper", "mle", "--tracker", "wandb", flag, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"UsageError: {flag} is ") and err.count("\n") == 1 and len(err) < 400
    assert not run_folder([*causal_flags, "--modelwrapper", "mle"]).exists()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_take_whatever_flags_and_folders_are_called(tracker, tmp_path, monkeypatch):
    from accelerate import Accelerator

    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    accelerator = Accelerator(cpu=True, log_with=tracker, project_dir=folder)
    flags = {"note": HOSTILE, "other": "y" * 10_000, "lr": 0.1, "seeds": [1, HOSTILE]}
    args = SimpleNamespace(
        tracker=tracker,
        wandb_entity=None,
        wandb_project="p",
        wandb_name="",
        as_dict=lambda: flags,
    )
    init_tracker(accelerator, args, folder)
    accelerator.log({"a": 1.0}, step=1)
    accelerator.end_training()
    assert [file for file in folder.rglob("*") if file.is_file()]
