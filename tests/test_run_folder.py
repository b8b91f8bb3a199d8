"""Files of a run: atomic, resumable after SIGKILL, and safe from a wrong call."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, run_folder
from safetensors.torch import load_file, save_file

import main
import modelwrappers
from utils.errors import RunError, UsageError
from utils.files import write_atomically, write_json
from utils.logging import logger, setup_logging
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


@pytest.mark.parametrize(
    "kind", ["causal_flags", pytest.param("classifier_flags", marks=pytest.mark.slow)]
)
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


def test_the_reason_of_a_failure_is_in_the_log(causal_flags, monkeypatch):
    from modelwrappers.wrapperbase import WrapperBase

    def fail(self):
        raise RunError("the posterior cannot be fitted")

    monkeypatch.setattr(WrapperBase, "fit_posterior", fail)
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    assert main.run(flags) == 1
    assert "the posterior cannot be fitted" in (run_folder(flags) / "log.txt").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        "--load-lora-path nowhere",
        "--dataset bbc_headline",
        "--dataset /my/folder",
        "--data-dir nowhere",
        "--model nobody/nothing",
        "--log-path ../x",
        "--ood-datasets nothing",
        "--max-train-steps 0",
    ],
)
def test_a_call_that_fails_before_the_run_begins_leaves_nothing(causal_flags, tmp_path, wrong):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1", *wrong.split()]
    before = set(tmp_path.rglob("*"))
    assert main.run(flags) == 2
    assert set(tmp_path.rglob("*")) == before


def test_a_call_that_cannot_work_takes_nothing_of_an_earlier_run_away(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "3", "--checkpoint"]
    main.main(flags)
    folder = run_folder(flags)
    before = files(folder)
    for wrong in (["--ood-datasets", "bbc_bodie"], ["--data-dir", "nowhere"]):
        assert main.run([*flags, *wrong, "--overwrite"]) == 2
    assert files(folder) == before


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


LATE = {
    "no anchors": ("tfb", ["--anchor-size", "1", "--th", "1e-9"]),
    "no sigma": ("tfb", ["--th", "1e-12"]),
    "diverged": ("blob", ["--bayes-beta", "1e-200", "--max-train-steps", "3"]),
}


@pytest.mark.parametrize("case", LATE)
def test_a_run_that_fails_late_leaves_every_file_of_the_run_it_was_to_replace(causal_flags, case):
    method, wrong = LATE[case]
    first = [*causal_flags, "--modelwrapper", "map", "--max-train-steps", "3"]
    flags = [*causal_flags, "--modelwrapper", method]
    if method == "tfb":
        main.main(first)
        flags += ["--load-lora-path", str(run_folder(first)), "--th", "0.9"]
    else:
        flags += ["--max-train-steps", "2"]
    main.main(flags)
    folder = run_folder(flags)
    (folder / "adapter_notes.txt").write_text("mine")
    before = files(folder)
    assert main.run([*flags, *wrong, "--overwrite"]) in (1, 2)
    assert files(folder) == before


def test_a_finished_run_is_kept_by_the_same_flags_and_by_its_own_config(causal_flags, capsys):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"]
    metrics = main.main(flags)
    folder = run_folder(flags)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
    moment = folder.stat().st_mtime_ns
    same = [*flags, "--eval-batch-size", "7", "--wandb-name", "x", "--save-per-steps", "0"]
    config = ["--config", str(folder / "args.json")]
    for call in (flags, same, config, [*flags, "--resume"], [*flags, "--checkpoint"]):
        assert main.main(call) == metrics
        assert "is finished: it is kept" in capsys.readouterr().out
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
    assert after == before and folder.stat().st_mtime_ns == moment


def test_a_finished_run_is_not_replaced_by_other_flags(causal_flags):
    """A loop over a flag without a name for each run leaves the first result, not the last."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "2"]
    main.main([*flags, "--bayes-kllr", "0.01"])
    folder = run_folder(flags)
    before = files(folder)
    with pytest.raises(UsageError, match=r"--bayes-kllr is 0.02, the stored run has 0.01.*--over"):
        main.main([*flags, "--bayes-kllr", "0.02"])
    with pytest.raises(UsageError, match=r"--seed is 2, the stored run has 1\. "):
        main.main([*flags, "--bayes-kllr", "0.01", "--seed", "2"])  # not: --seed-data, ...
    assert files(folder) == before
    main.main([*flags, "--bayes-kllr", "0.02", "--overwrite"])
    assert json.loads((folder / "args.json").read_text())["args"]["bayes_kllr"] == 0.02
    assert files(folder).keys() == before.keys()


