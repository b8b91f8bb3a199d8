"""Rows of a task, tokenized once, and the loaders that make batches of them."""

from __future__ import annotations

import copy
import dataclasses
import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from dataset.batches import Batches, EvalBatches, TrainBatches, padded, seeded_order
from dataset.record import PUBLISHED_FLAGS, Prompt, Task
from dataset.shift import noisy_row
from dataset.shots import NO_SHOTS, Shots
from dataset.sources import Row, is_folder, load_rows
from dataset.tables import table_task
from dataset.tasks import check_shifted, find_task
from dataset.tokenizing import Limits, load_tokenizer
from utils.data_set_names import is_table, noisy_block, same_data_set, split_noise
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.registry import users_code

if TYPE_CHECKING:
    from dataset.reading import RowReader

Example = dict[str, Any]
UNLABELLED = -1  # what stands in `labels` where nobody knows the answer


# --testing-set values of existing command lines that say where anchors come from, too
EVALUATED = {"train_val": "train", "train_train_val": "val", "train_val_val": "val"}


class DatasetBase(ABC):
    """A task as batches: `dict[str, Tensor]` with the keys that both kinds of data set share.

    `input_ids (B, T)`, `attention_mask (B, T)`, `labels (B,)`, `index (B,)`: the row in its split.

    Args:
        args: flags.
        accelerator: of this process.
        tokenizer: None: the one that the flags name.
        name: of one of --ood-datasets; None: --dataset.
        task: the record, where it is known already: that of a saved posterior.

    Attributes:
        tasks: this kind's table of `Task` records.
        padding_side: "left" for causal LMs, whose answer is read at the last position.
        target_ids_are_tokens: whether classes are tokens (a causal LM's), not a head's outputs.
        task, tokenizer: what the flags named.
        is_shifted: whether it is one of --ood-datasets.
        noise: strength of the errors in the rows' text (`dataset.shift`); None: there are none.
        pool_rows: the training rows that `train_on` has left out, without their labels.
    """

    tasks: ClassVar[Mapping[str, Task]]
    padding_side: ClassVar[str]
    target_ids_are_tokens: ClassVar[bool] = False

    def __init__(
        self,
        args,
        accelerator,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        task: Task | None = None,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.noise: int | None = None
        self.pool_rows: list[Example] = []
        self._table_rows: dict[int, Row] = {}  # training rows of a table, by index
        self.is_shifted = is_shifted = name is not None
        name = args.dataset if name is None else name
        source = self._source_of_answers() if task is None else None
        flag = "--ood-datasets" if is_shifted else "--dataset"
        self.task = self._named(name, flag, source) if task is None else task
        for flag, published in PUBLISHED_FLAGS.items():
            if getattr(args, flag) == published:
                self.task = dataclasses.replace(self.task, **self.task.published.get(flag, {}))
        if not is_shifted and task is None:
            check_shifted(args, self.tasks)
        takes = source is not None and not is_table(name)  # a table was read with them already
        if takes and (self.target_ids_are_tokens or not is_shifted):
            self._take_answers_of(source)
        self.eval_split = EVALUATED.get(args.testing_set, args.testing_set)
        if is_shifted and args.testing_set == "train_val":
            self.eval_split = "val"
        if self.eval_split not in self.task.splits:
            raise UsageError(
                f"--testing-set {args.testing_set}: {self.task.name} has no labelled split of that "
                f"name; it has {', '.join(s for s in self.task.splits if s in ('val', 'test'))}."
            )
        if accelerator.is_local_main_process:
            self.tokenizer = tokenizer or load_tokenizer(args)  # the main one fills the cache
        accelerator.wait_for_everyone()
        if not accelerator.is_local_main_process:
            self.tokenizer = tokenizer or load_tokenizer(args)

    def _named(self, name: str, flag: str, source: Task | None = None) -> Task:
        """The record of a data set; of a table with the answers of `source`, if there is one."""
        if is_table(name):
            return table_task(self.args, name, flag, source)
        return find_task(name, self.tasks)

    def _source_of_answers(self) -> Task | None:
        """The data set that the adapter was or will be trained on, where this one is another.

        Raises:
            UsageError: it cannot be found.
        """
        args = self.args
        if args.ood_ori_dataset is not None:
            return self._named(args.ood_ori_dataset, "--ood-ori-dataset")
        if self.is_shifted:
            return self._named(args.dataset, "--dataset")
        trains = args.max_train_steps or args.n_epochs
        if trains or not is_table(args.dataset) or not is_table(args.adapter_dataset):
            return None
        # Which class is which was read off the adapter's table: this one may lack some of them.
        try:
            return self._named(args.adapter_dataset, "--load-lora-path")
        except UsageError as error:
            raise UsageError(
                f"{error} The adapter was trained on that table, whose classes are needed: say by "
                "--ood-ori-dataset where it is now."
            ) from None

    def _take_answers_of(self, source: Task) -> None:
        """Let the answers be those that the adapter was trained on, where they agree with ours.

        They do if ours are the source's first ones: obqa's A to D for an adapter trained on ARC's A
        to E, which may then answer E.

        Raises:
            UsageError: a classifier's classes are others than those it was trained for.
        """
        own = self.task.choices
        if source.choices[: len(own)] == own:
            self.task = dataclasses.replace(self.task, choices=source.choices)
        elif self.target_ids_are_tokens:
            logger.info(
                "%s has other answers (%s); those of %s are read: %s.",
                source.name,
                ", ".join(source.choices),
                self.task.name,
                ", ".join(own),
            )
        else:
            raise UsageError(
                f"--ood-ori-dataset {source.name} has the classes {', '.join(source.choices)}, but "
                f"{self.task.name} has {', '.join(own)}; a classifier cannot change its classes."
            )

    # --- what methods need ------------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        """C, the number of classes."""
        return len(self.task.choices)

    @property
    def is_labelled(self) -> bool:
        """Whether rows have one of the classes; else they are out of distribution."""
        return self.task.label is not None

    @property
    def num_samples(self) -> int:
        """n, the number of training examples."""
        return len(self.train_rows)

    @property
    def target_ids(self) -> Tensor | None:
        """The C answer tokens of a causal LM; None for a classifier."""
        return None

    @property
    def shots(self) -> Shots:
        """The solved examples before each prompt; a classifier's rows have none."""
        return NO_SHOTS

    def take_shots(self, text: str) -> None:
        """Let these solved examples, of a saved posterior, stand before each prompt.

        Raises:
            UsageError: there are some, but a classifier's rows have none.
        """
        if text:
            raise UsageError("a classifier's rows have no solved examples before them.")

    def answer_as(self, choices: Sequence[str]) -> None:
        """Take the answers of a saved posterior, which may be more than ours.

        Raises:
            UsageError: they are others.
        """
        own = self.task.choices
        if tuple(choices[: len(own)]) != own:
            raise UsageError(
                f"the posterior answers {quoted(', '.join(choices))}, but the data set "
                f"{quoted(self.task.name)} has {quoted(', '.join(own))}; name the one that it was "
                "trained on (--dataset, or load_posterior's dataset)."
            )
        self.task = dataclasses.replace(self.task, choices=tuple(choices))

    def shown_example(self) -> dict[str, Any] | None:
        """What a row looks like to the model: the tokenizer's source, a text, its tokens.

        The row is the task's own example, no row of the data. Where it has none that fits, there is
        no text, and nothing at all where there are no shots either.
        """
        shots, row = self.shots.text, self.task.example
        text: list[str] = []
        tokens: list[int] = []
        if row:
            with suppress(UsageError):  # too long for --max-seq-len, say
                tokens = self.encoded(row, "example")[0]["input_ids"]
                parts = self.task.prompt(row)
                text = [shots + "".join(parts)] if isinstance(parts, Prompt) else list(parts)
        if not (tokens or shots):
            return None
        return {
            "tokenizer": self.args.load_model_path or self.args.model,
            "text": text,
            "input_ids": tokens,
            "shots": shots,
        }

    @property
    def pad_token_id(self) -> int:
        """What fills short rows; see `Limits`."""
        return self.limits.pad_token_id

    @cached_property
    def train_rows(self) -> list[Example]:
        """What is trained on: all of the training set but what is held out."""
        return self._whole_batches(self._trainable_rows)

    def train_on(self, indices: Collection[int]) -> None:
        """Train on these rows alone; the other ones are `pool_rows`, which tell no label.

        Args:
            indices: of the rows in their split.
        Raises:
            UsageError: there are none, one is no row to train on, or the training rows were asked
                for before.
        """
        if "train_rows" in vars(self):
            raise UsageError(
                "train_on comes too late: the training rows were asked for before; call it on a "
                "new data set."
            )
        chosen = frozenset(indices)
        unknown = sorted(chosen - {row["index"] for row in self._trainable_rows})
        if unknown or not chosen:
            raise UsageError(
                f"train_on: {quoted(unknown) if unknown else 'no row'}; it takes the index of one "
                f"or more of the {len(self._trainable_rows)} training rows."
            )
        labelled = [row for row in self._trainable_rows if row["index"] in chosen]
        self.train_rows = self._whole_batches(labelled)
        self.pool_rows = [
            row | {"labels": UNLABELLED}
            for row in self._trainable_rows
            if row["index"] not in chosen
        ]

    @cached_property
    def held_out_rows(self) -> list[Example]:
        """The part of the training set that is not trained on."""
        return self._divided[1]

    @cached_property
    def tuning_rows(self) -> list[Example]:
        """Held-out rows by which a temperature or a prior is chosen; with --calibrate half one half
        of them."""
        return self._halves[0] if self.args.calibrate == "half" else self.held_out_rows

    @cached_property
    def calibration_rows(self) -> list[Example]:
        """Held-out rows by which nothing is chosen: --calibrate keeps their predictions."""
        rows = self._halves[1] if self.args.calibrate == "half" else self.held_out_rows
        trained = {tuple(row["input_ids"]) for row in self._trainable_rows}
        if number := sum(tuple(row["input_ids"]) in trained for row in rows):
            logger.warning(
                "--calibrate: %d of %d calibration rows read like a training row; sets and risks "
                "promise too much for rows that do not.",
                number,
                len(rows),
            )
        return rows

    @cached_property
    def _halves(self) -> tuple[list[Example], list[Example]]:
        rows = self.held_out_rows
        first = self._side([row["index"] for row in rows], 0.5, "halves of the held-out rows")
        halves = (
            [row for row in rows if row["index"] in first],
            [row for row in rows if row["index"] not in first],
        )
        if not all(halves):
            raise UsageError(
                f"--calibrate half: {len(rows)} held-out rows leave nothing in one half; raise "
                "--held-out-fraction."
            )
        return halves

    def _side(self, indices: Sequence[int], share: float, division: str) -> set[int]:
        """The training rows on one side of a division, which takes that share of them.

        Rows of a table are divided by their text: a row stays on its side whatever rows there will
        be one day, and rows of one text are never on both. Others are divided by their position.
        """
        if self.task.table is not None:
            place = self.task.source.place
            return {i for i in indices if place(self._table_rows[i], division) < share}
        order = seeded_order(len(indices), division, self.args.seed_split)
        return {indices[i] for i in order[: round(share * len(indices))]}

    @cached_property
    def test_rows(self) -> list[Example]:
        if self.eval_split == "train":
            return self.held_out_rows[: self.args.limit_eval or None]
        limit = self.args.limit_ood if self.is_shifted else None
        limit = self.args.limit_eval if limit is None else limit
        return self._whole_batches(self._examples(self.eval_split, limit))

    @cached_property
    def anchor_rows(self) -> list[Example]:
        """--anchor-size rows for post-hoc methods: of the training set, or with train_val_val of
        the validation set. Their order depends on nothing but --seed-split."""
        is_validation = self.args.testing_set == "train_val_val"
        return self._anchors_of(self._examples("val", 0) if is_validation else self.train_rows)

    def _anchors_of(self, rows: list[Example]) -> list[Example]:
        order = seeded_order(len(rows), "anchors", self.args.seed_split)
        return [rows[i] for i in order[: self.args.anchor_size]]

    @cached_property
    def ood_datasets(self) -> dict[str, DatasetBase]:
        """--ood-datasets: shifted data that the same posterior is evaluated on.

        Raises:
            UsageError: a classifier's classes are others than those it was trained for.
        """
        others = {}
        for name in self.args.ood_datasets or ():
            base, strength = split_noise(name)
            is_own = strength is not None and self._is_own(base)
            other = (
                self if is_own else type(self)(self.args, self.accelerator, self.tokenizer, base)
            )
            if not self.target_ids_are_tokens and other.task.choices != self.task.choices:
                raise UsageError(
                    f"--ood-datasets {name} has the classes {', '.join(other.task.choices)}, but "
                    f"the classifier is one for {', '.join(self.task.choices)}."
                )
            data_dir = self.args.data_dir
            if not (is_own or data_dir is None or is_folder(Path(data_dir) / other.task.name)):
                raise UsageError(
                    f"--ood-datasets {name}: --data-dir {data_dir} has no folder "
                    f"{other.task.name}; with several data sets each needs its own in there."
                )
            block = other.task.name
            if strength is not None:
                other, block = other.with_noise(strength), noisy_block(block, strength)
            others[block] = other
        return others

    def _is_own(self, name: str) -> bool:
        """Whether a value of --ood-datasets names the run's own data set."""
        if is_table(name) or is_table(self.args.dataset):
            return same_data_set(name, self.args.dataset)
        return find_task(name, self.tasks) == find_task(self.args.dataset, self.tasks)

    def with_noise(self, strength: int) -> DatasetBase:
        """The same rows, labels and solved examples, with errors in the rows' text.

        Args:
            strength: of the errors; see `dataset.shift`.
        """
        noisy = copy.copy(self)
        for name in list(vars(noisy)):
            is_cached = isinstance(getattr(type(self), name, None), cached_property)
            if is_cached and name not in ("limits", "shots"):
                del vars(noisy)[name]
        noisy.noise = strength
        return noisy

    def _whole_batches(self, rows: list[Example]) -> list[Example]:
        """With --drop-last without the rows at the end that fill no batch of all processes."""
        size = self.args.batch_size * self.accelerator.num_processes
        return rows[: len(rows) // size * size or None] if self.args.drop_last else rows

    @cached_property
    def _trainable_rows(self) -> list[Example]:
        return self._divided[0] if self.args.hold_out else self._whole_training_set

    @cached_property
    def _whole_training_set(self) -> list[Example]:
        return self._examples("train", self.args.limit_train)

    @cached_property
    def _divided(self) -> tuple[list[Example], list[Example]]:
        rows = self._whole_training_set
        # shots count, so that the other rows stay on their side whatever --num-shots is
        total = len(rows) + len(self._shots_in("train"))
        held_out = self._side(range(total), self.args.held_out, "held out")
        parts = (
            [row for row in rows if row["index"] not in held_out],
            [row for row in rows if row["index"] in held_out],
        )
        if not all(parts):
            raise UsageError(
                f"--held-out-fraction {self.args.held_out} of {len(rows)} training rows leaves "
                "nothing on one side; choose another share."
            )
        return parts

    @cached_property
    def train_dataloader(self) -> DataLoader:
        batches = TrainBatches(
            len(self.train_rows),
            self.args.batch_size,
            self.args.seed_data,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.shuffle_train,
        )
        return self._loader(self.train_rows, batches)

    @cached_property
    def test_dataloader(self) -> DataLoader:
        return self.eval_loader(self.test_rows)

    @cached_property
    def anchor_dataloader(self) -> DataLoader:
        return self.eval_loader(self.anchor_rows)

    @cached_property
    def held_out_anchor_dataloader(self) -> DataLoader:
        """As `anchor_dataloader`, of rows that were not trained on."""
        return self.eval_loader(self._anchors_of(self.tuning_rows))

    @cached_property
    def train_eval_dataloader(self) -> DataLoader:
        """The training rows once, as an evaluation sees them: for curvature."""
        return self.eval_loader(self.train_rows)

    @cached_property
    def held_out_dataloader(self) -> DataLoader:
        return self.eval_loader(self.tuning_rows)

    @cached_property
    def calibration_dataloader(self) -> DataLoader:
        return self.eval_loader(self.calibration_rows)

    def reader(self) -> RowReader:
        """How rows without labels become tokens, for `WrapperBase.answer`."""
        from dataset.reading import RowReader  # which builds data sets

        return RowReader(self)

    def get_loaders(self) -> None:
        """Build both loaders now; else they are built when first used."""
        _ = self.train_dataloader, self.test_dataloader

    # --- from rows to batches ---------------------------------------------------------------------

    @abstractmethod
    def encode(self, row: Row) -> tuple[Example, bool]:
        """Token lists of one row, and whether it had to be cut to fit --max-seq-len."""

    def rows_of(self, split: str, limit: int) -> Iterator[tuple[str, Row]]:
        """(where, row) of a split's first `limit` rows, or of all; each has the task's columns."""
        task = self.task
        rows = load_rows(
            task.source, task.splits[split], self.args.data_dir, task.name, task.example
        )
        for where, row in rows[: limit or None]:
            missing = [column for column in task.columns if row.get(column) is None]
            if missing:
                raise UsageError(
                    f"{where}: column '{missing[0]}' is missing; {task.name} needs "
                    f"{', '.join(task.columns)}, the row has {quoted(', '.join(row))}."
                )
            yield where, row

    def _shots_in(self, split: str) -> Collection[int]:
        """The rows of a split that serve as solved examples, and as nothing else."""
        return self.shots.rows if self.task.splits[split] == self.shots.split else ()

    def _examples(self, split: str, limit: int) -> list[Example]:
        if split not in self.task.splits:
            raise UsageError(
                f"{self.task.name} has no split to train on; it has {', '.join(self.task.splits)}. "
                "Evaluate on it, or take anchors elsewhere (--testing-set train_val_val)."
            )
        left_out = self._shots_in(split)
        examples, num_cut = [], 0
        for index, (where, row) in enumerate(self.rows_of(split, limit)):
            if self.task.table is not None and split == "train":
                self._table_rows[index] = row
            if index in left_out:
                continue
            shown = row
            if self.noise is not None:
                shown = noisy_row(row, self.task.text_columns, self.noise)
            example, cut = self.encoded(shown, where)
            label = self.label_of(row, where)
            examples.append(example | {"labels": label, "index": index})
            num_cut += cut
        if not examples:
            raise UsageError(
                f"--num-shots {self.args.num_shots}: all rows of {self.task.name} that would be "
                f"read of its split {quoted(self.task.splits[split])} serve as solved examples; "
                "pass a smaller number."
            )
        if num_cut:
            logger.info(
                "%s: %d of %d rows were cut to %d tokens (%s).",
                self.task.splits[split],
                num_cut,
                len(examples),
                self.max_length,
                self.limit[1],
            )
        return examples

    def encoded(self, row: Row, where: str) -> tuple[Example, bool]:
        """`encode`, with `where` in front of whatever is wrong with the row.

        Raises:
            UsageError: the row cannot be read.
        """
        with users_code(lambda: self.cannot_read(row, where)):
            example, cut = self.encode(row)
        self.limits.check(example, where)
        return example, cut

    def cannot_read(self, row: Row, where: str) -> str:
        """The beginning of a message about a row."""
        return f"{where}: {self.task.name} cannot read the row {quoted(row)}"

    def label_of(self, row: Row, where: str) -> int:
        """The row's label, an index into the task's choices; `UNLABELLED` where none is right."""
        if not self.is_labelled:
            return UNLABELLED

        def told() -> str:
            answers = quoted(", ".join(self.task.choices), 400)
            return f"{where}: unknown label in the row {quoted(row)} (answers: {answers})"

        with users_code(told):
            label = self.task.label(row)
            if isinstance(label, bool):
                raise TypeError(f"the label is {label}; it must be an index")
            label = operator.index(label)
            if not 0 <= label < self.num_labels:
                raise ValueError(f"{quoted(label)} is not between 0 and {self.num_labels - 1}")
        return label

    @cached_property
    def limits(self) -> Limits:
        """What tokenizer and base model take of a row."""
        return Limits(self.args, self.tokenizer)

    @property
    def limit(self) -> tuple[int, str]:
        """The most tokens of a row, and who says so."""
        return self.limits.most

    @property
    def max_length(self) -> int:
        """--max-seq-len, or what tokenizer and model take at most."""
        return self.limit[0]

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pad token lists to one length: the longest's, or --max-seq-len."""
        least = self.max_length if self.args.pad_to_max_length else 0
        return padded(examples, self.pad_token_id, self.padding_side, least)

    def eval_loader(self, examples: list[Example]) -> Batches:
        """This process's batches of examples, the longest first; see `EvalBatches`."""
        batches = EvalBatches(
            [len(example["input_ids"]) for example in examples],
            self.args.eval_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return self._loader(examples, batches)

    def _loader(self, examples: list[Example], batches: Sampler[list[int]]) -> Batches:
        return Batches(
            self.target_ids,
            examples,
            batch_sampler=batches,
            collate_fn=self.collate,
            pin_memory=self.accelerator.device.type == "cuda",
            # Iterating would otherwise draw a seed from the global generator, and training would
            # depend on how often it was evaluated.
            generator=torch.Generator(),
        )
