"""Rows with unequal numbers of draws and antithetic pairs: numerics, files, and what is shown."""

import csv
import io
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import run_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import digamma, expit
from scipy.stats import entropy
from test_report import MADE, make_run, report_on
from test_report_hostile import DTYPES, FAST, one_run, restored, rewrite  # noqa: F401 (a fixture)

import main
from decisions.information import expected_entropy, summarise
from modelwrappers.engine.prediction import Predictions
from modelwrappers.wrapperbase import WrapperBase
from report import uncertainty as u
from report.collect import SETTLED, UNEQUAL_DRAWS
from report.measure import Examples, curves, measure
from report.page import page
from report.plots import draw_family
from report.predictions import read_predictions
from report.runs import find_runs
from report.tables import comma_separated, latex, markdown, number, terminal
from utils.metrics import posterior_predictive, score
from utils.temperature import fit_temperature, scale

NAN = float("nan")


def without_others(log_probs, num_draws):
    """NaN where a row has no draw, as a run with adaptive draws keeps them."""
    drawn = torch.arange(log_probs.shape[1]) < torch.as_tensor(num_draws)[:, None]
    return log_probs.masked_fill(~drawn[:, :, None], NAN)


@pytest.fixture(scope="module")
def unequal():
    """Draws (n, N, C) of which each example has from 2 to 7, and how many."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(61, 1, 4) + torch.randn(61, 7, 4)
    num_draws = 2 + torch.arange(61) % 6
    return without_others(logits.double().log_softmax(-1), num_draws), num_draws


# --- the shared numerics --------------------------------------------------------------------------


def test_the_predictive_is_the_mean_over_each_rows_own_draws(unequal):
    log_probs, num_draws = unequal
    found = posterior_predictive(log_probs, num_draws)
    assert found.dtype == torch.float64 and found.isfinite().all()
    for row, number_of, own in zip(log_probs, num_draws, found, strict=True):
        torch.testing.assert_close(own.exp(), row[:number_of].exp().mean(0))


def test_equal_numbers_of_draws_give_what_no_numbers_give(unequal):
    log_probs = unequal[0][:, :2].float()
    found = posterior_predictive(log_probs, torch.full((61,), 2))
    torch.testing.assert_close(found, posterior_predictive(log_probs), rtol=0, atol=1e-15)


def test_draws_that_a_row_does_not_have_stay_nan_under_a_temperature(unequal):
    log_probs, _ = unequal
    scaled = scale(log_probs, 2.5)
    assert torch.equal(scaled.isnan(), log_probs.isnan())
    assert scaled.exp().sum(-1).nan_to_num(1.0).allclose(torch.ones(61, 7, dtype=torch.float64))


def test_the_fitted_temperature_is_that_of_repeated_draws():
    torch.manual_seed(0)
    log_probs = (4 * torch.randn(200, 6, 3)).log_softmax(-1)
    labels, num_draws = torch.randint(3, (200,)), torch.tensor([2, 6]).repeat(100)
    repeated = log_probs.clone()
    repeated[::2] = log_probs[::2, :2].repeat(1, 3, 1)
    expected = fit_temperature(repeated, labels)
    found = fit_temperature(without_others(log_probs, num_draws), labels, num_draws)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_number_of_an_example_is_that_of_its_own_draws(unequal, antithetic):
    draws, num_draws = (values.numpy() for values in unequal)
    together = summarise(draws, num_draws)
    np.testing.assert_allclose(together.log_probs, posterior_predictive(*unequal).numpy())
    found = {
        "expected": expected_entropy(draws, num_draws),
        "mi": together.mutual_information,
        "std": u.draw_deviation(draws, num_draws),
        "flips": u.flip_rates(draws, num_draws),
        "corrected": u.jackknifed_information(draws, num_draws, antithetic),
    }
    for i, number_of in enumerate(num_draws):
        own = draws[i : i + 1, :number_of]
        alone = {
            "expected": expected_entropy(own),
            "mi": summarise(own).mutual_information,
            "std": u.draw_deviation(own),
            "flips": u.flip_rates(own),
            "corrected": u.jackknifed_information(own, antithetic=antithetic),
        }
        for key, value in alone.items():
            np.testing.assert_allclose(found[key][i], value[0], atol=1e-13, err_msg=key)
        probs = np.exp(own[0])
        chosen = probs[:, probs.mean(0).argmax()]
        assert found["std"][i] == pytest.approx(chosen.std())
        assert found["flips"][i] == (probs.argmax(1) != probs.mean(0).argmax()).mean()


# --- the jackknife --------------------------------------------------------------------------------


def information(probs):
    """Plain mutual information of draws (N, C)."""
    return entropy(probs.mean(0)) - np.mean([entropy(p) for p in probs])


def by_hand(probs, antithetic):
    step = 2 if antithetic else 1
    units = [range(start, min(start + step, len(probs))) for start in range(0, len(probs), step)]
    left_out = [information(np.delete(probs, list(unit), axis=0)) for unit in units]
    shares = [1 - len(unit) / len(probs) for unit in units]
    return len(units) * information(probs) - np.dot(shares, left_out)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_corrected_information_equals_a_loop_that_leaves_units_out(unequal, antithetic):
    draws, num_draws = (values.numpy() for values in unequal)
    found = u.jackknifed_information(draws, num_draws, antithetic)
    for row, number_of, value in zip(draws, num_draws, found, strict=True):
        if antithetic and number_of == 2:
            assert np.isnan(value), "a pair is a single unit"
        else:
            assert value == pytest.approx(by_hand(np.exp(row[:number_of]), antithetic), abs=1e-12)


def test_the_corrected_information_of_few_draws_is_that_of_many():
    """Draws of a Dirichlet, whose mutual information is known in closed form."""
    alpha, rng = np.array([2.0, 1.0, 0.5]), np.random.default_rng(0)
    total = alpha.sum()
    true = entropy(alpha / total)
    true -= digamma(total + 1) - (alpha / total * digamma(alpha + 1)).sum()
    assert information(rng.dirichlet(alpha, 20_000)) == pytest.approx(true, abs=0.004)
    draws = np.log(rng.dirichlet(alpha, (20_000, 6)))
    plain = summarise(draws).mutual_information
    corrected = u.jackknifed_information(draws)
    bias = abs(corrected.mean() - true)
    assert plain.mean() < 0.9 * true and bias < 0.2 * abs(plain.mean() - true)


def test_antithetic_pairs_are_the_units():
    """Pairs of logits whose mean varies less than that of as many independent ones."""
    rng = np.random.default_rng(0)

    def draws_of(noise):
        p = expit(0.7 + 1.5 * noise)
        return np.log(np.stack([p, 1 - p], -1))

    half = rng.normal(size=(20_000, 3))
    draws = draws_of(np.stack([half, -half], 2).reshape(20_000, 6))
    p, width = np.polynomial.hermite_e.hermegauss(80)
    p, width = np.exp(draws_of(p)), width / width.sum()
    true = entropy(width @ p) - width @ entropy(p, axis=1)
    pairs, singles = (
        u.jackknifed_information(draws, antithetic=kind).mean() - true for kind in (True, False)
    )
    assert abs(pairs) < 0.003 and singles > 0.01, "singles expect more noise than pairs have"


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("number_of", [3, 4, 5, 7])
def test_the_corrected_information_is_never_below_the_plain_one(number_of, antithetic):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.3, 0.3, 0.3], (200, number_of)) ** rng.uniform(0.1, 3, (200, 1, 1))
    draws = np.log(probs / probs.sum(-1, keepdims=True))
    plain = summarise(draws).mutual_information
    assert (u.jackknifed_information(draws, antithetic=antithetic) >= plain - 1e-12).all()


def test_an_odd_antithetic_draw_counts_for_its_size():
    """Two pairs and a single draw are no worse than two pairs."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(200_000, 3))
    p = expit(0.7 + 1.5 * np.stack([half, -half], 2).reshape(-1, 6))
    draws = np.log(np.stack([p, 1 - p], -1))
    five, six = (u.jackknifed_information(draws[:, :n], antithetic=True).mean() for n in (5, 6))
    assert five == pytest.approx(six, rel=0.02)


