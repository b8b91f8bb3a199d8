"""Seeds for streams of random numbers that must not depend on one another."""

from __future__ import annotations

import numpy as np


def mix_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, such as (seed, epoch) or (seed, rank).

    Arithmetic such as `seed + epoch` would give run 1's second epoch the order of run 2's first,
    and torch's CPU generator ignores all but the lowest 32 bits of a seed, so shifting is no help.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
