"""From a batch to class logits, one slice per draw; the answers among a model's outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelwrappers.engine.prediction import Batch, padded_on_the_left, stacked_copies
from utils.errors import RunError


class ClassLogits:
    """The forwards of a wrapper; stands before `PeftModel`, whose `forward` it calls.

    Needs `sampling`, `is_stochastic`, `args` and `accelerator`.

    Attributes:
        is_causal: whether answers are tokens of a causal LM, else they are a classifier's classes.
        target_ids: (C,) answer tokens of the adapter's own data set.
        shares_positions: whether the model sends something without a row per example through its
            adapted layers, as DeBERTa its table of relative positions: draws cannot be stacked.
    """

    def read_architecture(self, model: PreTrainedModel, is_causal: bool) -> None:
        """Note what the base model takes and gives."""
        takes = inspect.signature(model.forward).parameters
        self.is_causal = is_causal
        self.target_ids: Tensor | None = None
        self.shares_positions = model.config.model_type.startswith("deberta")
        self.is_sharded = False
        self._takes_position_ids = is_causal and "position_ids" in takes
        self._takes_logits_to_keep = is_causal and "logits_to_keep" in takes
        self._loaders_target_ids: Tensor | None = None  # of what is being evaluated

    def forward_logits(
        self, batch: Batch, sample: bool = True, n_samples: int = 1, **kwargs
    ) -> Float[Tensor, "B N C"]:
        """Class logits, one slice per posterior draw.

        All draws are one forward: the batch is stacked N times and each stochastic layer splits it
        again. No more than --eval-batch-size rows are stacked at once, outside of training.

        Args:
            batch: model inputs, `input_ids (B, T)` and so on, without labels and index.
            sample: False for the posterior mean (N = 1).
            n_samples: N, the number of draws.
        Returns:
            (B, N, C)
        """
        if not (sample and self.is_stochastic and n_samples):
            with self.sampling(0):
                return self.batch_logits(batch).unsqueeze(1)
        return torch.cat(list(self.draw_logits(batch, n_samples))).transpose(0, 1)  # (B, N, C)

    def draw_logits(self, batch: Batch, n_samples: int) -> Iterator[Float[Tensor, "n B C"]]:
        """The logits of `n_samples` draws in chunks, which may be reduced one by one."""

        def forward(stacked: Batch, draws: range) -> Tensor:
            with self.sampling(len(draws)):
                return self.batch_logits(stacked)

        return self.copies_logits(batch, n_samples, forward)

    def copies_logits(
        self, batch: Batch, number: int, forward: Callable[[Batch, range], Tensor]
    ) -> Iterator[Float[Tensor, "n B C"]]:
        """`stacked_copies`, as many at once as --eval-batch-size has room for.

        A sharded base is gathered by all processes together, but how many copies are stacked at
        once depends on a batch's rows, and the last batch has fewer: forwards that other processes
        run more are joined. So all chunks have to be taken there.
        """
        rows = len(batch["input_ids"])
        most = number if self.training else max(1, self.args.eval_batch_size // rows)
        if self.shares_positions:
            most = 1
        missing = 0
        if self.is_sharded and not self.training:
            forwards = -(-number // most)
            largest = torch.tensor(forwards, device=self.accelerator.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            missing = int(largest) - forwards
        yield from stacked_copies(batch, number, most, forward)
        for _ in range(missing):
            with self.sampling(0):
                self.batch_logits(batch)

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
            positions = inputs["attention_mask"].cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp(min=0)
        return inputs
