"""A GPU for tests on a machine without one: tensors that say they are on `cuda:0`, with values.

The meta device has no values, so nothing runs there that looks at one: a loss that must be finite,
the search of TFB, `eigh` and the evidence of Laplace, the metrics. Here each tensor "on the GPU"
holds one of the CPU that operations really run on, and an operation that gets tensors of both sides
raises, as it does with CUDA. So the whole path of a run is tested, from flags to files.

As with CUDA a tensor without dimensions may come from the CPU, and so may the indices of a tensor.
Nothing is said here of CUDA's kernels, of its random numbers, or of speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _OnGpu(Tensor):
    """A tensor that says it is on the GPU; to PyTorch's kernels it is one of the meta device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> _OnGpu:
        outer = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        outer.inner = inner
        return outer

    is_meta = False

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def __getitem__(self, index):
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index, value) -> None:
        super().__setitem__(_with_tensors(index), value)

    def tolist(self) -> Any:  # PyTorch's own refuses subclasses
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the pretended GPU outside of pretended_gpu()")


def _with_tensors(index):
    """Lists in an index as tensors: PyTorch would make them behind the mode's back, on meta."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index, device=GPU) if isinstance(index, list) else index


class _Placement(TorchDispatchMode):
    """Runs every operation on the CPU, and sees to it that its tensors are all on one side."""

    makes_model = False  # within `with torch.device("meta")`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, _OnGpu)]
        here = [t for t in tensors if not isinstance(t, _OnGpu) and t.dim()]
        assert not there or not any(t.is_meta for t in here), f"{func} got one of the meta device"
        if there and here and func not in _MOVES and not _is_index(func, args):
            raise RuntimeError(
                f"expected all tensors to be on the same device: {func} got one of shape "
                f"{tuple(here[0].shape)} on the CPU and one of {tuple(there[0].shape)} on the GPU"
            )
        goes_there = bool(there)
        inner_args, inner_kwargs = tree_map_only(_OnGpu, lambda t: t.inner, (args, kwargs))
        if func is torch.ops.aten.copy_.default:
            goes_there = isinstance(args[0], _OnGpu)
        elif (asked := kwargs.get("device")) is not None:
            # Kernels ask for what they need beside a tensor over there on the device that they see.
            # A model is really made on meta, before it is loaded.
            goes_there = asked.type == "cuda" or (asked.type == "meta" and not self.makes_model)
            inner_kwargs = inner_kwargs | ({"device": CPU} if goes_there else {})
        out = func(*inner_args, **inner_kwargs)
        if not goes_there:
            return out
        out = tree_map_only(Tensor, _OnGpu, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _is_index(func, args) -> bool:
    indexes = "index" in func._schema.name and isinstance(args[0], _OnGpu)
    lists = [arg for arg in args[1:] if isinstance(arg, list | tuple)]
    others = [arg for arg in args[1:] if isinstance(arg, Tensor)]
    return indexes and bool(lists) and all(isinstance(t, _OnGpu) or not t.dim() for t in others)


def _no_grad(mode: bool = True) -> AbstractContextManager:
    return torch.no_grad() if mode else nullcontext()


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Context in which `cuda` is a device, and the one that a run takes."""
    from accelerate import Accelerator

    def within(self, func, types, args=(), kwargs=None):
        before, placement.makes_model = placement.makes_model, self.device.type == "meta"
        try:
            return make(self, func, types, args, kwargs)
        finally:
            placement.makes_model = before

    placement, generator = _Placement(), torch.Generator
    make = DeviceContext.__torch_function__
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "device", GPU)
        patch.setattr(DeviceContext, "__torch_function__", within)
        # in inference mode a slice of a parameter would have to be made by the kernels themselves
        patch.setattr(torch, "inference_mode", _no_grad)
        patch.setattr(torch, "Generator", lambda device=None: generator())
        for name, value in {
            "_lazy_init": None,
            "manual_seed_all": None,
            "reset_peak_memory_stats": None,
            "max_memory_allocated": 0,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": None,
        }.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # `Module.to` of a subclass
        # `torch.tensor(values, device=...)`: to make it on the CPU, and send it by way of the mode
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with placement:
                yield GPU
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_swap_module_params_on_conversion(swaps)
