"""The candidates of a sweep: every combination of a grid's values and a list's lines of flags.

A grid stands on the call. A list is a file, which says settings only: no code, no other files.
"""

from __future__ import annotations

import itertools
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import UsageError, quoted
from utils.parser import CODE_SWITCHES, Args, folded
from utils.records import read_text
from utils.registry import names_code

MOST_CANDIDATES = 10_000
LONGEST_NAME = 200  # of a candidate: a folder's name, to which the seed is added
# What a list of flags cannot say: a file names no code and no other files.
NOT_IN_A_FILE = {
    *("config", "modelwrapper", "model", "dataset", "task", "load-lora-path", "load-model-path"),
    *("load-lora-huggingface-repo", "data-dir", "val-file", "test-file"),
    *(name.replace("_", "-") for name in CODE_SWITCHES),
}


class Candidate(NamedTuple):
    """Flags that are tried.

    Attributes:
        name: of its runs' folders.
        words: of the command line.
    """

    name: str
    words: list[str]


def candidates_of(args: Args) -> list[Candidate]:
    """Every combination of the grid's values and the list's lines.

    Args:
        args: `grid`, texts FLAG=V1,V2, and `list`, a file's path or None.
    Raises:
        UsageError: a flag without values, twice in a candidate, or a line of the list that says
            more than settings.
    """
    axes: list[list[list[str]]] = []
    if args.list is not None:
        axes.append(list(listed(Path(args.list))))
    axes += [values_of(text) for text in args.grid]
    candidates = {}
    for combination in itertools.product(*axes):
        words = [word for part in combination for word in part]
        flags = flags_of(words)
        twice = {flag for flag in flags if flags.count(flag) > 1}
        if twice:
            raise UsageError(f"--grid and --list: {min(twice)} has two values in one candidate.")
        name = name_of(words)
        if name in candidates:
            raise UsageError(f"--grid and --list: {quoted(' '.join(words))} is there twice.")
        candidates[name] = Candidate(name, words)
        if len(candidates) > MOST_CANDIDATES:
            raise UsageError(f"there are more than {MOST_CANDIDATES} candidates; try fewer.")
    return list(candidates.values())


def values_of(text: str) -> list[list[str]]:
    """The words of each value in FLAG=V1,V2; a value is never taken for a flag.

    Raises:
        UsageError: it is not of that form.
    """
    flag, equals, values = text.partition("=")
    flag, found = folded(flag).removeprefix("--"), values.split(",")
    if (
        not equals
        or not re.fullmatch(r"[A-Za-z][\w-]*", flag)
        or not all(found)
        or not text.isprintable()
    ):
        raise UsageError(
            f"--grid {quoted(text)} is not FLAG=V1,V2, such as lr=1e-4,1e-3; a flag whose value "
            "has a comma in it goes into a --list."
        )
    return [[f"--{flag}={value}"] for value in found]


def listed(file: Path) -> Iterator[list[str]]:
    """The words of each line that is not empty; what follows # is a comment.

    Raises:
        UsageError: there is no such file, or a line says more than settings.
    """
    found = False
    for number, line in enumerate(read_text(file, "--list").splitlines(), start=1):
        where = f"--list: {file}:{number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{where}: {error}; close the quotation mark.") from None
        if not words:
            continue
        if not words[0].startswith("--"):
            raise UsageError(f"{where}: {quoted(words[0])} is no flag; a line is --FLAG VALUE ...")
        for word in words:
            flag, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
            # `--` ends flags, and a file would say what follows as words of their own
            if folded(flag).removeprefix("--") in NOT_IN_A_FILE or word == "--":
                raise UsageError(
                    f"{where}: {quoted(flag)} names files or runs code, which a file cannot "
                    "decide: pass it after the `--` of this call."
                )
            if names_code(value):
                raise UsageError(
                    f"{where}: {quoted(value)} would be run, which a file cannot decide."
                )
        found = True
        yield words
    if not found:
        raise UsageError(f"--list: {file} has no line of flags.")


def flags_of(words: list[str]) -> list[str]:
    """The flags among words of a command line, in one spelling."""
    return [folded(word.partition("=")[0]) for word in words if word.startswith("--")]


def name_of(words: list[str]) -> str:
    """A folder's name for a candidate; of two different ones never the same."""
    text = " ".join(words)
    plain = re.sub(r"(^| )--", r"\1", text).replace(" ", ",")
    name = re.sub(r"[^\w.=,+-]+", "_", plain, flags=re.ASCII).lstrip(".")[:LONGEST_NAME]
    if name == plain and not any("," in word for word in words):
        return name
    return f"{name}-{zlib.crc32(text.encode(errors='surrogatepass')):08x}"
