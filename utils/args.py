"""The flags that every method shares, and how a parser is put together.

`main.parse_args` parses twice: `first_pass` finds out which method is meant, then `build_parser`
makes one strict parser from the shared groups and the method's own, and `finish` checks that the
values go together. The result is read-only: numbers derived from flags live where they are used.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UsageError, quoted
from utils.logging import notice_once
from utils.registry import did_you_mean, names_code
from utils.run_records import read_run_record

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


# What a later run on an adapter takes from the run that trained it, unless told otherwise. Where
# the first flag of a group is given, nothing of it is taken; another one stands for itself alone.
ADOPTED = (
    ("model", "load_model_path"),
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
# Two spellings of one thing: where either is given, neither is taken.
ALTERNATIVES = (("model_type", "dataset_type"), ("quantization", "load_in_8bit"))

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

# Switches that make a run execute code that it was not shipped with.
CODE_SWITCHES = ("trust_remote_code",)
LONGEST_TEXT = 4096  # of a flag: as long as a path can be

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
        hidden = {"given", "called", "_frozen"}
        return {key: value for key, value in vars(self).items() if key not in hidden}


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` and suggests the flag that was probably meant."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_strictly(
        self, argv: Sequence[str], stored: Mapping[str, Any] | None = None, where: str = ""
    ) -> Args:
        """All flags with their values.

        Args:
            argv: the command line.
            stored: flags of a file (by attribute name), which hold where `argv` says nothing.
            where: that file, and on whose behalf it is read.
        Returns:
            the flags; `given` has those that `argv` or `stored` set, default or not.
        Raises:
            UsageError: an unknown flag, a broken rule, or code that only a file asks for.
        """
        absent = object()
        actions = [action for action in self._actions if action.dest != "help"]
        args = Args(**{action.dest: absent for action in actions})
        _, unknown = self.parse_known_args(argv, args)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                raise UsageError(
                    f"unexpected value {quoted(flag)}: it follows no flag that takes it."
                )
            hint = did_you_mean(flag, self._option_string_actions)
            raise UsageError(
                f"unknown flag {quoted(flag)}{hint} `python main.py --help` lists them."
            )
        said = {key: value for key, value in vars(args).items() if value is not absent}
        return self._completed(said, stored or {}, where)

    def settings(self, called: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> Args:
        """All flags with their values, for a call in Python instead of a command line.

        Args:
            called: what the caller has said, by attribute name.
            stored: flags of a file, which hold where the caller said nothing.
            where: that file, and on whose behalf it is read.
        Raises:
            UsageError: as `parse_strictly`.
        """
        known = {action.dest: action for action in self._actions}
        said = {key: flag_value(known[key], value, "the call") for key, value in called.items()}
        return self._completed(said, stored, where)

    def _completed(self, said: dict[str, Any], stored: Mapping[str, Any], where: str) -> Args:
        known = {action.dest: action for action in self._actions if action.dest != "help"}
        called, said = frozenset(said), dict(said)
        for key, value in stored.items():
            if key in said or key in NOT_REPEATED:
                continue
            if key not in known:
                hint = did_you_mean(key, known)
                raise UsageError(f"{where}: unknown flag {quoted(key)}{hint}")
            said[key] = stored_value(known[key], value, where)
        args = Args(**{key: said.get(key, action.default) for key, action in known.items()})
        args.given = {key: value for key, value in said.items() if key not in NOT_REPEATED}
        args.called = called
        return args


def stored_value(action: argparse.Action, value: Any, where: str) -> Any:
    """A flag's value from a file: `flag_value`, but what runs code counts on the call only.

    Raises:
        UsageError: the value breaks the flag's rule, or is a FILE.py:NAME or --trust-remote-code.
    """
    flag = action.option_strings[0]
    said = f"{where}: {action.dest} is {quoted(value)}; {flag}"
    if action.dest in CODE_SWITCHES and value is not False:
        raise UsageError(
            f"{said} runs code, which a file cannot decide: pass {flag} on this call, or remove it."
        )
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, str) and names_code(item) for item in values):
        raise UsageError(
            f"{said} would run that file, which another file cannot decide: pass it on this call."
        )
    return flag_value(action, value, where)


def flag_value(action: argparse.Action, value: Any, where: str) -> Any:
    """A value that did not come from a command line, under the rules of its flag.

    It never becomes part of a command line, so it cannot turn into another flag.

    Args:
        action: the flag.
        value: as JSON or Python have it: a switch is a boolean, a number a number.
        where: who says so, for the message.
    Raises:
        UsageError: the value breaks the flag's rule.
    """
    flag = action.option_strings[0]

    def refuse(rule: str) -> NoReturn:
        raise UsageError(f"{where}: {action.dest} is {quoted(value)}; {flag} {rule}.")

    if value is None:
        if action.default is None or action.type is optional:
            return None
        refuse("needs a value")
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (action.nargs in ("+", "*")):
        refuse("takes one value" if isinstance(value, list) else "takes a list")
    if not values:
        refuse("takes a list of at least one")
    converted = [_converted(action, item, refuse) for item in values]
    return converted if isinstance(value, list) else converted[0]


def _converted(action: argparse.Action, value: Any, refuse: Callable[[str], NoReturn]) -> Any:
    is_switch = action.type is boolean or action.nargs == 0
    if isinstance(value, bool):
        if not is_switch and value is not action.const:
            refuse("takes no boolean")
        return value
    if is_switch:
        refuse("takes true or false")
    if not isinstance(value, str) and (
        action.type in (None, optional, text) or not isinstance(value, int | float)
    ):
        refuse("takes a text" if action.type in (None, optional, text) else "takes a number")
    convert = action.type or str
    try:
        value = convert(value if isinstance(value, str) else repr(value))
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        refuse(f"{error}" if isinstance(error, argparse.ArgumentTypeError) else "takes another")
    if action.choices is not None and value not in action.choices:
        refuse(f"takes one of {', '.join(map(str, action.choices))}")
    return value


# --- value types: each says the rule when it is broken -------------------------------------------


def boolean(text: str) -> bool:
    """A real boolean: "False" is False."""
    lowered = str(text).lower()
    if lowered in {"true", "1", "yes", "on"}:
        return True
    if lowered in {"false", "0", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; pass true or false")


def text(value: str) -> str:
    """A text that names something: not empty, and of characters that a file's name can have."""
    if not value.strip():
        raise argparse.ArgumentTypeError(
            "must not be empty (an empty value usually is an unset variable in a script)"
        )
    if any(character < " " or "\ud800" <= character <= "\udfff" for character in value):
        raise argparse.ArgumentTypeError(
            f"must have no control characters and no broken ones, but is {quoted(value)}"
        )
    if len(value) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(
            f"must have at most {LONGEST_TEXT} characters, but has {len(value)}"
        )
    return value


