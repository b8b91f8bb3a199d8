"""Target modules of every family, heads, adapters on disk, and what stock PEFT makes of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import build, run_folder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import main
from modelwrappers import BLoB, backbone
from utils.errors import UsageError

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}
DISTILBERT = {"vocab_size": 50, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}

CAUSAL = {
    "llama": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "mistral": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "qwen2": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "qwen3": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "gemma": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "gemma2": (SMALL, {"q_proj", "v_proj"}, "k_proj"),
    "opt": (OPT, {"q_proj", "v_proj"}, "k_proj"),
    "gpt2": (GPT2, {"c_attn"}, "c_attn"),
}
ENCODERS = {
    "bert": (SMALL, {"query", "value"}, {"pooler", "classifier"}),
    "roberta": (SMALL, {"query", "value"}, {"classifier"}),
    "distilbert": (DISTILBERT, {"q_lin", "v_lin"}, {"pre_classifier", "classifier"}),
    "deberta": (SMALL, {"in_proj"}, {"pooler", "classifier"}),
    "deberta-v2": (SMALL, {"query_proj", "value_proj"}, {"pooler", "classifier"}),
}


def make(model_type: str, settings: dict, folder: Path, auto) -> str:
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return str(folder)


def build_model(model: str, kind: str, *flags: str):
    dataset_type = {"causallm": "mcdataset", "seqcls": "bertds"}[kind]
    args = main.parse_args(
        [
            *f"--dataset-type {dataset_type} --dataset bbc_headlines --modelwrapper mle".split(),
            *("--model", model),
            *flags,
        ]
    )
    loaded = backbone.load_model(args, 5, torch.device("cpu"))
    return loaded, backbone.lora_config(args, loaded)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_targets(model_type, tmp_path):
    settings, targets, key = CAUSAL[model_type]
    folder = make(model_type, settings, tmp_path, AutoModelForCausalLM)
    assert set(build_model(folder, "causallm")[1].target_modules) == targets
    _, config = build_model(folder, "causallm", "--apply-classhead-lora")
    assert set(config.target_modules) == targets | {"lm_head"}
    model, config = build_model(folder, "causallm", "--apply-qkv-head-lora")
    assert set(config.target_modules) == targets | {key, "lm_head"}
    PeftModel(model, config)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoder_targets_and_heads(model_type, tmp_path):
    settings, targets, head = ENCODERS[model_type]
    folder = make(model_type, settings, tmp_path, AutoModelForSequenceClassification)
    model, config = build_model(folder, "seqcls")
    assert set(config.target_modules) == targets and set(config.modules_to_save) == head
    wrapped = PeftModel(model, config)
    output = wrapped(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert output.logits.shape == (1, 5)
    _, config = build_model(folder, "seqcls", "--apply-classhead-lora")
    assert config.modules_to_save is None
    assert {name.split(".")[0] for name in set(config.target_modules) - targets} >= head - {
        "pooler"
    }


def test_unknown_architecture_names_target_modules(tmp_path):
    settings = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folder = make("gptj", settings | {"rotary_dim": 4}, tmp_path, AutoModelForCausalLM)
    with pytest.raises(UsageError, match=r"'gptj'.*--target-modules.*q_proj"):
        build_model(folder, "causallm")
    _, config = build_model(folder, "causallm", "--target-modules", "q_proj", "fc_in")
    assert set(config.target_modules) == {"q_proj", "fc_in"}


def test_target_modules_that_are_not_there_are_named(tiny_llama):
    with pytest.raises(UsageError, match=r"no layer 'qproj'.*q_proj"):
        build_model(tiny_llama, "causallm", "--target-modules", "qproj")


def test_a_folder_without_weights_is_an_error(tiny_llama, tmp_path):
    shutil.copy(Path(tiny_llama) / "config.json", tmp_path)
    with pytest.raises(UsageError, match="cannot be loaded"):
        build_model(str(tmp_path), "causallm")


def test_a_folder_with_half_the_weights_is_an_error(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"no weights for model.layers.1.self_attn.q_proj"):
        build_model(str(tmp_path), "causallm")


def test_an_encoder_with_half_the_weights_is_an_error(tiny_bert, tmp_path):
    """Nor is what is missing trained from scratch beside the adapter."""
    folder = shutil.copytree(tiny_bert, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".layer.1." not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"no weights for bert\.encoder\.layer\.1.*encoder"):
        build_model(str(folder), "seqcls")


def test_what_is_trained_whole_is_read_off_the_model(tiny_bert, tiny_llama):
    model, _ = build_model(tiny_bert, "seqcls")
    assert backbone.head_roots(model) == ["bert.pooler", "classifier"]
    assert not hasattr(model, "head_roots"), "nothing of ours is on it"
    decoder, _ = build_model(tiny_llama, "seqcls")
    assert backbone.head_roots(decoder) == ["score"]
    assert backbone.head_roots(build_model(tiny_llama, "causallm")[0]) == []


def test_an_encoder_as_causal_lm_is_an_error(tmp_path):
    folder = make("distilbert", DISTILBERT, tmp_path, AutoModelForSequenceClassification)
    with pytest.raises(UsageError, match="no causal LM"):
        build_model(folder, "causallm")


def test_a_model_id_without_network_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="nobody/nothing cannot be loaded"):
        build_model("nobody/nothing", "causallm")


@pytest.mark.parametrize("draws", [3, 4])
def test_deberta_draws_are_true_draws(tmp_path, draws):
    """Its relative positions pass through query_proj without a row per example."""
    settings = SMALL | {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 16,
        "position_buckets": 8,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    folder = make("deberta-v2", settings, tmp_path, AutoModelForSequenceClassification)
    args = main.parse_args(
        [
            *["--dataset-type", "bertds", "--dataset", "bbc_headlines", "--modelwrapper", "blob"],
            *["--bayes-eps", "0.5", "--flipout", "none", "--eval-batch-size", "64"],
            *("--model", folder),
        ]
    )
    model = backbone.load_model(args, 5, torch.device("cpu"))
    wrapper = BLoB(model, backbone.lora_config(args, model), args, Accelerator(cpu=True)).eval()
    for name, parameter in wrapper.trainable_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.randint(3, 50, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), wrapper.draws.fixed(draws, seed=1):
        together = wrapper.forward_logits(batch, n_samples=draws)
    with torch.no_grad(), wrapper.draws.fixed(draws, seed=1):
        alone = [wrapper.forward_logits(batch, n_samples=1) for _ in range(draws)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    assert together.std(1).max() > 1e-2


# --- adapters on disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", [[], ["--apply-classhead-lora"]])
@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_stock_peft_reads_what_is_saved(kind, head, request, tiny_llama, tiny_bert):
    """The same logits from `PeftModel.from_pretrained` as from the run, the head included."""
    flags = [*request.getfixturevalue(kind), *head, "--modelwrapper", "mle", "--checkpoint"]
    flags += ["--max-train-steps", "12"]
    main.main(flags)
    folder = run_folder(flags)
    if kind == "causal_flags":
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    else:
        torch.manual_seed(123)  # another random head than the run's
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5)
    stock = PeftModel.from_pretrained(base, folder).eval()
    _, dataset, wrapper = build(
        [*flags[:-2], "--max-train-steps", "0", "--load-lora-path", str(folder)]
    )
    wrapper.eval()
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    torch.testing.assert_close(wrapper.class_logits(stock(**batch)), wrapper.batch_logits(batch))
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = wrapper.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-5, atol=1e-6)


def test_the_whole_base_head_is_not_saved(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--checkpoint", "--apply-classhead-lora"]
    main.main([*flags, "--max-train-steps", "1"])
    keys = load_file(run_folder(flags) / "adapter_model.safetensors")
    assert keys and all("lora_" in key for key in keys)


def test_what_stock_peft_saves_is_loaded(causal_flags, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    stock.save_pretrained(tmp_path / "stock")
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(tmp_path / "stock")]
    _, dataset, wrapper = build(flags)
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    expected = wrapper.class_logits(stock.eval()(**batch))
    torch.testing.assert_close(wrapper.eval().batch_logits(batch), expected)


def test_training_goes_on_from_a_loaded_adapter(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "mle", "--checkpoint", "--max-train-steps", "6"]
    main.main([*flags, "--log-path", "first"])
    first = run_folder([*flags, "--log-path", "first"])
    more = [*flags, "--log-path", "second", "--load-lora-path", str(first)]
    main.main(more)
    before = load_file(first / "adapter_model.safetensors")
    after = load_file(run_folder(more) / "adapter_model.safetensors")
    assert all(not torch.equal(before[key], after[key]) for key in before)


def saved_adapter(flags) -> Path:
    flags = [*flags, "--modelwrapper", "mle", "--checkpoint", "--log-path", "saved"]
    main.main([*flags, "--max-train-steps", "1"])
    return run_folder(flags)


def test_an_adapter_of_another_rank_is_an_error(causal_flags):
    folder = saved_adapter(causal_flags)
    with pytest.raises(UsageError, match=r"--lora-r is 4, but the adapter .* with 8"):
        build(
            [
                *causal_flags,
                "--modelwrapper",
                "mle",
                "--lora-r",
                "4",
                "--load-lora-path",
                str(folder),
            ]
        )


def test_an_adapter_whose_tensors_have_another_rank_is_an_error(causal_flags):
    folder = saved_adapter(causal_flags)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(UsageError, match=r"has shape \(8, 32\).*needs \(4, 32\)"):
        build([*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)])


def test_an_adapter_of_another_architecture_is_an_error(causal_flags, classifier_flags):
    folder = saved_adapter(causal_flags)
    with pytest.raises(UsageError, match="no layer"):
        build([*classifier_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)])


def test_flags_for_layers_that_the_adapter_lacks_contradict_it(causal_flags):
    folder = saved_adapter(causal_flags)
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)]
    for more in (["--apply-classhead-lora"], ["--target-modules", "k_proj"]):
        with pytest.raises(UsageError, match=r"the flags ask for LoRA on (lm_head|k_proj)"):
            build([*flags, *more])


def test_a_damaged_adapter_is_an_error(causal_flags):
    folder = saved_adapter(causal_flags)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        build([*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)])


def test_an_adapter_that_is_not_lora_is_an_error(causal_flags):
    folder = saved_adapter(causal_flags)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UsageError, match="holds a IA3 adapter"):
        build([*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(folder)])


def test_a_folder_without_an_adapter_is_an_error(causal_flags, tmp_path):
    with pytest.raises(UsageError, match=r"no adapter_config.json"):
        build([*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(tmp_path)])


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_quantised_bases_train_and_are_evaluated(kind, quantization, request):
    flags = [*request.getfixturevalue(kind), "--modelwrapper", "mle", "--max-train-steps", "30"]
    _, _, wrapper = build([*flags, "--quantization", quantization])
    layers = {type(module).__name__ for module in wrapper.modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization] in layers
    before = [p.detach().clone() for _, p in wrapper.trainable_parameters()]
    metrics = wrapper.fit_evaluate()
    assert metrics.nll < 1.0, "knowing which answers occur, but not the text, costs ln 3"
    assert all(
        not torch.equal(a, b)
        for a, (_, b) in zip(before, wrapper.trainable_parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["causal_flags", "classifier_flags"])
def test_a_run_on_an_adapter_needs_none_of_the_flags_that_its_run_knows(kind, request, tmp_path):
    """Train once, Bayesianize many times."""
    flags = [*request.getfixturevalue(kind), "--modelwrapper", "map", "--checkpoint"]
    trained = main.main([*flags, "--max-train-steps", "20"])
    folder = run_folder(flags)
    few = ["--load-lora-path", str(folder), "--nowand", "--output-dir", str(tmp_path / "more")]
    again = main.main([*few, "--modelwrapper", "mle"])
    assert again == pytest.approx(trained, abs=1e-5)
    tfb = main.main([*few, "--modelwrapper", "tfb", "--th", "0.5"])
    assert tfb.acc == pytest.approx(trained.acc, abs=0.15)
    args = main.parse_args([*few, "--modelwrapper", "mle", "--dataset", "bbc_bodies"])
    assert args.dataset == "bbc_bodies", "what is said wins"


@pytest.mark.parametrize("where", ["fc1", "q_proj"])
def test_a_layer_that_does_not_see_rows_takes_no_signs_per_example(where, tmp_path):
    """OPT's feed-forward layers see the tokens of all rows as one list."""
    folder = make("opt", OPT, tmp_path, AutoModelForCausalLM)
    flags = [
        *("--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--modelwrapper", "blob"),
        *("--model", folder, "--target-modules", where),
    ]

    def built(*more: str):
        args = main.parse_args([*flags, *more])
        model = backbone.load_model(args, 5, torch.device("cpu"))
        return BLoB(model, backbone.lora_config(args, model), args, Accelerator(cpu=True))

    if where == "fc1":
        with pytest.raises(UsageError, match="--flipout-eval none"):
            built()
    else:
        built()
    wrapper = built("--flipout-eval", "none").eval()
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad(), wrapper.answering(torch.tensor([4, 5])):
        logits = wrapper.forward_logits(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, n_samples=3
        )
    assert logits.shape == (2, 3, 2)
