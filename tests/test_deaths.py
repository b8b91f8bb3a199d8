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


def method(flags: list[str], name: str) -> list[str]:
    at = flags.index("--output-dir")  # each run gets its own
    return [*flags[:at], *flags[at + 2 :], *SHORT, "--modelwrapper", name, *METHODS[name]]


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


def test_death_before_a_change_of_the_file_system_costs_nothing(causal_flags, tmp_path):
    """At three points of each scenario; the slow tier tries them all."""
    found = suffer(tmp_path, crash_points(causal_flags, sample=3), [method(causal_flags, "map")])
    assert set(found) == set(POINTS)
    for name, outcome in found.items():
        assert outcome["tried"] >= 3, name
        assert outcome["failures"] == [], name


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_death_before_any_change_of_the_file_system_costs_nothing(name, causal_flags, tmp_path):
    scenario = crash_points(causal_flags)[name]
    found = suffer(tmp_path, {name: scenario}, [method(causal_flags, "map")])[name]
    print(f"{name}: died before each of {found['tried']} changes")
    assert found["tried"] == found["changes"]
    assert found["failures"] == []


# --- SIGKILL at random --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_of_every_method_cost_nothing(causal_flags, tmp_path):
    scenarios = {
        name: {
            "kind": "random_kills",
            "flags": method(causal_flags, name),
            "seed": number,
            "kills": 17,
        }
        for number, name in enumerate(METHODS)
    }
    scenarios["tfb"]["adapter"] = method(causal_flags, "map")
    warm_up = [method(causal_flags, name) for name in TRAINED]
    found = suffer(tmp_path, scenarios, warm_up)
    for name, outcome in found.items():
        print(f"{name}: {outcome['kills']} kills of {outcome['runs']} runs")
        assert outcome["failures"] == [], name
    assert sum(outcome["kills"] for outcome in found.values()) >= 100


# --- signals ------------------------------------------------------------------------------------

INT, TERM = 2, 15


def test_a_signal_keeps_a_state_and_a_second_one_ends_at_once(causal_flags, tmp_path):
    """Without regular states; each run is resumed and compared with one that was left alone."""
    flags = [*method(causal_flags, "map"), "--save-per-steps", "0"]
    ensemble = [*method(causal_flags, "deepensemble"), "--save-per-steps", "0"]
    cases = {
        "INT in an update": (2, INT),
        "TERM in an update": (2, TERM),
        "INT twice in an update": (2, INT, 2),
        "INT in an evaluation while training": (2, INT, 1, "predict"),
        "TERM in the last evaluation": (5, TERM, 1, "predict"),
        "TERM while results are written": (5, TERM, 1, "_write_predictions"),
        "INT while loading": (0, INT, 1, "prepare_for_fit_evaluate"),
    }
    scenarios = {
        "map": {"kind": "signals", "flags": flags, "cases": cases},
        "ensemble": {"kind": "signals", "flags": ensemble, "cases": {"second": (4, TERM)}},
    }
    both = suffer(tmp_path, scenarios, [flags])
    found = both["map"] | {"in the second member": both["ensemble"]["second"]}
    states = {
        "INT in an update": ["step-00000003"],
        "TERM in an update": ["step-00000003"],
        "INT twice in an update": [],
        "INT in an evaluation while training": ["step-00000002"],
        "TERM in the last evaluation": ["step-00000005"],
        "TERM while results are written": ["step-00000005"],
        "INT while loading": [],
        # the state of the first member's end, and that of the second one's second update
        "in the second member": ["step-00000003", "step-00000005"],
    }
    assert set(found) == set(states)
    for name, outcome in found.items():
        assert outcome["code"] == (130 if "INT" in name else 143), name
        assert outcome["killed by"] is None and "Traceback" not in outcome["said"], name
        assert outcome["states"] == states[name], name
        promised = "run the same command with --resume" in outcome["said"]
        assert promised == bool(states[name]), name
        assert outcome["again"] == 0 and outcome["differs"] == [], name
    assert found["INT while loading"]["files"] == []


# --- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_leaves_an_earlier_run_alone_and_says_so(causal_flags, tmp_path):
    """A whole run with states; first they do not fit, then the adapter, then the predictions."""
    flags = [*method(causal_flags, "map"), "--limit-eval", "37"]
    scenario = {"kind": "full_disk", "before": [*flags, "--lr", "1e-3"], "flags": flags}
    scenario["limits"] = [300, 2_500, 8_000, 20_000]
    found = suffer(tmp_path, {"full": scenario}, [flags])["full"]["outcomes"]
    for outcome in found:
        limit, said = outcome["limit"], outcome["said"]
        assert outcome["code"] == 1, (limit, said)
        assert "RunError: cannot write" in said and "Free some space" in said, (limit, said)
        assert "Traceback" not in said and "Logging error" not in said, (limit, said)
        assert outcome["earlier run kept"], limit
        assert outcome["again"] == 0 and outcome["differs"] == [], (limit, outcome["differs"])
