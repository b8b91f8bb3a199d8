"""Flags: defaults, checks, messages."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from main import parse_args
from utils.errors import UsageError
from utils.program import exhausted

BASE = ["--dataset-type", "mcdataset", "--dataset", "obqa", "--model", "m", "--modelwrapper", "mle"]


def message(*flags, base=BASE) -> str:
    with pytest.raises(UsageError) as error:
        parse_args([*base, *flags])
    return str(error.value)


def test_defaults_are_those_of_the_method_family():
    args = parse_args(BASE)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 16, 0)
    assert (args.max_seq_len, args.lr, args.adam_epsilon, args.opt_wd) == (300, 1e-4, 1e-6, 0)
    assert (args.eval_per_steps, args.num_bins, args.seed) == (500, 15, 1)
    assert (args.bayes_train_n_samples, args.bayes_eval_n_samples_final) == (1, 10)
    assert args.model_type == "causallm" and args.tracker == "wandb" and args.quantization == "none"


def test_a_command_line_of_the_original_parses():
    args = parse_args(
        [
            "--dataset-type",
            "bertds",
            "--dataset",
            "rte",
            "--model-type",
            "seqcls",
            "--model",
            "roberta-base",
            "--modelwrapper",
            "mle",
            "--lr",
            "5e-4",
            "--batch-size",
            "32",
            "--opt",
            "adamw",
            "--warmup-ratio",
            "0.06",
            "--max-seq-len",
            "256",
            "--seed",
            "3",
            "--evaluate",
            "--wandb-name",
            "x",
            "--wandb-project",
            "MAP-roberta-all",
            "--apply-classhead-lora",
            "--lora-r",
            "8",
            "--lora-alpha",
            "8",
            "--lora-dropout",
            "0",
            "--log-path",
            "x",
            "--max-train-steps",
            "5000",
            "--eval-per-steps",
            "6000",
            "--opt-wd",
            "0.00001",
            "--testing_set",
            "val",
            "--load-lora-huggingface-repo",
            "None",
            "--checkpoint",
            "--checkpoint-name",
            "n",
            "--add-space",
            "--use-slow-tokenizer",
            "--is_s2s",
            "--pad-to-max-length",
            "--eval-steps",
            "0",
            "--num-bins",
            "15",
        ]
    )
    assert args.opt_wd == 1e-5 and args.apply_classhead_lora and args.checkpoint
    assert args.load_lora_huggingface_repo is None


# The spellings that existing command lines use, each with what it has to come to.
SHARED = {
    "--max-seq-len 128": {"max_seq_len": 128},
    "--model-type causallm": {"model_type": "causallm"},
    "--load-in-8bit": {"quantization": "8bit"},
    "--load-in-8bit True": {"quantization": "8bit"},
    "--load-in-8bit False": {"quantization": "none"},
    "--loss nll": {"loss": "nll"},
    "--n-epochs 3": {"n_epochs": 3},
    "--max-train-steps 7": {"max_train_steps": 7},
    "--eval-per-steps 6000": {"eval_per_steps": 6000},
    "--eval-steps 0": {"eval_steps": 0},
    "--early-stop-steps 5": {"early_stop_steps": 5},
    "--batch-size 2": {"batch_size": 2},
    "--lr 5e-4": {"lr": 5e-4},
    "--opt adamw": {"opt": "adamw"},
    "--opt-wd 0.01": {"opt_wd": 0.01},
    "--adam-epsilon 1e-8": {"adam_epsilon": 1e-8},
    "--warmup-ratio 0.06": {"warmup_ratio": 0.06},
    "--use-slow-tokenizer": {"use_slow_tokenizer": True},
    "--add-space": {},
    "--is_s2s": {},
    "--pad-to-max-length": {"pad_to_max_length": True},
    "--num-bins 20": {"num_bins": 20},
    "--bayes-train-n-samples 2": {"bayes_train_n_samples": 2},
    "--bayes-eval-n-samples 3": {"bayes_eval_n_samples": 3},
    "--bayes-eval-n-samples-final 4": {"bayes_eval_n_samples_final": 4},
    "--bayes-inference-notsample": {"bayes_inference_notsample": True},
    "--lora-r 4": {"lora_r": 4},
    "--lora-alpha 32": {"lora_alpha": 32},
    "--lora-dropout 0.1": {"lora_dropout": 0.1},
    "--apply-classhead-lora": {"apply_classhead_lora": True},
    "--apply-qkv-head-lora": {"apply_qkv_head_lora": True},
    "--load-model-path weights": {"load_model_path": "weights"},
    "--load-lora-path run": {"load_lora_path": "run"},
    "--load-lora-huggingface-repo a/b --load-lora-path run": {"load_lora_huggingface_repo": "a/b"},
    "--log-path x": {"log_path": "x"},
    "--testing-set val": {"testing_set": "val"},
    "--testing_set test": {"testing_set": "test"},
    "--testing-set train_val": {"testing_set": "train_val"},
    "--testing-set train_train_val": {"testing_set": "train_train_val"},
    "--testing-set train_val_val": {"testing_set": "train_val_val"},
    "--ood-ori-dataset ARC-Easy": {"ood_ori_dataset": "ARC-Easy"},
    "--anchor-size 100": {"anchor_size": 100},
    "--seed 3": {"seed": 3},
    "--evaluate": {},
    "--checkpoint --checkpoint-name n": {"checkpoint": True, "checkpoint_name": "n"},
    "--nowand": {"tracker": "none"},
    "--wandb-entity e --wandb-project p --wandb-name n": {"tracker": "wandb", "wandb_entity": "e"},
    "--resume": {"resume": True},
    "--quantization 4bit": {"quantization": "4bit"},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--device cpu": {"device": "cpu"},
    "--data-dir rows": {"data_dir": "rows"},
    "--tracker tensorboard": {"tracker": "tensorboard"},
    "--grad-accum-steps 2": {"grad_accum_steps": 2},
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--eval-batch-size 8": {"eval_batch_size": 8},
    "--limit-train 10 --limit-eval 20": {"limit_train": 10, "limit_eval": 20},
    "--protocol original": {"append_eos": True, "whole_epochs": True},
    "--seed-data 4 --seed-sampling 5": {"seed_data": 4, "seed_sampling": 5},
}
BLOB = {
    "--bayes-eps 0.1": {"bayes_eps": 0.1},
    "--bayes-gamma 4": {"bayes_gamma": 4},
    "--bayes-kllr 0.01": {"bayes_kllr": 0.01},
    "--bayes-beta 0.3": {"bayes_beta": 0.3},
    "--bayes-klreweighting": {"bayes_klreweighting": True},
    "--bayes-datasetrescaling": {"bayes_datasetrescaling": True},
    "--bayes-final-beta 0.18": {},
    "--bayes-flipout": {},
}
TFB = {
    "--th 0.01": {"th": 0.01},
    "--iter 3": {"iter": 3},
    "--bayes-beta 0.02": {"bayes_beta": 0.02},
    **{f: {} for f in ("--bayes-eps 0.05", "--bayes-gamma 8", "--bayes-kllr 0.01")},
    **{f: {} for f in ("--bayes-klreweighting", "--bayes-datasetrescaling")},
    **{f: {} for f in ("--bayes-final-beta 0.18", "--bayes-flipout")},
}
OF_METHOD = {
    "mle": {},
    "map": {},
    "mcdropout": {},
    "deepensemble": {"--ensemble-n 5": {"ensemble_n": 5}},
    "blob": BLOB,
    "tfb": TFB,
    "tfblora": TFB,
    "tfblora_acc": TFB | {"--iter 5": {"tfb_criterion": "flips", "th": 0.01}},
}


@pytest.mark.parametrize("method", OF_METHOD)
def test_every_flag_of_existing_command_lines_parses_and_arrives(method):
    base = [*BASE[:-1], method]
    needed = ["--load-lora-path", "adapter"] if "tfb" in method else []
    for text, expected in (SHARED | OF_METHOD[method]).items():
        args = parse_args([*base, *needed, *text.split()])
        trains = "tfb" not in method
        for name, value in expected.items():
            if name in ("n_epochs", "max_train_steps") and not trains:
                value = 0  # it says so: tests/test_tfb.py
            assert getattr(args, name) == value, text


@pytest.mark.parametrize("flag", ["--evaluate", "--add-space", "--is_s2s"])
def test_a_flag_without_effect_says_so_once(flag, monkeypatch):
    said = []
    monkeypatch.setattr("utils.logging._told", set())
    monkeypatch.setattr("utils.logging.logger", SimpleNamespace(info=said.append))
    for _ in range(2):
        parse_args([*BASE, flag])
    assert len(said) == 1 and said[0].startswith(f"{flag} has no effect: ")


def test_map_has_weight_decay_and_mle_has_none():
    assert parse_args([*BASE[:-1], "map"]).opt_wd == 1e-5
    assert parse_args(BASE).opt_wd == 0


@pytest.mark.parametrize(
    ("text", "value"), [("--load-in-8bit", "8bit"), ("--load-in-8bit False", "none")]
)
def test_booleans_are_real_booleans(text, value):
    assert parse_args([*BASE, *text.split()]).quantization == value


def test_seeds_of_data_and_sampling_follow_the_seed():
    args = parse_args([*BASE, "--seed", "7", "--seed-data", "9"])
    assert (args.seed_data, args.seed_sampling) == (9, 7)


def test_args_are_read_only():
    with pytest.raises(AttributeError, match="read-only"):
        parse_args(BASE).lr = 1


def test_unknown_flag_suggests_the_nearest():
    assert "did you mean '--max-train-steps'" in message("--max-train-step", "3")


def test_unknown_method_suggests_the_nearest():
    assert "did you mean 'mle'" in message(base=[*BASE[:-1], "mlee"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n-epochs 1 --max-train-steps 3", ["--n-epochs 1", "--max-train-steps 3"]),
        ("--batch-size 0", ["--batch-size", "at least 1", "'0'"]),
        ("--batch-size -4", ["--batch-size"]),
        ("--lr -1", ["--lr", "greater than 0"]),
        ("--lr nan", ["--lr", "greater than 0"]),
        ("--lora-r 0", ["--lora-r", "at least 1"]),
        ("--max-seq-len 0", ["--max-seq-len"]),
        ("--seed 4294967296", ["--seed", "2^32"]),
        ("--max-train-steps -1", ["--max-train-steps", "at least 0"]),
        ("--warmup-ratio 1.5", ["--warmup-ratio", "between 0 and 1"]),
        ("--model-type seqcls", ["mcdataset", "seqcls", "causallm"]),
        ("--load-in-8bit --quantization 4bit", ["--load-in-8bit", "--quantization 4bit"]),
        ("--load-in-8bit perhaps", ["perhaps", "not a boolean"]),
        ("--nowand --tracker wandb", ["--nowand", "--tracker wandb"]),
        ("--apply-classhead-lora --apply-qkv-head-lora", ["--apply-classhead-lora"]),
        ("--load-lora-huggingface-repo a/b", ["--load-lora-path"]),
        ("--resume --overwrite", ["--resume", "--overwrite"]),
        ("--config /nowhere.json", ["/nowhere.json"]),
        ("stray", ["stray"]),
    ],
)
def test_bad_flags_get_a_message_with_value_and_rule(flags, words):
    text = message(*flags.split())
    for word in words:
        assert word in text


@pytest.mark.parametrize("missing", ["--dataset-type", "--dataset", "--model", "--modelwrapper"])
def test_missing_flags_are_named(missing):
    position = BASE.index(missing)
    assert f"{missing} is missing" in message(base=BASE[:position] + BASE[position + 2 :])


def test_config_gives_defaults_that_flags_override(tmp_path):
    file = tmp_path / "args.json"
    stored = parse_args([*BASE, "--lr", "3e-3", "--checkpoint", "--target-modules", "a", "b"])
    file.write_text(json.dumps({"args": stored.as_dict(), "given": stored.given}))
    args = parse_args(["--config", str(file), "--seed", "5", "--load-in-8bit"])
    assert (args.lr, args.seed, args.dataset, args.checkpoint) == (3e-3, 5, "obqa", True)
    assert args.target_modules == ["a", "b"]
    assert (args.seed_data, args.quantization) == (5, "8bit"), "derived from the new flags"


def test_config_repeats_the_run_not_the_call():
    given = parse_args([*BASE, "--overwrite", "--lr", "1e-3"]).given
    assert "overwrite" not in given and given["lr"] == 1e-3


def test_stored_flags_pass_the_same_checks(tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"given": parse_args(BASE).given | {"lr": -1}}))
    with pytest.raises(UsageError, match="greater than 0"):
        parse_args(["--config", str(file)])


def test_a_methods_name_may_be_written_in_capitals():
    assert parse_args([*BASE[:-1], "MAP"]).opt_wd == 1e-5


def test_config_with_an_unknown_flag_is_an_error(tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"args": {"modelwrapper": "mle", "learning_rat": 1}}))
    with pytest.raises(UsageError, match="learning_rat"):
        parse_args(["--config", str(file)])


# --- what a run on an adapter takes from the run that trained it ----------------------------------


@pytest.fixture
def trained(tmp_path):
    def store(*flags):
        args = parse_args([*BASE, *flags])
        content = {"args": args.as_dict(), "given": args.given}
        (tmp_path / "args.json").write_text(json.dumps(content))
        return ["--load-lora-path", str(tmp_path), "--modelwrapper", "mle"]

    return store


def test_what_is_given_wins_also_at_its_default(trained):
    few = trained("--max-seq-len", "96", "--load-in-8bit", "--load-model-path", "weights")
    assert parse_args(few).max_seq_len == 96
    assert parse_args([*few, "--max-seq-len", "300"]).max_seq_len == 300
    assert parse_args([*few, "--quantization", "4bit"]).quantization == "4bit"
    assert parse_args(few).load_model_path == "weights"
    assert parse_args([*few, "--model", "other"]).load_model_path is None


def test_local_rows_of_another_data_set_are_not_taken_over(trained):
    few = trained("--data-dir", "rows/obqa")
    assert parse_args(few).data_dir == "rows/obqa"
    assert parse_args([*few, "--dataset", "ARC-Easy"]).data_dir is None


def test_the_protocol_of_the_adapter_is_taken_over(trained):
    args = parse_args(trained("--protocol", "original"))
    assert (args.protocol, args.boolq_tokens, args.append_eos) == ("original", "swapped", True)


def test_temperature_needs_rows_that_were_held_out(trained):
    with pytest.raises(UsageError, match="rows that were not trained on"):
        parse_args([*trained(), "--temperature-scaling"])
    assert parse_args([*trained("--temperature-scaling"), "--temperature-scaling"])
    assert "pass one of them" in message("--temperature-scaling", "--testing-set", "train_val")


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("blob", "--bayes-beta 1e-200"),
        ("blob", "--bayes-beta 1e30"),
        ("blob", "--bayes-eps 0"),
        ("blob", "--bayes-kllr 1e30"),
        ("blob", "--bayes-gamma 1e-3"),
        ("deepensemble", "--ensemble-n 1000000000"),
        ("laplace", "--laplace-prior-precision 1e300"),
        ("tfb", "--iter 1000000"),
    ],
)
def test_bounds_of_a_methods_flags_name_the_flag(method, flags):
    base = [*BASE[:-1], method]
    assert flags.split()[0] in message(*flags.split(), base=base)


def test_a_run_that_the_kl_has_blown_up_blames_its_learning_rate(causal_flags):
    """A large step on the KL, with a learning rate of the NLL that is none."""
    import main
    from utils.errors import RunError

    flags = [*causal_flags, "--modelwrapper", "blob", "--max-train-steps", "40", "--lr", "1e-6"]
    with pytest.raises(RunError, match=r"--lr, --bayes-kllr"):
        main.main([*flags, "--bayes-kllr", "1000", "--bayes-beta", "1e-3"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "this machine's memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine's memory"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the GPU's memory"),
    ],
    ids=["python", "cpu", "disk", "gpu"],
)
def test_what_was_exhausted_is_named(error, words, monkeypatch):
    import main

    def fails(argv):
        raise error

    monkeypatch.setattr(main, "main", fails)
    assert main.run([]) == 1
    assert words in exhausted(error)


def test_another_error_keeps_its_traceback(monkeypatch):
    import main

    def fails(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "main", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main.run([])


def test_a_run_that_a_broken_pipe_ends_says_so():
    """In a process of its own: the rest of standard output is thrown away."""
    code = "from utils.program import run_program\n"
    code += "def main(): raise BrokenPipeError(32, 'Broken')\n"
    code += "raise SystemExit(run_program(main))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "RunError: whoever read" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
