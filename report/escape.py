"""Text from files and flags, made harmless for each format of the report: shown, never obeyed.

Names of methods, models and data sets, settings, commands, hosts, paths and reasons come from
folders that somebody else may have made. Each format has one function here (the terminal's is
`utils.errors.one_line`), and everything that comes from a file or a flag goes through it. What a
terminal would obey or not show, line breaks included, is written as `\\x1b`, `\\n` and so on.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping

from utils.errors import one_line

LONGEST_NAME = 160  # characters of a row, a model or a data set
LONGEST_TEXT = 2_000  # of a command, a path or a reason
LONGEST_STEM = 80  # of a file's name


def shorten(text: str, longest: int = LONGEST_NAME) -> str:
    """The text on one line, cut where it is long."""
    text = one_line(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """How each name is shown: cut where it is long, numbered where two would look the same.

    Args:
        names: what is to be told apart -> its name.
    """
    shown: dict[str, str] = {}
    taken: set[str] = set()
    for key in sorted(names, key=lambda key: (len(names[key]) > LONGEST_NAME, names[key], key)):
        shown[key] = unique = shorten(names[key])
        number = 2
        while unique in taken:
            shown[key] = unique = f"{shorten(names[key])} #{number}"
            number += 1
        taken.add(unique)
    return shown


# --- Markdown -------------------------------------------------------------------------------------

# Signs with a meaning in CommonMark, GitHub's tables, links and mathematics, or a common extension;
# `_` but inside of a word, `:` but before a space, and what makes a line a list or a heading.
_MARKUP = re.compile(
    r"[&<>\[\]`*|\\#~$^{}@]"
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|:(?=\S)"
    r"|(?i:(?<=www))\."
    r"|^[-+=]|^\d+[.)]|^ +| +$"
)


def in_markdown(text: str) -> str:
    """For text and table cells; markup becomes character references, which nothing interprets."""
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), one_line(text))


def code_in_markdown(text: str) -> str:
    """For a command, outside of tables: a code span where nothing in it could end one."""
    text = one_line(text)
    return in_markdown(text) if re.search(r"^ | $|[`<>&|\\]|^$", text) else f"`{text}`"


# --- CSV ------------------------------------------------------------------------------------------

FORMULA_SIGNS = "=+-@−"  # and what looks like them: full-width, small, raised


def in_csv(text: str) -> str:
    """For a cell of text: an apostrophe before what a spreadsheet would take for a formula.

    It stands at the beginning of the cell or after a `;`, at which some split lines, too. Numbers
    do not go through this.
    """
    return ";".join(f"'{part}" if _is_formula(part) else part for part in one_line(text).split(";"))


def _is_formula(text: str) -> bool:
    """Whether a sign of a formula comes first, after any spaces and quotation marks."""
    begin = re.search(r"[^\s\"'`]", text)
    return begin is not None and unicodedata.normalize("NFKC", begin[0])[0] in FORMULA_SIGNS


# --- LaTeX ----------------------------------------------------------------------------------------

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # after \\ and \midrule: options
    '"': "''",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{NO-BREAK SPACE}": "~",
    "^": r"\textasciicircum{}",
    "†": r"$^\dagger$",
    "–": "--",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def in_latex(text: str) -> str:
    """For a cell or a caption; letters beyond Latin need XeLaTeX or LuaLaTeX."""
    return "".join(
        LATEX.get(character, " " if character.isspace() else character)
        for character in one_line(text)
    )


# --- HTML, plots, names of files ------------------------------------------------------------------


def in_html(text: str) -> str:
    """For text and for attributes in quotation marks."""
    return html.escape(one_line(text))


def in_plot(text: str, longest: int) -> str:
    """For a title or a label; `text.parse_math` is off."""
    text = shorten(text, longest)
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves out labels like _name


def file_stem(taken: set[str], *names: str) -> str:
    """The beginning of a file's name from names; another number where it is taken.

    Letters, digits, `.` and `-`, never a `.` or `-` first, and no two that differ in case only.

    Args:
        taken: stems in lower case; the new one is added.
    """
    words = "-".join(name[:LONGEST_TEXT] for name in names if name)
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", words).strip("-.")[:LONGEST_STEM].rstrip("-.")
    stem = unique = stem or "runs"
    number = 2
    while unique.lower() in taken:
        unique, number = f"{stem}-{number}", number + 1
    taken.add(unique.lower())
    return unique
