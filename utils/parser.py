"""A strict command line: argparse whose values, messages and help say what the rules are."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from utils.errors import UsageError, quoted
from utils.registry import closest, did_you_mean, names_code

# Switches that make a run execute code that it was not shipped with.
CODE_SWITCHES = ("trust_remote_code",)
LONGEST_TEXT = 4096  # of a flag: as long as a path can be

# Said of one call, not of the run: `--config` does not repeat them.
NOT_REPEATED = ("config", "resume", "overwrite")

COMPATIBILITY = "accepted for existing command lines"  # the help's last group

# What other programs call a flag that has another name here.
SYNONYMS = {
    "lr": ("learning-rate", "learningrate", "step-size"),
    "n-epochs": ("epochs", "epoch", "num-epochs", "num-train-epochs", "max-epochs"),
    "max-train-steps": ("steps", "max-steps", "num-steps", "train-steps", "num-train-steps"),
    "batch-size": ("bs", "batch", "train-batch-size", "per-device-train-batch-size"),
    "eval-batch-size": ("per-device-eval-batch-size", "test-batch-size"),
    "grad-accum-steps": ("gradient-accumulation-steps", "accumulate-grad-batches", "grad-accum"),
    "opt": ("optimizer", "optim"),
    "opt-wd": ("weight-decay", "wd"),
    "warmup-ratio": ("warmup", "warmup-steps"),
    "max-seq-len": ("max-length", "max-len", "max-seq-length", "seq-len", "cutoff-len"),
    "num-shots": ("num-fewshot", "n-shots", "shots", "few-shot", "k-shot"),
    "lora-r": ("rank", "lora-rank", "r"),
    "lora-alpha": ("alpha",),
    "lora-dropout": ("dropout",),
    "model": ("base-model", "model-name", "model-name-or-path"),
    "modelwrapper": ("method", "wrapper"),
    "dataset": ("data", "dataset-name"),
    "text-column": ("text-columns", "text-col", "text-field", "input-column"),
    "label-column": ("label-col", "target-column", "label-field"),
    "val-file": ("validation-file", "eval-file", "dev-file"),
    "prompt": ("template", "prompt-template"),
    "answer-words": ("verbalizer", "label-words"),
    "quantization": ("load-in-4bit", "quantize"),
    "bayes-eval-n-samples-final": ("samples", "n-samples", "num-samples"),
    "load-lora-path": ("adapter", "adapter-path", "lora-path"),
    "output-dir": ("out", "output", "out-dir", "save-dir"),
    "kl-lr": ("lr-kl", "kl-learning-rate"),
}
_MEANT = {said: flag for flag, spellings in SYNONYMS.items() for said in spellings}


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

    def replaced(self, **changes: Any) -> Args:
        """A read-only copy in which some flags have other values."""
        return Args(
            **{key: v for key, v in vars(self).items() if key != "_frozen"} | changes
        ).freeze()

    def as_dict(self) -> dict[str, Any]:
        """Every flag with the value that the run uses. `given` has only those that were passed."""
        hidden = {"given", "called", "_frozen"}
        return {key: value for key, value in vars(self).items() if key not in hidden}


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` and suggests the flag that was probably meant.

    Dashes and underscores within a flag's name are the same: `--max_train_steps` is
    `--max-train-steps`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every spelling of every flag."""
        return dict(self._option_string_actions)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._spelled_as_declared(args), namespace)

    def _spelled_as_declared(self, argv: Sequence[str]) -> list[str]:
        declared = {folded(flag): flag for flag in self._option_string_actions}
        spelled, values_only = [], False
        for word in argv:
            flag, equals, value = word.partition("=")
            values_only = values_only or word == "--"
            is_flag = flag.startswith("--") and flag not in self._option_string_actions
            if is_flag and not values_only:
                flag = declared.get(folded(flag), flag)
            spelled.append(flag + equals + value)
        return spelled

    def said(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """What a command line says, by attribute name, and the words that are not flags of it.

        Raises:
            UsageError: a value breaks its flag's rule.
        """
        absent = object()
        actions = [action for action in self._actions if action.dest != "help"]
        args = Args(**{action.dest: absent for action in actions})
        _, unknown = self.parse_known_args(argv, args)
        return {key: value for key, value in vars(args).items() if value is not absent}, unknown

    def parse_strictly(
        self,
        argv: Sequence[str],
        stored: Mapping[str, Any] | None = None,
        where: str = "",
        elsewhere: Callable[[], Mapping[str, str]] = dict,
    ) -> Args:
        """All flags with their values.

        Args:
            argv: the command line.
            stored: flags of a file (by attribute name), which hold where `argv` says nothing.
            where: that file, and on whose behalf it is read.
            elsewhere: gives flags that there are, but not in this call -> the method that has them.
        Returns:
            the flags; `given` has those that `argv` or `stored` set, default or not.
        Raises:
            UsageError: an unknown flag, a broken rule, or code that only a file asks for.
        """
        said, unknown = self.said(argv)
        if unknown:
            refuse_word(unknown[0], self.flags, elsewhere())
        return self.completed(said, stored or {}, where)

    def settings(self, called: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> Args:
        """All flags with their values, for a call in Python instead of a command line.

        Args:
            called: what the caller has said, by attribute name or by any spelling of the flag with
                underscores: `bayes_beta` or `prior_std`.
            stored: flags of a file, which hold where the caller said nothing.
            where: that file, and on whose behalf it is read.
        Raises:
            UsageError: as `parse_strictly`.
        """
        known = {
            name: action
            for flag, action in self._option_string_actions.items()
            for name in (flag.lstrip("-").replace("-", "_"), action.dest)
            if action.dest != "help"
        }
        said: dict[str, Any] = {}
        for key, value in called.items():
            if key not in known:
                raise UsageError(f"the call: unknown flag {quoted(key)}{did_you_mean(key, known)}")
            action = known[key]
            if action.dest in said:
                raise UsageError(
                    f"the call: {quoted(key)} is another name of a flag that is given already "
                    f"({', '.join(action.option_strings)}); pass it once."
                )
            said[action.dest] = flag_value(action, value, "the call")
        return self.completed(said, stored, where)

    def completed(self, said: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> Args:
        """`said` with what a file and the defaults add to it; see `parse_strictly`."""
        known = {action.dest: action for action in self._actions if action.dest != "help"}
        called, said = frozenset(said), dict(said)
        for key, value in stored.items():
            if key in said or key in NOT_REPEATED:
                continue
            # an older file may have another spelling of it
            flag = f"--{key.replace('_', '-')}"
            action = known.get(key) or self._option_string_actions.get(flag)
            if action is None:
                hint = did_you_mean(key, known)
                raise UsageError(f"{where}: unknown flag {quoted(key)}{hint}")
            said.setdefault(action.dest, stored_value(action, value, where))
        args = Args(**{key: said.get(key, action.default) for key, action in known.items()})
        args.given = {key: value for key, value in said.items() if key not in NOT_REPEATED}
        args.called = called
        return args

    def format_help(self) -> str:
        # stable: the group that is for nobody who reads the help comes last, whoever began it
        self._action_groups.sort(key=lambda group: group.title == COMPATIBILITY)
        return super().format_help()


def folded(flag: str) -> str:
    """A flag's name as it is compared: dashes and underscores are the same."""
    return flag.replace("_", "-")


def refuse_word(word: str, known: Iterable[str], elsewhere: Mapping[str, str]) -> NoReturn:
    """Say what is wrong with a word that no flag takes.

    Args:
        word: of the command line.
        known: the flags that the call has.
        elsewhere: flag -> method, of those that it would have with another method.
    Raises:
        UsageError: always.
    """
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        raise UsageError(f"unexpected value {quoted(flag)}: it follows no flag that takes it.")
    others = {folded(name): (name, method) for name, method in elsewhere.items()}
    if folded(flag) in others:
        name, method = others[folded(flag)]
        raise UsageError(
            f"{name} is a flag of --modelwrapper {method}, which this call does not name: drop it, "
            f"or pass --modelwrapper {method}."
        )
    suggestion = meant_flag(flag, [*known, *elsewhere]) if folded(flag).strip("-_") else None
    hint = "."
    if suggestion is not None:
        of_method = elsewhere.get(suggestion) if suggestion not in known else None
        owner = f" of --modelwrapper {of_method}" if of_method else ""
        hint = f"; did you mean '{suggestion}'{owner}?"
    raise UsageError(f"unknown flag {quoted(flag)}{hint} `python main.py --help` lists them.")


def meant_flag(flag: str, known: Iterable[str]) -> str | None:
    """The flag that was probably meant: another program's name of it, or the nearest spelling."""
    known = list(known)
    synonym = f"--{_MEANT.get(folded(flag).lstrip('-').lower())}"
    return synonym if synonym in known else closest(folded(flag), known)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One column of flags, one of what they do, each with its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        is_said = re.search(r"\bdefault\b|^no effect", told) is not None
        if is_said or action.default in (None, argparse.SUPPRESS):
            return told
        shown = {True: "on", False: "off"}[action.default] if is_switch(action) else action.default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        return f"{told} (default: {str(shown).replace('%', '%%')})".lstrip()


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
    exactly = action.nargs if isinstance(action.nargs, int) and action.nargs > 1 else None
    if isinstance(value, list) != (exactly is not None or action.nargs in ("+", "*")):
        refuse("takes one value" if isinstance(value, list) else "takes a list")
    if not values:
        refuse("takes a list of at least one")
    if exactly is not None and len(values) != exactly:
        refuse(f"takes {exactly} values")
    converted = [_converted(action, item, refuse) for item in values]
    return converted if isinstance(value, list) else converted[0]


def is_switch(action: argparse.Action) -> bool:
    """Whether a flag is on or off."""
    return action.type is boolean or action.nargs == 0


def _converted(action: argparse.Action, value: Any, refuse: Callable[[str], NoReturn]) -> Any:
    if isinstance(value, bool):
        if not is_switch(action) and value is not action.const:
            refuse("takes no boolean")
        return value
    if is_switch(action):
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


def template(value: str) -> str:
    """A text in which line breaks are allowed; they are kept as a backslash and an n."""
    return text(value.replace("\r\n", "\n").replace("\n", "\\n"))


def blocks(value: str) -> str:
    """Which blocks of a model: all, last:K, or numbers and ranges such as 0,4,20-29."""
    folded_value = "".join(value.lower().split())
    rule = "must be all, last:K with K of at least 1, or numbers and ranges such as 0,4,20-29"
    is_known = re.fullmatch(
        r"all|last:0*[1-9]\d{0,8}|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", folded_value, re.ASCII
    )
    if not is_known or len(value) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(f"{rule}, but is {quoted(value)}")
    for part in re.findall(r"\d+-\d+", folded_value):
        first, last = map(int, part.split("-"))
        if first > last:
            raise argparse.ArgumentTypeError(f"has the range {part}, which ends before it begins")
    return folded_value


def _number(convert: type, minimum: float, maximum: float, exclusive: bool, rule: str) -> Callable:
    def parse(value: str):
        try:
            number = convert(value)
        except ValueError:
            number = math.nan
        is_meant = minimum < number <= maximum if exclusive else minimum <= number <= maximum
        if not is_meant:
            raise argparse.ArgumentTypeError(f"must be {rule}, but is {quoted(value)}")
        return number

    parse.metavar = "N" if convert is int else "X"
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


def inside(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number between `minimum` and `maximum`, neither of which is meant."""
    rule = f"a number greater than {minimum:g} and less than {maximum:g}"
    return _number(
        float, math.nextafter(minimum, math.inf), math.nextafter(maximum, -math.inf), False, rule
    )


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
share = inside(0, 1)


def add_switch(group, *names: str, help: str, default: bool = False) -> None:
    """A boolean flag: `--flag`, `--flag true`, `--flag false`."""
    group.add_argument(
        *names, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help
    )


def add_without_effect(parser: argparse.ArgumentParser, reason: str, *names: str) -> None:
    """Flags of existing command lines that have nothing to do here, with or without a value."""
    group = compatibility_group(parser)
    for name in names:
        group.add_argument(
            name, nargs="?", const=True, metavar="VALUE", help=f"no effect: {reason}"
        )


def compatibility_group(parser: argparse.ArgumentParser) -> Any:
    """The help's last group: old spellings, kept for existing command lines."""
    for group in parser._action_groups:
        if group.title == COMPATIBILITY:
            return group
    return parser.add_argument_group(COMPATIBILITY)
