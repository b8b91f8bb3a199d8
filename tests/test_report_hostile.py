"""The report on folders that somebody made who means harm: nothing is obeyed, nothing hangs."""

import csv
import html
import io
import json
import os
import re
import shutil
import string
import subprocess
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_report import MADE, change_json, make_run, report_on, script

from report import write as writing
from report.collect import Options, collect, shortest_tails
from report.escape import (
    FORMULA_SIGNS,
    LATEX,
    LONGEST_NAME,
    code_in_markdown,
    distinct,
    file_stem,
    in_csv,
    in_html,
    in_latex,
    in_markdown,
    in_plot,
)
from report.page import page
from report.plots import Plot, draw_family
from report.runs import find_runs, read_history
from report.tables import comma_separated, latex, markdown, terminal
from utils.errors import one_line
from utils.files import write_json

NAMES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example/ www.evil.example a@evil.example",
    "`a` **b** _c_ ~~d~~ # e | f \\| <b>g</b>",
    "```\n<script>\n```",
    "=cmd|'/C calc'!A0",
    "+1+1",
    "@SUM(1)",
    " \t-2+3",
    "＝1+1",
    "a;=1+1",
    "\x1b[2J\x1b]0;title\x07\rgone",
    "\u202egpj.exe \u2066 \u200b",
    "a\n\nb\r\nc\x85d\u2028e",
    "\ud800",
    "\0",
    "$\\frac{1}{0}$ x_1^2 \\input{/etc/passwd} %",
    "[0pt] *",
    "\\end{table}\\write18{id}",
    "_hidden",
    "../../../../etc/passwd",
    "-rf",
    ".bashrc",
    "中文 😀 e\u0301\u0301",
    "x" * 100_000,
    "/" * 50_000,
]
TEXT = st.text() | st.text("`*_[]()<>&|\\#~$^{}@:;=+-'\" \t\n\r\0aw.1=＝＋−\x1b\u202e\u200b\ud800")
FAST = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# --- each format escapes for itself ---------------------------------------------------------------


def is_quiet(text):
    """Whether nothing in it moves a cursor, breaks a line or turns the writing direction."""
    return not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in text}


@FAST
@given(TEXT)
def test_a_line_is_printable_and_one(text):
    assert is_quiet(one_line(text)) and one_line(one_line(text)) == one_line(text)
    assert one_line(text) == text or not (text.isascii() and text.isprintable())


