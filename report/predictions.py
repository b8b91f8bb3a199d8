"""What the runs predicted: files of draws, checked."""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decisions.information import row_blocks
from report.escape import shorten
from report.runs import Evaluation, Unusable
from utils.errors import UsageError, quoted
from utils.records import INTEGERS, check_tensor, read_tensors_and_metadata

MOST_NUMBERS = 2**30  # of a file's draws: 4 GiB in single precision
MOST_CLASSES = 1000
ESCAPED = "backslashreplace"  # half a surrogate pair in a name
KINDS = ("independent", "antithetic")  # of draws
UNSEEN = {"true": True, "false": False}


@dataclass(frozen=True)
class Predictions:
    """Draws in the order of their index.

    Attributes:
        draws: log-probabilities, (n, N, C), as they are stored.
        labels: (n,); all are -1 where the rows belong to none of the classes.
        index: (n,) rows in their split.
        num_draws: how many of the N draws each row has, (n,), the first ones; the others are NaN.
        antithetic: whether draws 2k and 2k+1 of a row are a pair (E, -E); an odd last one is alone.
        split: of the data set.
        unseen: of calibration rows, whether the run knew that the adapter was not trained on them.
            A file that does not say it is taken to be of such rows, as a bayes_config.json is.
        fingerprint: of data set, split, index, labels and the number of classes; the lower 32
            bits seed the resamples.
        rows: the same without the data set: equal for a data set with and without errors in it.
    """

    draws: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    num_draws: np.ndarray
    antithetic: bool
    split: str
    unseen: bool
    fingerprint: int
    rows: int


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
    known = (*wanted, "num_draws")
    tensors, metadata = read_tensors_and_metadata(evaluation.file, name, known, MOST_NUMBERS)
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
    kind = metadata.get("draws", KINDS[0])  # older files do not say it
    if kind not in KINDS:
        raise Unusable(f"{name} has draws that are {quoted(kind)}, not {' or '.join(KINDS)}")
    unseen = metadata.get("unseen", "true")  # older files do not say it
    if unseen not in UNSEEN:
        raise Unusable(f"{name} has 'unseen' {quoted(unseen)}, not {' or '.join(UNSEEN)}")
    equal = "num_draws" not in tensors
    n, most, num_classes = log_probs.shape
    check_tensor(tensors, "log_probs", log_probs.shape, name, finite=equal)
    if num_classes > MOST_CLASSES:
        raise Unusable(f"{name} has {num_classes} classes; at most {MOST_CLASSES} are measured")
    labels, index = (
        check_tensor(tensors, key, (n,), name, INTEGERS).long().numpy()
        for key in ("labels", "index")
    )
    num_draws = np.full(n, most) if equal else _numbers_of_draws(tensors, n, most, name)
    of_none = evaluation.stored.unlabelled and (labels == -1).all()
    if not of_none and (labels.min() < 0 or labels.max() >= num_classes):
        raise Unusable(f"{name} has labels outside of its {num_classes} classes")
    if index.min() < 0:
        raise Unusable(f"{name} has a row of a negative index")
    order = np.argsort(index, kind="stable")
    if (np.diff(index[order]) == 0).any():
        raise Unusable(f"{name} holds a row of the data set twice")
    if log_probs.dtype == torch.bfloat16:  # numpy has no such type
        log_probs = log_probs.float()
    draws = log_probs.numpy()
    _check_draws(draws, num_draws, name)
    if (np.diff(index) < 0).any():
        draws, labels, index, num_draws = (
            values[order] for values in (draws, labels, index, num_draws)
        )
    split = str(metadata.get("split") or evaluation.stored.split)
    examples = np.concatenate([[num_classes], index, labels]).tobytes()
    described = f"{evaluation.dataset} {split} ".encode(errors=ESCAPED) + examples
    digest = int.from_bytes(hashlib.sha256(described).digest()[:8])
    fingerprint = digest << 32 | zlib.crc32(described)
    antithetic = kind == "antithetic"
    rows = int.from_bytes(hashlib.sha256(f"{split} ".encode(errors=ESCAPED) + examples).digest())
    return Predictions(
        *(draws, labels, index, num_draws, antithetic, split),
        *(UNSEEN[unseen], fingerprint, rows),
    )


def _numbers_of_draws(tensors: dict[str, Tensor], n: int, most: int, name: str) -> np.ndarray:
    """How many draws each row has, (n,).

    Raises:
        Unusable, UsageError: they are no numbers from 1 to N of which the largest is N.
    """
    num_draws = check_tensor(tensors, "num_draws", (n,), name, INTEGERS).long().numpy()
    least, largest = num_draws.min(), num_draws.max()
    if least < 1 or largest != most:
        raise Unusable(
            f"{name} has from {least} to {largest} draws for a row by 'num_draws'; by 'log_probs' "
            f"the least is 1 and the largest must be {most}"
        )
    return num_draws


def _check_draws(draws: np.ndarray, num_draws: np.ndarray, name: str) -> None:
    """Whether a row's own draws (n, N, C) are probabilities, and NaN stands behind them.

    Raises:
        Unusable: they are not.
    """
    for rows in row_blocks(len(draws), draws[0].size):
        drawn = np.arange(draws.shape[1]) < num_draws[rows, None]
        own, others = draws[rows][drawn], draws[rows][~drawn]
        if not np.isfinite(own).all():
            raise Unusable(
                f"{name}: 'log_probs' has values that are not numbers (NaN or infinite) among the "
                "draws that 'num_draws' says a row has"
            )
        if not np.isnan(others).all():
            raise Unusable(
                f"{name}: 'log_probs' has values behind the draws that 'num_draws' says a row has, "
                "where all must be NaN"
            )
        if np.abs(np.logaddexp.reduce(own.astype(float), axis=-1)).max() > 1e-3:
            raise Unusable(f"{name} holds probabilities that do not add up to 1")
