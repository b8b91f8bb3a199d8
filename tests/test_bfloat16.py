"""bfloat16 weights (--dtype) and mixed precision on the CPU, held against float32."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_folder
from safetensors.torch import load_file
from test_placement import KINDS, METHODS, SAME, predictions, start

import main
from modelwrappers import WRAPPERS, blob
from modelwrappers.lora.stochastic import RHO

WAYS = {"weights": "--dtype bfloat16", "mixed": ""}
ROUNDING = 2**-9  # of a number with 8 significant bits, relative
# Largest difference of a probability, in roundings. The errors of the two blocks' operations are
# of any sign and nearly cancel: 1.6 was the most of 24 runs, 0.1 to 0.4 the mean over rows.
MOST = 4


def run(flags: list[str], method: str, name: str, more: str = "") -> list[str]:
    more = f"{METHODS.get(method, '')} --log-path {name} --checkpoint {more}"
    flags = start(flags, method, more)
    main.main(flags)
    return flags


def run_in(way: str, flags: list[str], method: str, monkeypatch) -> list[str]:
    """A run in bfloat16, one way or the other."""
    with monkeypatch.context() as patch:
        if way == "mixed":
            # `accelerate launch --mixed_precision bf16` says it so; the state is the process's
            patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            AcceleratorState._reset_state()
        try:
            return run(flags, method, way, WAYS[way])
        finally:
            if way == "mixed":
                AcceleratorState._reset_state()


# Every method in each way, each way with one kind of model; one method in all four cells.
CELLS = [
    (method, kind, way)
    for method in WRAPPERS
    if method not in SAME
    for kind in KINDS
    for way in WAYS
    if method == "map" or (kind == "causal_flags") == (way == "weights")
]


@pytest.mark.parametrize(("method", "kind", "way"), CELLS, ids="-".join)
def test_every_method_runs_in_bfloat16_and_loses_no_more_than_its_rounding(
    method, kind, way, request, monkeypatch
):
    flags = request.getfixturevalue(kind)
    exact = predictions(run(flags, method, "exact")).exp().mean(1)
    rounded = run_in(way, flags, method, monkeypatch)
    found = predictions(rounded).exp().mean(1)
    assert 0 < (found - exact).abs().max().item() < MOST * ROUNDING
    tensors = load_file(run_folder(rounded) / "adapter_model.safetensors")
    trained = {tensor.dtype for name, tensor in tensors.items() if "lora_" in name}
    assert trained == {torch.float32}
    # a classification head is trained in its model's type
    heads = {tensor.dtype for name, tensor in tensors.items() if "lora_" not in name}
    assert heads <= {torch.bfloat16 if way == "weights" else torch.float32}


@pytest.mark.parametrize("way", WAYS)
def test_spread_and_kl_are_float32_or_wider(way, causal_flags, monkeypatch):
    """In bfloat16 the KL, a sum over thousands of weights, would be off by a rounding."""
    seen = []

    def noted(means, rhos, prior_std):
        value = kl_divergence(means, rhos, prior_std)
        seen.extend(tensor.dtype for tensor in (*means, *rhos))
        seen.extend(rho.grad.dtype for rho in rhos)
        assert value.dtype == torch.float64
        return value

    kl_divergence = blob.kl_divergence
    monkeypatch.setattr(blob, "kl_divergence", noted)
    exact = run(causal_flags, "blob", "exact")
    rounded = run_in(way, causal_flags, "blob", monkeypatch)
    assert set(seen) == {torch.float32}
    kls = [
        [json.loads(line)["kl"] for line in (run_folder(f) / "history.jsonl").open()]
        for f in (exact, rounded)
    ]
    assert len(kls[0]) == 2 and kls[0] == pytest.approx(kls[1], rel=ROUNDING / 20)
    tensors = load_file(run_folder(rounded) / "adapter_model.safetensors")
    assert {t.dtype for name, t in tensors.items() if RHO in name} == {torch.float32}