class Tags(HTMLParser):
    """The tags of a text, and what stands between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@FAST
@given(TEXT)
def test_markdown_text_has_no_markup(text):
    escaped = in_markdown(text)
    assert html.unescape(escaped) == html.unescape(html.escape(one_line(text)))
    assert not set("<>[]`*|\\~$^{}@") & set(escaped) and "\n" not in escaped
    assert re.sub(r"&#\d+;", "", escaped).count("&") == 0
    assert not re.search(r"://|(?i:www)\.|(?i:javascript):|(^|\W)_|_(\W|$)", escaped)
    assert not re.match(r"[-+=]|\s|\d+[.)]|#", escaped)


@pytest.mark.parametrize("text", NAMES[:-2])
def test_a_markdown_parser_makes_nothing_of_a_name(text):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    name = in_markdown(text)
    document = f"## {name}\n\n{name}\n\n- {name}\n\n| a | b |\n| --- | --- |\n| {name} | 1 |\n"
    rendered = Tags(parser.render(document))
    assert " ".join(rendered.tags) == "h2 p ul li table thead tr th th tbody tr td td"
    assert rendered.text.count(one_line(text).strip()) == 4 and not rendered.attributes


@FAST
@given(TEXT)
def test_a_command_in_markdown_is_code_or_text(text):
    escaped = code_in_markdown(text)
    assert escaped == in_markdown(text) or (
        escaped == f"`{one_line(text)}`" and not set("<>&`") & set(escaped[1:-1])
    )


def begins_a_formula(cell):
    first = cell.lstrip(string.whitespace + "\"'`\u3000\xa0")[:1]
    return bool(first) and unicodedata.normalize("NFKC", first)[0] in FORMULA_SIGNS


@FAST
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_csv_gives_the_text_back_and_no_cell_is_a_formula(texts):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(map(in_csv, texts))
    assert out.getvalue().count("\n") == 1 and "\0" not in out.getvalue()
    (cells,) = csv.reader([out.getvalue()])
    for cell, text in zip(cells, texts, strict=True):
        for part, original in zip(cell.split(";"), one_line(text).split(";"), strict=True):
            assert part == (f"'{original}" if begins_a_formula(original) else original)
    for semicolons in csv.reader([out.getvalue()], delimiter=";"):
        assert not any(cell.startswith(tuple(FORMULA_SIGNS)) for cell in semicolons)


def without_commands(text):
    """LaTeX without what `in_latex` may write."""
    for command in sorted(LATEX.values(), key=len, reverse=True):
        if command not in ("--", "''", "~"):
            text = text.replace(command, "")
    return text


@FAST
@given(TEXT)
def test_latex_has_no_special_sign_but_in_known_commands(text):
    escaped = in_latex(text)
    assert not set('\\&%$#_{}^<>|[]*"') & set(without_commands(escaped))
    assert is_quiet(escaped) and "\n" not in escaped
    assert not escaped.startswith(("[", "*")), "an option of the line above"


@FAST
@given(TEXT)
def test_html_is_text_in_every_context(text):
    found = Tags(f'<p title="{in_html(text)}">{in_html(text)}</p>')
    assert found.tags == ["p"] and found.text == one_line(text)
    assert found.attributes == [("title", one_line(text))]


@FAST
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_names_of_files_are_plain_and_differ(texts):
    taken = set()
    stems = [file_stem(taken, text) for text in texts]
    assert len({stem.lower() for stem in stems}) == len(stems)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,85}", stem) for stem in stems)


@FAST
@given(st.lists(TEXT | TEXT.map(lambda text: "x" * 200 + text), max_size=6))
def test_shown_names_are_short_and_differ(texts):
    shown = distinct({text: text for text in texts})
    assert len(set(shown.values())) == len(set(texts))
    assert all(len(name) <= LONGEST_NAME + 4 and is_quiet(name) for name in shown.values())
    assert all(shown[t] == t for t in texts if t.isascii() and t.isprintable() and len(t) < 100)


def test_tails_are_told_apart_as_before():
    names = ["/x/run1/final", "/x/run2/final", "/y/other/", "p1/my.py:Mine", "p2/my.py:Mine"]
    assert shortest_tails(names) == {
        "/x/run1/final": "run1/final",
        "/x/run2/final": "run2/final",
        "/y/other/": "other",
        "p1/my.py:Mine": "p1/my.py:Mine",
        "p2/my.py:Mine": "p2/my.py:Mine",
    }


def test_a_label_is_never_left_out_of_the_legend():
    assert not in_plot("_name", 34).startswith("_") and len(in_plot("x" * 99, 34)) == 34


# --- whole reports --------------------------------------------------------------------------------


def rename(folder, name):
    """Everything that a file can call something is called `name`."""
    stored = json.loads((folder / "args.json").read_text())
    stored["args"] |= {"note": name, "load_lora_path": f"/nowhere/{name}"}
    stored["run"] |= {"command": ["main.py", name], "commit": name, "host": name}
    (folder / "args.json").write_text(json.dumps(stored))
    change_json(folder / "metrics.json", modelwrapper=name[:500], model=name[-500:])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(root, exit code, output, errors) of a report on runs with all of `NAMES`."""
    root = tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(NAMES):
        folder = make_run(root, "map", name=f"run{number}", n=12, shifted=number % 9 == 0)
        rename(folder, name)
        if number % 3 == 0:
            change_json(folder / "metrics.json", model="one/model")
        if number % 3 == 1:  # a name of the data set, and a reason that quotes it
            stored = json.loads((folder / "metrics.json").read_text())
            stored["datasets"] |= {name[:300] or "a": stored["datasets"]["bbc_headlines"]}
            write_json(folder / "metrics.json", stored)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setattr("report.write.draw_family", lambda *args: [])  # a test of their own
        patch.setattr("report.write.draw_training", lambda *args: None)
        code = script().run([str(root), "--bootstrap", "10", "--out", str(root / "a <b>`")])
    return root / "a <b>`", code, out.getvalue(), err.getvalue()


