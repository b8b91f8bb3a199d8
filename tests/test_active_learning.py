"""scripts/active_learning.py, from the flags to learning curves, on tiny models."""

import csv
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, topic_rows, write_jsonl
from scipy import stats

import main
from modelwrappers.blob import BLoB
from modelwrappers.wrapperbase import WrapperBase
from report.learning_curves import area_under_curve, curves_of, estimate, terminal, verdicts
from scripts import active_learning
from utils.errors import UsageError
from utils.round_log import Round

FILES = {"simulation.json", "rounds.jsonl", *active_learning.MADE}
PLAN = [
    *("--by", "bald", "random", "--initial", "6", "--acquire", "4", "--rounds", "2"),
    *("--seeds", "1", "2", "--n-draws", "8"),
]
BLOB = [
    *("--modelwrapper", "blob", "--max-train-steps", "5", "--bayes-eps", "0.5"),
    *("--bayes-eval-n-samples-final", "3"),
]


def empty_files(title, draw, *files: Path) -> None:
    for file in files:
        file.touch()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One process; the plots are those of the fixture `finished`, which is made without this."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(active_learning, "save_figure", empty_files)


def task_flags(model: str, folder: Path) -> list[str]:
    return [
        *("--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", model),
        *("--data-dir", str(folder), "--batch-size", "8", "--lr", "1e-2", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def task(tiny_bert, tmp_path_factory) -> list[str]:
    """40 training rows and 20 to evaluate on; all flags but the method and its length."""
    folder = tmp_path_factory.mktemp("task")
    write_jsonl(folder / "train.jsonl", topic_rows(40, seed=7))
    write_jsonl(folder / "test.jsonl", topic_rows(20, seed=8))
    return task_flags(tiny_bert, folder)


TRAINED: list[tuple[set[int], set[int]]] = []  # of each training of `finished`: rows, pool


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Path:
    """A simulation from beginning to end."""
    out = tmp_path_factory.mktemp("simulations") / "whole"
    fit = WrapperBase.fit

    def watched(self, train_loader, eval_loader=None):
        pool = {row["index"] for row in self.dataset.pool_rows if row["labels"] == -1}
        TRAINED.append(({int(i) for batch in train_loader for i in batch["index"]}, pool))
        return fit(self, train_loader, eval_loader)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BLoB, "fit", watched)
        assert active_learning.run(["--out", str(out), *PLAN, *task, *BLOB]) == 0
    return out


def rounds_of(folder: Path) -> list[dict]:
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_times(rounds: list[dict]) -> list[dict]:
    return [{key: value for key, value in r.items() if key != "seconds"} for r in rounds]


def copy_of(folder: Path, target: Path, lines: str) -> Path:
    """What a killed simulation has left, if it had come so far."""
    target.mkdir()
    (target / "simulation.json").write_bytes((folder / "simulation.json").read_bytes())
    (target / "rounds.jsonl").write_text(lines, encoding="utf-8")
    return target


# --- the loop -------------------------------------------------------------------------------------


def test_each_round_trains_on_what_was_labelled_by_then_and_no_row_is_acquired_twice(finished):
    found = rounds_of(finished)
    assert [(r["seed"], r["by"], r["round"]) for r in found] == [
        (seed, by, number) for seed in (1, 2) for by in ("bald", "random") for number in range(3)
    ]
    labelled: list[int] = []
    for this, (rows, pool) in zip(found, TRAINED, strict=True):
        labelled = this["initial"] if this["round"] == 0 else labelled
        assert rows == set(labelled) and len(labelled) == this["labelled"]
        assert pool == set(range(40)) - rows  # without labels
        labelled = labelled + this["acquired"]
        assert len(set(labelled)) == len(labelled)
        assert len(this["acquired"]) == (4 if this["round"] < 2 else 0)


def test_a_limited_pool_is_all_that_is_acquired_from(task):
    whole, limited = (planned(task, *more) for more in ((), ("--pool", "9")))
    for seed in (1, 2):
        everything, some = whole.plan.splits[seed], limited.plan.splits[seed]
        assert everything.initial == some.initial and everything.pool[:9] == some.pool
        assert sorted(everything.initial + everything.pool) == list(range(40))
        assert len(some.initial) == 6


def test_criteria_begin_alike_and_go_on_by_themselves(finished):
    rounds = rounds_of(finished)
    first = {(r["seed"], r["by"]): r for r in rounds if r["round"] == 0}
    for seed in (1, 2):
        bald, random = first[seed, "bald"], first[seed, "random"]
        for key in ("initial", "acc", "ece", "nll", "brier"):
            assert bald[key] == random[key]
        assert bald["acquired"] != random["acquired"]
        assert (bald["num_draws"], random["num_draws"]) == (8, 1)
    assert first[1, "random"]["initial"] != first[2, "random"]["initial"]
    assert first[1, "random"]["acquired"] != first[2, "random"]["acquired"]


def test_a_round_measures_what_a_run_on_its_rows_measures(finished, task, tmp_path):
    """The way of main.py, on a training file of the labelled rows alone."""
    found = rounds_of(finished)[0]
    source = Path(task[task.index("--data-dir") + 1])
    rows = topic_rows(40, seed=7)
    write_jsonl(tmp_path / "train.jsonl", [rows[i] for i in sorted(found["initial"])])
    (tmp_path / "test.jsonl").write_bytes((source / "test.jsonl").read_bytes())
    flags = [*task, *BLOB, "--data-dir", str(tmp_path), "--seed", "1", "--nowand"]
    metrics = main.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert [found[key] for key in metrics._fields] == pytest.approx(list(metrics), rel=1e-5)


def test_labels_of_rows_that_were_not_acquired_have_no_say(finished, task, tmp_path):
    rounds = rounds_of(finished)
    own = [r for r in rounds if (r["seed"], r["by"]) == (1, "bald")]
    labelled = {i for r in own for i in (*r["initial"], *r["acquired"])}
    rows = topic_rows(40, seed=7)
    for i in set(range(40)) - labelled:
        rows[i]["topic"] = "tech" if rows[i]["topic"] != "tech" else "sports"
    write_jsonl(tmp_path / "train.jsonl", rows)
    source = Path(task[task.index("--data-dir") + 1])
    (tmp_path / "test.jsonl").write_bytes((source / "test.jsonl").read_bytes())
    flags = [*PLAN, "--by", "bald", "--seeds", "1", *task, *BLOB, "--data-dir", str(tmp_path)]
    assert active_learning.run(["--out", str(tmp_path / "out"), *flags]) == 0
    assert without_times(rounds_of(tmp_path / "out")) == without_times(own)


def test_batchbald_takes_draws_that_rows_share(task, tmp_path, capsys):
    plan = ["--by", "batchbald", *PLAN[3:7], "--rounds", "1", "--seeds", "1", "--n-draws", "8"]
    out = tmp_path / "out"
    assert active_learning.run(["--out", str(out), *plan, *task, *BLOB]) == 2
    assert "pass --flipout-eval none" in capsys.readouterr().err
    assert not out.exists()
    flags = [*plan, *task, *BLOB, "--flipout-eval", "none"]
    assert active_learning.run(["--out", str(out), *flags]) == 0
    assert len(set(rounds_of(out)[0]["acquired"])) == 4


# --- what is on disk ------------------------------------------------------------------------------


def test_after_a_kill_resume_gives_what_an_uninterrupted_simulation_gives(
    finished, task, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    call = ["--out", str(out), *PLAN, "--seeds", "1", *task, *BLOB]
    steps = iter(range(4 * 5 + 2))  # four trainings, and a part of the fifth
    original = BLoB.optimizer_step

    def killed(self):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patched:
        patched.setattr(BLoB, "optimizer_step", killed)
        assert active_learning.run(call) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(rounds_of(out)) == 4 and not (out / "curves.md").exists()
    # and in the middle of a line, as only a killed process leaves it
    with open(out / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write('{"seed": 1, "by": "ra')
    assert active_learning.run([*call, "--resume"]) == 0
    assert without_times(rounds_of(out)) == without_times(rounds_of(finished))[:6]
    assert {file.name for file in out.iterdir()} == FILES


def test_a_result_is_kept_unless_one_says_otherwise(finished, task, tmp_path, capsys):
    lines = (finished / "rounds.jsonl").read_text(encoding="utf-8")
    out = copy_of(finished, tmp_path / "out", lines)
    call = ["--out", str(out), *PLAN, *task, *BLOB]
    assert active_learning.run(call) == 2
    told = capsys.readouterr().err
    assert "--resume" in told and "--overwrite" in told
    assert active_learning.run([*call, "--resume", "--acquire", "3"]) == 2
    assert "--acquire is 3, the stored run has 4" in capsys.readouterr().err
    assert active_learning.run([*call, "--resume", "--lr", "1e-3"]) == 2
    assert "--lr is 0.001, the stored run has 0.01" in capsys.readouterr().err
    assert (out / "rounds.jsonl").read_text(encoding="utf-8") == lines
    # it is finished: nothing is trained, and the tables are made again
    assert active_learning.run([*call, "--resume"]) == 0
    assert (out / "curves.csv").read_bytes() == (finished / "curves.csv").read_bytes()
    assert (out / "rounds.jsonl").read_text(encoding="utf-8") == lines
    one = ["--by", "random", "--seeds", "1", "--rounds", "1", "--overwrite"]
    assert active_learning.run([*call, *one]) == 0
    assert len(rounds_of(out)) == 2


@pytest.mark.parametrize("column", ["text", "topic"])
def test_resume_refuses_as_many_rows_with_other_content(column, finished, task, tmp_path, capsys):
    lines = (finished / "rounds.jsonl").read_text(encoding="utf-8")
    out = copy_of(finished, tmp_path / "out", lines)
    rows = topic_rows(40, seed=7)
    assert rows[0][column] != rows[1][column]
    rows[0][column] = rows[1][column]
    place = task.index("--data-dir") + 1
    folder = Path(task[place])
    kept = (folder / "train.jsonl").read_bytes()
    call = ["--out", str(out), *PLAN, *task, *BLOB, "--resume"]
    try:  # in place: another folder would be another flag
        write_jsonl(folder / "train.jsonl", rows)
        assert active_learning.run(call) == 2
        told = capsys.readouterr().err
        assert "the training rows are others" in told and "--overwrite" in told
        assert not (out / "curves.md").exists()
        # what an older version has left does not say which rows it had
        record = json.loads((out / "simulation.json").read_text(encoding="utf-8"))
        assert len(record.pop("training_rows")) == 64
        (out / "simulation.json").write_text(json.dumps(record), encoding="utf-8")
        assert active_learning.run(call) == 0
    finally:
        (folder / "train.jsonl").write_bytes(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r | {"acc": 2}, "key 'acc' is 2"),
        (lambda r: r | {"by": "random"}, "no round of the simulation"),
        (lambda r: r | {"labelled": 7}, "other rows"),
        (lambda r: r | {"initial": r["initial"][::-1]}, "other rows"),
        (lambda r: r | {"acquired": r["initial"][:4]}, "4 different rows of the pool"),
        (lambda r: r | {"acquired": r["acquired"][:1] * 4}, "4 different rows of the pool"),
        (lambda r: r | {"acquired": [10**9, *r["acquired"][1:]]}, "4 different rows of the pool"),
        (lambda r: {key: r[key] for key in r if key != "nll"}, "key 'nll' is missing"),
        (lambda r: [], "rounds.jsonl:1"),
    ],
)
def test_a_damaged_round_is_an_error(change, message, finished, task, tmp_path):
    first, *others = rounds_of(finished)
    lines = "".join(json.dumps(r) + "\n" for r in (change(first), *others))
    out = copy_of(finished, tmp_path / "out", lines)
    simulation = planned(task)
    log = active_learning.RoundLog(out, simulation.plan, active_learning.MADE)
    with pytest.raises(UsageError, match=message):
        log.open(simulation.all_args, {})
    assert (out / "rounds.jsonl").read_text(encoding="utf-8") == lines


def test_two_processes_cannot_write_one_simulation(finished, task, tmp_path):
    lines = (finished / "rounds.jsonl").read_text(encoding="utf-8")
    out = copy_of(finished, tmp_path / "out", lines)
    simulation = planned(task)
    first, second = (
        active_learning.RoundLog(out, simulation.plan, active_learning.MADE) for _ in range(2)
    )
    first.open(simulation.all_args, {})
    with pytest.raises(UsageError, match=r"another process is writing it \(.*choose another"):
        second.open(simulation.all_args, {})
    first.close()
    second.open(simulation.all_args, {})
    assert second.done == first.done
    second.close()
    assert not [file for file in out.iterdir() if "lock" in file.name]


def test_rounds_are_not_written_through_a_link(finished, task, tmp_path):
    lines = (finished / "rounds.jsonl").read_text(encoding="utf-8")
    out = copy_of(finished, tmp_path / "out", lines)
    victim = (out / "rounds.jsonl").rename(tmp_path / "victim")
    (out / "rounds.jsonl").symlink_to(victim)
    simulation = planned(task)
    log = active_learning.RoundLog(out, simulation.plan, active_learning.MADE)
    with pytest.raises(UsageError, match="is a link, which is not written through"):
        log.open(simulation.all_args, {})
    log.close()
    assert victim.read_text(encoding="utf-8") == lines


def planned(task: list[str], *more: str) -> active_learning.Simulation:
    """A simulation whose plan is known, without a model being loaded for it."""
    call = ["--out", "x", *PLAN, *task, *BLOB, "--resume", *more]
    args, words = active_learning.parse_args(call)
    simulation = active_learning.Simulation(args, words)
    simulation.plan = simulation.planned(list(range(40)))
    return simulation


def test_a_file_of_somebody_else_is_not_replaced(task, tmp_path, capsys):
    (tmp_path / "curves.csv").write_text("mine", encoding="utf-8")
    assert active_learning.run(["--out", str(tmp_path), *PLAN, *task, *BLOB, "--overwrite"]) == 2
    assert "move it away" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["curves.csv"]


# --- calls that cannot work -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "9"], "9 rounds of 4 rows take 36 rows from the pool, which has 34"),
        (["--pool", "7"], "which has 7: of the 40 training rows 6"),
        (["--initial", "41"], "which has 0"),
        (["--initial", "0"], "at least 1"),
        (["--by", "bold"], "bold"),
        (["--by", "bald", "bald"], "--by names bald twice"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
        (["--n-draws", "1"], "a single draw has none"),
        (["--modelwrapper", "map", "--bayes-eps", "0.5"], "--bayes-eps"),
        (["--bayes-inference-notsample"], "a single draw has none"),
        (["--max-train-steps", "0"], "every round trains"),
        (["--round", "3"], "did you mean '--rounds'"),
        (["--limit-train", "5"], "--pool"),
        (["--seed", "3"], "--seeds"),
        (["--output-dir", "x"], "--out"),
        (["--load-lora-path", "x"], "trains a new adapter"),
        (["--ood-datasets", "bbc_bodies"], "evaluation split"),
        (["--tracker", "wandb"], "not tracked"),
        (["--hold-out"], "without being counted"),
        (["--temperature-scaling"], "--temperature-scaling"),
        (["--drop-last"], "--drop-last false"),
        (["--resume", "--overwrite"], "pass one of them"),
    ],
)
def test_a_call_that_cannot_work_says_why_and_leaves_nothing(more, message, task, tmp_path, capsys):
    out = tmp_path / "out"
    assert active_learning.run(["--out", str(out), *PLAN, *task, *BLOB, *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_point_estimate_has_no_mutual_information(task, tmp_path, capsys):
    out = tmp_path / "out"
    method = ["--modelwrapper", "map", "--max-train-steps", "2"]
    assert active_learning.run(["--out", str(out), *PLAN, *task, *method]) == 2
    assert "a single draw has none" in capsys.readouterr().err
    assert not out.exists()
    # but it has an entropy, and an ensemble its members
    plan = [*PLAN, "--seeds", "1", "--rounds", "1"]
    flags = [*plan, *task, *method, "--by", "entropy", "margin"]
    assert active_learning.run(["--out", str(out), *flags]) == 0
    assert all("less" not in line for line in (out / "curves.md").read_text("utf-8").splitlines())
    ensemble = ["--modelwrapper", "deepensemble", "--ensemble-n", "2", "--max-train-steps", "2"]
    flags = [*plan, *task, *ensemble, "--by", "bald", "--overwrite"]
    assert active_learning.run(["--out", str(out), *flags]) == 0
    assert rounds_of(out)[0]["num_draws"] == 2


def test_the_call_on_the_page_can_be_made():
    page = (ROOT / "docs" / "active-learning.md").read_text(encoding="utf-8")
    block = page.split("```bash\n")[1].split("```")[0]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["python", "scripts/active_learning.py"]
    simulation = active_learning.Simulation(*active_learning.parse_args(words[2:]))
    assert simulation.planned(list(range(320))).size == 60  # as the page says


def test_several_processes_are_refused(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert active_learning.run(["--out", str(tmp_path / "out"), *PLAN, *task, *BLOB]) == 2
    assert "one process" in capsys.readouterr().err


# --- the rows of a data set -----------------------------------------------------------------------


def test_a_data_set_is_trained_on_the_chosen_rows_alone(task):
    args = main.parse_args([*task, "--modelwrapper", "map", "--max-train-steps", "1"])
    wrapper = main.assemble(args, choose_rows=lambda dataset: dataset.train_on([5, 3, 39]))
    dataset = wrapper.dataset
    assert [row["index"] for row in dataset.train_rows] == [3, 5, 39]
    assert dataset.num_samples == 3
    assert [row["index"] for row in dataset.pool_rows] == sorted({*range(40)} - {3, 5, 39})
    assert {row["labels"] for row in dataset.pool_rows} == {-1}
    with pytest.raises(UsageError, match="too late"):
        dataset.train_on([1])
    for indices, message in (([40], "40"), ([], "no row")):
        with pytest.raises(UsageError, match=message):
            main.assemble(args, choose_rows=lambda dataset, rows=indices: dataset.train_on(rows))


# --- curves, areas, intervals ---------------------------------------------------------------------


def rounds(heights: dict[str, list[list[float]]]) -> list[Round]:
    """Criterion -> seed -> accuracy at 10, 20 and 40 labels; NLL is -log of it."""
    common = {"initial": [], "acquired": [], "ece": 0.1, "brier": 0.5, "num_draws": 1}
    return [
        Round(
            seed=seed,
            by=by,
            round=number,
            labelled=(10, 20, 40)[number],
            acc=acc,
            nll=-math.log(acc),
            seconds=0.0,
            **common,
        )
        for by, seeds in heights.items()
        for seed, curve in enumerate(seeds)
        for number, acc in enumerate(curve)
    ]


HEIGHTS = {
    "bald": [[0.3, 0.6, 0.8], [0.4, 0.5, 0.9], [0.35, 0.65, 0.85]],
    "random": [[0.3, 0.5, 0.7], [0.4, 0.45, 0.75], [0.35, 0.5, 0.8]],
}


def test_areas_and_intervals_are_those_of_numpy_and_scipy():
    curves = curves_of(rounds(HEIGHTS))
    assert curves.labelled == [10, 20, 40] and curves.num_seeds == 3
    areas = {}
    for by, heights in HEIGHTS.items():
        heights = np.array(heights)
        for i in range(3):
            found = curves.curves[by]["acc"][i]
            column = heights[:, i]
            law = stats.t(2, column.mean(), stats.sem(column))
            expected = np.clip([column.mean(), *law.interval(0.95)], 0, 1)
            np.testing.assert_allclose(found[:3], expected, rtol=1e-9)
        # 10 to 20 and 20 to 40, by hand
        first, second, third = heights.T
        areas[by] = (10 * (first + second) / 2 + 20 * (second + third) / 2) / 30
        assert curves.areas[by]["acc"].mean == pytest.approx(areas[by].mean())
    difference = areas["bald"] - areas["random"]
    found = curves.differences["bald"]["acc"]
    paired = stats.ttest_rel(areas["bald"], areas["random"]).confidence_interval(0.95)
    np.testing.assert_allclose(found[:3], [difference.mean(), *paired], rtol=1e-9)
    assert set(curves.differences) == {"bald"}


def test_the_area_under_a_constant_is_the_constant():
    assert area_under_curve([3, 5, 11], np.full((2, 3), 0.7)) == pytest.approx([0.7, 0.7])
    assert area_under_curve([0, 10], np.array([[0.0, 1.0]])) == pytest.approx([0.5])


def test_what_is_said_does_not_go_beyond_the_interval():
    told = verdicts(curves_of(rounds(HEIGHTS)))
    for sentence in told:
        found = curves_of(rounds(HEIGHTS)).differences["bald"][
            "acc" if "ACC" in sentence else "nll"
        ]
        assert ("better" in sentence) == (found.low > 0 or found.high < 0)
    worse = {"bald": HEIGHTS["random"], "random": HEIGHTS["bald"]}
    assert [("worse" in w) for w in verdicts(curves_of(rounds(worse)))] == [
        "better" in sentence for sentence in told
    ]
    assert any("better" in sentence for sentence in told)
    same = {"bald": HEIGHTS["random"][::-1], "random": HEIGHTS["random"]}
    assert all("not told apart" in sentence for sentence in verdicts(curves_of(rounds(same))))


def test_a_single_seed_has_no_interval_and_without_random_nothing_is_compared():
    alone = curves_of(rounds({by: heights[:1] for by, heights in HEIGHTS.items()}))
    assert all(map(math.isnan, alone.differences["bald"]["acc"][1:3]))
    assert all("a single seed says nothing" in sentence for sentence in verdicts(alone))
    assert "[" not in terminal(alone)
    others = curves_of(rounds({"bald": HEIGHTS["bald"], "entropy": HEIGHTS["random"]}))
    assert not others.differences and not verdicts(others) and "random" not in terminal(others)
    assert estimate([0.2, 0.4], 0.0, 1.0).num_seeds == 2


def test_the_files_say_the_same(finished):
    assert {file.name for file in finished.iterdir()} == FILES
    with open(finished / "curves.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = {(line["kind"], line["by"]) for line in lines}
    assert kinds == {
        *((kind, by) for kind in ("curve", "area") for by in ("bald", "random")),
        ("difference", "bald"),
    }
    curves = curves_of([Round(**r) for r in rounds_of(finished)])
    for line in lines:
        if line["kind"] == "curve":
            place = curves.labelled.index(int(line["labelled"]))
            found = curves.curves[line["by"]][line["metric"]][place]
        else:
            table = {"area": curves.areas, "difference": curves.differences}[line["kind"]]
            found = table[line["by"]][line["metric"]]
        assert [float(line[key]) for key in ("mean", "low", "high")] == list(found[:3])
    text = (finished / "curves.md").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in verdicts(curves))
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "curves.pdf").read_bytes().startswith(b"%PDF")
    stored = json.loads((finished / "simulation.json").read_text(encoding="utf-8"))
    assert stored["args"]["by"] == ["bald", "random"] and stored["args"]["modelwrapper"] == "blob"
