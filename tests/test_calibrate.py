"""--calibrate, from the flag to sets and bounded answers of new rows."""

import json

import numpy as np
import pytest
import torch
from conftest import build, run_folder, topic_rows, write_jsonl
from safetensors.torch import load_file, save_file

import main
from decisions import conformal
from modelwrappers import load_posterior
from scripts import predict
from utils.errors import UsageError

MAP = ["--modelwrapper", "map", "--max-train-steps", "6"]


@pytest.fixture
def flags(classifier_flags, tmp_path) -> list[str]:
    """200 training rows, of which 40 are held out."""
    write_jsonl(tmp_path / "train.jsonl", topic_rows(200, seed=7))
    write_jsonl(tmp_path / "test.jsonl", topic_rows(60, seed=8))
    return [*classifier_flags, "--data-dir", str(tmp_path)]


def rows(number: int = 30) -> list[dict]:
    return [{"text": row["text"]} for row in topic_rows(number, seed=9)]


def test_calibration_rows_are_neither_trained_nor_tuned_on(flags):
    _, dataset, _ = build([*flags, *MAP, "--calibrate", "auto", "--temperature-scaling"])
    index = {
        name: {row["index"] for row in getattr(dataset, f"{name}_rows")}
        for name in ("train", "tuning", "calibration", "held_out")
    }
    assert len(index["train"]) == 160
    assert len(index["tuning"]) == len(index["calibration"]) == 20
    assert not index["train"] & index["held_out"] and not index["tuning"] & index["calibration"]
    assert index["tuning"] | index["calibration"] == index["held_out"]
    _, alone, wrapper = build([*flags, *MAP, "--calibrate", "auto"])
    assert {row["index"] for row in alone.calibration_rows} == index["held_out"]
    assert wrapper.args.calibrate == "all"


def test_sets_of_new_rows_are_made_by_the_calibration_rows(flags):
    flags = [*flags, *MAP, "--calibrate", "auto"]
    main.main(flags)
    folder = run_folder(flags)
    stored = load_file(folder / "predictions-calibration.safetensors")
    probs = stored["log_probs"][:, 0].double().exp().numpy()
    own = np.sort(1 - probs[np.arange(40), stored["labels"].numpy()])
    threshold = own[36]  # ceil(41 * 0.9) = 37
    posterior = load_posterior(folder, device="cpu")
    for answer in posterior.answer(rows(), coverage=0.9):
        p = answer["probabilities"]
        # a text that is a calibration row, too, has the threshold's own score, but for rounding
        sure = {c: 1 - p[c] < threshold for c in p if abs(1 - p[c] - threshold) > 1e-6}
        assert {c for c in sure if c in answer["set"]} == {c for c in sure if sure[c]}
        assert answer["set"]
        assert answer["set"] == sorted(answer["set"], key=lambda c: -p[c])
    assert json.loads((folder / "bayes_config.json").read_text())["calibration"] == 40


@pytest.mark.parametrize("score", conformal.SCORES)
def test_a_file_of_rows_gets_the_sets_and_the_answered_share(score, flags, tmp_path, capsys):
    flags = [*flags, *MAP, "--calibrate", "auto", "--max-train-steps", "30"]
    main.main(flags)
    folder = run_folder(flags)
    labelled = topic_rows(60, seed=8)
    write_jsonl(tmp_path / "rows.jsonl", labelled)
    call = [str(folder), "--rows", str(tmp_path / "rows.jsonl")]
    wanted = ["--coverage", "0.8", "--set-score", score, "--max-risk", "0.4"]
    capsys.readouterr()
    assert predict.run([*call, *wanted, "--out", str(tmp_path / "out.jsonl")]) == 0
    told = capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    posterior = load_posterior(folder, device="cpu")
    again = posterior.answer(
        [{"text": row["text"]} for row in labelled], coverage=0.8, set_score=score, max_risk=0.4
    )
    for key in ("set", "answered"):
        assert [r[key] for r in records] == [r[key] for r in again]
    assert "probability 0.8 or more" in told and "at most 0.4 are wrong" in told
    answered = sum(r["answered"] for r in records)
    assert f"Answered: {answered} of 60 rows" in told
    covered = np.mean([r["label"] in r["set"] for r in records])
    assert f"In its set is the label of {covered:.3f} [" in told


