"""Deep ensemble: independent members, one mixed batch, whole folders, resume within a member."""

import json
import shutil

import pytest
import torch
from conftest import build, kill_and_resume, run_folder
from safetensors.torch import load_file

import main
from modelwrappers.deepensemble import DeepEnsemble
from utils.errors import UsageError
from utils.metrics import posterior_predictive

KINDS = ["causal_flags", "classifier_flags"]


def ensemble(flags, *more, size=3):
    flags = [*flags, "--modelwrapper", "deepensemble", "--ensemble-n", str(size), *more]
    return [*flags, "--max-train-steps", "5", "--checkpoint"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_evaluation_member_by_member(kind, request):
    flags = ensemble(request.getfixturevalue(kind), "--eval-batch-size", "16")
    _, dataset, wrapper = build(flags)
    wrapper.fit_evaluate()
    mixed = wrapper.predict(dataset.test_dataloader).log_probs
    assert mixed.shape == (37, 3, 5)
    wrapper.eval()
    for number, name in enumerate(wrapper.members):
        wrapper.set_adapter(name)
        for batch in dataset.test_dataloader:
            with torch.no_grad():
                alone = wrapper.batch_logits(wrapper.model_inputs(batch)).log_softmax(-1)
            torch.testing.assert_close(mixed[batch["index"], number], alone, rtol=1e-5, atol=1e-5)
    assert mixed.std(1).min() > 0, "members differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [[], ["--apply-classhead-lora"]])
def test_members_begin_and_end_apart(kind, head, request):
    _, _, wrapper = build(ensemble(request.getfixturevalue(kind), *head))
    begin = {n: p.detach().clone() for n, p in wrapper.state_parameters()}
    for name in [n for n in begin if ".default" in n]:
        other = begin[name.replace(".default", ".member1")]
        constant = begin[name].abs().sum() == 0 or "bias" in name or "pooler" in name
        assert constant or not torch.equal(begin[name], other), name
    wrapper.fit_evaluate()
    end = dict(wrapper.state_parameters())
    for name, value in end.items():
        assert not torch.equal(value, begin[name]), f"{name} was trained"
    for name in [n for n in end if ".default" in n]:
        assert not torch.equal(end[name], end[name.replace(".default", ".member2")])


def test_an_ensemble_of_one_is_map(causal_flags, classifier_flags):
    for flags in (causal_flags, classifier_flags):
        one = main.main([*ensemble(flags, size=1), "--opt-wd", "1e-5"])
        assert one == main.main([*flags, "--modelwrapper", "map", "--max-train-steps", "5"])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_as_one_folder_and_loaded_whole(kind, request):
    flags = ensemble(request.getfixturevalue(kind))
    main.main(flags)
    folder = run_folder(flags)
    assert {p.parent.name for p in folder.glob("*/adapter_config.json")} == {"member1", "member2"}
    stored = load_file(folder / "predictions.safetensors")["log_probs"]
    base = request.getfixturevalue(kind)
    loaded = [*base, "--modelwrapper", "deepensemble", "--load-lora-path", str(folder)]
    _, dataset, again = build(loaded)
    assert len(again.members) == 3, "the folder knows"
    torch.testing.assert_close(
        again.predict(dataset.test_dataloader).log_probs, stored, rtol=1e-5, atol=1e-5
    )


def test_the_size_of_an_ensemble_in_a_hub_repo_is_found_there(causal_flags, tmp_path, monkeypatch):
    first = ensemble(causal_flags, size=2)
    trained = main.main(first)
    repo = tmp_path / "snapshot"
    shutil.copytree(run_folder(first), repo / "runs" / "seed1")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(repo)
    )
    flags = [*causal_flags, "--modelwrapper", "deepensemble", "--log-path", "again"]
    flags += ["--load-lora-huggingface-repo", "owner/repo", "--load-lora-path", "runs/seed1"]
    _, _, wrapper = build(flags)
    assert wrapper.members == ["default", "member1"]
    assert main.main(flags) == pytest.approx(trained, abs=1e-5)


