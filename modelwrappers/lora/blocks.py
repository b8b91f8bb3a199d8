"""The transformer blocks of a model: where they are, and which of them --lora-layers means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from utils.errors import UsageError


class Blocks(NamedTuple):
    """The stack of blocks that makes up most of a transformer.

    Attributes:
        name: of the list in the model, such as "model.layers" or "bert.encoder.layer".
        modules: the blocks, in the order in which they are applied.
    """

    name: str
    modules: nn.ModuleList

    @property
    def pattern(self) -> str:
        """What stands before a block's number in the names of its layers."""
        return self.name.rpartition(".")[2]

    def number_of(self, name: str) -> int | None:
        """The block that a module of this name lies in; None outside of them."""
        match = re.match(r"(\d+)(\.|$)", name.removeprefix(f"{self.name}."))
        return int(match[1]) if match and name.startswith(f"{self.name}.") else None


def find_blocks(model: nn.Module) -> Blocks | None:
    """The list of modules with the most parameters that lies in no other list.

    A mixture of experts has lists within its blocks; small lists, such as those of adapters, may
    stand beside.
    """
    found = list(_outermost_lists(model, ""))
    if not found:
        return None
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.modules.parameters()))


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[Blocks]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield Blocks(f"{prefix}{name}", child)
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def chosen_blocks(text: str, depth: int) -> list[int]:
    """The blocks that --lora-layers names, in ascending order.

    Args:
        text: "all", "last:K", or numbers and ranges from 0 on: "0,4,20-29" (the flag's type has
            checked its form).
        depth: number of blocks.
    Raises:
        UsageError: there are not so many.
    """
    if text == "all":
        return list(range(depth))
    kind, _, number = text.partition(":")
    if kind == "last":
        first, last = depth - int(number), depth - 1
        chosen = set(range(max(first, 0), depth))
    else:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        first, last = min(r[0] for r in ranges), max(r[-1] for r in ranges)
        chosen = {i for r in ranges for i in range(r[0], min(r[-1], depth) + 1)}
    if first < 0 or last >= depth:
        raise UsageError(
            f"--lora-layers {text}: the model has {depth} blocks, 0 to {depth - 1}; choose among "
            f"those, e.g. last:{max(1, depth // 2)}."
        )
    return sorted(chosen)


def shown_blocks(numbers: Iterable[int]) -> str:
    """Block numbers as --lora-layers takes them: "0,4,20-29"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
