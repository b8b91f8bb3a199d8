"""What a file of answers comes to: shares, and where there are labels how good they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from decisions.intervals import clopper_pearson
from utils.metrics import score


class AnswerSummary:
    """Counts of answers' records, and the labelled ones held against their labels.

    Of labelled rows it keeps the probabilities.

    Args:
        answers: the C choices.
    """

    def __init__(self, answers: list[str]) -> None:
        self._place = {answer: i for i, answer in enumerate(answers)}
        self._probabilities: list[list[float]] = []
        self._labels: list[int] = []
        self._counts: Counter[str] = Counter()

    def add(self, record: dict[str, Any]) -> None:
        """One more record."""
        counts = self._counts
        if "answer" not in record:
            return
        counts["rows"] += 1
        counts["answered"] += record.get("answered", True)
        counts["in sets"] += len(record.get("set", ()))
        if "label" not in record:
            return
        self._probabilities.append(list(record["probabilities"].values()))
        self._labels.append(self._place[record["label"]])
        is_wrong = record["answer"] != record["label"]
        counts["has sets"] += "set" in record
        counts["has selection"] += "answered" in record
        counts["covered"] += record["label"] in record.get("set", ())
        counts["labelled and answered"] += record.get("answered", True)
        counts["answered wrongly"] += record.get("answered", True) and is_wrong

    def lines(self, num_bins: int) -> Iterator[str]:
        """What is said at the end."""
        counts, labels = self._counts, self._labels
        if counts["in sets"]:
            yield f"Sets have {counts['in sets'] / counts['rows']:.2f} answers on average."
        if counts["answered"] < counts["rows"] or counts["has selection"]:
            part = counts["answered"] / counts["rows"]
            yield f"Answered: {counts['answered']} of {counts['rows']} rows ({part:.1%})."
        if not labels:
            return
        log_probs = torch.tensor(self._probabilities, dtype=torch.float64).log()
        metrics = score(log_probs, torch.tensor(labels), num_bins)
        yield ("{} rows have labels: ACC {:.4f}  ECE {:.4f}  NLL {:.4f}  Brier {:.4f}").format(
            len(labels), *metrics
        )
        if counts["has sets"]:
            covered = counts["covered"], len(labels)
            found = covered[0] / covered[1], *clopper_pearson(*covered)
            yield "In its set is the label of {:.3f} [{:.3f}, {:.3f}] of them.".format(*found)
        if counts["has selection"]:
            wrong = counts["answered wrongly"], counts["labelled and answered"]
            found = wrong[0] / wrong[1] if wrong[1] else math.nan, *clopper_pearson(*wrong)
            yield "Wrong among the answered: {:.3f} [{:.3f}, {:.3f}].".format(*found)
