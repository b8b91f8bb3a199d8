"""The report: from run folders to files, with everything that can be wrong with a folder."""

import csv
import html
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_folder
from scipy.stats import binomtest, norm
from scipy.stats import t as student

import main
from report import uncertainty as u
from report.collect import Options, collect
from report.measure import Examples
from report.plots import MOST, _entropy, shown_rows, style, wilson
from report.runs import find_runs
from report.significance import interval, mean_over_seeds, paired_difference, resample
from report.tables import comma_separated, latex, markdown, terminal
from utils.files import write_json, write_tensors
from utils.metrics import posterior_predictive, score
from utils.temperature import scale

MADE = {"command": "python scripts/report.py", "commit": "0123abc", "time": "now"}


def script():
    """scripts/report.py as a module."""
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(
    root,
    method="map",
    seed=1,
    *,
    n=150,
    num_classes=3,
    num_draws=1,
    sharpness=3.0,
    noise=0.3,
    shifted=False,
    temperature=None,
    dataset="bbc_headlines",
    name=None,
    **flags,
):
    """A finished run's folder with made-up predictions; the examples are the same in all."""
    folder = root / method / "m" / dataset / (name or f"{method}-seed{seed}")
    truth = torch.randn(n, 1, num_classes, generator=torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(1)
    labels = torch.multinomial((2 * truth[:, 0]).softmax(-1), 1, generator=order)[:, 0]
    generator = torch.Generator().manual_seed(100 * seed + len(method))
    blocks = {}
    stems = {dataset: "predictions"} | ({"bodies": "predictions-bodies"} if shifted else {})
    for position, (data, stem) in enumerate(stems.items()):
        own = torch.randn(n, num_draws, num_classes, generator=generator)
        logits = sharpness * truth / (1 + 2 * position) + noise * own
        tensors = {
            "log_probs": logits.log_softmax(-1),
            "labels": labels,
            "index": torch.arange(n),
        }
        metadata = {"dataset": data, "split": "val", "seed": str(seed), "modelwrapper": method}
        write_tensors(folder / f"{stem}.safetensors", tensors, metadata)
        metrics = score(posterior_predictive(tensors["log_probs"]), labels)
        blocks[data] = metrics._asdict() | {"split": "val", "num_bins": 15}
        if temperature is not None:
            blocks[data]["temperature_scaled"] = {"temperature": temperature}
    args = {"modelwrapper": method, "model": "m", "dataset": dataset, "seed": seed, "lr": 1e-4}
    args |= {"seed_data": seed, "seed_sampling": seed, "log_path": folder.name} | flags
    made = {"command": ["main.py", "--seed", str(seed)], "commit": "c0ffee", "started": f"{seed}"}
    write_json(folder / "args.json", {"args": args, "given": {}, "run": made})
    content = {"modelwrapper": method, "model": "m", "seed": seed, "updates": 4}
    write_json(folder / "metrics.json", content | {"datasets": blocks})
    lines = [json.dumps({"step": step, "nll": 1 / step}) for step in range(1, 5)]
    (folder / "history.jsonl").write_text("\n".join([*lines, '{"step": 5, "nl']))
    return folder


def report_on(root, **options):
    return collect(*find_runs([root]), Options(**{"resamples": 200} | options))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, exit code, output) of the command on two methods, two seeds and a shifted set."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        make_run(root, "map", seed, shifted=True, temperature=2.0)
        make_run(root, "blob", seed, shifted=True, num_draws=4, noise=1.0)
    (root / "broken").mkdir()
    (root / "broken" / "metrics.json").write_text("{")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        code = script().run([str(root), "--bootstrap", "200"])
    return root / "report", code, output.getvalue()


def test_one_command_leaves_tables_plots_and_a_page(written):
    folder, code, output = written
    assert code == 0
    names = {file.name for file in folder.iterdir()}
    assert {"report.html", "tables.md", "tables.tex", "tables.csv"} <= names
    for plot in ("reliability", "risk-coverage", "scatter", "draws", "training"):
        assert {f"m-bbc-headlines-{plot}.png", f"m-bbc-headlines-{plot}.pdf"} <= names
    assert {"m-bbc-headlines-bodies-entropy.png", "m-bbc-headlines-bodies-entropy.pdf"} <= names
    assert os.path.relpath(folder / "report.html") in output and "map + temperature" in output


