"""The report's sets and selective answers: from predictions of calibration rows to every table."""

import csv
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import run_folder, topic_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import beta, binomtest
from scipy.stats import t as student
from test_report import MADE, change_json, make_run, report_on, script
from test_report_hostile import FAST, NAMES, SPECIAL, Tags, is_quiet, without_commands

import main
from decisions import conformal, selective
from decisions.intervals import Interval, clopper_pearson
from modelwrappers import load_posterior
from report.decided import Asked, answer_lines, mean, set_lines
from report.decided_tables import decided_tables, left_out
from report.page import page
from report.predictions import read_predictions
from report.runs import find_runs
from report.tables import comma_separated, latex, markdown, terminal
from utils.files import write_json, write_tensors
from utils.metrics import posterior_predictive
from utils.temperature import scale

FILE = "predictions-calibration.safetensors"
METADATA = {"dataset": "bbc_headlines", "split": "calibration"}


def calibration_rows(seed=1, n=90, num_classes=3, num_draws=1, sharpness=3.0):
    """Made-up predictions of rows like those of `make_run`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    truth = torch.randn(n, 1, num_classes, generator=generator)
    labels = torch.multinomial((2 * truth[:, 0]).softmax(-1), 1, generator=generator)[:, 0]
    noise = 0.3 * torch.randn(n, num_draws, num_classes, generator=generator)
    log_probs = (sharpness * truth + noise).log_softmax(-1)
    return {"log_probs": log_probs, "labels": labels, "index": 5 * torch.arange(n)}


def make_calibrated(root, method="map", seed=1, rows=None, metadata=METADATA, **options):
    """`make_run`, with predictions of calibration rows beside it."""
    folder = make_run(root, method, seed, calibrate="all", **options)
    of_draws = {"num_draws": options.get("num_draws", 1)}
    write_tensors(folder / FILE, rows or calibration_rows(seed, **of_draws), metadata)
    return folder


def probabilities(tensors, temperature=None):
    """Of the posterior predictive, and the labels, by the functions that a run uses."""
    draws = tensors["log_probs"].double()
    draws = draws if temperature is None else scale(draws, temperature)
    return posterior_predictive(draws).exp().numpy(), tensors["labels"].numpy()


def exact(successes, trials):
    return binomtest(successes, trials).proportion_ci(0.95, "exact")


def lines_of(row, asked=Asked()):  # noqa: B008 (frozen)
    """coverage -> its line, risk -> its line."""
    sets = {line.asked: line for line in set_lines(row.decided, asked)}
    return sets, {line.asked: line for line in answer_lines(row.decided, asked)}


def row_of(family, name):
    (row,) = (row for row in family.rows if row.name == name)
    return row


# --- one run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 2.5])
@pytest.mark.parametrize("num_draws", [1, 4])
def test_sets_are_those_of_a_calculation_by_hand(tmp_path, temperature, num_draws):
    folder = make_calibrated(tmp_path, shifted=True, temperature=temperature, num_draws=num_draws)
    report = report_on(tmp_path, resamples=0)
    assert not report.skipped
    known, labels = probabilities(load_file(folder / FILE), temperature)
    scores = np.sort(1 - known[np.arange(90), labels])
    name = "map" if temperature is None else "map + temperature"
    for family, file in zip(report.families, ("", "-bodies"), strict=True):
        p, y = probabilities(load_file(folder / f"predictions{file}.safetensors"), temperature)
        right = p.argmax(1) == y
        sets, _ = lines_of(row_of(family, name))
        for coverage, k in ((0.8, 73), (0.9, 82), (0.95, 87)):  # ceil(91 * coverage)
            inside = 1 - p <= scores[k - 1]
            inside[np.arange(150), p.argmax(1)] |= ~inside.any(1)
            covered, sizes = inside[np.arange(150), y], inside.sum(1)
            line = sets[coverage]
            assert line.reached.value == pytest.approx(covered.mean())
            low, high = exact(covered.sum(), 150)
            assert (line.reached.low, line.reached.high) == pytest.approx((low, high))
            half = student.ppf(0.975, 149) * sizes.std(ddof=1) / 150**0.5
            limits = max(0, sizes.mean() - half), min(3, sizes.mean() + half)
            assert line.size.value == pytest.approx(sizes.mean())
            assert (line.size.low, line.size.high) == pytest.approx(limits)
            assert line.size_right.value == pytest.approx(sizes[right].mean())
            assert line.size_wrong.value == pytest.approx(sizes[~right].mean())
            law = beta(k, 91 - k).ppf([0.025, 0.975])
            assert line.law == pytest.approx(tuple(law))
    if temperature is not None:
        raw = row_of(report.families[0], "map")
        assert not raw.decided and not left_out(report.families[0])


def test_without_the_temperature_the_sets_would_be_others(tmp_path):
    """Of APS; the order of LAC's scores is nearly the same."""
    asked = Asked(coverages=(0.9,), set_score="aps")
    for number, temperature in enumerate((None, 3.0)):
        make_calibrated(tmp_path / str(number), temperature=temperature, num_draws=3)
    sizes = [
        lines_of(report_on(tmp_path / str(i), resamples=0, asked=asked).families[0].rows[-1], asked)
        for i in (0, 1)
    ]
    assert sizes[0][0][0.9].size.value != sizes[1][0][0.9].size.value


