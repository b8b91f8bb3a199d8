"""Tiny models and tokenizers, made in memory and saved as folders that `--model` takes.

Everything here runs offline, on the CPU, through the real entry point.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import main

WORDS = "business entertainment politics sports tech A B C D E True False"
TEXT = [f"Question: what is {word}?\nChoices:\nAnswer: {word}" for word in WORDS.split()] * 5
TOPIC_WORDS = {
    "business": "bank profit shares",
    "sports": "match goal coach",
    "tech": "phone chip software",
}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Llama-3, Qwen and SmolLM2: a word takes its leading space along."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with [CLS] and [SEP], as in BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = [*sorted(" ".join(TOPIC_WORDS.values()).split()), "the", "a", "of"]
    ids = {word: i for i, word in enumerate(special + vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def _save(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _llama(folder: Path, **kwargs) -> str:
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.1,  # else so small a model tells its inputs hardly apart
            pad_token_id=tokenizer.pad_token_id,
            **kwargs,
        )
    )
    return _save(folder, model, tokenizer)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    return _llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory) -> str:
    """Its head is its embedding, as in SmolLM2."""
    folder = tmp_path_factory.mktemp("models") / "tied-llama"
    return _llama(folder, tie_word_embeddings=True)


def _encoder(config_class, model_class, folder: Path, **kwargs) -> str:
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,  # so that runs can be compared; LoRA's dropout is a flag
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )
    return _save(folder, model_class(config), tokenizer)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    return _encoder(BertConfig, BertForMaskedLM, tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-roberta"
    return _encoder(RobertaConfig, RobertaForMaskedLM, folder, pad_token_id=0)


def topic_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in the embedded corpus' columns, of different lengths, that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    topics = sorted(TOPIC_WORDS)
    rows = []
    for i in range(number):
        name = topics[i % len(topics)]
        length = 1 + int(torch.randint(6, (), generator=generator))
        words = [
            TOPIC_WORDS[name].split()[int(torch.randint(3, (), generator=generator))]
            for _ in range(length)
        ]
        rows.append({"text": " ".join(words), "topic": name})
    return rows


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """40 training and 37 test rows for `bbc_headlines`."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", topic_rows(40))
    write_jsonl(folder / "test.jsonl", topic_rows(37, seed=1))
    return str(folder)


@pytest.fixture
def causal_flags(tiny_llama, data_dir, tmp_path) -> list[str]:
    """A short run of the tiny causal LM, all but method and length."""
    return [
        *("--dataset-type", "mcdataset", "--dataset", "bbc_headlines", "--model", tiny_llama),
        *("--data-dir", data_dir, "--output-dir", str(tmp_path / "out")),
        *("--batch-size", "8", "--lr", "1e-2", "--nowand", "--device", "cpu"),
    ]


@pytest.fixture
def classifier_flags(tiny_bert, data_dir, tmp_path) -> list[str]:
    """A short run of the tiny encoder, all but method and length."""
    return [
        *("--dataset-type", "bertds", "--dataset", "bbc_headlines", "--model", tiny_bert),
        *("--data-dir", data_dir, "--output-dir", str(tmp_path / "out")),
        *("--batch-size", "8", "--lr", "1e-2", "--nowand", "--device", "cpu"),
    ]


def run_folder(flags: list[str]) -> Path:
    """Where a run with these flags leaves its files."""
    from utils.run_paths import run_folder_path

    return run_folder_path(main.parse_args(flags))


def build(flags: list[str]):
    """(args, dataset, wrapper) as `main` builds them, prepared but not trained."""
    args = main.parse_args(flags)
    wrapper = main.assemble(args)
    wrapper.run_folder.path.mkdir(parents=True, exist_ok=True)
    return args, wrapper.dataset, wrapper


def kill_and_resume(flags: list[str], method: type, when, monkeypatch) -> None:
    """Run until `when(wrapper)` holds before an update, die there, and resume."""
    original = method.optimizer_step

    def killed(self):
        if when(self):
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(method, "optimizer_step", killed)
    assert main.run(flags) == 130
    monkeypatch.undo()
    main.main([*flags, "--resume"])