def test_the_page_stands_alone_and_names_what_made_it(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert "http://" not in text and "https://" not in text
    assert "main.py --seed 1" in text and "c0ffee" in text and "scripts/report.py" in text
    assert "broken" in text and "skipped:" in text and "150 examples" in text
    anchors = set(re.findall(r'id="([^"]*)"', text))
    assert {source[1:] for source in sources if source.startswith("#")} <= anchors


def test_captions_say_of_what_they_are(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert len(alts) == len(set(alts)) and "None updates" not in text
    assert sum("(val), m: 150 examples" in alt for alt in alts) >= 4


def test_the_baseline_is_always_drawn_and_rows_look_different(tmp_path):
    for number in range(MOST + 2):
        make_run(tmp_path, "blob", name=f"b{number}", n=40, lr=number)
    make_run(tmp_path, "map", n=40, sharpness=-9.0)
    (family,) = report_on(tmp_path, resamples=0).families
    rows = shown_rows(family)
    assert rows[0].name == family.baseline == "map" and len(rows) == MOST
    assert len({repr(style(place)) for place in range(64)}) == 64


@pytest.mark.slow
def test_the_page_works_in_a_real_browser(written, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium here")
    # clicks on a header twice and notes the order of the rows
    probe = """<script>
      const table = document.querySelector("table.sortable");
      const values = () => [...table.tBodies[0].rows].map(r => r.cells[4].dataset.value).join(" ");
      const found = [values()];
      for (const _ of [1, 2]) {
        table.tHead.rows[0].cells[4].querySelector("button").click(); found.push(values());
      }
      document.body.dataset.found = found.join("|");
      document.body.dataset.images =
        [...document.images].every(i => i.complete && i.naturalWidth > 0);
      </script></body>"""
    page = tmp_path / "probed.html"
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", probe))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += "--enable-logging=stderr --virtual-time-budget=3000 --dump-dom "
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    before, up, down = (
        [float(value) for value in order.split()]
        for order in re.search(r'data-found="([^"]*)"', result.stdout)[1].split("|")
    )
    assert up == sorted(before) and down == sorted(before, reverse=True)
    assert 'data-images="true"' in result.stdout
    assert 'aria-sort="descending"' in result.stdout


def test_the_tables_hold_the_mean_over_seeds_of_the_metrics(tmp_path):
    folders = [make_run(tmp_path, "blob", seed, num_draws=4) for seed in (1, 2, 3)]
    lines = list(csv.DictReader(io.StringIO(comma_separated(report_on(tmp_path)))))
    found = {line["metric"]: line for line in lines}
    for key in ("acc", "ece", "nll", "brier"):
        blocks = [json.loads((f / "metrics.json").read_text())["datasets"] for f in folders]
        expected = np.mean([block["bbc_headlines"][key] for block in blocks])
        assert float(found[key]["value"]) == pytest.approx(expected, abs=1e-5)
        assert float(found[key]["low"]) <= expected <= float(found[key]["high"])
    assert found["nll"]["n_examples"] == "150" and found["nll"]["seeds"] == "1 2 3"
    assert found["nll"]["commits"] == "c0ffee" and found["nll"]["n_draws"] == "4"


def test_temperature_scaling_is_a_row_of_its_own(tmp_path):
    make_run(tmp_path, temperature=2.0)
    (family,) = report_on(tmp_path).families
    raw, scaled = family.rows
    assert (raw.name, scaled.name) == ("map", "map + temperature")
    (run,), _ = find_runs([tmp_path])
    from report.predictions import read_predictions

    predictions = read_predictions(run.evaluations[0])
    log_probs = posterior_predictive(scale(torch.from_numpy(predictions.draws).double(), 2.0))
    expected = score(log_probs, torch.from_numpy(predictions.labels))
    assert scaled.cells["nll"].value == pytest.approx(expected.nll)
    assert scaled.cells["acc"].mark == raw.cells["acc"].mark == "tied", "the same predictions"


def test_draws_in_blocks_give_the_same_numbers(tmp_path, monkeypatch):
    make_run(tmp_path, "blob", num_draws=4, temperature=2.0)
    whole = comma_separated(report_on(tmp_path))
    monkeypatch.setattr("decisions.information.BLOCK", 4 * 3 * 7)  # rows 7 by 7
    assert comma_separated(report_on(tmp_path)) == whole


def test_runs_of_other_settings_never_share_a_row(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "map", seed)
        make_run(tmp_path, "map", seed, name=f"fast-seed{seed}", lr=1e-3)
        make_run(tmp_path, "tfb", seed, load_lora_path=f"runs/map-seed{seed}")
    (family,) = report_on(tmp_path).families
    assert [row.name for row in family.rows] == ["map (lr 0.0001)", "map (lr 0.001)", "tfb"]
    assert all(len(row.results) == 2 for row in family.rows)


def test_what_cannot_be_compared_stands_in_tables_of_its_own(tmp_path):
    make_run(tmp_path, "map")
    make_run(tmp_path, "mle", n=100)
    make_run(tmp_path, "blob", num_classes=5)
    report = report_on(tmp_path)
    assert [len(family.rows) for family in report.families] == [1, 1, 1]
    assert {(f.num_examples, f.num_classes) for f in report.families} == {
        (150, 3),
        (100, 3),
        (150, 5),
    }


def test_missing_seeds_are_said(tmp_path):
    for method, seed in (("map", 1), ("map", 2), ("blob", 1)):
        make_run(tmp_path, method, seed)
    (family,) = report_on(tmp_path).families
    assert family.notes == ["blob has no seed 2."]


def test_of_two_equal_runs_the_newer_counts(tmp_path):
    make_run(tmp_path, name="first")
    args = json.loads((tmp_path / "map/m/bbc_headlines/first/args.json").read_text())
    second = make_run(tmp_path, name="second")
    args["run"]["started"] = "2"
    write_json(second / "args.json", args)
    report = report_on(tmp_path)
    assert report.num_runs == 1 and report.skipped[0].path.name == "first"


def test_an_evaluation_in_two_steps_joins_the_run_that_trained(tmp_path):
    source = make_run(tmp_path, "blob", num_draws=3)
    make_run(tmp_path, "blob", num_draws=3, dataset="bodies", load_lora_path=str(source), noise=2)
    own, shifted = report_on(tmp_path).families
    assert shifted.shifted and shifted.source == own.dataset == "bbc_headlines"
    assert "ood_auroc_mi" in shifted.rows[0].cells and "ood_auroc_mi" not in own.rows[0].cells


def test_shifted_examples_are_held_against_source_examples(tmp_path):
    make_run(tmp_path, shifted=True)
    _, shifted = report_on(tmp_path).families
    (run,), _ = find_runs([tmp_path])
    from report.predictions import read_predictions

    scores = [Examples.of(read_predictions(e)).scores["entropy"] for e in run.evaluations]
    positive = np.repeat([0.0, 1.0], [len(s) for s in scores])
    auroc, _ = u.detection(np.concatenate(scores), positive)
    cell = shifted.rows[0].cells["ood_auroc_entropy"]
    assert cell.value == pytest.approx(auroc) and cell.low < auroc < cell.high
    assert auroc > 0.6, "the shifted predictions were made flatter"


def change_json(file, **changes):
    write_json(file, json.loads(file.read_text()) | changes)


def test_runs_on_other_examples_are_no_repetitions(tmp_path):
    make_run(tmp_path, name="small", n=60)
    make_run(tmp_path, name="large", n=90)
    make_run(tmp_path, name="shifted", n=90, shifted=True)
    report = report_on(tmp_path, resamples=0)
    found = {(family.dataset, family.num_examples) for family in report.families}
    assert found == {("bbc_headlines", 60), ("bbc_headlines", 90), ("bodies", 90)}
    (skipped,) = report.skipped  # of one seed and the same 90 headlines, one is enough
    assert "the same method, settings, seed and examples" in skipped.reason


def test_a_damaged_newer_run_does_not_replace_an_older_one(tmp_path):
    old, new = (make_run(tmp_path, name=name) for name in ("1-old", "2-new"))
    cut(new)
    report = report_on(tmp_path, resamples=0)
    assert [result.run.folder for result in report.families[0].rows[0].results] == [old]
    (skipped,) = report.skipped
    assert skipped.path == new and "cannot be read" in skipped.reason


@pytest.mark.parametrize("adapters_are_there", [True, False])
def test_one_seed_on_several_adapters_is_as_many_repetitions(tmp_path, adapters_are_there):
    for seed in (1, 2, 3):
        source = make_run(tmp_path, "map", seed)
        path = str(source) if adapters_are_there else f"gone/map-seed{seed}"
        make_run(tmp_path, "tfb", 1, name=f"tfb-on-{seed}", load_lora_path=path)
    (family,) = report_on(tmp_path, resamples=20).families
    tfb = family.rows[1]
    assert tfb.seeds == ["1", "1 (adapter 2)", "1 (adapter 3)"] and not family.notes
    assert tfb.cells["nll"].difference.num_common == 3, "paired with the adapters' own runs"


def test_repetitions_on_one_adapter_are_paired_among_themselves(tmp_path):
    source = make_run(tmp_path, "map", 1)
    for method in ("tfb", "laplace"):
        for seed in (1, 2):
            make_run(tmp_path, method, seed, load_lora_path=str(source))
    (family,) = report_on(tmp_path, resamples=20).families
    assert [len(row.results) for row in family.rows] == [1, 2, 2]
    assert {row.cells["nll"].difference.num_common for row in family.rows[1:]} == {0}


def shifted_step(root, source, **flags):
    return make_run(root, "blob", 1, num_draws=3, dataset="bodies", load_lora_path=source, **flags)


def test_a_second_step_is_shifted_even_without_the_first(tmp_path):
    source = make_run(tmp_path / "a", "blob", num_draws=3)
    shifted_step(tmp_path / "b", str(source))
    (family,) = report_on(tmp_path / "b", resamples=0).families
    assert family.shifted and family.source == "bbc_headlines"
    shutil.rmtree(source)
    shifted_step(tmp_path / "b", "gone", adapter_dataset="bbc_headlines")
    (family,) = report_on(tmp_path / "b", resamples=0).families
    assert family.shifted and family.source == "bbc_headlines"


def test_a_relative_adapter_is_found_from_the_run(tmp_path, monkeypatch):
    source = make_run(tmp_path / "out", "blob", num_draws=3)
    shifted_step(tmp_path / "out", str(source.relative_to(tmp_path)))
    monkeypatch.chdir("/")
    own, shifted = report_on(tmp_path, resamples=0).families
    assert shifted.source == own.dataset and "ood_auroc_mi" in shifted.rows[0].cells


def test_a_second_step_with_another_method_keeps_its_row(tmp_path):
    source = make_run(tmp_path, "map")
    shifted_step(tmp_path, str(source))
    _, shifted = report_on(tmp_path, resamples=0).families
    assert shifted.source == "bbc_headlines" and shifted.rows[0].name == "blob"
    assert "ood_auroc_entropy" not in shifted.rows[0].cells, "map's examples are not its source"


def test_every_second_step_is_a_row_or_left_out_with_the_reason(tmp_path):
    source = str(make_run(tmp_path, "blob", num_draws=3, bayes_eval_n_samples_final=3))
    for draws in (3, 5):
        flags = {"bayes_eval_n_samples_final": draws, "name": f"step-{draws}"}
        shifted_step(tmp_path, source, **flags)
    shifted_step(tmp_path, source, bayes_eval_n_samples_final=3, name="again", temperature=2.0)
    report = report_on(tmp_path, resamples=0)
    (shifted,) = (family for family in report.families if family.shifted)
    assert [row.name for row in shifted.rows] == [
        "blob (bayes-eval-n-samples-final 3)",
        "blob (bayes-eval-n-samples-final 5)",
    ]
    assert all("ood_auroc_mi" in row.cells for row in shifted.rows)
    repeated, scaled = sorted(item.reason for item in report.skipped)
    assert "which is newer" in repeated and "was fitted on bodies" in scaled


def test_other_models_and_methods_of_the_same_name_stay_apart(tmp_path):
    for number in (1, 2):
        folder = make_run(tmp_path, "map", name=f"model{number}")
        change_json(folder / "metrics.json", model=f"/x/run{number}/final")
        folder = make_run(tmp_path, "mle", name=f"method{number}")
        change_json(folder / "metrics.json", modelwrapper=f"p{number}/my.py:Mine")
    report = report_on(tmp_path, resamples=0)
    models = {family.model: [row.name for row in family.rows] for family in report.families}
    mine = ["p1/my.py:Mine", "p2/my.py:Mine"]
    assert models == {"m": mine, "run1/final": ["map"], "run2/final": ["map"]}


def test_rows_are_named_by_what_differs(tmp_path):
    make_run(tmp_path, "map", name="a", shuffle_train=True, laplace_rank=0)
    make_run(tmp_path, "map", name="b", shuffle_train=False, laplace_rank=8)
    make_run(tmp_path, "tfb", name="a", load_lora_path="x/default")
    make_run(tmp_path, "tfb", name="b", load_lora_path="y/default", new_flag=3)
    (family,) = report_on(tmp_path, resamples=0).families
    assert [row.name for row in family.rows] == [
        "map (laplace-rank 0, shuffle-train true)",
        "map (laplace-rank 8, shuffle-train false)",
        "tfb (load-lora-path x/default)",
        "tfb (load-lora-path y/default)",
    ]


def test_a_flag_that_older_runs_do_not_know_splits_no_row(tmp_path):
    make_run(tmp_path, "map", 1)
    make_run(tmp_path, "map", 2, new_flag="default")
    (family,) = report_on(tmp_path, resamples=0).families
    assert [row.name for row in family.rows] == ["map"] and len(family.rows[0].results) == 2


def test_shifted_examples_without_source_examples_have_no_plot_of_both(tmp_path):
    (make_run(tmp_path, "blob", shifted=True) / "predictions.safetensors").write_bytes(b"")
    for name in ("a", "b"):  # names that are no mathematics
        make_run(tmp_path, "map", name=name, note=rf"$\{name}$")
    assert script().run([str(tmp_path), "--bootstrap", "0"]) == 0
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert "m-bbc-headlines-bodies-scatter.png" in names
    assert "m-bbc-headlines-bodies-entropy.png" not in names


def test_entropies_of_other_class_counts_have_axes_of_their_own(tmp_path):
    source = str(make_run(tmp_path, "blob", num_classes=5, sharpness=0.0, noise=0.0))
    make_run(tmp_path, "blob", dataset="bodies", load_lora_path=source, sharpness=0.0, noise=0.0)
    _, shifted = report_on(tmp_path, resamples=0).families
    assert any("different numbers of classes" in note for note in shifted.notes)
    figure = _entropy(shifted, [(shifted.rows[0], *style(0))])
    ends = [patch.get_data().edges[-1] for patch in figure.axes[0].patches]
    assert ends == pytest.approx([np.log(5), np.log(3)])


# --- what can be wrong with a folder --------------------------------------------------------------


def cut(folder):
    file = folder / "predictions.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def change(**tensors):
    def damage(folder):
        from safetensors.torch import load_file

        file = folder / "predictions.safetensors"
        content = load_file(file)
        for key, make in tensors.items():
            content[key] = make(content[key])
        write_tensors(file, content, {"dataset": "bbc_headlines", "split": "val"})

    return damage


def with_nan(log_probs):
    log_probs[3, 0, 0] = float("nan")
    return log_probs


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda f: (f / "metrics.json").unlink(), "not finished"),
        (lambda f: (f / "metrics.json").write_text("[1"), "not valid JSON"),
        (lambda f: (f / "metrics.json").write_text("[]"), "the content is []"),
        (lambda f: (f / "metrics.json").write_text("{}"), "key 'datasets' is missing"),
        (lambda f: (f / "args.json").write_bytes(b"\xff\x00"), "not UTF-8 text"),
        (lambda f: (f / "predictions.safetensors").unlink(), "there is no predictions"),
        (cut, "cannot be read as safetensors"),
        (change(log_probs=with_nan), "NaN or infinite"),
        (change(log_probs=lambda t: t[:, 0]), "has shapes (150, 3)"),
        (change(log_probs=lambda t: t + 1), "do not add up"),
        (change(labels=lambda t: t + 7), "outside of its 3 classes"),
        (change(labels=lambda t: t[:9]), "has shapes (150, 1, 3), (9,)"),
        (change(index=lambda t: t * 0), "twice"),
    ],
)
def test_a_damaged_run_is_left_out_with_the_reason(tmp_path, damage, reason):
    make_run(tmp_path, "map")
    damage(make_run(tmp_path, "blob"))
    report = report_on(tmp_path, resamples=0)
    assert report.num_runs == 1 and [row.name for row in report.families[0].rows] == ["map"]
    (skipped,) = report.skipped
    assert skipped.path.name == "blob-seed1" and reason in skipped.reason
    assert f"skipped: {skipped.reason}" in html.unescape(markdown(report, MADE))


