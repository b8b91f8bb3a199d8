"""p-values of differences, Holm's correction and power, against closed forms."""

import copy
import csv
import io
import json
import re

import numpy as np
import pytest
from scipy import stats
from test_report import make_run

from report.collect import Options, collect
from report.power import detectable, half_widths, power, power_note
from report.runs import find_runs
from report.significance import Noise, holm, p_value, paired_difference
from report.tables import comma_separated, markdown, terminal
from utils.files import write_json

MADE = {"command": "report", "commit": "0123abc", "time": "now"}
NO_SEEDS = np.zeros_like


def test_a_p_value_is_that_of_the_normal_test_where_the_replicates_are_normal():
    replicates = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    for difference in (0.5, -1.0, 1.96, -2.5):
        expected = 2 * stats.norm.sf(abs(difference))
        assert p_value(difference, 0.0, replicates, NO_SEEDS) == pytest.approx(expected, rel=0.05)


def test_a_p_value_is_that_of_students_test_where_all_noise_is_of_seeds():
    values, zeros = [0.3, 0.5, 0.1, 0.4], dict.fromkeys(range(4), 0.0)
    still = dict.fromkeys(range(4), np.zeros(50_000))
    found = paired_difference((dict(enumerate(values)), zeros), (still, still), (zeros, zeros))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.06)
    assert found.error == pytest.approx(stats.sem(values))


def test_a_p_value_is_below_5_percent_exactly_where_the_interval_excludes_0():
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = dict(enumerate(rng.normal(0.8, 1, 3)))
        replicates = {s: rng.normal(size=100) for s in values}
        other = dict.fromkeys(values, 0.0)
        floors = {s: rng.uniform(0, 0.3) for s in values}
        found = paired_difference(
            (values, other), (replicates, dict.fromkeys(values, np.zeros(100))), (floors, other)
        )
        assert (found.p <= 0.05) == found.significant


def test_without_resamples_nothing_is_known():
    assert np.isnan(p_value(1.0, 0.0, np.empty(0), NO_SEEDS))


def test_holm_multiplies_the_lowest_by_all_and_the_others_by_what_is_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, np.nan, 0.9]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert len(holm([])) == 0


def test_by_holm_one_is_found_in_at_most_5_percent_of_the_families_where_none_differs():
    rng = np.random.default_rng(1)
    found = [(holm(rng.uniform(size=12)) <= 0.05).any() for _ in range(2000)]
    assert 0.03 < np.mean(found) < 0.065


NORMAL = stats.norm.ppf((np.arange(3000) + 0.5) / 3000)  # as replicates of standard error 1


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize(
    "examples, seeds, paired",
    [(0.02, 0.005, True), (0.015, 0.01, True), (0.02, 0.02, True), (0.015, 0.02, False)],
)
def test_power_is_how_often_the_tables_test_finds_a_true_difference(examples, seeds, paired, rows):
    """With 3 seeds; by one test, and at the first step of Holm's correction over 21 rows."""
    rng, delta, trials = np.random.default_rng(2), 0.08, 400
    names = (range(3), range(3) if paired else range(3, 6))
    replicates = tuple(
        dict.fromkeys(side, size * NORMAL) for side, size in zip(names, (examples, 0), strict=True)
    )
    zeros = tuple(dict.fromkeys(side, 0.0) for side in names)
    found = 0
    for _ in range(trials):
        shared = rng.normal(delta, examples)  # all seeds have the same examples
        first = {seed: shared + rng.normal(0, seeds) for seed in names[0]}
        second = {seed: 0.0 if paired else rng.normal(0, seeds) for seed in names[1]}
        found += paired_difference((first, second), replicates, zeros).p <= 0.05 / rows
    sides = [[-seeds, 0.0, seeds]] * (1 if paired else 2)
    noise = Noise(examples * NORMAL, sides, 0.0)
    error = np.sqrt(examples**2 + len(sides) * seeds**2 / 3)
    stated = power(delta, half_widths(noise, 0.05 / rows), error)
    assert stated == pytest.approx(found / trials, abs=0.07)  # 2.8 standard errors at most


def test_without_noise_of_examples_a_test_finds_what_is_not_there_as_often_as_its_level_says():
    for level in (0.05, 0.01):
        noise = Noise(np.zeros(1000), [[1.0, 2.0, 3.0]], 0.0)
        assert power(0, half_widths(noise, level), 3**-0.5) == pytest.approx(level, rel=0.02)


def test_without_noise_of_seeds_power_and_what_is_found_are_those_of_the_normal_test():
    widths = half_widths(Noise(NORMAL, [[0.0]], 0.0))
    assert widths == pytest.approx(stats.norm.isf(0.025), rel=2e-3)
    assert detectable(widths, 1.0) == pytest.approx(1.96 + 0.8416, rel=2e-3)
    assert power(detectable(widths, 1.0), widths, 1.0) == pytest.approx(0.8)