def test_the_terminal_shows_hostile_names_and_obeys_none(hostile):
    _, code, out, err = hostile
    assert code == 0 and "[2J" in out
    for line in [*out.split("\n"), *err.split("\n")]:
        assert is_quiet(line) and len(line) < 5000
    assert out.count("\n") < 200 and err.count("\n") < 40


def test_tables_md_with_hostile_names_has_no_markup(hostile):
    text = (hostile[0] / "tables.md").read_text(encoding="utf-8")
    assert "<" not in text and "](" not in text and "://" not in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, "whole rows"
        else:
            assert block.startswith(("Made by ", "## ", "### ", "- ")) or "\n" not in block.strip()


def test_tables_csv_with_hostile_names_has_no_formula(hostile):
    lines = list(csv.reader((hostile[0] / "tables.csv").open(newline="", encoding="utf-8")))
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines) > 500
    for cell in (cell for line in lines for cell in line):
        assert not begins_a_formula(cell) or cell.startswith("'") or float(cell) < 0


def test_tables_tex_with_hostile_names_is_text(hostile):
    text = (hostile[0] / "tables.tex").read_text(encoding="utf-8")
    for caption in re.findall(r"\\caption\{(.*)\}$", text, re.M):
        assert not set("\\{}$&%#_^") & set(without_commands(caption))
    assert text.count(r"\caption") == text.count(r"\end{table}") == text.count(r"\begin{table}")
    assert r"\input{" not in text and r"\write18{" not in text
    assert not re.search(r"^\s*[\[*]", text, re.M)
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert text.startswith("\n".join(comments)) and len(comments) == 3


def test_the_page_with_hostile_names_has_only_its_own_tags(hostile):
    found = Tags((hostile[0] / "report.html").read_text(encoding="utf-8"))
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert not {"img", "svg", "iframe", "b"} & set(found.tags)
    assert not [key for key, _ in found.attributes if key.startswith("on")]
    assert all(value.startswith("#") for key, value in found.attributes if key == "href")
    assert "\0" not in found.text and "\u202e" not in found.text


def test_nothing_is_written_but_the_report(hostile):
    assert {file.name for file in hostile[0].iterdir()} == {
        *("report.html", "tables.md", "tables.tex", "tables.csv", "report-files.json"),
    }


def test_plots_take_any_name(tmp_path, recwarn):
    for number, some in enumerate((NAMES[:-2], NAMES[-2:-1])):
        note = "".join(some)[:3000]
        folder = make_run(tmp_path, "map", name=f"run{number}", n=6, note=note)
        change_json(folder / "metrics.json", model=f"{NAMES[19]} {NAMES[26]} _")
    (family,) = report_on(tmp_path, resamples=0).families
    drawn = draw_family(family, {row.name: 0 for row in family.rows}, "stem", tmp_path)
    assert len(drawn) == 3 and all(plot.png.stat().st_size > 1000 for plot in drawn)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_rows_that_differ_beyond_the_cut_stay_apart(tmp_path):
    for end in "ab":
        make_run(tmp_path, "map", name=end, n=20, note="x" * 3000 + end)
        change_json(
            make_run(tmp_path, "mle", name=end, n=20) / "metrics.json", model="y" * 400 + end
        )
    first, *others = report_on(tmp_path, resamples=0).families
    assert [len(family.rows) for family in (first, *others)] == [2, 1, 1]
    assert len({row.name for row in first.rows}) == 2
    assert all(len(row.name) <= LONGEST_NAME + 4 for row in first.rows)
    assert others[0].model != others[1].model and len(others[1].model) <= LONGEST_NAME + 4


def test_a_row_called_like_a_scaled_one_is_another_row(tmp_path):
    make_run(tmp_path, "map", n=20, temperature=2.0)
    make_run(tmp_path, "map + temperature", n=20)
    (family,) = report_on(tmp_path, resamples=0).families
    assert len({row.name for row in family.rows}) == 3


