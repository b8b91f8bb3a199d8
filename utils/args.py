"""From a command line to checked, read-only flags.

`main.parse_args` goes over the call three times: `first_pass` finds out which method is meant,
`check_shared` holds all that can be known without the method's code against the rules, and then
`build_parser` makes one strict parser from the shared groups and the method's own, whose values
`finish` checks. The result is read-only: numbers derived from flags live where they are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.adapter_base import adopt_base_model
from utils.catalogue import Catalogue
from utils.data_set_names import check_noisy_names, is_table, same_data_set
from utils.embedded import SPLITS
from utils.errors import UsageError, quoted
from utils.flags import (
    PROTOCOLS,
    WITHOUT_EFFECT,
    add_first_arguments,
    add_other_arguments,
    spelling,
)
from utils.logging import notice_once, wandb_is_set_up
from utils.parser import (
    COMPATIBILITY,
    NOT_REPEATED,
    Args,
    HelpFormatter,
    Parser,
    above,
    add_switch,
    add_without_effect,
    between,
    compatibility_group,
    count,
    flag_value,
    folded,
    positive_int,
    refuse_word,
    seed,
    share,
    stored_value,
    text,
    whole,
)
from utils.registry import names_code
from utils.run_records import read_run_record
from utils.table_task import (
    COLUMN_FLAGS,
    FILE_FLAGS,
    check_kept_split,
    check_table_flags,
)

# What methods, scripts and tests take from here, whichever file it lies in.
__all__ = [
    "NOT_REPEATED",
    "PROTOCOLS",
    "WITHOUT_EFFECT",
    "Args",
    "Parser",
    "above",
    "add_switch",
    "add_without_effect",
    "between",
    "build_parser",
    "check_own_data",
    "check_settings",
    "check_shared",
    "compatibility_group",
    "count",
    "finish",
    "first_pass",
    "flag_value",
    "positive_int",
    "seed",
    "settings_of",
    "share",
    "stored_value",
    "whole",
]

# What a later run on an adapter takes from the run that trained it, unless told otherwise. Where
# the first flag of a group is given, nothing of it is taken; another one stands for itself alone.
ADOPTED = (
    ("model", "load_model_path"),
    ("dtype",),
    ("dataset", "data_dir", "limit_train"),
    *((name,) for name in (*COLUMN_FLAGS, *FILE_FLAGS)),
    ("max_seq_len",),
    ("num_shots",),
    ("seed_split",),
    ("bbc_split",),
    ("held_out",),
    ("protocol",),
    ("choice_format",),
    ("boolq_tokens",),
    ("append_eos",),
    ("ensemble_average",),
)
# Two spellings of one thing: where either is given, neither is taken.
ALTERNATIVES = (("model_type", "dataset_type"), ("quantization", "load_in_8bit"))


USAGE = (
    "python main.py --dataset-type TYPE --dataset NAME --model NAME --modelwrapper METHOD [flags]"
)


def build_parser(
    add_method_arguments: Callable[[argparse.ArgumentParser], None], listed: str = ""
) -> Parser:
    """The one parser of a run: shared groups and the chosen method's own.

    Args:
        add_method_arguments: of the method.
        listed: what the help says of methods, where none has been chosen.
    """
    parser = Parser(
        prog="main.py",
        usage=USAGE,
        description="Fine-tune a language model with LoRA and a Bayesian method, then measure "
        f"accuracy and calibration.\n{listed}".rstrip(),
        formatter_class=HelpFormatter,
    )
    add_first_arguments(parser)
    add_method_arguments(parser)
    add_other_arguments(parser)
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


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the call wants to know the flags, and nothing else."""
    return bool({"-h", "--help"} & set(argv))


def check_shared(
    argv: Sequence[str], method: str | None, stored: Mapping[str, Any], catalogue: Catalogue
) -> Args | None:
    """All that can be known of a call without the method's code, which takes seconds to import.

    Args:
        argv: the command line.
        method: that `first_pass` has found.
        stored: the flags that it has found in --config's file.
        catalogue: what the built-in methods' sources say.
    Returns:
        the shared flags as they are before the method has checked its own and theirs; None for a
        method in a file, which may change what is asked for.
    Raises:
        UsageError: a broken rule, an unknown flag or method, missing flags or contradictions.
    """
    parser = build_parser(lambda parser: None)
    said, unknown = parser.said(argv)
    own = catalogue.flags_of(method) if method is not None else catalogue.flags
    if own is None:
        return None
    if unknown and not unknown[0].startswith("-"):
        refuse_word(unknown[0], (), {})
    known = {folded(flag) for flag in own}
    for word in unknown:
        if word.startswith("--") and folded(word.partition("=")[0]) not in known:
            refuse_word(word, [*parser.flags, *own], catalogue.owners)
    of_method = {flag.removeprefix("--").replace("-", "_") for flag in known}
    of_method -= {action.dest for action in parser.flags.values()}
    early = {key: value for key, value in stored.items() if key not in of_method}
    args = parser.completed(said, early, "--config")
    _settle_shared(args, parser, adopts=True)
    return args


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
    trained = _settle_shared(args, parser, adopts)
    check_method(args)
    _settle_hold_out(args, trained)
    args.opt_wd = 0.0 if args.opt_wd is None else args.opt_wd
    if args.load_lora_path is None:  # else None means: as the adapter says
        args.lora_r = 8 if args.lora_r is None else args.lora_r
        args.lora_alpha = 16 if args.lora_alpha is None else args.lora_alpha
        args.lora_dropout = 0.0 if args.lora_dropout is None else args.lora_dropout
    return args.freeze()


