"""Where tensors are, and in which type: what a machine with a GPU would show, without one.

`tests/pretended_gpu.py` says what stands for the GPU.
"""

import pytest
import torch
from conftest import run_folder
from pretended_gpu import GPU, pretended_gpu
from safetensors.torch import load_file
from test_methods import POST_HOC

import main
from modelwrappers import WRAPPERS

KINDS = ("causal_flags", "classifier_flags")
# Plain SGD: Adam would turn the last bit of a near-zero gradient into a whole step.
TRAIN = "--max-train-steps 2 --opt sgd --lr 0.1"
SHORT = "--limit-train 16 --limit-eval 12 --eval-batch-size 12"
METHODS = {
    "laplace": "--lora-layers last:1 --laplace-rank 4 --laplace-prior-precision 1",
    "tfb": "--iter 1 --th 0.5 --anchor-size 8 --bayes-eval-n-samples-final 3",
    "blob": "--bayes-eps 0.3 --calibrate all",
    "deepensemble": "--ensemble-n 2",
}
# Ways to draw, to train and to choose that have code of their own.
WAYS = {
    "blob:branch": "--bayes-eps 0.3 --lora-layers last:1 --draws antithetic --save-per-steps 1",
    "blob:settled": "--bayes-eps 0.3 --flipout-eval none --draws-adaptive --num-shots 2 "
    "--prefix-cache on --bayes-eval-n-samples-final 12",
    "mcdropout:branch": "--lora-layers last:1 --temperature-scaling --gradient-checkpointing",
    "laplace:evidence": "--lora-layers last:1 --laplace-hessian diag --target-modules v_proj",
}
# What TFB searches a posterior around.
ADAPTER = "--modelwrapper map --checkpoint --log-path adapter"


SAME = ("mle", "tfblora", "tfblora_acc")  # the same code under another name


def flags_of(flags: list[str], method: str, more: str) -> list[str]:
    return [*flags, "--modelwrapper", method, *SHORT.split(), *more.split()]


def start(flags: list[str], method: str, more: str) -> list[str]:
    """The flags of a run, after the run that trains the adapter, if it needs one."""
    if method not in POST_HOC:
        return flags_of(flags, method, f"{TRAIN} {more}")
    adapter = [*flags, *f"{ADAPTER} {TRAIN} {SHORT}".split()]
    main.main(adapter)
    return flags_of(flags, method, f"--load-lora-path {run_folder(adapter)} {more}")


def predictions(flags: list[str]) -> torch.Tensor:
    return load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]


# --- where ----------------------------------------------------------------------------------------


def check_placed(flags: list[str], method: str, more: str, monkeypatch) -> None:
    """A run on the pretended GPU comes to its end, and to what it comes to on the CPU.

    Random numbers are the CPU's in both; sums are in another order, as attention and the optimizers
    take other ways where they see a GPU.
    """
    here = start([*flags, "--log-path", "here"], method, more)
    main.main(here)
    there = start([*flags, "--log-path", "there"], method, more)
    with pretended_gpu(monkeypatch):
        main.main(there)
    # draws that a settled row does not have are NaN
    both = predictions(there), predictions(here)
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m for m in WRAPPERS if m not in SAME])
def test_a_run_on_a_gpu_gives_what_it_gives_on_the_cpu(method, kind, request, monkeypatch):
    check_placed(request.getfixturevalue(kind), method, METHODS.get(method, ""), monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_draw_and_train_do_so_too(way, causal_flags, monkeypatch):
    check_placed(causal_flags, way.partition(":")[0], WAYS[way], monkeypatch)


LEFT_BEHIND = """
import torch
from modelwrappers.map import MAP

class Left(MAP):
    def forward_logits(self, batch, sample=True, n_samples=1, **kwargs):
        logits = super().forward_logits(batch, sample, n_samples)
        return logits + torch.zeros(logits.shape[-1])
"""


def test_a_method_that_leaves_a_tensor_on_the_cpu_is_found_out(causal_flags, tmp_path, monkeypatch):
    (tmp_path / "left.py").write_text(LEFT_BEHIND)
    flags = flags_of(causal_flags, f"{tmp_path / 'left.py'}:Left", TRAIN)
    main.main([*flags, "--log-path", "here"])
    with (
        pretended_gpu(monkeypatch),
        pytest.raises(RuntimeError, match=r"add\.Tensor got one of shape \(5,\) on the CPU"),
    ):
        main.main([*flags, "--log-path", "there"])


def test_the_pretended_gpu_takes_and_refuses_what_cuda_does(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu, torch.no_grad():
        table, here = torch.arange(6.0, device=gpu).view(3, 2), torch.tensor([2, 0])
        assert table.device == GPU and (table + torch.tensor(1.0)).device == GPU
        assert table[here].tolist() == table[[2, 0]].tolist() == [[4, 5], [0, 1]]
        table[[1]] = torch.zeros(1, 2, device=gpu)
        assert table.sum().item() == 10 and table.cpu().device.type == "cpu"
        assert torch.where(table > 3, 1.0, -torch.inf).max().item() == 1
        for mixed in (
            lambda: table + torch.ones(2),
            lambda: torch.cat([table, torch.ones(1, 2)]),
            lambda: torch.nn.functional.embedding(here, table),
            lambda: torch.zeros(6)[torch.tensor([1], device=gpu)],
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            table.numpy()