def test_a_report_of_many_runs_grows_linearly_and_its_legends_do_not(tmp_path):
    long = "/x" * 1000
    for number in range(30):
        make_run(tmp_path, "map", name=str(number), n=3, load_lora_path=f"{long}/{number}/a")
    started = time.perf_counter()
    (family,) = report_on(tmp_path, resamples=0).families
    assert time.perf_counter() - started < 20 and len(family.rows) == 30
    assert all(re.search(r"[ /]\d+/a\)$", row.name) for row in family.rows)


# --- files that are none --------------------------------------------------------------------------

SPECIAL = {
    "folder": lambda file: file.mkdir(),
    "pipe": os.mkfifo,
    "loop": lambda file: file.symlink_to(file.name),
    "endless": lambda file: file.symlink_to("/dev/zero"),
    "kernel": lambda file: file.symlink_to("/proc/kmsg"),
    "dangling": lambda file: file.symlink_to("nowhere"),
    "empty": lambda file: file.write_bytes(b""),
    "sparse": lambda file: [file.write_bytes(b""), os.truncate(file, 2**40)],
    "terabytes": lambda file: file.write_bytes((2**42).to_bytes(8, "little") + b"{}"),
}


@pytest.mark.parametrize("name", ["metrics.json", "args.json", "predictions.safetensors"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_a_reason_and_never_waited_for(tmp_path, name, kind):
    make_run(tmp_path, "map", n=6)
    file = make_run(tmp_path, "blob", n=6) / name
    file.unlink()
    SPECIAL[kind](file)
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert report.num_runs == 1 and name in skipped.line
    assert len(skipped.line) < 600 and len(skipped.line.splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "endless", "sparse"])
def test_a_special_history_costs_the_curves_only(tmp_path, kind):
    file = make_run(tmp_path, "map", n=6) / "history.jsonl"
    file.unlink()
    SPECIAL[kind](file)
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert report.num_runs == 1 and "no training curves: history.jsonl" in skipped.reason


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/proc/self", "/dev", "pipe", "\0", "\ud800", "a" * 999]
)
def test_an_adapters_path_is_followed_to_ordinary_files_only(tmp_path, path):
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "args.json")
    make_run(tmp_path / "runs", "tfb", n=6, load_lora_path=path)
    report = report_on(tmp_path / "runs", resamples=0)
    assert report.num_runs == 1 and not report.skipped


def test_folders_nested_deeper_than_pythons_stack_are_walked(tmp_path):
    make_run(tmp_path, "map", n=6)
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=here)
        above, here = here, os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(above)
    os.close(here)
    try:
        report = report_on(tmp_path, resamples=0)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep"])  # pytest would fail on it
    assert report.num_runs == 1 and len(report.skipped) <= 1


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    make_run(tmp_path, "map", n=6)
    (tmp_path / "closed").mkdir()
    listdir = os.listdir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr("os.listdir", refuse)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert (
        skipped.line == f"{tmp_path}/closed: skipped: the folder cannot be read (Permission denied)"
    )


# --- predictions ----------------------------------------------------------------------------------


def rewrite(folder, tensors, **metadata):
    file = folder / "predictions.safetensors"
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        file,
        {"dataset": "bbc_headlines", "split": "val"} | metadata,
    )


def changed(folder, **changes):
    tensors = load_file(folder / "predictions.safetensors")
    rewrite(folder, tensors | {key: make(tensors[key]) for key, make in changes.items()})


REFUSED = [
    *(("log_probs", dtype) for dtype in (torch.float8_e4m3fn, torch.int64, torch.complex64)),
    *(("log_probs", torch.bool), ("labels", torch.bool), ("labels", torch.float32)),
    *(("index", torch.float8_e5m2), ("index", torch.complex64), ("labels", torch.uint64)),
]


