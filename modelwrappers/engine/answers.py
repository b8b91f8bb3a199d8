"""What a posterior answers to rows: their classes, with what it is sure of and what it is not.

    rows -> examples (the task's prompt, the tokenizer) -> windows of batches -> log_probs (n, N, C)
         -> `Answers` -> one record per row, in the rows' order

A window is what is sorted by length and predicted together: as many rows as it takes for batches of
rows of similar length, and no more than fit into memory however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from decisions.calibration import AnswerRule, Calibration, SetRule, Wanted
from decisions.calibration import wanted as wishes
from decisions.checks import Keys
from decisions.information import mutual_information, summarise
from modelwrappers.engine.adaptive import Settling
from modelwrappers.engine.prediction import Batch, Predictions, predict
from utils.errors import RunError, UsageError
from utils.logging import logger

if TYPE_CHECKING:
    from modelwrappers.engine.calibration import CalibrationFacts
    from modelwrappers.wrapperbase import WrapperBase

WINDOW = 8192  # rows that are sorted by length together
PERHAPS_TRAINED_ON = (
    "The run that calibrated this posterior did not know which rows the adapter was trained on: if "
    "the calibration rows are among them, sets and risks promise too much."
)


class Reader(Protocol):
    """How rows become tokens: `dataset.reading.RowReader`."""

    def example(self, row: dict[str, Any] | str, where: str) -> dict[str, Any]:
        """Token lists of a row, and its label or -1."""

    def loader(self, examples: list[dict[str, Any]]) -> Iterable[Batch]:
        """This process's batches of examples, as an evaluation makes them."""


class Answers(NamedTuple):
    """What a posterior says of n rows, in the order of their index.

    Attributes:
        predictive: posterior predictive probabilities, (n, C).
        entropy: of the predictive distribution, in nats, (n,): all of the uncertainty.
        expected_entropy: the mean entropy of the draws, (n,): what remains with the weights known.
        num_draws: of each row, (n,).
        labels: (n,), -1 where a row does not say it.
        index: of the rows, (n,)
    """

    predictive: Float[np.ndarray, "n C"]
    entropy: Float[np.ndarray, " n"]
    expected_entropy: Float[np.ndarray, " n"]
    num_draws: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, predictions: Predictions) -> Answers:
        """Of the draws of each row."""
        draws, number = predictions.log_probs.numpy(), predictions.num_draws  # (n, N, C)
        num_draws = number.numpy() if number is not None else np.full(len(draws), draws.shape[1])
        found = summarise(draws, num_draws)
        return cls(
            np.exp(found.log_probs),
            found.entropy,
            found.expected_entropy,
            num_draws,
            predictions.labels.numpy(),
            predictions.index.numpy(),
        )

    @property
    def mutual_information(self) -> Float[np.ndarray, " n"]:
        """Of the answer and the weights, in nats: what more training data could tell.

        No more than the log of the number of draws.
        """
        return mutual_information(self.entropy, self.expected_entropy)

    def as_calibration(self) -> Calibration:
        """What a posterior keeps of its calibration rows."""
        # the very numbers that sets are made of: scores that tie must tie to the last bit
        return Calibration(self.predictive, self.labels, self.mutual_information, self.index)

    def records(
        self,
        answers: Sequence[str],
        set_rule: SetRule | None = None,
        answer_rule: AnswerRule | None = None,
        keys: Keys | None = None,
    ) -> list[dict[str, Any]]:
        """One dict per row, ready for JSON.

        Args:
            answers: the C choices, in label order.
            set_rule: makes `set`, the row's set of answers, the most probable one first.
            answer_rule: makes `answered`, whether the answer should be given.
            keys: of the rows, for the rules' random numbers (`keys_of`); None: the index.
        """
        found = self.predictive.argsort(1)[:, ::-1]  # (n, C), the most probable one first
        information = self.mutual_information
        keys = self.index.tolist() if keys is None else keys
        sets = set_rule(self.predictive, keys) if set_rule is not None else None
        answered = None
        if answer_rule is not None:
            answered = answer_rule(self.predictive, information, keys)
        records = []
        for i, p in enumerate(self.predictive):
            record: dict[str, Any] = {
                "answer": answers[int(p.argmax())],
                "probabilities": dict(zip(answers, map(float, p), strict=True)),
                "entropy": float(self.entropy[i]),
                "expected_entropy": float(self.expected_entropy[i]),
                "mutual_information": float(information[i]),
                "num_draws": int(self.num_draws[i]),
            }
            if sets is not None:
                record["set"] = [answers[c] for c in found[i] if sets[i, c]]
            if answered is not None:
                record["answered"] = bool(answered[i])
            if self.labels[i] >= 0:
                record["label"] = answers[self.labels[i]]
            records.append(record)
        return records


