"""From a saved posterior to answers for rows without labels, in Python."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_folder, topic_rows
from safetensors.torch import load_file

import main
from modelwrappers import load_posterior
from modelwrappers.engine.answers import Answers
from modelwrappers.engine.prediction import Predictions
from utils.errors import RunError, UsageError

KINDS = ("causal_flags", "classifier_flags")
BLOB = ["--modelwrapper", "blob", "--max-train-steps", "4", "--bayes-eps", "0.5"]


def trained(flags: list[str], *more: str):
    flags = [*flags, *more]
    main.main(flags)
    return run_folder(flags)


def unlabelled(rows: list[dict]) -> list[dict]:
    return [{"text": row["text"]} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", ["1", "5"])
def test_answers_are_those_of_the_runs_evaluation(kind, seed, request):
    """37 rows in batches of 10 with fresh draws: seed and batches are the run's."""
    flags = request.getfixturevalue(kind)
    folder = trained(flags, *BLOB, "--seed", seed, "--eval-batch-size", "10")
    stored = load_file(folder / "predictions.safetensors")["log_probs"]  # (37, 10, C)
    rows = topic_rows(37, seed=1)
    answers = load_posterior(folder, device="cpu").answer(unlabelled(rows))
    expected = stored.double().exp().mean(1)
    found = torch.tensor([list(a["probabilities"].values()) for a in answers])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(a["num_draws"] == 10 and "label" not in a for a in answers)
    names = list(answers[0]["probabilities"])
    assert [a["answer"] for a in answers] == [names[i] for i in expected.argmax(1)]


def test_rows_may_be_texts_and_labels_are_told(causal_flags):
    folder = trained(causal_flags, "--modelwrapper", "map", "--max-train-steps", "2")
    posterior = load_posterior(folder, device="cpu")
    rows = topic_rows(5)
    texts, dicts = posterior.answer([r["text"] for r in rows]), posterior.answer(rows)
    assert [a.pop("label") for a in dicts] == [row["topic"] for row in rows]
    assert texts == dicts
    assert all(a["num_draws"] == 1 and a["mutual_information"] == 0 for a in texts)


def test_a_posterior_that_evaluated_its_mean_answers_with_its_mean(classifier_flags):
    folder = trained(classifier_flags, *BLOB, "--bayes-inference-notsample")
    posterior = load_posterior(folder, device="cpu")
    rows = unlabelled(topic_rows(6))
    assert posterior.answer(rows) == posterior.answer(rows, n_samples=0)
    settings = {"bayes_inference_notsample": False, "bayes_eval_n_samples_final": 4}
    drawn = load_posterior(folder, device="cpu", **settings).answer(rows)
    assert drawn[0]["mutual_information"] > 0 and drawn[0]["num_draws"] == 4


def test_a_fitted_temperature_is_applied(classifier_flags):
    flags = ["--modelwrapper", "map", "--max-train-steps", "8", "--temperature-scaling"]
    folder = trained(classifier_flags, *flags)
    temperature = json.loads((folder / "bayes_config.json").read_text())["temperature"]
    posterior = load_posterior(folder, device="cpu")
    rows = unlabelled(topic_rows(4))
    scaled = posterior.answer(rows)
    posterior.temperature, posterior.fitted_temperature = None, None
    for a, b in zip(scaled, posterior.answer(rows), strict=True):
        p = np.array(list(b["probabilities"].values())) ** (1 / temperature)
        np.testing.assert_allclose(list(a["probabilities"].values()), p / p.sum(), rtol=1e-4)


def test_solved_examples_of_the_run_stand_before_new_rows(causal_flags):
    flags = ["--modelwrapper", "map", "--max-train-steps", "2", "--num-shots", "2"]
    folder = trained(causal_flags, *flags)
    stored = load_file(folder / "predictions.safetensors")["log_probs"][:, 0]
    answers = load_posterior(folder, device="cpu").answer(unlabelled(topic_rows(37, seed=1)))
    found = torch.tensor([list(a["probabilities"].values()) for a in answers])
    torch.testing.assert_close(found, stored.exp(), rtol=1e-5, atol=1e-6)


TASK = """
from dataset.tasks import Task
DESK = Task(
    name="desk", source=None, splits={"train": "train", "test": "test"}, columns=("text", "topic"),
    choices=("business", "sports", "tech"), prompt=lambda row: (row["text"],),
    label=lambda row: ("business", "sports", "tech").index(row["topic"]),
)
"""