def test_an_older_runs_flags_are_compared_as_far_as_it_knew_them(causal_flags):
    """Without the adapter that is saved by default now, without a flag that is new."""
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"]
    metrics = main.main([*flags, "--checkpoint", "false"])
    folder = run_folder(flags)
    assert not list(folder.glob("adapter*")) and not (folder / "bayes_config.json").exists()
    content = json.loads((folder / "args.json").read_text())
    del content["format_version"], content["args"]["hold_out"], content["given"]["checkpoint"]
    write_json(folder / "args.json", content)
    stored = json.loads((folder / "metrics.json").read_text())
    del stored["format_version"], stored["files"]
    write_json(folder / "metrics.json", stored)
    assert main.main(flags) == metrics
    with pytest.raises(UsageError, match=r"--checkpoint is True, the stored run has False"):
        main.main([*flags, "--checkpoint"])
    content["args"]["num_bins"] = 20
    write_json(folder / "args.json", content)
    with pytest.raises(UsageError, match=r"--num-bins is 15, the stored run has 20 .*pass it"):
        main.main(flags)
    assert main.main([*flags, "--num-bins", "20"]) == metrics


@pytest.mark.parametrize("is_old", [False, True])
def test_only_what_a_run_has_written_is_replaced(causal_flags, is_old):
    first = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "2"]
    first += ["--temperature-scaling", "--bayes-eval-n-samples-final", "2"]
    main.main(first)
    folder = run_folder(first)
    written = set(files(folder))
    assert {"laplace.safetensors", "predictions-held_out.safetensors"} <= written
    if is_old:  # its metrics.json did not say what was written
        stored = json.loads((folder / "metrics.json").read_text())
        del stored["files"]
        write_json(folder / "metrics.json", stored)
    mine = ["adapter_notes.txt", "predictions-of-mine.safetensors", "adapter_model.bin", "log.txt~"]
    mine += ["member1/notes.txt", "state/notes.txt", "laplace-2.safetensors", ".hidden"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    second = [*causal_flags, "--modelwrapper", "laplace", "--max-train-steps", "1", "--overwrite"]
    main.main([*second, "--checkpoint", "false", "--bayes-eval-n-samples-final", "2"])
    left = {name for name, content in files(folder).items() if content}
    expected = {"args.json", "history.jsonl", "log.txt", "metrics.json", "predictions.safetensors"}
    assert left == expected | set(mine)
    assert all((folder / name).read_text() == name for name in mine)


def test_an_overwriting_run_on_its_own_adapter_keeps_it(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"]
    main.main(flags)
    folder = run_folder(flags)
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    again = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder), "--overwrite"]
    main.main([*again, "--checkpoint", "false"])
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter
    main.main(again)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / ".next").exists()


def test_two_live_runs_do_not_share_a_folder(causal_flags, capsys):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    folder = run_folder(flags)
    folder.mkdir(parents=True)
    live = RunFolder(folder)
    live._take_lock()
    assert main.run(flags) == 2
    assert "another run is writing to" in capsys.readouterr().err
    live.close()
    assert main.run(flags) == 0
    assert not (folder / ".lock").exists()


