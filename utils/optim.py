"""Optimizers and learning-rate schedules from flags."""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

NO_WEIGHT_DECAY = ("bias", "LayerNorm.weight", "norm.weight")


def build_optimizer(
    named_parameters: list[tuple[str, nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-6,
) -> torch.optim.Optimizer:
    """An optimizer over exactly the parameters named.

    Args:
        named_parameters: (name, parameter); biases and norms get no weight decay.
        name: "adamw" (decoupled decay, arXiv 1711.05101), "adam" or "sgd".
        lr: learning rate.
        weight_decay: decay of the weights; with AdamW a Gaussian prior on them.
        eps: epsilon of Adam and AdamW.
    """
    decay = [p for n, p in named_parameters if not n.endswith(NO_WEIGHT_DECAY)]
    no_decay = [p for n, p in named_parameters if n.endswith(NO_WEIGHT_DECAY)]
    groups = [
        {"params": params, "weight_decay": wd}
        for params, wd in ((decay, weight_decay), (no_decay, 0.0))
        if params
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](groups, lr=lr, eps=eps)


def linear_schedule(
    optimizer: torch.optim.Optimizer, num_training_steps: int, warmup_ratio: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup_ratio` of the updates, then linear decay to 0 at the last one.

    The warm-up length is not rounded: the published runs keep the fraction of an update.
    """
    warmup_steps = warmup_ratio * num_training_steps
    return get_linear_schedule_with_warmup(optimizer, warmup_steps, num_training_steps)
