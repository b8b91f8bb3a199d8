"""Every script is valid bash; every command that a dry run prints is one that main.py parses."""

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import main
from dataset import DATASETS

SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
SWEEPS = [script for script in SCRIPTS if script.parent.name != "scripts"]
POST_HOC = [script for script in SWEEPS if "post_hoc" in script.read_text()]
SLURM = ROOT / "scripts/slurm/sweep.sbatch"
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


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


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM], ids=lambda s: s.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SWEEPS, ids=lambda s: s.name)
def test_every_printed_command_parses(script):
    commands = dry_run(script, SEEDS="1 2")
    assert len(commands) >= 2
    for command in commands:
        args = main.parse_args(command)
        assert args.resume and args.seed in (1, 2)
        assert args.modelwrapper == script.parent.name
    folders = {str(main.run_folder_path(main.parse_args(command))) for command in commands}
    assert len(folders) == len(commands), "no run overwrites another"


def test_no_script_takes_another_ones_run_for_its_own():
    """One folder is one command line, over all scripts."""
    commands = {}
    for script in SWEEPS:
        for command in dry_run(script, SEEDS="1"):
            folder = main.run_folder_path(main.parse_args(command))
            assert commands.setdefault(folder, command) == command, script


@pytest.mark.parametrize(
    ("name", "processes", "updates", "rows"),
    [
        *(("map-llama-all", "1", 5000, 4), ("map-llama-all", "2", 2500, 8)),
        *(("map-roberta-all", "4", 1250, 128), ("blob-roberta-all", "3", 1667, 96)),
    ],
)
def test_more_processes_make_larger_updates_not_more_rows(name, processes, updates, rows):
    script = ROOT / f"scripts/{name.split('-')[0]}/{name}.sh"
    args = main.parse_args(dry_run(script, SEEDS="1", NUM_PROCESSES=processes)[0])
    assert args.max_train_steps == updates
    assert args.batch_size * int(processes) == rows


def test_a_run_has_one_process_however_many_gpus_there_are():
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/map/map-llama-all.sh")],
        env=os.environ | {"DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "3,5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "accelerate" not in result.stdout and "main.py" in result.stdout


@pytest.mark.parametrize("number", ["0", "-1", "two", "1 2"])
def test_a_number_of_processes_that_is_none_is_refused(number):
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/map/map-llama-all.sh")],
        env=os.environ | {"DRY_RUN": "1", "NUM_PROCESSES": number},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "NUM_PROCESSES is" in result.stderr


def test_a_task_from_a_users_file_gives_its_name_to_the_run():
    flags = {"DATASETS": "my/tasks.py:MINE", "SEEDS": "1"}
    (first,) = dry_run(ROOT / "scripts/map/map-llama-all.sh", **flags)
    assert first[first.index("--log-path") + 1] == "map-MINE-seed1"


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
        "rows",
        3,
    )
    assert (args.tracker, args.lr) == ("none", 0.5)


def test_several_processes_are_launched_by_accelerate():
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/map/map-llama-all.sh")],
        env=os.environ | {"DRY_RUN": "1", "NUM_PROCESSES": "4", "LAUNCH_CONFIG": "my fsdp.yaml"},
        capture_output=True,
        text=True,
        check=True,
    )
    launch = r"accelerate.commands.launch --config_file my\ fsdp.yaml --num_processes 4 main.py"
    assert launch in result.stdout
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


@pytest.mark.parametrize("script", POST_HOC, ids=lambda s: s.name)
def test_post_hoc_scripts_load_what_their_base_has_saved(script):
    method, base = re.search(r"_post_hoc (\w+) (\w+)", script.read_text()).groups()
    first = ROOT / "scripts" / base / script.name.replace(method, base)
    saved = {str(main.run_folder_path(main.parse_args(c))) for c in dry_run(first)}
    for command in dry_run(script):
        assert command[command.index("--load-lora-path") + 1] in saved


def test_the_shifted_runs_of_a_post_hoc_method_are_blocks_of_one_run():
    (args,) = map(main.parse_args, dry_run(ROOT / "scripts/tfb/tfb-llama-ood-all.sh", SEEDS="1"))
    assert args.dataset == "obqa"
    assert args.ood_datasets == ["ARC-Challenge", "ARC-Easy", "MMLU-chem", "MMLU-phy"]


# --- launching ------------------------------------------------------------------------------------


def array_task(task: int, script: str) -> subprocess.CompletedProcess:
    environment = {"DRY_RUN": "1", "PYTHON_BIN": "python", "SLURM_ARRAY_TASK_ID": str(task)}
    return subprocess.run(
        ["bash", str(SLURM), script],
        env=os.environ | environment | {"DATASETS": "obqa boolq", "SEEDS": "1 2"},
        capture_output=True,
        text=True,
    )


def test_an_array_task_is_one_run_of_the_sweep():
    script = "scripts/blob/blob-llama-all.sh"
    tasks = [array_task(task, script) for task in range(5)]
    lines = [task.stdout.split(" main.py ")[1].strip() for task in tasks[:4]]
    commands = dry_run(ROOT / script, DATASETS="obqa boolq", SEEDS="1 2")
    assert [shlex.split(line) for line in lines] == commands
    assert tasks[4].returncode == 2 and "--array goes from 0 to 3" in tasks[4].stderr


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_a_launch_configuration_is_one_that_accelerate_takes(file):
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.gpu_ids is None and config.main_process_port is None
    assert config.main_process_ip is None and config.mixed_precision == "no"
    text = file.read_text()
    assert text.startswith("#") and f"--config_file configs/accelerate/{file.name}" in text
    flags = ["--config_file", str(file), "--num_processes", "2", "main.py", "--modelwrapper", "map"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(flags))
    assert args.use_fsdp == (file.stem == "fsdp")
    assert args.multi_gpu == (file.stem in ("ddp", "several_machines"))


def test_the_list_of_tasks_renders_every_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tasks.py"])
    runpy.run_path(str(ROOT / "scripts/tasks.py"), run_name="__main__")
    output = capsys.readouterr().out
    for kind, cls in DATASETS.items():
        for name in cls.tasks:
            assert f"## {name} ({kind})\n" in output
    assert "A) a planet\nB) a moon\nC) a comet\nD) a star\nAnswer: D\n" in output


@pytest.mark.parametrize("name", ["quickstart.sh", "compare.sh"])
def test_comparisons_end_with_the_report(name):
    last = (ROOT / "scripts" / name).read_text().rpartition('"$PYTHON_BIN"')[2]
    assert last.lstrip().startswith("scripts/report.py")
