"""A saved posterior describes itself: `load_posterior`, the hub, the model card."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_folder
from safetensors.torch import load_file

import main
from dataset import build_dataset
from modelwrappers import WRAPPERS, load_posterior
from utils.errors import UsageError

METHODS = {"map": [], "blob": ["--bayes-eps", "0.3", "--flipout", "none"]}


@pytest.fixture(params=[(m, k) for m in METHODS for k in ("causal_flags", "classifier_flags")])
def trained(request):
    method, kind = request.param
    flags = [*request.getfixturevalue(kind), "--modelwrapper", method, *METHODS[method]]
    flags += ["--checkpoint", "--max-train-steps", "4", "--bayes-eval-n-samples-final", "6"]
    main.main(flags)
    return flags


def test_load_posterior_predicts_as_the_run_did(trained):
    folder = run_folder(trained)
    posterior = load_posterior(folder, device="cpu")
    assert type(posterior) is WRAPPERS[posterior.args.modelwrapper] and not posterior.training
    dataset = build_dataset(main.parse_args(trained), posterior.accelerator)
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-4, atol=1e-5)
    assert posterior.answers == ["business", "entertainment", "politics", "sports", "tech"]


def test_load_posterior_reads_a_hub_repo(trained, monkeypatch, tmp_path):
    shutil.copytree(run_folder(trained), tmp_path / "snapshot")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo: str(tmp_path / "snapshot")
    )
    assert load_posterior("owner/repo", device="cpu").answers


def test_pushing_sends_adapter_posterior_and_card(trained, monkeypatch):
    """Everything but the upload itself, which needs a network."""
    sent = {}

    def upload_folder(self, repo_id, folder_path):
        assert repo_id == "owner/repo"
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: None)
    posterior = load_posterior(run_folder(trained), device="cpu")
    posterior.push_to_hub("owner/repo")
    assert {"adapter_model.safetensors", "adapter_config.json", "bayes_config.json"} <= set(sent)
    card = sent["README.md"].decode()
    metrics = json.loads((run_folder(trained) / "metrics.json").read_text())["datasets"]
    assert posterior.args.modelwrapper in card and "bbc_headlines" in card
    assert f"{metrics['bbc_headlines']['nll']:.4f}" in card


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_base_is_quantised_as_it_was(causal_flags, quantization):
    flags = [*causal_flags, "--modelwrapper", "blob", "--flipout", "none", "--checkpoint"]
    flags += ["--max-train-steps", "3", "--quantization", quantization]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    assert posterior.args.quantization == quantization
    dataset = build_dataset(main.parse_args(flags), posterior.accelerator)
    stored = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-3, atol=5e-3)


def test_a_hub_repo_sets_no_other_flags_and_brings_no_code(trained, monkeypatch, tmp_path):
    shutil.copytree(run_folder(trained), tmp_path / "snapshot")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo: str(tmp_path / "snapshot")
    )
    file = tmp_path / "snapshot" / "bayes_config.json"
    config = json.loads(file.read_text())
    flags = config["flags"] | {"trust_remote_code": True}
    file.write_text(json.dumps(config | {"flags": flags, "trust_remote_code": True}))
    assert load_posterior("owner/repo", device="cpu").args.trust_remote_code is False
    file.write_text(json.dumps(config | {"modelwrapper": "evil.py:Evil"}))
    with pytest.raises(UsageError, match="code is not taken from a hub repo"):
        load_posterior("owner/repo", device="cpu")


def test_an_adapter_that_does_not_describe_itself_is_an_error(trained):
    folder = run_folder(trained)
    (folder / "bayes_config.json").unlink()
    with pytest.raises(UsageError, match=r"no file .*bayes_config.json"):
        load_posterior(folder)


def test_a_name_that_is_neither_folder_nor_repo_is_an_error():
    with pytest.raises(UsageError, match="neither a folder nor a hub repo"):
        load_posterior("nobody/nothing")
