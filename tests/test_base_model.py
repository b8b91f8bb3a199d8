"""A base model's files may be damaged or hostile: one line, no code, no memory, no question."""

import builtins
import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import main
from dataset.base import load_tokenizer
from modelwrappers import backbone
from utils.base_model import load_config, num_positions
from utils.errors import RunError, UsageError

LOADS = SimpleNamespace(load_model_path=None, use_slow_tokenizer=False, trust_remote_code=False)


@pytest.fixture(autouse=True)
def never_asks(monkeypatch):
    def asked(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def encoder(tiny_bert, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "encoder"))


def change(folder: Path, file: str = "config.json", **entries) -> None:
    content = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps(content))


def load(model, *flags: str):
    kind = "bertds" if "encoder" in str(model) else "mcdataset"
    argv = ["--dataset-type", kind, "--dataset", "bbc_headlines", "--model", str(model)]
    args = main.parse_args([*argv, "--modelwrapper", "mle", "--device", "cpu", *flags])
    load_tokenizer(args)
    loaded = backbone.load_model(args, 5, torch.device("cpu"))
    return loaded, backbone.lora_config(args, loaded)


def refused(model, words: str, *flags: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(model, *flags)
    assert len(str(caught.value)) < 1500 and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:attention"},
        {"_attn_implementation_internal": None, "attn_implementation": {"": "someone/kernel"}},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": "paged|someone/kernel"},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"layers_config": [{"x": {"attn_implementation": "someone/kernel"}}]},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_a_config_takes_no_code_from_the_hub(folder, entries):
    change(folder, **entries)
    refused(folder, r"config.json has '\w+': .*code from the hub.*--trust-remote-code")


def test_flash_attention_without_its_package_names_the_package(folder):
    change(folder, attn_implementation="flash_attention_2")
    refused(folder, "the package flash-attn is not installed")


def test_a_skip_list_of_a_config_holds_names_and_no_expressions(folder):
    """transformers would match it by `re`, where this one takes for ever."""
    skipped = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    hostile = skipped | {"llm_int8_skip_modules": [r"((\w|\.)+)+!"]}
    change(folder, quantization_config=hostile)
    refused(folder, "llm_int8_skip_modules.*no name of a layer")


def test_implementations_of_torch_stay_allowed(folder):
    change(folder, attn_implementation="eager")
    assert load(folder)[0].config._attn_implementation == "eager"


def test_quantised_formats_whose_kernels_come_from_the_hub_are_refused(folder):
    change(folder, quantization_config={"quant_method": "eetq"})
    refused(folder, "quantised with 'eetq', whose code may come from the hub")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_auto_map_runs_no_code_and_asks_nothing(folder, tmp_path, file):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto_map = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
    change(folder, file, auto_map=auto_map)
    for model_type in ("llama", "evil"):
        change(folder, model_type=model_type)
        with contextlib.suppress(UsageError):
            load(folder)
        assert not ran.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        '"text"',
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}",
        '{"model_type": 5}',
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "num_hidden_layers": -1}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_config_is_one_message(folder, content):
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(content)
    refused(folder, "--model")


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": 10**9},
        {"hidden_size": 10**6, "intermediate_size": 10**6},
        {"vocab_size": 10**9},
        {"vocab_size": -1},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e9},
        {"num_labels": 10**12},
        {"max_position_embeddings": 10**30},
        {"num_attention_heads": 0},
    ],
)
@pytest.mark.parametrize("kind", ["folder", "encoder"])
def test_sizes_that_no_model_has_take_no_memory(request, kind, entries):
    model = request.getfixturevalue(kind)
    change(model, **entries)
    refused(model, "--model")


def test_a_file_is_no_model(folder):
    refused(folder / "config.json", "is no folder")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "a/b/c", "../nothing"])
def test_names_that_no_model_can_have_are_one_message(name):
    with pytest.raises(UsageError, match="--model"):
        load_config(name, False)


def test_a_folder_without_config_says_what_it_holds(folder):
    (folder / "config.json").unlink()
    refused(folder, "there is no config.json")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    refused(folder, "holds an adapter, not a model; pass it as --load-lora-path")


def test_nothing_is_unpickled(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    refused(folder, r"pytorch_model.bin.*nothing is unpickled.*save_pretrained")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json"])
def test_damaged_weights_are_one_message(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "cannot be loaded|parameters")


def test_an_encoder_without_some_of_its_weights_is_refused(encoder):
    """Else they would be taken for a new head, and trained from nothing."""
    tensors = load_file(encoder / "model.safetensors")
    lost = next(key for key in tensors if "layer.1.attention.self.query.weight" in key)
    tensors.pop(lost)
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    refused(encoder, r"no weights for bert.encoder.layer.1.attention.self.query .*encoder")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_message(folder, content):
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "no tokenizer can be loaded")


