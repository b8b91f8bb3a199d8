"""Nothing that a file says runs code, becomes a flag or hangs; each attack is tried for real.

A base model's folder with code in it stands for what `--trust-remote-code` lets in: importing that
code leaves a mark.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import build, run_folder
from safetensors.torch import load_file, save_file

import main
from modelwrappers import load_posterior
from utils.errors import UsageError

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
class Method: pass
TASK = None
"""


@pytest.fixture(scope="session")
def code_model(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama, in a folder whose config.json asks for code of its own."""
    folder = tmp_path_factory.mktemp("models") / "code-llama"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(CODE.format(mark=str(folder / "mark")))
    return folder


@pytest.fixture
def mark(code_model) -> Path:
    """What that code leaves when it runs."""
    (code_model / "mark").unlink(missing_ok=True)
    return code_model / "mark"


@pytest.fixture(scope="session")
def runs(code_model, data_dir, tmp_path_factory) -> dict[str, Path]:
    """A BLoB posterior over that model, trained without its code, and a plain adapter."""
    flags = ["--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--data-dir", data_dir]
    flags += ["--output-dir", str(tmp_path_factory.mktemp("out")), "--nowand", "--device", "cpu"]
    flags += ["--model", str(code_model), "--max-train-steps", "1", "--checkpoint"]
    folders = {}
    for method in ("blob", "mle"):
        main.main([*flags, "--modelwrapper", method])
        folders[method] = run_folder([*flags, "--modelwrapper", method])
    return folders


@pytest.fixture
def posterior(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["blob"], tmp_path / "posterior"))


@pytest.fixture
def adapter(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["mle"], tmp_path / "adapter"))


def rewrite(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_code_does_run_on_the_users_word(causal_flags, code_model, mark):
    """Else the other tests of this file would prove nothing."""
    flags = [*causal_flags, "--model", str(code_model), "--modelwrapper", "mle"]
    build([*flags, "--max-train-steps", "1", "--trust-remote-code"])
    assert mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["flags"].update(flipout=["token", "--trust-remote-code"]),
        lambda c: c["flags"].update(flipout="token --trust-remote-code"),
        lambda c: c["flags"].update(flipout="--trust-remote-code"),
        lambda c: c["flags"].update(bayes_inference_notsample="--trust-remote-code"),
        lambda c: c["flags"].update(bayes_inference_notsample=["--trust-remote-code"]),
        lambda c: c["flags"].update(bayes_beta="0.2 --trust-remote-code"),
        lambda c: c["flags"].update(bayes_beta=[0.2, "--trust-remote-code"]),
        lambda c: c.update(model=[c["model"], "--trust-remote-code"]),
        lambda c: c.update(dtype="--trust-remote-code"),
        lambda c: c.update(quantization=["none", "--trust-remote-code"]),
        lambda c: c.update(n_draws="--trust-remote-code"),
        lambda c: c.update(load_model_path=["--trust-remote-code"]),
        lambda c: c.update(rows={"max_seq_len": "--trust-remote-code"}),
        lambda c: c.update(dataset_type="mcdataset --trust-remote-code"),
    ],
)
def test_no_value_of_a_record_becomes_a_flag(posterior, mark, change):
    rewrite(posterior / "bayes_config.json", change)
    with pytest.raises(UsageError, match=r"bayes_config\.json"):
        load_posterior(posterior, device="cpu")
    assert not mark.exists()


def test_no_further_key_of_a_record_counts(posterior, mark):
    rewrite(
        posterior / "bayes_config.json",
        lambda c: (
            c.update(trust_remote_code=True, given=["--trust-remote-code"]),
            c["flags"].update(trust_remote_code=True),
            c["rows"].update(trust_remote_code=True),
        ),
    )
    assert load_posterior(posterior, device="cpu").args.trust_remote_code is False
    assert not mark.exists()


def test_a_method_in_a_file_needs_the_callers_word(posterior, mark, code_model):
    spec = f"{code_model / 'evil.py'}:Method"
    rewrite(posterior / "bayes_config.json", lambda c: c.update(modelwrapper=spec))
    with pytest.raises(UsageError, match="modelwrapper="):
        load_posterior(posterior, device="cpu")
    assert not mark.exists()


def test_a_data_set_of_a_record_is_a_name(posterior, mark, code_model):
    spec = f"{code_model / 'evil.py'}:TASK"
    rewrite(posterior / "bayes_config.json", lambda c: c.update(dataset=spec))
    assert load_posterior(posterior, device="cpu").args.dataset == "TASK"
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda args, evil: args.update(dataset=f"{evil}:TASK"),
        lambda args, evil: args.update(model=[args["model"], "--trust-remote-code"]),
        lambda args, evil: args.update(max_seq_len="300 --trust-remote-code"),
        lambda args, evil: args.update(data_dir=["--trust-remote-code"]),
        lambda args, evil: args.update(dtype="--trust-remote-code"),
        lambda args, evil: args.update(hold_out="--trust-remote-code"),
    ],
)
def test_no_value_of_the_run_beside_an_adapter_runs_code(posterior, mark, code_model, change):
    rewrite(posterior / "args.json", lambda c: change(c["args"], code_model / "evil.py"))
    call = ["--modelwrapper", "mle", "--load-lora-path", str(posterior), "--nowand"]
    assert main.run([*call, "--log-path", "again", "--device", "cpu"]) == 2
    assert not mark.exists()


def test_the_run_beside_an_adapter_does_not_switch_remote_code_on(posterior, mark, tmp_path):
    rewrite(posterior / "args.json", lambda c: c["args"].update(trust_remote_code=True))
    call = ["--modelwrapper", "mle", "--load-lora-path", str(posterior), "--nowand"]
    main.main([*call, "--output-dir", str(tmp_path / "more"), "--device", "cpu"])
    assert not mark.exists()


def test_trusting_code_does_not_cover_a_model_of_a_stored_call(code_model, mark, tmp_path):
    file = tmp_path / "args.json"
    given = {"modelwrapper": "mle", "model": str(code_model), "dataset": "bbc_headlines"}
    file.write_text(json.dumps({"args": {}, "given": given | {"dataset_type": "mcdataset"}}))
    call = ["--config", str(file), "--max-train-steps", "1", "--trust-remote-code"]
    with pytest.raises(UsageError, match="pass --model yourself"):
        main.parse_args(call)
    assert main.parse_args([*call, "--model", str(code_model)]).trust_remote_code
    assert not mark.exists()


@pytest.mark.parametrize("flag", ["--config", "--load-lora-path"])
def test_a_run_of_a_newer_version_is_refused(posterior, flag):
    rewrite(posterior / "args.json", lambda c: c.update(format_version=99))
    value = posterior / "args.json" if flag == "--config" else posterior
    with pytest.raises(UsageError, match="format_version 99"):
        main.parse_args(["--modelwrapper", "mle", flag, str(value), "--nowand"])


def test_trusting_code_does_not_cover_a_model_that_only_a_file_names(posterior, mark):
    call = ["--modelwrapper", "mle", "--load-lora-path", str(posterior), "--nowand"]
    with pytest.raises(UsageError, match="pass --model yourself"):
        main.parse_args([*call, "--trust-remote-code"])
    assert not mark.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "dataset", "modelwrapper", "ood_datasets"])
def test_a_stored_call_repeats_no_code(causal_flags, code_model, mark, tmp_path, key):
    spec = f"{code_model / 'evil.py'}:TASK"
    value = {"trust_remote_code": True, "ood_datasets": [spec]}.get(key, spec)
    given = {"modelwrapper": "mle", "model": str(code_model), "dataset": "bbc_headlines"}
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"args": {}, "given": given | {key: value}}))
    call = ["--config", str(file), "--dataset-type", "mcdataset", "--nowand"]
    assert main.run([*call, "--max-train-steps", "1"]) == 2
    assert not mark.exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"target_parameters": ["x"]},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"r": True},
        {"r": 10**12},
        {"lora_alpha": float("nan")},
        {"lora_dropout": -1},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": [1]},
        {"target_modules": []},
        {"target_modules": "no.such.layer"},
        {"target_modules": "(?=a)q_proj"},
        {"modules_to_save": ["(a+)+$"]},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"bias": "evil"},
        {"task_type": 3},
        {"peft_type": ["LORA"]},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_hostile_adapter_configuration_is_an_error(causal_flags, adapter, extra, capsys):
    rewrite(adapter / "adapter_config.json", lambda c: c.update(extra))
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(adapter)]
    assert main.run(flags) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_names_that_peft_would_import_are_left_out(
    causal_flags, adapter, tmp_path, monkeypatch, mark
):
    (tmp_path / "evil_package.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    mapping = {"base_model_class": "Model", "parent_library": "evil_package"}
    rewrite(
        adapter / "adapter_config.json",
        lambda c: c.update(
            auto_mapping=mapping, base_model_name_or_path="evil/model", megatron_core="evil_package"
        ),
    )
    again = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(adapter)]
    main.main([*again, "--checkpoint"])
    stored = json.loads((run_folder(again) / "adapter_config.json").read_text())
    assert "evil" not in json.dumps(stored)
    assert not mark.exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"init_lora_weights": "eva"},
        {"fan_in_fan_out": None, "bias": None, "use_dora": None},
        {"layers_pattern": "", "exclude_modules": ""},
        {"a_key_of_the_future": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_real_adapters_say_is_taken(causal_flags, adapter, extra):
    rewrite(adapter / "adapter_config.json", lambda c: c.update(extra))
    build([*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(adapter)])


@pytest.mark.parametrize(
    "pattern", ["(([a-z_.0-9]+)+)+!", "(.*)*" * 40 + "x", "((a{1000}){1000}){1000}"]
)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_hostile_pattern_does_not_hang(causal_flags, adapter, pattern, key):
    value = {pattern: 4} if key == "rank_pattern" else pattern
    rewrite(adapter / "adapter_config.json", lambda c: c.update({key: value}))
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(adapter)]
    started = time.monotonic()
    assert main.run(flags) in (0, 2)
    assert time.monotonic() - started < 30


def test_a_pattern_of_layers_means_what_it_means_to_peft(causal_flags, tiny_llama, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        target_modules=r".*layers\.1\..*(q|v)_proj",
        rank_pattern={r"layers\.\d+\.self_attn\.v_proj": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    stock.save_pretrained(tmp_path / "stock")
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(tmp_path / "stock")]
    _, dataset, wrapper = build(flags)
    adapted = {n for n, _ in wrapper.named_parameters() if "lora_A" in n}
    assert adapted == {n for n, _ in stock.named_parameters() if "lora_A" in n}
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    expected = wrapper.class_logits(stock.eval()(**batch))
    torch.testing.assert_close(wrapper.eval().batch_logits(batch), expected)
    again = tmp_path / "again"
    wrapper.save_pretrained(str(again))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    reread = PeftModel.from_pretrained(base, str(again)).eval()
    torch.testing.assert_close(wrapper.class_logits(reread(**batch)), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_adapter_weights_of_no_floating_type_are_an_error(causal_flags, adapter, dtype):
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    flags = [*causal_flags, "--modelwrapper", "mle", "--load-lora-path", str(adapter)]
    with pytest.raises(UsageError, match="is of type"):
        build(flags)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("choices"),
        lambda c: c.update(choices=["a", "a"]),
        lambda c: c.update(choices="business"),
        lambda c: c.update(choices=[]),
        lambda c: c.update(target_ids=[1, 2]),
        lambda c: c.update(target_ids=[-1, 2, 3, 4, 5]),
        lambda c: c.update(target_ids=[10**7, 2, 3, 4, 5]),
        lambda c: c.update(target_ids=[2.0, 2, 3, 4, 5]),
        lambda c: c.update(target_ids=None),
        lambda c: c.update(pad_token_id=10**9),
        lambda c: c.update(n_draws=0),
        lambda c: c.update(n_draws=10**30),
        lambda c: c.update(temperature=0),
        lambda c: c.update(temperature=float("nan")),
        lambda c: c.update(format_version=99),
        lambda c: c.update(format_version="1"),
        lambda c: c.update(format_version=True),
        lambda c: c.pop("format_version"),
        lambda c: c.update(modelwrapper=["blob"]),
        lambda c: c.update(modelwrapper="nothing"),
        lambda c: c.update(model=None),
        lambda c: c.update(model="\ud800"),
        lambda c: c.update(model="a\0b"),
        lambda c: c.update(model=""),
        lambda c: c.update(metrics={"x": {"acc": "high"}}),
        lambda c: c.update(metrics=[]),
        lambda c: c.update(flags=[]),
        lambda c: c["flags"].update(flipout=7),
        lambda c: c["flags"].update(bayes_beta=-1),
        lambda c: c["flags"].update(bayes_beta=True),
    ],
)
def test_a_damaged_record_is_an_error_in_one_line(posterior, change):
    rewrite(posterior / "bayes_config.json", change)
    with pytest.raises(UsageError) as error:
        load_posterior(posterior, device="cpu")
    assert len(str(error.value).splitlines()) <= 2 and len(str(error.value)) < 1500


@pytest.mark.parametrize("content", ["", "null", "[]", "1", "[" * 100_000, '{"a":' * 100_000, "\0"])
@pytest.mark.parametrize("name", ["bayes_config.json", "adapter_config.json", "args.json"])
def test_a_file_that_holds_something_else_is_an_error(posterior, name, content, tmp_path):
    (posterior / name).write_text(content)
    call = ["--modelwrapper", "blob", "--load-lora-path", str(posterior), "--nowand"]
    call += ["--output-dir", str(tmp_path / "more"), "--device", "cpu"]
    assert main.run(call) == 2


def test_every_value_of_a_hostile_record_is_quoted_in_short(posterior):
    rewrite(posterior / "bayes_config.json", lambda c: c.update(dtype="\x1b[2J" + "x" * 3_000_000))
    with pytest.raises(UsageError) as error:
        load_posterior(posterior, device="cpu")
    assert len(str(error.value)) < 1500 and "\x1b" not in str(error.value)


def test_a_fitted_temperature_is_applied_by_whoever_loads_the_posterior(causal_flags):
    from utils.temperature import scale

    flags = [*causal_flags, "--modelwrapper", "mle", "--temperature-scaling", "--checkpoint"]
    main.main([*flags, "--max-train-steps", "8"])
    folder = run_folder(flags)
    block = json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]
    loaded = load_posterior(folder, device="cpu")
    assert loaded.temperature == pytest.approx(block["temperature_scaled"]["temperature"])
    _, dataset, _ = build([*flags, "--max-train-steps", "8", "--log-path", "rows"])
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = loaded.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(
        again, scale(stored, loaded.temperature).float(), rtol=1e-4, atol=1e-5
    )
    metrics = loaded.evaluate(dataset.test_dataloader)
    assert metrics.nll == pytest.approx(block["temperature_scaled"]["nll"], abs=1e-5)


def test_a_posterior_of_a_method_in_a_file_loads_on_the_callers_word(causal_flags, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from wrapperbase import WrapperBase\n\n\nclass Mine(WrapperBase):\n    pass\n")
    flags = [*causal_flags, "--modelwrapper", f"{file}:Mine", "--checkpoint"]
    main.main([*flags, "--max-train-steps", "2"])
    with pytest.raises(UsageError, match="modelwrapper="):
        load_posterior(run_folder(flags), device="cpu")
    loaded = load_posterior(run_folder(flags), device="cpu", modelwrapper=f"{file}:Mine")
    assert type(loaded).__name__ == "Mine" and loaded.answers


def test_flags_with_dashes_in_their_values_are_repeated(causal_flags, tmp_path):
    file = tmp_path / "args.json"
    given = {"modelwrapper": "mle", "wandb_name": "-x", "dataset": "bbc_headlines", "model": "-m"}
    file.write_text(json.dumps({"args": {}, "given": given | {"max_train_steps": 1}}))
    args = main.parse_args(["--config", str(file), "--dataset-type", "mcdataset"])
    assert (args.wandb_name, args.model) == ("-x", "-m")
