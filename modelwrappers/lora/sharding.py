"""FSDP: every process keeps a part of the frozen base model; what is trained stays whole.

The base is where a LoRA run's memory is: adapters, posteriors and heads are a hundredth of it. So
only frozen parameters are sharded (FSDP2, `torch.distributed.fsdp.fully_shard`), layer by layer,
and gathered when a layer is called. Trained parameters are ordinary tensors, whose gradients DDP
synchronises as it does without FSDP; optimizers, KL terms, states and adapter files do not change.
"""

from __future__ import annotations

from collections import Counter

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from utils.errors import UsageError


def shards_base(accelerator) -> bool:
    """Whether this is an FSDP launch of several processes.

    accelerate's launcher says so in the environment; on CPUs its distributed type does not.
    """
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    return accelerator.num_processes > 1 and (is_fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_sharding(args) -> None:
    """Hold the flags against an FSDP launch.

    Raises:
        UsageError: a quantised base: its layers do not take sharded weights. Draws by row: all
            processes gather a layer together, and would need equally many forwards.
    """
    if args.prefix_cache == "on":
        raise UsageError(
            "--prefix-cache on runs forwards of its own, but under FSDP all processes must run "
            "equally many; pass --prefix-cache auto, which leaves it out here."
        )
    if args.draws_adaptive:
        raise UsageError(
            "--draws-adaptive runs more forwards where rows need them, but under FSDP all "
            "processes must run equally many; drop it, or launch without FSDP, e.g. with "
            "configs/accelerate/ddp.yaml."
        )
    if args.quantization != "none":
        raise UsageError(
            f"--quantization {args.quantization} and an FSDP launch do not go together: "
            "bitsandbytes layers do not take sharded weights. A quantised base mostly fits whole: "
            "launch with configs/accelerate/ddp.yaml, or pass --quantization none."
        )
    # transformers would give weights to one process only and leave the others to FSDP1's broadcast.
    disable_fsdp_ram_efficient_loading()


def shard_base(
    model: PreTrainedModel, whole: set[nn.Parameter], device: torch.device, num_processes: int
) -> None:
    """Shard all parameters of `model` but those in `whole`, and move all to `device`.

    Each layer that transformers does not split between devices is one unit that is gathered at
    once; what lies outside of them (embedding, last norm, head) is one more.
    """
    for parameter in whole:  # the others move layer by layer, as they are sharded
        parameter.data = parameter.data.to(device)
    names = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {parameter for parameter, number in names.items() if number > 1}
    mesh = init_device_mesh(device.type, (num_processes,))
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for layer in reversed(layers):  # inner ones first
        if tied.isdisjoint(layer.parameters()):  # a tied weight belongs to one unit: the last one
            fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def sharded_names(module: nn.Module) -> list[str]:
    """Names of the parameters of which this process keeps a part only."""
    return [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
