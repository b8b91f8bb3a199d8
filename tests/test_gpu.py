"""The CUDA paths, on a tiny model (pytest -m gpu)."""

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import kill_and_resume, run_folder
from safetensors.torch import load_file
from test_methods import LEARNED
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import main
from modelwrappers.blob import BLoB
from modelwrappers.lora.exact_4bit import use_exact_4bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh_process_state():
    """accelerate keeps the first device of a process, and a test before may have used the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu_flags(causal_flags) -> list[str]:
    assert causal_flags[-2:] == ["--device", "cpu"]
    return [*causal_flags[:-2], "--device", "cuda"]


def stored_predictions(flags: list[str]) -> torch.Tensor:
    return load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("method", ["map", "mcdropout", "deepensemble", "blob", "laplace"])
def test_every_method_trains_and_predicts_on_the_gpu(gpu_flags, method, quantization):
    flags = [*gpu_flags, "--modelwrapper", method, "--max-train-steps", "30"]
    metrics = main.main([*flags, "--quantization", quantization, "--checkpoint"])
    assert metrics.nll < LEARNED[method]
    assert (run_folder(flags) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_tfb_is_fitted_to_a_trained_adapter_on_the_gpu(gpu_flags, quantization):
    flags = [*gpu_flags, "--quantization", quantization]
    first = [*flags, "--modelwrapper", "map", "--max-train-steps", "30", "--checkpoint"]
    trained = main.main(first)
    flags += ["--modelwrapper", "tfb", "--load-lora-path", str(run_folder(first)), "--th", "0.1"]
    assert main.main(flags).nll == pytest.approx(trained.nll, rel=0.3)


@pytest.mark.parametrize("method", ["blob", "laplace"])
def test_a_stored_posterior_predicts_on_the_gpu(gpu_flags, method):
    flags = [*gpu_flags, "--modelwrapper", method, "--dtype", "float32"]
    first = [*flags, "--max-train-steps", "30", "--apply-classhead-lora", "--checkpoint"]
    main.main(first)
    again = [*flags, "--load-lora-path", str(run_folder(first)), "--log-path", "again"]
    main.main(again)
    torch.testing.assert_close(
        stored_predictions(again), stored_predictions(first), rtol=1e-3, atol=1e-3
    )


def test_a_killed_run_resumes_with_the_gpus_noise_where_it_was(gpu_flags, monkeypatch):
    flags = [*gpu_flags, "--modelwrapper", "blob", "--checkpoint", "--dtype", "float32"]
    flags += ["--max-train-steps", "9", "--save-per-steps", "2"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)
    kill_and_resume(cut, BLoB, lambda wrapper: wrapper.step == 5, monkeypatch)
    a, b = (load_file(run_folder(f) / "adapter_model.safetensors") for f in (whole, cut))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_4bit_layers_that_the_cpu_has_used_compute_the_same_on_the_gpu(tiny_llama):
    """What keeps them off the CPU's fused kernel means nothing here."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    use_exact_4bit(model)
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        on_cpu = model(input_ids=ids).logits
        on_gpu = model.to("cuda")(input_ids=ids.to("cuda")).logits.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)
