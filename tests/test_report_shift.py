"""The report's figure and tables against the strength of a shift, and rows of no class."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from test_report import MADE, report_on, script

from report import uncertainty as u
from report.measure import Examples
from report.plots import shown_rows
from report.predictions import read_predictions
from report.runs import find_runs
from report.shift import _figure, find_shifts, shift_tables
from report.tables import comma_separated, latex, markdown, terminal
from utils.files import write_json, write_tensors
from utils.metrics import posterior_predictive, score


def make_run(root, method, seed, strengths=(0, 1, 3, 5), *, noise=0.3, n=80, ood=0, labels=None):
    """A finished run, evaluated with errors of several strengths in the same rows.

    The stronger the errors, the less the logits have to do with the truth.
    """
    folder = root / method / "m" / "news" / f"{method}-seed{seed}"
    truth = torch.randn(n, 1, 3, generator=torch.Generator().manual_seed(0))
    sampled = torch.multinomial(
        (3 * truth[:, 0]).softmax(-1), 1, generator=torch.Generator().manual_seed(1)
    )[:, 0]
    labels = sampled if labels is None else labels
    generator = torch.Generator().manual_seed(100 * seed + len(method))
    draws = 4 if method == "blob" else 1
    blocks = {}

    def keep(block, log_probs, own, file, scores):
        tensors = {"log_probs": log_probs, "labels": own, "index": torch.arange(len(own))}
        metadata = {"dataset": block, "split": "val", "seed": str(seed), "modelwrapper": method}
        write_tensors(folder / file, tensors, metadata)
        blocks[block] = scores | {"split": "val", "num_bins": 15}

    for strength in strengths:
        block = f"news-noisy-{strength}" if strength else "news"
        own = torch.randn(n, draws, 3, generator=generator)
        other = torch.randn(n, 1, 3, generator=torch.Generator().manual_seed(strength + 7))
        mixed = (1 - strength / 6) * truth + strength / 6 * other
        log_probs = (4 * mixed + noise * own).log_softmax(-1)
        file = f"predictions-{block}.safetensors" if strength else "predictions.safetensors"
        found = score(posterior_predictive(log_probs), labels)._asdict()
        keep(block, log_probs, labels, file, found)
    if ood:
        log_probs = torch.randn(ood, draws, 3, generator=generator).log_softmax(-1)
        none = torch.full((ood,), -1)
        keep("far-ood", log_probs, none, "predictions-far-ood.safetensors", {"unlabelled": True})
    args = {"modelwrapper": method, "model": "m", "dataset": "news", "seed": seed}
    args |= {"seed_data": seed, "seed_sampling": seed, "log_path": folder.name}
    write_json(folder / "args.json", {"args": args, "given": {}, "run": {}})
    content = {"modelwrapper": method, "model": "m", "seed": seed, "updates": 4}
    write_json(folder / "metrics.json", content | {"datasets": blocks})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        make_run(root, "map", seed, ood=50)
        make_run(root, "blob", seed, noise=2.0, ood=50)
    return root


@pytest.fixture(scope="module")
def report(runs):
    return report_on(runs, resamples=40)


def test_the_figure_shows_every_metric_of_every_row_at_every_strength(report):
    (shift,) = find_shifts(report.families)
    assert list(shift.families) == [0, 1, 3, 5] and shift.dataset == "news"
    figure = _figure(shift, shift.names(), {"map": 0, "blob": 1})
    own = {row.name: row for row in shift.families[3].rows}
    for ax, key in zip(figure.axes, ("acc", "nll", "ece"), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert lines.keys() == {"map", "blob"} and len(ax.collections) == 2
        for name, line in lines.items():
            np.testing.assert_array_equal(line.get_xdata(), [0, 1, 3, 5])
            assert line.get_ydata()[2] == own[name].cells[key].value
            band = ax.collections[list(lines).index(name)].get_paths()[0].vertices
            at_three = band[band[:, 0] == 3][:, 1]
            ends = own[name].cells[key].low, own[name].cells[key].high
            assert (at_three.min(), at_three.max()) == pytest.approx(ends)
    accuracy = figure.axes[0].get_lines()[0].get_ydata()
    assert accuracy[0] > accuracy[-1] + 0.2, "the shift was made to hurt"


def test_the_tables_hold_the_means_over_seeds(report, runs):
    (shift,) = find_shifts(report.families)
    (acc, _, ece) = shift_tables(shift)
    assert acc.head == ["method", "0", "1", "3", "5"]
    stored = [
        json.loads((runs / f"map/m/news/map-seed{seed}/metrics.json").read_text())["datasets"]
        for seed in (1, 2)
    ]
    for table, key in ((acc, "acc"), (ece, "ece")):
        name, cells = table.lines[0]
        expected = np.mean([blocks["news-noisy-5"][key] for blocks in stored])
        assert name == "map" and cells[-1].value == pytest.approx(expected, abs=1e-5)
    assert f"{cells[-1].value:.3f}" in markdown(report, MADE).split("## Strength of the shift")[1]
    assert latex(report, MADE).count("strength of the errors") == 3


def test_the_command_writes_the_figure_and_the_page_shows_it(tmp_path):
    make_run(tmp_path, "map", 1, strengths=(0, 3))
    folder = tmp_path / "out"
    assert script().run([str(tmp_path), "--bootstrap", "0", "--out", str(folder)]) == 0
    names = {file.name for file in folder.iterdir()}
    assert {"m-news-shift.png", "m-news-shift.pdf"} <= names
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="shift"' in text and "m-news-shift.png" in text
    assert text.count("against the strength of the shift") == 3
    assert "m-news-shift.png" in json.loads((folder / "report-files.json").read_text())["plots"]


def test_without_errors_in_a_text_there_is_no_figure(tmp_path):
    make_run(tmp_path, "map", 1, strengths=(0,))
    report = report_on(tmp_path, resamples=0)
    assert find_shifts(report.families) == []
    assert "strength" not in markdown(report, MADE)


def test_other_rows_are_another_shift(tmp_path):
    make_run(tmp_path, "map", 1)
    labels = torch.zeros(80, dtype=torch.long)
    make_run(tmp_path, "blob", 1, labels=labels)
    shifts = find_shifts(report_on(tmp_path, resamples=0).families)
    assert sorted(shift.names() for shift in shifts) == [["blob"], ["map"]]


def test_a_row_may_lack_a_strength(tmp_path):
    make_run(tmp_path, "map", 1)
    make_run(tmp_path, "blob", 1, strengths=(0, 5))
    report = report_on(tmp_path, resamples=0)
    (shift,) = find_shifts(report.families)
    lines = dict(shift_tables(shift)[0].lines)
    assert [cell is None for cell in lines["blob"]] == [False, True, True, False]
    assert "–" in markdown(report, MADE) and latex(report, MADE)
    assert len(_figure(shift, shift.names(), {"map": 0, "blob": 1}).axes[0].get_lines()) == 2


# --- rows of no class -----------------------------------------------------------------------------


def test_rows_of_no_class_have_uncertainties_and_nothing_else(report):
    (far,) = (family for family in report.families if family.dataset == "far-ood")
    assert not far.labelled and far.notes[0].startswith("These examples belong to none")
    for row in far.rows:
        assert not {"acc", "ece", "nll", "brier", "aurc"} & row.cells.keys()
        wanted = {"ood_auroc_maxprob", "ood_fpr95_maxprob", "ood_auroc_entropy", "entropy"}
        assert wanted <= row.cells.keys()
    assert "ood_auroc_mi" in far.rows[1].cells and "ood_fpr95_mi" in far.rows[1].cells
    assert len(shown_rows(far)) == 2
    assert "AUROC entropy" in terminal(report).split("far-ood")[1]
    lines = csv.DictReader(io.StringIO(comma_separated(report)))
    assert {line["metric"] for line in lines if line["dataset"] == "far-ood"} & {"nll"} == set()


def test_the_unseen_rows_are_held_against_the_runs_own_test_rows(runs, report):
    """AUROC and FPR@95 by scikit-learn, of one seed."""
    from sklearn.metrics import roc_auc_score, roc_curve

    found, _ = find_runs([runs / "map/m/news/map-seed1"])
    by_name = {e.dataset: Examples.of(read_predictions(e)) for e in found[0].evaluations}
    scores = {name: 1 - by_name[name].probs.max(1) for name in ("news", "far-ood")}
    positive = np.repeat([0, 1], [len(scores["news"]), len(scores["far-ood"])])
    both = np.concatenate([scores["news"], scores["far-ood"]])
    (family,) = (
        f
        for f in report_on(runs / "map/m/news/map-seed1", resamples=40).families
        if f.dataset == "far-ood"
    )
    cell = family.rows[0].cells["ood_auroc_maxprob"]
    assert cell.value == pytest.approx(roc_auc_score(positive, both))
    assert cell.low < cell.value < cell.high
    assert cell.value == pytest.approx(u.detection(both, positive.astype(float))[0])
    # kept at the threshold that keeps 95 % of the source examples
    false_alarms, hits, _ = roc_curve(positive, both, drop_intermediate=False)
    kept = 1 - hits[false_alarms <= 0.05 + 1e-9].max()
    assert family.rows[0].cells["ood_fpr95_maxprob"].value == pytest.approx(kept, abs=0.021)


@pytest.mark.parametrize(
    ("block", "labels", "reason"),
    [
        ({"unlabelled": True, "acc": 0.5}, [-1, -1], "'acc': there are no labels for it"),
        ({}, [-1, -1], "'acc': it is missing"),
        ({"unlabelled": True}, [-1, 0], "labels outside of its 3 classes"),
        ({"unlabelled": "perhaps"}, [-1, -1], "unlabelled"),
    ],
)
def test_a_file_that_contradicts_itself_is_left_out(tmp_path, block, labels, reason):
    folder = make_run(tmp_path, "map", 1, strengths=(0,), ood=2)
    stored = json.loads((folder / "metrics.json").read_text())
    stored["datasets"]["far-ood"] = block
    write_json(folder / "metrics.json", stored)
    log_probs = torch.zeros(2, 1, 3).log_softmax(-1)
    tensors = {"log_probs": log_probs, "labels": torch.tensor(labels), "index": torch.arange(2)}
    metadata = {"dataset": "far-ood", "split": "val"}
    write_tensors(folder / "predictions-far-ood.safetensors", tensors, metadata)
    report = report_on(tmp_path, resamples=0)
    assert any(reason in item.reason for item in report.skipped), report.skipped
    assert "far-ood" not in {family.dataset for family in report.families}
