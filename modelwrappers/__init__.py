"""Methods, by the name that --modelwrapper takes.

To add one: write `modelwrappers/<method>.py` with a subclass of `WrapperBase` that overrides one to
three of its hooks, and add one line to `WRAPPERS`. Or leave the repository alone and pass
`--modelwrapper path/to/file.py:ClassName`.
"""

from __future__ import annotations

import sys

from modelwrappers import wrapperbase
from modelwrappers.backbone import adapter_folder, load_model, lora_config
from modelwrappers.map import MAP
from modelwrappers.wrapperbase import WrapperBase
from utils.errors import UsageError
from utils.registry import lookup

WRAPPERS: dict[str, type[WrapperBase]] = {
    "map": MAP,
    "mle": MAP,
}


def get_wrapper(name: str) -> type[WrapperBase]:
    """The class for --modelwrapper.

    Raises:
        UsageError: an unknown name, or a file whose class is no `WrapperBase`.
    """
    # Files written for the original code say `from wrapperbase import WrapperBase`.
    sys.modules.setdefault("wrapperbase", wrapperbase)
    cls = lookup(WRAPPERS, name, "method")
    if not (isinstance(cls, type) and issubclass(cls, WrapperBase)):
        raise UsageError(f"--modelwrapper {name}: it must be a subclass of WrapperBase.")
    return cls


def build_wrapper(args, num_labels: int, accelerator) -> WrapperBase:
    """Base model, LoRA layers and method, as the flags say; with --load-lora-path's weights."""
    model = load_model(args, num_labels, accelerator.device)
    wrapper = get_wrapper(args.modelwrapper)(model, lora_config(args, model), args, accelerator)
    wrapper.to(accelerator.device)
    if args.load_lora_path is not None:
        wrapper.load_adapter_weights(adapter_folder(args))
    return wrapper