def test_what_no_run_writes_is_no_traceback(tmp_path):
    make_run(tmp_path, "map", 1)
    for seed, changes in enumerate(({"seed": [1]}, {"updates": 10**400}, {"datasets": {"": 1}}), 2):
        folder = make_run(tmp_path, "map", seed)
        change_json(folder / "metrics.json", **changes)
        (folder / "args.json").unlink()
    folder = make_run(tmp_path, "blob")
    (folder / "metrics.json").unlink()
    for name in ("step-00000012.bak", "step-00000011"):
        (folder / "state" / name).mkdir(parents=True)
    report = report_on(tmp_path, resamples=0)
    assert report.num_runs == 1
    reasons = sorted(item.reason.partition("metrics.json: key ")[2] for item in report.skipped)
    assert ["'datasets." in reasons[1], "'seed' is [1]" in reasons[2]] == [True, True]
    assert "'updates' is 1000" in reasons[3] and len(reasons[3]) < 300
    assert [item.reason for item in report.skipped if "interrupted after update 11" in item.reason]


def test_unknown_keys_do_no_harm(tmp_path):
    change_json(make_run(tmp_path) / "metrics.json", new=[1])
    report = report_on(tmp_path)
    assert report.num_runs == 1 and not report.skipped


@pytest.mark.parametrize(
    "key, value",
    [("updates", "many"), ("training_seconds", float("nan")), ("seed", True), ("model", 7)],
)
def test_a_value_of_another_type_is_named(tmp_path, key, value):
    change_json(make_run(tmp_path) / "metrics.json", **{key: value})
    (skipped,) = report_on(tmp_path).skipped
    assert f"metrics.json: key '{key}' is {value!r}: " in skipped.reason