@pytest.mark.parametrize("key, dtype", REFUSED, ids=str)
def test_a_tensor_of_another_type_is_named(tmp_path, key, dtype):
    changed(make_run(tmp_path, n=6), **{key: lambda tensor: tensor.to(dtype)})
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert f"'{key}' is of type {str(dtype).removeprefix('torch.')}" in skipped.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_type_of_float_is_read(tmp_path, dtype):
    """Probabilities of 1/4, whose logarithm's rounding bfloat16's eight bits leave below 1e-3."""
    probs = torch.full((6, 2, 1), -0.0)
    rewrite(
        make_run(tmp_path, n=6),
        {
            "log_probs": torch.cat([probs, probs - 60], -1).to(dtype),
            "labels": torch.zeros(6, dtype=torch.uint8),
            "index": torch.arange(6, dtype=torch.int32),
        },
    )
    report = report_on(tmp_path, resamples=0)
    assert report.families[0].rows[0].cells["nll"].value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"labels": lambda t: t - 1}, "labels outside of its 3 classes"),
        ({"index": lambda t: t - 1}, "a row of a negative index"),
        ({"index": lambda t: t // 2}, "twice"),
        ({"log_probs": lambda t: t * 0}, "do not add up to 1"),
        ({"log_probs": lambda t: t - 1e4}, "do not add up to 1"),
        ({"log_probs": lambda t: t[:0], "labels": lambda t: t[:0]}, "has shapes (0, 1, 3), (0,)"),
        ({"log_probs": lambda t: torch.zeros(6, 1, 5000)}, "at most 1000 are measured"),
    ],
)
def test_values_without_a_meaning_are_named(tmp_path, changes, reason):
    changed(make_run(tmp_path, n=6), **changes)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert reason in skipped.reason


def test_a_file_of_more_numbers_than_memory_is_not_read(tmp_path):
    """A file of no size on disk, whose header is right: 2^31 numbers."""
    folder = make_run(tmp_path, n=6)
    header = {"log_probs": {"dtype": "F32", "shape": [2**27, 4, 4], "data_offsets": [0, 2**33]}}
    text = json.dumps(header).encode()
    file = folder / "predictions.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + 2**33)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert "tensors of more than" in skipped.reason


def test_predictions_of_another_set_do_not_lend_their_name(tmp_path):
    folder = make_run(tmp_path, n=6)
    rewrite(folder, load_file(folder / "predictions.safetensors"), dataset="a\n" + "x" * 9999)
    (skipped,) = report_on(tmp_path, resamples=0).skipped
    assert "is of 'a\\nxxx" in skipped.reason and len(skipped.reason) < 400


def test_a_data_sets_name_does_not_lead_out_of_the_folder(tmp_path):
    other = make_run(tmp_path / "other", n=6)
    folder = make_run(tmp_path / "runs", n=6)
    name = os.path.relpath(other / "predictions", folder / "predictions-")
    (folder / "predictions-").mkdir()
    stored = json.loads((folder / "metrics.json").read_text())
    stored["datasets"]["/" + name] = stored["datasets"]["bbc_headlines"]
    write_json(folder / "metrics.json", stored)
    tensors = load_file(other / "predictions.safetensors")
    save_file(tensors, other / "predictions.safetensors", {"dataset": "/" + name, "split": "val"})
    report = report_on(tmp_path / "runs", resamples=0)
    assert len(report.families) == 1 and "there is no predictions-" in report.skipped[0].reason


def test_many_missing_sets_are_a_few_lines(tmp_path):
    folder = make_run(tmp_path, n=6)
    stored = json.loads((folder / "metrics.json").read_text())
    block = stored["datasets"]["bbc_headlines"]
    stored["datasets"] |= {f"set{number}": block for number in range(500)}
    write_json(folder / "metrics.json", stored)
    skipped = report_on(tmp_path, resamples=0).skipped
    assert len(skipped) == 21 and skipped[-1].reason == "and 480 more of this folder"


@pytest.mark.parametrize("temperature", [1e-300, 0.0, -1.0, 1e300])
def test_a_temperature_that_no_run_fits_is_left_out(tmp_path, temperature):
    make_run(tmp_path, n=6, temperature=temperature)
    report = report_on(tmp_path, resamples=0)
    (skipped,) = report.skipped
    assert [row.name for row in report.families[0].rows] == ["map"]
    assert f"the temperature of bbc_headlines is {temperature}" in skipped.reason


