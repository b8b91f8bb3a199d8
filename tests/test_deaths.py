"""Runs that end before their time, at any point: what was there stays, and resuming loses nothing.

`tests/deaths.py` does the work in processes that it forks; a test starts it once.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SHORT = ["--max-train-steps", "5", "--save-per-steps", "2", "--eval-per-steps", "2"]
SHORT += ["--limit-eval", "12", "--batch-size", "6", "--lora-r", "2"]
METHODS = {
    "map": ["--lora-dropout", "0.3"],
    "mcdropout": ["--bayes-eval-n-samples-final", "2"],
    "deepensemble": ["--ensemble-n", "2", "--max-train-steps", "3"],
    "blob": ["--bayes-eval-n-samples-final", "2"],
    "laplace": ["--bayes-eval-n-samples-final", "2"],
    "tfb": ["--bayes-eval-n-samples-final", "2", "--th", "0.9", "--anchor-size", "12"],
}
TRAINED = [name for name in METHODS if name != "tfb"]


def suffer(tmp_path, scenarios: dict[str, dict], warm_up: list[list[str]]) -> dict[str, dict]:
    """What `tests/deaths.py` finds."""
    file, result = tmp_path / "scenarios.json", tmp_path / "results.json"
    content = {"work": str(tmp_path / "work"), "warm_up": warm_up, "scenarios": scenarios}
    file.write_text(json.dumps(content))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "deaths.py"), str(file), str(result)]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def flags(tiny_llama, data_dir) -> list[str]:
    """As `causal_flags`; each run gets an --output-dir of its own."""
    return [
        *("--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", tiny_llama),
        *("--data-dir", data_dir, "--lr", "1e-2", "--nowand", "--device", "cpu"),
    ]


def method(flags: list[str], name: str) -> list[str]:
    return [*flags, *SHORT, "--modelwrapper", name, *METHODS[name]]


@pytest.fixture(scope="module")
def found(flags, tmp_path_factory) -> dict[str, dict]:
    """Everything of the default tier, in one go: starting Python and torch takes longest."""
    scenarios = crash_points(flags, sample=3) | signals(flags) | {"full disk": full_disk(flags)}
    return suffer(tmp_path_factory.mktemp("deaths"), scenarios, [method(flags, "map")])


# --- death before a change of the file system ---------------------------------------------------

POINTS = ("first", "overwrite", "resumed", "ensemble", "ensemble over a larger one")


def crash_points(flags: list[str], **extra) -> dict[str, dict]:
    plain, ensemble = method(flags, "map"), method(flags, "deepensemble")
    cases = (
        {"flags": plain},
        {"flags": plain, "before": [*plain, "--lr", "1e-3"]},
        {"flags": plain, "interrupted": 3},
        {"flags": ensemble},
        {"flags": ensemble, "before": [*ensemble, "--ensemble-n", "3"]},
    )
    return {
        name: {"kind": "crash_points", "offset": 7 * number, **case, **extra}
        for number, (name, case) in enumerate(zip(POINTS, cases, strict=True))
    }


@pytest.mark.parametrize("name", POINTS)
def test_death_before_a_change_of_the_file_system_costs_nothing(name, found):
    """At three points of each scenario; the slow tier tries them all."""
    assert found[name]["tried"] >= 3
    assert found[name]["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_death_before_any_change_of_the_file_system_costs_nothing(name, flags, tmp_path):
    scenario = crash_points(flags)[name]
    found = suffer(tmp_path, {name: scenario}, [method(flags, "map")])[name]
    print(f"{name}: died before each of {found['tried']} changes")
    assert found["tried"] == found["changes"]
    assert found["failures"] == []


# --- SIGKILL at random --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_of_every_method_cost_nothing(flags, tmp_path):
    scenarios = {
        name: {
            "kind": "random_kills",
            "flags": method(flags, name),
            "seed": number,
            "kills": 17,
        }
        for number, name in enumerate(METHODS)
    }
    scenarios["tfb"]["adapter"] = method(flags, "map")
    warm_up = [method(flags, name) for name in TRAINED]
    found = suffer(tmp_path, scenarios, warm_up)
    for name, outcome in found.items():
        print(f"{name}: {outcome['kills']} kills of {outcome['runs']} runs")
        assert outcome["failures"] == [], name
    assert sum(outcome["kills"] for outcome in found.values()) >= 100


# --- signals ------------------------------------------------------------------------------------

INT, TERM = 2, 15
# name: arguments of `stop_at`, and the states that are there then
SIGNALS = {
    "INT in an update": ((2, INT), [3]),
    "TERM in an update": ((2, TERM), [3]),
    "INT twice in an update": ((2, INT, 2), []),
    "INT in an evaluation while training": ((2, INT, 1, "predict"), [2]),
    "TERM in the last evaluation": ((5, TERM, 1, "predict"), [5]),
    "TERM while results are written": ((5, TERM, 1, "_write_predictions"), [5]),
    "INT while loading": ((0, INT, 1, "prepare_for_fit_evaluate"), []),
    # of an ensemble: the end of the first member, and the second update of the second one
    "TERM in the second member": ((4, TERM), [3, 5]),
}


def signals(flags: list[str]) -> dict[str, dict]:
    """Without regular states."""
    methods = {"deepensemble": ["TERM in the second member"]}
    methods["map"] = [name for name in SIGNALS if name not in methods["deepensemble"]]
    return {
        f"signals {kind}": {
            "kind": "signals",
            "flags": [*method(flags, kind), "--save-per-steps", "0"],
            "cases": {name: SIGNALS[name][0] for name in names},
        }
        for kind, names in methods.items()
    }


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_keeps_a_state_and_a_second_one_ends_at_once(name, found):
    """Each run is resumed and compared with one that was left alone."""
    outcome = (found["signals map"] | found["signals deepensemble"])[name]
    states = [f"step-{step:08d}" for step in SIGNALS[name][1]]
    assert outcome["code"] == (130 if "INT" in name else 143)
    assert outcome["killed by"] is None and "Traceback" not in outcome["said"]
    assert outcome["states"] == states
    assert ("run the same command with --resume" in outcome["said"]) == bool(states)
    assert (outcome["files"] == []) == (name == "INT while loading")
    assert outcome["again"] == 0 and outcome["differs"] == []


# --- a full disk --------------------------------------------------------------------------------

# bytes that a file can have: what does not fit any more
FULL = {5_500: "history.jsonl", 8_500: "/state/", 15_000: "predictions.safetensors"}


def full_disk(flags: list[str]) -> dict:
    flags = [*method(flags, "mcdropout"), "--bayes-eval-n-samples-final", "100"]
    flags += ["--max-train-steps", "60", "--save-per-steps", "100", "--eval-per-steps", "0"]
    before = [*flags, "--lr", "1e-3"]
    return {"kind": "full_disk", "before": before, "flags": flags, "limits": list(FULL)}


@pytest.mark.parametrize("limit", FULL)
def test_a_full_disk_leaves_an_earlier_run_alone_and_says_so(limit, found):
    (outcome,) = [o for o in found["full disk"]["outcomes"] if o["limit"] == limit]
    said = outcome["said"]
    assert outcome["code"] == 1, said
    message = said[said.index("RunError") :]
    assert "cannot write" in message and FULL[limit] in message and "Free some space" in message
    assert "Traceback" not in said and "Logging error" not in said
    assert outcome["earlier run kept"]
    assert outcome["again"] == 0 and outcome["differs"] == []
