"""Every script is valid bash; every command that a dry run prints is one that main.py parses."""

import os
import shlex
import subprocess

import pytest
from conftest import ROOT

import main

SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
SWEEPS = [script for script in SCRIPTS if script.parent.name != "scripts"]


def dry_run(script, **environment) -> list[list[str]]:
    """The commands, each without what stands before main.py's flags."""
    result = subprocess.run(
        ["bash", str(script)],
        env=os.environ | {"DRY_RUN": "1", "PYTHON_BIN": "python"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    return [command[command.index("main.py") + 1 :] for command in commands]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SWEEPS, ids=lambda s: s.name)
def test_every_printed_command_parses(script):
    commands = dry_run(script, SEEDS="1 2")
    assert len(commands) >= 10
    for command in commands:
        args = main.parse_args(command)
        assert args.resume and args.seed in (1, 2)
        assert args.modelwrapper == script.parent.name
    folders = {str(main.run_folder_path(main.parse_args(command))) for command in commands}
    assert len(folders) == len(commands), "no run overwrites another"


def test_the_published_settings_of_blob():
    llama = main.parse_args(dry_run(ROOT / "scripts/blob/blob-llama-all.sh")[0])
    assert (llama.model, llama.quantization) == ("meta-llama/Llama-2-7b-hf", "8bit")
    assert (llama.lr, llama.batch_size, llama.max_train_steps) == (1e-4, 4, 5000)
    assert (llama.bayes_kllr, llama.bayes_beta, llama.bayes_gamma) == (0.01, 0.2, 8)
    assert llama.bayes_klreweighting and llama.bayes_datasetrescaling and llama.apply_classhead_lora
    roberta = main.parse_args(dry_run(ROOT / "scripts/blob/blob-roberta-all.sh")[0])
    assert (roberta.lr, roberta.batch_size, roberta.lora_alpha) == (5e-4, 32, 8)
    assert roberta.bayes_kllr == 0.002
    mean = main.parse_args(dry_run(ROOT / "scripts/blob/blob-mean-llama-all-single-gpu.sh")[0])
    assert mean.bayes_inference_notsample


def test_the_environment_overrides():
    commands = dry_run(
        ROOT / "scripts/map/map-llama-all.sh",
        MODEL="smollm2-135m",
        DATASETS="bbc_headlines",
        SEEDS="7",
        QUANTIZATION="none",
        DATA_DIR="rows",
        STEPS="3",
        EXTRA="--nowand --lr 0.5",
    )
    (args,) = map(main.parse_args, commands)
    assert (args.model, args.dataset, args.seed) == ("smollm2-135m", "bbc_headlines", 7)
    assert (args.quantization, args.data_dir, args.max_train_steps) == (
        "none",
        "rows/bbc_headlines",
        3,
    )
    assert (args.tracker, args.lr) == ("none", 0.5)


def test_several_processes_are_launched_by_accelerate():
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/map/map-llama-all.sh")],
        env=os.environ | {"DRY_RUN": "1", "NUM_PROCESSES": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "accelerate.commands.launch --num_processes 4 main.py" in result.stdout
    assert "--gpu_ids" not in result.stdout and "--main_process_port" not in result.stdout


def test_the_shifted_runs_load_what_the_first_runs_save():
    commands = dry_run(ROOT / "scripts/blob/blob-llama-ood-all.sh", SEEDS="1")
    first, *others = [main.parse_args(command) for command in commands]
    assert first.dataset == "obqa" and first.checkpoint
    assert [other.dataset for other in others] == [
        "ARC-Challenge",
        "ARC-Easy",
        "MMLU-chem",
        "MMLU-phy",
    ]
    for other in others:
        assert other.load_lora_path == str(main.run_folder_path(first))
        assert other.max_train_steps == 0


@pytest.mark.parametrize("name", ["quickstart.sh", "compare.sh"])
def test_comparisons_end_with_the_report(name):
    last = (ROOT / "scripts" / name).read_text().rpartition('"$PYTHON_BIN"')[2]
    assert last.lstrip().startswith("scripts/report.py")