def test_a_single_unit_has_no_corrected_information(unequal):
    draws = unequal[0].numpy()[:, :2]
    assert np.isnan(u.jackknifed_information(draws[:, :1])).all()
    assert np.isnan(u.jackknifed_information(draws, antithetic=True)).all()
    assert np.isfinite(u.jackknifed_information(draws)).all()


def test_draws_that_agree_or_are_certain_are_corrected_to_0():
    draws = np.log(np.full((2, 5, 2), 0.5))
    with np.errstate(divide="ignore"):
        draws[1] = np.log([1.0, 0.0])
    assert np.abs(u.jackknifed_information(draws)).max() < 1e-12


# --- files ----------------------------------------------------------------------------------------


def make_unequal(root, method="blob", seed=1, *, counts=(4, 5, 10), kind=None, **options):
    """`make_run` with as many draws of each example as `counts` say in turn."""
    folder = make_run(root, method, seed, num_draws=max(counts), **options)
    file = folder / "predictions.safetensors"
    tensors = load_file(file)
    n = len(tensors["labels"])
    num_draws = torch.tensor(counts).repeat(n)[:n]
    tensors["log_probs"] = without_others(tensors["log_probs"], num_draws)
    if len(set(counts)) > 1:
        tensors["num_draws"] = num_draws
    rewrite(folder, tensors, **({} if kind is None else {"draws": kind}))
    metrics = json.loads((folder / "metrics.json").read_text())
    block = metrics["datasets"]["bbc_headlines"]
    block |= score(
        posterior_predictive(tensors["log_probs"], num_draws), tensors["labels"]
    )._asdict()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def predictions_of(folder):
    ((run,), _) = find_runs([folder])
    return read_predictions(run.evaluations[0])


