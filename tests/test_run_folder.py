"""Files of a run: atomic, resumable after SIGKILL, and safe from a wrong call."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, run_folder
from safetensors.torch import load_file

import main
from utils.errors import RunError, UsageError
from utils.files import write_atomically, write_json
from utils.run_folder import RunFolder
from utils.run_state import join_tensors, split_tensors


def start(flags, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "main.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    file = folder / "history.jsonl"
    while process.poll() is None:
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"the run ended before update {step}: {process.communicate()[0][-2000:]}")


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(kind, request, capsys):
    """SIGKILL in the middle of an epoch and between two states; dropout makes the noise count."""
    flags = [*request.getfixturevalue(kind), "--modelwrapper", "map", "--max-train-steps", "60"]
    flags += [
        "--lora-dropout",
        "0.3",
        "--warmup-ratio",
        "0.1",
        "--save-per-steps",
        "7",
        "--checkpoint",
    ]
    flags += ["--eval-per-steps", "10", "--grad-accum-steps", "2", "--batch-size", "3"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)
    process = start(cut)
    folder, reference = run_folder(cut), run_folder(whole)
    wait_for_step(folder, 24, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "metrics.json").exists()
    assert 1 <= len(RunFolder(folder).states) <= 2, "old states are pruned"
    main.main([*cut, "--resume"])
    assert "Resuming after update" in capsys.readouterr().out

    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()
    mine, theirs = (load_file(path / "predictions.safetensors") for path in (folder, reference))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)

    def results(path):
        block = json.loads((path / "metrics.json").read_text())["datasets"]["bbc_headlines"]
        return {key: value for key, value in block.items() if key != "seconds"}

    def log(path):
        lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert results(folder) == results(reference)
    assert log(folder) == log(reference)
    assert not (folder / "state").exists(), "a finished run keeps no state"


def test_resume_without_a_state_starts_from_the_beginning(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    assert main.main([*flags, "--resume"]) == main.main([*flags, "--log-path", "other"])


def test_resuming_a_finished_run_changes_nothing(causal_flags, capsys):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    metrics = main.main(flags)
    before = (run_folder(flags) / "metrics.json").stat().st_mtime_ns
    assert main.main([*flags, "--resume"]) == metrics
    assert (run_folder(flags) / "metrics.json").stat().st_mtime_ns == before
    assert "is finished" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_in_the_log(causal_flags):
    """Of a run that has begun; a call that cannot work leaves no folder."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "7"]
    assert main.run([*flags, "--bayes-kllr", "1e25"]) == 1
    assert "lower the learning rates" in (run_folder(flags) / "log.txt").read_text()


def test_a_call_that_cannot_work_takes_nothing_of_an_earlier_run_away(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3", "--checkpoint"]
    main.main(flags)
    folder = run_folder(flags)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".txt"}
    for wrong in (["--ood-datasets", "bbc_bodie"], ["--data-dir", "nowhere"]):
        assert main.run([*flags, *wrong]) == 2
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".txt"}
    assert after == before


def test_a_resumed_run_may_take_less_memory(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    interrupted(flags)
    main.main([*flags, "--resume", "--eval-batch-size", "4", "--gradient-checkpointing"])


def interrupted(flags) -> Path:
    """A folder as a kill after update 2 leaves it."""
    args, _, wrapper = build(flags)
    folder = run_folder(flags)
    write_json(folder / "args.json", {"args": args.as_dict()})
    wrapper.step = 2
    wrapper._save_state()
    return folder


def test_a_run_on_an_adapter_does_not_replace_the_run_that_trained_it(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3", "--checkpoint"]
    main.main(flags)
    folder = run_folder(flags)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluate = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)]
    with pytest.raises(UsageError, match=r"this run's own folder.*another --log-path"):
        main.main(evaluate)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    main.main([*evaluate, "--log-path", "evaluated"])


def test_resume_with_other_flags_is_an_error_that_names_them(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    interrupted(flags)
    with pytest.raises(UsageError, match=r"--lora-r is 4, the stored run has 8"):
        main.main([*flags, "--resume", "--lora-r", "4"])


def test_an_interrupted_run_is_not_overwritten_by_accident(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    folder = interrupted(flags)
    with pytest.raises(UsageError, match=r"interrupted after update 2; pass --resume"):
        main.main(flags)
    assert RunFolder(folder).states
    main.main([*flags, "--overwrite"])
    assert not RunFolder(folder).states


def test_a_state_of_more_processes_is_refused(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3"]
    folder = interrupted(flags)
    with pytest.raises(UsageError, match=r"made by 1 process.*has 2"):
        RunFolder(folder, num_processes=2).load_state()


def test_unwritable_output_folder_is_an_error_before_the_model_is_loaded(causal_flags, tmp_path):
    (tmp_path / "file").write_text("")
    flags = [*causal_flags, "--modelwrapper", "mle", "--output-dir", str(tmp_path / "file" / "out")]
    with pytest.raises(UsageError, match=r"cannot be written .*--output-dir"):
        main.main(flags)


def test_a_full_disk_fails_with_a_message_and_keeps_what_was_there(tmp_path):
    """The file-size limit of the process stands for the full disk."""
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*--resume goes on"):
            write_json(file, {"new": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert json.loads(file.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyError("died")

    with pytest.raises(KeyError):
        write_atomically(file, die)
    assert file.read_text() == "old"


def test_nested_state_survives_the_way_to_disk():
    state = {"a": [torch.ones(2), {"b": 3, 5: torch.zeros(1)}], "c": None, "d": 0.1 + 0.2}
    structure, tensors = split_tensors(state)
    restored = join_tensors(json.loads(json.dumps(structure)), tensors)
    assert torch.equal(restored["a"][0], state["a"][0])
    assert torch.equal(restored["a"][1][5], state["a"][1][5])
    assert restored["a"][1]["b"] == 3 and restored["c"] is None and restored["d"] == 0.1 + 0.2


def test_nothing_is_ever_unpickled():
    """No torch.load, no pickle in the project's own code."""
    for file in [
        ROOT / "main.py",
        *(f for d in ("utils", "dataset", "modelwrappers") for f in (ROOT / d).glob("*.py")),
    ]:
        text = file.read_text(encoding="utf-8")
        assert "torch.load" not in text and "import pickle" not in text, file


def test_a_wrong_call_exits_with_2_and_no_traceback(causal_flags):
    process = start([*causal_flags, "--modelwrapper", "mle", "--batch-sise", "3"])
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "did you mean '--batch-size'" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--modelwrapper mle --max-train-steps 1 --model nobody/nothing", 2, "nobody/nothing"),
        ("--modelwrapper nle", 2, "did you mean 'mle'"),
        ("--modelwrapper mle --dataset bbc_headline", 2, "did you mean 'bbc_"),
    ],
)
def test_messages_go_to_stderr_with_the_exit_code(causal_flags, flags, code, words, capsys):
    assert main.run([*causal_flags, *flags.split()]) == code
    assert words in capsys.readouterr().err
