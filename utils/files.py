"""Files: replaced in one step, read with limits. Nothing is pickled; tensors are safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from utils.errors import RunError

_UMASK = os.umask(0)
os.umask(_UMASK)
_FILE_MODE = 0o666 & ~_UMASK


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the result to `path`: readers never see half a file.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(_FILE_MODE)  # safetensors makes its files private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk with an error class of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunError(
                f"cannot write {path}: {error}. Free some space or choose another --output-dir; "
                "what was written before is untouched, and --resume goes on from it."
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; what JSON does not know is written as text."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, atomically."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))
