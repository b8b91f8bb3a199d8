"""Answer tokens on tokenizers of every family, built small in memory in the family's own way.

What holds for all of them: the answer token is the one that follows the prompt when prompt and
answer are tokenized as one text.
"""

from types import SimpleNamespace

import pytest
from conftest import TEXT
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset import MultipleChoice
from dataset.tasks import LETTERS, MULTIPLE_CHOICE_TASKS
from main import parse_args
from utils.embedded import resolve_model
from utils.errors import UsageError

# What follows a byte-level model's words is decided by these: how digits are cut differs, and what
# may stand before a word.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def sentencepiece(normalizer, pre_tokenizer) -> PreTrainedTokenizerFast:
    """BPE with byte fallback: the space is a letter of the word, and the text begins with one."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # words are learned apart, as SentencePiece does
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    # " A" and "A" both are tokens of Llama-2, so both occur often here
    text = [*TEXT, *(f"{letter}){letter}" for letter in LETTERS for _ in range(20))]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama_2() -> PreTrainedTokenizerFast:
    """The legacy conversion: one more space before any text, also before one that has a space."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return sentencepiece(normalizers.Sequence(steps), None)


def mistral() -> PreTrainedTokenizerFast:
    """The newer one: a space before the text's first word, if there is none."""
    return sentencepiece(None, pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False))


def byte_level(pre_tokenizer, normalizer=None, bos: str | None = None) -> PreTrainedTokenizerFast:
    """BPE of bytes, no space before the text: " A" and "A" are two tokens."""
    special = ["<|endoftext|>", *([bos] if bos else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=bos
    )


def split_by(pattern: str):
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


FAMILIES = {
    "llama-2": llama_2,
    "mistral": mistral,
    "llama-3": lambda: byte_level(split_by(LLAMA_3), bos="<|begin_of_text|>"),
    "qwen": lambda: byte_level(split_by(QWEN), normalizers.NFC()),
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt-2 with a prefix space": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
}
EMBEDDED = pytest.param("smollm2", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*FAMILIES, EMBEDDED])
def tokenizer(request):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    return FAMILIES[request.param]()


def dataset(tokenizer, task: str) -> MultipleChoice:
    args = parse_args(
        f"--dataset-type mcdataset --dataset {task} --model m --modelwrapper mle".split()
    )
    process = SimpleNamespace(is_local_main_process=True, wait_for_everyone=lambda: None)
    return MultipleChoice(args, process, tokenizer)


@pytest.mark.parametrize("task", ["obqa", "ARC-Easy", "boolq", "winogrande_s", "bbc_headlines"])
def test_the_answer_token_is_the_one_that_follows_the_prompt(tokenizer, task):
    tokens = dataset(tokenizer, task).target_ids.tolist()
    choices = MULTIPLE_CHOICE_TASKS[task].choices
    assert len(set(tokens)) == len(choices)
    for prompt in ("Choices:\nAnswer:", "Question: what is A?\nAnswer (true or false):"):
        before = tokenizer(prompt).input_ids
        for word, token in zip(choices, tokens, strict=True):
            assert tokenizer(f"{prompt} {word}").input_ids == [*before, token], word


def test_families_differ_in_who_writes_the_space(tokenizer):
    """The mapping has to find the form: both would not be one token everywhere."""
    (bare,) = tokenizer("A", add_special_tokens=False).input_ids
    (answer,) = {dataset(tokenizer, "obqa").target_ids[0].item()}
    adds_space = tokenizer.convert_ids_to_tokens(bare)[0] in "▁Ġ"
    assert (answer == bare) == adds_space


@pytest.fixture
def with_choices(monkeypatch):
    """obqa with other answers."""
    import dataclasses

    def replace(*choices: str) -> str:
        task = dataclasses.replace(MULTIPLE_CHOICE_TASKS["obqa"], choices=choices)
        monkeypatch.setitem(MULTIPLE_CHOICE_TASKS, "obqa", task)
        return "obqa"

    return replace


@pytest.mark.parametrize("word", ["xylophone", "two words", "é", "ABC"])
def test_an_answer_of_several_tokens_is_an_error_in_every_family(tokenizer, with_choices, word):
    if word in ("é", "ABC") and tokenizer.vocab_size > 10_000:
        pytest.skip("one token of a large vocabulary")
    with pytest.raises(UsageError, match=rf"'{word}' of obqa is not one token of m's"):
        dataset(tokenizer, with_choices("A", word))


def test_two_answers_of_one_token_are_an_error(with_choices):
    lowercase = byte_level(pre_tokenizers.ByteLevel(), normalizers.Lowercase())
    with pytest.raises(UsageError, match=r"two answers of obqa are the same token.*'A'.*'a'"):
        dataset(lowercase, with_choices("A", "a"))


def test_an_answer_that_the_vocabulary_lacks_is_an_error(with_choices):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "A": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(UsageError, match="'B' of obqa is not one token"):
        dataset(tokenizer, with_choices("A", "B"))
