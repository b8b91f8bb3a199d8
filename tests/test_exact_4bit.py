"""4-bit layers on the CPU: the same numbers with and without AVX512-BF16, no kernel from the hub.

Most machines lack AVX512-BF16, and the fused kernel with it: bitsandbytes is made to believe that
it is there, and repacking the weights for the kernel is what must not happen.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, run_folder
from peft import LoraConfig
from test_methods import FLAGS, KINDS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import main
from modelwrappers import load_posterior
from modelwrappers.lora.exact_4bit import SWITCH, use_exact_4bit
from modelwrappers.map import MAP
from utils.errors import UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cpu(monkeypatch):
    """Set whether bitsandbytes believes that this CPU has AVX512-BF16; repacking is an error."""
    from bitsandbytes.nn import modules

    def repack(*args, **kwargs):
        raise AssertionError("a 4-bit layer was repacked for the fused kernel")

    def believe(has_it: bool) -> None:
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: has_it)

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    return believe


def four_bit_layers(model) -> list:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, SWITCH)]


def load_4bit(folder: str):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )


IDS = torch.arange(24).view(2, 12)


def test_a_layer_that_nobody_protects_is_repacked(cpu, tiny_llama):
    """That bitsandbytes still does what the others guard against; else they could not fail."""
    cpu(True)
    stock = load_4bit(tiny_llama).eval()
    with torch.no_grad(), pytest.raises(AssertionError, match="repacked"):
        stock(input_ids=IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FLAGS)
def test_every_method_gives_the_same_with_the_switch_on_and_off(cpu, method, kind, request):
    flags = [*request.getfixturevalue(kind), "--modelwrapper", method, *FLAGS[method]]
    flags += ["--quantization", "4bit", "--max-train-steps", "2"]
    log_probs = {}
    for has_it in (True, False):
        cpu(has_it)
        _, _, wrapper = build([*flags, "--log-path", f"bf16-{has_it}"])
        assert four_bit_layers(wrapper)
        wrapper.fit_evaluate()
        log_probs[has_it] = wrapper.predictions.log_probs
    assert torch.equal(log_probs[True], log_probs[False])


def test_tfb_on_an_adapter_gives_the_same_with_the_switch_on_and_off(cpu, causal_flags):
    flags = [*causal_flags, "--quantization", "4bit"]
    first = [*flags, "--modelwrapper", "map", "--max-train-steps", "10", "--checkpoint"]
    main.main(first)
    flags += ["--modelwrapper", "tfb", "--load-lora-path", str(run_folder(first)), "--th", "0.5"]
    log_probs = {}
    for has_it in (True, False):
        cpu(has_it)
        _, _, wrapper = build([*flags, "--log-path", f"bf16-{has_it}"])
        wrapper.fit_evaluate()
        log_probs[has_it] = wrapper.predictions.log_probs
    assert torch.equal(log_probs[True], log_probs[False])


def test_the_switch_stays_off_whatever_is_done_to_the_model(cpu, causal_flags):
    cpu(True)
    flags = [*causal_flags, "--modelwrapper", "mle", "--quantization", "4bit"]
    flags += ["--max-train-steps", "2", "--checkpoint"]
    _, dataset, wrapper = build(flags)
    wrapper.fit_evaluate()
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))

    def logits(of):
        assert four_bit_layers(of) and not any(getattr(m, SWITCH) for m in four_bit_layers(of))
        with torch.inference_mode():
            return of(**batch).logits

    expected = logits(wrapper.eval())
    assert torch.equal(logits(wrapper.to("cpu").eval()), expected)
    assert torch.equal(logits(copy.deepcopy(wrapper.base_model)), expected)
    assert torch.equal(logits(load_posterior(run_folder(flags), device="cpu")), expected)
    wrapper.train()
    assert torch.equal(logits(wrapper.eval()), expected), "training in between"
    wrapper.merge_adapter()  # quantises the sum anew: its numbers differ, but it must compute
    assert logits(wrapper).isfinite().all()
    wrapper.unmerge_adapter()
    assert logits(wrapper.merge_and_unload().eval()).isfinite().all()


def test_a_model_that_the_user_has_loaded_is_protected_too(cpu, causal_flags, tiny_llama):
    cpu(True)
    args = main.parse_args([*causal_flags, "--modelwrapper", "map"])
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapper = MAP(load_4bit(tiny_llama), config, args, main.build_accelerator(args)).eval()
    with torch.no_grad():
        on = wrapper(input_ids=IDS).logits
    cpu(False)
    wrapper = MAP(load_4bit(tiny_llama), config, args, main.build_accelerator(args)).eval()
    with torch.no_grad():
        assert torch.equal(on, wrapper(input_ids=IDS).logits)


def test_a_model_that_was_repacked_before_is_refused(tiny_llama):
    model = load_4bit(tiny_llama)
    four_bit_layers(model)[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UsageError, match=r"layers\.0\..*load the model again"):
        use_exact_4bit(model)


def test_layers_of_a_version_without_the_switch_are_left_alone(tiny_llama):
    model = load_4bit(tiny_llama)
    for layer in four_bit_layers(model):
        delattr(layer, SWITCH)
    use_exact_4bit(model)
    assert not four_bit_layers(model)


# An interpreter on a CPU with AVX512-BF16 whose `kernels` is installed but offline.
SITECUSTOMIZE = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
KERNELS = "def get_kernel(*args, **kwargs):\n    raise OSError('it would be downloaded')\n"


def run_on_such_a_cpu(folder: Path, *command: str) -> subprocess.CompletedProcess:
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (folder / "kernels.py").write_text(KERNELS)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_nothing_is_downloaded_and_no_kernel_is_missed_by_a_run(tmp_path, causal_flags):
    """A program of its own, in which bitsandbytes waits until it is looked into."""
    stock = run_on_such_a_cpu(tmp_path, "-c", "import bitsandbytes")
    assert "it would be downloaded" in stock.stderr, "the CPU is simulated"
    flags = [*causal_flags, "--modelwrapper", "mle", "--quantization", "4bit", "--limit-eval", "4"]
    done = run_on_such_a_cpu(tmp_path, str(ROOT / "main.py"), *flags, "--max-train-steps", "1")
    assert done.returncode == 0, done.stderr
    assert "ACC" in done.stdout and "kernel" not in done.stdout + done.stderr
    assert "it would be downloaded" not in done.stderr


@pytest.mark.slow
def test_other_messages_of_bitsandbytes_are_still_heard(tmp_path):
    script = (
        "import logging, modelwrappers, bitsandbytes\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('something else')\n"
        "from bitsandbytes import functional\n"
        "assert functional.dequantize_4bit and not functional.has_avx512bf16()\n"
    )
    done = run_on_such_a_cpu(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "something else\n"
