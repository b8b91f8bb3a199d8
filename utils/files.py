"""Files: replaced in one step, deleted in one step. Nothing is pickled; tensors are safetensors."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

_UMASK = os.umask(0)
os.umask(_UMASK)
_FILE_MODE = 0o666 & ~_UMASK


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the result to `path`: readers never see half a file.

    The temporary file has a folder of its own beside `path`, because safetensors makes another one
    beside what it is told to write; `sweep_temporaries` finds what a killed process left.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there stays.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = folder / path.name
    try:
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.chmod(_FILE_MODE)  # safetensors makes its files private
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context of changes to the disk for `path`.

    Raises:
        RunError: the disk is full or cannot be written (safetensors has its own class for that).
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise RunError(
            f"cannot write {path}: {error}. Free some space or choose another --output-dir; "
            "what was written before is untouched, and --resume goes on from it."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; what JSON does not know is written as text."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder that we made: renamed away first, so that nobody meets half of it.

    Of a link to a folder only the link goes.
    """
    trash = folder.with_name(f".trash-{folder.name.lstrip('.')}")
    remove_trash(trash)
    with suppress(FileNotFoundError):
        folder.rename(trash)
        remove_trash(trash)


def remove_trash(trash: Path) -> None:
    """Delete what `remove_folder` has renamed away."""
    if trash.is_symlink():
        trash.unlink()
    else:
        shutil.rmtree(trash, ignore_errors=True)


def sweep_temporaries(folder: Path, names: Collection[str]) -> None:
    """Delete what killed processes have left in `folder` of writing files of these names."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in folder.iterdir():
            match = re.fullmatch(r"\.(.+)\.\d+\.tmp", entry.name)
            if match and match[1] in names:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:  # of older versions
                    entry.unlink(missing_ok=True)
