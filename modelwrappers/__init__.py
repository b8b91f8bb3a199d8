"""Methods, by the name that --modelwrapper takes.

To add one: write `modelwrappers/<method>.py` with a subclass of `WrapperBase` that overrides one to
three of its hooks, and add one line to `WRAPPERS`. Or leave the repository alone and pass
`--modelwrapper path/to/file.py:ClassName`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwrappers.lora.exact_4bit import delay_bitsandbytes, deny_avx512bf16
from utils.catalogue import Catalogue, read_catalogue
from utils.errors import UsageError
from utils.registry import LazyTable, find_key, lookup, names_code

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase

deny_avx512bf16()  # before anything of ours imports PEFT, which imports bitsandbytes

WRAPPERS = LazyTable(
    {
        "map": "modelwrappers.map:MAP",
        "mle": "modelwrappers.map:MAP",
        "mcdropout": "modelwrappers.mcdropout:MCDropout",
        "deepensemble": "modelwrappers.deepensemble:DeepEnsemble",
        "blob": "modelwrappers.blob:BLoB",
        "laplace": "modelwrappers.laplace:Laplace",
        "tfb": "modelwrappers.tfb:TFB",
        # the original's names: tfb, and tfb with --tfb-criterion flips
        "tfblora": "modelwrappers.tfb:TFB",
        "tfblora_acc": "modelwrappers.tfb:TFB",
    }
)
# What `from modelwrappers import ...` imports when it is asked for: the classes by their own names,
# and the ways to a wrapper.
_EXPORTED = LazyTable(
    {
        place.rpartition(":")[2]: place
        for place in (
            *WRAPPERS.data.values(),
            "modelwrappers.wrapperbase:WrapperBase",
            "modelwrappers.loading:build_wrapper",
            "modelwrappers.loading:load_posterior",
        )
    }
)
# Rooms that had another name in the first design; files of users import them.
_FORMER_NAMES = {
    "backbone": "modelwrappers.lora.backbone",
    "stochastic_lora": "modelwrappers.lora.stochastic",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTED:
        return _EXPORTED[name]
    if name in _FORMER_NAMES:
        return importlib.import_module(_FORMER_NAMES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def catalogue() -> Catalogue:
    """What is known of the methods without importing them."""
    return read_catalogue(WRAPPERS, Path(__file__).parent)


def check_method_name(name: str) -> None:
    """Look a method up without importing it, as far as that goes.

    Raises:
        UsageError: an unknown name.
    """
    if not names_code(name):
        find_key(WRAPPERS, name, "method")


def get_wrapper(name: str) -> type[WrapperBase]:
    """The class for --modelwrapper.

    Raises:
        UsageError: an unknown name, or a file whose class is no `WrapperBase`.
    """
    check_method_name(name)
    delay_bitsandbytes()
    from modelwrappers import wrapperbase

    # Files written for the original code say `from wrapperbase import WrapperBase`.
    sys.modules.setdefault("wrapperbase", wrapperbase)
    cls = lookup(WRAPPERS, name, "method")
    if not (isinstance(cls, type) and issubclass(cls, wrapperbase.WrapperBase)):
        raise UsageError(f"--modelwrapper {name}: it must be a subclass of WrapperBase.")
    return cls
