"""scripts/predict.py: files of rows to files of answers."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, run_folder, topic_rows, write_jsonl
from safetensors.torch import load_file

import main
from dataset.files import read_rows
from scripts import predict

BLOB = ["--modelwrapper", "blob", "--max-train-steps", "4", "--bayes-eps", "0.5"]


@pytest.fixture(scope="module")
def posterior(tmp_path_factory, tiny_bert, data_dir) -> Path:
    """A BLoB posterior of the tiny encoder that has evaluated 37 rows in batches of 10."""
    out = tmp_path_factory.mktemp("posterior")
    flags = [
        *("--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", tiny_bert),
        *("--data-dir", data_dir, "--output-dir", str(out), "--eval-batch-size", "10"),
        *("--batch-size", "8", "--lr", "1e-2", "--nowand", "--device", "cpu", *BLOB),
    ]
    main.main(flags)
    return run_folder(flags)


@pytest.fixture
def rows(tmp_path) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": r["text"]} for r in topic_rows(37, seed=1)])
    return tmp_path / "rows.jsonl"


def call(posterior, rows, out, *more) -> int:
    return predict.run([str(posterior), "--rows", str(rows), "--out", str(out), *more])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_predictions_are_those_of_the_evaluation(posterior, rows, tmp_path):
    assert call(posterior, rows, tmp_path / "out.jsonl", "--device", "cpu") == 0
    found = read(tmp_path / "out.jsonl")
    stored = load_file(posterior / "predictions.safetensors")["log_probs"].double().exp().mean(1)
    probabilities = torch.tensor([list(r["probabilities"].values()) for r in found])
    torch.testing.assert_close(probabilities.double(), stored, rtol=1e-5, atol=1e-6)
    assert [r["row"] for r in found] == list(range(37))
    assert [r["input"] for r in found] == read(rows)
    assert {r["num_draws"] for r in found} == {10}
    assert not list(tmp_path.glob(".*")), "nothing of the way there is left"


def test_every_format_gives_the_same_answers(posterior, rows, tmp_path, capsys, monkeypatch):
    texts = [row["text"] for row in read(rows)]
    (tmp_path / "rows.txt").write_text("\n".join(texts) + "\n")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *[[text] for text in texts]])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(read(rows)))
    assert call(posterior, rows, tmp_path / "out.jsonl") == 0
    expected = read(tmp_path / "out.jsonl")
    for form in ("txt", "csv", "parquet", "json"):
        out = tmp_path / f"{form}.jsonl"
        assert call(posterior, tmp_path / f"rows.{form}", out) == 0
        assert read(out) == expected, form
    # out again
    assert call(posterior, rows, tmp_path / "out.csv") == 0
    assert call(posterior, rows, tmp_path / "out.parquet") == 0
    with open(tmp_path / "out.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for record, of_csv, of_parquet in zip(expected, cells, table, strict=True):
        for key in ("answer", "entropy", "num_draws"):
            assert of_csv[key] == str(record[key]) and of_parquet[key] == record[key]
        p = record["probabilities"]["sports"]
        assert float(of_csv["probabilities.sports"]) == of_parquet["probabilities.sports"] == p
        assert of_csv["input.text"] == of_parquet["input.text"] == record["input"]["text"]
    # standard input and output
    capsys.readouterr()
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "rows.txt").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert call(posterior, "-", "-", "--rows-format", "txt") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_rows_are_chosen_at_random_where_no_row_has_mutual_information(
    tiny_bert, data_dir, rows, tmp_path
):
    """B of an adapter begins at 0, so all draws are the same: powerbald's weights are all 0."""
    flags = [
        *("--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", tiny_bert),
        *("--data-dir", data_dir, "--output-dir", str(tmp_path), "--nowand", "--device", "cpu"),
        *("--modelwrapper", "blob", "--max-train-steps", "1", "--lr", "1e-30"),
    ]
    main.main(flags)
    chosen = []
    for seed in ("1", "2"):
        more = ("--acquire", "5", "--by", "powerbald", "--seed", seed, "--window", "11")
        assert call(run_folder(flags), rows, tmp_path / "out.jsonl", *more) == 0
        chosen.append([record["row"] for record in read(tmp_path / "out.jsonl")])
    assert chosen[0] != chosen[1] and len(set(chosen[0])) == 5


