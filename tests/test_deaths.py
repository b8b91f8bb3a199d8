"""Runs that are killed at any point: resumed, they end as if nothing had happened."""

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
    "deepensemble": ["--ensemble-n", "2", "--max-train-steps", "3"],
    "mcdropout": ["--bayes-eval-n-samples-final", "2"],
    "blob": ["--bayes-eval-n-samples-final", "2"],
    "laplace": ["--bayes-eval-n-samples-final", "2"],
}


def suffer(tmp_path, kind: str, **scenario) -> dict:
    """What `tests/deaths.py` finds."""
    file, result = tmp_path / "scenario.json", tmp_path / "result.json"
    file.write_text(json.dumps({"kind": kind, "work": str(tmp_path / "work"), **scenario}))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "deaths.py"), str(file), str(result)]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(result.read_text())


def method(flags: list[str], name: str) -> list[str]:
    at = flags.index("--output-dir")  # each run gets its own
    return [*flags[:at], *flags[at + 2 :], *SHORT, "--modelwrapper", name, *METHODS[name]]


def scenarios(flags) -> dict[str, dict]:
    other = ["--lr", "1e-3", "--ood-datasets", "bbc_headlines"]
    del other[2:]
    return {
        "first": {"flags": method(flags, "map")},
        "overwrite": {"flags": method(flags, "map"), "before": [*method(flags, "map"), *other]},
        "resumed": {"flags": method(flags, "map"), "interrupted": 3},
        "ensemble": {"flags": method(flags, "deepensemble")},
        "ensemble over another": {
            "flags": method(flags, "deepensemble"),
            "before": [*method(flags, "deepensemble"), "--ensemble-n", "3"],
        },
    }


NAMES = ("first", "overwrite", "resumed", "ensemble", "ensemble over another")


@pytest.mark.parametrize("name", NAMES)
def test_death_before_a_change_of_the_file_system_costs_nothing(name, causal_flags, tmp_path):
    offset = 3 * NAMES.index(name)
    found = suffer(
        tmp_path, "crash_points", **scenarios(causal_flags)[name], sample=5, offset=offset
    )
    assert found["tried"] >= 5
    assert found["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_death_before_any_change_of_the_file_system_costs_nothing(name, causal_flags, tmp_path):
    found = suffer(tmp_path, "crash_points", **scenarios(causal_flags)[name])
    print(f"{name}: died before each of {found['tried']} changes")
    assert found["tried"] == found["changes"]
    assert found["failures"] == []
