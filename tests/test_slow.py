"""The embedded real models, through the entry point: minutes of CPU time (pytest -m slow)."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_folder

import main

pytestmark = pytest.mark.slow
COMMON = "--dataset bbc_headlines --eval-per-steps 0 --nowand"
# Long enough to be far above chance, short enough for about a minute on two cores.
LENGTH = {
    "smollm2-135m": "--max-train-steps 24 --batch-size 4 --lr 1e-3 --limit-eval 100",
    "minilm-l6": "--max-train-steps 40 --batch-size 8 --lr 5e-4 --limit-eval 200",
}


@pytest.mark.parametrize(
    ("kind", "model"), [("mcdataset", "smollm2-135m"), ("bertds", "minilm-l6")]
)
@pytest.mark.parametrize(
    ("method", "extra"),
    [("mle", ""), ("blob", "--bayes-klreweighting --bayes-eval-n-samples-final 2")],
)
def test_embedded_models_learn_headlines(kind, model, method, extra, tmp_path):
    """Chance is 0.2 on the five topics."""
    flags = [
        *f"--dataset-type {kind} --model {model} --modelwrapper {method} {COMMON} {extra}".split(),
        *LENGTH[model].split(),
        *("--output-dir", str(tmp_path)),
    ]
    assert main.main(flags).acc >= 0.55
    block = json.loads((run_folder(flags) / "metrics.json").read_text())["datasets"][
        "bbc_headlines"
    ]
    assert block["n_examples"] == int(LENGTH[model].split()[-1])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Run one of the scripts on embedded rows; gives the results below a method's folder."""
    root = tmp_path_factory.mktemp("sweeps")

    def run(script: str, model: str, datasets: str, extra: str, **environment) -> dict[str, dict]:
        settings = {"MODEL": model, "DATASETS": datasets, "QUANTIZATION": "none", "SEEDS": "1"}
        settings |= {"STEPS": "2", "NUM_PROCESSES": "1", "OUTPUT_DIR": str(root)}
        settings["EXTRA"] = f"--nowand --limit-train 12 --limit-eval 6 {extra}"
        result = subprocess.run(
            ["bash", str(ROOT / "scripts" / script)],
            env=os.environ | {"PYTHON_BIN": sys.executable} | settings | environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        files = (root / script.split("/")[0]).rglob("metrics.json")
        return {file.parent.name: json.loads(file.read_text())["datasets"] for file in files}

    return run


def test_a_llama_sweep_runs(sweep):
    results = sweep(
        "blob/blob-llama-all.sh",
        "smollm2-135m",
        "bbc_headlines",
        "--bayes-eval-n-samples-final 2",
    )
    assert results["blob-bbc_headlines-seed1"]["bbc_headlines"]["n_draws"] == 2


def test_a_roberta_sweep_runs_and_post_hoc_methods_on_it(sweep):
    results = sweep("mle/mle-roberta-all.sh", "minilm-l6", "bbc_headlines", "--batch-size 4")
    assert results["mle-bbc_headlines-seed1"]["bbc_headlines"]["n_examples"] == 6
    results = sweep("tfb/tfb-roberta-all.sh", "minilm-l6", "bbc_headlines", "--iter 2 --th 1")
    assert results["tfb-mle-bbc_headlines-seed1"]["bbc_headlines"]["n_draws"] == 10
    results = sweep("laplace/laplace-roberta-all.sh", "minilm-l6", "bbc_headlines", "", BASE="mle")
    assert results["laplace-mle-bbc_headlines-seed1"]["bbc_headlines"]["n_draws"] == 500


def test_a_shifted_sweep_runs_and_tfb_on_it(sweep):
    """Trained on headlines, evaluated on bodies: in two steps, and by TFB in one run."""
    source = {"SOURCE": "bbc_headlines"}
    results = sweep("map/map-llama-ood-all.sh", "smollm2-135m", "bbc_bodies", "", **source)
    assert results.keys() == {
        "map-bbc_headlines-seed1",
        "map-bbc_headlines-seed1-on-bbc_bodies",
    }
    extra = "--iter 2 --th 1 --bayes-eval-n-samples-final 2 --anchor-size 6"
    results = sweep(
        "tfb/tfb-llama-ood-all.sh", "smollm2-135m", "bbc_bodies", extra, BASE="map", **source
    )
    assert results["tfb-map-bbc_headlines-seed1-ood"].keys() == {"bbc_headlines", "bbc_bodies"}
