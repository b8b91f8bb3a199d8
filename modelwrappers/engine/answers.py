"""What a posterior answers to rows: their classes, with what it is sure of and what it is not.

    rows -> examples (the task's prompt, the tokenizer) -> windows of batches -> log_probs (n, N, C)
         -> one `Answer` per row, in the rows' order

A window is what is sorted by length and predicted together: as many rows as it takes for batches of
rows of similar length, and no more than fit into memory however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from modelwrappers.engine.prediction import Batch, Predictions
from utils.errors import UsageError
from utils.metrics import posterior_predictive

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase

WINDOW = 8192  # rows that are sorted by length together


class Reader(Protocol):
    """How rows become tokens: `dataset.reading.RowReader`."""

    def example(self, row: dict[str, Any] | str, where: str) -> dict[str, Any]:
        """Token lists of a row, and its label or -1."""

    def loader(self, examples: list[dict[str, Any]]) -> Iterable[Batch]:
        """This process's batches of examples, as an evaluation makes them."""


class Answers(NamedTuple):
    """What a posterior says of n rows, in their order.

    Attributes:
        predictive: posterior predictive probabilities, (n, C).
        entropy: of the predictive distribution, in nats, (n,): all of the uncertainty.
        expected_entropy: the mean entropy of the draws, (n,): what remains with the weights known.
        mutual_information: of the answer and the weights, their difference, (n,): what more
            training data could tell. No more than the log of the number of draws.
        num_draws: of each row, (n,).
        labels: (n,), -1 where a row does not say it.
    """

    predictive: Float[np.ndarray, "n C"]
    entropy: Float[np.ndarray, " n"]
    expected_entropy: Float[np.ndarray, " n"]
    mutual_information: Float[np.ndarray, " n"]
    num_draws: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, predictions: Predictions) -> Answers:
        """Of the draws of each row."""
        draws = predictions.log_probs.double()  # (n, N, C)
        log_predictive = posterior_predictive(draws, predictions.num_draws)
        entropy = _entropy(log_predictive)
        number = predictions.num_draws
        if number is None:
            number = torch.full((len(draws),), draws.shape[1])
        made = torch.arange(draws.shape[1]) < number[:, None]  # (n, N); the others are NaN
        of_draws = _entropy(draws.masked_fill(~made[:, :, None], -torch.inf))
        expected = of_draws.sum(1) / number
        arrays = log_predictive.exp(), entropy, expected, (entropy - expected).clamp(min=0)
        return cls(*(a.numpy() for a in arrays), number.numpy(), predictions.labels.numpy())

    def records(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """One dict per row, ready for JSON.

        Args:
            answers: the C choices, in label order.
        """
        return [
            {
                "answer": answers[int(p.argmax())],
                "probabilities": dict(zip(answers, map(float, p), strict=True)),
                "entropy": float(self.entropy[i]),
                "expected_entropy": float(self.expected_entropy[i]),
                "mutual_information": float(self.mutual_information[i]),
                "num_draws": int(self.num_draws[i]),
            }
            | ({"label": answers[self.labels[i]]} if self.labels[i] >= 0 else {})
            for i, p in enumerate(self.predictive)
        ]


def _entropy(log_probs: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows"]:
    """In nats; a class of probability 0 adds nothing."""
    return -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


# --- from rows to answers -------------------------------------------------------------------------


def predict_window(
    wrapper: WrapperBase, examples: list[dict[str, Any]], n_samples: int | None = None
) -> Predictions:
    """Draws of the rows of one window, sorted by `index`, on all processes.

    Args:
        wrapper: has a `reader`.
        examples: token lists with `labels` and `index`, the row's number in its file.
        n_samples: N; None for the posterior's own number.
    """
    loader = wrapper.reader.loader(examples)
    with fitted_temperature(wrapper):
        return wrapper.predict(loader, **({} if n_samples is None else {"n_samples": n_samples}))


@contextmanager
def fitted_temperature(wrapper: WrapperBase) -> Iterator[None]:
    """Context in which predictions are scaled by the temperature that the run has fitted, if any.

    A posterior that was loaded does so by itself; during a run the evaluation reports both.
    """
    before = wrapper.temperature
    wrapper.temperature = wrapper.fitted_temperature if before is None else before
    try:
        yield
    finally:
        wrapper.temperature = before


def answer(
    wrapper: WrapperBase, rows: Iterable[dict[str, Any] | str], n_samples: int | None = None
) -> list[dict[str, Any]]:
    """See `WrapperBase.answer`."""
    if isinstance(rows, str | dict):
        raise UsageError(
            "answer takes a list of rows; put a single one in brackets: answer([row])."
        )
    reader, told = wrapper.reader, "row {}".format
    examples = [reader.example(row, told(i)) | {"index": i} for i, row in enumerate(rows)]
    records: list[dict[str, Any]] = []
    for start in range(0, len(examples), WINDOW):
        window = examples[start : start + WINDOW]
        answers = Answers.of(predict_window(wrapper, window, n_samples))
        records += answers.records(wrapper.answers)
    return records