@pytest.mark.parametrize("score", conformal.SCORES)
def test_random_numbers_of_sets_are_those_of_the_runs_seed_and_the_rows_index(tmp_path, score):
    folder = make_calibrated(tmp_path, seed=7)
    asked = Asked(coverages=(0.85,), set_score=score)
    (family,) = report_on(tmp_path, resamples=0, asked=asked).families
    rows, own = load_file(folder / FILE), load_file(folder / "predictions.safetensors")
    (known, labels), (p, y) = map(probabilities, (rows, own))
    thresholds = conformal.calibrate(known, labels, score, seed=7, keys=rows["index"].tolist())
    inside = conformal.sets(p, thresholds, 0.85, own["index"].tolist())
    figures = conformal.evaluate_sets(inside, y, p.argmax(1) == y)
    line = lines_of(family.rows[0], asked)[0][0.85]
    assert (line.reached.value, line.size.value) == pytest.approx((figures.coverage, figures.size))


def test_answers_are_those_of_the_rule_of_the_calibration_rows(tmp_path):
    folder = make_calibrated(tmp_path, shifted=True, seed=3)
    asked = Asked(max_risks=(0.2, 0.35), confidence=0.8)
    rows = load_file(folder / FILE)
    known, labels = probabilities(rows)
    threshold = selective.calibrate(
        known.max(1), known.argmax(1) == labels, "max_probability", 3, rows["index"].tolist()
    )
    report = report_on(tmp_path, resamples=0, asked=asked)
    for family, file in zip(report.families, ("", "-bodies"), strict=True):
        p, y = probabilities(load_file(folder / f"predictions{file}.safetensors"))
        _, answers = lines_of(family.rows[0], asked)
        for risk in asked.max_risks:
            rule = threshold.rule(risk, 0.8)
            chosen = p.max(1) > rule.threshold
            wrong, number = (p.argmax(1) != y)[chosen].sum(), chosen.sum()
            assert answers[risk].answered.value == pytest.approx(number / 150)
            assert answers[risk].risk.value == pytest.approx(wrong / number)
            for found, counts in (
                (answers[risk].answered, (number, 150)),
                (answers[risk].risk, (wrong, number)),
            ):
                assert (found.low, found.high) == pytest.approx(tuple(exact(*map(int, counts))))


