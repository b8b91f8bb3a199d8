"""What a base model reads: its tokenizer, and how many tokens and which ones it takes of a row."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from utils.base_model import REMEDY, load_config, model_path, num_positions, shown
from utils.errors import UsageError, described, quoted


def load_tokenizer(args) -> PreTrainedTokenizerBase:
    """The tokenizer of --load-model-path, or of --model where there is none.

    Raises:
        UsageError: there is none to be found.
    """
    for name in filter(None, (args.load_model_path, args.model)):
        try:
            load_config(name, args.trust_remote_code)  # the tokenizer's own reader believes it
            tokenizer = AutoTokenizer.from_pretrained(
                model_path(name),
                use_fast=not args.use_slow_tokenizer,
                trust_remote_code=args.trust_remote_code,
            )
            most = tokenizer.model_max_length
            if not isinstance(most, int | float) or not most >= 1:
                raise ValueError(f"its model_max_length is {quoted(most)}")
            return tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except UsageError as error:
            problem = str(error)
        except BaseException as error:
            # transformers raises OSError, ValueError, KeyError and others for the same thing; the
            # library below panics, with a class that is no Exception
            problem = f"no tokenizer can be loaded for --model {shown(name)}: {described(error)}"
            problem += f"\n{REMEDY}"
    raise UsageError(problem)


class Limits:
    """What the tokenizer and the base model of a run take.

    Args:
        args: flags.
        tokenizer: of the base model.
    """

    def __init__(self, args, tokenizer: PreTrainedTokenizerBase) -> None:
        self._args = args
        self._tokenizer = tokenizer

    @cached_property
    def _config(self) -> PreTrainedConfig | None:
        """What the base model says of itself; None where the model is only known to the caller."""
        try:
            name = self._args.load_model_path or self._args.model
            return load_config(name, self._args.trust_remote_code)
        except UsageError:  # whoever loads the model says so
            return None

    def _size(self, name: str) -> int | None:
        """A number of the base model's configuration, where it has it."""
        return None if self._config is None else getattr(self._config.get_text_config(), name, None)

    @cached_property
    def most(self) -> tuple[int, str]:
        """The most tokens of a row, and who says so."""
        own = self._tokenizer.model_max_length
        limits = [
            (self._args.max_seq_len, f"--max-seq-len is {self._args.max_seq_len}"),
            (own, f"the tokenizer's limit is {own}"),
        ]
        positions = num_positions(self._config) if self._config else None
        if positions is not None:
            limits.append((positions, f"the model has {positions} positions"))
        number, reason = min(limits)
        return int(number), reason

    @property
    def pad_token_id(self) -> int:
        """What fills short rows: the end of text, where there is no padding token.

        A padding token that was added to the tokenizer, but not to the model, is none.
        """
        size = self._size("vocab_size")
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None and (size is None or token < size):
                return token
        return 0

    def check(self, example: dict[str, Any], where: str) -> None:
        """A row must have tokens, and the model must know them.

        Args:
            example: its token lists.
            where: it stands, for the message.
        Raises:
            UsageError: it has none, or others.
        """
        if not example["input_ids"]:
            raise UsageError(f"{where}: the row's text has no tokens.")
        for key, name in (("input_ids", "vocab_size"), ("token_type_ids", "type_vocab_size")):
            size, most = self._size(name), max(example.get(key, [0]))
            if size and most >= size:  # 0: DeBERTa has no token types
                raise UsageError(
                    f"{where}: the tokenizer gives {key} up to {most}, but the model knows {size} "
                    f"({name}): the tokenizer of --model {self._args.model} is that of another one."
                )
