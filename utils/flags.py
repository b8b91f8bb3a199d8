"""The flags that every method shares, in the groups and the order in which `--help` shows them."""

from __future__ import annotations

import argparse
from typing import Any

from utils.parser import (
    above,
    add_switch,
    add_without_effect,
    between,
    blocks,
    compatibility_group,
    count,
    draws,
    fraction,
    learning_rate,
    optional,
    positive_int,
    seed,
    template,
    text,
    whole,
)

# Flags of existing command lines that have nothing left to do here, and why.
WITHOUT_EFFECT = {
    "evaluate": "every run ends with an evaluation",
    "add_space": "answers are written as the tokenizer needs them, with or without a space",
    "is_s2s": "only decoder-only and encoder models are fine-tuned here",
    "lm_head": "--apply-classhead-lora adapts the head",
    "validation": "--testing-set says what is evaluated",
    "validation_perc": "--testing-set says what is evaluated",
    "evaluate_uncertainty": "predictions.safetensors keeps every draw",
    "evaluate_uncertainty_reduction": "predictions.safetensors keeps every draw",
}

# --protocol: what the published multiple-choice runs did, and what is done here. Every entry is a
# flag of its own; the preset fills in those that were not given.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "corrected": {
        "shuffle_train": True,
        "drop_last": False,
        "choice_format": "letter_first",
        "boolq_tokens": "matched",
        "append_eos": False,
        "ensemble_average": "probabilities",
        "whole_epochs": False,
    },
    "original": {
        "shuffle_train": False,
        "drop_last": True,
        "choice_format": "text_first",
        "boolq_tokens": "swapped",
        "append_eos": True,
        "ensemble_average": "logits",
        "whole_epochs": True,
    },
}


def spelling(name: str) -> str:
    """The flag of an attribute of `Args`."""
    return {"is_s2s": "--is_s2s", "held_out": "--held-out-fraction"}.get(
        name, f"--{name.replace('_', '-')}"
    )