def test_examples_whose_checksums_collide_are_not_taken_for_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("zlib.crc32", lambda content: 7)
    make_run(tmp_path, "map", n=9, shifted=True)
    make_run(tmp_path, "blob", n=6)
    own, smaller, shifted = sorted(
        report_on(tmp_path, resamples=20).families, key=lambda f: (f.shifted, -f.num_examples)
    )
    assert [own.num_examples, smaller.num_examples, shifted.num_examples] == [9, 6, 9]


# --- any content ----------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("m")
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner)
)
KEYS = {
    "metrics.json": "modelwrapper model seed updates datasets format_version training_seconds",
    "args.json": "args given run format_version",
}


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """(folder, content of its files) of a finished run, put back before each use."""
    folder = make_run(tmp_path_factory.mktemp("one"), n=6, temperature=2.0)
    return folder, {file.name: file.read_bytes() for file in folder.iterdir()}


def restored(one_run):
    folder, files = one_run
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", KEYS)
@FAST
@given(data=st.data())
def test_any_json_is_a_run_or_a_reason(one_run, name, data):
    folder = restored(one_run)
    stored = json.loads((folder / name).read_text())
    content = data.draw(JSON | st.dictionaries(st.sampled_from(KEYS[name].split()), JSON))
    kind = data.draw(st.sampled_from(["alone", "beside", "within"]))
    if kind == "beside" and isinstance(content, dict):
        content = stored | content
    if kind == "within":  # a block of metrics, or the flags
        block = stored["datasets"]["bbc_headlines"] if "datasets" in stored else stored["args"]
        block[data.draw(st.sampled_from(sorted(block)))] = data.draw(JSON)
        content = stored
    (folder / name).write_text(json.dumps(content))
    runs, skipped = find_runs([folder])
    assert len(runs) + len(skipped) == 1
    report = collect(runs, skipped, Options(resamples=0))
    for text in (markdown(report, MADE), latex(report, MADE), comma_separated(report)):
        text.encode()
    assert is_quiet(terminal(report).replace("\n", "")) and page(report, {}, {}, MADE).encode()


LINES = st.dictionaries(st.sampled_from(["step", "nll", "eval"]), JSON | st.just({"nll": 1.0}))


@FAST
@given(st.lists((LINES | JSON).map(json.dumps) | st.text(), max_size=5))
def test_any_line_of_a_history_is_a_point_or_nothing(one_run, lines):
    folder = restored(one_run)
    content = "\n".join([*lines, '{"step": 7, "nll": 0.5}']).encode(errors="surrogatepass")
    (folder / "history.jsonl").write_bytes(content)
    (run,), _ = find_runs([folder])
    history = read_history(run)
    assert history["train"][-1] == (7, 0.5)
    for step, nll in history["train"] + history["eval"]:
        assert isinstance(step, int) and 0 <= step < 2**63 and abs(nll) <= 1e9


SIZES = st.integers(0, 3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@FAST
@given(data=st.data())
def test_any_small_tensors_are_predictions_or_a_reason(one_run, data):
    folder = restored(one_run)
    tensors = {}
    for key in data.draw(
        st.sets(st.sampled_from(["log_probs", "labels", "index", "other"]), min_size=1)
    ):
        shape = data.draw(
            st.lists(SIZES, max_size=4)
            if data.draw(st.booleans())
            else st.just([2, 1, 2] if key == "log_probs" else [2])
        )
        value = data.draw(st.sampled_from([0.0, 1.0, -0.6931472, 7.0, float("nan"), -1e30]))
        tensors[key] = torch.full(shape, value).to(data.draw(st.sampled_from(DTYPES)))
        if key == "index":
            tensors[key] = torch.arange(tensors[key].numel()).reshape(shape).to(tensors[key].dtype)
    rewrite(folder, tensors, split=data.draw(st.text("ab\n\x1b<", max_size=5)))
    report = report_on(folder, resamples=5)
    assert report.num_runs + len(report.skipped) == 1


@FAST
@given(data=st.data())
def test_any_damage_to_the_bytes_is_predictions_or_a_reason(one_run, data):
    folder = restored(one_run)
    file = folder / data.draw(
        st.sampled_from(["predictions.safetensors", "metrics.json", "args.json"])
    )
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] or content))
    report = report_on(folder, resamples=0)
    assert report.num_runs == 1 or report.skipped


