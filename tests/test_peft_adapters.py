"""Adapters that stock PEFT has trained load as they are: the logits are PEFT's own.

Each is made here by `get_peft_model`, and the reference is `PeftModel.from_pretrained`.
"""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import _encoder, _save, build, run_folder, word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
)

import main
from modelwrappers import load_posterior
from utils.errors import UsageError
from utils.logging import logger

POOLER = "base_model.model.bert.pooler.dense.weight"
ATTENTION = {"target_modules": ["query", "value"]}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def bert(models) -> str:
    """With its pooler, as BERT's own checkpoints are."""
    return _encoder(BertConfig, BertModel, models / "pooled-bert")


@pytest.fixture(scope="session")
def distilbert(models) -> str:
    tokenizer = word_tokenizer()
    none = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    size = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    config = DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **size, **none)
    return _save(models / "distilbert", DistilBertModel(config), tokenizer)


@pytest.fixture(scope="session")
def deberta(models) -> str:
    """A classifier already: its pooler lies beside the encoder and is in the checkpoint."""
    folder = models / "deberta"
    return _encoder(DebertaV2Config, DebertaV2ForSequenceClassification, folder, pooler_dropout=0)


def base_model(folder: str, seed: int = 0):
    """As `from_pretrained` gives it, with what is new drawn by this seed."""
    torch.manual_seed(seed)
    if "llama" in Path(folder).name:
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    )