def test_an_older_file_has_equal_and_independent_draws(tmp_path):
    predictions = predictions_of(make_run(tmp_path, num_draws=3))
    assert predictions.num_draws.tolist() == [3] * 150 and not predictions.antithetic


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_numbers_of_draws_follow_their_rows(tmp_path, dtype):
    folder = make_unequal(tmp_path, n=12, kind="antithetic")
    tensors = load_file(folder / "predictions.safetensors")
    tensors |= {"index": tensors["index"].flip(0), "num_draws": tensors["num_draws"].to(dtype)}
    rewrite(folder, tensors, draws="antithetic")
    predictions = predictions_of(folder)
    assert predictions.antithetic and predictions.num_draws.tolist() == [10, 5, 4] * 4
    assert np.isfinite(predictions.draws[:, :, 0]).sum(1).tolist() == [10, 5, 4] * 4


def test_a_run_with_unequal_draws_is_reported_as_it_measured_itself(
    classifier_flags, tmp_path, monkeypatch
):
    predict = WrapperBase.predict

    def adaptive(self, eval_loader, n_samples=None):
        predictions = predict(self, eval_loader, n_samples)
        most = predictions.log_probs.shape[1]
        num_draws = most - predictions.index % most
        log_probs = without_others(predictions.log_probs, num_draws)
        return Predictions(log_probs, predictions.labels, predictions.index, num_draws)

    monkeypatch.setattr(WrapperBase, "predict", adaptive)
    monkeypatch.setattr(WrapperBase, "draws_kind", "antithetic", raising=False)
    flags = [*classifier_flags, "--modelwrapper", "mcdropout", "--max-train-steps", "2"]
    main.main([*flags, "--temperature-scaling"])
    folder = run_folder(flags)
    block = json.loads((folder / "metrics.json").read_text())["datasets"]["bbc_headlines"]
    with safe_open(folder / "predictions.safetensors", "pt") as file:
        num_draws = file.get_tensor("num_draws")
        assert file.metadata()["draws"] == "antithetic" and num_draws.dtype == torch.int64
    assert (block["n_draws"], block["mean_draws"]) == (10, num_draws.double().mean().item())
    report = report_on(tmp_path / "out", resamples=0)
    assert not report.skipped and not report.notes
    for row, stored in zip(
        report.families[0].rows, (block, block["temperature_scaled"]), strict=True
    ):
        assert row.num_draws == f"{block['mean_draws']:.1f} (1 to 10) antithetic"
        for key in ("acc", "ece", "nll", "brier"):
            assert row.cells[key].value == pytest.approx(stored[key], abs=1e-5)


