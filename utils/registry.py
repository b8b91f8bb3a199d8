"""Look a class or record up by name, or load it from a user's own file."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UsageError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'blob'?"`, or a full stop where nothing is close."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


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
    for key, value in table.items():
        if key.lower() == name.lower():
            return value
    raise UsageError(
        f"unknown {what} '{name}'{did_you_mean(name, table)} Known: {', '.join(sorted(table))}; "
        f"or give your own as path/to/file.py:NAME."
    )


def load_from_file(spec: str, what: str) -> Any:
    """The object NAME of the Python file in `spec` = "path/to/file.py:NAME"."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{what} '{spec}': there is no file {path}; give path/to/file.py:NAME.")
    # One module per file, however often it is asked for: classes keep their identity.
    module_name = f"user_{path.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    module = sys.modules.get(module_name)
    if module is None:
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UsageError(
                f"{what} '{spec}': {path} cannot be imported: {type(error).__name__}: {error}"
            ) from error
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise UsageError(f"{what} '{spec}': {path} has no '{name}'{did_you_mean(name, public)}")
    return getattr(module, name)
