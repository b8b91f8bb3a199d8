"""The flags that every method shares, and how a parser is put together.

`main.parse_args` parses twice: `first_pass` finds out which method is meant, then `build_parser`
makes one strict parser from the shared groups and the method's own, and `finish` checks that the
values go together. The result is read-only: numbers derived from flags live where they are used.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UsageError
from utils.logging import notice_once
from utils.records import read_json
from utils.registry import did_you_mean

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


# What a later run on an adapter takes from the run that trained it, unless told otherwise.
# Within a group nothing is taken when one of its flags is given.
ADOPTED = (
    ("model", "load_model_path"),
    ("model_type", "dataset_type"),
    ("quantization", "load_in_8bit"),
    ("dtype",),
    ("dataset", "data_dir", "limit_train"),
    ("max_seq_len",),
    ("seed_split",),
    ("held_out",),
    ("protocol",),
    ("choice_format",),
    ("boolq_tokens",),
    ("append_eos",),
    ("ensemble_average",),
)

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

# Said of one call, not of the run: `--config` does not repeat them.
NOT_REPEATED = ("config", "resume", "overwrite")


class Args(argparse.Namespace):
    """Parsed flags: attributes as in argparse, and nothing writes to them after `freeze`."""

    def freeze(self) -> Args:
        self.__dict__["_frozen"] = True
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise AttributeError(
                f"args.{name} cannot be set: flags are read-only after parsing; keep derived "
                "numbers as attributes of the object that derives them"
            )
        super().__setattr__(name, value)

    def as_dict(self) -> dict[str, Any]:
        """Every flag with the value that the run uses. `given` has only those that were passed."""
        hidden = {"given", "_frozen"}
        return {key: value for key, value in vars(self).items() if key not in hidden}


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` and suggests the flag that was probably meant."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_strictly(self, argv: Sequence[str]) -> Args:
        """All flags with their values; `given` has those that stand in `argv`, default or not."""
        absent = object()
        actions = [action for action in self._actions if action.dest != "help"]
        args = Args(**{action.dest: absent for action in actions})
        _, unknown = self.parse_known_args(argv, args)
        said = {key: value for key, value in vars(args).items() if value is not absent}
        for action in actions:
            if action.dest not in said:
                setattr(args, action.dest, action.default)
        args.given = {key: value for key, value in said.items() if key not in NOT_REPEATED}
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                raise UsageError(f"unexpected value '{flag}': it follows no flag that takes it.")
            hint = did_you_mean(flag, self._option_string_actions)
            raise UsageError(f"unknown flag {flag}{hint} `python main.py --help` lists them.")
        return args


# --- value types: each says the rule when it is broken -------------------------------------------


def boolean(text: str) -> bool:
    """A real boolean: "False" is False."""
    lowered = str(text).lower()
    if lowered in {"true", "1", "yes", "on"}:
        return True
    if lowered in {"false", "0", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; pass true or false")


def optional(text: str) -> str | None:
    """A text; the word None means that there is none."""
    return None if text.lower() == "none" else text


def _number(convert: type, minimum: float, maximum: float, exclusive: bool, rule: str) -> Callable:
    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        inside = minimum < value <= maximum if exclusive else minimum <= value <= maximum
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {rule}, but is '{text}'")
        return value

    return parse


positive_int = _number(int, 1, math.inf, False, "a whole number of at least 1")
count = _number(int, 0, math.inf, False, "a whole number of at least 0")
seed = _number(int, 0, 2**32 - 1, False, "a whole number between 0 and 2^32 - 1")
positive_float = _number(float, 0, 1e30, True, "a number greater than 0")
nonnegative_float = _number(float, 0, 1e30, False, "a number of at least 0")
fraction = _number(float, 0, 1, False, "a number between 0 and 1")


def add_switch(group, *names: str, help: str, default: bool = False) -> None:
    """A boolean flag: `--flag`, `--flag true`, `--flag false`."""
    group.add_argument(
        *names, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help
    )


# --- the groups ----------------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "run": where the run is kept, how it is seeded and followed."""
    run = parser.add_argument_group("run")
    run.add_argument("--modelwrapper", metavar="METHOD", help="a method's name, or FILE.py:CLASS")
    run.add_argument("--seed", type=seed, default=1, help="seed of weights and everything below")
    run.add_argument("--seed-data", type=seed, help="seed of the training order (default: --seed)")
    run.add_argument(
        "--seed-sampling", type=seed, help="seed of the posterior's draws (default: --seed)"
    )
    run.add_argument("--config", metavar="FILE", help="a stored args.json to run again")
    run.add_argument("--output-dir", default="checkpoints", help="root of all run folders")
    run.add_argument("--log-path", default="default", help="name of the run's folder")
    run.add_argument("--checkpoint-name", default="default", help="name of the run's folder, too")
    add_switch(run, "--checkpoint", help="save the adapter")
    run.add_argument(
        "--save-per-steps", type=count, default=500, help="updates between states; 0: none"
    )
    add_switch(run, "--resume", help="go on from the run's last state, if it has one")
    add_switch(run, "--overwrite", help="start over where an interrupted run's state is kept")
    run.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any"
    )
    run.add_argument("--tracker", choices=["none", "wandb", "tensorboard"], help="default: wandb")
    add_switch(run, "--nowand", help="no wandb (the same as --tracker none)")
    run.add_argument("--wandb-entity", type=optional)
    run.add_argument("--wandb-project", default="bayesian-peft")
    run.add_argument("--wandb-name", default="", help="default: the run folder's name")
    for name, reason in WITHOUT_EFFECT.items():
        run.add_argument(
            _spelling(name),
            dest=name,
            nargs="?",
            const=True,
            default=None,
            help=f"no effect: {reason}",
        )


