"""How several processes of one run end: alike, and with one message."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, run_folder, topic_rows, write_jsonl

import main
from utils import processes
from utils.errors import UsageError
from utils.program import run_program


def wrong() -> None:
    raise UsageError("value, rule, remedy.")


def test_a_process_that_its_launcher_ends_says_nothing_and_has_the_same_code(monkeypatch, caplog):
    """The main one has said it: launchers end the others with SIGTERM."""
    monkeypatch.setenv("RANK", "1")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_program(wrong) == 2
    timer.join()
    assert not caplog.records


def test_a_process_that_nobody_ends_says_what_only_it_knows(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(processes, "PATIENCE", 0.01)
    main.setup_logging(is_main_process=False)
    assert run_program(wrong) == 2
    assert capsys.readouterr().err == "Process 3: UsageError: value, rule, remedy.\n"


def test_an_exchange_with_a_process_that_has_ended_is_no_traceback(monkeypatch, capsys):
    def exchange():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1234")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes, "PATIENCE", 0.01)
    main.setup_logging(is_main_process=False)
    assert run_program(exchange) == 1
    assert "another process of this run has ended" in capsys.readouterr().err


def launch(command: list[str], folder: Path) -> list[tuple[int, str]]:
    """(exit code, standard error) of two processes; the second is ended once the first has."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in (0, 1)
    ]
    try:
        first = ranks[0].communicate(timeout=200)[1]
        ranks[1].terminate()
        second = ranks[1].communicate(timeout=60)[1]
    finally:
        for rank in ranks:
            rank.kill()
    return [(ranks[0].returncode, first), (ranks[1].returncode, second)]


@pytest.fixture
def interrupted(classifier_flags, tmp_path) -> list[str]:
    """A call of predict.py whose output an earlier one has begun; only the main process sees it."""
    flags = [*classifier_flags, "--modelwrapper", "map", "--max-train-steps", "1", "--checkpoint"]
    main.main(flags)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in topic_rows(5)])
    (tmp_path / ".out.jsonl.partial").mkdir()
    (tmp_path / ".out.jsonl.partial" / "state.json").write_text("{}")
    rows = ["--rows", "rows.jsonl", "--out", "out.jsonl", "--device", "cpu"]
    return [str(ROOT / "scripts" / "predict.py"), str(run_folder(flags)), *rows]


def test_what_is_wrong_for_the_main_process_ends_all_with_one_message(interrupted, tmp_path):
    (code, told), (other, nothing) = launch(interrupted, tmp_path)
    assert (code, other) == (2, 2), told + nothing
    assert told.count("UsageError") == 1 and "an interrupted run has left a part" in told
    assert "Error" not in nothing and "Traceback" not in told + nothing