def add_first_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run on what, and for how long."""
    run = parser.add_argument_group("what to run")
    run.add_argument("--modelwrapper", type=text, metavar="METHOD", help="a name, or FILE.py:CLASS")
    run.add_argument(
        "--model",
        type=text,
        metavar="NAME",
        help="hub id, local folder, smollm2-135m or minilm-l6 (both embedded); default: the loaded "
        "adapter's",
    )
    run.add_argument(
        *("--dataset", "--task"),
        type=text,
        metavar="NAME",
        help="a data set's name, a table's file, or FILE.py:NAME",
    )
    run.add_argument(
        "--dataset-type",
        choices=["mcdataset", "bertds"],
        help="mcdataset reads answers from a causal LM, bertds trains a classifier",
    )
    run.add_argument(
        "--load-lora-path",
        type=optional,
        metavar="RUN",
        help="an adapter to start from, or to evaluate: a run's folder",
    )
    run.add_argument("--config", type=text, metavar="FILE", help="a stored args.json to run again")
    run.add_argument("--seed", type=seed, default=1, help="seed of weights and all that follows")
    run.add_argument(
        "--seed-data", type=seed, help="seed of the training order (default: as --seed)"
    )
    run.add_argument(
        "--seed-sampling", type=seed, help="seed of the posterior's draws (default: as --seed)"
    )
    run.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any"
    )

    training = parser.add_argument_group("length and optimizer")
    training.add_argument(
        "--max-train-steps", type=count, default=0, help="optimizer updates, exactly"
    )
    training.add_argument("--n-epochs", type=count, default=0, help="passes over the data instead")
    training.add_argument(
        "--batch-size", type=positive_int, help="rows per process (default: 4; encoders 32)"
    )
    training.add_argument(
        "--grad-accum-steps", type=positive_int, default=1, help="batches per update"
    )
    training.add_argument("--lr", type=learning_rate, default=1e-4, help="learning rate")
    training.add_argument(
        "--opt", choices=["adamw", "adam", "sgd"], default="adamw", help="optimizer"
    )
    training.add_argument(
        "--opt-wd", type=between(0, 1_000), help="weight decay (default: 0; map and laplace 1e-5)"
    )
    training.add_argument(
        "--adam-epsilon", type=above(0, 1), default=1e-6, help="epsilon of Adam and AdamW"
    )
    training.add_argument(
        "--warmup-ratio", type=fraction, default=0.0, help="share of the updates that warm up"
    )
    training.add_argument(
        "--early-stop-steps",
        type=count,
        default=0,
        help="stop after this many updates of a longer schedule; 0: never",
    )
    add_switch(training, "--gradient-checkpointing", help="less memory for more time")
    training.add_argument("--loss", choices=["nll"], default="nll", help="what is minimised")


def add_other_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything else, from LoRA to compatibility."""
    _add_lora_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_data_arguments(parser)
    _add_folder_arguments(parser)
    _add_tracking_arguments(parser)
    _add_protocol_arguments(parser)
    _add_compatible_arguments(parser)


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    lora = parser.add_argument_group("LoRA and base model")
    lora.add_argument("--lora-r", type=whole(1, 16_384), help="rank (default: 8, or the adapter's)")
    lora.add_argument(
        "--lora-alpha", type=whole(1, 1_000_000), help="scale (default: 16, or the adapter's)"
    )
    lora.add_argument(
        "--lora-dropout",
        type=fraction,
        help="dropout before A (default: 0; mcdropout 0.1; or the adapter's)",
    )
    lora.add_argument(
        "--target-modules",
        nargs="+",
        metavar="LAYER",
        help="layers to adapt (default: by model)",
    )
    lora.add_argument(
        "--lora-layers",
        type=blocks,
        metavar="BLOCKS",
        help="blocks to adapt: all, last:K, or e.g. 0,4,20-29 (default: all, or the adapter's)",
    )
    add_switch(lora, "--apply-classhead-lora", help="adapt query, value and the output head")
    add_switch(lora, "--apply-qkv-head-lora", help="adapt query, key, value and the output head")
    lora.add_argument(
        "--load-lora-huggingface-repo",
        type=optional,
        metavar="REPO",
        help="hub repo that has --load-lora-path",
    )
    lora.add_argument(
        "--load-model-path", type=optional, metavar="FOLDER", help="base weights, if not --model's"
    )
    lora.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the base model",
    )
    lora.add_argument(
        "--quantization",
        choices=["none", "8bit", "4bit"],
        help="of the base model (default: none)",
    )
    add_switch(lora, "--trust-remote-code", help="run code that comes with a hub model")


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    evaluation = parser.add_argument_group("evaluation and draws")
    evaluation.add_argument(
        "--bayes-eval-n-samples-final", type=draws, default=10, help="draws at the end"
    )
    evaluation.add_argument(
        "--bayes-eval-n-samples", type=draws, default=1, help="draws of evaluations while training"
    )
    evaluation.add_argument(
        "--bayes-train-n-samples", type=draws, default=1, help="draws per training step"
    )
    add_switch(
        evaluation,
        "--draws-adaptive",
        help="at the end, draw for each row until it is settled, at most as many",
    )
    evaluation.add_argument(
        "--draws-tolerance",
        type=above(0, 1),
        default=0.05,
        help="settled: the answer's probability is known to within this",
    )
    evaluation.add_argument(
        "--draws-error-rate",
        type=above(0, 0.5),
        default=0.01,
        help="share of the rows that may get another answer than from all draws",
    )
    evaluation.add_argument(
        "--prefix-cache",
        choices=["auto", "on", "off"],
        default="auto",
        help="run the tokens that prompts share once per draw; auto: where it pays",
    )
    add_switch(evaluation, "--bayes-inference-notsample", help="predict with the posterior mean")
    add_switch(
        evaluation,
        "--temperature-scaling",
        help="also report a temperature fitted on held-out rows",
    )
    evaluation.add_argument(
        "--calibrate",
        choices=["no", "auto", "all", "half"],
        default="no",
        help="keep predictions of held-out rows, for sets and answers with a guarantee; half: of "
        "half of them, where the other half tunes; auto: as it must be",
    )
    evaluation.add_argument(
        "--testing-set",
        choices=["val", "test", "train_val", "train_train_val", "train_val_val"],
        default="val",
        help="what is evaluated; train_val: a held-out part of the training set",
    )
    evaluation.add_argument(
        "--ood-datasets",
        nargs="+",
        type=text,
        metavar="NAME",
        help="shifted data to evaluate the posterior on; NAME:noisy:K has errors in its text, of "
        "strength K from 1 to 5",
    )
    evaluation.add_argument(
        "--ood-ori-dataset",
        type=optional,
        metavar="NAME",
        help="the data set that a loaded adapter was trained on",
    )
    evaluation.add_argument(
        "--eval-per-steps", type=count, default=500, help="updates between evaluations; 0: none"
    )
    evaluation.add_argument(
        "--eval-steps", type=count, default=0, help="batches of those evaluations; 0: all"
    )
    evaluation.add_argument(
        "--eval-batch-size", type=positive_int, default=32, help="rows per forward, draws included"
    )
    evaluation.add_argument("--num-bins", type=whole(1, 10_000), default=15, help="bins of the ECE")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--text-column",
        nargs="+",
        type=text,
        metavar="COLUMN",
        help="of a table as --dataset: its text, one column or two",
    )
    data.add_argument(
        "--label-column", type=text, metavar="COLUMN", help="of a table: whose cells are classes"
    )
    data.add_argument(
        "--prompt",
        type=template,
        metavar="TEMPLATE",
        help="of a table's rows, with {column} for a cell (default: a plain one)",
    )
    data.add_argument(
        "--answer-words",
        nargs="+",
        type=text,
        metavar="WORD",
        help="one for each of a table's classes, in order (default: the classes)",
    )
    data.add_argument(
        "--val-file",
        type=text,
        metavar="FILE",
        help="table to evaluate (default: a fifth of the one in --dataset)",
    )
    data.add_argument(
        "--test-file", type=text, metavar="FILE", help="table that --testing-set test evaluates"
    )
    data.add_argument(
        "--data-dir",
        type=text,
        metavar="FOLDER",
        help="folder with train, validation or test files",
    )
    data.add_argument(
        "--bbc-split",
        type=whole(1, 2),
        help="division of the embedded corpus; 1: as before repeated bodies were left out of "
        "training (default: 2, or the adapter's)",
    )
    data.add_argument(
        "--max-seq-len", type=whole(1, 10_000_000), default=300, help="tokens of a row at most"
    )
    data.add_argument(
        "--num-shots",
        type=whole(0, 100),
        help="solved examples before every prompt (default: 0, or the adapter's)",
    )
    data.add_argument(
        "--limit-train", type=count, default=0, help="first training rows only; 0: all"
    )
    data.add_argument(
        "--limit-eval", type=count, default=0, help="first evaluated rows only; 0: all"
    )
    data.add_argument(
        "--limit-ood",
        type=count,
        help="first rows only of data sets other than the run's own (default: as --limit-eval)",
    )
    add_switch(
        data,
        "--hold-out",
        default=None,
        help="keep rows out of training (default: where something of the run needs them)",
    )
    data.add_argument(
        *("--held-out-fraction", "--held-out"),
        dest="held_out",
        type=fraction,
        default=0.2,
        help="how much of the training set",
    )
    data.add_argument("--seed-split", type=seed, default=0, help="seed of what is held out")
    data.add_argument(
        "--anchor-size",
        type=positive_int,
        default=500,
        help="rows for post-hoc methods, unlabelled",
    )
    add_switch(data, "--pad-to-max-length", help="pad every batch to --max-seq-len")
    add_switch(data, "--use-slow-tokenizer", help="the tokenizer's Python version")


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run folder and resume")
    run.add_argument(
        "--output-dir",
        type=text,
        default="checkpoints",
        metavar="FOLDER",
        help="root of all run folders",
    )
    run.add_argument(
        "--log-path", type=text, default="default", metavar="NAME", help="name of the run's folder"
    )
    run.add_argument(
        "--checkpoint-name",
        type=text,
        default="default",
        metavar="NAME",
        help="the same, before --log-path",
    )
    add_switch(run, "--checkpoint", default=True, help="save the adapter")
    run.add_argument(
        "--save-per-steps",
        type=count,
        default=500,
        help="updates between states; 0: only at the end and when interrupted",
    )
    add_switch(run, "--resume", help="go on from the run's last state, if it has one")
    add_switch(run, "--overwrite", help="replace an earlier run in the same folder")


