"""The two ways in which a run can fail for a reason that a person should read.

A message gives the value that was found, the rule that it breaks, and what to do about it.
`main.py` prints it without a traceback and exits with `exit_code`.
"""


class UsageError(ValueError):
    """The call cannot work as it was made: a flag, a file, a model or a data row is wrong."""

    exit_code = 2


class RunError(RuntimeError):
    """The call was fine, but the run failed: the loss became NaN, the disk is full, and so on."""

    exit_code = 1
