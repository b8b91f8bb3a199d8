"""One or two sentences and a class, for encoders (or any model with a classification head)."""

from __future__ import annotations

from dataset.base import DatasetBase, Example
from dataset.sources import Row
from dataset.tasks import CLASSIFICATION_TASKS


class SequenceClassification(DatasetBase):
    """Sentences as the tokenizer joins them; the longer one loses its end if they do not fit."""

    tasks = CLASSIFICATION_TASKS
    padding_side = "right"

    def encode(self, row: Row) -> tuple[Example, bool]:
        """Tokens of the sentences, with `token_type_ids` where the tokenizer makes them."""
        texts = self.task.prompt(row)
        encoded = dict(self.tokenizer(*texts))
        cut = len(encoded["input_ids"]) > self.max_length
        if cut:
            encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))
        return encoded, cut