def test_a_temperature_is_part_of_the_calibration(flags):
    flags = [*flags, *MAP, "--calibrate", "auto", "--temperature-scaling"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    stored = load_file(run_folder(flags) / "predictions-calibration.safetensors")
    raw = stored["log_probs"][:, 0].double() / posterior.temperature
    np.testing.assert_allclose(
        posterior.calibration.predictive, raw.softmax(-1).numpy(), rtol=1e-5, atol=1e-7
    )


def test_an_adapter_of_a_run_that_held_rows_out_can_be_calibrated_later(flags, tmp_path):
    trained = [*flags, *MAP, "--hold-out"]
    main.main(trained)
    later = [*flags, "--modelwrapper", "map", "--load-lora-path", str(run_folder(trained))]
    later += ["--log-path", "later", "--calibrate", "auto"]
    main.main(later)
    posterior = load_posterior(run_folder(later), device="cpu")
    assert len(posterior.calibration.labels) == 40
    posterior.answer(rows(3), coverage=0.5)
    # and it is kept by whoever loads that
    again = [*flags, "--modelwrapper", "map", "--load-lora-path", str(run_folder(later))]
    main.main([*again, "--log-path", "again"])
    kept = load_posterior(run_folder([*again, "--log-path", "again"]), device="cpu")
    assert np.array_equal(kept.calibration.predictive, posterior.calibration.predictive)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calibrate", "all", "--temperature-scaling"], "--calibrate half"),
        (["--calibrate", "auto", "--testing-set", "train_val"], "--testing-set train_val"),
        (["--calibrate", "auto", "--hold-out", "false"], "--hold-out is false"),
        (["--calibrate", "often"], "--calibrate"),
        (["--calibrate", "half", "--held-out-fraction", "0.005"], "no halves"),
    ],
)
def test_contradictions_are_told(more, message, flags, capsys):
    assert main.run([*flags, *MAP, *more]) == 2
    assert message in capsys.readouterr().err


def test_rows_that_had_a_say_already_do_not_calibrate(flags, capsys):
    trained = [*flags, *MAP, "--temperature-scaling"]
    main.main(trained)
    later = [*flags, "--modelwrapper", "map", "--load-lora-path", str(run_folder(trained))]
    assert main.run([*later, "--log-path", "later", "--calibrate", "auto"]) == 2
    assert "chosen by held-out rows" in capsys.readouterr().err
    # nor do those that were trained on
    whole = [*flags, *MAP, "--log-path", "whole"]
    main.main(whole)
    later = [*flags, "--modelwrapper", "map", "--load-lora-path", str(run_folder(whole))]
    assert main.run([*later, "--log-path", "later", "--calibrate", "auto"]) == 2
    assert "--hold-out" in capsys.readouterr().err