def _spelling(name: str) -> str:
    return f"--{name}" if name == "is_s2s" else f"--{name.replace('_', '-')}"


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "training": length, optimizer, evaluation."""
    training = parser.add_argument_group("training")
    training.add_argument("--loss", choices=["nll"], default="nll")
    training.add_argument("--n-epochs", type=count, default=0, help="passes over the data")
    training.add_argument(
        "--max-train-steps", type=count, default=0, help="optimizer updates, exactly"
    )
    training.add_argument(
        "--early-stop-steps",
        type=count,
        default=0,
        help="stop after this many updates of a longer schedule; 0: never",
    )
    training.add_argument(
        "--batch-size", type=positive_int, help="per process (default: 4; encoders 32)"
    )
    training.add_argument("--grad-accum-steps", type=positive_int, default=1)
    add_switch(training, "--gradient-checkpointing", help="less memory for more time")
    training.add_argument("--opt", choices=["adamw", "adam", "sgd"], default="adamw")
    training.add_argument("--lr", type=positive_float, default=1e-4)
    training.add_argument(
        "--opt-wd", type=nonnegative_float, help="weight decay (default: 0; map 1e-5)"
    )
    training.add_argument("--adam-epsilon", type=positive_float, default=1e-6)
    training.add_argument("--warmup-ratio", type=fraction, default=0.0, help="share of the updates")
    training.add_argument(
        "--eval-per-steps", type=count, default=500, help="updates between evaluations; 0: none"
    )
    training.add_argument(
        "--eval-steps", type=count, default=0, help="batches of those evaluations; 0: all"
    )
    training.add_argument(
        "--eval-batch-size", type=positive_int, default=32, help="rows per forward, draws included"
    )
    training.add_argument("--num-bins", type=positive_int, default=15, help="bins of the ECE")
    training.add_argument(
        "--bayes-train-n-samples", type=positive_int, default=1, help="draws per training step"
    )
    training.add_argument(
        "--bayes-eval-n-samples", type=positive_int, default=1, help="draws while training"
    )
    training.add_argument(
        "--bayes-eval-n-samples-final", type=positive_int, default=10, help="draws at the end"
    )
    add_switch(training, "--bayes-inference-notsample", help="predict with the posterior mean")
    add_switch(
        training, "--temperature-scaling", help="also report a temperature fitted on held-out rows"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "model and LoRA": base model and adapter."""
    model = parser.add_argument_group("model and LoRA")
    model.add_argument("--model", help="hub id, local folder, smollm2-135m or minilm-l6")
    model.add_argument("--model-type", choices=["causallm", "seqcls"])
    model.add_argument("--load-model-path", type=optional, help="base weights, if not --model's")
    model.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    model.add_argument("--quantization", choices=["none", "8bit", "4bit"], help="of the base")
    add_switch(model, "--load-in-8bit", help="the same as --quantization 8bit")
    add_switch(model, "--trust-remote-code", help="run code that comes with a hub model")
    model.add_argument("--lora-r", type=positive_int, help="default: 8, or the adapter's")
    model.add_argument("--lora-alpha", type=positive_int, help="default: 16, or the adapter's")
    model.add_argument(
        "--lora-dropout", type=fraction, help="default: 0 (mcdropout 0.1), or the adapter's"
    )
    model.add_argument(
        "--target-modules", nargs="+", help="names of the layers to adapt (default: by model)"
    )
    add_switch(model, "--apply-classhead-lora", help="query, value and the output head")
    add_switch(model, "--apply-qkv-head-lora", help="query, key, value and the output head")
    model.add_argument("--load-lora-path", type=optional, help="an adapter's folder")
    model.add_argument(
        "--load-lora-huggingface-repo", type=optional, help="hub repo of --load-lora-path"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "data": rows and their split."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", "--task", help="a data set's name, or FILE.py:NAME")
    data.add_argument("--dataset-type", choices=["mcdataset", "bertds"])
    data.add_argument("--data-dir", help="folder with train, validation or test files")
    data.add_argument(
        "--testing-set",
        "--testing_set",
        choices=["val", "test", "train_val", "train_train_val", "train_val_val"],
        default="val",
        help="what is evaluated; train_val: a held-out part of the training set",
    )
    data.add_argument(
        "--anchor-size",
        type=positive_int,
        default=500,
        help="rows for post-hoc methods, unlabelled",
    )
    data.add_argument(
        "--held-out", type=fraction, default=0.2, help="share of the training set that is held out"
    )
    add_switch(
        data,
        "--hold-out",
        default=None,
        help="keep that share out of training (default: where something of the run needs it)",
    )
    data.add_argument("--seed-split", type=seed, default=0, help="seed of what is held out")
    data.add_argument(
        "--ood-datasets", nargs="+", help="shifted data sets to evaluate the same posterior on"
    )
    data.add_argument(
        "--ood-ori-dataset", type=optional, help="the data set that a loaded adapter was trained on"
    )
    data.add_argument("--max-seq-len", type=positive_int, default=300, help="tokens per row")
    data.add_argument("--limit-train", type=count, default=0, help="first rows only; 0: all")
    data.add_argument("--limit-eval", type=count, default=0, help="first rows only; 0: all")
    add_switch(data, "--pad-to-max-length", help="pad every batch to --max-seq-len")
    add_switch(data, "--use-slow-tokenizer", help="the tokenizer's Python version")


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "protocol": how the published runs differ, each difference a flag."""
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--protocol", choices=sorted(PROTOCOLS), default="corrected", help="preset of the following"
    )

    def switch(name: str, help: str) -> None:
        add_switch(protocol, name, default=None, help=help)

    switch("--shuffle-train", "new order of the training rows in every epoch, or the file's")
    switch("--drop-last", "leave out the last rows that fill no batch, in training and evaluation")
    protocol.add_argument(
        "--choice-format",
        choices=["letter_first", "text_first"],
        help="'A) text' or 'text) A' in the choices of ARC and OBQA",
    )
    protocol.add_argument(
        "--boolq-tokens",
        choices=["matched", "swapped"],
        help="whether BoolQ's true answers are read from the token True or False",
    )
    switch("--append-eos", "end-of-text after the prompts of BoolQ and WinoGrande")
    protocol.add_argument(
        "--ensemble-average", choices=["probabilities", "logits"], help="what members average"
    )
    switch("--whole-epochs", "go on, at learning rate 0, to the end of the last epoch")


def build_parser(add_method_arguments: Callable[[argparse.ArgumentParser], None]) -> Parser:
    """The one parser of a run: shared groups, then the chosen method's own."""
    parser = Parser(
        prog="main.py",
        description="Fine-tune a language model with LoRA and a Bayesian method, then measure "
        "accuracy and calibration.",
    )
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_protocol_arguments(parser)
    add_method_arguments(parser)
    return parser


