"""Which rows come in which batch, on every process, and how they become one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from utils.seeding import mix_seed


def seeded_order(number: int, purpose: str, seed: int) -> list[int]:
    """A permutation that depends on its arguments only."""
    generator = torch.Generator().manual_seed(mix_seed(purpose, seed))
    return torch.randperm(number, generator=generator).tolist()


class TrainBatches(Sampler[list[int]]):
    """The batches of one epoch for this process: a permutation seeded by (seed, epoch).

    All processes draw the same permutation and take every `num_processes`-th row of each global
    batch. The last global batch is filled up from the permutation's start until the processes have
    equally many rows. `first_batch` lets a resumed run begin inside an epoch without reading what
    it has seen.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.shuffle = shuffle
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        self.first_batch = 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate `epoch` next, from its batch `first_batch` on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return -(-self.num_rows // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix_seed("training order", self.seed, self.epoch))
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        if not self.shuffle:
            order = list(range(self.num_rows))
        missing = -len(order) % self.num_processes
        order += (order * self.num_processes)[:missing]
        step = self.batch_size * self.num_processes
        for start in range(self.first_batch * step, len(order), step):
            yield order[start : start + step][self.rank :: self.num_processes]


class Batches(DataLoader):
    """Batches of a data set, and the answers that they are about.

    Attributes:
        target_ids: (C,) answer tokens of a causal LM; None for a classifier.
    """

    def __init__(self, target_ids: Tensor | None, *args, **kwargs) -> None:
        self.target_ids = target_ids
        super().__init__(*args, **kwargs)


class EvalBatches(Sampler[list[int]]):
    """Batches of rows of similar length, the longest first, shared out over the processes.

    A batch holds the same rows however many processes there are, so noise that is seeded by a
    batch's first row gives the same predictions on one process and on many. Where the batches do
    not divide evenly, some process runs the last one a second time (sharded models need equally
    many forwards everywhere); predictions are put back by row index, so nothing counts twice.
    """

    def __init__(
        self, lengths: list[int], batch_size: int, rank: int = 0, num_processes: int = 1
    ) -> None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.rank = rank
        self.num_processes = num_processes

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            yield self.batches[min(i * self.num_processes + self.rank, len(self.batches) - 1)]


def padded(
    examples: Sequence[Mapping[str, Any]], fill: int, side: str, least: int = 0
) -> dict[str, Tensor]:
    """Examples as one batch, token lists padded to the longest's length.

    Args:
        examples: token lists (T,) and numbers, the same keys in each.
        fill: the token that fills `input_ids`; other lists are filled with 0.
        side: "left" or "right", where it is put.
        least: the length at least.
    Returns:
        (B, T) for lists, (B,) for numbers.
    """
    width = max(least, *(len(example["input_ids"]) for example in examples))
    batch: dict[str, Tensor] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if isinstance(values[0], list):
            padding = [[fill if key == "input_ids" else 0] * (width - len(v)) for v in values]
            pairs = zip(values, padding, strict=True)
            values = [more + own if side == "left" else own + more for own, more in pairs]
        batch[key] = torch.tensor(values)
    return batch
