"""Start: what a call has to wait for, what `--help` says, and how a wrong call is answered."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import main
import modelwrappers
from dataset import DATASETS
from modelwrappers import WRAPPERS, BLoB
from utils.args import Parser, build_parser
from utils.catalogue import read_catalogue
from utils.errors import UsageError
from utils.flags import WITHOUT_EFFECT, spelling
from utils.parser import COMPATIBILITY, SYNONYMS, HelpFormatter, is_switch
from utils.registry import LazyTable, lookup

ROOT = Path(__file__).parent.parent
SLOW = "torch transformers peft accelerate datasets torchmetrics scipy numpy bitsandbytes wandb"
BASE = ["--dataset-type", "mcdataset", "--dataset", "obqa", "--model", "m", "--modelwrapper", "mle"]


def start(*argv: str) -> tuple[int, str, str, set[str]]:
    """Exit code, output, errors and the slow libraries that an interpreter had to import."""
    script = (
        "import json, sys\nimport main\n"
        "try:\n    code = main.run(json.loads(sys.argv[1]))\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"slow = set({SLOW!r}.split()) & set(sys.modules)\n"
        "print('\\n---' + json.dumps([code, sorted(slow)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    out, _, found = done.stdout.rpartition("\n---")
    code, slow = json.loads(found)
    return code, out, done.stderr, set(slow)


# --- what is imported -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["main", "modelwrappers", "dataset", "utils.args", "utils.records", "utils.run_paths"]
)
def test_a_module_of_the_way_to_a_checked_call_imports_nothing_slow(module):
    script = f"import sys, {module}\nprint(*(set({SLOW!r}.split()) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_help_waits_for_nothing_and_lists_every_method():
    code, out, err, slow = start("--help")
    assert (code, err, slow) == (0, "", set())
    assert out.startswith("usage: python main.py --dataset-type TYPE --dataset NAME --model NAME")
    for method in modelwrappers.catalogue().methods:
        (line,) = [line for line in out.splitlines() if line.endswith(f"  {method.summary}")]
        assert line.split("  ")[1] == ", ".join(method.names)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--modelwrapper, --dataset, --model, --dataset-type are missing"]),
        ([*BASE, "--lr", "-1"], ["--lr", "greater than 0", "'-1'"]),
        ([*BASE, "--learning-rate", "1"], ["--learning-rate", "did you mean '--lr'"]),
        ([*BASE, "--bayes-kllr", "1"], ["--bayes-kllr is a flag of --modelwrapper blob"]),
        ([*BASE, "stray"], ["stray", "follows no flag"]),
        ([*BASE[:-1], "mlee"], ["did you mean 'mle'"]),
        ([*BASE, "--dataset", "obqq"], ["unknown data set 'obqq'"]),
        ([*BASE, "--nowand", "--tracker", "wandb"], ["--nowand and --tracker wandb"]),
        ([*BASE, "--resume", "--overwrite"], ["--resume", "--overwrite"]),
        ([*BASE, "--log-path", "a/b"], ["--log-path", "one folder's name"]),
        ([*BASE, "--config", "/nowhere.json"], ["/nowhere.json"]),
        (["--modelwrapper", "nowhere.py:Mine", "--lr", "0"], ["--lr", "greater than 0"]),
        ([*BASE[:-1], "blob", "--bayes-eps", "0.1", "--lr", "0"], ["--lr", "greater than 0"]),
    ],
    ids=lambda value: " ".join(value)[-30:],
)
def test_a_wrong_call_is_answered_at_once(flags, words):
    code, out, err, slow = start(*flags)
    assert (code, out, slow) == (2, "", set())
    assert err.startswith("UsageError: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_methods_help_does_not_look_into_bitsandbytes():
    script = (
        "import sys, main\ntry:\n    main.run(['--modelwrapper', 'blob', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert 'bitsandbytes.functional' not in sys.modules\n"
        "assert not {'torchmetrics', 'datasets', 'wandb'} & set(sys.modules)\n"
        "import bitsandbytes\nassert bitsandbytes.nn.Linear4bit\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- tables that import their entries -------------------------------------------------------------


def test_a_table_imports_an_entry_when_it_is_asked_for():
    table = LazyTable({"a": "no_such_module:A", "b": "fractions:Fraction", "c": 3})
    assert list(table) == ["a", "b", "c"] and len(table) == 3 and "a" in table
    assert table.module_of("a") == "no_such_module" and table.module_of("b") == "fractions"
    assert table["b"].__name__ == "Fraction" and table.get("b") is table["b"]
    assert lookup(table, "B", "number") is table["b"] and table["c"] == 3
    assert table.module_of("b") == "fractions", "also once it is imported"
    with pytest.raises(UsageError, match="unknown number 'd'"):
        lookup(table, "d", "number")
    with pytest.raises(ModuleNotFoundError):
        table["a"]


def test_an_entry_can_be_replaced(monkeypatch):
    class Mine(BLoB):
        pass

    monkeypatch.setitem(WRAPPERS, "mine", Mine)
    assert modelwrappers.get_wrapper("mine") is Mine
    assert modelwrappers.catalogue().flags_of("mine") is None, "its source is not one of ours"
    assert main.parse_args([*BASE[:-1], "mine", "--prior-std", "0.3"]).bayes_beta == 0.3


def test_classes_have_their_names_in_their_package():
    for name in ("MAP", "MCDropout", "DeepEnsemble", "BLoB", "Laplace", "TFB", "WrapperBase"):
        assert getattr(modelwrappers, name).__name__ == name
    assert modelwrappers.backbone.load_model and modelwrappers.stochastic_lora.Draws
    with pytest.raises(AttributeError, match="Nothing"):
        modelwrappers.Nothing  # noqa: B018


def test_names_of_data_sets_are_checked_in_the_table_of_their_class():
    import dataset

    assert {kind: cls.tasks for kind, cls in DATASETS.items()} == dataset._TASKS


# --- what the sources say -------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(WRAPPERS))
def test_no_flag_of_a_method_is_refused_early(method):
    shared = build_parser(lambda parser: None).flags
    own = build_parser(WRAPPERS[method].add_arguments).flags.keys() - shared.keys()
    assert own <= modelwrappers.catalogue().flags_of(method)


def test_only_whole_texts_are_flags(tmp_path):
    package = tmp_path / "methods"
    (package / "lora").mkdir(parents=True)
    (package / "one.py").write_text(
        '"""First line.\n\nMore."""\nA = ["--a-b", "--c_d"]\nprint("--e is --f", "---g", "--H")\n'
    )
    (package / "lora" / "two.py").write_text("X = '--shared'\n")
    table = LazyTable({"one": "methods.one:A", "uno": "methods.one:A", "far": "elsewhere:B"})
    found = read_catalogue(table, package)
    (method,) = found.methods
    assert (method.names, method.summary) == (("one", "uno"), "First line.")
    assert found.flags_of("UNO") == {"--a-b", "--c_d", "--shared"}
    assert found.flags_of("far") is None and found.owners == {"--a-b": "one", "--c_d": "one"}
    assert found.flags == {"--a-b", "--c_d", "--shared"}


# --- what --help says -----------------------------------------------------------------------------


def helped(method: str | None) -> tuple[Parser, str]:
    add = WRAPPERS[method].add_arguments if method else lambda parser: None
    parser = build_parser(add)
    return parser, parser.format_help()


@pytest.mark.parametrize("method", [None, *WRAPPERS])
def test_every_flag_has_a_help_text_and_shows_its_default(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    parser, text = helped(method)
    assert re.match(r"usage: python main\.py .*\[flags\]\n\n", text)
    text = re.sub(r"\n {34}", " ", text)  # what is said of a long flag begins in the next line
    for action in parser._actions:
        (line,) = re.findall(rf"^  {', '.join(action.option_strings)}(?: .*)?$", text, re.M)
        assert action.help, line
        if action.default in (None, argparse.SUPPRESS) or "no effect" in line:
            continue
        if is_switch(action):
            assert f"(default: {'on' if action.default else 'off'})" in line
        elif action.default != "":
            (shown,) = re.findall(r"\(default: (.*?)\)", line)
            same = float(shown) if isinstance(action.default, float) else shown
            assert same in (action.default, str(action.default)), line


def test_groups_come_in_the_order_in_which_they_are_needed():
    titles = [group.title for group in helped("blob")[0]._action_groups if group._group_actions]
    assert titles == [
        *("options", "what to run", "length and optimizer", "BLoB", "LoRA and base model"),
        *("evaluation and draws", "data", "run folder and resume", "tracking", "protocol"),
        COMPATIBILITY,
    ]


def test_spellings_for_existing_command_lines_come_last():
    text = helped("tfb")[1]
    last = text[text.index(COMPATIBILITY) :]
    spellings = [*map(spelling, WITHOUT_EFFECT), "--nowand", "--load-in-8bit", "--bayes-kllr"]
    for flag in (*spellings, "--bayes-klreweighting"):
        assert re.search(rf"^  {flag}\b", last, re.M) and text.count(f"  {flag} ") == 1
    assert "no effect" not in text[: text.index(COMPATIBILITY)]


def test_a_help_text_of_ones_own_may_use_what_argparse_offers():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--a", default="5%", help="a share")
    parser.add_argument("--b", default=3, help="100%% of %(default)s")
    text = parser.format_help()
    assert "a share (default: 5%)\n" in text and "100% of 3\n" in text


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--max_train_steps 3", "max_train_steps", 3),
        ("--max_train_steps=3", "max_train_steps", 3),
        ("--max-train_steps 3", "max_train_steps", 3),
        ("--is-s2s", "is_s2s", True),
        ("--held-out 0.3", "held_out", 0.3),
        ("--held-out-fraction 0.3", "held_out", 0.3),
        ("--held_out_fraction 0.3", "held_out", 0.3),
        ("--wandb-name=a_b --nowand", "wandb_name", "a_b"),
        ("--log-path a_b", "log_path", "a_b"),
    ],
)
def test_dashes_and_underscores_are_the_same_in_a_flag_and_not_in_a_value(flags, name, value):
    assert getattr(main.parse_args([*BASE, *flags.split()]), name) == value


def test_a_method_may_declare_underscores(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from modelwrappers import MAP\nclass Mine(MAP):\n    @classmethod\n"
        "    def add_arguments(cls, parser):\n"
        "        parser.add_argument('--my_flag', type=int, default=1)\n"
    )
    flags = [*BASE[:-1], f"{tmp_path}/mine.py:Mine"]
    assert main.parse_args([*flags, "--my_flag", "2"]).my_flag == 2
    assert main.parse_args([*flags, "--my-flag", "3"]).my_flag == 3
    with pytest.raises(UsageError, match="did you mean '--my_flag'"):
        main.parse_args([*flags, "--my_flog", "3"])
    with pytest.raises(UsageError, match="--ensemble-n is a flag of --modelwrapper deepensemble"):
        main.parse_args([*flags, "--ensemble-n", "3"])


@pytest.mark.parametrize("names", [("--prior-std", "--kl-lr"), ("--bayes-beta", "--bayes-kllr")])
def test_blob_has_two_names_for_prior_and_rate_and_keeps_one_in_args_json(names):
    flags = [word for pair in zip(names, ("0.3", "0.01"), strict=True) for word in pair]
    args = main.parse_args([*BASE[:-1], "blob", *flags])
    assert (args.bayes_beta, args.bayes_kllr) == (0.3, 0.01)
    assert {"bayes_beta", "bayes_kllr"} <= args.given.keys()
    assert not {"prior_std", "kl_lr"} & args.as_dict().keys()


def test_a_call_in_python_takes_every_name_of_a_flag():
    parser = build_parser(BLoB.add_arguments)
    args = parser.settings({"prior_std": 0.3, "bayes_kllr": 0.1, "held_out_fraction": 0.4}, {}, "x")
    assert (args.bayes_beta, args.bayes_kllr, args.held_out) == (0.3, 0.1, 0.4)
    with pytest.raises(UsageError, match="another name of a flag that is given already"):
        parser.settings({"prior_std": 0.3, "bayes_beta": 0.3}, {}, "x")
    with pytest.raises(UsageError, match="unknown flag 'prior_sd'; did you mean 'prior_std'"):
        parser.settings({"prior_sd": 0.3}, {}, "x")


@pytest.mark.parametrize(
    ("method", "flag", "words"),
    [
        ("mle", "--learning-rate", "did you mean '--lr'?"),
        ("mle", "--epochs", "did you mean '--n-epochs'?"),
        ("mle", "--lora_rank", "did you mean '--lora-r'?"),
        ("mle", "--bayes-klr", "did you mean '--bayes-kllr' of --modelwrapper blob?"),
        ("mle", "--kl_lr", "--kl-lr is a flag of --modelwrapper blob"),
        ("blob", "--laplace-rank", "--laplace-rank is a flag of --modelwrapper laplace"),
        ("mle", "--flipout", "--flipout is a flag of --modelwrapper blob"),
        ("mle", "--iter", "--iter is a flag of --modelwrapper tfb"),
        ("blob", "--qqqqqqqqqqq", "unknown flag '--qqqqqqqqqqq'. `python main.py --help`"),
    ],
)
def test_suggestions_come_from_every_method(method, flag, words):
    with pytest.raises(UsageError) as caught:
        main.parse_args([*BASE[:-1], method, flag, "1"])
    assert words in str(caught.value)


def test_synonyms_are_of_flags_that_there_are_and_are_none_themselves():
    known = modelwrappers.catalogue().flags | set(build_parser(lambda parser: None).flags)
    assert {f"--{name}" for name in SYNONYMS} <= known
    assert not {f"--{said}" for spellings in SYNONYMS.values() for said in spellings} & known


def test_objects_that_a_process_has_made_can_still_be_freed(tmp_path):
    """The start leaves the libraries' objects alone, never those of whoever calls later."""
    code = (
        "import gc, torch, main\n"
        "main.run(['--modelwrapper', 'blob', '--help-me'])\n"
        "with main.first_imports(): pass\n"
        "print(gc.get_freeze_count(), gc.isenabled())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.stdout.split()[-2:] == ["0", "True"], result.stdout + result.stderr
