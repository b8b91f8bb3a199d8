"""The lock of runs and of outputs (utils/file_lock.py)."""

import fcntl
import os

import pytest

from utils.file_lock import FileLock, Held
from utils.logging import logger


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.take()
    first.take()  # it has it
    with pytest.raises(Held, match=f"^'process {os.getpid()} on "):
        second.take()
    assert first.is_held and not second.is_held
    first.release()
    assert not (tmp_path / "lock").exists()
    second.take()
    assert second.is_held


def test_whoever_lets_go_late_leaves_the_next_ones_lock(tmp_path):
    """The folder with the first lock in it was deleted before it was released."""
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.take()
    (tmp_path / "lock").unlink()
    second.take()
    first.release()
    assert (tmp_path / "lock").exists()
    with pytest.raises(Held):
        first.take()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        FileLock(tmp_path / "lock").take()
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_is_told_of_and_written(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError("Function not implemented")

    told = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(logger, "info", lambda text, *values: told.append(text % values))
    lock = FileLock(tmp_path / "lock")
    lock.take()
    assert lock.is_held and "cannot be locked (Function not implemented)" in told[0]
