"""What the terminal says, kept in the run's log.txt as well; trackers; the process's name."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("bayesian_peft")


def setup_logging(is_main_process: bool, log_file: Path | None = None) -> None:
    """Messages go to the terminal and, once it is known, to the run's log file.

    Only the main process speaks below warnings. What it has said since the last call without a file
    is written there first.
    """
    _quiet_libraries()
    memory = _Memory()
    if log_file is not None:
        memory = next((h for h in logger.handlers if isinstance(h, _Memory)), memory)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.ERROR)
    for handler in (terminal, errors):
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if log_file is not None and is_main_process:
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in memory.records:
            file.handle(record)
        logger.addHandler(file)
    logger.addHandler(memory)


class _LogFile(logging.FileHandler):
    """A log file that cannot grow costs its lines, not the terminal: one line says so there."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"{self.baseFilename} cannot grow: {error}", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # what could not be written cannot be written now
            super().close()


class _Memory(logging.Handler):
    """Keeps records for a file that is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _quiet_libraries() -> None:
    """Leave out what transformers says of every model: load reports, its own deprecations."""
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


_told: set[str] = set()


def notice_once(message: str) -> None:
    """Say it the first time only."""
    if message not in _told:
        _told.add(message)
        logger.info(message)


def init_tracker(accelerator, args, folder: Path) -> None:
    """Start the experiment tracker that `--tracker` names, inside the run's folder.

    wandb never asks: without credentials it records offline, and one line says so.
    """
    if args.tracker == "none":
        return
    init_kwargs: dict[str, Any] = {}
    if args.tracker == "wandb" and accelerator.is_main_process:
        mode = {}
        if not _wandb_has_credentials():
            mode["mode"] = "offline"
            logger.info(
                "wandb has no credentials: this run is recorded offline under "
                f"{folder / 'wandb'}; `wandb login` once, or `wandb sync` it later."
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        init_kwargs["wandb"] = {
            "entity": args.wandb_entity,
            "name": args.wandb_name or folder.name,
            "dir": str(folder),
            **mode,
        }
    project = args.wandb_project if args.tracker == "wandb" else "tensorboard"
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in args.as_dict().items()
    }
    accelerator.init_trackers(project, config=config, init_kwargs=init_kwargs)


def _wandb_has_credentials() -> bool:
    if os.environ.get("WANDB_MODE") in {"offline", "disabled"} or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return wandb.login(prompt=False)


def name_process(args) -> None:
    """Show model, data set and method in `ps` and `nvidia-smi`."""
    import setproctitle

    setproctitle.setproctitle(f"bayesian-peft {args.modelwrapper} {args.model} {args.dataset}")
