"""Runs that die: before a chosen change of the file system, by a signal, or for lack of space.

Started as a program by `tests/test_deaths.py`, with a JSON of scenarios. Starting Python and torch
takes seconds, so it starts once and forks a process for every run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

import main
from utils.records import read_tensors_and_metadata
from utils.run_folder import RunFolder

DIED = 77
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link")
MINE = {"adapter_notes.txt": "my notes", "predictions-of-mine.safetensors": "my numbers"}
MINE |= {"member1-notes.txt": "more", "state-of-affairs.txt": "good"}


# --- one run in a process of its own --------------------------------------------------------------


def run(flags: list[str], prepare: Callable[[], None] = lambda: None, log: Path | None = None):
    """(exit code, signal number) of `main.run(flags)` in a forked process."""
    return ended(start(flags, prepare, log))


def start(
    flags: list[str], prepare: Callable[[], None] = lambda: None, log: Path | int | None = None
) -> int:
    """The id of a process that runs `main.run(flags)` once `prepare` has returned."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = log
        if not isinstance(log, int):
            output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        # tqdm's own is shared by all forked processes, and one that is killed may hold it.
        tqdm.set_lock(threading.RLock())
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        code = main.run(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> tuple[int | None, int | None]:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def die_before(change: int | None, root: Path, counter: Path | None = None) -> None:
    """From now on this process counts the changes it makes below `root`, and dies before one."""
    root, made = str(root.resolve()), 0

    def where(path, descriptor) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        if isinstance(descriptor, int) and descriptor >= 0:
            return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
        return os.path.abspath(os.fsdecode(path))

    def hook(event: str, arguments: tuple) -> None:
        nonlocal made
        if event == "open":
            path, _, flags = arguments
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if not flags & writing or flags & os.O_TMPFILE == os.O_TMPFILE:
                return
            place = where(path, None)
        elif event in CHANGES:
            descriptor = arguments[-1] if event != "os.rename" else arguments[2]
            place = where(arguments[0], descriptor if event != "os.truncate" else None)
        else:
            return
        if not place.startswith(root):
            return
        made += 1
        if made == change:
            os._exit(DIED)
        if counter is not None:
            counter.write_text(str(made))

    sys.addaudithook(hook)


# --- what a folder holds --------------------------------------------------------------------------


def content(folder: Path) -> dict[str, object]:
    """What a run has computed, by file: without times, places and the words of its log."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir():
            found[name + "/"] = None
        elif name == "log.txt":
            found[name] = None
        elif name == "metrics.json" or name == "args.json":
            found[name] = without_times(json.loads(file.read_text()))
        elif name == "history.jsonl":
            found[name] = [without_times(json.loads(line)) for line in file.open()]
        elif name.endswith("bayes_config.json"):
            found[name] = without_times(json.loads(file.read_text()))
        elif name.endswith(".safetensors") and name not in MINE:
            # not its bytes: the library writes the names in the header in any order
            tensors, metadata = read_tensors_and_metadata(file, "test")
            found[name] = {key: (v.dtype, v.tolist()) for key, v in tensors.items()} | metadata
        else:
            found[name] = file.read_bytes()
    return found


def without_times(value):
    """Without what is different in every run, and without the flags that say where it is kept."""
    varying = {"seconds", "training_seconds", "peak_memory_bytes", "run", "output_dir", "resume"}
    varying |= {"overwrite", "peak_memory_before_bytes"}
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in varying}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def run_path(flags: list[str]) -> Path:
    return main.run_folder_path(main.parse_args(flags))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a run in its own folder; what a new run does beside them is hidden."""
    files = (file for file in folder.rglob("*") if file.is_file())
    named = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: data for name, data in named.items() if not name.startswith(".")}


# --- scenarios ------------------------------------------------------------------------------------


