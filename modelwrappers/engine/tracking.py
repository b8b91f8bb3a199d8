"""Numbers of a run for the experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase


def track(wrapper: WrapperBase, values: Mapping[str, Any]) -> None:
    """Send numbers to accelerate's trackers and the user's own; nested ones as `outer/inner`."""
    flat = {
        key if not isinstance(value, dict) else f"{key}/{inner}": number
        for key, value in values.items()
        for inner, number in (value if isinstance(value, dict) else {"": value}).items()
    }
    if wrapper.accelerator.trackers:
        wrapper.accelerator.log(flat, step=wrapper.global_step)
    if wrapper.wandb_logger is not None and wrapper.accelerator.is_main_process:
        wrapper.wandb_logger.log(flat)