def make(base: str, folder: Path, **settings) -> PeftModel:
    """Save an adapter in which all that is trained has moved; the adapter as PEFT loads it."""
    task = "CAUSAL_LM" if "llama" in Path(base).name else "SEQ_CLS"
    settings = {"task_type": task, "r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings
    model = get_peft_model(base_model(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return stock(base, folder)


def stock(base: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_model(base, seed=7), str(folder)).eval()


@pytest.fixture
def call(data_dir, tmp_path):
    """The flags of a run on an adapter."""

    def flags(base: str, folder: Path, method: str = "map", *more: str) -> list[str]:
        kind = "mcdataset" if "llama" in Path(base).name else "bertds"
        return [
            *("--dataset-type", kind, "--dataset", "bbc_headlines", "--model", base),
            *("--data-dir", data_dir, "--output-dir", str(tmp_path / "out"), "--nowand"),
            *("--device", "cpu", "--modelwrapper", method, "--load-lora-path", str(folder), *more),
        ]

    return flags


def loaded(flags: list[str]):
    """(wrapper, a batch)."""
    _, dataset, wrapper = build(flags)
    return wrapper.eval(), wrapper.model_inputs(next(iter(dataset.test_dataloader)))


def logits_of(wrapper, model: PeftModel, batch) -> torch.Tensor:
    with torch.no_grad():
        return wrapper.class_logits(model(**batch))


@pytest.fixture
def said(caplog, monkeypatch):
    """The log; what is said once only is said in every test."""
    monkeypatch.setattr("utils.logging._told", set())
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def rewrite(folder: Path, **keys) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change_tensors(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


# --- what loads -----------------------------------------------------------------------------------

CLASSIFIERS = {
    "plain": ATTENTION,
    "rslora": ATTENTION | {"use_rslora": True},
    "rank_pattern": ATTENTION
    | {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"value": 5}},
    "bias_all": ATTENTION | {"bias": "all"},
    "bias_lora_only": ATTENTION | {"bias": "lora_only"},
    "lora_bias": ATTENTION | {"lora_bias": True},
    "layers_to_transform": ATTENTION | {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*layer\.1.*(query|dense)"},
    "all_linear": {"target_modules": "all-linear"},
    "exclude_modules": ATTENTION | {"exclude_modules": ["layer.0.attention.self.query"]},
    "modules_to_save": ATTENTION | {"modules_to_save": ["pooler", "word_embeddings"]},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "dora": ATTENTION | {"use_dora": True, "bias": "all"},
}
CAUSAL = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias_all": {"target_modules": ["q_proj"], "bias": "all"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "all_linear": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}


def check_equal(base: str, expected: PeftModel, flags: list[str], tmp_path: Path) -> None:
    """The logits are PEFT's, and stay so in what is saved again."""
    wrapper, batch = loaded(flags)
    logits = logits_of(wrapper, expected, batch)
    torch.testing.assert_close(wrapper.batch_logits(batch), logits)
    assert logits.std() > 0.01
    wrapper.save_pretrained(str(tmp_path / "again"))
    again = stock(base, tmp_path / "again")
    torch.testing.assert_close(logits_of(wrapper, again, batch), logits)


@pytest.mark.parametrize("settings", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_classifier_adapter_has_the_logits_that_it_has_in_peft(bert, settings, call, tmp_path):
    expected = make(bert, tmp_path / "adapter", **settings)
    check_equal(bert, expected, call(bert, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_adapter_has_the_logits_that_it_has_in_peft(tiny_llama, settings, call, tmp_path):
    expected = make(tiny_llama, tmp_path / "adapter", **settings)
    check_equal(tiny_llama, expected, call(tiny_llama, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("tiny_roberta", ["query", "value"]),
        ("distilbert", ["q_lin", "v_lin"]),  # PEFT saves its pre_classifier, too
        ("deberta", ["query_proj", "value_proj"]),
    ],
)
def test_heads_of_other_architectures_load(kind, targets, request, call, tmp_path):
    base = request.getfixturevalue(kind)
    expected = make(base, tmp_path / "adapter", target_modules=targets)
    check_equal(base, expected, call(base, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_load(bert, dtype, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    change_tensors(tmp_path / "adapter", lambda t: {k: v.to(dtype) for k, v in t.items()})
    expected = stock(bert, tmp_path / "adapter")
    check_equal(bert, expected, call(bert, tmp_path / "adapter"), tmp_path)


def test_an_adapter_of_an_early_peft_loads(bert, call, tmp_path):
    """Few keys, and the head in the file without being named."""
    folder = tmp_path / "adapter"
    expected = make(bert, folder, **ATTENTION)
    stored = json.loads((folder / "adapter_config.json").read_text())
    early = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha")
    early += ("lora_dropout", "peft_type", "r", "target_modules", "task_type")
    early = {key: stored[key] for key in early}
    early |= {"merge_weights": True, "enable_lora": None, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(early))
    check_equal(bert, expected, call(bert, folder), tmp_path)


def test_all_linear_means_what_it_means_to_peft(bert, call, tmp_path):
    """Said in the file, where PEFT writes the names instead."""
    make(bert, tmp_path / "adapter", target_modules="all-linear")
    rewrite(tmp_path / "adapter", target_modules="all-linear")
    expected = stock(bert, tmp_path / "adapter")
    check_equal(bert, expected, call(bert, tmp_path / "adapter"), tmp_path)


def test_lora_on_a_head_of_ours_is_there_under_any_task(bert, call, classifier_flags, tmp_path):
    """PEFT would save the head of a SEQ_CLS adapter whole, and pass over LoRA on it."""
    flags = [*classifier_flags, "--model", bert, "--modelwrapper", "map", "--apply-classhead-lora"]
    main.main([*flags, "--max-train-steps", "2"])
    rewrite(run_folder(flags), task_type="SEQ_CLS")
    wrapper, _ = loaded(call(bert, run_folder(flags), "map", "--log-path", "again"))
    assert any("classifier.lora_A" in name for name, _ in wrapper.named_parameters())


def test_a_number_of_a_later_peft_is_ignored_aloud(bert, call, tmp_path, said):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", group_size_of_the_future=16, switch_of_the_future=False)
    loaded(call(bert, tmp_path / "adapter"))
    warned = [r.getMessage() for r in said.records if r.levelname == "WARNING"]
    assert any("group_size_of_the_future" in message for message in warned)
    assert not any("switch_of_the_future" in message for message in warned)


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, "text"])
def test_another_key_of_a_later_peft_is_refused(bert, value, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", use_future=value, peft_version="9.9")
    with pytest.raises(UsageError, match=r"'use_future'.*does not know.*from '9.9'.*remove it"):
        build(call(bert, tmp_path / "adapter"))


# --- methods --------------------------------------------------------------------------------------

METHODS = {
    "blob": (),
    "tfb": ("--iter", "0"),
    "laplace": (),
    "mcdropout": ("--lora-dropout", "0.5"),
    "deepensemble": (),
}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *itertools.product(METHODS, ("bias_all", "modules_to_save")),
        *itertools.product(("blob", "tfb"), ("rslora", "lora_bias")),
        ("blob", "rank_pattern"),
        ("blob", "embeddings"),
    ],
)
def test_the_mean_of_every_method_is_the_adapter(bert, method, settings, call, tmp_path):
    expected = make(bert, tmp_path / "adapter", **CLASSIFIERS[settings])
    wrapper, batch = loaded(call(bert, tmp_path / "adapter", method, *METHODS[method]))
    logits = logits_of(wrapper, expected, batch).log_softmax(-1)
    with torch.no_grad():
        mean = wrapper.forward_logits(batch, sample=False)[:, 0].log_softmax(-1)
    torch.testing.assert_close(mean, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["blob", "tfb", "laplace"])
def test_methods_of_plain_lora_refuse_dora_by_its_name(bert, method, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION, use_dora=True)
    with pytest.raises(UsageError, match=r"DoRA \(use_dora\)"):
        build(call(bert, tmp_path / "adapter", method, *METHODS[method]))


@pytest.mark.parametrize("use_dora", [False, True])
def test_members_of_an_ensemble_are_the_adapters_of_peft(bert, use_dora, call, tmp_path):
    folder = tmp_path / "adapter"
    make(bert, folder, **ATTENTION, use_dora=use_dora)
    make(bert, folder / "member1", **ATTENTION, use_dora=use_dora)
    change_tensors(folder / "member1", lambda t: {key: 1.5 * value for key, value in t.items()})
    members = [stock(bert, folder), stock(bert, folder / "member1")]
    wrapper, batch = loaded(call(bert, folder, "deepensemble"))
    expected = torch.stack([logits_of(wrapper, member, batch) for member in members], dim=1)
    with torch.no_grad():
        logits = wrapper.forward_logits(batch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.std(1).max() > 1e-2


def test_draws_of_dropout_on_dora_are_those_of_peft_in_training(bert, call, tmp_path):
    expected = make(bert, tmp_path / "adapter", **ATTENTION, use_dora=True, lora_dropout=0.5)
    for layer in expected.modules():
        if isinstance(layer, LoraLayer):
            layer.train()
    wrapper, batch = loaded(call(bert, tmp_path / "adapter", "mcdropout"))
    with torch.no_grad():
        torch.manual_seed(3)
        logits = expected(**batch).logits
        torch.manual_seed(3)
        draw = wrapper.forward_logits(batch, n_samples=1)[:, 0]
        draws = wrapper.forward_logits(batch, n_samples=4)
    torch.testing.assert_close(draw, logits, rtol=1e-4, atol=1e-5)
    assert draws.std(1).max() > 1e-2
    assert not any(m.training for m in wrapper.modules())


def test_members_have_no_biases_of_their_own(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION, bias="all")
    with pytest.raises(UsageError, match=r"ensemble of 2 members.*bias='all'.*--ensemble-n 1"):
        build(call(bert, tmp_path / "adapter", "deepensemble", "--ensemble-n", "2"))


# --- training on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [("map", "plain"), ("map", "bias_all"), ("map", "dora"), ("blob", "bias_all")],
)
def test_training_on_moves_what_peft_trains(bert, method, settings, call, tmp_path):
    folder = tmp_path / "adapter"
    make(bert, folder, **CLASSIFIERS[settings])
    model = get_peft_model(
        base_model(bert), LoraConfig(task_type="SEQ_CLS", r=4, **CLASSIFIERS[settings])
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    flags = call(bert, folder, method, "--max-train-steps", "3", "--batch-size", "8", "--lr", "0.1")
    wrapper, _ = loaded(flags)
    assert {n for n, _ in wrapper.trainable_parameters() if "lora_A_rho" not in n} == trained
    main.main(flags)
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(run_folder(flags) / "adapter_model.safetensors")
    assert before.keys() == {key for key in after if not key.endswith("lora_A_rho")}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("lora_A" in k for k in moved) and any("classifier" in k for k in moved)
    if method == "map":
        again = stock(bert, run_folder(flags))
        stored = load_file(run_folder(flags) / "predictions.safetensors")
        for batch in wrapper.dataset.test_dataloader:
            logits = logits_of(wrapper, again, wrapper.model_inputs(batch))
            rows = [stored["index"].tolist().index(i) for i in batch["index"].tolist()]
            expected = stored["log_probs"][rows, 0]
            torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


def test_a_pooler_that_nobody_has_trained_is_refused(tiny_bert, call, tmp_path):
    """The checkpoint is of a masked LM, which has none, and the adapter has left it frozen."""
    make(tiny_bert, tmp_path / "adapter", **ATTENTION)
    with pytest.raises(UsageError, match=r"bert.pooler.dense, nor does .*without its trained"):
        build(call(tiny_bert, tmp_path / "adapter"))


def test_such_a_pooler_counts_if_the_adapter_holds_it(tiny_bert, call, tmp_path):
    saved = ATTENTION | {"modules_to_save": ["pooler"]}
    expected = make(tiny_bert, tmp_path / "adapter", **saved)
    check_equal(tiny_bert, expected, call(tiny_bert, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_without_its_head_is_refused(bert, task, call, tmp_path):
    folder = tmp_path / "adapter"
    make(bert, folder, **ATTENTION)
    rewrite(folder, task_type=task, modules_to_save=None)
    change_tensors(folder, lambda t: {k: v for k, v in t.items() if "classifier" not in k})
    with pytest.raises(UsageError, match="saved without its trained head"):
        build(call(bert, folder))


def test_a_head_that_the_base_model_has_need_not_be_in_the_adapter(deberta, call, tmp_path):
    """LoRA on a classifier that was trained before, whose checkpoint has five classes already."""
    model = base_model(deberta)
    model.save_pretrained(tmp_path / "classifier")
    word_tokenizer().save_pretrained(tmp_path / "classifier")
    base, settings = str(tmp_path / "classifier"), {"target_modules": ["query_proj"]}
    expected = make(base, tmp_path / "adapter", **settings, task_type=None)
    assert not any("classifier" in k for k, p in expected.named_parameters() if p.requires_grad)
    check_equal(base, expected, call(base, tmp_path / "adapter"), tmp_path)


def test_half_a_layer_is_no_frozen_layer(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    bias = POOLER.replace("weight", "bias")
    change_tensors(tmp_path / "adapter", lambda t: t | {bias: torch.zeros(32)})
    with pytest.raises(UsageError, match=r"no weights for .*pooler.dense.weight"):
        build(call(bert, tmp_path / "adapter"))


def test_a_tensor_of_an_unknown_variant_is_refused(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    change_tensors(tmp_path / "adapter", lambda t: t | {f"{layer}.lora_diag": torch.ones(4)})
    with pytest.raises(UsageError, match=r"lora_diag', which --modelwrapper map does not take"):
        build(call(bert, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "saved"],
)
def test_an_adapter_that_tied_layers_share_is_refused_by_that_name(
    settings, tied_llama, call, tmp_path
):
    make(tied_llama, tmp_path / "shared", ensure_weight_tying=True, **settings)
    with pytest.raises(UsageError, match=r'"ensure_weight_tying": true.*Train it without'):
        build(call(tied_llama, tmp_path / "shared"))


def test_tying_that_is_asked_for_counts_only_for_layers_that_are_tied(
    tiny_llama, tied_llama, call, tmp_path
):
    for base, targets in ((tied_llama, ["q_proj"]), (tiny_llama, ["q_proj", "embed_tokens"])):
        folder = tmp_path / targets[-1]
        peft = make(base, folder, ensure_weight_tying=True, target_modules=targets)
        wrapper, batch = loaded(call(base, folder))
        expected = logits_of(wrapper, peft, batch)
        torch.testing.assert_close(logits_of(wrapper, wrapper, batch), expected)


@pytest.mark.parametrize("extended", [False, True])
def test_changed_weights_of_the_base_model_are_not_dropped_in_silence(
    tiny_llama, extended, call, tmp_path
):
    """PEFT would load them, or fail on their shape."""
    folder = tmp_path / "adapter"
    make(tiny_llama, folder, target_modules=["q_proj"])
    table = base_model(tiny_llama).get_input_embeddings().weight.detach()
    key = "base_model.model.model.embed_tokens.weight"
    change_tensors(folder, lambda t: t | {key: table.bfloat16()})  # as it is, but for its type
    loaded(call(tiny_llama, folder))
    changed = torch.cat([table, table[:1]]) if extended else table + 0.1
    change_tensors(folder, lambda t: t | {key: changed})
    with pytest.raises(UsageError, match=r"embed_tokens.weight' .*is of the base model, but other"):
        build(call(tiny_llama, folder))


def test_pickled_weights_are_refused_with_the_remedy(bert, call, tmp_path):
    folder = tmp_path / "adapter"
    make(bert, folder, **ATTENTION)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"pickled .*save them again"):
        build(call(bert, folder))


# --- the base model, where the call does not name it ----------------------------------------------


def unnamed(flags: list[str]) -> list[str]:
    """A call without its --model."""
    place = flags.index("--model")
    return flags[:place] + flags[place + 2 :]


def test_the_base_model_is_taken_from_pefts_file(bert, call, tmp_path, said):
    expected = make(bert, tmp_path / "adapter", **ATTENTION)
    flags = unnamed(call(bert, tmp_path / "adapter"))
    main.main(flags)
    told = (run_folder(flags) / "log.txt").read_text(encoding="utf-8")
    assert f"The base model is '{bert}', as " in told
    stored = json.loads((run_folder(flags) / "args.json").read_text())
    assert stored["args"]["model"] == bert and run_folder(flags).parent.parent.name == "pooled-bert"
    wrapper, batch = loaded(flags)
    torch.testing.assert_close(wrapper.batch_logits(batch), logits_of(wrapper, expected, batch))
    again = ["--config", str(run_folder(flags) / "args.json"), "--overwrite"]
    before = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    assert main.parse_args(again).model == bert
    main.main(again)
    after = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    torch.testing.assert_close(after, before)


def test_a_model_that_is_given_is_taken(bert, tiny_bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    assert main.parse_args(call(tiny_bert, tmp_path / "adapter")).model == tiny_bert


def test_the_record_of_a_posterior_counts_before_pefts_file(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    flags = call(bert, tmp_path / "adapter")
    main.main(flags)
    folder = run_folder(flags)
    (folder / "args.json").unlink()  # as in a folder that was downloaded
    rewrite(folder, base_model_name_or_path="somebody/else")
    again = unnamed(call(bert, folder))
    assert main.parse_args(again).model == bert
    record = json.loads((folder / "bayes_config.json").read_text())
    moved = record | {"model": "smollm2-135m", "load_model_path": bert}
    (folder / "bayes_config.json").write_text(json.dumps(moved))
    args = main.parse_args(again)
    assert (args.model, args.load_model_path) == ("smollm2-135m", bert), "an embedded model's alias"


def test_an_adapter_on_the_hub_names_its_base_model(bert, call, tmp_path, monkeypatch):
    """At the root of the repo, where PEFT puts it; a training's checkpoints stay there."""
    make(bert, tmp_path / "repo", **ATTENTION)
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        asked.append((repo, *ignore_patterns))
        return str(tmp_path / "repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    flags = unnamed(call(bert, Path("."), "map", "--load-lora-huggingface-repo", "a/b"))
    wrapper, _ = loaded(flags)
    assert wrapper.args.model == bert and set(asked) == {("a/b", "checkpoint-*")}


@pytest.mark.parametrize("name", ["/nobody/model", "./nowhere", "a/b/c", "~/model", "C:\\model"])
def test_a_folder_of_another_machine_is_named_with_the_remedy(bert, name, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(UsageError, match=r"is no folder here; pass --model with"):
        main.parse_args(unnamed(call(bert, tmp_path / "adapter")))


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_model_needs_the_flag(bert, name, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(UsageError, match=r"--model is missing. Nothing in .* says what"):
        main.parse_args(unnamed(call(bert, tmp_path / "adapter")))


@pytest.mark.parametrize("name", [5, ["a"], "evil.py:TASK", "a\nb", "x" * 5000])
def test_what_is_no_models_name_is_refused(bert, name, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(UsageError, match=r"adapter_config.json") as caught:
        main.parse_args(unnamed(call(bert, tmp_path / "adapter")))
    assert len(str(caught.value)) < 1500


def test_a_model_that_only_an_adapter_names_runs_no_code(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    flags = unnamed(call(bert, tmp_path / "adapter"))
    with pytest.raises(UsageError, match=r"is named by a file only: pass --model yourself"):
        main.parse_args([*flags, "--trust-remote-code"])


def test_another_revision_of_the_base_model_is_not_taken_in_silence(bert, call, tmp_path, said):
    make(bert, tmp_path / "adapter", **ATTENTION)
    rewrite(tmp_path / "adapter", revision="abc")
    main.parse_args(unnamed(call(bert, tmp_path / "adapter")))
    assert any("not 'abc'" in record.getMessage() for record in said.records)


def test_an_adapter_is_told_how_it_becomes_a_posterior(bert, call, tmp_path):
    make(bert, tmp_path / "adapter", **ATTENTION)
    with pytest.raises(UsageError, match=r"no posterior yet.*main.py --load-lora-path .*--check"):
        load_posterior(tmp_path / "adapter", device="cpu")
    flags = unnamed(call(bert, tmp_path / "adapter", "blob", "--checkpoint"))
    main.main(flags)
    assert len(load_posterior(run_folder(flags), device="cpu").answers) == 5
