"""BLoB: the published arithmetic, the optimizer contract, the KL's weights, published adapters."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build, kill_and_resume, run_folder
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import main
from modelwrappers import backbone, stochastic_lora
from modelwrappers.blob import BLoB
from modelwrappers.engine.adapter_config import read_adapter_config
from utils.hub import adapter_folder

REFERENCE = Path(__file__).parent / "reference" / "blob_trajectory"
PREFIX = "base_model.model."


# --- conformance ----------------------------------------------------------------------------------


class Recorded:
    """The seven batches of the reference; copies the parameters at the start of each epoch."""

    def __init__(self, batches, wrapper) -> None:
        self.batches = batches
        self.wrapper = wrapper
        self.snapshots = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.snapshots.append(adapter(self.wrapper))
        return iter(self.batches)


def adapter(wrapper) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in wrapper.named_parameters() if "lora_" in name}


def reference_parameters(file: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters of the original under this project's names: `/` for `.`, one prefix for two."""
    tensors = load_file(REFERENCE / file)
    names = {k: k.removeprefix(prefix).replace("/", ".") for k in tensors if k.startswith(prefix)}
    return {name.replace(2 * PREFIX, PREFIX): tensors[key] for key, name in names.items()}


def reference_wrapper(tmp_path, monkeypatch):
    """The reference's run on the real loop; Gaussian noise is 0, so signs do not matter."""
    settings = json.loads((REFERENCE / "config.json").read_text())
    args = main.parse_args(
        [
            *(
                "--dataset-type",
                "mcdataset",
                "--dataset",
                "bbc_headlines",
                "--modelwrapper",
                "blob",
            ),
            *("--model", str(REFERENCE / "base"), "--output-dir", str(tmp_path), "--nowand"),
            *("--device", "cpu", "--save-per-steps", "0", "--eval-per-steps", "0"),
            *("--max-train-steps", str(settings["max_train_steps"]), "--early-stop-steps", "28"),
            *("--batch-size", str(settings["batch_size"]), "--lr", str(settings["lr"])),
            *("--bayes-kllr", str(settings["bayes_kllr"]), "--warmup-ratio", "0.1"),
            *("--bayes-beta", str(settings["bayes_beta"]), "--bayes-klreweighting"),
        ]
    )
    accelerator = main.build_accelerator(args)
    model = backbone.load_model(args, 3, accelerator.device)
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        target_modules=["q_proj", "v_proj", "lm_head"],
    )
    wrapper = BLoB(model, config, args, accelerator)
    wrapper.run_folder.path.mkdir(parents=True)
    monkeypatch.setattr(
        stochastic_lora.Draws,
        "noise",
        lambda self, owner, shape, like: like.new_zeros(self.n_samples, *shape),
    )
    tensors = load_file(REFERENCE / "batches.safetensors")
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.arange(4)}
        for ids, mask, labels in zip(
            tensors["ids"], tensors["mask"], tensors["labels"], strict=True
        )
    ]
    loader = Recorded(batches, wrapper)
    dataset = SimpleNamespace(
        target_ids=torch.tensor(settings["target_ids"]),
        train_dataloader=loader,
        test_dataloader=batches,
        num_samples=settings["num_samples"],
        num_labels=3,
    )
    wrapper.prepare_for_fit_evaluate(dataset)
    wrapper.load_state_dict(reference_parameters("init.safetensors"), strict=False)
    return wrapper, loader, tensors


def test_the_real_loop_reproduces_the_originals_trajectory(tmp_path, monkeypatch):
    wrapper, loader, tensors = reference_wrapper(tmp_path, monkeypatch)
    initial = reference_parameters("init.safetensors")
    assert adapter(wrapper).keys() == initial.keys()
    assert wrapper.num_kl_batches == 7
    wrapper.fit(loader)
    assert wrapper.step == 28
    snapshots = [*loader.snapshots[1:], adapter(wrapper)]
    assert len(snapshots) == 4
    worst = {"lora_A.": 0.0, "lora_B.": 0.0, "lora_A_rho": 0.0}
    for epoch, ours in enumerate(snapshots):
        theirs = reference_parameters("trajectory.safetensors", f"epoch{epoch}/")
        for name, value in theirs.items():
            kind = next(kind for kind in worst if kind in name)
            # relative to the tensor's size: single entries pass through zero
            deviation = ((ours[name] - value).norm() / value.norm()).item()
            worst[kind] = max(worst[kind], deviation)
            assert (value - initial[name]).norm() > 0.01 * initial[name].norm() or kind != "lora_A."
    print(f"largest relative deviations over four epochs: {worst}")
    assert worst["lora_A."] < 1e-4 and worst["lora_B."] < 1e-4 and worst["lora_A_rho"] < 2e-3
    wrapper.eval()
    logits = torch.stack(
        [
            wrapper.forward_logits(wrapper.model_inputs(b), sample=False)[:, 0]
            for b in loader.batches
        ]
    )
    torch.testing.assert_close(logits, tensors["final_logits"], rtol=1e-3, atol=1e-3)