@pytest.mark.parametrize(
    "flag, value, rule",
    [
        ("seed", -1, "not a number from 0"),
        ("seed_data", True, "not a number from 0"),
        ("seed_sampling", "1", "not a number from 0"),
        ("dataset", ["a"], "a text is needed"),
        ("load_lora_path", 7, "a text is needed"),
        ("lr", {"a": 1}, "a flag is a text, a number"),
    ],
)
def test_a_flag_of_another_type_is_named(tmp_path, flag, value, rule):
    make_run(tmp_path, **{flag: value}) if flag not in ("seed", "dataset") else None
    if flag in ("seed", "dataset"):
        folder = make_run(tmp_path)
        stored = json.loads((folder / "args.json").read_text())
        stored["args"][flag] = value
        write_json(folder / "args.json", stored)
    (skipped,) = report_on(tmp_path).skipped
    assert flag.replace("_", "-") in skipped.reason.replace("_", "-") and rule in skipped.reason
    assert repr(value) in skipped.reason


def test_stored_metrics_that_disagree_are_said(tmp_path):
    folder = make_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["datasets"]["bbc_headlines"]["nll"] += 0.1
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (note,) = report_on(tmp_path, resamples=0).notes
    assert "NLL" in note
    metrics["datasets"]["bbc_headlines"]["temperature_scaled"] = {"temperature": 2.0, "acc": 0.5}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    _, scaled = report_on(tmp_path, resamples=0).notes
    assert "ACC" in scaled and "metrics.json says 0.5" in scaled