def test_a_run_with_equal_draws_keeps_no_numbers_of_them(classifier_flags):
    flags = [*classifier_flags, "--modelwrapper", "mle", "--max-train-steps", "1"]
    main.main(flags)
    with safe_open(run_folder(flags) / "predictions.safetensors", "pt") as file:
        assert set(file.keys()) == {"log_probs", "labels", "index"}
        assert file.metadata()["draws"] == "independent"
    block = json.loads((run_folder(flags) / "metrics.json").read_text())["datasets"]
    assert "mean_draws" not in block["bbc_headlines"]


REFUSED = [
    ({"num_draws": lambda t: t.float()}, "'num_draws' is of type float32"),
    ({"num_draws": lambda t: t.bool()}, "'num_draws' is of type bool"),
    ({"num_draws": lambda t: t.to(torch.uint64)}, "'num_draws' is of type uint64"),
    ({"num_draws": lambda t: t[:5]}, "'num_draws' has shape (5,); it must be (6)"),
    ({"num_draws": lambda t: t[:, None]}, "'num_draws' has shape (6, 1)"),
    ({"num_draws": lambda t: t[0]}, "'num_draws' has shape ()"),
    ({"num_draws": lambda t: t - 4}, "has from 0 to 6 draws"),
    ({"num_draws": lambda t: -t}, "has from -10 to -4 draws"),
    ({"num_draws": lambda t: t + 1}, "has from 5 to 11 draws"),
    ({"num_draws": lambda t: t + 2**62}, "the largest must be 10"),
    ({"num_draws": lambda t: t.clamp(max=5)}, "has from 4 to 5 draws"),
    ({"num_draws": lambda t: t.clamp(min=5)}, "among the draws that 'num_draws' says"),
    ({"log_probs": lambda t: t.nan_to_num(-1.0)}, "values behind the draws"),
    ({"log_probs": lambda t: put(t, (0, 9, 0), -1.0)}, "values behind the draws"),
    ({"log_probs": lambda t: put(t, (0, 9), float("inf"))}, "values behind the draws"),
    ({"log_probs": lambda t: put(t, (0, 1), NAN)}, "among the draws that 'num_draws' says"),
    ({"log_probs": lambda t: put(t, (2, 9, 1), NAN)}, "among the draws that 'num_draws' says"),
    ({"log_probs": lambda t: put(t, (1, 0, 0), float("-inf"))}, "among the draws"),
    ({"log_probs": lambda t: put(t, (3,), NAN)}, "among the draws that 'num_draws' says"),
    ({"log_probs": lambda t: t * NAN}, "among the draws that 'num_draws' says"),
    ({"log_probs": lambda t: t + 1}, "do not add up to 1"),
    ({"log_probs": lambda t: t.long()}, "'log_probs' is of type int64"),
    ({"num_draws": None}, "NaN or infinite"),
]


def put(tensor, place, value):
    tensor[place] = value
    return tensor


@pytest.mark.parametrize("changes, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_numbers_of_draws_that_cannot_be_are_named(tmp_path, changes, reason):
    folder = make_unequal(tmp_path, n=6)
    tensors = load_file(folder / "predictions.safetensors")
    for key, make in changes.items():
        tensors[key] = make and make(tensors[key])
    rewrite(folder, {key: value for key, value in tensors.items() if value is not None})
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert reason in skipped.reason and "predictions.safetensors" in skipped.reason


@pytest.mark.parametrize("kind", ["", "Antithetic", "sobol", "\x1b[2J\n" + "x" * 9999])
def test_a_kind_of_draws_that_is_none_is_named(tmp_path, kind):
    make_unequal(tmp_path, n=6, kind=kind)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert "not independent or antithetic" in skipped.reason and len(skipped.reason) < 400
    assert "\x1b" not in skipped.reason


@pytest.mark.parametrize("key, shape", [("log_probs", [6, 2**28, 1]), ("num_draws", [2**31])])
def test_more_draws_than_memory_are_not_read(tmp_path, key, shape):
    """A file of no size on disk, whose header is right."""
    folder = make_unequal(tmp_path, n=6)
    file, begin, header = folder / "predictions.safetensors", 0, {}
    shapes = {"log_probs": [6, 10, 3], "labels": [6], "index": [6], "num_draws": [6], key: shape}
    for name, sizes in shapes.items():
        end = begin + int(np.prod(sizes, dtype=object)) * 4
        dtype = "F32" if name == "log_probs" else "I32"
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + begin)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert "tensors of more than" in skipped.reason and key in skipped.reason