# --- where it writes ------------------------------------------------------------------------------


@pytest.fixture
def fast_plots(monkeypatch):
    """One small plot for each table, so that what is tested is where files go."""

    def draw(family, places, stem, folder):
        for suffix in ("png", "pdf"):
            (folder / f"{stem}-scatter.{suffix}").write_bytes(b"new")
        return [Plot("scatter", "caption", folder / f"{stem}-scatter.png")]

    monkeypatch.setattr(writing, "draw_family", draw)
    monkeypatch.setattr(writing, "draw_training", lambda *args: None)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


REPORT = {"report.html", "tables.md", "tables.tex", "tables.csv", "report-files.json"}


def test_plots_of_an_earlier_report_go_and_nothing_else(tmp_path, fast_plots):
    out = tmp_path / "out"
    first = make_run(tmp_path / "runs", "map", n=6)
    change_json(first / "metrics.json", model="old")
    call = [str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]
    assert script().run(call) == 0
    assert "old-bbc-headlines-scatter.png" in contents(out)
    for mine in ("mine-scatter.png", "old-bbc-headlines-scatter.txt", "notes.md"):
        (out / mine).write_text("mine")
    change_json(first / "metrics.json", model="new")
    assert script().run(call) == 0
    plots = {"new-bbc-headlines-scatter.png", "new-bbc-headlines-scatter.pdf"}
    mine = {"mine-scatter.png", "old-bbc-headlines-scatter.txt", "notes.md"}
    assert set(contents(out)) == REPORT | plots | mine
    assert json.loads((out / "report-files.json").read_text())["plots"] == sorted(plots)


def test_plots_that_only_the_old_page_names_go_as_well(tmp_path, fast_plots):
    out = tmp_path / "out"
    folder = make_run(tmp_path / "runs", "map", n=6)
    call = [str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]
    assert script().run(call) == 0
    (out / "report-files.json").unlink()
    change_json(folder / "metrics.json", model="new")
    assert script().run(call) == 0
    assert [name for name in sorted(contents(out)) if "scatter" in name] == [
        "new-bbc-headlines-scatter.pdf",
        "new-bbc-headlines-scatter.png",
    ]


def test_a_manifest_names_no_file_but_plots(tmp_path, fast_plots, capsys):
    out = tmp_path / "out"
    out.mkdir()
    make_run(tmp_path / "runs", "map", n=6)
    call = [str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]
    for name in (
        "args.json",
        "../x-scatter.png",
        ".a-scatter.png",
        "x-scatter.png\n",
        "/a-draws.pdf",
    ):
        manifest = {"format_version": 1, "plots": [name]}
        (out / "report-files.json").write_text(json.dumps(manifest))
        assert script().run(call) == 2
        err = capsys.readouterr().err
        assert "report-files.json" in err and "plots.0" in err and "Remove it" in err
        assert set(contents(out)) == {"report-files.json"}