def test_linked_runs_are_found_and_loops_end(tmp_path):
    folder = make_run(tmp_path / "elsewhere")
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "runs" / "deep" / "run").symlink_to(folder)
    (tmp_path / "runs" / "deep" / "loop").symlink_to(tmp_path / "runs")
    runs, _ = find_runs([tmp_path / "runs"])
    assert [run.folder for run in runs] == [tmp_path / "runs" / "deep" / "run"]


def test_no_finished_run_is_exit_code_2(tmp_path, capsys):
    run = script().run
    assert run([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert run([str(tmp_path / "nowhere")]) == 2
    assert "there is no" in capsys.readouterr().err
    (make_run(tmp_path) / "metrics.json").unlink()
    assert run([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "skipped: not finished" in err and "no finished run" in err
    assert run([str(tmp_path), "--bootstrap", "-1"]) == 2
    assert not (tmp_path / "report").exists()


def test_a_real_run_is_reported_as_it_measured_itself(classifier_flags, tmp_path):
    flags = [*classifier_flags, "--modelwrapper", "mcdropout", "--max-train-steps", "2"]
    main.main([*flags, "--temperature-scaling"])
    report = report_on(tmp_path / "out")
    stored = json.loads((run_folder(flags) / "metrics.json").read_text())["datasets"]
    block = stored["bbc_headlines"]
    for row, expected in zip(
        report.families[0].rows, (block, block["temperature_scaled"]), strict=True
    ):
        for key in ("acc", "ece", "nll", "brier"):
            assert row.cells[key].value == pytest.approx(expected[key], abs=1e-5)
    assert not report.skipped and not report.notes
    assert len(report.families) == 1, "what the temperature was fitted on is no evaluation"


# --- significance ---------------------------------------------------------------------------------


def replicates_of(values, resamples=4000, seed=0):
    return np.concatenate(
        [u.mean(values, weights) for (weights,) in resample({7: len(values)}, resamples, seed)]
    )


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = (np.arange(400) < 300).astype(float)
    low, high = interval(0.75, replicates_of(values))
    half = norm.ppf(0.975) * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - half, abs=0.003)
    assert high == pytest.approx(0.75 + half, abs=0.003)


def test_seeds_alone_give_the_t_interval_of_their_mean():
    values = {1: 1.0, 2: 2.0, 3: 6.0}
    value, low, high = mean_over_seeds(values, dict.fromkeys(values, np.zeros(9)))
    expected = student.interval(0.95, 2, loc=3.0, scale=np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert value == 3.0 and (low, high) == pytest.approx((max(0, expected[0]), expected[1]))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("of_examples", [0.1, 1.0])
def test_seed_noise_alone_is_rarely_significant(num_seeds, of_examples):
    rng = np.random.default_rng(num_seeds)
    seeds, found = range(num_seeds), 0
    for _ in range(600):
        shared = rng.normal(0, of_examples)  # noise of the test examples, the same for all seeds
        values = [dict(zip(seeds, rng.normal(size=num_seeds), strict=True)) for _ in range(2)]
        values[0] = {seed: value + shared for seed, value in values[0].items()}
        resampled = rng.normal(0, of_examples, 100)
        replicates = dict.fromkeys(seeds, resampled), dict.fromkeys(seeds, np.zeros(100))
        no_floors = (dict.fromkeys(seeds, 0.0),) * 2
        found += paired_difference(tuple(values), replicates, no_floors).significant
    assert found / 600 < 0.07


CALIBRATION_ERRORS = {
    "ece": lambda e, w: u.calibration_errors(*e.top, 15, w)[0],
    "ece_adaptive": lambda e, w: u.adaptive_calibration_error(*e.top, 15, w),
    "ece_smooth": lambda e, w: (
        e.smooth[0] if w is None else u.smooth_error_at(*e.top, e.smooth[1], w)
    ),
    "ece_classwise": lambda e, w: u.classwise_calibration_error(e.probs, e.labels, 15, w),
    "brier_calibration": lambda e, w: u.brier_calibration(e.probs, e.labels, 15, w),
}


def compared(seed, temperatures, n=200, keys=("ece",)):
    """Differences of two rows, unsure and sure, whose labels are as they say at temperature 1."""
    rng = np.random.default_rng(seed)
    ((weights,),) = resample({7: n}, 100, seed)
    sides = []
    for mean, temperature in zip((1.0, 4.0), temperatures, strict=True):
        logits = rng.normal(mean, 0.4, n) * rng.choice([-1, 1], n)
        labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(int)
        scaled = np.stack([np.zeros(n), logits / temperature], 1)
        log_probs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        e = Examples(log_probs[:, None], labels, log_probs)
        floors = u.noise_floors(e.probs, 15, seed)
        errors = {key: CALIBRATION_ERRORS[key] for key in keys}
        sides.append(
            {k: (error(e, None), error(e, weights), floors[k]) for k, error in errors.items()}
        )
    return {
        key: paired_difference(
            *(tuple({1: side[key][part]} for side in sides) for part in range(3))
        )
        for key in keys
    }


def test_a_sharper_calibrated_model_is_not_called_better_calibrated():
    found = [compared(seed, (1.0, 1.0), keys=CALIBRATION_ERRORS) for seed in range(12)]
    for key in CALIBRATION_ERRORS:
        assert sum(differences[key].significant for differences in found) <= 1, key
    # without the floors the difference in noise would pass for one in calibration
    assert np.mean([differences["ece"].value for differences in found]) > 0.02


def test_true_over_confidence_is_still_found():
    found = [compared(seed, (0.3, 1.0))["ece"] for seed in range(4)]
    assert all(difference.low > 0 for difference in found)
    found = [compared(seed, (1.0, 2.5))["ece"] for seed in range(4)]
    assert all(difference.high < 0 for difference in found)


def test_a_paired_difference_cancels_what_both_sides_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 500)
    first, second = hard + rng.normal(0, 0.1, 500), hard + 0.05 + rng.normal(0, 0.1, 500)
    values = {1: first.mean()}, {1: second.mean()}
    replicates = {1: replicates_of(first)}, {1: replicates_of(second)}
    found = paired_difference(values, replicates, ({1: 0}, {1: 0}))
    difference, low, high, common, p, _, error = found.numbers
    assert common == 1
    half = norm.ppf(0.975) * (first - second).std() / 500**0.5
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.002)
    assert high < 0, "unpaired the two could not be told apart"
    assert error == pytest.approx((first - second).std() / 500**0.5, rel=0.05)
    assert p == pytest.approx(2 / (len(replicates[0][1]) + 1)), "no lower than resamples can tell"


def test_a_difference_is_taken_on_the_seeds_that_both_sides_have():
    rng = np.random.default_rng(0)
    replicates = [{seed: rng.normal(size=50) for seed in seeds} for seeds in ((1, 2), (2, 3))]
    values = {1: 9.0, 2: 3.0}, {2: 1.0, 3: 0.0}
    floors = tuple(dict.fromkeys(side, 0.0) for side in ((1, 2, 4), (2, 3)))
    difference, low, high, common, *_ = paired_difference(values, tuple(replicates), floors)
    shift = replicates[0][2] - replicates[1][2]
    assert difference == 2.0 and common == 1
    assert (low, high) == pytest.approx(interval(2.0, shift))
    without = {1: 9.0, 4: 3.0}, {2: 1.0, 3: 0.0}
    replicates[0][4] = replicates[0].pop(2)
    difference = paired_difference(without, tuple(replicates), floors)
    assert difference.value == 5.5 and not difference.num_common, "each side's own"


def test_the_interval_of_the_ece_holds_the_estimate_of_a_calibrated_model():
    # Resampling raises the ECE of a calibrated model: percentiles alone would miss the estimate.
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 300)
    correct = (rng.random(300) < confidence).astype(float)
    ece, _ = u.calibration_errors(confidence, correct)
    replicates = np.concatenate(
        [
            u.calibration_errors(confidence, correct, 15, weights)[0]
            for (weights,) in resample({7: 300}, 1000, 0)
        ]
    )
    low, high = interval(ece, replicates, 0.0, 0.0, 1.0)
    assert replicates.mean() > ece + 0.01 and 0 <= low < ece < high


def test_bold_is_only_what_is_better_than_every_other_row(tmp_path):
    make_run(tmp_path, "mle", sharpness=3, noise=0.1)
    make_run(tmp_path, "map", sharpness=3, noise=0.1)
    make_run(tmp_path, "tfb", sharpness=9, noise=0.1)
    (family,) = report_on(tmp_path, resamples=500).families
    marks = {row.name: row.cells["nll"].mark for row in family.rows}
    assert marks == {"mle": "tied", "map": "tied", "tfb": ""}
    shutil.rmtree(tmp_path / "map")
    (family,) = report_on(tmp_path, resamples=500).families
    assert {row.name: row.cells["nll"].mark for row in family.rows} == {"mle": "best", "tfb": ""}
    difference, low, *_ = family.rows[1].cells["nll"].difference
    assert family.baseline == "mle" and difference > low > 0


def test_ranks_in_blocks_change_intervals_by_little():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, 6000)
    correct = (rng.random(6000) < confidence).astype(float)
    coarse = u.in_blocks(confidence, 2000)
    assert len(np.unique(coarse)) == 2000 and coarse.mean() == pytest.approx(confidence.mean())
    (weights,) = next(resample({7: 6000}, 20, 0))
    for function in (u.area_under_risk_coverage, u.adaptive_calibration_error):
        exact, blocks = (function(c, correct, weights=weights) for c in (confidence, coarse))
        assert np.abs(exact - blocks).max() < 0.2 * exact.std()