def crash_points(scenario: dict, work: Path) -> dict:
    """Die before every chosen change of a run, run it again, and compare.

    The scenario has `flags`, of the run that dies and is repeated; `before`, flags of a run that is
    finished in the folder then; `interrupted`, the update of the run itself that has been reached.
    """
    flags, before = scenario["flags"], scenario.get("before")
    how = ["--overwrite"] if before else ["--resume"] if "interrupted" in scenario else []
    base, failures = work / "base", []

    def placed(name: str, flags: list[str]) -> list[str]:
        return [*flags, "--output-dir", str(work / name)]

    if before:
        assert run(placed("base", before))[0] == 0
    elif "interrupted" in scenario:
        at = scenario["interrupted"]
        assert run(placed("base", flags), lambda: stop_at(at - 1))[0] == 143
    if base.exists():
        for name, text in MINE.items():
            (run_path(placed("base", flags)) / name).write_text(text)

    def fresh(name: str) -> Path:
        if base.exists():
            shutil.copytree(base, work / name)
        return run_path(placed(name, flags))

    fresh("whole")
    counter = work / "changes"
    code, _ = run(
        placed("whole", [*flags, *how]), lambda: die_before(None, work / "whole", counter)
    )
    assert code == 0, f"the undisturbed run ended with {code}"
    expected = content(run_path(placed("whole", flags)))
    changes = int(counter.read_text())
    assert not [name for name in expected if name.startswith(".") or "/." in name], expected.keys()
    points = list(range(1, changes + 1))
    if scenario.get("sample"):
        step = max(1, changes // scenario["sample"])
        points = points[scenario.get("offset", 0) % step :: step]
    for point in points:
        name = f"point{point}"
        folder = fresh(name)
        old = bytes_of(folder) if before else {}
        log = work / f"{name}.log"
        code, number = run(
            placed(name, [*flags, *how]), lambda n=name, p=point: die_before(p, work / n), log
        )
        problems = []
        if code != DIED:
            problems.append(f"ended with {code}, {number} instead of dying")
        if before and not (folder / ".next" / "publish.json").exists():
            now = bytes_of(folder)
            visible = {n: c for n, c in content(folder).items() if not n.startswith(".")}
            if now != old and visible != expected:  # neither before it is replaced nor after
                changed = [n for n in old if now.get(n) != old[n]]
                problems.append(f"the earlier run has changed: {changed}")
        code, _ = run(placed(name, [*flags, "--resume"]), log=log)
        if code == 2 and before:  # the run that died had left nothing to go on from
            if bytes_of(folder) != old:
                problems.append("a refused call has changed the earlier run")
            code, _ = run(placed(name, [*flags, "--overwrite"]), log=log)
        if code != 0:
            problems.append(f"the repeated run ended with {code}")
        elif not content_is(folder, expected):
            problems.append(f"other results: {difference(content(folder), expected)}")
        if problems:
            failures.append([point, problems, log.read_text()[-1500:]])
        shutil.rmtree(work / name, ignore_errors=True)
    return {"changes": changes, "tried": len(points), "failures": failures}


def content_is(folder: Path, expected: dict) -> bool:
    return content(folder) == expected if (folder / "metrics.json").is_file() else False


def difference(found: dict, expected: dict) -> list[str]:
    return [
        name
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or found[name] != expected[name]
    ]


def stop_at(step: int, number: int = signal.SIGTERM, times: int = 1, where="update") -> None:
    """Have signals come where something of the loop or the wrapper begins, at update `step`."""
    from modelwrappers.engine import results
    from modelwrappers.engine.training import Loop
    from modelwrappers.wrapperbase import WrapperBase

    owner = next(o for o in (Loop, WrapperBase, results) if hasattr(o, where))
    original = getattr(owner, where)

    def signalled(first, *arguments, **kwargs):
        if first.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(first, *arguments, **kwargs)

    setattr(owner, where, signalled)


def signals(scenario: dict, work: Path) -> dict:
    """SIGINT and SIGTERM at every stage of a run, which is then resumed and compared.

    The scenario has `cases`: name -> arguments of `stop_at`.
    """
    flags, found = scenario["flags"], {}
    whole = [*flags, "--output-dir", str(work / "whole")]
    assert run(whole)[0] == 0
    expected = content(run_path(whole))
    for name, arguments in scenario["cases"].items():
        cut, log = [*flags, "--output-dir", str(work / name)], work / f"{name}.log"
        code, killed_by = run(cut, lambda arguments=arguments: stop_at(*arguments), log)
        folder = run_path(cut)
        found[name] = {"code": code, "killed by": killed_by, "said": log.read_text()}
        found[name]["states"] = [path.name for path in RunFolder(folder).states]
        found[name]["files"] = sorted(content(folder))
        found[name]["again"], _ = run([*cut, "--resume"], log=log)
        found[name]["differs"] = difference(content(folder), expected)
    return found


def random_kills(scenario: dict, work: Path) -> dict:
    """SIGKILL at random moments; each run is resumed until it is complete, and compared."""
    flags, failures, kills = scenario["flags"], [], 0
    generator = random.Random(scenario["seed"])

    def placed(name: str) -> list[str]:
        return [*flags, "--output-dir", str(work / name)]

    began = time.perf_counter()
    assert run(placed("whole"))[0] == 0
    took = time.perf_counter() - began
    expected = content(run_path(placed("whole")))
    attempt = 0
    while kills < scenario["kills"]:
        name = f"kill{attempt}"
        attempt += 1
        for _ in range(3):  # resumed runs are killed, too
            child = start([*placed(name), "--resume"], log=work / f"{name}.log")
            time.sleep(generator.uniform(0.02, took))
            os.kill(child, signal.SIGKILL)
            if ended(child)[1] == signal.SIGKILL:
                kills += 1
        code, _ = run([*placed(name), "--resume"], log=work / f"{name}.log")
        folder = run_path(placed(name))
        if code != 0 or not content_is(folder, expected):
            names = difference(content(folder), expected)
            failures.append([attempt, code, names, (work / f"{name}.log").read_text()[-1500:]])
        shutil.rmtree(work / name, ignore_errors=True)
    return {"kills": kills, "runs": attempt, "failures": failures}


def full_disk(scenario: dict, work: Path) -> dict:
    """A run over a finished one while no file can grow beyond some bytes; then there is room."""
    before, flags, outcomes = scenario["before"], scenario["flags"], []
    whole = [*flags, "--output-dir", str(work / "whole")]
    assert run(whole)[0] == 0
    expected = content(run_path(whole))
    for limit in scenario["limits"]:
        place = ["--output-dir", str(work / f"limit{limit}")]
        assert run([*before, *place])[0] == 0
        folder, log = run_path([*before, *place]), work / f"limit{limit}.log"
        old = bytes_of(folder)

        def fill(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        # What the terminal gets does not go into a file, which would fill up, too.
        reading, writing = os.pipe()
        child = start([*flags, *place, "--overwrite"], fill, writing)
        os.close(writing)
        with open(reading, errors="replace") as terminal:
            said = terminal.read()
        code, _ = ended(child)
        outcome = {"limit": limit, "code": code, "said": said}
        outcome["earlier run kept"] = bytes_of(folder) == old
        again, _ = run([*flags, *place, "--resume"], log=log)
        if again == 2:  # there was no state to go on from
            again, _ = run([*flags, *place, "--overwrite"], log=log)
        outcome |= {"again": again, "differs": difference(content(folder), expected)}
        outcomes.append(outcome)
    return {"outcomes": outcomes}


def program() -> None:
    """Each scenario of the JSON file in turn; their results as JSON."""
    torch.set_num_threads(1)
    content = json.loads(Path(sys.argv[1]).read_text())
    work, results = Path(content["work"]), {}
    # What the libraries import only when it is needed, once for all processes.
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        for number, flags in enumerate(content["warm_up"]):
            assert main.run([*flags, "--output-dir", str(work / f"warm-up{number}")]) == 0
    for name, scenario in content["scenarios"].items():
        place = work / name
        place.mkdir(parents=True)
        if "adapter" in scenario:
            adapter = [*scenario["adapter"], "--output-dir", str(place / "adapter")]
            assert run(adapter)[0] == 0
            scenario["flags"] += ["--load-lora-path", str(run_path(adapter))]
        results[name] = globals()[scenario["kind"]](scenario, place)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    program()
