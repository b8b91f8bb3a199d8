"""From a batch to class logits, one slice per draw; the answers among a model's outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelwrappers.engine.branch import Branch, find_branch
from modelwrappers.engine.prediction import Batch, padded_on_the_left
from modelwrappers.engine.prefix import Prefix
from utils.errors import RunError


class ClassLogits:
    """The forwards of a wrapper; stands before `PeftModel`, whose `forward` it calls.

    Needs `sampling`, `transformer_blocks`, `is_stochastic`, `args` and `accelerator`.

    Attributes:
        is_causal: whether answers are tokens of a causal LM, else they are a classifier's classes.
        target_ids: (C,) answer tokens of the adapter's own data set.
        shares_positions: whether the model sends something without a row per example through its
            adapted layers, as DeBERTa its table of relative positions: draws cannot be stacked.
        one_by_one: whether a forward takes one copy of a batch only.
    """

    draws_kind = "independent"  # or "antithetic": draws 2k and 2k+1 are a pair

    def read_architecture(self, model: PreTrainedModel, is_causal: bool) -> None:
        """Note what the base model takes and gives."""
        takes = inspect.signature(model.forward).parameters
        self.is_causal = is_causal
        self.target_ids: Tensor | None = None
        self.shares_positions = model.config.model_type.startswith("deberta")
        self.one_by_one = self.shares_positions
        self.is_sharded = False
        self._takes_position_ids = is_causal and "position_ids" in takes
        self._takes_logits_to_keep = is_causal and "logits_to_keep" in takes
        self._loaders_target_ids: Tensor | None = None  # of what is being evaluated
        self.prefix: Prefix | None = None  # of what is being evaluated, where it is shared
        # where copies begin to differ, by noisy modules and inputs; around nn.Module's bookkeeping
        self.__dict__["_branches"] = {}

    # --- hooks: what is known of the method's draws -----------------------------------------------

    def noisy_modules(self) -> list[nn.Module] | None:
        """The modules in which the copies of a batch see different weights, if that is known.

        What the model runs before the first of them is then run once for all copies. None: copies
        may differ anywhere, so the inputs are stacked.
        """
        return None

    def from_draw(self, first: int) -> AbstractContextManager:
        """Context in which fixed draws are taken from this number on; fresh ones have none."""
        return nullcontext()

    def evaluation_draws(self, n_samples: int) -> AbstractContextManager:
        """Context of a whole evaluation: a method whose draws are sets of weights fixes them."""
        return nullcontext()

    @property
    def rows_share_draws(self) -> bool:
        """Whether, within `evaluation_draws`, a draw is one set of weights for all rows."""
        return not self.is_stochastic

    @classmethod
    def adaptive_obstacle(cls, args) -> str | None:
        """Why draws cannot be added until a row is settled, if so; ends the message."""
        if not cls.is_stochastic or args.bayes_inference_notsample:
            return "a single set of weights has no draws to add"
        if cls.forward_logits is not ClassLogits.forward_logits:
            return "its own forward_logits decides how many draws there are"
        if "first" not in inspect.signature(cls.draw_logits).parameters:
            return "its own draw_logits cannot begin with a later draw (it takes no `first`)"
        return None

    @classmethod
    def prefix_obstacle(cls, args) -> str | None:
        """Why keys and values of a shared beginning would not do, if so; ends the message."""
        if not cls.is_stochastic or args.bayes_inference_notsample:
            return None
        return "the draws of this method are other weights in every row"

    # --- forwards ---------------------------------------------------------------------------------

    def forward_logits(
        self, batch: Batch, sample: bool = True, n_samples: int = 1, **kwargs
    ) -> Float[Tensor, "B N C"]:
        """Class logits, one slice per posterior draw.

        All draws are one forward: the batch is repeated N times in front of the first layer in
        which draws differ, and each stochastic layer splits it again. No more than
        --eval-batch-size rows are stacked at once, outside of training.

        Args:
            batch: model inputs, `input_ids (B, T)` and so on, without labels and index.
            sample: False for the posterior mean (N = 1).
            n_samples: N, the number of draws.
        Returns:
            (B, N, C)
        """
        if not (sample and self.is_stochastic and n_samples):
            with self.sampling(0):
                return self.copies_forward(self._met(batch), range(1)).unsqueeze(1)
        return torch.cat(list(self.draw_logits(batch, n_samples))).transpose(0, 1)  # (B, N, C)

    def draw_logits(
        self, batch: Batch, n_samples: int, first: int | None = None
    ) -> Iterator[Float[Tensor, "n B C"]]:
        """The logits of `n_samples` draws in chunks, which may be reduced one by one.

        Args:
            batch: model inputs.
            n_samples: N.
            first: where draws are fixed, the first one's number; None: they go on in turn.
        """
        return self.copies_logits(batch, n_samples, first)

    def copies_logits(
        self, batch: Batch, number: int, first: int | None = None
    ) -> Iterator[Float[Tensor, "n B C"]]:
        """Logits of `number` copies of a batch, which see a draw or a member each.

        The only place where draws are split over forwards, of at most --eval-batch-size rows
        outside of training. Copies that have something in common stay together: where there is a
        branch, or draws come in pairs, a forward has some rows of the batch with all their copies;
        else some copies of the whole batch.

        A sharded base is gathered by all processes together, but how many forwards a batch takes
        depends on its rows, and the last one has fewer: forwards that other processes run more are
        joined. So all chunks have to be taken there.
        """
        rows = len(batch["input_ids"])
        batch = self._met(batch)
        copies, size = self._chunk(number, rows, self.branch_of(batch, number))
        joined = self._joined(-(-number // copies) * -(-rows // size))
        begin = first or 0
        with self.from_draw(begin) if first is not None else nullcontext():
            for start in range(begin, begin + number, copies):
                draws = range(start, min(start + copies, begin + number))
                with self.sampling(len(draws)):
                    parts = [
                        self.copies_forward(some, draws).unflatten(0, (len(draws), -1))
                        for some in _slices(batch, size)
                    ]
                yield torch.cat(parts, dim=1)
        for _ in range(joined):
            with self.sampling(0):
                self.batch_logits(batch)

    def _chunk(self, number: int, rows: int, branch: Branch | None) -> tuple[int, int]:
        """(copies, rows) of one forward."""
        if self.one_by_one:
            return 1, rows
        if self.training:
            return number, rows
        most, in_pairs = self.args.eval_batch_size, self.draws_kind == "antithetic"
        if branch is None and not in_pairs:
            return max(1, most // rows), rows
        copies = min(number, most)
        if copies < number and in_pairs:
            copies = max(2, copies - copies % 2)
        return copies, max(1, most // copies)

    def _joined(self, forwards: int) -> int:
        """How many forwards of a sharded base some other process runs more than this one.

        Exchanged before the first of them: behind the last one the exchange would meet the other
        process's gathering of a layer.
        """
        if not self.is_sharded or self.training:
            return 0
        largest = torch.tensor(forwards, device=self.accelerator.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest) - forwards

    def copies_forward(self, batch: Batch, draws: range, **kwargs) -> Float[Tensor, "nB C"]:
        """Class logits of n copies of a batch in one forward, copy by copy.

        Args:
            batch: inputs of B rows.
            draws: which of the copies.
            kwargs: of the model.
        """
        copies, rows = len(draws), len(batch["input_ids"])
        branch = self.branch_of(batch, copies)  # of whole rows: a row's rest may be one token
        shared = None
        if self.prefix is not None and "past_key_values" not in kwargs:
            shared = self.prefix.applied(batch, draws)
        if shared is not None:
            batch, cache = shared
            kwargs |= {"past_key_values": cache, "use_cache": True}
        kwargs |= self.copies_kwargs(draws, rows)
        if branch is None:
            stacked = {key: torch.cat([value] * copies) for key, value in batch.items()}
            return self.batch_logits(stacked, **kwargs)
        with branch.repeating(rows, copies):
            return self.batch_logits(batch, **kwargs)

    def copies_kwargs(self, draws: range, rows: int) -> dict[str, Any]:
        """What else the model is told of a forward of copies, of so many rows each."""
        return {}

    def branch_of(self, batch: Batch, copies: int) -> Branch | None:
        """Where copies begin to differ, found with the first batch that is stacked.

        Not in training: dropout of the backbone is other noise in every copy there.
        """
        if copies == 1 or self.training or self.one_by_one:
            return None
        ids = batch["input_ids"]
        if ids.shape[-1] < 2 or ids.device.type == "meta":
            return None  # nothing can be seen of masks, or of numbers
        # another adapter may have other layers, and another caller other inputs
        key = (tuple(map(id, self.noisy_modules() or ())), frozenset(batch))
        if key not in self._branches:
            self._branches[key] = None  # copies of the probe are no reason for another one
            self._branches[key] = find_branch(self, batch)
        return self._branches[key]

    def _met(self, batch: Batch) -> Batch:
        if self.prefix is not None:
            self.prefix.meet(batch)
        return batch

    def batch_logits(self, batch: Batch, **kwargs) -> Float[Tensor, "B C"]:
        """Class logits of one forward, whatever `sampling` makes of it."""
        if self._takes_logits_to_keep:
            # The answer is one token: the head need not be applied to the others.
            kwargs["logits_to_keep"] = 1
        # `adapter_names` are understood by PeftModel.forward only.
        model = super().forward if "adapter_names" in kwargs else self.base_model
        return self.class_logits(model(**batch, **kwargs))

    def class_logits(self, output) -> Float[Tensor, "B C"]:
        """The logits of the C classes in a model's output.

        For a causal LM those of the answer tokens at the last position (rows are padded on the
        left), for a classifier all.

        Raises:
            RunError: nobody has said what the answer tokens are.
        """
        if not self.is_causal:
            return output.logits
        if self.answer_tokens is None:
            raise RunError(
                "class_logits needs target_ids, the answer tokens (C,); call "
                "prepare_for_fit_evaluate, or set them."
            )
        return output.logits[:, -1, self.answer_tokens]

    @property
    def answer_tokens(self) -> Tensor | None:
        """(C,) of the data set that is being evaluated, or else of the adapter's own."""
        own = self._loaders_target_ids is None
        return self.target_ids if own else self._loaders_target_ids

    @contextmanager
    def answering(self, target_ids: Tensor | None) -> Iterator[None]:
        """Context in which class logits are those of these answer tokens; None: of our own."""
        before = self._loaders_target_ids
        if self.is_causal and target_ids is not None:
            self._loaders_target_ids = target_ids.to(self.accelerator.device)
        try:
            yield
        finally:
            self._loaders_target_ids = before

    def model_inputs(self, batch: Batch) -> Batch:
        """A batch without labels and index, as the model reads it.

        For a causal LM the last position must be a real token, because that is where the answer is
        read: rows that are padded on the right are turned round to be padded on the left. Positions
        count from the first real token.

        Raises:
            RunError: a row has no token (told where that costs no wait for a GPU).
        """
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        if self.is_causal and "attention_mask" in inputs:
            inputs = padded_on_the_left(inputs)
        if self._takes_position_ids:
            inputs["position_ids"] = self.positions(inputs["attention_mask"])
        return inputs

    @staticmethod
    def positions(attention_mask: Tensor) -> Tensor:
        """(B, T) the position of each token, counted from the first real one."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _slices(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch["input_ids"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}
