"""What a file says, checked where it is read: JSON as typed records, tensors by name and shape.

A file is data. It may be damaged, of another program or written by somebody who means harm, so each
reader here answers with the content as its type promises, or with one `UsageError` that names file,
key, value and rule. Nothing is unpickled, no value becomes a flag or an import.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
)

from utils.errors import UsageError, quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_BYTES = 64 * 2**20  # of a JSON file; those of a run have kilobytes
MOST_DEPTH = 64  # of nested JSON
# By name: JSON files are read without torch.
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
LONGEST_SHOTS = 1_000_000  # characters of --num-shots' solved examples

Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]  # or a path
SolvedExamples = Annotated[str, StringConstraints(max_length=LONGEST_SHOTS)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Nonnegative = Annotated[FiniteFloat, Field(ge=0)]


class Record(BaseModel):
    """The base of every typed record: strict types, read-only, unknown keys ignored.

    Strict: "1" is no number, 1 no boolean and 1.0 no count. Keys of later minor additions are
    ignored; a record that changes its meaning gets another `format_version`, which readers check.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


RecordType = TypeVar("RecordType", bound=BaseModel)


# --- JSON -----------------------------------------------------------------------------------------


def parse_json(text: str, where: str, **hooks: Callable) -> Any:
    """The content of a JSON text.

    Args:
        text: of the file, or of a line of it.
        where: it stands, for the message.
        hooks: of `json.loads`; a ValueError of theirs makes the text invalid.
    Raises:
        UsageError: no JSON, or nested deeper than `MOST_DEPTH`.
    """
    try:
        content = json.loads(text, **hooks)
    except RecursionError:
        raise UsageError(f"{where}: nested deeper than {MOST_DEPTH} levels.") from None
    except ValueError as error:
        raise UsageError(f"{where}: not valid JSON ({error}).") from None
    level, depth = [content], 0
    while level:
        if depth > MOST_DEPTH:
            raise UsageError(f"{where}: nested deeper than {MOST_DEPTH} levels.")
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return content


def read_text(path: Path, what: str, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file that should be small.

    Raises:
        UsageError: no such file, no ordinary file, too large, or no UTF-8.
    """
    try:
        return read_bytes(path, what, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what}: {path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None


def read_bytes(path: Path, what: str, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file that should be small; never of a pipe or a device.

    Raises:
        UsageError: no such file, no ordinary file, or too large.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            kind = "a folder" if stat.S_ISDIR(about.st_mode) else "no ordinary file"
            raise UsageError(f"{what}: {path} is {kind}; a file is needed.")
        if about.st_size > most_bytes:
            raise UsageError(
                f"{what}: {path} has {about.st_size} bytes; more than {most_bytes} are not read."
            )
        with open(path, "rb") as file:
            # No more than was announced: files of /proc say 0, and some of them never end.
            return file.read(about.st_size)
    except FileNotFoundError:
        raise UsageError(f"{what}: there is no file {path}.") from None
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        raise UsageError(f"{what}: {path} cannot be read ({error}).") from None


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: no such file, or it does not hold JSON.
    """
    return parse_json(read_text(path, what), f"{what}: {path}")


def read_record(path: Path, record: type[RecordType], what: str, remedy: str = "") -> RecordType:
    """The JSON file `path` as a `record`.

    Args:
        path: of the file.
        record: its type.
        what: on whose behalf it is read, for the message: a flag, a function.
        remedy: what a person can do about a broken one.
    Raises:
        UsageError: there is no such file, it holds no JSON, or the first key that breaks its rule.
    """
    return as_record(read_json(path, what), record, f"{what}: {path}", remedy)


def as_record(content: Any, record: type[RecordType], where: str, remedy: str = "") -> RecordType:
    """Parsed JSON as a `record`; see `read_record`."""
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_problem(error)}. {remedy}".rstrip()) from None


def _first_problem(error: ValidationError) -> str:
    """The first broken rule, in the terms of the file."""
    first = error.errors(include_url=False, include_context=False)[0]
    # pydantic names the branch of a union as well, which is no key of the file
    path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    key = f"key {quoted(path)}" if path else "the content"
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"{key} is missing{others}"
    rule = first["msg"].removeprefix("Value error, ")
    return f"{key} is {quoted(first['input'])}: {rule[0].lower()}{rule[1:]}{others}"


# --- tensors --------------------------------------------------------------------------------------


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UsageError: no such file, or it is damaged.
    """
    return read_tensors_and_metadata(path, what)[0]


def read_tensors_and_metadata(
    path: Path, what: str, names: Collection[str] | None = None, most_numbers: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    Args:
        path: of the file.
        what: on whose behalf it is read, for the message.
        names: of the tensors that are wanted, where they are there; None: all.
        most_numbers: that any of them may have; None: as many as the file has.
    Raises:
        UsageError: no such file, it is damaged, or a tensor is larger than that.
    """
    from safetensors import safe_open

    try:
        if not path.is_file():
            raise UsageError(f"{what}: there is no file {path}.")
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if names is None or key in names]  # noqa: SIM118
            for key in keys if most_numbers is not None else ():
                shape = file.get_slice(key).get_shape()
                if math.prod(shape) > most_numbers:
                    raise UsageError(
                        f"{what}: {quoted(key)} has shape {quoted(shape)}; tensors of more than "
                        f"{most_numbers} numbers are not read."
                    )
            tensors = {key: file.get_tensor(key) for key in keys}
            return tensors, dict(file.metadata() or {})
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # safetensors has an error class of its own, and raises others
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{what}: {path} cannot be read as safetensors ({reason}).") from None


def check_tensor(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    where: str,
    dtypes: Collection[torch.dtype | str] = FLOATS,
    finite: bool = True,
) -> Tensor:
    """The tensor `name`, after its shape, type and values were looked at.

    Args:
        tensors: of a file.
        name: of the tensor.
        shape: what it must have; None stands for any size.
        where: the file, and on whose behalf it is read.
        dtypes: what it may have, or their names.
        finite: whether floats must be.
    Raises:
        UsageError: it is missing or breaks a rule.
    """
    if name not in tensors:
        raise UsageError(f"{where}: the tensor {quoted(name)} is missing.")
    tensor = tensors[name]
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UsageError(
            f"{where}: {quoted(name)} has shape {tuple(tensor.shape)}; it must be ({wanted})."
        )
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in kinds:
        raise UsageError(
            f"{where}: {quoted(name)} is of type {found}; it must be one of {', '.join(kinds)}."
        )
    if finite and tensor.is_floating_point() and not tensor.isfinite().all():
        raise UsageError(
            f"{where}: {quoted(name)} has values that are not numbers (NaN or infinite)."
        )
    return tensor
