"""The beginning that prompts share, run once per draw instead of once per row.

Instructions and few-shot examples stand at the start of every prompt of a task. Where a draw is one
set of weights for all rows, a causal LM computes the same keys and values for these tokens in every
row: they are kept, and the rows' own tokens attend to them.

    a row padded on the left      [pad pad beginning own]
    keys and values               [beginning] [pad pad own]

Positions count real tokens, and the padding between is masked, so nothing but rounding changes.
Kept are the layers of one row per draw, or of one row in all where no noise has come yet
(`engine.branch`); a layer's copies for the rows of a forward last as long as its attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from utils.errors import UsageError
from utils.logging import logger

if TYPE_CHECKING:
    from modelwrappers.engine.logits import ClassLogits
    from modelwrappers.engine.prediction import Batch

# Architectures whose cache, masks and positions are tested against no cache (tests/test_prefix.py).
FAMILIES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gpt2"),
        *("phi", "phi3", "smollm3", "olmo", "olmo2", "granite", "cohere", "stablelm"),
        *("gpt_neox", "falcon", "bloom"),
    }
)
FEWEST_TOKENS = 8  # of a beginning: for fewer the bookkeeping costs what they do
MOST_BYTES = 2**32  # of keys and values that are kept


class SharedLayer(DynamicLayer):
    """Keys and values of the beginning for each draw, which any number of rows attend to.

    Args:
        keys, values: (c, heads, P, width) for c draws.
        rows: of each draw in a forward; draws come one after the other.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.rows = keys, values, rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Those of the beginning in front of a forward's own, which are not kept."""
        return (
            torch.cat([self.keys.repeat_interleave(self.rows, 0), key_states], dim=-2),
            torch.cat([self.values.repeat_interleave(self.rows, 0), value_states], dim=-2),
        )


