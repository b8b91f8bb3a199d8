"""The matrix that every method enters: {methods} x {causal, classifier} x {float, 8-bit, 4-bit}."""

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file

from modelwrappers import WRAPPERS, get_wrapper

FLAGS = {
    "map": [],
    "mle": [],
    "blob": ["--bayes-eps", "0.3", "--flipout", "none"],
    "mcdropout": [],
    "deepensemble": ["--ensemble-n", "2"],
    "laplace": ["--laplace-rank", "8"],
}
# Of five answers three occur: knowing nothing costs ln 5 = 1.61 nats, knowing their frequencies but
# not the text ln 3 = 1.10. Wide posteriors, on purpose or by few rows, stay near that.
LEARNED = dict.fromkeys(FLAGS, 1.0) | {"blob": 1.3, "laplace": 1.3}
# They train nothing: tests/test_tfb.py sends them through the same cells on a trained adapter.
POST_HOC = {"tfb", "tfblora", "tfblora_acc"}
QUANTIZATION = ("none", "8bit", "4bit")
KINDS = ("causal_flags", "classifier_flags")
every_cell = [
    pytest.param(method, kind, quantization, id=f"{method}-{kind.split('_')[0]}-{quantization}")
    for method in FLAGS
    for kind in KINDS
    for quantization in QUANTIZATION
]


def test_every_method_is_in_the_matrix():
    assert FLAGS.keys() | POST_HOC == WRAPPERS.keys()


@pytest.fixture
def cell(request):
    method, kind, quantization = request.param
    flags = [*request.getfixturevalue(kind), "--modelwrapper", method, *FLAGS[method]]
    return [*flags, "--quantization", quantization, "--apply-classhead-lora"]


@pytest.mark.parametrize(
    "cell", [p.values for p in every_cell], indirect=True, ids=lambda v: "-".join(v)
)
def test_method(cell):
    """Fits; only adapter and head move; saved and loaded it predicts the same; draws and mean."""
    trained = [*cell, "--max-train-steps", "30", "--checkpoint"]
    _, dataset, wrapper = build(trained)
    before = {name: p.detach().clone() for name, p in wrapper.named_parameters()}
    metrics = wrapper.fit_evaluate()
    assert metrics.nll < LEARNED[cell[cell.index("--modelwrapper") + 1]]
    assert 0 <= metrics.ece <= 1
    moved = {n for n, p in wrapper.named_parameters() if not torch.equal(p, before[n])}
    trainable = {name for name, _ in wrapper.state_parameters()}
    assert moved == trainable
    assert all("lora_" in n or "classifier" in n or "pooler" in n for n in moved)

    folder = run_folder(trained)
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    loaded = [*cell, "--load-lora-path", str(folder), "--log-path", "again"]
    _, _, again = build([flag for flag in loaded if flag != "--apply-classhead-lora"])
    # 8-bit rows share a quantisation and bitsandbytes repacks weights: the last bits differ
    tolerance = {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(
        again.predict(dataset.test_dataloader).log_probs, stored, **tolerance
    )

    wrapper.eval()
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    with torch.no_grad():
        mean = wrapper.forward_logits(batch, sample=False)
        assert mean.shape[1] == 1 and torch.equal(mean, wrapper.forward_logits(batch, sample=False))
        if get_wrapper(cell[cell.index("--modelwrapper") + 1]).is_stochastic:
            draws = wrapper.forward_logits(batch, n_samples=2)
            assert draws.shape[1] == 2 and draws.std(1).min() > 0
    if "deepensemble" in cell:  # a mean of weights would be no member's function
        return
    if cell[cell.index("--quantization") + 1] == "none":
        wrapper.merge_adapter()
        with torch.no_grad():
            merged = wrapper.forward_logits(batch, n_samples=2)
        torch.testing.assert_close(merged[:, :1], mean, rtol=1e-3, atol=1e-3)
        wrapper.unmerge_adapter()
