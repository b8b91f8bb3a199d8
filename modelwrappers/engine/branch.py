"""The branch: what lies before the first noisy module is the same for all copies, and runs once.

N draws are one forward of a batch that is stacked N times. Stacking the inputs would run the
embedding and every block without noise N times for the same numbers. Here the batch goes in as it
is, and is repeated in front of the first block in which copies differ: the hidden states there, and
masks, positions and whatever else follows the batch in front of that block and of those behind it.

Nothing is known of architectures. A small batch of two rows, and one of three, show which modules
are called in which order and which arguments have a size that follows the number of rows; and the
branched logits must equal those of stacked inputs, or inputs are stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.errors import RunError
from utils.logging import logger

if TYPE_CHECKING:
    from modelwrappers.engine.logits import ClassLogits
    from modelwrappers.engine.prediction import Batch

Path = tuple[Any, ...]  # to an argument: position or name, then what leads to a tensor inside of it
PROBE_TOKENS = 8
TOLERANCE = 0.05  # of the spread of logits: rounding is far below, a mistaken mask far above


class Branch:
    """Where the copies of a batch begin to differ, in one model.

    Args:
        gates: modules in front of which a batch is repeated; those behind the first get what is
            repeated already, but for masks and the like.
        sizes: for each gate the arguments that follow the batch, and how many of their rows (of
            the first dimension) belong to one of the batch.
        depth: blocks in front of the first gate.
    """

    def __init__(self, gates: list[nn.Module], sizes: list[dict[Path, int]], depth: int) -> None:
        self.gates = gates
        self.sizes = sizes
        self.depth = depth

    @contextmanager
    def repeating(self, rows: int, copies: int) -> Iterator[None]:
        """Context in which a batch of `rows` rows is repeated `copies` times at the gates."""
        handles = []
        for gate, sizes in zip(self.gates, self.sizes, strict=True):

            def repeat(module, args, kwargs, sizes=sizes):
                def repeated(path: Path, value: Tensor) -> Tensor:
                    per_row = sizes.get(path)
                    if per_row is None or value.shape[0] != rows * per_row:
                        return value
                    return torch.cat([value] * copies)

                arguments = _mapped((args, kwargs), repeated)
                return arguments[0], arguments[1]

            handles.append(gate.register_forward_pre_hook(repeat, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mapped(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A nest of tuples, lists and dicts with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return change(path, value) if value.dim() else value
    if isinstance(value, tuple | list):
        items = (_mapped(item, change, (*path, i)) for i, item in enumerate(value))
        is_plain = type(value) in (tuple, list)
        return type(value)(items) if is_plain else type(value)(*items)  # named tuples
    if type(value) is dict:
        return {key: _mapped(item, change, (*path, key)) for key, item in value.items()}
    return value


def find_branch(wrapper: ClassLogits, batch: Batch) -> Branch | None:
    """The branch of a wrapper's model; None where it has none that saves something.

    Args:
        wrapper: with `noisy_modules`, `transformer_blocks` and `batch_logits`.
        batch: inputs such as the model will get.
    """
    noisy, blocks = wrapper.noisy_modules(), wrapper.transformer_blocks()
    if not noisy or not blocks or not set(noisy).isdisjoint(blocks[0].modules()):
        return None
    try:
        probe = _probe(wrapper, batch)
        with torch.no_grad(), wrapper.sampling(0):
            order: list[tuple[str, int]] = []
            watched = [("noise", module) for module in noisy]
            watched += [("block", module) for module in blocks]
            with _watching(watched, order):
                expected = wrapper.batch_logits(probe)
            gates = _gates(order, noisy, blocks)
            if gates is None:
                return None
            two, three = (
                _sizes(wrapper, {key: value[:rows] for key, value in probe.items()}, gates)
                for rows in (2, 3)
            )
            sizes = [_following(a, b) for a, b in zip(two, three, strict=True)]
            depth = blocks.index(gates[0]) if gates[0] in blocks else len(blocks)
            branch = Branch(gates, sizes, depth)
            with branch.repeating(3, 2):
                branched = wrapper.batch_logits(probe)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError | RunError):
            raise
        return _stacked()  # inputs of another form, or something that counts the inputs' rows
    twice = torch.cat([expected, expected]).float()
    spread = (twice.max() - twice.min()).clamp(min=1e-6)
    if branched.shape != twice.shape:
        return _stacked()
    is_right = (branched.float() - twice).abs().max() <= TOLERANCE * spread
    return branch if is_right else _stacked()


def _stacked() -> None:
    logger.info("Draws are stacked at the input: this architecture cannot be branched.")


def _gates(
    order: list[tuple[str, int]], noisy: list[nn.Module], blocks: list[nn.Module]
) -> list[nn.Module] | None:
    """Where copies have to be made, given the order in which modules were called.

    The block with the first noisy module and those behind it; or, where the noise lies behind all
    blocks, the noisy modules themselves. None where it begins before the first block.
    """
    first = next((i for i, (kind, _) in enumerate(order) if kind == "noise"), None)
    before = [number for kind, number in order[:first] if kind == "block"] if first else []
    if not before:
        return None
    inside = set(blocks[before[-1]].modules())
    if noisy[order[first][1]] in inside:
        return blocks[before[-1] :]
    is_behind = not any(kind == "block" for kind, _ in order[first:])
    return noisy if is_behind else None


@contextmanager
def _watching(
    modules: Iterable[tuple[str, nn.Module]], order: list[tuple[str, int]]
) -> Iterator[None]:
    """Context that writes the calls of modules into `order`, by kind and number within it."""
    counts: dict[str, int] = {}
    handles = []
    for kind, module in modules:
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        handles.append(
            module.register_forward_pre_hook(lambda *_, what=(kind, number): order.append(what))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(wrapper: ClassLogits, probe: Batch, gates: list[nn.Module]) -> list[dict[Path, int]]:
    """The first dimension of every tensor that each gate is called with."""
    found: list[dict[Path, int]] = [{} for _ in gates]
    handles = []
    for gate, sizes in zip(gates, found, strict=True):

        def note(module, args, kwargs, sizes=sizes) -> None:
            def noted(path: Path, value: Tensor) -> Tensor:
                sizes[path] = value.shape[0]
                return value

            _mapped((args, kwargs), noted)

        handles.append(gate.register_forward_pre_hook(note, with_kwargs=True))
    try:
        wrapper.batch_logits(probe)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _following(two: dict[Path, int], three: dict[Path, int]) -> dict[Path, int]:
    """Of tensors in a batch of two and of three rows those whose size follows the rows."""
    return {
        path: size // 2
        for path, size in two.items()
        if size % 2 == 0 and three.get(path) == size // 2 * 3
    }


def _probe(wrapper: ClassLogits, batch: Batch) -> Batch:
    """Three short rows that differ, one of them padded, from the first row of a batch."""
    mask = batch.get("attention_mask")
    width = batch["input_ids"].shape[-1]
    kept = slice(-PROBE_TOKENS, None) if wrapper.is_causal else slice(0, PROBE_TOKENS)
    probe = {}
    for key, value in batch.items():
        row = value[:1]
        if value.dim() == 2 and value.shape[-1] == width:
            row = row[:, kept]
        probe[key] = row.repeat(3, *[1] * (row.dim() - 1)).clone()
    ids = probe["input_ids"]
    ids[1], ids[2] = ids[1].flip(0), ids[2].roll(1, 0)
    if mask is not None:
        own = torch.ones_like(probe["attention_mask"])
        if own.shape[-1] > 1:
            own[1, 0 if wrapper.is_causal else -1] = 0
        probe["attention_mask"] = own
    if "position_ids" in probe and mask is not None:
        probe["position_ids"] = wrapper.positions(probe["attention_mask"])
    return probe
