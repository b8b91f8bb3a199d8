"""What the pages say: snippets run as they are printed, commands parse, flags and links exist.

The Python blocks of a page run in order, in one namespace. One that begins with a file's name, such
as `# my_method.py`, is written to that file instead, and used the way a reader would use it: a
method is trained, saved and loaded again, a data set is trained on. What a page takes for granted
(the quickstart's run, a model's folder, rows) the fixture `reader` puts in place, in tiny.
"""

import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_folder, topic_rows, write_jsonl
from safetensors.torch import load_file

import main
from dataset import build_dataset
from dataset.tasks import Task
from modelwrappers import WRAPPERS, get_wrapper, load_posterior
from modelwrappers.wrapperbase import WrapperBase
from scripts import predict
from utils.args import build_parser
from utils.files import write_json
from utils.registry import load_from_file
from utils.run_records import stored_flags

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
QUICKSTART = "checkpoints/{}/smollm2-135m/bbc_headlines/quickstart"
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.py)\n")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line in the page, content) of the page's code blocks in that language."""
    text = text_of(page)
    found = []
    for match in BLOCK.finditer(text):
        if match[2] == language:
            content = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
            found.append((text[: match.start(3)].count("\n"), content))
    return found


def is_named(page: Path) -> str:
    return page.stem


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


# --- snippets -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quickstart(tiny_llama, data_dir, tmp_path_factory) -> Path:
    """What the quickstart's BLoB run leaves, from a tiny model."""
    flags = [
        *("--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", tiny_llama),
        *("--data-dir", data_dir, "--output-dir", str(tmp_path_factory.mktemp("quickstart"))),
        *("--modelwrapper", "blob", "--max-train-steps", "3", "--lr", "1e-2", "--nowand"),
        *("--bayes-eval-n-samples-final", "5", "--device", "cpu"),
    ]
    main.main(flags)
    return run_folder(flags)


@pytest.fixture
def reader(quickstart, tiny_llama, tmp_path, monkeypatch) -> Path:
    """The working folder of somebody who reads the pages and types along."""
    shutil.copytree(quickstart, tmp_path / QUICKSTART.format("blob"))
    (tmp_path / "models").mkdir()
    shutil.copytree(tiny_llama, tmp_path / "models" / "my-llm")
    (tmp_path / "my_adapter").mkdir()
    peft_says = {"base_model_name_or_path": "minilm-l6"}
    write_json(tmp_path / "my_adapter" / "adapter_config.json", peft_says)
    for folder, names in (("my_data", ("text", "topic")), ("my_rows", ("headline", "desk"))):
        (tmp_path / folder).mkdir()
        for split, number in (("train", 24), ("test", 9)):
            rows = [
                dict(zip(names, row.values(), strict=True)) for row in topic_rows(number, seed=3)
            ]
            write_jsonl(tmp_path / folder / f"{split}.jsonl", rows)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kwargs: "a commit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=is_named)
def test_every_snippet_runs_as_it_is_printed(page, reader, causal_flags, classifier_flags):
    namespace = {"__name__": "a_reader"}
    for line, content in blocks(page, "python"):
        if name := FILE_NAME.match(content):
            Path(name[1]).write_text(content, encoding="utf-8")
            use(name[1], causal_flags, classifier_flags)
        else:
            exec(compile("\n" * line + content, str(page), "exec"), namespace)


def use(file: str, causal_flags: list[str], classifier_flags: list[str]) -> None:
    """Use what a file of the reader's own defines."""
    methods = re.findall(r"^class (\w+)\(.*WrapperBase\):", text_of(Path(file)), re.MULTILINE)
    for name in methods:
        assert issubclass(load_from_file(f"{file}:{name}", "method"), WrapperBase)
        for flags in (causal_flags, classifier_flags):
            train_and_load(f"{file}:{name}", flags)
    tasks = [key for key, value in runpy.run_path(file).items() if isinstance(value, Task)]
    for name in tasks:
        flags = [*causal_flags, "--dataset", f"{file}:{name}", "--data-dir", "my_rows"]
        main.main([*flags, "--modelwrapper", "mle", "--max-train-steps", "2"])
    assert methods or tasks, f"{file} defines neither a method nor a data set"


def train_and_load(method: str, flags: list[str]) -> None:
    """A run of the method, and its posterior, predict the same."""
    flags = [*flags, "--modelwrapper", method, "--max-train-steps", "16"]
    main.main(flags)
    stored = load_file(run_folder(flags) / "predictions.safetensors")["log_probs"]
    posterior = load_posterior(run_folder(flags), device="cpu", modelwrapper=method)
    if posterior.is_stochastic:
        assert stored.shape[1] > 1 and (stored.std(1) > 1e-5).any(), "the draws are all the same"
    dataset = build_dataset(main.parse_args(flags), posterior.accelerator)
    again = posterior.predict(dataset.test_dataloader).log_probs
    torch.testing.assert_close(again, stored, rtol=1e-4, atol=1e-5)


