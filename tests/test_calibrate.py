"""--calibrate, from the flag to sets and bounded answers of new rows."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TOPIC_WORDS, build, run_folder, topic_rows, write_jsonl
from safetensors import safe_open
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
        # a text that is a calibration row, too, may be in another batch: other rounding
        sure = {c: 1 - p[c] < threshold for c in p if abs(1 - p[c] - threshold) > 1e-6}
        assert {c for c in sure if c in answer["set"]} == {c for c in sure if sure[c]}
        assert answer["set"]
        assert answer["set"] == sorted(answer["set"], key=lambda c: -p[c])
    kept = json.loads((folder / "bayes_config.json").read_text())["calibration"]
    assert kept == {"rows": 40, "n_draws": 0, "temperature": None, "unseen": True}


def test_predictions_of_calibration_rows_say_whether_they_were_unseen(flags, tmp_path):
    def told(run: list[str]) -> str:
        main.main(run)
        with safe_open(run_folder(run) / "predictions-calibration.safetensors", "pt") as file:
            return file.metadata()["unseen"]

    own = [*flags, *MAP, "--calibrate", "auto"]
    assert told(own) == "true"
    stock = tmp_path / "stock"  # what PEFT alone leaves: nothing says what it was trained on
    stock.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run_folder(own) / name, stock)
    loaded = [*flags, "--modelwrapper", "map", "--load-lora-path", str(stock)]
    loaded += ["--calibrate", "auto", "--checkpoint-name", "loaded"]
    assert told(loaded) == "false"


def test_answers_say_what_is_promised_of_them_and_on_what_condition(flags, tmp_path, capsys):
    """In Python the very sentences that predict.py tells; where nothing is promised, none."""
    flags = [*flags, *MAP, "--calibrate", "auto"]
    main.main(flags)
    write_jsonl(tmp_path / "rows.jsonl", rows(3))
    call = [str(run_folder(flags)), "--rows", str(tmp_path / "rows.jsonl"), "--coverage", "0.9"]
    call += ["--out", str(tmp_path / "out.jsonl")]
    capsys.readouterr()
    assert predict.run([*call, "--max-risk", "0.9"]) == 0
    told = capsys.readouterr().err
    posterior = load_posterior(run_folder(flags), device="cpu")
    sets = posterior.answer(rows(3), coverage=0.9).guarantee
    both = posterior.answer(rows(3), coverage=0.9, max_risk=0.9).guarantee
    assert "with probability 0.9 or more, for rows like the 40 calibration rows" in sets
    assert both.startswith(f"{sets} Answers where") and "at most 0.9 are wrong" in both
    assert all(sentence in told.replace("\n", " ") for sentence in both.split(". "))
    assert posterior.answer(rows(3)).guarantee is None
    posterior.calibration_facts = posterior.calibration_facts.model_copy(update={"unseen": False})
    assert posterior.answer(rows(3), coverage=0.9).guarantee.endswith("promise too much.")


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


def test_rows_that_come_one_by_one_get_the_sets_that_they_get_together(flags):
    """And not all of them the random number of a first row, which has a coverage of its own."""
    flags = [*flags, *MAP, "--calibrate", "auto", "--max-train-steps", "3"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    asked = {"coverage": 0.5, "set_score": "aps"}
    texts = {row["text"]: row for row in rows(40)}
    together = posterior.answer(texts.values(), **asked)
    backwards = posterior.answer(reversed(texts.values()), **asked)[::-1]
    single = [posterior.answer([row], **asked)[0] for row in texts.values()]
    assert len({len(a["set"]) for a in together}) > 1
    assert [a["set"] for a in together] == [a["set"] for a in backwards]
    assert [a["set"] for a in together] == [a["set"] for a in single]


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


def test_an_adapter_that_its_held_out_rows_may_have_chosen_is_not_calibrated_by_them(flags, capsys):
    """Nor is what comes of it, by whatever method."""
    seen = [*flags, *MAP, "--testing-set", "train_val", "--checkpoint"]
    main.main(seen)
    copied = [*flags, "--modelwrapper", "map", "--load-lora-path", str(run_folder(seen))]
    copied += ["--log-path", "copied", "--checkpoint"]
    main.main(copied)
    for source in (seen, copied):
        for method in (["map"], ["blob", "--max-train-steps", "2"]):
            later = [*flags, "--load-lora-path", str(run_folder(source)), "--calibrate", "auto"]
            assert main.run([*later, "--log-path", "later", "--modelwrapper", *method]) == 2
            assert "was evaluated on its held-out rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calibrate", "all", "--temperature-scaling"], "--calibrate half"),
        (["--calibrate", "auto", "--testing-set", "train_val"], "--testing-set train_val"),
        (["--calibrate", "auto", "--hold-out", "false"], "--hold-out is false"),
        (["--calibrate", "often"], "--calibrate"),
        (["--calibrate", "half", "--held-out-fraction", "0.005"], "leave nothing in one half"),
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


@pytest.mark.parametrize(
    "more",
    [
        ["--temperature-scaling"],
        ["--bayes-eval-n-samples-final", "3"],
        ["--bayes-inference-notsample"],
        ["--draws-adaptive", "--bayes-eval-n-samples-final", "16"],
        ["--testing-set", "train_val"],
    ],
    ids=lambda more: more[0],
)
def test_a_run_that_predicts_otherwise_does_not_keep_a_calibration(more, flags):
    calibrated = [*flags, "--modelwrapper", "blob", "--max-train-steps", "3", "--calibrate", "all"]
    main.main(calibrated)
    later = [*flags, "--modelwrapper", "blob", "--load-lora-path", str(run_folder(calibrated))]
    later += ["--log-path", "later"]
    main.main([*later, *more])
    posterior = load_posterior(run_folder([*later, *more]), device="cpu")
    assert posterior.calibration is None
    with pytest.raises(UsageError, match="--calibrate auto"):
        posterior.answer(rows(2), coverage=0.8)


def test_a_calibration_of_another_temperature_is_not_believed(flags):
    flags = [*flags, *MAP, "--calibrate", "auto", "--temperature-scaling"]
    main.main(flags)
    file = run_folder(flags) / "bayes_config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"temperature": 1.5}))
    assert load_posterior(run_folder(flags), device="cpu").calibration is None


def table_flags(flags: list[str], file) -> list[str]:
    at = flags.index("--data-dir")
    while "--data-dir" in flags:
        at = flags.index("--data-dir")
        flags = [*flags[:at], *flags[at + 2 :]]
    return [*flags, "--dataset", str(file), "--text-column", "text", "--label-column", "topic"]


def different(number: int, first: int = 0) -> list[dict]:
    """Rows of which no two have the same tokens."""
    words = [word for words in TOPIC_WORDS.values() for word in words.split()]
    topics = sorted(TOPIC_WORDS)
    found = []
    for i in range(first, first + number):
        text = " ".join(words[(i // len(words) ** k) % len(words)] for k in range(4))
        found.append({"text": text, "topic": topics[i % 3]})
    return found


def test_rows_of_a_table_that_grows_stay_on_their_side(flags, tmp_path, caplog):
    """Calibrated later, when there are more rows: none of them was trained on."""
    file = tmp_path / "mine.jsonl"
    write_jsonl(file, different(200))
    trained = [*table_flags(flags, file), *MAP, "--hold-out"]
    _, before, _ = build(trained)
    seen = {tuple(row["input_ids"]) for row in before.train_rows}
    main.main(trained)
    write_jsonl(file, [*different(30, first=500), *different(200)])
    later = [*table_flags(flags, file), "--modelwrapper", "map", "--calibrate", "auto"]
    later += ["--load-lora-path", str(run_folder(trained)), "--log-path", "later"]
    _, after, _ = build(later)
    calibration = {tuple(row["input_ids"]) for row in after.calibration_rows}
    assert len(calibration) > 20 and not calibration & seen


def test_rows_of_one_text_are_on_one_side(flags, tmp_path):
    file = tmp_path / "mine.jsonl"
    write_jsonl(file, different(40) * 5)
    run = [*table_flags(flags, file), *MAP, "--calibrate", "auto", "--temperature-scaling"]
    _, dataset, _ = build(run)
    parts = [
        {tuple(row["input_ids"]) for row in getattr(dataset, f"{name}_rows")}
        for name in ("train", "tuning", "calibration")
    ]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_calibration_rows_that_read_like_training_rows_are_told(flags, monkeypatch):
    told = []
    monkeypatch.setattr("dataset.base.logger.warning", lambda *a: told.append(a[0] % a[1:]))
    _, dataset, _ = build([*flags, *MAP, "--calibrate", "auto"])
    trained = {tuple(row["input_ids"]) for row in dataset.train_rows}
    number = sum(tuple(row["input_ids"]) in trained for row in dataset.calibration_rows)
    assert number and f"{number} of 40 calibration rows read like a training row" in told[0]


def test_scores_that_tie_with_calibration_rows_tie_to_the_last_bit(flags):
    """Else constant predictions would have half the coverage that is promised."""
    flags = [*flags, *MAP, "--calibrate", "auto"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    answers = posterior.answer(rows(5))
    found = np.array([list(a["probabilities"].values()) for a in answers])
    same = posterior.calibration._replace(
        predictive=np.tile(found[:1], (40, 1)), mutual_information=np.zeros(40)
    )
    rule = same.set_rule(0.9)
    most = same.predictive[0, same.labels].min()
    assert rule(found[:1], np.array([0]))[0, found[0] >= most].all()


def test_mutual_information_of_single_predictions_is_no_confidence(flags):
    flags = [*flags, *MAP, "--calibrate", "auto"]
    main.main(flags)
    posterior = load_posterior(run_folder(flags), device="cpu")
    with pytest.raises(UsageError, match="a single prediction"):
        posterior.answer(rows(2), max_risk=0.5, confidence_by="mutual_information")
    with pytest.raises(UsageError, match="whole number"):
        posterior.answer(rows(2), n_samples=-1)
    with pytest.raises(UsageError, match="whole number"):
        posterior.answer(rows(2), n_samples=2.5)


def test_a_classifier_without_its_runs_flags_keeps_its_classes(flags, tmp_path, capsys):
    """As downloaded: an adapter and its record, no args.json."""
    write_jsonl(tmp_path / "mine.jsonl", different(60))
    trained = [*table_flags(flags, tmp_path / "mine.jsonl"), *MAP]
    main.main(trained)
    folder = run_folder(trained)
    (folder / "args.json").unlink()
    others = [{"text": row["text"], "topic": row["topic"].upper()} for row in different(60)]
    write_jsonl(tmp_path / "other.jsonl", others)
    later = [*table_flags(flags, tmp_path / "other.jsonl"), "--modelwrapper", "map"]
    later += ["--load-lora-path", str(folder), "--log-path", "later"]
    assert main.run(later) == 2
    assert "was trained for" in capsys.readouterr().err


def test_joint_information_of_a_run_that_drew_until_settled(flags, tmp_path):
    run = [*flags, "--modelwrapper", "blob", "--max-train-steps", "3", "--draws-adaptive"]
    run += ["--bayes-eval-n-samples-final", "16"]
    main.main(run)
    write_jsonl(tmp_path / "rows.jsonl", rows(12))
    call = [str(run_folder(run)), "--rows", str(tmp_path / "rows.jsonl"), "--window", "5"]
    call += ["--acquire", "3", "--by", "batchbald", "--out", str(tmp_path / "out.jsonl")]
    assert predict.run(call) == 0