def test_sets_are_promised_for_the_draws_of_the_calibration_only(flags):
    flags = [*flags, "--modelwrapper", "blob", "--max-train-steps", "3", "--calibrate", "auto"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    posterior.answer(rows(2), coverage=0.8)
    with pytest.raises(UsageError, match="had 10 draws"):
        posterior.answer(rows(2), n_samples=3, coverage=0.8)
    more = load_posterior(run_folder(flags), device="cpu", bayes_eval_n_samples_final=20)
    with pytest.raises(UsageError, match="had 10 draws"):
        more.answer(rows(2), max_risk=0.5)


def test_what_is_asked_for_must_be_possible(flags):
    main.main([*flags, *MAP])
    posterior = load_posterior(run_folder([*flags, *MAP]), device="cpu")
    with pytest.raises(UsageError, match="--calibrate auto"):
        posterior.answer(rows(2), coverage=0.9)
    with pytest.raises(UsageError, match="coverge"):
        posterior.answer(rows(2), coverge=0.9)
    with_rows = [*flags, *MAP, "--calibrate", "auto", "--log-path", "calibrated"]
    main.main(with_rows)
    posterior = load_posterior(run_folder(with_rows), device="cpu")
    for wanted, message in (
        ({"coverage": 0.99}, "takes 99 calibration rows"),
        ({"coverage": 1.5}, "between 0 and 1"),
        ({"coverage": 0.9, "set_score": "best"}, "must be one of lac, aps, raps"),
        ({"coverage": 0.9, "per_class": True}, "class 1 has 0.*1 is 'entertainment'"),
        ({"max_risk": 0.01}, "takes 230 calibration rows"),
        ({"max_risk": 0.0}, "between 0 and 1"),
        ({"max_risk": 0.3, "confidence": 1.0}, "between 0 and 1"),
        ({"max_risk": 0.9, "confidence_by": "height"}, "must be one of"),
    ):
        with pytest.raises(UsageError, match=message):
            posterior.answer(rows(2), **wanted)


@pytest.mark.parametrize("name", ["predictive", "labels", "index", "mutual_information", None])
def test_a_damaged_calibration_is_an_error(name, flags):
    flags = [*flags, *MAP, "--calibrate", "auto"]
    main.main(flags)
    file = run_folder(flags) / "calibration.safetensors"
    tensors = load_file(file)
    if name is None:
        file.unlink()
    else:
        tensors[name] = -torch.ones_like(tensors[name])
        save_file(tensors, file)
    with pytest.raises(UsageError, match="calibration"):
        load_posterior(run_folder(flags), device="cpu")


def test_rows_to_label_are_those_with_the_highest_score(flags, tmp_path, capsys):
    run = [*flags, "--modelwrapper", "blob", "--max-train-steps", "6", "--bayes-eps", "0.5"]
    main.main(run)
    folder = run_folder(run)
    write_jsonl(tmp_path / "rows.jsonl", rows())
    call = [str(folder), "--rows", str(tmp_path / "rows.jsonl"), "--window", "11"]
    answers = load_posterior(folder, device="cpu").answer(rows())
    assert predict.run([*call, "--out", str(tmp_path / "all.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]

    def chosen(*more: str) -> list[dict]:
        out = tmp_path / "label.jsonl"
        assert predict.run([*call, "--acquire", "5", *more, "--out", str(out)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    for by, key in (("bald", "mutual_information"), ("entropy", "entropy")):
        best = sorted(answers, key=lambda a: -a[key])[:5]
        found = chosen("--by", by)
        assert [r["row"] for r in found] == [r["row"] for r in best], by
        np.testing.assert_allclose([r["score"] for r in found], [r[key] for r in best], atol=1e-6)
    assert [r["row"] for r in chosen()] == [r["row"] for r in chosen("--by", "bald")]
    for by in ("powerbald", "random"):
        one, other = ([r["row"] for r in chosen("--by", by, "--seed", seed)] for seed in ("1", "2"))
        assert one != other and len(set(one)) == 5
    joint = chosen("--by", "batchbald")
    assert len({r["row"] for r in joint}) == 5
    assert [r["score"] for r in joint] == sorted((r["score"] for r in joint), reverse=True)
    capsys.readouterr()
    for more, message in (
        (["--acquire", "31"], "31 rows shall be chosen; there are 30"),
        (["--by", "bald"], "--acquire K is not given"),
        (["--acquire", "2", "--n-draws", "1"], "a single draw has none"),
    ):
        assert predict.run([*call, *more, "--out", str(tmp_path / "no.jsonl")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()


def test_draws_that_differ_by_row_are_no_joint_draws(flags, tmp_path, capsys):
    run = [*flags, "--modelwrapper", "mcdropout", "--max-train-steps", "3"]
    main.main(run)
    write_jsonl(tmp_path / "rows.jsonl", rows(6))
    call = [str(run_folder(run)), "--rows", str(tmp_path / "rows.jsonl"), "--out"]
    call += [str(tmp_path / "out.jsonl"), "--acquire", "2"]
    assert predict.run([*call, "--by", "batchbald"]) == 2
    assert "other weights in every row" in capsys.readouterr().err
    assert predict.run([*call, "--by", "bald"]) == 0
