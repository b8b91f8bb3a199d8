"""The branch: what lies before the first noisy module runs once for all draws."""

import pytest
import torch
from conftest import build
from test_backbone import CAUSAL, ENCODERS, SMALL, make
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import main
from modelwrappers import build_wrapper
from modelwrappers.lora.blocks import find_blocks

FALCON = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# architectures beside those of test_backbone, whose blocks get other arguments
MORE_CAUSAL = {
    "gemma3_text": SMALL | {"sliding_window": 32},
    "phi": SMALL,
    "phi3": SMALL | {"original_max_position_embeddings": 64},
    "smollm3": SMALL | {"no_rope_layers": [1, 1, 1, 0]},
    "olmo": SMALL,
    "olmo2": SMALL,
    "granite": SMALL,
    "cohere": SMALL,
    "stablelm": SMALL,
    "gpt_neox": SMALL,
    "falcon": FALCON | {"alibi": True},
    "bloom": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
MORE_ENCODERS = {
    "xlm-roberta": SMALL,
    "electra": SMALL | {"embedding_size": 32},
    "modernbert": SMALL | {"global_attn_every_n_layers": 2, "sep_token_id": 1, "cls_token_id": 2},
}
CAUSAL_SETTINGS = {name: case[0] for name, case in CAUSAL.items()} | MORE_CAUSAL
ENCODER_SETTINGS = {name: case[0] for name, case in ENCODERS.items()} | MORE_ENCODERS
STACKED = {"deberta", "deberta-v2"}  # their positions have no row per example


def deep(settings: dict) -> dict:
    """The same with four blocks instead of two."""
    named = ("num_hidden_layers", "n_layer", "n_layers")
    return settings | {key: 4 for key in named if key in settings}


def wrapper_on(folder: str, kind: str, *flags: str):
    """A BLoB wrapper with noise in the last two of four blocks, far from its mean."""
    data = {"causallm": "mcdataset", "seqcls": "bertds"}[kind]
    args = main.parse_args(
        [
            *f"--dataset-type {data} --dataset bbc_headlines --modelwrapper blob".split(),
            *("--model", folder, "--bayes-eps", "0.7", "--lora-layers", "last:2", *flags),
        ]
    )
    accelerator = main.build_accelerator(args)
    wrapper = build_wrapper(args, 5, accelerator).eval()
    if wrapper.is_causal:
        wrapper.target_ids = torch.tensor([10, 11, 12, 13, 14])
    for name, parameter in wrapper.trainable_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapper


def batch_for(wrapper) -> dict[str, torch.Tensor]:
    """Five rows of different lengths, padded where the model wants it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (5, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 2, 0, 7)):
        place = slice(0, padding) if wrapper.is_causal else slice(12 - padding, 12)
        mask[row, place] = 0
    return wrapper.model_inputs({"input_ids": ids, "attention_mask": mask})


def draws_of(wrapper, batch, n_samples: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        torch.manual_seed(5)
        return wrapper.forward_logits(batch, n_samples=n_samples)


@pytest.mark.parametrize("model_type", [*CAUSAL_SETTINGS, *ENCODER_SETTINGS])
def test_branched_logits_equal_those_of_stacked_inputs(model_type, tmp_path):
    is_causal = model_type in CAUSAL_SETTINGS
    settings = (CAUSAL_SETTINGS if is_causal else ENCODER_SETTINGS)[model_type]
    auto = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    folder = make(model_type, deep(settings), tmp_path, auto)
    wrapper = wrapper_on(folder, "causallm" if is_causal else "seqcls", "--flipout", "none")
    batch = batch_for(wrapper)
    branched = draws_of(wrapper, batch)
    assert (branch_of(wrapper, batch) is None) == (model_type in STACKED)
    calls = calls_of_blocks(wrapper, batch)
    if model_type not in STACKED:
        assert calls == [5, 5, 15, 15]
    never_branch(wrapper)
    stacked = draws_of(wrapper, batch)
    torch.testing.assert_close(branched, stacked, rtol=1e-4, atol=1e-5)
    assert branched.std(1).max() > 1e-3


def branch_of(wrapper, batch):
    return wrapper.branch_of(batch, 3)


def never_branch(wrapper) -> None:
    """Let inputs be stacked from here on."""
    wrapper.__dict__["branch_of"] = lambda batch, copies: None


def calls_of_blocks(wrapper, batch) -> list[int]:
    """The rows that each block works on, for three draws."""
    rows: list[int] = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: rows.append(len(_first(output))))
        for block in find_blocks(wrapper.get_base_model()).modules
    ]
    draws_of(wrapper, batch)
    for handle in handles:
        handle.remove()
    return rows


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
@pytest.mark.parametrize(
    "method", [["mcdropout"], ["deepensemble", "--ensemble-n", "3"]], ids=lambda flags: flags[0]
)
def test_masks_and_members_branch_where_the_adapters_begin(method, kind, request):
    flags = [*request.getfixturevalue(kind), "--modelwrapper", *method, "--max-train-steps", "3"]
    _, dataset, wrapper = build([*flags, "--lora-layers", "last:1"])
    wrapper.fit(dataset.train_dataloader)
    batch = wrapper.eval().model_inputs(next(iter(dataset.test_dataloader)))
    rows = len(batch["input_ids"])
    branched = draws_of(wrapper, batch)
    calls = calls_of_blocks(wrapper, batch)
    assert sum(calls[0::2]) == rows and sum(calls[1::2]) == 3 * rows
    never_branch(wrapper)
    size = wrapper.args.eval_batch_size // 3  # the same chunks, or masks would be others
    parts = [
        {key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)
    ]
    with torch.inference_mode():
        torch.manual_seed(5)
        stacked = torch.cat([wrapper.forward_logits(part, n_samples=3) for part in parts])
    torch.testing.assert_close(branched, stacked, rtol=1e-4, atol=1e-5)
    assert branched.std(1).max() > 1e-3


def test_a_decoder_that_counts_its_input_rows_is_stacked(tmp_path):
    """Its classification head picks a position for each row of the inputs."""
    folder = make("llama", deep(SMALL), tmp_path, AutoModelForSequenceClassification)
    wrapper = wrapper_on(folder, "seqcls")
    draws = draws_of(wrapper, batch_for(wrapper))
    assert (
        branch_of(wrapper, batch_for(wrapper)) is None
        and draws.shape == (5, 3, 5)
        and draws.std(1).max() > 1e-3
    )


def test_noise_in_the_head_alone_is_branched_behind_all_blocks(tiny_llama):
    wrapper = wrapper_on(
        tiny_llama, "causallm", "--lora-layers", "all", "--target-modules", "lm_head"
    )
    batch = batch_for(wrapper)
    draws = draws_of(wrapper, batch)
    assert calls_of_blocks(wrapper, batch) == [5, 5]
    never_branch(wrapper)
    torch.testing.assert_close(draws, draws_of(wrapper, batch), rtol=1e-4, atol=1e-5)


def test_a_method_that_does_not_say_where_its_noise_is_gets_stacked_inputs(tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--lora-layers", "last:1")
    wrapper.noisy_modules = lambda: None
    batch = batch_for(wrapper)
    assert calls_of_blocks(wrapper, batch) == [15, 15]


def test_the_branch_leaves_no_hooks_and_draws_no_random_numbers(tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--lora-layers", "last:1")
    batch = batch_for(wrapper)
    draws = [draws_of(wrapper, batch) for _ in range(2)]  # the first one looks for the branch
    assert torch.equal(*draws)
    assert not any(module._forward_pre_hooks for module in wrapper.modules())


def test_another_adapter_branches_where_its_own_noise_begins(causal_flags):
    from peft import LoraConfig

    flags = [*causal_flags, "--modelwrapper", "mcdropout", "--lora-layers", "last:1"]
    _, dataset, wrapper = build([*flags, "--max-train-steps", "1"])
    batch = wrapper.eval().model_inputs(next(iter(dataset.test_dataloader)))
    draws_of(wrapper, batch)
    assert sum(calls_of_blocks(wrapper, batch)[0::2]) == len(batch["input_ids"])
    targets = ["q_proj", "v_proj"]
    wrapper.add_adapter("two", LoraConfig(target_modules=targets, lora_dropout=0.3))
    wrapper.set_adapter("two")
    draws_of(wrapper, batch)  # looks for the branch
    assert sum(calls_of_blocks(wrapper, batch)[0::2]) == 3 * len(batch["input_ids"])


def test_inputs_with_and_without_a_mask_have_a_branch_each(tiny_bert):
    wrapper = wrapper_on(tiny_bert, "seqcls", "--lora-layers", "last:1")
    batch = batch_for(wrapper)
    batch["input_ids"] %= wrapper.base_model.config.vocab_size
    bare = {"input_ids": batch["input_ids"]}
    assert draws_of(wrapper, bare).shape == draws_of(wrapper, batch).shape
    branched = draws_of(wrapper, batch)
    never_branch(wrapper)
    torch.testing.assert_close(branched, draws_of(wrapper, batch), rtol=1e-4, atol=1e-5)