class AnsweredRows(list[dict[str, Any]]):
    """The records of rows, and what is promised of their sets and of which of them are answered.

    Attributes:
        guarantee: in words, with its conditions; None where nothing is promised of these rows.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = (), guarantee: str | None = None):
        super().__init__(records)
        self.guarantee = guarantee


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
        if n_samples is None and wrapper.settling is not None:
            return predict(wrapper, loader, wrapper.final_draws(), wrapper.settling)
        return wrapper.predict(loader, **({} if n_samples is None else {"n_samples": n_samples}))


def keys_of(examples: Iterable[dict[str, Any]]) -> list[str]:
    """What a row's random numbers are a function of, besides the seed: its tokens.

    Not its place: rows that come one by one all have the first place, and would share one number.
    Their randomised sets would then have the coverage of that number, which may be far from the
    one that is promised.
    """
    return [" ".join(map(str, example["input_ids"])) for example in examples]


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


def rules_of(
    wrapper: WrapperBase, wanted: Wanted, n_samples: int | None = None
) -> tuple[SetRule | None, AnswerRule | None]:
    """What decides about sets and answers; see `Wanted.rules`.

    Raises:
        UsageError: other draws than those of the calibration rows, whose promise is of those only.
    """
    number = wrapper.final_draws() if n_samples is None else n_samples
    is_asked = wanted.coverage is not None or wanted.max_risk is not None
    if is_asked and wrapper.args.draws_adaptive:
        raise UsageError(
            "sets and risks are promised for a fixed number of draws, as the calibration rows had "
            "it; drop draws_adaptive."
        )
    facts = wrapper.calibration_facts
    if is_asked and facts is not None and not facts.unseen:
        logger.warning(PERHAPS_TRAINED_ON)
    if is_asked and facts is not None and facts.n_draws != number:
        raise UsageError(
            "sets and risks are promised for predictions like those of the calibration rows, which "
            f"had {facts.n_draws} draws (0 is the mean); {number} are asked for."
        )
    return wanted.rules(wrapper.calibration, wrapper.answers, wrapper.args.seed_sampling)


def guarantee_of(
    wrapper: WrapperBase, rules: tuple[SetRule | None, AnswerRule | None]
) -> str | None:
    """What `rules_of` promises of rows, and on what conditions, in words; None: nothing."""
    told = [rule.promise() for rule in rules if rule is not None]
    facts = wrapper.calibration_facts
    if told and facts is not None and not facts.unseen:
        told.append(PERHAPS_TRAINED_ON)
    return " ".join(told) or None


# --- the wrapper's part ---------------------------------------------------------------------------


class RowAnswers:
    """What makes a wrapper answer rows; it needs `predict`, `final_draws`, `answers` and `args`.

    Attributes:
        calibration: of rows that were neither trained nor tuned on, if there is one.
        calibration_facts: how those were predicted (`engine.calibration.CalibrationFacts`).
        settling: when a row has draws enough, if the loaded posterior's run asked for that.
    """

    def begin_without_rows(self) -> None:
        """Nothing is known yet of rows, and nothing calibrated."""
        self.calibration: Calibration | None = None
        self.calibration_facts: CalibrationFacts | None = None
        self.settling: Settling | None = None
        self._make_reader: Callable[[], Reader] | None = None
        self._reader: Reader | None = None

    def read_rows_by(self, make_reader: Callable[[], Reader]) -> None:
        """Say how rows become tokens, for `answer`; the reader is made when it is first needed."""
        self._make_reader, self._reader = make_reader, None

    @property
    def reader(self) -> Reader:
        """How rows of the posterior's task become tokens.

        Raises:
            RunError: nobody has said it.
        """
        if self._reader is None:
            if self._make_reader is None:
                raise RunError(
                    "nobody has said how rows become tokens; load the posterior by load_posterior, "
                    "or call prepare_for_fit_evaluate with a data set of this project."
                )
            self._reader = self._make_reader()
        return self._reader

    def answer(
        self, rows: Iterable[dict[str, Any] | str], n_samples: int | None = None, **wanted
    ) -> AnsweredRows:
        """The posterior's answers to rows of its task, which need no labels.

        Args:
            rows: dicts with the task's columns; texts, where its prompt reads one column.
            n_samples: N; 0 for the posterior mean, None for the posterior's own number.
            wanted: what else, by the names in `decisions.calibration.Wanted`: `coverage=0.9` for
                sets, `max_risk=0.05` for answers with a bounded error rate; both need a run with
                --calibrate.
        Returns:
            a dict per row: `answer`, `probabilities` (of each answer, the mean over draws),
            `entropy`, `expected_entropy`, `mutual_information` (nats), `num_draws`, `set` and
            `answered` if they were asked for, and `label` if the row has one. A fitted temperature
            is applied. The list's `guarantee` says what `set` and `answered` are worth, and for
            which rows.
        Raises:
            UsageError: a row cannot be read (its position is named), or what is asked for cannot
                be promised.
            RunError: nobody has said how rows become tokens.
        """
        if n_samples is not None and (type(n_samples) is not int or n_samples < 0):
            raise UsageError(f"n_samples is {n_samples!r}; it must be a whole number, 0 or more.")
        if isinstance(rows, str | dict):
            raise UsageError("answer takes a list of rows; put a single one in brackets: [row].")
        rules = rules_of(self, wishes(wanted), n_samples)
        read = self.reader.example
        examples = [read(row, f"row {i}") | {"index": i} for i, row in enumerate(rows)]
        records = AnsweredRows(guarantee=guarantee_of(self, rules))
        for start in range(0, len(examples), WINDOW):
            window = examples[start : start + WINDOW]
            answers = Answers.of(predict_window(self, window, n_samples))
            records += answers.records(self.answers, *rules, keys_of(window))
        return records
