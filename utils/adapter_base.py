"""The base model of a loaded adapter, where the call does not name it: what its files say.

Read before torch is imported, as all that the rules of the flags need. A name in a file is data: it
passes the rules of --model, is looked up as a hub id, a folder or an embedded model, and never lets
code run.
"""

from __future__ import annotations

import os
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from utils.errors import UsageError, quoted
from utils.hub import adapter_folder
from utils.logging import notice_once
from utils.parser import Args, stored_value
from utils.records import Record, as_record, read_json

CONFIG_FILE = "adapter_config.json"  # PEFT's
RECORD_FILE = "bayes_config.json"  # the posterior's
_Name = Annotated[str, Field(max_length=4096)]


class _Config(Record):
    """What PEFT writes of the base model; an empty text is none."""

    base_model_name_or_path: _Name | None = None
    revision: _Name | None = None


class _Posterior(Record):
    """What the record of a posterior says of it, as in the flags."""

    model: _Name | None = None
    load_model_path: _Name | None = None


class BaseModel(NamedTuple):
    """A base model as a file names it.

    Attributes:
        file: that says so.
        flags: the flags of the same names.
        revision: that PEFT has noted; None for the newest.
    """

    file: Path
    flags: dict[str, str | None]
    revision: str | None = None


def base_model_of(folder: Path) -> BaseModel | None:
    """The base model of the adapter in `folder`: by the posterior's record, else by PEFT's file.

    Returns:
        None where neither file is there, or names one.
    Raises:
        UsageError: a file is damaged.
    """
    what = "--load-lora-path"
    file = folder / RECORD_FILE
    if file.is_file():
        record = as_record(read_json(file, what), _Posterior, f"{what}: {file}")
        if record.model:
            return BaseModel(file, record.model_dump())
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    config = as_record(read_json(file, what), _Config, f"{what}: {file}")
    if not config.base_model_name_or_path:
        return None
    revision = config.revision if config.revision not in ("", "main") else None
    return BaseModel(file, {"model": config.base_model_name_or_path}, revision)


def adopt_base_model(args: Args, actions: Mapping[str, Action]) -> None:
    """Fill in --model from the files of the loaded adapter, where nothing else has said it.

    Args:
        args: flags; `model` is set, and `load_model_path` where the adapter's weights lay there.
        actions: the flags by attribute name, for their rules.
    Raises:
        UsageError: a file is damaged, names what is no model's name, or a folder that is not here.
    """
    if args.model is not None or args.load_lora_path is None:
        return
    found = base_model_of(adapter_folder(args))
    if found is None:
        return
    where = f"--load-lora-path: {found.file}"
    for name, value in found.flags.items():
        if name not in args.given and value:
            _check_folder(value, name, found.file)
            setattr(args, name, stored_value(actions[name], value, where))
    revision = f" (of the newest revision, not {quoted(found.revision)})" if found.revision else ""
    notice_once(f"The base model is {quoted(args.model)}{revision}, as {found.file} says.")


def _check_folder(value: Any, name: str, file: Path) -> None:
    """A path, and no hub id, has to be a folder here.

    Raises:
        UsageError: it is not.
    """
    is_path = os.path.isabs(value) or value.startswith((".", "~")) or "\\" in value
    if not is_path and value.count("/") <= 1:
        return
    try:
        is_here = Path(value).is_dir()
    except (OSError, ValueError):  # too long, or of characters that no path has
        is_here = False
    if not is_here:
        raise UsageError(
            f"--model is missing, and the {name} that {file} names, {quoted(value)}, is no folder "
            "here; pass --model with that model's hub id or its folder on this machine."
        )
