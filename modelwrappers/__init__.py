"""Methods, by the name that --modelwrapper takes.

To add one: write `modelwrappers/<method>.py` with a subclass of `WrapperBase` that overrides one to
three of its hooks, and add one line to `WRAPPERS`. Or leave the repository alone and pass
`--modelwrapper path/to/file.py:ClassName`.
"""

# ruff: noqa: E402
from __future__ import annotations

import importlib
import sys

from modelwrappers.lora.exact_4bit import deny_avx512bf16

deny_avx512bf16()  # before the first import of PEFT, which imports bitsandbytes

from modelwrappers import wrapperbase
from modelwrappers.blob import BLoB
from modelwrappers.deepensemble import DeepEnsemble
from modelwrappers.laplace import Laplace
from modelwrappers.lora import backbone, stochastic
from modelwrappers.map import MAP
from modelwrappers.mcdropout import MCDropout
from modelwrappers.tfb import TFB
from modelwrappers.wrapperbase import WrapperBase
from utils.errors import UsageError
from utils.registry import lookup

WRAPPERS: dict[str, type[WrapperBase]] = {
    "map": MAP,
    "mle": MAP,
    "mcdropout": MCDropout,
    "deepensemble": DeepEnsemble,
    "blob": BLoB,
    "laplace": Laplace,
    "tfb": TFB,
    "tfblora": TFB,  # the original's names: tfb, and tfb with --tfb-criterion flips
    "tfblora_acc": TFB,
}


# Rooms that had another name in the first design; files of users import them.
_FORMER_NAMES = {"backbone": backbone, "stochastic_lora": stochastic}


def __getattr__(name: str):
    if name in _FORMER_NAMES:
        return _FORMER_NAMES[name]
    if name in ("build_wrapper", "load_posterior"):
        return getattr(importlib.import_module("modelwrappers.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
