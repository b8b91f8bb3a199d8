"""Seeds for streams of random numbers that must not depend on one another."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable

import numpy as np


def mix_seed(stream: str, *numbers: int) -> int:
    """One 32-bit seed for a named stream, such as ("training order", seed, epoch).

    Arithmetic such as `seed + epoch` would give run 1's second epoch the order of run 2's first,
    and torch's CPU generator ignores all but the lowest 32 bits of a seed, so shifting is no help.
    """
    entropy = (zlib.crc32(stream.encode()), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def row_uniforms(stream: str, seed: int, keys: Iterable[int | str]) -> np.ndarray:
    """A number in [0, 1) for each row that depends on the stream, the seed and the row's key alone.

    A row keeps its number whatever rows come with it, in whichever order. It is the first 53 bits
    of a BLAKE2b hash, so keys that look alike get numbers that do not.

    Args:
        stream: what the numbers are for.
        seed: of the stream.
        keys: of the rows, (n,); an integer and its digits are one key.
    Returns:
        (n,), float64.
    """
    start = hashlib.blake2b(f"{stream}\0{seed}\0".encode(), digest_size=8)
    digests = []
    for key in keys:
        hashed = start.copy()
        hashed.update(str(key).encode("utf-8", "surrogatepass"))
        digests.append(hashed.digest())
    return (np.frombuffer(b"".join(digests), ">u8") >> np.uint64(11)) * 2.0**-53