def test_a_level_below_the_lowest_p_value_of_the_resamples_finds_nothing():
    noise = Noise(NORMAL[::30], [[0.0]], 0.0)  # 100 of them: 2 / 101
    assert power(50.0, half_widths(noise, 0.0199), 1.0) == pytest.approx(1)
    assert power(50.0, half_widths(noise, 0.0197), 1.0) == 0
    assert detectable(half_widths(noise, 0.0197), 1.0) == np.inf


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """With 50 and with 400 examples; mcdropout is like map, blob is far worse."""
    found = []
    for n in (50, 400):
        root = tmp_path_factory.mktemp("runs")
        for seed in (1, 2, 3):
            make_run(root, "map", seed, n=n)
            make_run(root, "mcdropout", seed, n=n, noise=0.31)
            make_run(root, "blob", seed, n=n, noise=6.0)
        found.append(collect(*find_runs([root]), Options(resamples=150)))
    return found


def test_what_a_table_says_of_its_power_grows_with_the_examples(reports):
    shares = []
    for report in reports:
        text = power_note(report.families[0])
        shares.append(
            [float(x) for x in re.findall(r"probability (\d\.\d\d) \((\d\.\d\d)\)", text)[1]]
        )
        assert text in " ".join(markdown(report, MADE).replace("\n", " ").split())
    (few, few_holm), (many, many_holm) = shares
    assert few < many and few_holm < few and many_holm < many


def with_rows(family, number):
    """The family with so many rows besides its baseline, all like its second one."""
    family = copy.copy(family)
    family.rows = family.rows[:1] + family.rows[1:2] * number
    return family


def test_a_table_says_that_too_few_resamples_let_nothing_be_bold_and_how_many_it_takes(reports):
    family = reports[1].families[0]  # 150 resamples: p is 2 / 151 or more, 0.0132
    assert "Nothing can be bold" not in power_note(with_rows(family, 3))
    assert "Nothing can be bold: no p-value of 150 resamples is below 0.013, and" in power_note(
        with_rows(family, 4)
    )
    assert "It takes --bootstrap 160 or more." in power_note(with_rows(family, 4))
    assert holm([2 / 161] * 4)[0] <= 0.05 < holm([2 / 151] * 4)[0]


def test_a_table_says_that_with_few_seeds_and_many_rows_hardly_anything_becomes_bold(reports):
    family = with_rows(copy.deepcopy(reports[1].families[0]), 3)
    for row in family.rows[1:]:
        cell = row.cells["ece"]
        noise = Noise(0.02 * NORMAL, [[-0.1, 0.0, 0.1]], 0.0)
        difference = cell.difference._replace(noise=noise, error=0.06)
        row.cells["ece"] = cell._replace(difference=difference)
    wider = stats.t.isf(0.025 / 3, 2) / stats.t.isf(0.025, 2)
    said = f"with 3 seeds and 3 rows, Holm's first step counts the noise of seeds {wider:.1f} times"
    assert said in power_note(family) and "More seeds or fewer rows" in power_note(family)
    for row in family.rows[1:]:  # few examples are no matter of seeds or rows
        cell = row.cells["ece"]
        noise = Noise(0.1 * NORMAL, [[-0.01, 0.0, 0.01]], 0.0)
        difference = cell.difference._replace(noise=noise, error=0.1)
        row.cells["ece"] = cell._replace(difference=difference)
    assert "Hardly" not in power_note(family)


def test_a_metric_in_which_no_row_differs_is_left_out_of_what_is_said_of_power(reports):
    family = copy.deepcopy(reports[0].families[0])
    for row in family.rows[1:]:
        cell = row.cells["acc"]
        row.cells["acc"] = cell._replace(difference=cell.difference._replace(error=0.0))
    text = power_note(family)
    assert "in ECE" in text and "in NLL" in text and "in ACC" not in text


def test_only_what_holds_for_all_rows_together_is_bold(reports):
    family = reports[1].families[0]
    cells = {row.name: row.cells["nll"].difference for row in family.rows[1:]}
    assert cells["blob"].holds and cells["blob"].p_holm == pytest.approx(2 * cells["blob"].p)
    assert not cells["mcdropout"].holds
    table = markdown(reports[1], MADE).split("### Difference from map")[1]
    assert re.search(r"\| blob .*\*\*\+", table) and not re.search(r"\| mcdropout .*\*\*", table)
    assert "p_holm" in comma_separated(reports[1]).splitlines()[0]


def test_cost_stands_beside_every_row(tmp_path):
    for seed, seconds in ((1, 10.0), (2, 20.0)):
        folder = make_run(tmp_path, "map", seed, n=20)
        file = folder / "metrics.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content |= {"training_seconds": seconds, "peak_memory_bytes": seed * 2**30}
        content["datasets"]["bbc_headlines"]["seconds"] = 3.0
        write_json(file, content)
    report = collect(*find_runs([tmp_path]), Options(resamples=0))
    assert re.search(r"### Cost\n.*\| map +\| 15.0 +\| 3.0 +\| 2048 ", markdown(report, MADE), re.S)
    assert re.search(r"\| map .*\| 18 +\| 2048 \|", terminal(report))
    row = next(csv.DictReader(io.StringIO(comma_separated(report))))
    assert row["training_seconds"] == "15" and row["peak_memory_bytes"] == str(2**31)


def test_a_run_that_does_not_say_what_it_took_has_no_cost(tmp_path):
    make_run(tmp_path, "map", n=20)
    report = collect(*find_runs([tmp_path]), Options(resamples=0))
    assert re.search(r"\| map .*\| – +\| – +\|", terminal(report))
