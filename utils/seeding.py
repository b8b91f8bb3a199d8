"""Seeds for streams of random numbers that must not depend on one another."""

from __future__ import annotations

import zlib

import numpy as np


def mix_seed(stream: str, *numbers: int) -> int:
    """One 32-bit seed for a named stream, such as ("training order", seed, epoch).

    Arithmetic such as `seed + epoch` would give run 1's second epoch the order of run 2's first,
    and torch's CPU generator ignores all but the lowest 32 bits of a seed, so shifting is no help.
    """
    entropy = (zlib.crc32(stream.encode()), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
