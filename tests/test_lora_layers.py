"""--lora-layers: adapters on some of a model's blocks."""

import json

import pytest
import torch
from conftest import build, run_folder
from peft import PeftModel
from test_backbone import CAUSAL, ENCODERS, build_model, make
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import main
from modelwrappers.lora.blocks import chosen_blocks, find_blocks, shown_blocks
from utils.errors import UsageError


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last:2", [4, 5]),
        ("last:6", [0, 1, 2, 3, 4, 5]),
        ("3", [3]),
        ("0,2-4", [0, 2, 3, 4]),
        ("5,0,5", [0, 5]),
    ],
)
def test_blocks_are_chosen_by_last_by_number_and_by_range(text, numbers):
    assert chosen_blocks(text, 6) == numbers
    assert chosen_blocks(shown_blocks(numbers), 6) == numbers


@pytest.mark.parametrize("text", ["last:7", "6", "0-6", "2,9"])
def test_blocks_beyond_the_models_depth_are_refused(text):
    with pytest.raises(UsageError, match=rf"--lora-layers {text}: the model has 6 blocks, 0 to 5"):
        chosen_blocks(text, 6)


@pytest.mark.parametrize("text", ["last", "last:0", "first:2", "-1", "1-", "3-2", "1;2", "", "1.5"])
def test_what_names_no_blocks_is_refused_where_it_is_read(text):
    flags = "--dataset-type mcdataset --dataset bbc_headlines --model m --modelwrapper mle"
    with pytest.raises(UsageError, match="--lora-layers"):
        main.parse_args([*flags.split(), f"--lora-layers={text}"])


@pytest.mark.parametrize("model_type", [*CAUSAL, *ENCODERS])
def test_only_the_last_block_of_every_family_is_adapted(model_type, tmp_path):
    is_causal = model_type in CAUSAL
    settings = (CAUSAL if is_causal else ENCODERS)[model_type][0]
    auto = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    folder = make(model_type, settings, tmp_path, auto)
    kind = "causallm" if is_causal else "seqcls"
    flags = ("--lora-layers", "last:1", "--apply-classhead-lora")
    model, config = build_model(folder, kind, *flags)
    blocks = find_blocks(model)
    adapted = _adapted(PeftModel(model, config))
    everywhere = _adapted(PeftModel(*build_model(folder, kind, "--apply-classhead-lora")))
    first = f"base_model.model.{blocks.name}.0."
    assert adapted == {name for name in everywhere if not name.startswith(first)}
    assert any(f".{blocks.pattern}.1." in name for name in adapted)


def _adapted(model) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith(".lora_A.default")}


def test_a_layer_that_lies_in_no_chosen_block_is_said(tiny_llama):
    flags = ("--target-modules", "lm_head", "--lora-layers", "last:1")
    with pytest.raises(UsageError, match=r"no layer to adapt \(lm_head\) lies in block 1"):
        build_model(tiny_llama, "causallm", *flags)


def test_training_stops_its_backward_at_the_first_adapted_block(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--lora-layers", "last:1"]
    _, dataset, wrapper = build([*flags, "--max-train-steps", "1"])
    needs_gradient = []
    blocks = find_blocks(wrapper.get_base_model()).modules
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: needs_gradient.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    wrapper.fit(dataset.train_dataloader)
    assert needs_gradient == [False, True]


def test_an_adapter_knows_its_blocks(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--max-train-steps", "2"]
    trained = main.main([*flags, "--lora-layers", "last:1"])
    folder = run_folder(flags)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1] and config["layers_pattern"] == ["layers"]
    load = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)]
    for more in ([], ["--lora-layers", "1"]):
        assert main.main([*load, "--log-path", f"again{len(more)}", *more]) == trained
    for other in ("last:2", "0", "all"):
        with pytest.raises(UsageError, match=r"--lora-layers .* has layers in the blocks 1;"):
            main.main([*load, "--log-path", "other", "--lora-layers", other])


def test_adapters_in_the_last_block_leave_the_first_as_it_was(causal_flags):
    _, _, wrapper = build([*causal_flags, "--modelwrapper", "mle", "--lora-layers", "last:1"])
    ids = torch.randint(3, 100, (2, 5))
    with torch.inference_mode(), wrapper.disable_adapter():
        base = wrapper.base_model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    with torch.inference_mode():
        ours = wrapper.base_model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(base, ours)


def test_the_backwards_of_laplace_stop_at_the_first_adapted_block(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "laplace", "--lora-layers", "last:1"]
    _, dataset, wrapper = build([*flags, "--max-train-steps", "2"])
    wrapper.fit(dataset.train_dataloader)
    reached = []
    for block in find_blocks(wrapper.get_base_model()).modules:
        block.register_forward_hook(
            lambda module, inputs, output: reached.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    wrapper.fit_posterior()
    wrapper.predict(dataset.test_dataloader)
    assert reached and reached[0::2] == [False] * (len(reached) // 2)
    assert reached[1::2] == [True] * (len(reached) // 2)