def test_the_same_seed_gives_the_same_report(tmp_path):
    make_run(tmp_path)
    texts = [comma_separated(report_on(tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_wilson_equals_scipy():
    low, high = wilson(np.array([7.0]), np.array([9.0]))
    expected = binomtest(7, 9).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-5)


# --- files ----------------------------------------------------------------------------------------


def test_the_latex_tables_are_well_formed(tmp_path):
    make_run(tmp_path, "map", dataset="d_1&2", shifted=True)
    make_run(tmp_path, "blob", dataset="d_1&2", num_draws=3, shifted=True)
    text = latex(report_on(tmp_path), MADE)
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") >= 5
    unescaped = re.sub(r"\\[&%$#_{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    for columns, body in re.findall(r"\\begin{tabular}{(l+r+)}(.*?)\\end", text, re.S):
        rows = [row for row in body.split(r"\\") if " & " in row]
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert r"d\_1\&2" in text


def test_the_latex_tables_escape_signs_and_names(tmp_path):
    make_run(tmp_path, "map", sharpness=30.0)
    make_run(tmp_path, "blob", name="a", note="<a|b>", sharpness=0.0)
    make_run(tmp_path, "blob", name="b", note="c", sharpness=1.0)
    text = latex(report_on(tmp_path), MADE)
    assert r"\textless{}a\textbar{}b\textgreater{}" in text
    body = "".join(re.findall(r"\\midrule(.*?)\\bottomrule", text, re.S))
    assert re.search(r"\$-\$[1-9]", body) and not re.search(r"(?<!\$)[+-]\d", body)


def test_a_report_without_resamples_has_no_brackets(tmp_path):
    make_run(tmp_path, "map")
    make_run(tmp_path, "blob")
    text = terminal(report_on(tmp_path, resamples=0))
    assert not re.search("[\\[†*]", text) and "blob" in text


@pytest.mark.parametrize(
    "change",
    [{"n": 1}, {"sharpness": 200.0, "noise": 0.0}, {"sharpness": 0.0, "noise": 0.0}],
    ids=["one example", "certain", "uniform"],
)
def test_degenerate_predictions_are_measured(tmp_path, change):
    make_run(tmp_path, "map", **change)
    make_run(tmp_path, "blob", num_draws=2, **change)
    report = report_on(tmp_path, resamples=20)
    assert not report.skipped and len(report.families[0].rows) == 2
    assert np.isfinite(report.families[0].rows[0].cells["ece_smooth"].value)
    markdown(report, MADE), latex(report, MADE), comma_separated(report)


def test_seeds_of_different_commits_are_said(tmp_path):
    make_run(tmp_path, seed=1)
    folder = make_run(tmp_path, seed=2)
    stored = json.loads((folder / "args.json").read_text())
    stored["run"]["commit"] = "another"
    write_json(folder / "args.json", stored)
    (family,) = report_on(tmp_path, resamples=20).families
    assert family.notes == ["The seeds of map were run at 2 different commits."]
