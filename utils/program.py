"""How a program ends: with messages instead of tracebacks for what a user can cause."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from utils.errors import RunError, UsageError, one_line
from utils.interrupts import Interrupted, interrupts
from utils.logging import logger, setup_logging
from utils.processes import is_left_alone, is_told_elsewhere, process_number


def run_program(main: Callable[[], Any], interrupted: str | None = None) -> int:
    """Call `main`, tell what went wrong, and return the exit code.

    Args:
        main: the program.
        interrupted: what Ctrl-C and SIGTERM are answered with; None: what the interruption says.
    """
    try:
        main()
    except (UsageError, RunError) as error:
        _tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except BrokenPipeError as error:  # of the output, mostly; or of a connection of a library's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else exit tries once more
        logger.error("RunError: whoever read what this program writes is gone (%s).", error)
        return RunError.exit_code
    except (MemoryError, RuntimeError, OSError) as error:  # torch's are RuntimeErrors
        if is_left_alone(error):
            _tell("RunError: another process of this run has ended; its message says why.")
        elif (message := exhausted(error)) is not None:
            logger.error("RunError: %s", message)
        else:
            raise
        return RunError.exit_code
    except KeyboardInterrupt as error:
        is_told = isinstance(error, Interrupted)
        if process_number() == 0:
            logger.error("%s", interrupted or (error if is_told else "Interrupted."))
        return error.exit_code if is_told else 130
    return 0


def run_script(
    main: Callable[[Sequence[str]], Any],
    argv: Sequence[str] | None,
    interrupted: str,
    terminal: TextIO | None = None,
) -> int:
    """`run_program` for a script of its own, with messages and signals set up.

    Args:
        main: the script, of its command line.
        argv: that command line; None: the process's.
        interrupted: as in `run_program`.
        terminal: where messages below errors go; None: standard output.
    """
    setup_logging(process_number() == 0, terminal=terminal)
    words = sys.argv[1:] if argv is None else argv
    with interrupts.handled():
        return run_program(lambda: main(words), interrupted)


def _tell(message: str) -> None:
    """The message, once: of several processes the main one's."""
    if not is_told_elsewhere():
        number = process_number()
        logger.error("%s%s", f"Process {number}: " if number else "", message)


def exhausted(error: BaseException) -> str | None:
    """What there was too little of, and what can be done; None for any other error."""
    told = one_line(str(error).partition(".")[0])[:300]
    if isinstance(error, OSError):
        full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        return f"the disk is full ({told}). Free some space." if error.errno in full else None
    is_cpus = isinstance(error, MemoryError) or "CPUAllocator" in str(error)
    if is_cpus:
        return (
            f"this machine's memory is full ({told or 'MemoryError'}). Lower --batch-size, "
            "--eval-batch-size or --max-seq-len, or take a smaller --model; --resume goes on from "
            "the last state, if there is one."
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({told}). Lower --batch-size or --eval-batch-size, or pass "
            "--gradient-checkpointing or --quantization 4bit; --resume goes on from the last "
            "state, if there is one."
        )
    return None
