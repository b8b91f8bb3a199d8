"""Look a class or record up by name, or load it from a user's own file."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.errors import UsageError, described, quoted


class LazyTable(UserDict[str, Any]):
    """A table of names whose entries may be "module:NAME", imported when they are asked for.

    So names can be listed, and a wrong one refused, without the libraries behind the entries. `in`,
    `len` and iteration import nothing; whatever gives an entry imports that one.
    """

    def __getitem__(self, name: str) -> Any:
        if isinstance(self.data[name], str):
            module, _, attribute = self.data[name].partition(":")
            self.data[name] = getattr(importlib.import_module(module), attribute)
        return self.data[name]

    def module_of(self, name: str) -> str:
        """The module that has the entry, which need not be imported for that."""
        entry = self.data[name]
        return entry.partition(":")[0] if isinstance(entry, str) else entry.__module__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'blob'?"`, or a full stop where nothing is close."""
    nearest = closest(name, known)
    return "." if nearest is None else f"; did you mean '{nearest}'?"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The name that is spelled most like this one; None where nothing is close."""
    by_lowered = {key.lower(): key for key in known}
    # nothing is close to a name of ten thousand characters, and the search is quadratic
    close = difflib.get_close_matches(name[:100].lower(), by_lowered, n=1, cutoff=0.5)
    return by_lowered[close[0]] if close else None


def names_code(name: str) -> bool:
    """Whether a name is a FILE.py:NAME, which is executed when it is looked up."""
    return ".py:" in name


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """The entry `name` of `table`, or the object that `path/to/file.py:NAME` names.

    Args:
        table: the explicit table of names.
        name: a key of it (case does not matter), or a path to a Python file, a colon and a name.
        what: what is being looked up, for the message: "method", "data set".
    Raises:
        UsageError: an unknown name (with the nearest one), or a file without that name.
    """
    if names_code(name):
        return load_from_file(name, what)
    return table[find_key(table, name, what)]


def find_key(table: Mapping[str, Any], name: str, what: str) -> str:
    """The key of `table` that `name` is, without looking at its entry; see `lookup`."""
    for key in table:
        if key.lower() == name.lower():
            return key
    raise UsageError(
        f"unknown {what} {quoted(name)}{did_you_mean(name, table)} Known: "
        f"{', '.join(sorted(table))}; or give your own as path/to/file.py:NAME."
    )


@contextmanager
def users_code(what: str | Callable[[], str]) -> Iterator[None]:
    """Whatever a user's own code raises in here becomes one message: `sys.exit` above all.

    A file that ends the interpreter would end the run with its own exit code, 0 at worst.

    Args:
        what: whose code it is and what it works on, the message's beginning; or what makes it,
            where that is worth doing for an error only.
    Raises:
        UsageError: the code raised anything but `KeyboardInterrupt`, which is the user's Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and what Rust extensions raise when they panic
        told = what if isinstance(what, str) else what()
        problem = error if isinstance(error, UsageError) else described(error)
        raise UsageError(f"{told}: {problem}") from error


def load_from_file(spec: str, what: str) -> Any:
    """The object NAME of the Python file in `spec` = "path/to/file.py:NAME".

    Raises:
        UsageError: there is no such file, its code fails, or it has no such name.
    """
    file, _, name = spec.rpartition(":")
    told = f"{what} {quoted(spec)}"
    if not name:
        raise UsageError(f"{told}: no name follows the colon; give path/to/file.py:NAME.")
    path = Path(file)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"{told}: {quoted(file)} cannot be read ({error.strerror}).") from None
    if not is_file:
        raise UsageError(
            f"{told}: there is no file {quoted(file)}; give path/to/file.py:NAME, with an ordinary "
            "file."
        )
    module = _imported(path, told)
    with users_code(told):
        names = [key for key in vars(module) if not key.startswith("_")]
        if not hasattr(module, name):
            raise UsageError(f"{quoted(file)} has no {quoted(name)}{did_you_mean(name, names)}")
        return getattr(module, name)


def _imported(path: Path, told: str) -> ModuleType:
    """The file as a module: one per file, however often it is asked for, so that classes stay."""
    # not the path with its slashes replaced: a/b_c.py and a_b/c.py are two files
    digest = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()
    module_name = f"user_file_{digest[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _is(f, path)]
        line = f" (line {lines[-1]})" if lines else ""
        raise UsageError(f"{told}: {path} cannot be imported: {described(error)}{line}") from error
    return module


def _is(frame: traceback.FrameSummary, path: Path) -> bool:
    return frame.filename == str(path)
