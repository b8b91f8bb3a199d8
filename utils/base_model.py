"""What a base model's config.json says, looked at before anything is built from it.

The file may come from the hub, be damaged, or be written by somebody who means harm: transformers
turns some of its values into loops, into memory and, by way of `attn_implementation`, into code
that it fetches. Lives in `utils` because both rooms need it: `modelwrappers` to load the model,
`dataset` to know how many positions and tokens it has.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.embedded import resolve_model
from utils.errors import UsageError, described, quoted
from utils.hub import go_offline_if_unreachable
from utils.records import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REMEDY = (
    "--model takes a hub id (with network access or a filled cache), a folder with config.json and "
    "model.safetensors that `save_pretrained` wrote, or an embedded model: smollm2-135m, minilm-l6."
)

# Attention and experts that are part of torch or transformers. Any other name is one of a kernel
# on the hub; flash_attention_N is taken from there, too, where the package is not installed.
BUILT_IN = ("eager", "sdpa", "flex_attention", "paged|eager", "batched_mm", "grouped_mm")
# What a base may be quantised with; transformers fetches the kernels of other formats from the hub.
QUANTISED = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "awq", "hqq")
# What transformers makes a list or a loop of, by a part of its key: the most that is believed.
MOST = {"layers": 4096, "n_layer": 4096, "num_labels": 2**20, "experts": 2**16}
MOST_OF_ANY = 2**40
_LAYER = re.compile(r"[\w.\-]*")

# Models that count positions from the padding token's id on, as RoBERTa does.
COUNTS_FROM_PADDING = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert"),
    *("data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "markuplm", "lilt"),
    "layoutlmv3",
}


def shown(text: str) -> str:
    """The beginning of a name, as a message shows it."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def model_path(name: str) -> str:
    """The local folder of a base model, or its id on the hub.

    Raises:
        UsageError: it is a path to something that is no folder with a model in it.
    """
    path = Path(resolve_model(name))
    try:
        if path.is_dir():
            _check_folder(path, name)
            return str(path)
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, NUL in it, not allowed to look
        raise UsageError(f"--model {shown(name)} cannot be read ({error}). {REMEDY}") from None
    if exists:
        raise UsageError(f"--model {shown(name)} is no folder. {REMEDY}")
    go_offline_if_unreachable()
    return name


def _check_folder(folder: Path, name: str) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"--model {shown(name)} holds an adapter, not a model; pass it as --load-lora-path "
            "and the model that it was trained on as --model."
        )
    raise UsageError(f"--model {shown(name)}: there is no config.json in it. {REMEDY}")


def load_config(name: str, trust_remote_code: bool, **settings: Any) -> PreTrainedConfig:
    """The configuration of a base model, checked before transformers acts on it.

    Args:
        name: as in --model.
        trust_remote_code: the user's own word, never a file's.
        settings: entries to replace, such as `num_labels`.
    Raises:
        UsageError: it cannot be found or read, asks for code from elsewhere, or has sizes that no
            model has.
    """
    from transformers import AutoConfig, PreTrainedConfig

    path = model_path(name)
    told = f"--model {shown(name)}"
    if Path(path).is_dir():
        read_json(Path(path) / "config.json", told)
    try:
        content, _ = PreTrainedConfig.get_config_dict(path, trust_remote_code=trust_remote_code)
        _check_content(content, told, trust_remote_code)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)
    except UsageError:
        raise
    except Exception as error:
        # transformers and the hub raise a dozen classes here; to the user it is one thing.
        raise UsageError(f"{told} cannot be loaded: {described(error)}\n{REMEDY}") from None


def _check_content(content: Any, told: str, trust_remote_code: bool) -> None:
    if not isinstance(content, Mapping):
        raise UsageError(f"{told}: its config.json must hold an object.")
    for key, value in _entries(content):
        where = f"{told}: config.json has {quoted(key)}: {quoted(value)}"
        if isinstance(value, int) and not isinstance(value, bool):
            most = next((m for part, m in MOST.items() if part in key.lower()), MOST_OF_ANY)
            if abs(value) > most:
                raise UsageError(f"{where}; more than {most} is not believed.")
        if trust_remote_code:
            continue
        if key.endswith(("attn_implementation", "experts_implementation")):
            for implementation in _names(value):
                if str(implementation).startswith("flash_attention_") and not _is_built_in(
                    implementation
                ):
                    raise UsageError(
                        f"{where}: the package flash-attn is not installed here, and transformers "
                        "would take it from the hub. Install it, or take the key out."
                    )
                if not _is_built_in(implementation):
                    raise UsageError(
                        f"{where}: that is code from the hub. Take the key out, install the "
                        "package that has it, or pass --trust-remote-code if you have read it."
                    )
        if key == "quantization_config" and isinstance(value, Mapping):
            _check_patterns(value, told)
            method = value.get("quant_method", "bitsandbytes")
            if method not in QUANTISED:
                raise UsageError(
                    f"{told}: config.json says that the weights are quantised with "
                    f"{quoted(method)}, whose code may come from the hub. Known are "
                    f"{', '.join(QUANTISED)}; pass --trust-remote-code, or an unquantised model."
                )


def _check_patterns(quantization: Mapping[str, Any], told: str) -> None:
    """Names of layers only: transformers takes these entries for regular expressions.

    Raises:
        UsageError: one could be made to take for ever.
    """
    for key, value in quantization.items():
        names = value if isinstance(value, list) else []
        if isinstance(value, Mapping):  # gptq's `dynamic`: expression -> settings
            names = list(value) if key == "dynamic" else []
        for name in names:
            if isinstance(name, str) and not _LAYER.fullmatch(name):
                raise UsageError(
                    f"{told}: config.json has {quoted(key)}: {quoted(name)} in its "
                    "quantization_config, which is no name of a layer; write the names out."
                )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those of nested objects (`text_config`) and lists, too."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key), value
            for item in value if isinstance(value, list) else [value]:
                yield from _entries(item) if isinstance(item, Mapping) else [(str(key), item)]


def _names(value: Any) -> list[Any]:
    """One implementation, or one for each part of a composite model."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _is_built_in(implementation: Any) -> bool:
    if implementation is None or implementation in BUILT_IN:
        return True
    is_flash = isinstance(implementation, str) and implementation.startswith("flash_attention_")
    return is_flash and importlib.util.find_spec("flash_attn") is not None


def num_positions(config: PreTrainedConfig) -> int | None:
    """The most tokens that a row may have, where the model says so."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1 or not getattr(text, "position_biased_input", True):
        return None  # relative positions have no end
    if text.model_type in COUNTS_FROM_PADDING:
        most -= (text.pad_token_id or 0) + 1
    return most