@FAST
@given(data=st.data())
def test_any_numbers_of_draws_are_predictions_or_a_reason(one_run, data):  # noqa: F811
    folder = restored(one_run)
    n, most = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    log_probs = torch.full((n, most, 2), -0.6931472)
    counts = data.draw(
        st.lists(st.integers(1, most), min_size=n, max_size=n)
        | st.lists(st.integers(-1, 5), max_size=5)
    )
    num_draws = torch.tensor(counts, dtype=torch.int64)
    if len(counts) == n:
        log_probs = without_others(log_probs, num_draws)
    for _ in range(data.draw(st.integers(0, 1))):
        place = data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, most - 1)))
        log_probs[place] = data.draw(st.sampled_from([NAN, -0.6931472, float("inf"), 0.0]))
    tensors = {
        "log_probs": log_probs,
        "labels": torch.zeros(n, dtype=torch.int64),
        "index": torch.arange(n),
        "num_draws": num_draws.to(data.draw(st.sampled_from([torch.int64, *DTYPES]))),
    }
    rewrite(folder, tensors, draws=data.draw(st.sampled_from(["independent", "antithetic", "?"])))
    report = report_on(folder, resamples=5)
    assert report.num_runs + len(report.skipped) >= 1
    for text in (markdown(report, MADE), latex(report, MADE), comma_separated(report)):
        text.encode()


# --- what is measured -----------------------------------------------------------------------------


def test_unequal_draws_in_blocks_give_the_same_numbers(tmp_path, monkeypatch):
    make_unequal(tmp_path, temperature=2.0, kind="antithetic")
    whole = comma_separated(report_on(tmp_path))
    monkeypatch.setattr("decisions.information.BLOCK", 10 * 3 * 7)  # rows 7 by 7
    assert comma_separated(report_on(tmp_path)) == whole


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_the_curve_over_draws_takes_all_that_an_example_has(tmp_path, temperature):
    predictions = predictions_of(make_unequal(tmp_path))
    examples = Examples.of(predictions, temperature)
    points = curves(examples, 15).draws
    draws = torch.from_numpy(predictions.draws)
    draws = draws if temperature is None else scale(draws, temperature)
    labels, num_draws = (torch.from_numpy(v) for v in (predictions.labels, predictions.num_draws))
    for number_of, nll, ece in points:
        first = posterior_predictive(draws, num_draws.clamp(max=int(number_of)))
        expected = score(first, labels)
        assert (nll, ece) == pytest.approx((expected.nll, expected.ece), abs=1e-6)
    measured = measure(examples, 15)
    assert points[-1].tolist() == pytest.approx([10, measured["nll"], measured["ece"]])


def test_the_corrected_information_is_a_column_where_every_example_has_one(tmp_path):
    make_run(tmp_path, "map")
    make_unequal(tmp_path, "blob")
    make_unequal(tmp_path, "tfb", counts=(1, 10))
    make_unequal(tmp_path, "laplace", counts=(2, 10), kind="antithetic")
    (family,) = report_on(tmp_path, resamples=20).families
    having = [row.name for row in family.rows if "mi_jackknife" in row.cells]
    assert having == ["blob"] and all("mi" in row.cells for row in family.rows)
    blob = family.rows[1].cells
    assert blob["mi_jackknife"].value > blob["mi"].value


# --- what is shown --------------------------------------------------------------------------------


def test_every_table_says_how_many_draws_and_of_which_kind(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "map", seed)
        make_unequal(tmp_path, "blob", seed)
        make_unequal(tmp_path, "tfb", seed, counts=(10,), kind="antithetic")
    make_unequal(tmp_path, "tfb", 3, counts=(10, 4), kind="antithetic")
    report = report_on(tmp_path, resamples=0)
    shown = {row.name: row.num_draws for row in report.families[0].rows}
    assert shown == {"map": "1", "blob": "6.3 (4 to 10)", "tfb": "9.0 (4 to 10) antithetic"}
    for text in (terminal(report), markdown(report, MADE), latex(report, MADE)):
        assert all(found in text for found in shown.values())
    html = page(report, {}, {}, MADE)
    assert re.search(r'data-value="6\.3333\d*">6\.3 \(4 to 10\)<', html), "sorted by the mean"
    lines = list(csv.DictReader(io.StringIO(comma_separated(report))))
    found = {line["method"]: (line["n_draws"], float(line["mean_draws"])) for line in lines}
    assert found["blob"] == ("6.3 (4 to 10)", pytest.approx(19 / 3, rel=1e-4))
    assert found["map"] == ("1", 1.0)


