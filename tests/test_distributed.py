"""Two gloo ranks on the CPU against one process, on 37 test rows and batches of 8.

Every case is trained in one launch of two ranks, with half the batch each, and once here.
Plain SGD: Adam would turn the last bit of a near-zero gradient into a whole step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_folder
from safetensors.torch import load_file

import main
from modelwrappers.lora.sharding import check_sharding, shards_base
from utils.errors import UsageError

TRAIN = "--n-epochs 2 --opt sgd --lr 0.1"
COMMON = "--checkpoint --eval-batch-size 8 --nowand --device cpu"
KINDS = ("mcdataset", "bertds")
METHODS = {
    "map": TRAIN,
    "map:prior": f"{TRAIN} --prior-precision 80",
    "blob": f"{TRAIN} --bayes-eps 0.3 --bayes-kllr 0.01",
    "mcdropout": TRAIN,
    "deepensemble": f"{TRAIN} --ensemble-n 2",
    "laplace": f"{TRAIN} --apply-classhead-lora --laplace-rank 4",
    # ways to draw: a branch and draws by row, pairs, a cached beginning
    "blob:settled": f"{TRAIN} --bayes-eps 0.3 --lora-layers last:1 --flipout-eval none "
    "--draws-adaptive --draws-tolerance 0.2 --bayes-eval-n-samples-final 24",
    "blob:pairs": f"{TRAIN} --bayes-eps 0.3 --draws antithetic --lora-layers last:1",
    "blob:shots": f"{TRAIN} --bayes-eps 0.3 --num-shots 2 --flipout-eval none --prefix-cache on",
}
# On the adapter that map's two ranks have left.
POST_HOC = {"tfb": "--th 0.5 --bayes-beta 0.3"}
CASES = [
    (kind, method)
    for kind in KINDS
    for method in (METHODS | POST_HOC)
    if (kind, method) != ("bertds", "blob:shots")
]
# What could not work with a base in parts: a tied head with LoRA on it, forwards that are replayed,
# gradients that wait, a classification head under LoRA. Batches of 30 and 7 rows are stacked a
# different number of times for ten draws.
FSDP = {
    "tied": "--apply-classhead-lora --gradient-checkpointing --grad-accum-steps 2 "
    "--eval-per-steps 2",
    "bertds": "--apply-classhead-lora",
}
FSDP_CASES = [
    *(("tied", method) for method in ("map", "blob", "deepensemble", "tfb")),
    *(("bertds", method) for method in ("map", "mcdropout")),
]


def flags_of(
    kind: str, method: str, processes: int, root: Path, models: dict, data: str, name: str = ""
) -> list[str]:
    method, _, way = method.partition(":")
    name = name or f"{kind}{way}-{processes}"
    flags = [
        *("--dataset", "bbc_headlines", "--model", models[kind], "--modelwrapper", method),
        *f"--dataset-type {'bertds' if kind == 'bertds' else 'mcdataset'} {COMMON}".split(),
        *(METHODS | POST_HOC)[f"{method}:{way}" if way else method].split(),
        *f"--batch-size {8 // processes}".split(),
        *("--data-dir", data, "--output-dir", str(root), "--log-path", name),
    ]
    if method in POST_HOC:
        source = flags_of(kind, "map", 2, root, models, data, name if "fsdp" in name else "")
        flags += ["--load-lora-path", str(run_folder(source))]
    return flags


@pytest.fixture(scope="module")
def runs(tiny_llama, tiny_bert, tied_llama, data_dir, tmp_path_factory):
    """(kind, method) -> (flags of the run in one process, flags of the run on two ranks)."""
    root = tmp_path_factory.mktemp("ranks")
    models = {"mcdataset": tiny_llama, "bertds": tiny_bert, "tied": tied_llama}
    flags = {
        case: [flags_of(*case, processes, root, models, data_dir) for processes in (1, 2)]
        for case in CASES
    }
    # The adapters of the two-rank runs are evaluated on two ranks and on one.
    for case, (_, two) in list(flags.items()):
        base = [*two, "--n-epochs", "0", "--load-lora-path", str(run_folder(two))]
        flags["again", *case] = [[*base, "--log-path", f"{case}-again-{n}"] for n in (1, 2)]
    two_ranks = [{"flags": two, "fsdp": False} for _, two in flags.values()]
    for kind, method in FSDP_CASES:  # both on two ranks
        extra = "--eval-batch-size 30 "
        if method in METHODS:
            extra += f"{FSDP[kind]} --n-epochs 1"
        pair = [
            flags_of(kind, method, 2, root, models, data_dir, f"{kind}-fsdp-{fsdp}") + extra.split()
            for fsdp in (False, True)
        ]
        two_ranks += [{"flags": pair[i], "fsdp": bool(i)} for i in (0, 1)]
        flags["fsdp", kind, method] = pair
    whole, cut = (
        [*flags_of("mcdataset", "mcdropout", 2, root, models, data_dir, name), "--eval-per-steps=1"]
        for name in ("whole", "cut")
    )
    two_ranks += [{"flags": whole, "fsdp": False}, {"flags": cut, "fsdp": False, "signal": 3}]
    two_ranks += [{"flags": [*cut, "--resume"], "fsdp": False}]
    cases = root / "cases.json"
    cases.write_text(json.dumps(two_ranks))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "ranks.py"), str(cases)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # ranks that wait for each other would wait for ever
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for case, (one, _) in flags.items():
        if case[0] != "fsdp":
            main.main(one)
    return flags | {"signal": (whole, cut)}


def test_a_signal_to_one_rank_stops_all_after_the_same_update(runs):
    """And keeps a state of it: the resumed run is the uninterrupted one, bit for bit."""
    whole, cut = (run_folder(flags) for flags in runs["signal"])
    assert "Resuming after update 4" in (cut / "log.txt").read_text(encoding="utf-8")
    names = [name for name in os.listdir(whole) if name.endswith(".safetensors")]
    assert set(os.listdir(cut)) == set(os.listdir(whole)) and len(names) == 2
    for name in names:
        ours, theirs = load_file(cut / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def block(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]


@pytest.mark.parametrize("method", ["map", "map:prior", "deepensemble"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_the_same_adapter_as_one(runs, kind, method):
    one, two = (run_folder(flags) for flags in runs[kind, method])
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys(), "no .module in the names"
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)
    assert block(one)["n_examples"] == block(two)["n_examples"] == 37
    for key in ("acc", "nll", "brier"):
        assert block(two)[key] == pytest.approx(block(one)[key], abs=1e-4), key


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_one_posterior(runs, kind):
    """Each rank has noise of its own; tests/ranks.py has held that all end with the same bits."""
    one, two = (run_folder(flags) for flags in runs[kind, "blob"])
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    spread = [key for key in a if key.endswith("lora_A_rho")]
    assert spread and all((a[key] - b[key]).abs().max() > 0 for key in spread), "noise of its own"
    for key in spread:  # the KL's part of the steps is the same
        torch.testing.assert_close(a[key], b[key], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_find_the_curvature_of_one(runs, kind):
    """Eigenvalues; an eigenvector's sign is anybody's."""
    one, two = (run_folder(flags) for flags in runs[kind, "laplace"])
    a, b = (load_file(folder / "laplace.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        if key.endswith("values"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-3 * a[key].max().item())
    described = [json.loads((f / "bayes_config.json").read_text())["laplace"] for f in (one, two)]
    assert described[0]["n_examples"] == described[1]["n_examples"] == 40
    for key in ("prior_precision", "log_marginal_likelihood"):
        assert described[0][key] == pytest.approx(described[1][key], rel=1e-2), key


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_two_ranks_give_the_metrics_of_one(runs, kind, method):
    one, two = (run_folder(flags) for flags in runs["again", kind, method])
    a, b = (load_file(folder / "predictions.safetensors") for folder in (one, two))
    assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["index"], b["index"])
    assert a.keys() == b.keys() and ("num_draws" in a) == (method == "blob:settled")
    for key in a.keys() - {"labels", "index"}:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, equal_nan=True)
    for key in ("n_examples", "n_draws"):
        assert block(one)[key] == block(two)[key]
    for key in ("acc", "ece", "nll", "brier"):
        assert block(two)[key] == pytest.approx(block(one)[key], abs=1e-6), key


@pytest.mark.parametrize("method", POST_HOC)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_find_the_posterior_that_one_finds(runs, kind, method):
    one, two = (run_folder(flags) for flags in runs[kind, method])
    a, b = (load_file(folder / "predictions.safetensors") for folder in (one, two))
    torch.testing.assert_close(a["log_probs"], b["log_probs"], rtol=1e-5, atol=1e-6)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "method"), FSDP_CASES)
def test_a_sharded_base_computes_what_a_whole_one_does(runs, kind, method):
    """tests/ranks.py has held that the base was in parts, and only the base."""
    whole, sharded = (run_folder(flags) for flags in runs["fsdp", kind, method])
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, sharded))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    a, b = (load_file(folder / "predictions.safetensors") for folder in (whole, sharded))
    torch.testing.assert_close(a["log_probs"], b["log_probs"], rtol=1e-4, atol=1e-5)
    a, b = (json.loads((f / "adapter_config.json").read_text()) for f in (whole, sharded))
    assert a == b, "the subclasses that FSDP makes do not show"


def test_a_quantised_base_is_not_sharded(causal_flags, monkeypatch):
    accelerator = SimpleNamespace(num_processes=2, distributed_type="MULTI_CPU")
    args = main.parse_args([*causal_flags, "--modelwrapper", "map", "--quantization", "8bit"])
    assert not shards_base(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert shards_base(accelerator)
    with pytest.raises(UsageError, match=r"--quantization 8bit and an FSDP launch.*ddp.yaml"):
        check_sharding(args)