def test_an_ensemble_of_one_loaded_as_three_is_an_error(causal_flags):
    flags = ensemble(causal_flags, size=1)
    main.main(flags)
    with pytest.raises(UsageError, match=r"holds 1 member\(s\), but --ensemble-n is 3"):
        build(
            [
                *(*causal_flags, "--modelwrapper", "deepensemble", "--ensemble-n", "3"),
                *("--load-lora-path", str(run_folder(flags))),
            ]
        )


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_killed_run_resumes_in_the_member_it_was_in(causal_flags, monkeypatch, member):
    flags = [*ensemble(causal_flags, "--lora-dropout", "0.2"), "--save-per-steps", "2"]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)
    kill_and_resume(
        cut,
        DeepEnsemble,
        lambda wrapper: wrapper.member == member and wrapper.step == 3,
        monkeypatch,
    )
    for path in run_folder(whole).rglob("adapter_model.safetensors"):
        other = run_folder(cut) / path.relative_to(run_folder(whole))
        assert path.read_bytes() == other.read_bytes(), path
    history = [
        [json.loads(line)["step"] for line in (run_folder(f) / "history.jsonl").open()]
        for f in (whole, cut)
    ]
    assert history[0] == history[1] == list(range(1, 16))


def test_probabilities_are_averaged_not_logits(causal_flags):
    _, dataset, wrapper = build(ensemble(causal_flags))
    metrics = wrapper.fit_evaluate()
    log_probs, labels, _ = wrapper.predictions
    mean = log_probs.exp().mean(1)
    assert metrics.nll == pytest.approx(-mean[range(37), labels].log().mean().item(), rel=1e-5)
    batch = wrapper.model_inputs(next(iter(dataset.test_dataloader)))
    wrapper.eval()
    with torch.no_grad():
        point = wrapper.forward_logits(batch, sample=False)
        members = wrapper.forward_logits(batch)
    expected = posterior_predictive(members.log_softmax(-1)).float()
    torch.testing.assert_close(point[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_ensemble_leaves_no_member_of_a_larger_one(causal_flags):
    for size in (3, 2):
        flags = ensemble(causal_flags, size=size)
        main.main([*flags, "--overwrite"])
    folder = run_folder(flags)
    assert {p.parent.name for p in folder.glob("*/adapter_config.json")} == {"member1"}


@pytest.mark.parametrize("extra", [["--whole-epochs"], ["--early-stop-steps", "4"]])
def test_states_of_members_are_in_order_when_their_length_is_not_max_train_steps(
    causal_flags, monkeypatch, extra
):
    flags = [*causal_flags, "--modelwrapper", "deepensemble", "--ensemble-n", "2", "--checkpoint"]
    flags += ["--max-train-steps", "7", "--save-per-steps", "2", *extra]
    whole, cut = [*flags, "--log-path", "whole"], [*flags, "--log-path", "cut"]
    main.main(whole)

    def when(wrapper):
        return wrapper.member == 1 and wrapper.step == 3

    kill_and_resume(cut, DeepEnsemble, when, monkeypatch)
    a, b = (
        [json.loads(line)["step"] for line in (run_folder(f) / "history.jsonl").open()]
        for f in (whole, cut)
    )
    assert a == b == list(range(1, (20 if "--whole-epochs" in extra else 8) + 1))
    for path in run_folder(whole).rglob("adapter_model.safetensors"):
        other = run_folder(cut) / path.relative_to(run_folder(whole))
        assert path.read_bytes() == other.read_bytes()


def test_untrained_members_do_not_count_while_one_is_trained(causal_flags):
    _, dataset, wrapper = build(ensemble(causal_flags))
    assert wrapper.predict(dataset.test_dataloader).log_probs.shape[1] == 1
    wrapper.fit_evaluate()
    assert wrapper.predict(dataset.test_dataloader).log_probs.shape[1] == 3