def optional(value: str) -> str | None:
    """A text; the word None means that there is none."""
    return None if value.lower() == "none" else text(value)


def _number(convert: type, minimum: float, maximum: float, exclusive: bool, rule: str) -> Callable:
    def parse(value: str):
        try:
            number = convert(value)
        except ValueError:
            number = math.nan
        inside = minimum < number <= maximum if exclusive else minimum <= number <= maximum
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {rule}, but is {quoted(value)}")
        return number

    return parse


def whole(minimum: int, maximum: int) -> Callable[[str], int]:
    """A whole number from `minimum` to `maximum`."""
    rule = f"a whole number of at least {minimum} and at most {maximum}"
    return _number(int, minimum, maximum, False, rule)


def between(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number from `minimum` to `maximum`."""
    return _number(float, minimum, maximum, False, f"a number between {minimum:g} and {maximum:g}")


def above(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number greater than `minimum`, up to `maximum`."""
    rule = f"a number greater than {minimum:g}, up to {maximum:g}"
    return _number(float, minimum, maximum, True, rule)


# Wider than anything that makes sense, narrow enough that nothing overflows or fills a memory.
LARGEST = 10**9
positive_int = whole(1, LARGEST)
count = whole(0, LARGEST)
seed = _number(int, 0, 2**32 - 1, False, "a whole number between 0 and 2^32 - 1")
draws = whole(1, 100_000)
positive_float = above(0, 1e9)
nonnegative_float = between(0, 1e9)
learning_rate = above(0, 1_000)
fraction = between(0, 1)


def add_switch(group, *names: str, help: str, default: bool = False) -> None:
    """A boolean flag: `--flag`, `--flag true`, `--flag false`."""
    group.add_argument(
        *names, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help
    )


# --- the groups ----------------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "run": where the run is kept, how it is seeded and followed."""
    run = parser.add_argument_group("run")
    run.add_argument("--modelwrapper", type=text, metavar="METHOD", help="a name, or FILE.py:CLASS")
    run.add_argument("--seed", type=seed, default=1, help="seed of weights and everything below")
    run.add_argument("--seed-data", type=seed, help="seed of the training order (default: --seed)")
    run.add_argument(
        "--seed-sampling", type=seed, help="seed of the posterior's draws (default: --seed)"
    )
    run.add_argument("--config", type=text, metavar="FILE", help="a stored args.json to run again")
    run.add_argument(
        "--output-dir", type=text, default="checkpoints", help="root of all run folders"
    )
    run.add_argument("--log-path", type=text, default="default", help="name of the run's folder")
    run.add_argument(
        "--checkpoint-name", type=text, default="default", help="name of the run's folder, too"
    )
    add_switch(run, "--checkpoint", default=True, help="save the adapter (default: true)")
    run.add_argument(
        "--save-per-steps",
        type=count,
        default=500,
        help="updates between states; 0: only at the end and when interrupted",
    )
    add_switch(run, "--resume", help="go on from the run's last state, if it has one")
    add_switch(run, "--overwrite", help="replace an earlier run in the same folder")
    run.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any"
    )
    run.add_argument("--tracker", choices=["none", "wandb", "tensorboard"], help="default: wandb")
    add_switch(run, "--nowand", help="no wandb (the same as --tracker none)")
    run.add_argument("--wandb-entity")
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
    training.add_argument("--lr", type=learning_rate, default=1e-4)
    training.add_argument(
        "--opt-wd", type=between(0, 1_000), help="weight decay (default: 0; map 1e-5)"
    )
    training.add_argument("--adam-epsilon", type=above(0, 1), default=1e-6)
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
    training.add_argument("--num-bins", type=whole(1, 10_000), default=15, help="bins of the ECE")
    training.add_argument(
        "--bayes-train-n-samples", type=draws, default=1, help="draws per training step"
    )
    training.add_argument(
        "--bayes-eval-n-samples", type=draws, default=1, help="draws while training"
    )
    training.add_argument(
        "--bayes-eval-n-samples-final", type=draws, default=10, help="draws at the end"
    )
    add_switch(training, "--bayes-inference-notsample", help="predict with the posterior mean")
    add_switch(
        training, "--temperature-scaling", help="also report a temperature fitted on held-out rows"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The group "model and LoRA": base model and adapter."""
    model = parser.add_argument_group("model and LoRA")
    model.add_argument("--model", type=text, help="hub id, local folder, smollm2-135m or minilm-l6")
    model.add_argument("--model-type", choices=["causallm", "seqcls"])
    model.add_argument("--load-model-path", type=optional, help="base weights, if not --model's")
    model.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    model.add_argument("--quantization", choices=["none", "8bit", "4bit"], help="of the base")
    add_switch(model, "--load-in-8bit", help="the same as --quantization 8bit")
    add_switch(model, "--trust-remote-code", help="run code that comes with a hub model")
    model.add_argument("--lora-r", type=whole(1, 16_384), help="default: 8, or the adapter's")
    model.add_argument(
        "--lora-alpha", type=whole(1, 1_000_000), help="default: 16 or the adapter's"
    )
    model.add_argument(
        "--lora-dropout", type=fraction, help="default: 0 (mcdropout 0.1), or the adapter's"
    )
    model.add_argument(
        "--target-modules",
        nargs="+",
        help="layers to adapt (default: by model)",
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
    data.add_argument("--dataset", "--task", type=text, help="a data set's name, or FILE.py:NAME")
    data.add_argument("--dataset-type", choices=["mcdataset", "bertds"])
    data.add_argument("--data-dir", type=text, help="folder with train, validation or test files")
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
        "--ood-datasets",
        nargs="+",
        type=text,
        help="shifted data to evaluate the posterior on",
    )
    data.add_argument(
        "--ood-ori-dataset", type=optional, help="the data set that a loaded adapter was trained on"
    )
    data.add_argument("--max-seq-len", type=whole(1, 10_000_000), default=300, help="tokens")
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
    parser.add_argument("--config", type=text)
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    config: dict[str, Any] = {}
    if known.config is not None:
        config = read_run_record(Path(known.config), "--config").repeated
    method = known.modelwrapper
    if method is None and isinstance(config.get("modelwrapper"), str):
        method = config["modelwrapper"]
        if names_code(method):
            raise UsageError(
                f"--config: the method of {known.config} is {quoted(method)}, a file that another "
                "file cannot let run: pass --modelwrapper as well."
            )
    return method, config


def finish(
    args: Args, parser: Parser, check_method: Callable[[Args], None], adopts: bool = True
) -> Args:
    """Fill in what follows from other flags, and check that all go together.

    Args:
        args: from `parser.parse_strictly` or `parser.settings`.
        parser: of `build_parser`.
        check_method: the method's own check.
        adopts: whether the run that trained the loaded adapter is asked for what was not said.
    Raises:
        UsageError: flags that are missing, contradictions (both flags are named).
    """
    if not names_code(args.modelwrapper or ""):
        args.modelwrapper = (args.modelwrapper or "").lower()

    trained = _adopt_from_run(args, parser) if adopts else {}
    args.adapter_dataset = trained.get("dataset")
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(args, name) is not None:
            notice_once(f"{_spelling(name)} has no effect: {reason}.")
    _check_required(args, trained)
    for name in ("model", "load_model_path"):
        value = getattr(args, name)
        if args.trust_remote_code and value is not None and name not in args.called:
            flag = _spelling(name)
            raise UsageError(
                f"--trust-remote-code runs code that comes with the base model, but {flag} "
                f"{quoted(value)} is named by a file only: pass {flag} yourself."
            )
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


def _check_required(args: Args, trained: Mapping[str, Any]) -> None:
    """All flags that are missing, in one message."""
    missing = [f"--{n}" for n in ("modelwrapper", "dataset", "model") if not getattr(args, n)]
    if args.dataset_type is None and args.model_type is None:
        missing.append("--dataset-type")
    if not missing:
        return
    hints = []
    if "--dataset" in missing and trained.get("dataset"):
        hints.append(
            f"The adapter was trained on {quoted(trained['dataset'])}, a file that another file "
            "cannot let run: pass it as --dataset."
        )
    if "--dataset-type" in missing:
        hints.append(
            "--dataset-type mcdataset reads answers from a causal LM, bertds trains a classifier."
        )
    hints.append("See `python main.py --help`.")
    verb = "is" if len(missing) == 1 else "are"
    raise UsageError(f"{', '.join(missing)} {verb} missing. {' '.join(hints)}")


def _adopt_from_run(args: Args, parser: Parser) -> dict[str, Any]:
    """What `--load-lora-path RUN` knows of its base model and data need not be said again.

    Returns:
        the flags of that run that matter here, under the rules of their flags; none where there is
        no args.json.
    Raises:
        UsageError: it is no args.json, or a value breaks its flag's rule.
    """
    if args.load_lora_path is None or args.load_lora_huggingface_repo is not None:
        return {}
    file = Path(args.load_lora_path) / "args.json"
    if not file.exists():
        return {}
    stored = read_run_record(file, "--load-lora-path").args
    actions = {action.dest: action for action in parser._actions}
    names = [*(name for group in (*ADOPTED, *ALTERNATIVES) for name in group), "hold_out"]
    dataset = stored.get("dataset")
    trained_in_file = isinstance(dataset, str) and names_code(dataset)
    trained = {
        name: stored_value(actions[name], stored[name], f"--load-lora-path: {file}")
        for name in names
        if name in stored and not (trained_in_file and name == "dataset")
    }
    for group in (*ADOPTED, *ALTERNATIVES):
        is_preset = "protocol" in args.given and group[0] in PROTOCOLS[args.protocol]
        decisive = group if group in ALTERNATIVES else group[:1]
        if is_preset or any(name in args.given for name in decisive):
            continue
        for name in group:
            if name not in args.given and name in trained:
                setattr(args, name, trained[name])
    return trained | ({"dataset": dataset} if trained_in_file else {})


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


def _match_types(args: Args) -> None:
    """--dataset-type and --model-type come in two pairs; one of them is enough."""
    pairs = {"mcdataset": "causallm", "bertds": "seqcls"}
    if args.model_type is None:
        args.model_type = pairs[args.dataset_type]
    if args.dataset_type is None:
        args.dataset_type = {value: key for key, value in pairs.items()}[args.model_type]
    if pairs[args.dataset_type] != args.model_type:
        raise UsageError(
            f"--dataset-type {args.dataset_type} and --model-type {args.model_type} do not go "
            f"together: mcdataset needs causallm, bertds needs seqcls."
        )


def settings_of(
    method: type,
    called: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
    where: str = "the call",
) -> Args:
    """All flags of a method for a use without a command line; `output_dir` is None: no folder.

    Args:
        method: has `add_arguments` and `check_arguments`.
        called: what the caller has said, by the names of the flags.
        stored: values of a file, which hold where the caller said nothing.
        where: that file.
    Raises:
        UsageError: a value breaks its flag's rule, or two contradict.
    """
    parser = build_parser(method.add_arguments)
    unsaid = {"modelwrapper": method.__name__.lower(), "dataset": "data", "nowand": True}
    stored = stored or {}
    unsaid = {key: value for key, value in unsaid.items() if key not in stored}
    args = parser.settings(unsaid | called, stored, where)
    args.output_dir = None
    return finish(args, parser, method.check_arguments, adopts=False)


def check_own_data(args: Args) -> None:
    """For a post-hoc method: the data are those that the adapter was trained on.

    Raises:
        UsageError: --dataset is a shifted set.
    """
    source = args.ood_ori_dataset or args.adapter_dataset
    if args.load_lora_path is not None and source not in (None, args.dataset):
        raise UsageError(
            f"--modelwrapper {args.modelwrapper} fits the posterior on the adapter's own data, "
            f"{source}, but --dataset is {args.dataset}; pass --dataset {source} "
            f"--ood-datasets {args.dataset}, or fit it first and load that run."
        )
