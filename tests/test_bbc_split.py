"""--bbc-split: runs of before repeated bodies were left out of training are not mixed up."""

import json

import pytest
from conftest import run_folder

import main
from utils.errors import UsageError
from utils.files import write_json
from utils.run_records import read_run_record


@pytest.fixture
def old(classifier_flags):
    """(flags, folder) of a run on the whole corpus whose args.json is older than --bbc-split."""
    at = classifier_flags.index("--data-dir")
    flags = [*classifier_flags[:at], *classifier_flags[at + 2 :], "--modelwrapper", "map"]
    flags += ["--max-train-steps", "1", "--limit-eval", "9", "--max-seq-len", "16"]
    main.main([*flags, "--bbc-split", "1", "--hold-out"])
    folder = run_folder(flags)
    stored = json.loads((folder / "args.json").read_text())
    for part in ("args", "given"):
        stored[part].pop("bbc_split")
    write_json(folder / "args.json", stored)
    return flags, folder


def test_a_run_of_before_the_flag_is_one_of_the_first_division(old):
    flags, folder = old
    later = [*flags, "--max-train-steps", "0", "--load-lora-path", str(folder)]
    later += ["--log-path", "later"]
    assert main.parse_args([*later, "--temperature-scaling"]).bbc_split == 1
    with pytest.raises(UsageError, match=r"--bbc-split: other rows than those that the adapter"):
        main.parse_args([*later, "--temperature-scaling", "--bbc-split", "2"])
    assert main.parse_args(["--config", str(folder / "args.json")]).bbc_split == 1
    with pytest.raises(UsageError, match=r"--bbc-split is 2, the stored run has 1"):
        main.main([*flags, "--hold-out"])
    assert main.main([*flags, "--hold-out", "--bbc-split", "1"]), "that run is kept as it is"


def test_the_division_says_which_rows_are_trained_on(old):
    flags, _ = old
    sizes = {}
    for version in ("1", "2"):
        args = main.parse_args([*flags, "--bbc-split", version])
        data = main.build_dataset(args, main.build_accelerator(args))
        sizes[version] = data.num_samples, data.test_rows
    assert (sizes["1"][0], sizes["2"][0]) == (1596, 1564) and sizes["1"][1] == sizes["2"][1]


@pytest.mark.parametrize(
    ("flags", "version"),
    [
        ({"dataset": "bbc_headlines"}, 1),
        ({"dataset": "BBC_bodies"}, 1),
        ({"dataset": "bbc_headlines", "bbc_split": 2}, 2),
        ({"dataset": "bbc_headlines", "data_dir": "mine"}, None),
        ({"dataset": "rte"}, None),
    ],
)
def test_only_runs_on_the_corpus_have_a_division(flags, version, tmp_path):
    write_json(tmp_path / "args.json", {"args": flags})
    assert read_run_record(tmp_path / "args.json", "test").args.get("bbc_split") == version
