"""One or two sentences and a class, for encoders (or any model with a classification head)."""

from __future__ import annotations

from dataset.base import DatasetBase, Example
from dataset.columns import checked_text
from dataset.record import Prompt
from dataset.sources import Row
from dataset.tasks import CLASSIFICATION_TASKS
from utils.errors import UsageError, quoted


class SequenceClassification(DatasetBase):
    """Sentences as the tokenizer joins them; the longer one loses its end if they do not fit."""

    tasks = CLASSIFICATION_TASKS
    padding_side = "right"

    def encode(self, row: Row) -> tuple[Example, bool]:
        """Tokens of the sentences, with `token_type_ids` where the tokenizer makes them."""
        texts = self._sentences(row)
        encoded = dict(self.tokenizer(*texts))
        most, reason = self.limit
        cut = len(encoded["input_ids"]) > most
        if cut:
            if self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2) >= most:
                raise UsageError(f"{reason}, which leaves nothing of the text; raise --max-seq-len")
            encoded = dict(self.tokenizer(*texts, truncation=True, max_length=most))
        return encoded, cut

    def _sentences(self, row: Row) -> tuple[str, ...]:
        texts = self.task.prompt(row)
        if isinstance(texts, Prompt) or not isinstance(texts, tuple | list) or len(texts) > 2:
            raise TypeError(
                f"the task's prompt gives {quoted(texts)}; a classifier reads a tuple of one or "
                "two sentences, a Prompt is for --dataset-type mcdataset"
            )
        for number, text in enumerate(texts, 1):
            checked_text(text, f"sentence {number}")
        if not any(text.strip() for text in texts):
            raise ValueError("there is no text in it")
        return tuple(texts)