def _settle_shared(args: Args, parser: Parser, adopts: bool) -> dict[str, Any]:
    """The part of `finish` that asks no method: what follows from shared flags.

    Returns:
        the flags of the run that trained the loaded adapter.
    """
    if not names_code(args.modelwrapper or ""):
        args.modelwrapper = (args.modelwrapper or "").lower()

    trained = _adopt_from_run(args, parser) if adopts else {}
    if adopts:
        adopt_base_model(args, {action.dest: action for action in parser._actions})
    args.adapter_dataset = trained.get("dataset")
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(args, name) is not None:
            notice_once(f"{spelling(name)} has no effect: {reason}.")
    _check_required(args, trained)
    for name in ("model", "load_model_path"):
        value = getattr(args, name)
        if args.trust_remote_code and value is not None and name not in args.called:
            flag = spelling(name)
            raise UsageError(
                f"--trust-remote-code runs code that comes with the base model, but {flag} "
                f"{quoted(value)} is named by a file only: pass {flag} yourself."
            )
    _match_types(args)
    check_noisy_names(args)
    check_table_flags(args)
    check_kept_split(args, trained)
    if args.prefix_cache == "on" and args.model_type == "seqcls":
        raise UsageError(
            "--prefix-cache on keeps what a causal LM computes for the tokens that prompts share, "
            f"but --dataset-type {args.dataset_type} trains a classifier; drop it."
        )
    if not args.draws_adaptive:
        for name in ("draws_tolerance", "draws_error_rate"):
            if name in args.called:
                raise UsageError(
                    f"{spelling(name)} is part of drawing until a row is settled; pass "
                    "--draws-adaptive, too, or drop it."
                )
    args.num_shots = 0 if args.num_shots is None else args.num_shots
    args.bbc_split = SPLITS[-1] if args.bbc_split is None else args.bbc_split
    if trained.get("bbc_split") == args.bbc_split != SPLITS[-1]:
        notice_once(
            f"The adapter in {args.load_lora_path} was trained on the embedded corpus as it was "
            f"divided then (--bbc-split {args.bbc_split}); so it is here."
        )
    if args.num_shots and args.dataset_type == "bertds":
        raise UsageError(
            f"--num-shots {args.num_shots} puts solved examples before a causal LM's prompt, but "
            "--dataset-type bertds trains a classifier; drop --num-shots, or pass --dataset-type "
            "mcdataset."
        )
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
    if args.tracker is None:
        asked = {"wandb_entity", "wandb_project", "wandb_name"} & args.given.keys()
        wanted = not args.nowand and (asked or wandb_is_set_up())
        args.tracker = "wandb" if wanted else "none"
    if args.load_lora_huggingface_repo and not args.load_lora_path:
        raise UsageError(
            "--load-lora-huggingface-repo needs --load-lora-path, the adapter's folder in it (a "
            "single dot: the repo itself)."
        )
    if args.temperature_scaling and args.testing_set == "train_val":
        raise UsageError(
            "--temperature-scaling fits on the rows that --testing-set train_val evaluates; pass "
            "one of them."
        )
    if args.calibrate != "no" and args.testing_set == "train_val":
        raise UsageError(
            f"--calibrate {args.calibrate} takes the rows that --testing-set train_val evaluates; "
            "pass one of them."
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
    is_same = args.load_lora_path is not None and same_data_set(
        args.dataset, trained.get("dataset")
    )
    args.adapter_hold_out = bool(
        is_same and trained.get("hold_out") and not _changed_split(args, trained)
    )
    return trained


def _changed_split(args: Args, trained: Mapping[str, Any]) -> list[str]:
    """The flags by which other rows are held out than those of the adapter's run."""
    return [name for name in SPLIT_FLAGS if getattr(args, name) != trained.get(name)]


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
    if "--model" in missing and args.load_lora_path is not None:
        hints.append(
            f"Nothing in {quoted(args.load_lora_path)} says what the adapter's base model is."
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
    trained = {"num_shots": 0, "bbc_split": SPLITS[-1]} | {  # what a file that lacks them means
        name: stored_value(actions[name], stored[name], f"--load-lora-path: {file}")
        for name in names
        if name in stored and not (trained_in_file and name == "dataset")
    }
    for group in (*ADOPTED, *ALTERNATIVES):
        is_preset = "protocol" in args.given and group[0] in PROTOCOLS[args.protocol]
        decisive = group if group in ALTERNATIVES else group[:1]
        if is_preset or any(name in args.given for name in decisive):
            continue
        # of a table: its columns fit another one, its files do not
        if group[0] in COLUMN_FLAGS and not is_table(args.dataset):
            continue
        if group[0] in FILE_FLAGS and not same_data_set(args.dataset, dataset):
            continue
        for name in group:
            if name not in args.given and name in trained:
                setattr(args, name, trained[name])
    return trained | ({"dataset": dataset} if trained_in_file else {})


# Which rows are held out depends on these.
SPLIT_FLAGS = (
    *("data_dir", "limit_train", "held_out", "seed_split", "num_shots", "val_file", "text_column"),
    "bbc_split",
)


def _settle_hold_out(args: Args, trained: dict[str, Any]) -> None:
    """Whether part of the training set is held out: said, needed, or known of the adapter's run.

    Raises:
        UsageError: rows that the adapter was trained on would pass for held-out ones.
    """
    needed = {
        "--temperature-scaling": args.temperature_scaling,
        "--testing-set train_val": args.testing_set == "train_val",
        f"--calibrate {args.calibrate}": args.calibrate != "no",
    }
    flag = next((flag for flag, is_asked in needed.items() if is_asked), None)
    if flag is not None and args.hold_out is False:
        raise UsageError(f"{flag} needs held-out rows, but --hold-out is false; drop that.")
    wanted = bool(args.hold_out or flag is not None)
    if args.load_lora_path is not None and same_data_set(args.dataset, trained.get("dataset")):
        held_out = trained.get("hold_out", False)
        changed = _changed_split(args, trained)
        if wanted and not held_out:
            raise UsageError(
                "rows that were not trained on are needed (--temperature-scaling, --calibrate, "
                "--testing-set train_val, --hold-out, --tfb-anchors held-out or a prior precision "
                f"from validation), but the adapter in {args.load_lora_path} was trained on the "
                "whole training set; train it with --hold-out."
            )
        if wanted and changed:
            flags = ", ".join(spelling(name) for name in changed)
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
        method: has `add_arguments` and `check_call`.
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
    return finish(args, parser, method.check_call, adopts=False)


# Groups of flags that a method in memory cannot follow, and what says the same there.
_NOT_IN_MEMORY = {
    "LoRA and base model": "the LoraConfig and the model that you pass say it",
    "data": "the data set that you prepare with says it",
    "run folder and resume": "only a run has a folder; save_pretrained(folder) saves",
    "tracking": "prepare_for_fit_evaluate takes a wandb run of yours",
    COMPATIBILITY: "it is for command lines",
}
_SAID_BY_OBJECTS = dict.fromkeys(
    ("modelwrapper", "model_type", "dataset_type", "config", "device"),
    "the class and the objects that you pass say it",
) | dict.fromkeys(
    ("load_lora_path", "load_lora_huggingface_repo"), "load_posterior(folder) loads an adapter"
)
_TAKEN_ALL_THE_SAME = ("max_seq_len",)  # it goes into the posterior's record


def check_settings(method: type, settings: Mapping[str, Any]) -> None:
    """Refuse flags that would have no effect on a method that is built without a command line.

    Raises:
        UsageError: one of them is given; the message says what to do instead.
    """
    for group in build_parser(method.add_arguments)._action_groups:
        for action in group._group_actions:
            remedy = _SAID_BY_OBJECTS.get(action.dest, _NOT_IN_MEMORY.get(group.title))
            spellings = {f.lstrip("-").replace("-", "_") for f in action.option_strings}
            given = settings.keys() & {action.dest, *spellings}
            if given and remedy is not None and action.dest not in _TAKEN_ALL_THE_SAME:
                name = min(given)
                raise UsageError(f"{name}={quoted(settings[name])} has no effect here: {remedy}.")


def check_own_data(args: Args) -> None:
    """For a post-hoc method: the data are those that the adapter was trained on.

    Raises:
        UsageError: --dataset is a shifted set.
    """
    source = args.ood_ori_dataset or args.adapter_dataset
    if args.load_lora_path is None or source is None:
        return
    if not same_data_set(source, args.dataset):
        raise UsageError(
            f"--modelwrapper {args.modelwrapper} fits the posterior on the adapter's own data, "
            f"{source}, but --dataset is {args.dataset}; pass --dataset {source} "
            f"--ood-datasets {args.dataset}, or fit it first and load that run."
        )
