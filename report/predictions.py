"""What the runs predicted: files of draws, checked."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from report.escape import shorten
from report.runs import Evaluation, Unusable
from utils.errors import UsageError, quoted
from utils.records import INTEGERS, check_tensor, read_tensors_and_metadata

BLOCK = 2_000_000  # numbers of draws at once: 16 MB in double precision
MOST_NUMBERS = 2**30  # of a file's draws: 4 GiB in single precision
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Predictions:
    """Draws in the order of their index.

    Attributes:
        draws: log-probabilities, (n, N, C), as they are stored.
        labels: (n,)
        index: (n,) rows in their split.
        split: of the data set.
        fingerprint: of data set, split, index, labels and the number of classes; the lower 32
            bits seed the resamples.
    """

    draws: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    split: str
    fingerprint: int


def read_predictions(evaluation: Evaluation) -> Predictions:
    """The stored draws, checked.

    Raises:
        Unusable: the file is missing, cut short, of another data set, or its numbers are none.
    """
    try:
        return _read_predictions(evaluation)
    except UsageError as error:
        raise Unusable(str(error)) from None
    except MemoryError:
        raise Unusable(f"{evaluation.file.name} does not fit into the memory") from None


def _read_predictions(evaluation: Evaluation) -> Predictions:
    name = shorten(evaluation.file.name)
    if not os.path.lexists(evaluation.file):
        raise Unusable(f"there is no {name}")
    wanted = ("log_probs", "labels", "index")
    tensors, metadata = read_tensors_and_metadata(evaluation.file, name, wanted, MOST_NUMBERS)
    dataset = metadata.get("dataset", evaluation.dataset)
    if dataset != evaluation.dataset:
        raise Unusable(f"{name} is of {quoted(dataset)}, not of {quoted(evaluation.dataset)}")
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise Unusable(f"{name} has no {' and no '.join(missing)}")
    log_probs, labels, index = (tensors[key] for key in wanted)
    fits = log_probs.ndim == 3 and 0 not in log_probs.shape
    if not fits or not labels.shape == index.shape == log_probs.shape[:1]:
        shapes = ", ".join(str(tuple(tensors[key].shape)) for key in wanted)
        raise Unusable(f"{name} has shapes {shorten(shapes)}, not (n, N, C), (n,), (n,)")
    n, _, num_classes = check_tensor(tensors, "log_probs", log_probs.shape, name).shape
    if num_classes > MOST_CLASSES:
        raise Unusable(f"{name} has {num_classes} classes; at most {MOST_CLASSES} are measured")
    labels, index = (
        check_tensor(tensors, key, (n,), name, INTEGERS).long().numpy()
        for key in ("labels", "index")
    )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise Unusable(f"{name} has labels outside of its {num_classes} classes")
    if index.min() < 0:
        raise Unusable(f"{name} has a row of a negative index")
    order = np.argsort(index, kind="stable")
    if (np.diff(index[order]) == 0).any():
        raise Unusable(f"{name} holds a row of the data set twice")
    if log_probs.dtype == torch.bfloat16:  # numpy has no such type
        log_probs = log_probs.float()
    draws = log_probs.numpy()
    mass = (np.logaddexp.reduce(block.astype(float), axis=-1) for block in row_blocks(draws))
    if any(np.abs(block).max() > 1e-3 for block in mass):
        raise Unusable(f"{name} holds probabilities that do not add up to 1")
    if (np.diff(index) < 0).any():
        draws, labels, index = draws[order], labels[order], index[order]
    split = str(metadata.get("split") or evaluation.stored.split)
    examples = np.concatenate([[num_classes], index, labels]).tobytes()
    described = f"{evaluation.dataset} {split} ".encode(errors="backslashreplace") + examples
    digest = int.from_bytes(hashlib.sha256(described).digest()[:8])
    return Predictions(draws, labels, index, split, digest << 32 | zlib.crc32(described))


def row_blocks(draws: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of (n, N, C) draws in blocks of bounded size."""
    rows = max(1, BLOCK // draws[0].size)
    return (draws[start : start + rows] for start in range(0, len(draws), rows))