def first_pass(argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The method that is meant, and the flags that `--config`'s run was given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--modelwrapper")
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    config: dict[str, Any] = {}
    if known.config is not None:
        stored = read_json(Path(known.config), "--config")
        config = stored.get("given", stored.get("args")) if isinstance(stored, dict) else None
        if not isinstance(config, dict):
            raise UsageError(
                f"--config: {known.config} is not a run's args.json: it has no object 'given'."
            )
    return known.modelwrapper or config.get("modelwrapper"), config


def finish(
    parser: Parser,
    argv: Sequence[str],
    config: dict[str, Any],
    check_method: Callable[[Args], None],
) -> Args:
    """Parse strictly, fill in what follows from other flags, and check that all go together.

    Raises:
        UsageError: unknown flags, broken rules, contradictions (both flags are named).
    """
    args = parser.parse_strictly([*_as_argv(parser, config), *argv])
    if ".py:" not in (args.modelwrapper or ""):
        args.modelwrapper = (args.modelwrapper or "").lower()

    trained = _adopt_from_run(args)
    args.adapter_dataset = trained.get("dataset")
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(args, name) is not None:
            notice_once(f"{_spelling(name)} has no effect: {reason}.")
    for required in ("modelwrapper", "dataset", "model"):
        if not getattr(args, required):
            raise UsageError(f"--{required} is missing; see `python main.py --help`.")
    _match_types(args)
    if args.n_epochs and args.max_train_steps:
        raise UsageError(
            f"--n-epochs {args.n_epochs} and --max-train-steps {args.max_train_steps} are both "
            "given; the length of the run is one of them."
        )
    if args.apply_classhead_lora and args.apply_qkv_head_lora:
        raise UsageError("--apply-classhead-lora and --apply-qkv-head-lora: pass one of them.")
    if args.target_modules and (args.apply_classhead_lora or args.apply_qkv_head_lora):
        raise UsageError(
            "--target-modules already names every layer; drop --apply-classhead-lora and "
            "--apply-qkv-head-lora."
        )
    if args.quantization is None:
        args.quantization = "8bit" if args.load_in_8bit else "none"
    elif args.load_in_8bit and args.quantization != "8bit":
        raise UsageError(f"--load-in-8bit and --quantization {args.quantization} contradict.")
    if args.nowand and args.tracker == "wandb":
        raise UsageError("--nowand and --tracker wandb contradict.")
    args.tracker = args.tracker or ("none" if args.nowand else "wandb")
    if args.load_lora_huggingface_repo and not args.load_lora_path:
        raise UsageError(
            "--load-lora-huggingface-repo needs --load-lora-path, the adapter's folder in it."
        )
    if args.temperature_scaling and args.testing_set == "train_val":
        raise UsageError(
            "--temperature-scaling fits on the rows that --testing-set train_val evaluates; pass "
            "one of them."
        )
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: pass one of them.")
    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            # the published encoder runs did shuffle, and kept every row
            is_encoder = args.dataset_type == "bertds" and name in ("shuffle_train", "drop_last")
            setattr(args, name, PROTOCOLS["corrected"][name] if is_encoder else value)
    if args.batch_size is None:
        args.batch_size = 4 if args.dataset_type == "mcdataset" else 32
    for name in ("seed_data", "seed_sampling"):
        if getattr(args, name) is None:
            setattr(args, name, args.seed)
    check_method(args)
    _settle_hold_out(args, trained)
    args.opt_wd = 0.0 if args.opt_wd is None else args.opt_wd
    if args.load_lora_path is None:  # else None means: as the adapter says
        args.lora_r = 8 if args.lora_r is None else args.lora_r
        args.lora_alpha = 16 if args.lora_alpha is None else args.lora_alpha
        args.lora_dropout = 0.0 if args.lora_dropout is None else args.lora_dropout
    return args.freeze()


def _adopt_from_run(args: Args) -> dict[str, Any]:
    """What `--load-lora-path RUN` knows of its base model and data need not be said again.

    Returns:
        all flags of that run; none where there is no args.json.
    """
    if args.load_lora_path is None or args.load_lora_huggingface_repo is not None:
        return {}
    file = Path(args.load_lora_path) / "args.json"
    if not file.is_file():
        return {}
    content = read_json(file, "--load-lora-path")
    trained = content.get("args") if isinstance(content, dict) else None
    if not isinstance(trained, dict):
        raise UsageError(f"--load-lora-path: {file} is no run's args.json; remove or restore it.")
    for group in ADOPTED:
        is_preset = "protocol" in args.given and group[0] in PROTOCOLS[args.protocol]
        if not is_preset and not any(name in args.given for name in group):
            for name in group:
                setattr(args, name, trained.get(name, getattr(args, name)))
    return trained


# Which rows are held out depends on these.
SPLIT_FLAGS = ("data_dir", "limit_train", "held_out", "seed_split")


def _settle_hold_out(args: Args, trained: dict[str, Any]) -> None:
    """Whether part of the training set is held out: said, needed, or known of the adapter's run.

    Raises:
        UsageError: rows that the adapter was trained on would pass for held-out ones.
    """
    needed = args.temperature_scaling or args.testing_set == "train_val"
    if needed and args.hold_out is False:
        flag = "--temperature-scaling" if args.temperature_scaling else "--testing-set train_val"
        raise UsageError(f"{flag} needs held-out rows, but --hold-out is false; drop that.")
    wanted = bool(args.hold_out or needed)
    if args.load_lora_path is not None and args.dataset == trained.get("dataset"):
        held_out = trained.get("hold_out", False)
        changed = [name for name in SPLIT_FLAGS if getattr(args, name) != trained.get(name)]
        if wanted and not held_out:
            raise UsageError(
                "rows that were not trained on are needed (--temperature-scaling, --testing-set "
                "train_val, --hold-out or a prior precision from validation), but the adapter in "
                f"{args.load_lora_path} was trained on the whole training set; train it with "
                "--hold-out."
            )
        if wanted and changed:
            flags = ", ".join(_spelling(name) for name in changed)
            raise UsageError(
                f"{flags}: other rows than those that the adapter in {args.load_lora_path} was not "
                "trained on would be held out; drop it."
            )
        wanted = wanted or (held_out and args.hold_out is None and not changed)
    elif args.load_lora_path is not None and wanted:
        notice_once(
            f"Nothing is known of the rows that the adapter in {args.load_lora_path} was trained "
            "on; the held-out ones may be among them."
        )
    args.hold_out = wanted


def _as_argv(parser: Parser, config: dict[str, Any]) -> list[str]:
    """Stored flags as a command line: so they pass the same checks as any other."""
    spellings = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    argv: list[str] = []
    for key, value in config.items():
        if key in NOT_REPEATED:
            continue
        if key not in spellings:
            raise UsageError(f"--config: unknown flag '{key}'{did_you_mean(key, spellings)}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [spellings[key], *map(str, values)]
    return argv


def _match_types(args: Args) -> None:
    """--dataset-type and --model-type come in two pairs; one of them is enough."""
    pairs = {"mcdataset": "causallm", "bertds": "seqcls"}
    if args.dataset_type is None and args.model_type is None:
        raise UsageError(
            "--dataset-type is missing: mcdataset reads answers from a causal LM, bertds trains a "
            "classifier."
        )
    if args.model_type is None:
        args.model_type = pairs[args.dataset_type]
    if args.dataset_type is None:
        args.dataset_type = {value: key for key, value in pairs.items()}[args.model_type]
    if pairs[args.dataset_type] != args.model_type:
        raise UsageError(
            f"--dataset-type {args.dataset_type} and --model-type {args.model_type} do not go "
            f"together: mcdataset needs causallm, bertds needs seqcls."
        )