class Prefix:
    """The beginning of the prompts of one evaluation, and its keys and values by draw.

    The tokens are found as batches come: those that all rows so far begin with. A batch that shares
    fewer of them shortens the beginning, which is then computed again.
    """

    def __init__(self, wrapper: ClassLogits, fewest: int = FEWEST_TOKENS) -> None:
        self.wrapper = wrapper
        self.fewest = fewest
        self.tokens: list[int] | None = None
        self._forget()
        self._is_too_large = False

    def _forget(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # draw -> layers, of one row
        self._together: tuple[range, list[tuple[Tensor, Tensor]]] | None = None  # the last ones

    def meet(self, batch: Batch) -> None:
        """Take note of the rows of a batch, (B, T), padded on the left."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if ids.device.type == "meta":  # no numbers to compare
            return
        first = mask.int().argmax(-1)  # (B,) where each row begins
        lengths = mask.shape[-1] - first
        most = int(lengths.min()) - 1  # the answer is read behind a token of the row's own
        if self.tokens is not None:
            most = min(most, len(self.tokens))
        elif len(ids) == 1:  # one row shares everything with itself
            return
        columns = first[:, None] + torch.arange(max(most, 0), device=ids.device)
        starts = ids.gather(1, columns)  # (B, most)
        known = starts[0] if self.tokens is None else torch.tensor(self.tokens[:most]).to(starts)
        same = (starts == known).all(0).int().cumprod(0).sum()
        whole = (mask.sum(-1) == lengths).all()  # no hole in a row
        tokens = known[: int(same)].tolist() if whole else []
        if tokens != self.tokens:
            self.tokens = tokens
            self._forget()

    def applied(self, batch: Batch, draws: range) -> tuple[Batch, Cache] | None:
        """A batch without its beginning, and the keys and values that stand for it.

        Args:
            batch: rows of one that was met.
            draws: that it will be stacked for.
        Returns:
            None where the rows share too little, or reach beyond a sliding window.
        """
        number = len(self.tokens or ())
        if number < self.fewest or self._is_too_large or not self._fits(batch):
            return None
        kept = self._layers(draws, batch)
        if kept is None:
            return None
        mask = batch["attention_mask"].bool()
        begins = mask.int().argmax(-1)[:, None] + number  # where each row's own tokens begin
        columns = torch.arange(number, mask.shape[-1], device=mask.device)
        own = columns >= begins  # (B, T - P)
        used = int(own.any(0).int().argmax())  # columns that are padding in every row are cut
        rest = {
            key: value[:, number + used :] if value.shape == mask.shape else value
            for key, value in batch.items()
        }
        own = own[:, used:].to(batch["attention_mask"].dtype)
        rest["attention_mask"] = torch.cat([torch.ones_like(mask[:, :number]).to(own), own], 1)
        if "position_ids" in batch:
            rest["position_ids"] = self.wrapper.positions(rest["attention_mask"])[:, number:]
        rows = len(mask)
        return rest, Cache(layers=[SharedLayer(keys, values, rows) for keys, values in kept])

    def _fits(self, batch: Batch) -> bool:
        """A window counts places, and the padding behind the beginning takes some."""
        window = getattr(self.wrapper.base_model.config, "sliding_window", None)
        return not window or batch["input_ids"].shape[-1] < window

    def _layers(self, draws: range, batch: Batch) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of every layer for these draws; None where they are too many."""
        if self._together is not None and self._together[0] == draws:
            return self._together[1]
        missing = [draw for draw in draws if draw not in self._kept]
        if len(missing) == len(draws):
            self._keep(draws, batch)
        else:  # some of them were in another chunk
            for draw in missing:
                with self.wrapper.from_draw(draw), self.wrapper.sampling(1):
                    self._keep(range(draw, draw + 1), batch)
        if self._is_too_large:
            return None
        branch = self.wrapper.branch_of(batch, len(draws))
        below = branch.depth if branch is not None else 0  # layers that all draws have in common
        layers = self._kept[draws[0]][:below]
        for parts in zip(*(self._kept[draw][below:] for draw in draws), strict=True):
            keys, values = zip(*parts, strict=True)
            layers.append((torch.cat(keys), torch.cat(values)))
        self._together = draws, layers
        return layers

    def _keep(self, draws: range, batch: Batch) -> None:
        """Run the beginning for these draws, in the context of one forward of them."""
        device = batch["input_ids"].device
        ids = torch.tensor([self.tokens], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "position_ids" in batch:
            inputs["position_ids"] = self.wrapper.positions(inputs["attention_mask"])
        cache = DynamicCache(config=self.wrapper.base_model.config)
        self.wrapper.copies_forward(inputs, draws, past_key_values=cache, use_cache=True)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        for number, draw in enumerate(draws):
            self._kept[draw] = [
                (keys, values)
                if len(keys) == 1
                else (keys[number : number + 1], values[number : number + 1])
                for keys, values in states
            ]
        size = len(self._kept) * sum(
            t.numel() * t.element_size() for pair in self._kept[draws[0]] for t in pair
        )
        if size > MOST_BYTES:
            self._is_too_large = True
            self._forget()
            logger.info(
                "The %d tokens with which prompts begin are not kept: %.1f GB of keys and values "
                "would be too many.",
                len(self.tokens),
                size / 1e9,
            )


@contextmanager
def sharing_prefix(wrapper: ClassLogits, n_samples: int) -> Iterator[None]:
    """Context of one evaluation, in which the beginning that prompts share is run once per draw.

    It does nothing where that would change something: a draw that is not one set of weights for all
    rows, a classifier, an architecture that is not known, a sharded base.
    """
    is_sharing = (
        wrapper.args.prefix_cache != "off"
        and wrapper.is_causal
        and not wrapper.is_sharded
        and _obstacle(wrapper) is None
        and (n_samples == 0 or wrapper.rows_share_draws)
    )
    if not is_sharing:
        yield
        return
    before = wrapper.prefix
    wrapper.prefix = Prefix(wrapper, 1 if wrapper.args.prefix_cache == "on" else FEWEST_TOKENS)
    try:
        yield
    finally:
        wrapper.prefix = before


def _obstacle(wrapper: ClassLogits) -> str | None:
    """Why a wrapper's model cannot share a beginning, if so."""
    config = wrapper.base_model.config
    if config.model_type not in FAMILIES:
        return f"the architecture '{config.model_type}' is none that it is tested with"
    rope = str(getattr(config, "rope_parameters", None))  # a record, or one for each kind of layer
    if "'dynamic'" in rope or "'longrope'" in rope:
        return "this model's rotary embedding depends on the length of the whole row"
    parameters = inspect.signature(wrapper.batch_logits).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD or p.name == "past_key_values" for p in parameters):
        return "the method's own batch_logits takes no keys and values"
    return None


def check_prefix(wrapper: ClassLogits) -> None:
    """--prefix-cache on goes together with the model.

    Raises:
        UsageError: it does not.
    """
    if wrapper.args.prefix_cache == "on" and (reason := _obstacle(wrapper)) is not None:
        raise UsageError(
            f"--prefix-cache on: {reason}; pass --prefix-cache auto, which leaves it out here."
        )