def test_a_real_run_is_reported_as_its_posterior_answers(classifier_flags, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", topic_rows(200, seed=7))
    write_jsonl(tmp_path / "test.jsonl", topic_rows(60, seed=8))
    flags = [*classifier_flags, "--data-dir", str(tmp_path), "--modelwrapper", "map"]
    flags += ["--max-train-steps", "6", "--calibrate", "auto", "--temperature-scaling"]
    main.main(flags)
    # of lac: the random numbers of the other scores are a row's place here, its tokens there
    asked = Asked(coverages=(0.8,), set_score="lac", max_risks=(0.8,))
    report = report_on(tmp_path / "out", resamples=0, asked=asked)
    assert not report.skipped and not report.notes
    rows = [{"text": row["text"]} for row in topic_rows(60, seed=8)]
    posterior = load_posterior(run_folder(flags), device="cpu")
    answers = posterior.answer(rows, coverage=0.8, set_score="lac", max_risk=0.8)
    labels = load_file(run_folder(flags) / "predictions.safetensors")["labels"].tolist()
    sets, risks = lines_of(row_of(report.families[0], "map + temperature"), asked)
    covered = [posterior.answers[y] in a["set"] for y, a in zip(labels, answers, strict=True)]
    assert sets[0.8].reached.value == pytest.approx(np.mean(covered))
    assert sets[0.8].size.value == pytest.approx(np.mean([len(a["set"]) for a in answers]))
    assert risks[0.8].answered.value == pytest.approx(np.mean([a["answered"] for a in answers]))


def test_a_run_that_evaluates_a_calibrated_posterior_has_its_sets(tmp_path):
    source = make_calibrated(tmp_path, "map")
    make_run(tmp_path, "map", dataset="bodies", load_lora_path=str(source), noise=0.31)
    own, shifted = report_on(tmp_path, resamples=0).families
    assert own.rows[0].decided[0].guaranteed
    assert shifted.shifted and not shifted.rows[0].decided[0].guaranteed


def test_calibrating_is_no_setting_but_halving_the_held_out_rows_is(tmp_path):
    for seed, value in ((1, "all"), (2, "no")):
        make_run(tmp_path, "map", seed, calibrate=value)
    make_run(tmp_path, "map", 3, calibrate="half", temperature=2.0)
    (family,) = report_on(tmp_path, resamples=0).families
    rows = {row.name: len(row.results) for row in family.rows}
    halved = "map (calibrate half)"
    assert rows == {"map (calibrate no)": 2, halved: 1, f"{halved} + temperature": 1}


# --- several seeds --------------------------------------------------------------------------------


def test_a_row_has_the_mean_over_its_seeds(tmp_path):
    for seed in (1, 2, 3):
        make_calibrated(tmp_path, "map", seed)
    (family,) = report_on(tmp_path, resamples=0).families
    (row,) = family.rows
    line = lines_of(row)[0][0.9]
    own = [decided.sets[0.9] for decided in row.decided]
    values = [figures.coverage for figures in own]
    assert len(set(values)) > 1 and line.reached.num_seeds == 3
    assert line.reached.value == pytest.approx(np.mean(values))
    assert line.reached.spread == pytest.approx(np.std(values, ddof=1))
    of_seeds = student.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    down = np.mean([f.coverage - f.coverage_interval.low for f in own])
    assert line.reached.low == pytest.approx(max(0, line.reached.value - np.hypot(down, of_seeds)))
    text = comma_separated(report_on(tmp_path, resamples=0))
    (found,) = (
        r for r in csv.DictReader(io.StringIO(text)) if r["metric"] == "set_coverage_at_0.9"
    )
    assert float(found["value"]) == pytest.approx(np.mean(values), abs=1e-6)
    assert float(found["std_over_seeds"]) == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert (found["n_seeds"], found["seeds"], found["mark"]) == ("3", "1 2 3", "")


def test_equal_seeds_have_the_interval_of_one():
    figure = 0.75, Interval(0.5, 0.875)
    one = mean([figure], 1.0)
    assert one[:3] == (0.75, 0.5, 0.875) and np.isnan(one.spread)
    assert mean([figure] * 3, 1.0)[:4] == (0.75, 0.5, 0.875, 0.0)
    without = mean([figure, (np.nan, Interval(0, 1))], 1.0)
    assert without == pytest.approx(one, nan_ok=True)


def test_the_interval_of_a_mean_over_seeds_holds_the_truth_often_enough():
    """Seeds on the same examples, half of which all of them cover or none does."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        shared, own = rng.random(120), rng.random((3, 120))
        covered = np.where(rng.random((3, 120)) < 0.5, shared, own) < 0.9
        found = mean(((c.mean(), clopper_pearson(int(c.sum()), 120)) for c in covered), 1.0)
        held += found.low <= 0.9 <= found.high
    assert held / 400 > 0.95


def test_seeds_without_calibration_rows_do_not_count_and_are_named(tmp_path):
    make_calibrated(tmp_path, "map", 1)
    make_run(tmp_path, "map", 2)
    make_run(tmp_path, "mle", 1)
    (family,) = report_on(tmp_path, resamples=0).families
    assert len(row_of(family, "map").decided) == 1 and not row_of(family, "mle").decided
    told = left_out(family)
    assert "mle, map (1 of 2 seeds)" in told and "--calibrate auto" in told
    tables = decided_tables(family, report_on(tmp_path, resamples=0))
    assert {line.row.name for table in tables for line in table.lines} == {"map"}
    text = html.unescape(markdown(report_on(tmp_path, resamples=0), MADE))
    assert told in text


# --- what cannot be had ---------------------------------------------------------------------------


def test_a_risk_that_cannot_be_shown_is_told_with_the_one_that_can(tmp_path):
    make_calibrated(tmp_path, "map", 1)
    asked = Asked(max_risks=(0.01,))
    report = report_on(tmp_path, resamples=0, asked=asked)
    smallest = report.families[0].rows[0].decided[0].smallest_risk
    assert 0.01 < smallest < 1
    told = f"cannot be had (smallest risk {smallest:g})"
    for text in (
        terminal(report),
        html.unescape(markdown(report, MADE)),
        latex(report, MADE),
        html.unescape(page(report, {}, {}, MADE)),
    ):
        assert told in text
    lines = {r["metric"]: r for r in csv.DictReader(io.StringIO(comma_separated(report)))}
    answered = lines["answered_at_risk_0.01"]
    assert (answered["value"], answered["mark"]) == ("", "cannot be had")
    assert float(lines["smallest_risk"]["value"]) == pytest.approx(smallest)
    # what it names can be had
    again = report_on(tmp_path, resamples=0, asked=Asked(max_risks=(smallest,)))
    assert smallest in again.families[0].rows[0].decided[0].answers


def test_of_several_seeds_those_that_cannot_are_counted(tmp_path):
    wrong = calibration_rows(2)
    wrong["labels"] = (wrong["log_probs"][:, 0].argmax(-1) + 1) % 3  # every answer
    make_calibrated(tmp_path, "map", 1)
    make_calibrated(tmp_path, "map", 2, rows=wrong)
    asked = Asked(max_risks=(0.4,))
    (family,) = (report := report_on(tmp_path, resamples=0, asked=asked)).families
    line = lines_of(family.rows[0], asked)[1][0.4]
    assert (line.infeasible, line.smallest, line.answered.num_seeds) == (1, None, 1)
    assert "not by 1 of 2 seeds" in terminal(report) and "smallest" not in terminal(report)
    only = report_on(make_calibrated(tmp_path / "only", rows=wrong), resamples=0, asked=asked)
    assert "cannot be had, nor any risk" in terminal(only)


def test_too_few_calibration_rows_for_a_coverage_are_told(tmp_path):
    make_calibrated(tmp_path, rows=calibration_rows(n=12))
    report = report_on(tmp_path, resamples=0)
    sets, _ = lines_of(report.families[0].rows[0])
    assert [line.short for line in sets.values()] == [0, 0, 1], "0.95 takes 19 rows"
    assert re.search(r"coverage 0.95 +\| cannot be had", terminal(report))
    assert re.search(r"0.95 +\| cannot be had", markdown(report, MADE))


def test_where_nothing_is_answered_there_is_no_risk(tmp_path):
    """Calibration rows that are all sure, some of them wrongly, and examples that never are."""
    rows = calibration_rows(n=200)
    sure = torch.nn.functional.one_hot(rows["labels"], 3).float()
    sure[::5] = sure[::5].roll(1, 1)
    ranked = 20 + torch.linspace(0, 1, 200)[:, None]  # the unsure ones are wrong
    rows["log_probs"] = (ranked * sure)[:, None].log_softmax(-1)
    rows["log_probs"][::5] = (0.9 * sure[::5])[:, None].log_softmax(-1)
    make_calibrated(tmp_path, rows=rows, sharpness=0.0, noise=0.0)
    asked = Asked(max_risks=(0.1,))
    report = report_on(tmp_path, resamples=0, asked=asked)
    line = lines_of(report.families[0].rows[0], asked)[1][0.1]
    assert (line.infeasible, line.answered.value, line.risk.num_seeds) == (0, 0.0, 0)
    for text in (terminal(report), markdown(report, MADE), latex(report, MADE)):
        assert "nan" not in text
    assert "nan" not in comma_separated(report)


# --- promises -------------------------------------------------------------------------------------


def test_shifted_sets_are_marked_in_every_format(tmp_path):
    make_calibrated(tmp_path, shifted=True)
    report = report_on(tmp_path, resamples=0)
    own, shifted = report.families
    for family, told in ((own, "as calibrated"), (shifted, "no guarantee")):
        for table in decided_tables(family, report):
            assert {line.entries[-1].text for line in table.lines} == {told}
            assert ("No guarantee holds here" in table.caption) == family.shifted
    law = {line.entries[5].text for line in decided_tables(shifted, report)[0].lines}
    assert law == {"–"}, "there is no law of the coverage of other data"
    out = terminal(report)
    assert out.count("no guarantee") == 1 and out.index("no guarantee") > out.index("shifted from")
    marks = {
        (r["dataset"], r["mark"])
        for r in csv.DictReader(io.StringIO(comma_separated(report)))
        if r["metric"].startswith("set_")
    }
    assert marks == {("bbc_headlines", ""), ("bodies", "no guarantee")}


def test_a_posterior_calibrated_on_other_data_is_promised_for_those(tmp_path):
    source = str(make_run(tmp_path, "map"))
    of_bodies = METADATA | {"dataset": "bodies"}
    make_calibrated(
        tmp_path, metadata=of_bodies, dataset="bodies", load_lora_path=source, noise=0.31
    )
    own, shifted = report_on(tmp_path, resamples=0).families
    assert shifted.shifted and shifted.rows[0].decided[0].guaranteed
    assert not own.rows[0].decided[0].guaranteed, "the same posterior, on other rows"


PERHAPS = "calibrated on rows that may have been trained on"


@pytest.mark.parametrize(
    ("told", "shifted", "marks"),
    [
        ({"unseen": "true"}, False, {""}),
        ({}, False, {""}),  # older files do not say it
        ({"unseen": "false"}, False, {PERHAPS}),
        ({"unseen": "false"}, True, {PERHAPS, "no guarantee"}),
    ],
)
def test_rows_that_may_have_been_trained_on_are_marked_in_every_format(
    told, shifted, marks, tmp_path
):
    make_calibrated(tmp_path, metadata=METADATA | told, shifted=shifted)
    report = report_on(tmp_path, resamples=0)
    own = report.families[0]
    is_marked = PERHAPS in marks
    for table in decided_tables(own, report):
        ends = {line.entries[-1].text for line in table.lines}
        assert ends == {PERHAPS if is_marked else "as calibrated"}
        assert ("did not know whether the adapter was trained" in table.caption) == is_marked
    law = {line.entries[5].text for line in decided_tables(own, report)[0].lines}
    assert (law == {"–"}) == is_marked, "the law is that of unseen rows"
    assert (PERHAPS in terminal(report)) == is_marked
    rows = list(csv.DictReader(io.StringIO(comma_separated(report))))
    assert {row["mark"] for row in rows if row["metric"].startswith("set_")} == marks


def test_one_seed_whose_rows_may_have_been_trained_on_marks_the_mean(tmp_path):
    for seed, unseen in ((1, "true"), (2, "false")):
        make_calibrated(tmp_path, seed=seed, metadata=METADATA | {"unseen": unseen})
    report = report_on(tmp_path, resamples=0)
    (table, _) = decided_tables(report.families[0], report)
    assert {line.entries[-1].text for line in table.lines} == {PERHAPS}


# --- what can be wrong with the file --------------------------------------------------------------


def with_nan(tensors):
    tensors["log_probs"][3, 0, 0] = float("nan")
    return tensors


DAMAGED = {
    "NaN or infinite": {"rows": with_nan(calibration_rows())},
    "is of 'bodies', not of 'bbc_headlines'": {"metadata": METADATA | {"dataset": "bodies"}},
    "is of the split 'val', not of 'calibration'": {"metadata": METADATA | {"split": "val"}},
    "is of the split 'held_out'": {"metadata": METADATA | {"split": "held_out"}},
    "have 4 classes, those of 'bbc_headlines' 3": {"rows": calibration_rows(num_classes=4)},
    "have 5 draws, those of 'bbc_headlines' 1 draw": {"rows": calibration_rows(num_draws=5)},
    "has 'unseen' 'perhaps', not true or false": {"metadata": METADATA | {"unseen": "perhaps"}},
    "twice": {"rows": calibration_rows() | {"index": torch.zeros(90, dtype=torch.int64)}},
    "negative index": {"rows": calibration_rows() | {"index": -torch.arange(90)}},
    "has shapes (90, 1, 3), (90,), (8,)": {"rows": calibration_rows() | {"index": torch.arange(8)}},
    "labels outside of its 3 classes": {
        "rows": calibration_rows() | {"labels": torch.full((90,), 3)}
    },
    "do not add up to 1": {"rows": calibration_rows() | {"log_probs": torch.zeros(90, 1, 3)}},
    "has no labels": {"rows": {k: v for k, v in calibration_rows().items() if k != "labels"}},
    "has shapes (0, 1, 3)": {"rows": {k: v[:0] for k, v in calibration_rows().items()}},
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_wrong_calibration_costs_the_sets_only_and_says_why(tmp_path, reason):
    folder = make_calibrated(tmp_path, **DAMAGED[reason])
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert skipped.path == folder and reason in skipped.reason
    assert skipped.reason.startswith("no sets and selective answers")
    assert report.num_runs == 1 and not report.families[0].rows[0].decided
    (folder / FILE).unlink()
    change_json(folder / "args.json", args=_args(folder) | {"calibrate": "no"})
    without = report_on(tmp_path, resamples=0)
    assert comma_separated(report) == comma_separated(without) and not without.skipped


def _args(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def test_a_calibration_that_is_not_there_is_said_where_there_should_be_one(tmp_path):
    (make_calibrated(tmp_path) / FILE).unlink()
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert f"there is no {FILE}" in skipped.reason


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_a_reason_and_never_waited_for(tmp_path, kind):
    SPECIAL[kind](make_run(tmp_path, n=6) / FILE)
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert report.num_runs == 1 and FILE in skipped.line and len(skipped.line) < 600


@pytest.fixture(scope="module")
def one_calibrated(tmp_path_factory):
    """(folder, content of its calibration rows), put back before each use."""
    folder = make_calibrated(tmp_path_factory.mktemp("one"), n=6, rows=calibration_rows(n=30))
    return folder, (folder / FILE).read_bytes()


@FAST
@given(data=st.data())
def test_any_damage_to_the_bytes_is_a_calibration_or_a_reason(one_calibrated, data):
    folder, intact = one_calibrated
    content = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / FILE).write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    report = report_on(folder, resamples=0)
    is_decided = bool(report.families[0].rows[0].decided)
    assert report.num_runs == 1 and is_decided == (not report.skipped)


def test_a_temperature_that_is_not_taken_makes_no_sets(tmp_path):
    make_calibrated(tmp_path, temperature=1e300)
    report = report_on(tmp_path, resamples=0)
    assert not report.families[0].rows[0].decided
    assert any("sets would be made with the run's temperature" in s.reason for s in report.skipped)


def test_a_data_set_of_an_older_run_is_not_taken_for_calibration_rows(tmp_path):
    folder = make_run(tmp_path)
    stored = json.loads((folder / "metrics.json").read_text())
    stored["datasets"]["calibration"] = stored["datasets"]["bbc_headlines"]
    write_json(folder / "metrics.json", stored)
    of_old = {"dataset": "calibration", "split": "val"}
    write_tensors(folder / FILE, calibration_rows(), of_old)
    report = report_on(tmp_path, resamples=0)
    assert not report.skipped and [f.dataset for f in report.families] == [
        "bbc_headlines",
        "calibration",
    ]
    assert not any(row.decided for family in report.families for row in family.rows)


def test_hostile_names_stay_text_in_these_tables(tmp_path):
    for number, name in enumerate(NAMES[:-2:3]):
        folder = make_calibrated(tmp_path, name=f"run{number}")
        change_json(folder / "args.json", args=_args(folder) | {"note": name})
        change_json(folder / "metrics.json", modelwrapper=name[:500])
    report = report_on(tmp_path, resamples=0)
    assert all(row.decided for family in report.families for row in family.rows)
    assert all(is_quiet(line) for line in terminal(report).split("\n"))
    text = markdown(report, MADE)
    assert "<" not in text and "](" not in text
    for block in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    tex = latex(report, MADE)
    for caption in re.findall(r"\\caption\{(.*)\}$", tex, re.M):
        assert not set("\\{}$&%#_^") & set(without_commands(caption))
    found = Tags(page(report, {}, {}, MADE))
    assert found.tags.count("script") == 1 and not {"img", "svg", "b"} & set(found.tags)


# --- the whole command ----------------------------------------------------------------------------


def test_a_report_without_calibrated_runs_says_nothing_of_sets(tmp_path):
    make_run(tmp_path, shifted=True, temperature=2.0)
    report = report_on(tmp_path, resamples=0)
    texts = [terminal(report), markdown(report, MADE), latex(report, MADE)]
    texts += [comma_separated(report), page(report, {}, {}, MADE)]
    for text in texts:
        for phrase in ("elective answers", "rediction sets", "guarantee", "--calibrate", "set_"):
            assert phrase not in text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, exit code, output, errors) of the command on runs with and without calibration."""
    root = tmp_path_factory.mktemp("decided")
    for seed in (1, 2):
        make_calibrated(root, "map", seed, shifted=True)
        make_calibrated(root, "blob", seed, shifted=True, num_draws=4, temperature=2.0)
    make_run(root, "mle")
    damaged = make_calibrated(root, "tfb") / FILE
    damaged.write_bytes(damaged.read_bytes()[:300])
    out, err = io.StringIO(), io.StringIO()
    flags = ["--bootstrap", "50", "--coverage", "0.75", "0.5", "0.5", "--set-score", "aps"]
    flags += ["--max-risk", "0.3", "0.001", "--confidence", "0.8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setattr("report.write.draw_family", lambda *args: [])  # tests/test_report.py has them
        patch.setattr("report.write.draw_training", lambda *args: None)
        code = script().run([str(root), *flags])
    return root / "report", code, out.getvalue(), err.getvalue()


def test_one_command_shows_sets_and_answers_everywhere(written):
    folder, code, out, err = written
    assert code == 0
    assert "tfb" in err and "no sets and selective answers" in err
    assert out.count("Not in the tables of sets and selective answers: mle, tfb.") == 1
    assert "sets (aps) and selective answers (confidence 0.8)" in out
    for asked in ("coverage 0.5", "coverage 0.75", "risk 0.3", "risk 0.001"):
        assert re.search(rf"blob \+ temperature +\| 2 +\| {asked} ", out)
    for name in ("tables.md", "tables.tex", "report.html"):
        text = html.unescape((folder / name).read_text(encoding="utf-8"))
        assert "Prediction sets" in text and "Selective answers" in text
        assert "score aps" in text and "with confidence 0.8" in text and "no guarantee" in text
        assert "scaled by the temperature" in text
    metrics = {
        (line["dataset"], line["method"], line["metric"])
        for line in csv.DictReader((folder / "tables.csv").open(newline="", encoding="utf-8"))
    }
    for dataset in ("bbc_headlines", "bodies"):
        for method in ("map", "blob + temperature"):
            for metric in ("set_coverage_at_0.75", "set_size_wrong_at_0.5", "risk_at_risk_0.3"):
                assert (dataset, method, metric) in metrics
    assert not any(m.startswith("set_") for _, method, m in metrics if method in ("blob", "mle"))


def test_the_page_has_the_promise_its_conditions_and_the_plot(written):
    folder = written[0]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert {"m-bbc-headlines-sets.png", "m-bbc-headlines-sets.pdf"} <= {
        file.name for file in folder.iterdir()
    }
    assert not list(folder.glob("*bodies-sets*")), "shifted sets are panels of the source's figure"
    assert 'id="promise"' in text and 'href="#promise"' in text
    assert "exchangeable" in text and "Nothing is promised for a single row" in text
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert sum("sets, score aps" in alt for alt in alts) == 1
    told = html.unescape(text)
    assert "mle, tfb" in told and "--calibrate auto" in told
    rows = re.findall(r"<tr><th scope=\"row\".*?</tr>", text)
    heads = [table.count('<th scope="col"') for table in re.findall("<thead>.*?</thead>", text)]
    assert {row.count("<td") + 1 for row in rows} <= set(heads)


def test_the_latex_tables_of_sets_are_well_formed(written):
    text = (written[0] / "tables.tex").read_text(encoding="utf-8")
    found = 0
    for columns, body in re.findall(r"\\begin{tabular}{(l+r+)}(.*?)\\end", text, re.S):
        rows = [row for row in body.split(r"\\") if " & " in row]
        found += "calibration rows" in rows[0]
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert found == 4


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--coverage", "1"], "must be a number greater than 0 and less than 1, but is '1'"),
        (["--coverage", "0"], "--coverage"),
        (["--coverage", "nan"], "--coverage"),
        (["--coverage"], "--coverage"),
        (["--max-risk", "1.0"], "--max-risk: must be a number"),
        (["--max-risk", "5"], "--max-risk"),
        (["--confidence", "1"], "--confidence: must be a number"),
        (["--set-score", "best"], "--set-score"),
        (["--coverage", *["0.5"] * 21], "--coverage has 21 values; at most 20"),
    ],
)
def test_a_wrong_flag_writes_nothing(tmp_path, capsys, flags, told):
    make_calibrated(tmp_path, n=6)
    assert script().run([str(tmp_path), *flags]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "report").exists()


def test_calibration_rows_are_no_evaluation(tmp_path):
    make_calibrated(tmp_path)
    (run,), _ = find_runs([tmp_path])
    assert [e.dataset for e in run.evaluations] == ["bbc_headlines"]
    assert read_predictions(run.calibration).split == "calibration"