def test_a_file_system_without_locks_is_no_obstacle(causal_flags, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert main.run([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]) == 0
    assert "cannot be locked" in capsys.readouterr().out


def test_there_must_be_something_to_train_or_to_evaluate(causal_flags):
    with pytest.raises(UsageError, match=r"nothing to train .* no adapter"):
        main.main([*causal_flags, "--modelwrapper", "mle"])


def test_args_json_says_what_main_was_given(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    stored = json.loads((run_folder(flags) / "args.json").read_text())
    assert stored["run"]["command"] == ["main.py", *flags]


# --- where a run is kept ------------------------------------------------------------------------

NO_NAMES = [
    "../x",
    "/tmp/x",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".x",
    "",
    "x" * 256,
    "a\0b",
    "\ud800",
    "a\nb",
]
NO_NAMES += ["state", "wandb", "metrics.json", "ü" * 128]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("flag", ["--log-path", "--checkpoint-name"])
def test_a_runs_name_is_one_folder(causal_flags, tmp_path, flag, name):
    before = set(tmp_path.parent.rglob("*"))
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1", f"{flag}={name}"]
    assert main.run(flags) == 2
    assert set(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--output-dir", "--data-dir"])
def test_an_empty_folder_is_an_unset_variable(causal_flags, flag):
    with pytest.raises(UsageError, match="unset variable"):
        main.main([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1", flag, ""])


@pytest.mark.parametrize("model", ["a/b/c", "owner/..", "owner/", "/", "owner/.x", "x" * 256])
def test_a_models_name_is_one_folder_or_an_owner_and_one(causal_flags, model):
    flags = [*causal_flags, "--modelwrapper", "mle", "--model", model]
    with pytest.raises(UsageError, match="--model"):
        run_folder(flags)


def test_a_local_models_folder_stands_under_its_own_name(causal_flags, tmp_path, monkeypatch):
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = [*causal_flags, "--modelwrapper", "mle", "--model", "../deep/model"]
    assert run_folder(flags).parent.parent.name == "model"
    hub = [*causal_flags, "--modelwrapper", "mle", "--model", "owner/model"]
    assert run_folder(hub).parts[-4:-2] == ("owner", "model")


def test_a_task_of_ones_own_cannot_name_a_folder_elsewhere(causal_flags, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from dataset.tasks import MULTIPLE_CHOICE_TASKS as T\n"
        "task = T.get('bbc_bodies') if isinstance(T, dict) else next(t for t in T if "
        "t.name == 'bbc_bodies')\n"
        "held_out = replace(task, name='held_out')\n"
    )
    flags = [*causal_flags, "--modelwrapper", "mle", "--dataset", f"{file}:held_out"]
    with pytest.raises(UsageError, match="held-out rows"):
        run_folder(flags)


@pytest.mark.parametrize("link", ["run", "data set", "method"])
def test_a_link_does_not_lead_into_another_runs_folder(causal_flags, tmp_path, link):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    folder = run_folder(flags)
    place = {"run": folder, "data set": folder.parent, "method": folder.parent.parent.parent}[link]
    (tmp_path / "elsewhere").mkdir()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="reached by a link"):
        main.main(flags)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_output_folder_may_be_a_link(causal_flags, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    main.main([*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"])
    assert list((tmp_path / "large disk").rglob("metrics.json"))


def test_a_run_does_not_lie_in_another_runs_folder(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    folder = run_folder(flags)
    before = files(folder)
    with pytest.raises(UsageError, match="lies in the folder of another run"):
        main.main([*flags, "--output-dir", str(folder)])
    assert files(folder) == before
    # nor does another run come to lie around it: here a model and a data set have one name
    outer = RunFolder(folder.parent)
    with pytest.raises(UsageError, match=r"the folder of another run, .*default, lies in"):
        outer.open(main.parse_args(flags))


def test_what_a_killed_process_was_writing_is_swept(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    folder = run_folder(flags)
    for name in (".args.json.17.tmp/args.json", ".log.txt.17.tmp", ".adapter/README.md", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    (folder / ".mine.txt.17.tmp").write_text("mine")
    main.main(flags)
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == [".mine.txt.17.tmp"]


# --- states -------------------------------------------------------------------------------------


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
    wrapper.loop.save_state()
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


def edit(state: Path, change) -> None:
    """Change the structure of a state, as `join_tensors` gives it."""
    structure = json.loads((state / "state.json").read_text())
    content = join_tensors(structure, load_file(state / "state.safetensors"))
    change(content)
    structure, tensors = split_tensors(content)
    (state / "state.json").write_text(json.dumps(structure))
    save_file({k: v.contiguous() for k, v in tensors.items()}, state / "state.safetensors")


def _first(content) -> str:
    return next(iter(content["parameters"]))


def _adam(content) -> dict:
    return content["optimizers"]["lora"]["state"][0]


DAMAGE = {
    "a negative step": lambda s: edit(s, lambda c: c.update(step=-5)),
    "a step beyond the end": lambda s: edit(s, lambda c: c.update(step=99)),
    "a step that is a text": lambda s: edit(s, lambda c: c.update(step="4")),
    "an impossible position": lambda s: edit(s, lambda c: c.update(position=[10**15, 10**15])),
    "no parameters": lambda s: edit(s, lambda c: c.pop("parameters")),
    "another parameter": lambda s: edit(s, lambda c: c["parameters"].update(x=torch.ones(1))),
    "another shape": lambda s: edit(
        s, lambda c: c["parameters"].update({_first(c): torch.ones(3)})
    ),
    "another type": lambda s: edit(
        s, lambda c: c["parameters"].update({_first(c): c["parameters"][_first(c)].double()})
    ),
    "NaN": lambda s: edit(s, lambda c: c["parameters"][_first(c)].fill_(float("nan"))),
    "a negative second moment": lambda s: edit(s, lambda c: _adam(c)["exp_avg_sq"].fill_(-1)),
    "no first moment": lambda s: edit(s, lambda c: _adam(c).pop("exp_avg")),
    "no optimizer": lambda s: edit(s, lambda c: c["optimizers"].clear()),
    "other groups": lambda s: edit(
        s, lambda c: c["optimizers"]["lora"]["param_groups"][0].pop("lr")
    ),
    "a schedule of texts": lambda s: edit(
        s, lambda c: c["schedulers"]["lora"].update(last_epoch="4")
    ),
    "a schedule without end": lambda s: edit(
        s, lambda c: c["schedulers"]["lora"].update(last_epoch=10**400)
    ),
    "no method": lambda s: edit(s, lambda c: c.pop("method")),
    "a list for an object": lambda s: (s / "state.json").write_text("[]"),
    "no JSON": lambda s: (s / "state.json").write_text("{"),
    "JSON without end": lambda s: (s / "state.json").write_text("[" * 100_000),
    "a missing file": lambda s: (s / "state.safetensors").unlink(),
    "missing generators": lambda s: (s / "rng-0.json").unlink(),
    "broken generators": lambda s: save_file(
        {"cpu": torch.zeros(7, dtype=torch.uint8)}, s / "rng-0.safetensors"
    ),
    "a file of a terabyte": lambda s: os.truncate(s / "state.safetensors", 2**40),
    "a folder for a file": lambda s: (
        (s / "state.json").unlink(),
        (s / "state.json").mkdir(),
    ),
}


@pytest.fixture(scope="module")
def cut_short(tiny_llama, data_dir, tmp_path_factory):
    """A run that was interrupted after update 5 of 6, with the states of 4 and 5; and its flags."""
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", tiny_llama]
    flags += ["--data-dir", data_dir, "--nowand", "--device", "cpu", "--modelwrapper", "mle"]
    flags += ["--max-train-steps", "6", "--save-per-steps", "2", "--batch-size", "4"]
    flags += ["--lora-r", "2", "--limit-eval", "8", "--eval-per-steps", "0"]
    out = tmp_path_factory.mktemp("cut")

    from utils.interrupts import interrupts

    with pytest.MonkeyPatch.context() as patch:
        original = modelwrappers.build_wrapper

        def build_wrapper(*arguments):
            wrapper = original(*arguments)
            step = wrapper.optimizer_step

            def interrupted_step():
                if wrapper.step == 4:
                    interrupts.number = signal.SIGTERM
                return step()

            wrapper.optimizer_step = interrupted_step
            return wrapper

        patch.setattr(modelwrappers, "build_wrapper", build_wrapper)
        assert main.run([*flags, "--output-dir", str(out / "cut")]) == 143
    main.main([*flags, "--output-dir", str(out / "whole")])
    return flags, out


def placed(cut_short, tmp_path) -> tuple[list[str], RunFolder, Path]:
    """(flags, folder, the same run without an interruption) of a copy of the interrupted run."""
    flags, out = cut_short
    shutil.copytree(out / "cut", tmp_path / "out")
    flags = [*flags, "--output-dir", str(tmp_path / "out")]
    whole = run_folder([*flags, "--output-dir", str(out / "whole")])
    return flags, RunFolder(run_folder(flags)), whole


def predictions(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "predictions.safetensors")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_gives_way_to_an_older_one(cut_short, tmp_path, damage, capsys):
    flags, folder, whole = placed(cut_short, tmp_path)
    assert [state.name for state in folder.states] == ["step-00000004", "step-00000005"]
    DAMAGE[damage](folder.states[-1])
    assert main.run([*flags, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "step-00000005 cannot be used" in said and "Resuming after update 4" in said
    mine, theirs = predictions(folder.path), predictions(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert set(files(folder.path)) == set(files(whole))


@pytest.mark.parametrize("name", ["step-abc", "step-", "step--0000005", "step-99999999"])
def test_what_is_no_state_is_neither_taken_nor_deleted(cut_short, tmp_path, name, capsys):
    flags, folder, whole = placed(cut_short, tmp_path)
    shutil.copytree(folder.states[0], folder.path / "state" / name)
    assert main.run([*flags, "--resume"]) == 0
    assert "Resuming after update 5" in capsys.readouterr().out
    mine, theirs = predictions(folder.path), predictions(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("damage", ["a negative step", "a missing file", "step-abc"])
def test_states_that_cannot_be_used_are_an_error_and_stay(cut_short, tmp_path, damage, capsys):
    flags, folder, _ = placed(cut_short, tmp_path)
    for number, state in enumerate(folder.states):
        if damage == "step-abc":
            state.rename(state.with_name(f"step-abc{number}"))
        else:
            DAMAGE[damage](state)
    before = {n: c for n, c in files(folder.path).items() if n != "log.txt"}
    assert main.run([*flags, "--resume"]) == 2
    assert "holds no state that can be used" in capsys.readouterr().err
    assert main.run(flags) == 2
    assert "keeps the state of a run interrupted" in capsys.readouterr().err
    assert {n: c for n, c in files(folder.path).items() if n != "log.txt"} == before
    assert main.run([*flags, "--overwrite"]) == 0


def test_an_unfinished_replacement_is_resumed_beside_the_old_run(cut_short, tmp_path):
    flags, folder, whole = placed(cut_short, tmp_path)
    (tmp_path / "aside").mkdir()
    shutil.move(folder.path, tmp_path / "aside" / "next")
    main.main([*flags, "--lr", "1e-3"])
    old = files(folder.path)
    shutil.move(tmp_path / "aside" / "next", folder.path / ".next")
    assert main.run([*flags, "--lr", "1e-3"]) == 0, "the finished run is still there"
    assert main.run([*flags, "--lr", "1e-3", "--resume"]) == 0
    assert main.run(flags) == 2, "neither is replaced without a word"
    assert {n: c for n, c in files(folder.path).items() if not n.startswith(".")} == old
    assert main.run([*flags, "--resume"]) == 0
    mine, theirs = predictions(folder.path), predictions(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert set(files(folder.path)) == set(files(whole))


def test_another_runs_metrics_are_not_taken_for_the_end_of_this_one(cut_short, tmp_path, capsys):
    flags, _, _ = placed(cut_short, tmp_path)
    for call in ([*flags, "--resume", "--lr", "3e-3"], [*flags, "--resume", "--seed", "5"]):
        assert main.run(call) == 2
        assert "the stored run has" in capsys.readouterr().err
    main.main([*flags, "--overwrite", "--lr", "3e-3"])
    assert main.run([*flags, "--resume"]) == 2
    assert "the stored run has 0.003" in capsys.readouterr().err


def test_a_hostile_history_is_cut_without_a_word(cut_short, tmp_path):
    flags, folder, whole = placed(cut_short, tmp_path)
    with open(folder.path / "history.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": "x"}\n\xff\n' + b"[" * 100_000 + b'\n{"step": 5, "nll"')
    assert main.run([*flags, "--resume"]) == 0
    steps = [json.loads(x)["step"] for x in (folder.path / "history.jsonl").open()]
    assert steps == [json.loads(x)["step"] for x in (whole / "history.jsonl").open()]


def test_a_log_that_cannot_grow_says_so_once(tmp_path, capsys):
    setup_logging(True, tmp_path / "log.txt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for _ in range(5):
            logger.info("x" * 60)
        setup_logging(True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr()
    assert said.out.count("x" * 60) == 5
    assert said.err.count("log.txt cannot grow") == 1 and "Logging error" not in said.err


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
        *(f for d in ("utils", "dataset", "modelwrappers") for f in (ROOT / d).rglob("*.py")),
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
