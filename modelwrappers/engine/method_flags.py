"""Flags that every method has, against what the chosen one can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelwrappers.engine.adaptive import FIRST_STAGE
from utils.errors import UsageError

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase


def check_method_flags(cls: type[WrapperBase], args) -> None:
    """Settle --calibrate auto, and refuse what the method cannot follow.

    Args:
        cls: the method, whose `check_arguments` has run.
        args: flags.
    Raises:
        UsageError: a flag that the method cannot follow, or two that contradict for it.
    """
    tunes = cls.tunes_on_held_out(args)
    if args.calibrate == "auto":
        args.calibrate = "half" if tunes else "all"
    if args.calibrate != "no" and args.draws_adaptive:
        raise UsageError(
            f"--calibrate {args.calibrate}: sets and risks are promised for a fixed number of "
            "draws, but --draws-adaptive gives rows different ones; drop one of them."
        )
    if args.calibrate == "all" and tunes:
        raise UsageError(
            "--calibrate all takes all held-out rows, but a temperature, a prior precision or "
            "a noise is chosen by them, too; pass --calibrate half, or auto."
        )
    if args.draws_adaptive and args.bayes_eval_n_samples_final <= FIRST_STAGE:
        raise UsageError(
            f"--draws-adaptive looks at a row for the first time after {FIRST_STAGE} draws, "
            f"but --bayes-eval-n-samples-final is {args.bayes_eval_n_samples_final}; raise "
            "that, or drop --draws-adaptive."
        )
    for flag, is_asked, obstacle in (
        ("--prefix-cache on", args.prefix_cache == "on", cls.prefix_obstacle),
        ("--draws-adaptive", args.draws_adaptive, cls.adaptive_obstacle),
    ):
        if is_asked and (reason := obstacle(args)) is not None:
            raise UsageError(f"{flag} and --modelwrapper {args.modelwrapper}: {reason}.")
