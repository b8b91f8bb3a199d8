"""Where a run is kept: its folder's path, and names that can be part of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from utils.data_set_names import data_set_name
from utils.errors import UsageError, quoted
from utils.run_records import ARGS_FILE, HISTORY_FILE, LOG_FILE, METRICS_FILE

LONGEST_FOLDER, LONGEST_DATA_SET = 255, 200  # bytes; a data set's name is part of a file's, too
# Folders in a run's folder or beside it that are no runs: the report does not look into them.
NOT_RUNS = ("state", "wandb", "tensorboard")
HELD_OUT, CALIBRATION = "held_out", "calibration"  # predictions on parts of the training set
PARTS = (HELD_OUT, CALIBRATION)  # predictions-held_out.safetensors are of no data set of that name


def run_folder_path(args) -> Path:
    """`<output-dir>/<modelwrapper>/<model>/<dataset>/<name>`.

    `<name>` is --checkpoint-name where it was set, else --log-path. A local model folder stands
    under its last component; a hub id keeps its owner. Each is one folder's name, so that no run
    lies outside of --output-dir or in another run's folder.

    Raises:
        UsageError: one of them is no folder's name, or a link leads elsewhere.
    """
    if not str(args.output_dir).strip():
        raise UsageError(
            "--output-dir is empty, which would be the working directory; an empty value usually "
            "is an unset variable in a script. Pass --output-dir . if you mean it."
        )
    names = {
        flag: check_name(getattr(args, flag.removeprefix("--").replace("-", "_")), flag)
        for flag in ("--log-path", "--checkpoint-name")
    }
    name = names["--checkpoint-name"]
    parts = [
        check_name(args.modelwrapper.rpartition(":")[2].lower(), "--modelwrapper"),
        *_model_folders(str(args.model)),
        check_data_set_name(data_set_name(args.dataset), "--dataset"),
        name if name != "default" else names["--log-path"],
    ]
    root = Path(args.output_dir)
    path = root.joinpath(*parts)
    try:
        expected, real = root.resolve().joinpath(*parts), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself
        raise UsageError(f"--output-dir {quoted(str(root))} cannot be used ({error}).") from None
    if real != expected:
        raise UsageError(
            f"the run's folder {path} is reached by a link, which leads to {real}: under two names "
            f"one run could replace another. Remove the link, or make {root} itself the link."
        )
    return path


def _model_folders(model: str) -> list[str]:
    local = None
    with suppress(OSError, RuntimeError, ValueError):  # a name that no file can have
        if os.path.isabs(model) or model.startswith(".") or Path(model).is_dir():
            local = Path(model).resolve().name
    if local is not None:
        return [check_name(local, "--model")]
    parts = model.split("/")
    if len(parts) > 2:
        raise UsageError(
            f"--model {quoted(model)} is no folder here, and no hub id, which is owner/name."
        )
    return [check_name(part, "--model") for part in parts]


def check_name(name: str, flag: str, longest: int = LONGEST_FOLDER) -> str:
    """A name that becomes one folder, or part of a file's name.

    Raises:
        UsageError: it would be no folder, several, a hidden one, or one of ours.
    """
    rule = None
    if not name:
        rule = "is empty (an empty value usually is an unset variable in a script)"
    elif "/" in name or "\\" in name:
        rule = "must be one folder's name, without / and \\"
    elif name.startswith("."):
        rule = "must not begin with a dot"
    elif not name.isprintable():
        rule = "must have printable characters only"
    elif len(os.fsencode(name)) > longest:
        rule = f"must have at most {longest} bytes, but has {len(os.fsencode(name))}"
    elif name.lower() in NOT_RUNS or name in (ARGS_FILE, METRICS_FILE, HISTORY_FILE, LOG_FILE):
        rule = "is a name that runs use for files of their own"
    if rule is not None:
        raise UsageError(f"{flag}: {quoted(name)} names a run's folder and {rule}; choose another.")
    return name


def check_data_set_name(name: str, flag: str) -> str:
    """`check_name`, of what also names a file of predictions."""
    if name in PARTS:
        raise UsageError(
            f"{flag}: {quoted(name)} is what the predictions on held-out rows are called; "
            "choose another name for the data set."
        )
    return check_name(name, flag, LONGEST_DATA_SET)


def predictions_file(data_set: str | None = None) -> str:
    """The file of a shifted data set's predictions, or of the run's own."""
    return f"predictions-{data_set}.safetensors" if data_set else "predictions.safetensors"