def test_a_task_in_a_file_is_read_on_the_callers_word_only(classifier_flags, tmp_path):
    (tmp_path / "mine.py").write_text(TASK)
    task = f"{tmp_path / 'mine.py'}:DESK"
    flags = [*classifier_flags, "--dataset", task, "--testing-set", "test"]
    folder = trained(flags, "--modelwrapper", "map", "--max-train-steps", "2")
    rows = unlabelled(topic_rows(3))
    with pytest.raises(UsageError, match="dataset="):
        load_posterior(folder, device="cpu").answer(rows)
    posterior = load_posterior(folder, device="cpu", dataset=task)
    assert len(posterior.answer(rows)) == 3
    with pytest.raises(UsageError, match="desk reads several columns"):
        posterior.answer(["no example says which column it is"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "bank"}, {"txt": "bank"}], "row 1: column 'text' is missing.*'txt'"),
        ([{"text": "bank", "topic": "weather"}], "row 0: unknown label.*weather"),
        ([{"text": 3}], "row 0.*must be text"),
        ([{"text": "   "}], "row 0"),
        ([["bank"]], "row 0: a row is"),
        ("bank", "brackets"),
        ({"text": "bank"}, "brackets"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(rows, message, classifier_flags):
    folder = trained(classifier_flags, "--modelwrapper", "map", "--max-train-steps", "1")
    with pytest.raises(UsageError, match=message):
        load_posterior(folder, device="cpu").answer(rows)


def test_another_tasks_answers_are_refused(causal_flags):
    folder = trained(causal_flags, "--modelwrapper", "map", "--max-train-steps", "1")
    posterior = load_posterior(folder, device="cpu", dataset="boolq")
    with pytest.raises(UsageError, match=r"the posterior answers 'business.*boolq"):
        posterior.answer([{"text": "bank"}])
    with pytest.raises(UsageError, match=r"lora_r.*settings are"):
        load_posterior(folder, device="cpu", lora_r=3)


def test_entropies_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(6, 4, 3, generator=generator).log_softmax(-1)
    number = torch.tensor([4, 4, 2, 3, 1, 4])
    made = torch.arange(4) < number[:, None]
    draws = draws.masked_fill(~made[:, :, None], math.nan)
    labels = torch.tensor([0, -1, 2, -1, 1, -1])
    answers = Answers.of(Predictions(draws, labels, torch.arange(6), number))
    for i, own in enumerate(number.tolist()):
        p = draws[i, :own].double().exp().numpy()  # (N, C)
        mean = p.mean(0)
        total, expected = -(mean * np.log(mean)).sum(), -(p * np.log(p)).sum(1).mean()
        np.testing.assert_allclose(answers.predictive[i], mean)
        np.testing.assert_allclose(answers.entropy[i], total)
        np.testing.assert_allclose(answers.expected_entropy[i], expected)
        np.testing.assert_allclose(answers.mutual_information[i], total - expected, atol=1e-12)
    records = answers.records(["a", "b", "c"])
    assert [r.get("label") for r in records] == ["a", None, "c", None, "b", None]
    assert records[4]["num_draws"] == 1 and records[4]["mutual_information"] < 1e-12
    json.dumps(records)


def test_a_method_in_memory_says_that_it_knows_no_rows(request):
    from test_library import in_memory

    with pytest.raises(RunError, match="how rows become tokens"):
        in_memory("seqcls", request, "map").answer(["bank"])


def test_a_run_that_drew_until_rows_were_settled_answers_so(causal_flags):
    flags = [*BLOB, "--bayes-eval-n-samples-final", "16", "--draws-adaptive"]
    folder = trained(causal_flags, *flags, "--draws-tolerance", "0.2")
    stored = load_file(folder / "predictions.safetensors")
    posterior = load_posterior(folder, device="cpu")
    answers = posterior.answer(unlabelled(topic_rows(37, seed=1)))
    assert [a["num_draws"] for a in answers] == stored["num_draws"].tolist()
    assert len(set(stored["num_draws"].tolist())) > 1
    assert {a["num_draws"] for a in posterior.answer(unlabelled(topic_rows(3)), 5)} == {5}
