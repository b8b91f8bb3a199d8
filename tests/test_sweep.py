"""scripts/sweep.py, from a grid to a ranking, on tiny models."""

import csv
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, topic_rows, write_jsonl
from safetensors import safe_open

import main
from report.ranking import TIED, Scored, rank
from scripts import sweep
from utils import candidates
from utils.errors import UsageError
from utils.interrupts import interrupts
from utils.run_folder import RunFolder

GRID = ["--grid", "lr=1e-2,1e-5", "--seeds", "1", "2"]


def in_process(words: list[str]) -> sweep.Ended:
    """What `launch` does, without the seconds that a process takes to import torch."""
    return sweep.Ended(main.run(words), "")


@pytest.fixture(scope="module")
def flags(tiny_bert, tmp_path_factory) -> list[str]:
    """main.py's; there are no rows but those of the training set."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "train.jsonl", topic_rows(40, seed=3))
    return [
        *("--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", tiny_bert),
        *("--data-dir", str(folder), "--batch-size", "8", "--max-train-steps", "6"),
        *("--modelwrapper", "map", "--held-out-fraction", "0.5", "--nowand", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("WORLD_SIZE", raising=False)
        patched.setattr(sweep, "launch", in_process)
        assert sweep.run(["--out", str(out), *GRID, "--", *flags]) == 0
    return out


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """The command lines of the runs that a test starts."""
    calls: list[list[str]] = []

    def watched(words: list[str]) -> sweep.Ended:
        calls.append(words)
        return in_process(words)

    monkeypatch.setattr(sweep, "launch", watched)
    return calls


def records(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def predictions(folder: Path) -> list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]]:
    found = []
    for file in sorted(folder.glob("runs/**/predictions.safetensors")):
        with safe_open(file, framework="np") as content:
            tensors = [content.get_tensor(key) for key in ("index", "labels", "log_probs")]
            found.append((content.metadata(), *tensors))
    return found


# --- what is compared -----------------------------------------------------------------------------


def test_every_run_is_scored_on_the_same_rows_held_out_of_training(finished):
    found = predictions(finished)
    assert len(found) == 4
    for metadata, index, _, _ in found:
        assert metadata["split"] == "train_val"
        assert sorted(index) == sorted(found[0][1]) and len(index) == 20


def test_the_ranking_is_by_the_mean_over_seeds_and_rows(finished):
    first, second = records(finished)
    assert first["candidate"] == "lr=1e-2" and second["candidate"] == "lr=1e-5"
    assert first["verdict"] == "best" and first["ranked_by"] == "nll" and first["seeds"] == "1 2"
    by_seed = [-np.take_along_axis(p[:, 0], y[:, None], 1).mean() for _, _, y, p in
               predictions(finished)[:2]]  # fmt: skip
    assert float(first["nll"]) == pytest.approx(np.mean(by_seed), rel=1e-4)
    assert float(first["se_seeds"]) == pytest.approx(
        np.std(by_seed, ddof=1) / math.sqrt(2), rel=1e-3
    )
    assert float(second["difference"]) == pytest.approx(
        float(second["nll"]) - float(first["nll"]), abs=1e-5
    )
    assert float(first["seconds"]) > 0 and int(first["peak_memory_bytes"]) > 2**20


def test_the_table_says_on_what_and_how_surely(finished):
    text = (finished / "sweep.md").read_text(encoding="utf-8")
    assert "20 rows held out of training; the test rows were not looked at" in text
    assert "| lr=1e-2" in text and "SE rows" in text and "MiB" in text


def scored(losses: dict[int, np.ndarray], weights: np.ndarray) -> dict[int, Scored]:
    return {
        seed: Scored(
            1, len(loss), {"nll": loss.mean(), "ece": 0.1, "acc": 0.5, "brier": 0.5},
            weights @ loss / len(loss), 0.0, 1.0, None,
        )
        for seed, loss in losses.items()
    }  # fmt: skip


def test_what_is_hard_for_all_does_not_hide_a_difference_but_noise_does():
    rng = np.random.default_rng(0)
    weights = np.stack(
        [np.bincount(rng.integers(0, 50, 50), minlength=50) for _ in range(500)]
    ).astype(float)
    loss = rng.exponential(size=50)
    noisy = loss + rng.normal(size=50)
    found = {
        "noise": scored({1: noisy - noisy.mean() + loss.mean() + 0.1}, weights),
        "shift": scored({1: loss + 0.1}, weights),
        "best": scored({1: loss}, weights),
    }
    ranked = {row.name: row for row in rank(found, "nll")}
    assert next(iter(ranked)) == "best" and ranked["best"].difference is None
    assert ranked["shift"].verdict == "worse" and ranked["noise"].verdict == TIED
    assert ranked["shift"].difference[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert ranked["best"].se_rows == pytest.approx(np.std(loss) / 50**0.5, rel=0.1)
    assert math.isnan(ranked["best"].se_seeds)


def test_a_score_for_which_more_is_better_ranks_the_other_way_round():
    weights = np.ones((3, 4))
    found = {name: scored({1: np.zeros(4)}, weights) for name in ("low", "high")}
    found["high"][1].values["acc"] = 0.9
    assert [row.name for row in rank(found, "acc")] == ["high", "low"]


def test_runs_on_different_rows_are_not_ranked():
    weights = np.ones((3, 4))
    found = {name: scored({1: np.zeros(4)}, weights) for name in "ab"}
    found["b"][1] = found["b"][1]._replace(fingerprint=2)
    with pytest.raises(UsageError, match="not evaluated on the same rows"):
        rank(found, "nll")


# --- which runs there are -------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_be_run_and_writes_nothing(flags, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--load-lora-path=adapters/seed{seed}", "--max-train-steps", "0"]
    assert sweep.run(["--out", str(out), *GRID, "--dry-run", "--", *flags, *words]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "python main.py" in x]
    assert len(lines) == 4 and not out.exists()
    for line, number in zip(lines, (1, 2, 1, 2), strict=True):
        state, _, command = line.partition(": ")
        args = main.parse_args(shlex.split(command)[2:])
        assert state == "to do" and args.testing_set == "train_val" and args.resume
        assert args.seed == number and args.load_lora_path == f"adapters/seed{number}"


def test_grid_and_list_are_combined(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("--lr 1e-3 --opt-wd 0  # plain\n\n# nothing\n--lr 1e-4\n", encoding="utf-8")
    args, _ = sweep.parse_args(
        ["--out", "x", "--list", str(file), "--grid", "lora-r=4,8", "--", "--model", "m"]
    )
    assert [" ".join(c.words) for c in sweep.candidates_of(args)] == [
        *("--lr 1e-3 --opt-wd 0 --lora-r=4", "--lr 1e-3 --opt-wd 0 --lora-r=8"),
        *("--lr 1e-4 --lora-r=4", "--lr 1e-4 --lora-r=8"),
    ]


def test_two_candidates_never_share_a_folder():
    texts = [["--a=b", "--c=d"], ["--a=b,c=d"], ["--a=b/c"], ["--a=b_c"], ["--a=b?c"], ["--a", "b"]]
    names = [candidates.name_of(words) for words in [*texts, ["--a=" + "x" * 500]]]
    assert len(set(names)) == len(names)
    assert all(len(name) < 255 and "/" not in name and name[0] != "." for name in names)


def test_finished_runs_are_skipped_and_an_interrupted_sweep_goes_on(
    flags, tmp_path, launched, monkeypatch
):
    out, watched = tmp_path / "out", sweep.launch

    def interrupted(words):
        if launched:
            raise KeyboardInterrupt
        return watched(words)

    call = ["--out", str(out), "--grid", "lr=1e-2,1e-5"]
    monkeypatch.setattr(sweep, "launch", interrupted)
    assert sweep.run([*call, "--", *flags]) == 130
    assert not (out / "best.json").exists()
    monkeypatch.setattr(sweep, "launch", watched)
    assert sweep.run([*call, "--", *flags]) == 2, "without --resume nothing is replaced"
    assert len(launched) == 1
    assert sweep.run([*call, "--resume", "--", *flags]) == 0
    assert [word for words in launched for word in words if word.startswith("--lr=")] == [
        "--lr=1e-2",
        "--lr=1e-5",
    ]
    assert sweep.run([*call, "--resume", "--", *flags]) == 0 and len(launched) == 2
    assert sweep.run([*call, "--resume", "--", *flags, "--lora-r", "4"]) == 2, "other flags"


def test_a_failed_run_is_recorded_and_the_others_go_on(flags, tmp_path, monkeypatch):
    def failing(words):
        if "--lr=1e3" in words:
            return sweep.Ended(1, "10%\nRunError: the loss is NaN\n")
        return in_process(words)

    monkeypatch.setattr(sweep, "launch", failing)
    out = tmp_path / "out"
    assert sweep.run(["--out", str(out), "--grid", "lr=1e3,1e-2", "--", *flags]) == 0
    best, failed = records(out)
    assert best["verdict"] == "best" and best["failed"] == ""
    assert failed["failed"] == "seed 1: RunError: the loss is NaN" and failed["nll"] == ""
    assert "lr=1e3: seed 1: RunError" in (out / "sweep.md").read_text(encoding="utf-8")


def test_an_adapter_of_another_data_set_is_ranked_on_the_rows_of_the_sweeps_own(
    flags, tmp_path, launched
):
    first = [*flags, "--output-dir", str(tmp_path / "first"), "--log-path", "map", "--checkpoint"]
    assert main.run([*first, "--testing-set", "train_val"]) == 0
    (folder,) = {file.parent for file in tmp_path.glob("first/**/metrics.json")}
    place = flags.index("--data-dir")
    words = [*flags[:2], *flags[place : place + 2], "--dataset", "bbc_bodies"]
    words += ["--modelwrapper", "mcdropout", "--load-lora-path", str(folder), "--nowand"]
    words += ["--device", "cpu", "--held-out-fraction", "0.5", "--bayes-eval-n-samples-final", "2"]
    out = tmp_path / "out"
    assert sweep.run(["--out", str(out), "--grid", "lora-dropout=0.1,0.3", "--", *words]) == 0
    assert [record["failed"] for record in records(out)] == ["", ""]
    assert {told["dataset"] for told, *_ in predictions(out)} == {"bbc_bodies"}


def test_a_sweep_of_which_nothing_is_left_fails(flags, tmp_path, monkeypatch):
    ended = sweep.Ended(1, "RunError: the loss is NaN")
    monkeypatch.setattr(sweep, "launch", lambda words: ended)
    out = tmp_path / "out"
    assert sweep.run(["--out", str(out), "--grid", "lr=1e-2", "--", *flags]) == 1
    assert not (out / "best.json").exists()


def held(words: list[str]) -> sweep.Ended:
    """A run whose folder another one writes to."""
    live = RunFolder(sweep.run_folder_path(main.parse_args(words)))
    live.path.mkdir(parents=True)
    live._take_lock()
    try:
        return in_process(words)
    finally:
        live.close()


def without_space(words: list[str]) -> sweep.Ended:
    """A run on a disk that is full."""

    def full(*names):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", full)
        return in_process(words)


def killed(words: list[str]) -> sweep.Ended:
    return sweep.Ended(-signal.SIGKILL, "")


@pytest.mark.parametrize("trouble", [held, without_space, killed])
def test_a_run_that_was_ended_from_outside_stops_the_sweep_unranked(
    trouble, flags, tmp_path, monkeypatch, capsys
):
    def in_trouble(words):
        if "--lr=1e-5" in words:
            ended = trouble(words)
            return ended._replace(told=capsys.readouterr().err)  # what the run has said itself
        return in_process(words)

    out = tmp_path / "out"
    call = ["--out", str(out), "--grid", "lr=1e-2,1e-5,1e-3"]
    monkeypatch.setattr(sweep, "launch", in_trouble)
    assert sweep.run([*call, "--", *flags]) == 1
    assert "nothing is ranked" in capsys.readouterr().err
    assert not any((out / name).exists() for name in sweep.MADE)
    monkeypatch.setattr(sweep, "launch", in_process)
    assert sweep.run([*call, "--resume", "--", *flags]) == 0
    assert len(records(out)) == 3 and not any(record["failed"] for record in records(out))


REFUSED = {
    "unknown flag '--lrr'": (["--grid", "lrr=1,2"], []),
    "--lr is tried, and given": (["--grid", "lr=1e-3"], ["--lr", "1e-2"]),
    "is not FLAG=V1,V2": (["--grid", "lr"], []),
    "nothing to try": ([], []),
    "--testing-set is not for": (["--grid", "lr=1e-3"], ["--testing-set", "test"]),
    "--ood-datasets is not for": (["--grid", "lr=1e-3"], ["--ood-datasets", "bbc_bodies"]),
    "--temperature-scaling is not for": (["--grid", "temperature-scaling=true,false"], []),
    "--limit-train cannot be tried": (["--grid", "limit-train=30,40"], []),
    "is the same run as": (["--grid", "lr=1e-3,0.001"], []),
    "would choose by the rows": (
        ["--grid", "laplace-prior-precision=1,validation"],
        ["--modelwrapper", "laplace", "--load-lora-path", "adapter", "--max-train-steps", "0"],
    ),
}


@pytest.mark.parametrize("told", REFUSED)
def test_a_wrong_call_stops_before_the_first_run(told, flags, tmp_path, launched, capsys):
    own, words = REFUSED[told]
    out = tmp_path / "out"
    assert sweep.run(["--out", str(out), *own, "--", *flags, *words]) == 2
    assert told in capsys.readouterr().err and not launched and not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        *("--trust-remote-code", "--modelwrapper own.py:Mine", "--load_lora_path /etc", "lr 1"),
        *("--lr 1 -- --model x", "--config=run/args.json", "--prompt 'x", "--x a.py:B", "# none"),
    ],
)
def test_a_list_says_settings_and_nothing_else(line, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="--list"):
        list(candidates.listed(file))


def test_the_calls_in_the_docs_are_right_ones():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    calls = [
        sweep.parse_args(shlex.split(line)[2:])
        for line in text.splitlines()
        if line.startswith("python scripts/sweep.py")
    ]
    (whole, words), (best, _) = calls
    assert len(sweep.plan(whole, words, sweep.candidates_of(whole))) == 12
    assert sweep.candidates_of(best) == sweep.candidates_of(whole)


# --- what comes of it -----------------------------------------------------------------------------


def test_the_best_flags_are_printed_one_a_line(finished, capsys):
    assert sweep.run(["--best", str(finished), *GRID]) == 0
    assert capsys.readouterr().out == "--lr=1e-2\n"


@pytest.mark.parametrize(
    "content",
    [
        {"words": ["--lr=1e-2", "--trust-remote-code"], "ranked_by": "nll", "seeds": [1]},
        {"words": ["--lr=1e-2; rm x"], "ranked_by": "nll", "seeds": [1]},
        {"words": "--lr=1e-2", "ranked_by": "nll", "seeds": [1]},
        [],
    ],
)
def test_nothing_that_best_json_says_becomes_a_flag_unless_the_call_knows_it(
    content, tmp_path, capsys
):
    (tmp_path / "best.json").write_text(json.dumps(content), encoding="utf-8")
    assert sweep.run(["--best", str(tmp_path), *GRID]) == 2
    assert capsys.readouterr().out == ""


# --- processes ------------------------------------------------------------------------------------


def test_a_run_has_a_process_of_its_own_whose_message_is_kept():
    ended = sweep.launch(["--modelwrapper", "map", "--dataset", "bbc_headlines"])
    assert ended.code == 2
    assert sweep.reason_of(ended).startswith("UsageError: --model, --dataset-type are missing.")


def test_a_signal_reaches_the_run_once_and_is_waited_for(tmp_path, monkeypatch):
    script, ready, saved = tmp_path / "run.py", tmp_path / "ready", tmp_path / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(number, frame):\n"
        "    time.sleep(0.3)\n"
        f"    pathlib.Path({str(saved)!r}).write_text('state')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, end)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sweep, "MAIN", script)

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        sweep.launch([])
    assert saved.read_text() == "state"


def test_the_script_runs_as_a_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--out", "x"])
    assert sweep.run() == 2
