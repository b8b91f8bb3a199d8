"""The embedded real models, through the entry point: minutes of CPU time (pytest -m slow)."""

import json

import pytest
from conftest import run_folder

import main

pytestmark = pytest.mark.slow
COMMON = "--dataset bbc_headlines --max-train-steps 40 --batch-size 8 --lr 5e-4 --nowand"


@pytest.mark.parametrize(
    ("kind", "model"), [("mcdataset", "smollm2-135m"), ("bertds", "minilm-l6")]
)
@pytest.mark.parametrize(
    ("method", "extra"),
    [("mle", ""), ("blob", "--bayes-klreweighting --bayes-eval-n-samples-final 4")],
)
def test_embedded_models_learn_headlines(kind, model, method, extra, tmp_path):
    """Chance is 0.2 on the five topics."""
    flags = [
        *f"--dataset-type {kind} --model {model} --modelwrapper {method} {COMMON} {extra}".split(),
        *("--limit-eval", "200", "--output-dir", str(tmp_path)),
    ]
    assert main.main(flags).acc >= 0.55
    block = json.loads((run_folder(flags) / "metrics.json").read_text())["datasets"][
        "bbc_headlines"
    ]
    assert block["n_examples"] == 200