# --- the optimizer contract -----------------------------------------------------------------------


def prepared(flags, *more):
    return build([*flags, "--modelwrapper", "blob", "--max-train-steps", "10", *more])


def test_each_parameter_is_in_the_optimizers_of_the_contract(causal_flags, classifier_flags):
    for flags in (causal_flags, classifier_flags):
        _, _, wrapper = prepared(flags)
        names = {id(p): name for name, p in wrapper.named_parameters()}

        def members(optimizer, names=names):
            return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

        trainable = {name for name, _ in wrapper.trainable_parameters()}
        rho = {name for name in trainable if "lora_A_rho" in name}
        mean = {name for name in trainable if ".lora_A." in name}
        assert rho and len(rho) == len(mean)
        assert members(wrapper.optimizers["lora"]) == trainable - rho
        assert members(wrapper.optimizers["kl"]) == rho | mean
        assert type(wrapper.optimizers["lora"]) is torch.optim.AdamW
        assert type(wrapper.optimizers["kl"]) is torch.optim.SGD


def test_one_update_is_the_contract_written_out(causal_flags):
    """AdamW on M and B with the NLL's gradient; then SGD with pi KL at the new M, G with both."""
    _, dataset, wrapper = prepared(causal_flags, "--bayes-klreweighting", "--bayes-kllr", "0.01")
    batch = next(iter(dataset.train_dataloader))
    wrapper.train()
    for p in wrapper.parameters():  # B = 0 would leave M and G without a gradient
        if p.requires_grad and p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.1)
    wrapper.training_step(batch)
    names = dict(wrapper.trainable_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    nll_gradient = {name: p.grad.clone() for name, p in names.items()}
    pi = 2.0 / (2 ** (wrapper.num_kl_batches + 1) - 1)
    adam = {
        name: p.detach().clone().requires_grad_() for name, p in names.items() if "rho" not in name
    }
    for name, p in adam.items():
        p.grad = nll_gradient[name]
    reference = torch.optim.AdamW(adam.values(), lr=1e-2, eps=1e-6, weight_decay=0.0)
    reference.step()
    wrapper.optimizer_step()
    for name, p in names.items():
        if "lora_B" in name:
            expected = adam[name]
        elif "lora_A_rho" in name:
            g = before[name]
            kl = 2 * g**3 / 0.04 - 2 / g
            expected = g - 0.01 * (nll_gradient[name] + pi * kl)
            assert nll_gradient[name].abs().sum() > 0
        else:
            expected = adam[name] - 0.01 * pi * adam[name] / 0.04
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
        assert p.grad is None, "nothing is left for the next update"


def test_both_optimizers_follow_warm_up_and_decay(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "10"]
    flags += ["--warmup-ratio", "0.2"]
    main.main(flags)
    lines = [json.loads(x) for x in (run_folder(flags) / "history.jsonl").read_text().splitlines()]
    factors = [0, 1 / 2, *[(10 - step) / 8 for step in range(2, 10)]]
    assert [line["lr"]["lora"] for line in lines] == pytest.approx([1e-2 * f for f in factors])
    assert [line["lr"]["kl"] for line in lines] == pytest.approx([0.02 * f for f in factors])
    assert all(line["kl"] > 0 for line in lines)


def test_several_training_draws_are_the_mean_of_their_nlls(causal_flags, monkeypatch):
    """The ELBO's expectation of the log-likelihood, not the likelihood of mean logits."""
    _, dataset, wrapper = prepared(causal_flags, "--bayes-train-n-samples", "3")
    batch = next(iter(dataset.train_dataloader))
    logits = 3 * torch.randn(8, 3, 5, requires_grad=True)
    monkeypatch.setattr(wrapper, "training_logits", lambda batch, n: logits[:, :n])
    nll = wrapper.training_step(batch)["nll"]
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(logits[:, n], batch["labels"]) for n in range(3)]
    ).mean()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)


