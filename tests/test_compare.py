"""scripts/compare.sh, quickstart.sh and quickstart_seeds.sh: what they run, and what is counted."""

import os
import shlex
import subprocess
import sys

import pytest
from accelerate import Accelerator
from conftest import ROOT
from test_report import make_run

import main
from dataset import build_dataset
from report.collect import Options, collect
from report.runs import find_runs
from report.seeds import better_seeds
from scripts import report as report_script
from scripts import sweep
from utils.args import Args
from utils.errors import UsageError


def commands(**environment: str) -> tuple[list[sweep.Run], list[Args]]:
    """What a dry run of compare.sh says: runs of the searches, and the runs that are reported."""
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/compare.sh")],
        env=os.environ | {"DRY_RUN": "1", "PYTHON_BIN": "python"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    searches: list[sweep.Run] = []
    tests = []
    for line in result.stdout.splitlines():
        program, *words = shlex.split(line)[1:] if line.startswith("python ") else [""]
        if program == "main.py":
            tests.append(main.parse_args(words))
        elif program == "scripts/sweep.py":
            own, flags = sweep.parse_args(words)
            searches += sweep.plan(own, flags, sweep.candidates_of(own))
    return searches, tests


def split_of(args) -> tuple:
    return args.dataset, args.limit_train, args.held_out, args.seed_split, args.hold_out


@pytest.fixture(scope="module")
def compared():
    return commands(SEEDS="1 2")


def test_every_method_has_four_candidates_that_never_see_a_test_row(compared):
    counted = {}
    for run in compared[0]:
        assert run.seed == 1 and run.args.testing_set == "train_val"
        search = run.folder.parents[4].name
        counted.setdefault(search, set()).add(run.candidate.name)
    post_hoc = {"tfb", "tfb-blob", "laplace", "laplace-last"}
    assert counted.keys() == {"mle", "map", "map-other", "mcdropout", "blob"} | post_hoc
    assert all(len(candidates) == 4 for candidates in counted.values())


def test_all_runs_hold_the_same_rows_out_and_have_the_same_draws_and_test_rows(compared):
    tests = compared[1]
    both = [*(run.args for run in compared[0]), *tests]
    assert len({split_of(args) for args in both}) == 1
    assert {args.bayes_eval_n_samples_final for args in both} == {10}
    assert {(args.limit_eval, args.limit_ood) for args in tests} == {(500, 40)}
    assert all(args.temperature_scaling and args.resume for args in tests)
    assert len(tests) == 2 * 11 and {args.seed for args in tests} == {1, 2}


def test_no_run_of_the_comparison_overwrites_another(compared):
    tests = compared[1]
    assert len({str(main.run_folder_path(args)) for args in tests}) == len(tests)


def test_blob_with_its_mean_is_the_posterior_of_blobs_own_run(compared):
    blob = {a.seed: a for a in compared[1] if a.modelwrapper == "blob" and not a.load_lora_path}
    means = [a for a in compared[1] if a.modelwrapper == "blob" and a.load_lora_path]
    assert len(means) == 2
    for args in means:
        assert args.load_lora_path == str(main.run_folder_path(blob[args.seed]))
        assert args.bayes_inference_notsample and not args.max_train_steps


def test_another_model_has_sizes_of_its_own_and_the_environment_wins():
    sizes = {"STEPS": "7", "SEEDS": "3", "DRAWS": "5", "TINY": "1"}
    _, (args,) = commands(MODEL="minilm-l6", ROWS="mle", **sizes)
    assert (args.dataset_type, args.lora_layers) == ("bertds", "all")
    assert (args.max_train_steps, args.limit_train, args.limit_eval) == (7, 24, 8)
    assert (args.seed, args.bayes_eval_n_samples_final) == (3, 5)


def test_a_row_that_does_not_exist_stops_the_comparison():
    with pytest.raises(subprocess.CalledProcessError) as error:
        commands(ROWS="mle blobb")
    assert error.value.returncode == 2 and "there is no row blobb" in error.value.stderr


def test_every_command_of_every_row_parses(tmp_path):
    searches, tests = commands(SEEDS="1", OUT=str(tmp_path / "o"))
    found = [*tests, *(run.args for run in searches)]
    methods = {"mle", "map", "mcdropout", "deepensemble", "blob", "tfb", "laplace"}
    assert {args.modelwrapper for args in found} == methods
    assert {a.lora_layers for a in found if a.modelwrapper == "map"} == {"last:15", "all"}


@pytest.mark.slow
def test_a_small_comparison_of_the_encoder_ends_with_the_report(tmp_path):
    environment = {"TINY": "1", "MODEL": "minilm-l6", "ROWS": "mle blob blob-mean"}
    environment |= {"PYTHON_BIN": sys.executable, "SHIFTED": "bbc_bodies", "OUT": str(tmp_path)}
    call = ["bash", str(ROOT / "scripts/compare.sh")]
    subprocess.run(call, env=os.environ | environment, check=True)
    table = (tmp_path / "report/tables.md").read_text(encoding="utf-8")
    assert "mle + temperature" in table and "bayes-inference-notsample true" in table
    assert (tmp_path / "search/blob/best.json").exists()


# --- rows of shifted sets -------------------------------------------------------------------------


def test_shifted_sets_can_have_fewer_rows_than_the_tasks_own(classifier_flags):
    flags = list(classifier_flags)
    place = flags.index("--data-dir")
    del flags[place : place + 2]  # the embedded corpus has both
    flags += ["--modelwrapper", "mle", "--limit-eval", "12", "--ood-datasets", "bbc_bodies"]
    for more, number in (([], 12), (["--limit-ood", "5"], 5)):
        dataset = build_dataset(main.parse_args([*flags, *more]), Accelerator(cpu=True))
        assert len(dataset.test_rows) == 12
        assert len(dataset.ood_datasets["bbc_bodies"].test_rows) == number


def test_the_tasks_own_rows_with_errors_are_those_without_whatever_the_limit_of_others(
    classifier_flags,
):
    name = "bbc_headlines:noisy:3"
    flags = [*classifier_flags, "--modelwrapper", "mle", "--limit-eval", "12", "--limit-ood", "5"]
    dataset = build_dataset(
        main.parse_args([*flags, "--ood-datasets", name]), Accelerator(cpu=True)
    )
    (noisy,) = dataset.ood_datasets.values()
    rows, noisy_rows = dataset.test_rows, noisy.test_rows
    assert [row["index"] for row in noisy_rows] == [row["index"] for row in rows]
    assert len(rows) == 12


def test_a_limit_of_shifted_rows_without_a_shifted_set_is_refused(classifier_flags):
    with pytest.raises(UsageError, match="--limit-ood 5 is about --ood-datasets"):
        flags = [*classifier_flags, "--modelwrapper", "mle", "--n-epochs", "1", "--limit-ood", "5"]
        main.parse_args(flags, check_early=main.check_names)


# --- the quickstart for several seeds -------------------------------------------------------------


def quickstart(script: str, tmp_path, **environment: str) -> list[list[str]]:
    """The calls of Python that a script makes."""
    calls, stub = tmp_path / "calls", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >> {calls}\necho >> {calls}\n')
    stub.chmod(0o755)
    subprocess.run(
        ["bash", str(ROOT / "scripts" / script)],
        env={k: v for k, v in os.environ.items() if k != "SEEDS"}
        | {"PYTHON_BIN": str(stub)}
        | environment,
        capture_output=True,
        check=True,
    )
    return [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]


def test_the_quickstart_of_ten_seeds_repeats_its_two_runs_and_counts(tmp_path):
    one = quickstart("quickstart.sh", tmp_path)
    (tmp_path / "calls").unlink()
    *runs, report = quickstart("quickstart_seeds.sh", tmp_path)
    assert len(one) == 3 and len(runs) == 20
    for i, run in enumerate(runs):
        args, single = main.parse_args(run[1:]), main.parse_args(one[i % 2][1:])
        assert args.seed == i // 2 + 1 and args.resume and not args.overwrite
        same = {"seed", "seed_data", "seed_sampling", "log_path", "resume", "overwrite"}
        assert {k: v for k, v in args.as_dict().items() if k not in same} == {
            k: v for k, v in single.as_dict().items() if k not in same
        }
    assert report[0] == "scripts/report.py" and "--by-seed" in report
    folders = {str(main.run_folder_path(main.parse_args(run[1:]))) for run in runs}
    assert folders == set(report[1:21])


def test_the_report_counts_the_seeds_in_which_a_row_is_better(tmp_path, capsys, monkeypatch):
    for seed in range(1, 5):
        make_run(tmp_path, "map", seed, n=40)
        make_run(tmp_path, "blob", seed, n=40, noise=0.1 if seed < 4 else 3.0)
    make_run(tmp_path, "map", 9, n=40)
    family = collect(*find_runs([tmp_path]), Options(resamples=0)).families[0]
    rows = {row.name: row for row in family.rows}
    values = {
        name: {r.run.seeds[0]: r.values["nll"] for r in row.results} for name, row in rows.items()
    }
    expected = sum(values["blob"][seed] < values["map"][seed] for seed in range(1, 5))
    assert 0 < expected < 4
    assert better_seeds(rows["blob"], rows["map"], "nll") == (expected, 4)
    assert better_seeds(rows["map"], rows["map"], "acc") == (0, 5)
    monkeypatch.setattr(report_script, "write", lambda report, out, made: out)  # plots take seconds
    call = [str(tmp_path), "--by-seed", "--bootstrap", "0", "--out", str(tmp_path / "report")]
    assert report_script.run(call) == 0
    assert f"{expected} of 4" in capsys.readouterr().out