@pytest.mark.parametrize("most", ["long", -1, 0, [1]])
def test_a_tokenizer_without_a_sensible_limit_is_refused(folder, most):
    change(folder, "tokenizer_config.json", model_max_length=most)
    refused(folder, "model_max_length|no tokenizer")


def test_positions_of_models_that_count_from_the_padding_token(tiny_roberta, tiny_bert):
    assert num_positions(AutoConfig.from_pretrained(tiny_roberta)) == 96 - 1
    assert num_positions(AutoConfig.from_pretrained(tiny_bert)) == 96


@pytest.mark.parametrize(
    "target",
    ["", "model", "layers", "self_attn", "input_layernorm", "rotary_emb", "q_.*", ".", "*"],
)
def test_target_modules_that_are_no_layers_are_refused_with_those_that_are(tiny_llama, target):
    words = "--target-modules: .*linear layers are: down_proj, gate_proj"
    refused(tiny_llama, words, "--target-modules", target)
    refused(tiny_llama, words, "--target-modules", "q_proj", target)


def test_layer_norms_and_blocks_of_an_encoder_are_no_targets(encoder):
    for target in ("LayerNorm", "attention", "encoder", "output"):
        refused(encoder, "on which LoRA cannot go", "--target-modules", target)


def test_embeddings_whole_names_and_repetitions_are_targets(tiny_llama):
    targets = ["embed_tokens", "model.layers.0.self_attn.q_proj", "v_proj", "v_proj"]
    _, config = load(tiny_llama, "--target-modules", *targets)
    assert sorted(config.target_modules) == sorted(set(targets))


def test_a_tokenizer_of_another_model_is_found_out(folder, data_dir):
    """Its tokens would be looked up beyond the end of the embedding."""
    change(folder, vocab_size=100)
    tensors = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", str(folder)]
    flags += ["--modelwrapper", "mle", "--data-dir", data_dir, "--device", "cpu", "--nowand"]
    with pytest.raises(UsageError, match=r"the model knows 100 \(vocab_size\)"):
        build([*flags, "--output-dir", str(folder.parent / "out")])


def test_a_padding_token_that_the_model_lacks_is_not_used(encoder, data_dir):
    """As where somebody added one to the tokenizer, and nothing to the model."""
    size = json.loads((encoder / "config.json").read_text())["vocab_size"]
    tokenizer = load_tokenizer(SimpleNamespace(**vars(LOADS), model=str(encoder)))
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == size
    tokenizer.save_pretrained(encoder)
    flags = ["--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", str(encoder)]
    flags += ["--modelwrapper", "mle", "--data-dir", data_dir, "--device", "cpu", "--nowand"]
    _, dataset, wrapper = build([*flags, "--output-dir", str(encoder.parent / "out")])
    assert dataset.pad_token_id < size
    assert len(wrapper.predict(dataset.test_dataloader).labels) == 37


# --- rows that a user's own loader pads ----------------------------------------------------------


def test_rows_padded_on_the_right_are_read_at_their_last_token(causal_flags):
    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle"])
    loader = dataset.test_dataloader
    expected = wrapper.predict(loader)

    def on_the_right(batch):
        width = batch["input_ids"].shape[1]
        before = width - batch["attention_mask"].sum(1, keepdim=True)
        order = (torch.arange(width) + before) % width
        moved = {key: batch[key].gather(1, order) for key in ("input_ids", "attention_mask")}
        assert (moved["attention_mask"].diff(dim=1) <= 0).all()
        return batch | moved

    found = wrapper.predict([on_the_right(batch) for batch in loader])
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    batch = next(iter(loader))
    inputs = wrapper.model_inputs(on_the_right(batch))
    assert torch.equal(inputs["position_ids"], wrapper.model_inputs(batch)["position_ids"])


def test_rows_padded_on_both_sides_are_read_at_their_last_token(causal_flags):
    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle"])
    batch = next(iter(dataset.test_dataloader))
    pad = torch.nn.functional.pad
    wide = batch | {key: pad(batch[key], (2, 3)) for key in ("input_ids", "attention_mask")}
    expected = wrapper.forward_logits(wrapper.model_inputs(batch))
    torch.testing.assert_close(wrapper.forward_logits(wrapper.model_inputs(wide)), expected)


def test_a_row_of_padding_only_is_an_error(causal_flags):
    _, dataset, wrapper = build([*causal_flags, "--modelwrapper", "mle"])
    batch = next(iter(dataset.test_dataloader))
    batch["attention_mask"][1] = 0
    with pytest.raises(RunError, match="padding only"):
        wrapper.predict([batch])