# --- the KL's weight ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "length"),
    [(640, 316), (1119, 393), (2251, 518), (2558, 544), (4957, 706), (9427, 909)],
)
def test_cycle_lengths_are_the_published_ones(rows, length, causal_flags):
    _, _, wrapper = prepared(causal_flags, "--batch-size", "4", "--bayes-datasetrescaling")
    wrapper.dataset = SimpleNamespace(num_samples=rows)
    assert wrapper._cycle_length() == length


def test_kl_weights_double_within_a_cycle_and_repeat(causal_flags):
    _, _, wrapper = prepared(causal_flags, "--bayes-klreweighting")
    assert wrapper.num_kl_batches == 5, "40 rows in batches of 8"
    weights = [wrapper.kl_weight(step) for step in range(1, 11)]
    assert weights[:5] == pytest.approx([2**i / (2**6 - 1) for i in range(1, 6)])
    assert weights[5:] == weights[:5]
    wrapper.num_kl_batches = 5000
    assert wrapper.kl_weight(5000) == pytest.approx(0.5) and wrapper.kl_weight(1) == 0.0
    _, _, plain = prepared(causal_flags)
    assert plain.kl_weight(1) == plain.kl_weight(4) == 1 / 5


def test_a_killed_run_resumes_with_the_kl_where_it_was(causal_flags, monkeypatch):
    """The cycle position matters: an uninterrupted run and a resumed one agree bit for bit."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "13", "--checkpoint"]
    flags += ["--bayes-klreweighting", "--save-per-steps", "3", "--bayes-train-n-samples", "2"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)

    kill_and_resume(cut, BLoB, lambda wrapper: wrapper.step == 7, monkeypatch)
    a, b = (load_file(run_folder(f) / "adapter_model.safetensors") for f in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- prediction -----------------------------------------------------------------------------------


def test_draws_are_chunked_by_eval_batch_size(causal_flags, monkeypatch):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "0"]
    flags += ["--eval-batch-size", "20", "--flipout", "none"]
    _, dataset, wrapper = build(flags)
    rows = []
    original = BLoB.batch_logits
    monkeypatch.setattr(
        BLoB,
        "batch_logits",
        lambda self, batch: rows.append(len(batch["input_ids"])) or original(self, batch),
    )
    batch = wrapper.model_inputs(next(iter(dataset.train_dataloader)))
    wrapper.eval()
    logits = wrapper.forward_logits(batch, n_samples=5)
    assert logits.shape == (8, 5, 5) and rows == [16, 16, 8]


def test_without_flipout_a_draw_is_one_set_of_weights_for_the_whole_data_set(causal_flags):
    """Predictions of a draw do not depend on how the rows were batched."""
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "5", "--flipout", "none"]
    flags += ["--bayes-eps", "0.4", "--bayes-kllr", "0"]
    results = []
    for size in ("5", "64"):
        _, dataset, wrapper = build([*flags, "--eval-batch-size", size, "--log-path", size])
        wrapper.fit_evaluate()
        results.append(wrapper.predict(dataset.test_dataloader).log_probs)
    assert results[0].std(1).max() > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_notsample_predicts_with_the_posterior_mean(causal_flags):
    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "5"]
    main.main([*flags, "--bayes-inference-notsample"])
    folder = run_folder(flags)
    assert load_file(folder / "predictions.safetensors")["log_probs"].shape == (37, 1, 5)
    assert (
        json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]["n_draws"]
        == 1
    )


# --- adapters of the original ---------------------------------------------------------------------


def test_a_published_adapter_loads_with_its_posterior(tmp_path):
    """Doubled prefix, lora_A_rho, the whole base head riding along."""
    args, model = _reference_flags(tmp_path)
    config = backbone.lora_config(
        args, model, read_adapter_config(REFERENCE / "adapter", "--load-lora-path")
    )
    wrapper = BLoB(model, config, args, main.build_accelerator(args))
    wrapper.load_adapter_weights(REFERENCE / "adapter")
    stored = load_file(REFERENCE / "adapter" / "adapter_model.safetensors")
    ours = adapter(wrapper)
    for key, value in stored.items():
        if "lora_" not in key:
            continue
        name = key.replace(2 * PREFIX, PREFIX)
        name = (
            name.replace(".weight", ".default.weight")
            if name.endswith(".weight")
            else f"{name}.default"
        )
        assert torch.equal(ours[name], value), key
    wrapper.target_ids = torch.tensor([10, 20, 30])
    batches = load_file(REFERENCE / "batches.safetensors")
    batch = {"input_ids": batches["ids"][0], "attention_mask": batches["mask"][0]}
    wrapper.eval()
    with torch.no_grad():
        mean = wrapper.forward_logits(wrapper.model_inputs(batch), sample=False)
        draws = wrapper.forward_logits(wrapper.model_inputs(batch), n_samples=4)
    torch.testing.assert_close(mean[:, 0], batches["final_logits"][0], rtol=1e-3, atol=1e-3)
    assert draws.shape == (4, 4, 3) and draws.std(1).min() > 0


def _reference_flags(tmp_path, *more):
    args = main.parse_args(
        [
            *[
                "--dataset-type",
                "mcdataset",
                "--dataset",
                "bbc_headlines",
                "--modelwrapper",
                "blob",
            ],
            *("--model", str(REFERENCE / "base"), "--load-lora-path", str(REFERENCE / "adapter")),
            *("--output-dir", str(tmp_path), "--nowand", "--device", "cpu"),
            *more,
        ]
    )
    return args, backbone.load_model(args, 3, torch.device("cpu"))


def test_an_adapter_in_a_hub_repo_is_downloaded_by_subfolder(tmp_path, monkeypatch):
    repo = tmp_path / "snapshot"
    shutil.copytree(REFERENCE / "adapter", repo / "blob" / "seed1")
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    args, _ = _reference_flags(
        tmp_path, "--load-lora-huggingface-repo", "owner/repo", "--load-lora-path", "blob/seed1"
    )
    assert adapter_folder(args) == repo / "blob" / "seed1"
    assert asked == {"repo_id": "owner/repo", "allow_patterns": ["blob/seed1/*"]}


def test_a_point_estimate_gets_its_spread_from_bayes_eps(causal_flags, capsys):
    flags = [*causal_flags, "--checkpoint", "--max-train-steps", "3"]
    main.main([*flags, "--modelwrapper", "mle"])
    folder = run_folder([*flags, "--modelwrapper", "mle"])
    _, _, wrapper = build(
        [
            *causal_flags,
            "--modelwrapper",
            "blob",
            "--load-lora-path",
            str(folder),
            "--bayes-eps",
            "0.3",
        ]
    )
    assert "has no lora_A_rho" in capsys.readouterr().out
    stored = load_file(folder / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(adapter(wrapper)[f"{name}.default.weight"], stored[f"{name}.weight"])
    rho = adapter(wrapper)[f"{name}_rho.default"]
    assert rho.min() >= 0.3 / math.sqrt(2) and rho.max() <= 0.3


def test_a_posterior_with_a_missing_layer_is_an_error(causal_flags):
    from utils.errors import UsageError

    flags = [*causal_flags, "--modelwrapper", "blob", "--checkpoint", "--max-train-steps", "1"]
    main.main(flags)
    file = run_folder(flags) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A_rho")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"no weights for .*layers.1.self_attn.q_proj.lora_A_rho"):
        build([*causal_flags, "--modelwrapper", "blob", "--load-lora-path", str(file.parent)])


def test_stock_peft_reads_the_posterior_mean(causal_flags, tiny_llama):
    flags = [*causal_flags, "--modelwrapper", "blob", "--checkpoint", "--max-train-steps", "5"]
    flags += ["--apply-classhead-lora"]
    main.main(flags)
    folder = run_folder(flags)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), folder
    ).eval()
    _, dataset, wrapper = build(
        [*flags[:-3], "--max-train-steps", "0", "--load-lora-path", str(folder)]
    )
    wrapper.eval()
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    torch.testing.assert_close(
        wrapper.class_logits(stock(**batch)), wrapper.forward_logits(batch, sample=False)[:, 0]
    )