def _add_tracking_arguments(parser: argparse.ArgumentParser) -> None:
    tracking = parser.add_argument_group("tracking")
    tracking.add_argument(
        "--tracker",
        choices=["none", "wandb", "tensorboard"],
        help="default: wandb where it is set up or a flag of it is given, else none",
    )
    tracking.add_argument("--wandb-entity", metavar="NAME", help="wandb's user or team")
    tracking.add_argument(
        "--wandb-project", default="bayesian-peft", metavar="NAME", help="wandb's project"
    )
    tracking.add_argument(
        "--wandb-name", default="", metavar="NAME", help="default: the run folder's name"
    )


def _add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """How the published runs differ, each difference a flag."""
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        default="corrected",
        help="preset of the following; original: as the published runs",
    )

    def told(name: str, help: str) -> str:
        shown = {True: "on", False: "off"}
        ours, theirs = (PROTOCOLS[p][name] for p in ("corrected", "original"))
        ours, theirs = (shown[v] if isinstance(v, bool) else v for v in (ours, theirs))
        return f"{help} (default: {ours}; original {theirs})"

    def switch(name: str, help: str) -> None:
        add_switch(protocol, spelling(name), default=None, help=told(name, help))

    def choice(name: str, choices: list[str], help: str) -> None:
        protocol.add_argument(spelling(name), choices=choices, help=told(name, help))

    switch("shuffle_train", "new order of the training rows in every epoch, or the file's")
    switch("drop_last", "leave out the last rows that fill no batch, in training and evaluation")
    choice(
        "choice_format",
        ["letter_first", "text_first"],
        "'A) text' or 'text) A' in the choices of ARC and OBQA",
    )
    choice(
        "boolq_tokens",
        ["matched", "swapped"],
        "whether BoolQ's true answers are read from the token True or False",
    )
    switch("append_eos", "end-of-text after the prompts of BoolQ and WinoGrande")
    choice("ensemble_average", ["probabilities", "logits"], "what members average")
    switch("whole_epochs", "go on, at learning rate 0, to the end of the last epoch")


def _add_compatible_arguments(parser: argparse.ArgumentParser) -> None:
    group = compatibility_group(parser)
    add_switch(group, "--nowand", help="the same as --tracker none")
    add_switch(group, "--load-in-8bit", help="the same as --quantization 8bit")
    group.add_argument(
        "--model-type", choices=["causallm", "seqcls"], help="follows from --dataset-type"
    )
    for name, reason in WITHOUT_EFFECT.items():
        add_without_effect(parser, reason, spelling(name))