@pytest.mark.parametrize("name", sorted(REPORT))
def test_a_file_that_no_report_wrote_is_not_replaced(tmp_path, name, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    make_run(tmp_path / "runs", "map", n=6)
    assert script().run([str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert name in err and "--out" in err and len(err.splitlines()) == 1
    assert contents(out) == {name: b"mine"}


def test_a_plot_of_the_users_own_keeps_its_name(tmp_path, fast_plots):
    out = tmp_path / "out"
    out.mkdir()
    (out / "M-bbc-headlines-scatter.png").write_text("mine")
    make_run(tmp_path / "runs", "map", n=6)
    for _ in range(2):
        assert script().run([str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]) == 0
        assert set(contents(out)) == REPORT | {
            "M-bbc-headlines-scatter.png",
            "m-bbc-headlines-2-scatter.png",
            "m-bbc-headlines-2-scatter.pdf",
        }
    assert (out / "M-bbc-headlines-scatter.png").read_text() == "mine"


def test_a_report_inside_of_a_runs_folder_leaves_the_run_as_it_was(tmp_path, fast_plots):
    folder = make_run(tmp_path, "map", n=6)
    before = contents(folder)
    for _ in range(2):
        assert script().run([str(folder), "--bootstrap", "0", "--out", str(folder)]) == 0
        after = contents(folder)
        assert {name: after[name] for name in before} == before
        assert report_on(folder, resamples=0).num_runs == 1


class Killed(BaseException):
    """Instead of SIGKILL."""


class Dying:
    """Changes of the file system that a report makes, and death before one of them."""

    def __init__(self, monkeypatch):
        self.left = None
        for where, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir")):
            monkeypatch.setattr(where, name, self.counted(getattr(where, name)))
        remove = shutil.rmtree
        # what a killed process would not do any more
        monkeypatch.setattr(
            shutil, "rmtree", lambda *a, **k: None if self.left == 0 else remove(*a, **k)
        )

    def counted(self, function):
        def call(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left = self.left and self.left - 1
            return function(*args, **kwargs)

        return call


def test_death_at_any_moment_leaves_one_report_and_nothing_for_ever(
    tmp_path, fast_plots, monkeypatch
):
    out = tmp_path / "out"
    folder = make_run(tmp_path / "runs", "map", n=6)
    call = [str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]
    dying = Dying(monkeypatch)
    for moment in range(99):
        dying.left = None
        change_json(folder / "metrics.json", model=f"old{moment}")
        assert script().run(call) == 0
        old = contents(out)
        assert len(old) == 7 and len(list(out.iterdir())) == 7, "what the dead have left is gone"
        change_json(folder / "metrics.json", model=f"new{moment}")
        dying.left = moment
        try:
            script().run(call)
            break
        except Killed:
            now = contents(out)
        assert now["report.html"] == old["report.html"] or f"new{moment}" in str(now["report.html"])
        assert {n for n in now if "scatter" in n} <= {
            *json.loads(now["report-files.json"])["plots"]
        }
    assert moment >= 10


def test_a_full_disk_leaves_the_earlier_report(tmp_path, fast_plots, monkeypatch, capsys):
    out = tmp_path / "out"
    make_run(tmp_path / "runs", "map", n=6)
    call = [str(tmp_path / "runs"), "--bootstrap", "0", "--out", str(out)]
    assert script().run(call) == 0
    before = contents(out)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert script().run(call) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert contents(out) == before and not [f for f in out.iterdir() if f.is_dir()]


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--num-bins", "10000000000"], "at most 1000"),
        (["--num-bins", "0"], "at least 1"),
        (["--num-bins", "9" * 400], "at most 1000"),
        (["--num-bins", "9" * 5000], "at least 1"),
        (["--bootstrap", str(10**12)], "at most 100000"),
        (["--seed", str(2**32)], "between 0 and 2^32 - 1"),
        (["--seed", "-1"], "between 0 and 2^32 - 1"),
        (["--out", ""], "is no folder"),
        (["--out", "a\0b"], "is no folder"),
        (["--out", "\ud800"], "cannot be written"),
        (["--out", "x" * 300], "cannot be written"),
        (["--out", "/dev/null"], "cannot be written"),
        (["--out", "/proc/x"], "cannot be written"),
    ],
)
def test_a_flag_that_cannot_be_is_one_message(tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", "map", n=6)
    assert script().run(["runs", *flags]) == 2
    err = capsys.readouterr().err
    assert told in err and flags[0] in err and len(err) < 6000 and is_quiet(err[:-1])
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("path", ["", "\0", "\ud800", "x" * 5000, "nowhere", "file", "\x1b[2J\nx"])
def test_a_path_that_is_no_folder_is_one_line(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    assert script().run([path]) == 2
    err = capsys.readouterr().err
    assert err.startswith("UsageError: ") and err.count("\n") == 1 and len(err) < 400
    assert is_quiet(err[:-1])


def test_a_terminal_of_few_letters_gets_the_table(tmp_path, fast_plots, monkeypatch):
    make_run(tmp_path, "map", n=6)
    make_run(tmp_path, "blob", n=6)
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert script().run([str(tmp_path), "--bootstrap", "20"]) == 0
    assert b"\\u2020" in raw.getvalue()
