"""4-bit layers compute the same on every CPU: bitsandbytes' fused kernel is never used.

On a CPU with AVX512-BF16 bitsandbytes (0.49 to 0.50) treats 4-bit layers in another way than
everywhere else. While it is imported it asks the package `kernels` to download a kernel from the
hub and to run it, and logs a warning if that fails. And outside of training `Linear4bit.forward`
repacks the weights for that kernel: it raises for small shapes, rounds the scales to bfloat16 for
all others, and leaves weights that cannot be trained any more. What is evaluated would not be the
model that was trained, and its metrics would depend on the machine.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

# The attribute of a `Linear4bit` that its forward looks at.
SWITCH = "support_avx512bf16_for_cpu"
_DETECTOR = "has_avx512bf16"


class _WithoutAvx512Bf16(MetaPathFinder):
    """Finds `bitsandbytes.functional` as always; once it is executed, its detector says no.

    The rest of bitsandbytes takes the detector from there while it is imported itself, which is
    too early for anything that patches a library after its import.
    """

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != "bitsandbytes.functional":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_deny(module: ModuleType) -> None:
                execute(module)
                if hasattr(module, _DETECTOR):
                    setattr(module, _DETECTOR, lambda: False)

            spec.loader.exec_module = execute_and_deny
        return spec


def deny_avx512bf16() -> None:
    """Let bitsandbytes, when it is imported, take this for a CPU without AVX512-BF16.

    To be called before the first import of PEFT, which imports bitsandbytes. Then nothing is
    downloaded and no warning is due, whatever the CPU. Where bitsandbytes is there already it is
    too late for that; `use_exact_4bit` still holds.
    """
    sys.meta_path.insert(0, _WithoutAvx512Bf16())


class _Delayed(ModuleType):
    """A module whose code runs when somebody looks into it.

    `importlib.util.LazyLoader` would not do: its modules run at any question, and `inspect` asks
    every module for its file while torch is imported, when bitsandbytes cannot be.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__version__", "__all__"):
            raise AttributeError(name)  # what tools ask of every module there is
        spec = self.__spec__
        self.__class__ = ModuleType
        self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, name)


def delay_bitsandbytes() -> None:
    """Let bitsandbytes be imported by whoever looks into it, not by whoever names it.

    PEFT names it while it is imported itself, and bitsandbytes takes as long as torch, because it
    imports torch's compiler. A call that turns out to be wrong, or asks for a method's flags, never
    looks into it. Where it is there already, nothing happens.
    """
    if "bitsandbytes" in sys.modules or (spec := find_spec("bitsandbytes")) is None:
        return
    module = _Delayed(spec.name)
    module.__spec__, module.__file__ = spec, spec.origin
    module.__loader__, module.__package__ = spec.loader, spec.name
    sys.modules[spec.name] = module  # without __path__: who imports a part of it looks into it


def use_exact_4bit(model: nn.Module) -> None:
    """Keep all 4-bit layers of a model off the fused kernel of the CPU, for good.

    The switch is an attribute of the layer: it stays with it through `.to`, `copy.deepcopy`, PEFT's
    wrapping and merging. On a GPU it means nothing. Layers of versions without it are left alone.

    Raises:
        UsageError: a layer has been repacked already, by a forward outside of training.
    """
    for name, module in model.named_modules():
        if not hasattr(module, SWITCH):
            continue
        quant_state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise UsageError(
                f"the 4-bit layer {name} has been used on this CPU, and bitsandbytes has rounded "
                "its scales to bfloat16 for that; load the model again and hand it over unused."
            )
        setattr(module, SWITCH, False)
