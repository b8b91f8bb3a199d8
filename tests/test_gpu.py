"""The CUDA paths, on a tiny model (pytest -m gpu)."""

import pytest
import torch
from conftest import kill_and_resume, run_folder
from safetensors.torch import load_file

import main
from modelwrappers.blob import BLoB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("method", ["map", "mcdropout", "deepensemble", "blob", "laplace"])
def test_every_method_trains_and_predicts_on_the_gpu(causal_flags, method, quantization):
    flags = [*causal_flags[:-2], "--device", "cuda", "--modelwrapper", method, "--n-epochs", "4"]
    metrics = main.main([*flags, "--quantization", quantization, "--checkpoint"])
    assert metrics.nll < 2
    assert (run_folder(flags) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["blob", "laplace"])
def test_a_stored_posterior_predicts_on_the_gpu(causal_flags, method):
    flags = [*causal_flags[:-2], "--device", "cuda", "--modelwrapper", method, "--n-epochs", "2"]
    main.main([*flags, "--apply-classhead-lora", "--checkpoint"])
    again = ["--modelwrapper", method, "--load-lora-path", str(run_folder(flags)), "--nowand"]
    metrics = main.main([*again, "--log-path", "again", "--device", "cuda"])
    assert metrics.nll < 2


def test_a_killed_run_resumes_with_the_gpus_noise_where_it_was(causal_flags, monkeypatch):
    flags = [*causal_flags[:-2], "--device", "cuda", "--modelwrapper", "blob", "--checkpoint"]
    flags += ["--max-train-steps", "9", "--save-per-steps", "2", "--dtype", "float32"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)
    kill_and_resume(cut, BLoB, lambda wrapper: wrapper.step == 5, monkeypatch)
    a, b = (load_file(run_folder(f) / "adapter_model.safetensors") for f in (whole, cut))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