# --- command lines and flags ----------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The flags of every complete `python main.py` in the page's bash blocks and tables."""
    lines = re.findall(r"`(python main\.py [^`\n]*)`", text_of(page))
    for _, content in blocks(page, "bash"):
        for name, value in re.findall(r'^(\w+)="([^"\n]*)"$', content, re.MULTILINE):
            content = content.replace(f"${name}", value)
        unbroken = content.replace("\\\n", " ").splitlines()
        lines += [line for line in unbroken if line.startswith("python main.py")]
    words = [shlex.split(line, comments=True)[2:] for line in lines if "..." not in line]
    return [flags for flags in words if "--help" not in flags and "METHOD" not in flags]


def test_every_call_of_predict_answers(reader):
    """As it is printed, where the posterior is the quickstart's; else it is a right call."""
    (reader / "headlines.txt").write_text("bank profit\nmatch goal\n")
    write_jsonl(reader / "headlines.jsonl", [{"text": "bank profit"}, {"text": "match goal"}])
    (reader / "pool.txt").write_text("".join(f"{row['text']}\n" for row in topic_rows(25)))
    calls = [
        shlex.split(line, comments=True)[2:]
        for page in PAGES
        for _, content in blocks(page, "bash")
        for line in content.replace("\\\n", " ").splitlines()
        if line.startswith("python scripts/predict.py")
    ]
    assert len(calls) >= 4
    for words in calls:
        args = predict.parse_args(words)
        if not Path(args.posterior).exists():
            continue
        assert predict.run([*words, "--overwrite"]) == 0
        number = args.acquire or len(Path(args.rows).read_text().splitlines())
        lines = len(Path(args.out).read_text().splitlines())
        assert lines == number + (args.out_format == "csv")


def test_every_command_line_parses(reader):
    """Paths may lead nowhere, but a run that another command has trained is there to be loaded."""
    for page in PAGES:
        for _, content in blocks(page, "python"):
            if name := FILE_NAME.match(content):
                Path(name[1]).write_text(content, encoding="utf-8")
    quickstart_map = [
        *("--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", "smollm2-135m"),
        *("--modelwrapper", "map", "--max-train-steps", "160", "--log-path", "quickstart"),
    ]
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) >= 12
    # those that load a run or repeat one come after those that make it
    found.sort(key=lambda flags: bool({"--load-lora-path", "--config"} & set(flags)))
    for flags in [quickstart_map, *found]:
        args = main.parse_args(flags)
        folder = run_folder(flags)
        folder.mkdir(parents=True, exist_ok=True)
        stored = stored_flags(args)
        given = {key: stored[key] for key in args.given}
        write_json(folder / "args.json", {"args": stored, "given": given, "run": {}})


# Flags of other programs, and words that only look like flags.
FOREIGN = {
    *("--no-deps", "--check", "--array", "--dependency", "--standalone", "--nproc-per-node"),
    *("--config_file", "--num_processes", "--num_machines", "--machine_rank"),
    *("--main_process_ip", "--main_process_port", "--help"),
}
# `--lora-*` and the like stand for several.
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*(?![\w*-])")


def test_every_flag_that_is_mentioned_exists(capsys):
    known = set(FOREIGN)
    for name in WRAPPERS:
        known |= set(build_parser(get_wrapper(name).add_arguments)._option_string_actions)
    for script in ("report", "predict", "active_learning", "sweep"):
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["parse_args"](["--help"])
    known |= set(FLAG.findall(capsys.readouterr().out))
    defined = {  # by the methods that the pages show
        flag
        for page in PAGES
        for _, content in blocks(page, "python")
        for flag in re.findall(r'add_argument\("(--[\w-]+)"', content)
    }
    unknown = {
        f"{page.name}: {flag}"
        for page in PAGES
        for flag in set(FLAG.findall(text_of(page))) - known - defined
    }
    assert not unknown, sorted(unknown)


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=is_named)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text_of(page))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


PATH = re.compile(
    r"`((?:modelwrappers|dataset|report|utils|scripts|configs|benchmarks|docs|tests)/[\w/.-]+|main\.py)`"
)


@pytest.mark.parametrize("page", PAGES, ids=is_named)
def test_every_file_of_the_project_that_is_named_exists(page):
    for name in PATH.findall(text_of(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_tree_of_the_readme_is_the_one_there_is():
    tree = text_of(ROOT / "README.md").split("## The tree", 1)[1].split("```")[1]
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    named = set()
    for line in tree.strip("\n").splitlines():
        indent = len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        for name in line.strip().split("  ")[0].split(", "):  # files of one line
            if "<" in name:
                continue
            assert (folders[-1][1] / name).exists(), line
            named.add(folders[-1][1] / name)
            if name.endswith("/"):
                folders.append((indent, folders[-1][1] / name))
    rooms = (ROOT / "modelwrappers", ROOT / "dataset")
    modules = {file for room in rooms for file in room.rglob("*.py")}
    inner = {file for file in modules if file.name == "__init__.py" and file.parent not in rooms}
    assert not modules - inner - named, "the tree leaves out a module"


def test_the_readme_is_short_and_every_page_is_in_its_table():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 250
    for page in PAGES:
        assert page.name == "README.md" or f"]({os.path.relpath(page, ROOT)})" in text
