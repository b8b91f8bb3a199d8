"""What the terminal says, kept in the run's log.txt as well; trackers; the process's name."""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from utils.errors import UsageError, one_line, printable, quoted

logger = logging.getLogger("bayesian_peft")
MOST_KEPT = 10_000  # records, for a log file that is not there yet
LONGEST_TITLE = 200  # characters of the process's name
LONGEST_TRACKED = 128  # of wandb's names


def setup_logging(
    is_main_process: bool, log_file: Path | None = None, terminal: TextIO | None = None
) -> None:
    """Messages go to the terminal and, once it is known, to the run's log file.

    Args:
        is_main_process: of this process.
        log_file: of the run.
        terminal: where messages below errors go; None: standard output.

    Only the main process speaks below warnings. What it has said since the last call without a file
    is written there first.
    """
    memory = _Memory()
    if log_file is not None:
        memory = next((h for h in logger.handlers if isinstance(h, _Memory)), memory)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    messages = _Terminal(sys.stdout if terminal is None else terminal)
    messages.addFilter(lambda record: record.levelno < logging.ERROR)
    errors = _Terminal(sys.stderr)
    errors.setLevel(logging.ERROR)
    for handler in (messages, errors):
        handler.setFormatter(_Formatter("%(message)s"))
        logger.addHandler(handler)
    if log_file is not None and is_main_process:
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
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
    """Keeps records for a file that is not there yet, the first `MOST_KEPT` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) < MOST_KEPT:
            self.records.append(record)


class _Formatter(logging.Formatter):
    """Records that no name or path in them can forge, hide or colour.

    What a terminal would obey is written as `\\x1b` and so on. Lines after a record's first are
    indented: a line that is not begins a record.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n  ")


class _Terminal(logging.StreamHandler):
    """Never fails for a letter that the terminal does not know."""

    def format(self, record: logging.LogRecord) -> str:
        return writable(super().format(record), self.stream)


def writable(text: str, stream: Any) -> str:
    """The text with what a stream's encoding lacks written as `\\u2020` and so on."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def quiet_libraries() -> None:
    """Leave out what transformers says of every model: load reports, its own deprecations.

    It imports transformers, so it is not for calls that may turn out to be wrong.
    """

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


def check_tracker(args) -> None:
    """What wandb would refuse, or fail on, after the model is loaded.

    Raises:
        UsageError: a name that it does not take.
    """
    if args.tracker != "wandb":
        return
    for flag in ("wandb_entity", "wandb_project", "wandb_name"):
        value = getattr(args, flag) or ""
        wrong = re.search(r"[/\\#?%:]", value) if flag == "wandb_project" else None
        if wrong or len(value) > LONGEST_TRACKED or value != one_line(value):
            raise UsageError(
                f"--{flag.replace('_', '-')} is {quoted(value)}; wandb takes up to "
                f"{LONGEST_TRACKED} printable characters, and in a project's name none of /\\#?%:. "
                "Pass another, or --tracker none."
            )


def init_tracker(accelerator, args, folder: Path) -> None:
    """Start the experiment tracker that `--tracker` names, inside the run's folder.

    wandb never asks: without credentials it records offline, and one line says so.

    Raises:
        UsageError: a name that wandb does not take.
    """
    check_tracker(args)
    if args.tracker == "none":
        if not args.nowand and "tracker" not in args.given:
            notice_once(
                "No tracker: wandb is not set up here. --tracker wandb records without it, offline."
            )
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
            "name": args.wandb_name or one_line(folder.name)[:LONGEST_TRACKED],
            "dir": str(folder),
            **mode,
        }
    project = args.wandb_project if args.tracker == "wandb" else "tensorboard"
    config = {
        key: value if isinstance(value, int | float | bool) else one_line(str(value))
        for key, value in args.as_dict().items()
    }
    accelerator.init_trackers(project, config=config, init_kwargs=init_kwargs)


def wandb_is_set_up() -> bool:
    """Whether somebody has told wandb on this machine who they are, or how to record.

    Looked up where wandb itself does, without the second that its import takes.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return mode != "disabled"
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"))
    files = [folder / "settings", Path(os.environ.get("WANDB_DIR", ".")) / "wandb" / "settings"]
    settings = configparser.ConfigParser(interpolation=None)
    for file in files:
        with suppress(OSError, RuntimeError, ValueError, configparser.Error):
            settings.read(file.expanduser(), encoding="utf-8")
    said = settings["default"] if settings.has_section("default") else {}
    if any(said.get(key) for key in ("api_key", "entity", "project", "mode")):
        return said.get("mode") != "disabled"
    base = os.environ.get("WANDB_BASE_URL") or said.get("base_url") or "https://api.wandb.ai"
    for file in [os.environ.get("NETRC")] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, RuntimeError, ValueError, netrc.NetrcParseError):
            if urlsplit(base).netloc in netrc.netrc(Path(file).expanduser()).hosts:
                return True
    return False


def _wandb_has_credentials() -> bool:
    if os.environ.get("WANDB_MODE") in {"offline", "disabled"} or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return wandb.login(prompt=False)


def name_process(args) -> None:
    """Show model, data set and method in `ps` and `nvidia-smi`."""
    import setproctitle

    title = f"bayesian-peft {args.modelwrapper} {args.model} {args.dataset}"
    setproctitle.setproctitle(one_line(title[:LONGEST_TITLE]))
