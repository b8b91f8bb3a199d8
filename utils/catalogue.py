"""What the sources of the built-in methods say: names, summaries, flags. Nothing is imported.

To import a method takes seconds, for torch and PEFT; `--help` and a wrong call need not wait.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from utils.registry import LazyTable

_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Method:
    """A built-in method.

    Attributes:
        names: that --modelwrapper takes.
        summary: the first line of its module's docstring.
        flags: every text in its module that is spelled as a flag; its own are among them.
    """

    names: tuple[str, ...]
    summary: str
    flags: frozenset[str]


@dataclass(frozen=True)
class Catalogue:
    """All built-in methods.

    Attributes:
        methods: in the order of their table.
        common: what is spelled as a flag in the modules that methods are made of.
    """

    methods: tuple[Method, ...]
    common: frozenset[str]

    def flags_of(self, name: str) -> frozenset[str] | None:
        """What may be a flag of a method; None for one that is not built in."""
        for method in self.methods:
            if name.lower() in method.names:
                return method.flags | self.common
        return None

    @property
    def flags(self) -> frozenset[str]:
        """What may be a flag of any method."""
        return self.common.union(*(method.flags for method in self.methods))

    @property
    def owners(self) -> dict[str, str]:
        """Flag -> the first method that has it."""
        owners: dict[str, str] = {}
        for method in self.methods:
            for flag in method.flags:
                owners.setdefault(flag, method.names[0])
        return owners

    def listed(self) -> str:
        """The methods for `--help`, one line each."""
        lines = [(", ".join(method.names), method.summary) for method in self.methods]
        lines += [("FILE.py:CLASS", "a method of your own: a subclass of WrapperBase")]
        width = max(len(names) for names, _ in lines)
        return "\n".join(
            [
                "",
                "methods (their flags: python main.py --modelwrapper METHOD --help):",
                *(f"  {names:{width}}  {summary}" for names, summary in lines),
            ]
        )


def read_catalogue(table: LazyTable, package: Path) -> Catalogue:
    """The methods of `table` whose modules lie in the folder of its package."""
    names: dict[Path, list[str]] = {}
    for name in table:
        file = package.parent.joinpath(*table.module_of(name).split(".")).with_suffix(".py")
        if file.is_relative_to(package) and file.is_file():
            names.setdefault(file, []).append(name)
    methods = []
    for file, of_file in names.items():
        methods.append(Method(tuple(of_file), *_summary_and_flags(file)))
    others = [file for file in sorted(package.rglob("*.py")) if file not in names]
    common = frozenset().union(*(_summary_and_flags(file)[1] for file in others))
    return Catalogue(tuple(methods), common)


@cache
def _summary_and_flags(file: Path) -> tuple[str, frozenset[str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    flags = (text for text in texts if isinstance(text, str) and _FLAG.fullmatch(text))
    return (ast.get_docstring(tree) or "").partition("\n")[0], frozenset(flags)
