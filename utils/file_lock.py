"""A lock on what one process at a time may write: a file that is held while it does."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from utils.errors import quoted
from utils.logging import logger


class Held(Exception):
    """Another process holds the lock; the message is what it has said of itself."""


class FileLock:
    """Held from `take` to `release`, or as long as the process lives.

    Args:
        file: is there while the lock is held, and says by whom.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor is not None

    def take(self) -> None:
        """Take the lock, unless this object has it.

        Where the file system knows no locks, it is only said that there is none.

        Raises:
            Held: another process has it.
            OSError: the file cannot be made; a link is not followed.
        """
        while self._descriptor is None:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise Held(quoted(holder) if holder else "unknown") from None
            except OSError as error:
                logger.info(
                    "%s cannot be locked (%s): let no other process write there.", self.file, error
                )
            # Whoever held it may have deleted it: then this is a lock that nobody else sees.
            if self._is_of(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            told = f"process {os.getpid()} on {socket.gethostname()}"
            os.pwrite(self._descriptor, told.encode(), 0)

    def release(self) -> None:
        """Let others have it; the file goes, unless it is theirs already."""
        if self._descriptor is None:
            return
        if self._is_of(self._descriptor):
            with suppress(OSError):
                os.unlink(self.file)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_of(self, descriptor: int) -> bool:
        """Whether the file is the one that was opened."""
        try:
            found = os.stat(self.file, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), found)
