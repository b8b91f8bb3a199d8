"""The commit of this code, for the record of what made a number."""

from __future__ import annotations

import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """The full hash, with "-dirty" where files were changed since; None outside of a git clone."""
    # Else git refreshes its index, and leaves a lock behind if it is killed with the run.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "describe"]
    git += ["--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