def test_a_gpu_that_is_not_there_is_missed(posterior, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(posterior, rows, tmp_path / "out.jsonl", "--device", "cuda") == 2
    assert "no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_end_inside_of_a_cell_ends_no_row_of_a_csv(posterior, tmp_path):
    texts = ["a\rbank", "a\nbank", "a\r\nbank", 'a "bank"', "=bank;1", "bank"]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    assert call(posterior, tmp_path / "rows.jsonl", tmp_path / "out.csv") == 0
    with open(tmp_path / "out.csv", newline="") as file:
        assert [row["input.text"] for row in csv.DictReader(file, strict=True)] == texts
    found = [row["input.text"] for _, row in read_rows(tmp_path / "out.csv", "--rows")]
    assert found == texts, "and by the reader of this project"
    assert not (tmp_path / "out.csv").read_bytes().endswith(b"\r\n")


@pytest.mark.parametrize(
    ("row", "is_bad"),
    [
        ({"text": "a\0bank"}, True),
        ({"text": "bank", "no\0te": "x"}, True),
        ({"text": "bank", "notes": ["a\0b"]}, False),  # a list is JSON in its cell: an escape
    ],
)
def test_a_nul_never_gets_into_a_csv(row, is_bad, posterior, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "bank"}, row])
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.csv"
    assert call(posterior, rows, out) == (2 if is_bad else 0)
    if is_bad:
        told = capsys.readouterr().err
        assert "rows.jsonl:2: the row holds a NUL character" in told and "--out-format" in told
        assert not out.exists()
        assert call(posterior, rows, out, "--skip-bad-rows") == 0
    assert b"\0" not in out.read_bytes()
    _, (_, found) = read_rows(out, "--rows")
    assert ("NUL character" in found.get("error", "")) == is_bad
    assert bool(found["answer"]) != is_bad
    # the other formats hold it as it is
    assert call(posterior, rows, tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl")[1]["input"] == row


def test_labels_are_scored_and_rows_without_one_are_not(posterior, tmp_path, capsys):
    rows = topic_rows(37, seed=1)
    for row in rows[5:20]:
        row["topic"] = ""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert call(posterior, tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == 0
    records = read(tmp_path / "out.jsonl")
    labelled = [r for r in records if "label" in r]
    assert [r["row"] for r in labelled] == [*range(5), *range(20, 37)]
    accuracy = sum(r["label"] == r["answer"] for r in labelled) / len(labelled)
    assert f"22 rows have labels: ACC {accuracy:.4f}  ECE" in capsys.readouterr().err


BAD = [
    ('{"text": "bank", "n": 1e999}', r"rows.jsonl:3: the row cannot be written out again"),
    (r'{"text": "bank", "note": "\ud800"}', r"rows.jsonl:3: the row cannot be written"),
    ('{"txt": "bank"}', r"rows.jsonl:3: column 'text' is missing"),
    ('{"text": "bank", "topic": "weather"}', r"rows.jsonl:3: unknown label"),
    ('{"text": ', r"rows.jsonl:3: not valid JSON"),
    ("[1]", r"rows.jsonl:3: a row must be an object"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_stops_before_anything_is_written_or_is_skipped_with_its_reason(
    line, message, posterior, tmp_path, capsys
):
    import re

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "bank"}\n\n' + line + '\n{"text": "goal"}\n')
    (tmp_path / "out.jsonl").write_text("what was there\n")
    assert call(posterior, rows, tmp_path / "out.jsonl") == 2
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "out.jsonl").read_text() == "what was there\n"
    assert {f.name for f in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}
    assert call(posterior, rows, tmp_path / "out.jsonl", "--skip-bad-rows") == 0
    good, bad, other = read(tmp_path / "out.jsonl")
    assert re.search(message, bad["error"]) and "answer" not in bad
    assert good["answer"] and other["answer"] and other["row"] == 2
    assert call(posterior, rows, tmp_path / "out.csv", "--skip-bad-rows") == 0
    with open(tmp_path / "out.csv", newline="") as file:
        assert re.search(message, list(csv.DictReader(file))[1]["error"])


class Killed(BaseException):
    pass


def test_a_killed_run_is_gone_on_with_and_ends_as_if_it_had_not_been(
    posterior, rows, tmp_path, monkeypatch, capsys
):
    """Killed in the third window, when half a row of it was written."""
    from modelwrappers.engine import answers

    assert call(posterior, rows, tmp_path / "whole.jsonl", "--window", "8") == 0
    out = tmp_path / "out.jsonl"
    original, windows = answers.predict_window, []

    def dies(wrapper, examples):
        windows.append(len(examples))
        if len(windows) == 3:
            with open(tmp_path / ".out.jsonl.partial" / "rows.jsonl", "a") as file:
                file.write('{"row": 16, "inp')
            raise Killed
        return original(wrapper, examples)

    monkeypatch.setattr(answers, "predict_window", dies)
    with pytest.raises(Killed):
        call(posterior, rows, out, "--window", "8")
    assert not out.exists()
    monkeypatch.undo()
    assert call(posterior, rows, out, "--window", "8") == 2
    assert "--resume" in capsys.readouterr().err
    assert call(posterior, rows, out, "--window", "8", "--seed-sampling", "7", "--resume") == 2
    assert "other flags" in capsys.readouterr().err
    monkeypatch.setattr(answers, "predict_window", lambda *a: windows.append(1) or original(*a))
    windows.clear()
    assert call(posterior, rows, out, "--window", "8", "--resume") == 0
    assert len(windows) == 3, "the windows that were done are not done again"
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob(".*"))


def test_rows_that_changed_since_are_not_gone_on_with(posterior, rows, tmp_path, capsys):
    from utils.row_output import RowOutput

    begun = RowOutput(tmp_path / "out.jsonl", "jsonl", "another job")
    begun.open(False, False)
    assert call(posterior, rows, tmp_path / "out.jsonl", "--resume") == 2
    assert "another process is writing" in capsys.readouterr().err
    begun.close()
    assert call(posterior, rows, tmp_path / "out.jsonl", "--resume") == 2
    assert "other rows" in capsys.readouterr().err
    (tmp_path / ".out.jsonl.partial" / "state.json").write_text('{"job": "x", "rows": -1}')
    assert call(posterior, rows, tmp_path / "out.jsonl", "--resume") == 2
    assert "key 'rows'" in capsys.readouterr().err
    assert call(posterior, rows, tmp_path / "out.jsonl", "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "nowhere.jsonl"], "there is no file"),
        (["--rows", "rows.xyz"], "--rows-format"),
        (["--out", "rows"], "--out-format"),
        (["--out", "."], "--out-format"),
        (["--out", "folder.csv"], "it is a folder"),
        (["--out", "link.csv"], "it is a link"),
        (["--out", "pipe.csv"], "no ordinary file"),
        (["--out", f"{'x' * 220}.csv"], "more than 200 bytes"),
        (["--out", "./rows.jsonl"], "is --rows itself"),
        (["--out", "rows.jsonl/out.csv"], "is no folder"),
        (["--out", "-", "--resume"], "standard output"),
        (["--resume", "--overwrite"], "pass one of them"),
        (["--wndow", "3"], "unknown|unrecognized"),
        (["--window", "0"], "--window"),
        (["--n-draws", "-1"], "--n-draws"),
        (["--dataset", "boolq"], "answers"),
        (["--rows", "empty.jsonl"], "no row that can be used"),
    ],
)
def test_a_wrong_call_is_told_and_leaves_nothing(
    flags, message, posterior, tmp_path, monkeypatch, capsys
):
    import re

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "bank"}\n')
    Path("empty.jsonl").write_text("\n")
    Path("folder.csv").mkdir()
    Path("link.csv").symlink_to("elsewhere.csv")
    os.mkfifo("pipe.csv")
    before = sorted(tmp_path.rglob("*"))
    given = {"--rows": "rows.jsonl", "--out": "out.jsonl"}
    words = [w for k, v in given.items() if k not in flags for w in (k, v)]
    assert predict.run([str(posterior), *words, *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_a_posterior_is_told(tmp_path, rows, capsys):
    assert call(tmp_path, rows, tmp_path / "out.jsonl") == 2
    assert "bayes_config.json" in capsys.readouterr().err


def test_two_processes_write_what_one_writes(posterior, rows, tmp_path):
    assert call(posterior, rows, tmp_path / "one.jsonl", "--device", "cpu") == 0
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(20000 + os.getpid() % 20000), str(ROOT / "scripts" / "predict.py")),
        *(str(posterior), "--rows", str(rows), "--out", str(tmp_path / "two.jsonl")),
        *("--device", "cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read(tmp_path / "one.jsonl"), read(tmp_path / "two.jsonl")
    assert [r["input"] for r in one] == [r["input"] for r in two]
    for key in ("probabilities", "mutual_information"):
        a, b = (
            torch.tensor([list(r[key].values()) if key == "probabilities" else r[key] for r in rs])
            for rs in (one, two)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_numbers_beyond_64_bits_and_labels_of_nobody_are_no_errors(posterior, tmp_path, capsys):
    """GLUE writes -1 where a label is not known."""
    rows = [{"text": "bank", "n": 2**70, "topic": -1}, {"text": "goal", "n": 1, "topic": "-1"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert call(posterior, tmp_path / "rows.jsonl", tmp_path / "out.parquet") == 0
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["input.n"] for row in table] == [str(2**70), "1"]
    assert "rows have labels" not in capsys.readouterr().err


def test_draws_are_chosen_where_there_are_any(classifier_flags, rows, tmp_path, capsys):
    flags = [*classifier_flags, "--modelwrapper", "map", "--max-train-steps", "1"]
    main.main(flags)
    assert call(run_folder(flags), rows, tmp_path / "out.jsonl", "--n-draws", "5") == 2
    assert "map has no draws" in capsys.readouterr().err
