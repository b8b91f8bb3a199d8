"""Several processes of one run: what one of them decides for all, and which of them speaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from utils.errors import RunError, UsageError
from utils.interrupts import interrupts

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = 5.0  # seconds


def process_number() -> int:
    """This process's number among those that a launcher has started; 0 is the main one."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isascii() and number.isdigit() else 0


def on_main_process(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act` returns or raises on the main process, on all of them.

    Without it a process would wait for a main one that has ended, and fail in its own way.

    Args:
        accelerator: of this process.
        act: called on the main process only; what it returns is sent to the others.
    Raises:
        UsageError, RunError: what `act` raises, on every process.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [act()]
        except (UsageError, RunError) as error:
            answer = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    if isinstance(answer[0], UsageError | RunError):
        raise answer[0]
    return answer[0]


def is_told_elsewhere() -> bool:
    """Whether this process may end without a word, because the main one has said the same.

    A wrong call is wrong in every process. The launcher ends those that are left once the main one
    has told it; a process that nobody ends within `PATIENCE` is the only one that knows.
    """
    if process_number() == 0:
        return False
    with interrupts.handled():
        try:
            time.sleep(PATIENCE)
        except KeyboardInterrupt:
            return True
    return False


def is_left_alone(error: BaseException) -> bool:
    """Whether an exchange between processes failed because another one has ended."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return False
    of_gloo = "gloo" in str(error) and "peer" in str(error)  # a plain RuntimeError
    return of_gloo or isinstance(error, torch.distributed.DistError)