def test_rows_with_equal_draws_are_shown_as_before(tmp_path):
    make_unequal(tmp_path, "blob", 1, counts=(10,), kind="independent")
    make_unequal(tmp_path, "blob", 2, counts=(3,))
    make_unequal(tmp_path, "tfb", 1, counts=(10,), kind="antithetic")
    make_unequal(tmp_path, "map", 1, counts=(1,), kind="antithetic")
    (family,) = report_on(tmp_path, resamples=0).families
    shown = {row.name: row.num_draws for row in family.rows}
    assert shown == {"map": "1", "blob": "3, 10", "tfb": "10 antithetic"}


ALONE = {"counts": (10,)}


@pytest.mark.parametrize(
    "blob, tfb, told",
    [
        (ALONE, ALONE, []),
        (ALONE, {"counts": (1,)}, []),
        (ALONE, {"counts": (1,), "kind": "antithetic"}, []),
        (ALONE, {"counts": (10,), "kind": "independent"}, []),
        (ALONE, {"counts": (5,)}, [UNEQUAL_DRAWS]),
        (ALONE, {"counts": (10,), "kind": "antithetic"}, [UNEQUAL_DRAWS]),
        ({"counts": (4, 10)}, {"counts": (1,)}, [UNEQUAL_DRAWS, SETTLED]),
        ({"counts": (4, 10)}, {"counts": (4, 10)}, [UNEQUAL_DRAWS, SETTLED]),
    ],
)
def test_a_table_says_where_mutual_information_cannot_be_compared(tmp_path, blob, tfb, told):
    make_run(tmp_path, "map")
    make_unequal(tmp_path, "blob", **blob)
    make_unequal(tmp_path, "tfb", **tfb)
    report = report_on(tmp_path, resamples=0)
    assert report.families[0].notes == told
    for text in (page(report, {}, {}, MADE), markdown(report, MADE)):
        assert ("only the corrected one" in text) == bool(told)


def test_rounding_below_0_is_shown_as_0():
    assert number(-1e-17) == "0.000" and number(-0.25) == "-0.250"


def test_seeds_with_other_numbers_of_draws_are_averaged_where_both_have_a_point(tmp_path):
    make_unequal(tmp_path, "blob", 1, counts=(2, 60), n=20)
    make_unequal(tmp_path, "blob", 2, counts=(2, 40), n=20)
    (family,) = report_on(tmp_path, resamples=0).families
    numbers = [set(result.curves.draws[:, 0]) for result in family.rows[0].results]
    assert numbers[0] != numbers[1] and {1, 2, 3} <= numbers[0] & numbers[1]
    plots = draw_family(family, {row.name: 0 for row in family.rows}, "stem", tmp_path)
    assert "draws" in {plot.name for plot in plots}


def test_how_draws_are_made_is_a_setting_and_what_is_only_faster_is_none(tmp_path):
    for seed, cache in ((1, True), (2, False)):
        make_run(tmp_path, "blob", seed, draws="independent", prefix_cache=cache)
    make_run(tmp_path, "blob", name="pairs", draws="antithetic", prefix_cache=True)
    make_run(tmp_path, "tfb", 1, draws="antithetic")
    make_run(tmp_path, "tfb", 2)  # of an older version
    (family,) = report_on(tmp_path, resamples=0).families
    names = {row.name: len(row.results) for row in family.rows}
    assert names == {"blob (draws antithetic)": 1, "blob (draws independent)": 2, "tfb": 2}


def test_a_second_step_is_named_by_its_own_draws(tmp_path):
    source = str(make_run(tmp_path, "blob", num_draws=3, draws="antithetic", draws_adaptive=True))
    flags = {"draws": "independent", "draws_adaptive": False}
    make_run(tmp_path, "blob", num_draws=3, dataset="bodies", load_lora_path=source, **flags)
    own, shifted = report_on(tmp_path, resamples=0).families
    assert own.rows[0].name == "blob (draws antithetic, draws-adaptive true)"
    assert shifted.shifted and shifted.rows[0].name.startswith("blob (draws independent")
