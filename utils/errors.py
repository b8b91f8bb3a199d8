"""The two ways in which a run can fail for a reason that a person should read.

A message gives the value that was found, the rule that it breaks, and what to do about it.
`main.py` prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import unicodedata
from typing import Any

LONGEST_MESSAGE = 4_000  # characters
LONGEST_VALUE = 120


def printable(text: str) -> str:
    r"""The text with what a terminal would obey or not show written as `\x1b`, `\ud800` and so on.

    Messages quote files and flags; none of their bytes may move the cursor or hide a line.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in _UNPRINTABLE
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    r"""`printable`, with line breaks and tabs written as `\n` and `\t`."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


# control, format (bidirectional overrides among them), surrogate, private, line and paragraph marks
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def quoted(value: Any, longest: int = LONGEST_VALUE) -> str:
    """A value as a message shows it: on one line, printable, cut where it is long."""
    text = value if isinstance(value, str) else _bounded_repr(value, longest)
    text = one_line(text[: 2 * longest])
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return f"'{text}'" if isinstance(value, str) else text


def _bounded_repr(value: Any, longest: int) -> str:
    """`repr`, but of large integers and containers no more than is shown."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # repr refuses over 4,300 digits
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict) and len(value) > longest:
        return f"{type(value).__name__} of {len(value)} items"
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__


def described(error: BaseException) -> str:
    """Somebody else's exception on one line: its type and the first line of what it says.

    A plain `ValueError` says what is wrong with a value; its type adds nothing to that.
    """
    try:
        first = (str(error).strip().splitlines() or [""])[0]
    except Exception:  # an exception of a user's own may fail to be printed
        first = ""
    first = printable(first if len(first) <= 500 else f"{first[:500]}...")
    if type(error) is ValueError and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class _Told(Exception):
    """Its message is for a person: printable, and no longer than a screen."""

    exit_code: int

    def __init__(self, message: str) -> None:
        text = str(message)
        if len(text) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
        super().__init__(printable(text))


class UsageError(_Told, ValueError):
    """The call cannot work as it was made: a flag, a file, a model or a data row is wrong."""

    exit_code = 2


class RunError(_Told, RuntimeError):
    """The call was fine, but the run failed: the loss became NaN, the disk is full, and so on."""

    exit_code = 1
