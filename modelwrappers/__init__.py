"""Methods, by the name that --modelwrapper takes.

To add one: write `modelwrappers/<method>.py` with a subclass of `WrapperBase` that overrides one to
three of its hooks, and add one line to `WRAPPERS`. Or leave the repository alone and pass
`--modelwrapper path/to/file.py:ClassName`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwrappers.lora.exact_4bit import delay_bitsandbytes, deny_avx512bf16
from utils.catalogue import Catalogue, read_catalogue
from utils.errors import UsageError, quoted
from utils.logging import logger
from utils.registry import LazyTable, find_key, lookup, names_code

if TYPE_CHECKING:
    from modelwrappers.engine.posterior import PosteriorRecord
    from modelwrappers.wrapperbase import WrapperBase

deny_avx512bf16()  # before anything of ours imports PEFT, which imports bitsandbytes

WRAPPERS = LazyTable(
    {
        "map": "modelwrappers.map:MAP",
        "mle": "modelwrappers.map:MAP",
        "mcdropout": "modelwrappers.mcdropout:MCDropout",
        "deepensemble": "modelwrappers.deepensemble:DeepEnsemble",
        "blob": "modelwrappers.blob:BLoB",
        "laplace": "modelwrappers.laplace:Laplace",
        "tfb": "modelwrappers.tfb:TFB",
        "tfblora": "modelwrappers.tfb:TFB",  # the original's names: tfb, and tfb with
        "tfblora_acc": "modelwrappers.tfb:TFB",  # --tfb-criterion flips
    }
)
# The classes by their own names: `from modelwrappers import BLoB` imports that one, then.
_CLASSES = LazyTable(
    {
        "BLoB": "modelwrappers.blob:BLoB",
        "DeepEnsemble": "modelwrappers.deepensemble:DeepEnsemble",
        "Laplace": "modelwrappers.laplace:Laplace",
        "MAP": "modelwrappers.map:MAP",
        "MCDropout": "modelwrappers.mcdropout:MCDropout",
        "TFB": "modelwrappers.tfb:TFB",
        "WrapperBase": "modelwrappers.wrapperbase:WrapperBase",
    }
)
# Rooms that had another name in the first design; files of users import them.
_FORMER_NAMES = {
    "backbone": "modelwrappers.lora.backbone",
    "stochastic_lora": "modelwrappers.lora.stochastic",
}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    if name in _FORMER_NAMES:
        return importlib.import_module(_FORMER_NAMES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def catalogue() -> Catalogue:
    """What is known of the methods without importing them."""
    return read_catalogue(WRAPPERS, Path(__file__).parent)


def check_method_name(name: str) -> None:
    """Look a method up without importing it, as far as that goes.

    Raises:
        UsageError: an unknown name.
    """
    if not names_code(name):
        find_key(WRAPPERS, name, "method")


def get_wrapper(name: str) -> type[WrapperBase]:
    """The class for --modelwrapper.

    Raises:
        UsageError: an unknown name, or a file whose class is no `WrapperBase`.
    """
    check_method_name(name)
    delay_bitsandbytes()
    from modelwrappers import wrapperbase

    # Files written for the original code say `from wrapperbase import WrapperBase`.
    sys.modules.setdefault("wrapperbase", wrapperbase)
    cls = lookup(WRAPPERS, name, "method")
    if not (isinstance(cls, type) and issubclass(cls, wrapperbase.WrapperBase)):
        raise UsageError(f"--modelwrapper {name}: it must be a subclass of WrapperBase.")
    return cls


def build_wrapper(args, num_labels: int, accelerator) -> WrapperBase:
    """Base model, LoRA layers and method, as the flags say; with --load-lora-path's weights."""
    from modelwrappers.engine.posterior import (
        RECORD_FILE,
        adapter_folder,
        read_adapter_config,
        read_posterior_record,
    )
    from modelwrappers.lora.backbone import load_model, lora_config
    from modelwrappers.lora.sharding import check_sharding, shards_base

    if is_sharded := shards_base(accelerator):
        check_sharding(args)
    folder, config, record = None, None, None
    if args.load_lora_path is not None:  # before the model: it may be missing or damaged
        folder = adapter_folder(args)
        config = read_adapter_config(folder, "--load-lora-path")
        if (folder / RECORD_FILE).exists():
            record = read_posterior_record(folder, "--load-lora-path")
    model = load_model(args, num_labels, accelerator.device, stay_on_cpu=is_sharded)
    config = lora_config(args, model, config)
    wrapper = get_wrapper(args.modelwrapper)(model, config, args, accelerator)
    if folder is not None:
        wrapper.load_adapter_weights(folder)
        trains = args.max_train_steps or args.n_epochs
        own = None if trains or not _is_by(record, wrapper) else record
        wrapper.take_posterior(folder, own)
        wrapper.fitted_temperature = own.temperature if own is not None else None
    wrapper.settle()
    return wrapper


def _is_by(record: PosteriorRecord | None, wrapper: WrapperBase) -> bool:
    """Whether the wrapper's method made this posterior, as far as names tell."""
    if record is None:
        return False
    if names_code(record.modelwrapper):  # its class may be the user's, but is not asked
        return record.modelwrapper.rpartition(":")[2] == type(wrapper).__name__
    return WRAPPERS.get(record.modelwrapper.lower()) is type(wrapper)


def load_posterior(
    path_or_hub_id: str | Path,
    model: str | None = None,
    device: str = "auto",
    modelwrapper: str | None = None,
) -> WrapperBase:
    """The posterior that a run or `push_to_hub` left, ready to predict.

    Everything that is needed stands in the adapter's bayes_config.json: no flags of the run. What
    that file says is data; a method in a file of one's own runs on the caller's word only.

    Args:
        path_or_hub_id: a run's folder, or a hub repo.
        model: the base model, if it has moved since: hub id, folder or embedded alias.
        device: "auto", "cpu" or "cuda".
        modelwrapper: for a posterior of a method of your own, its "path/to/file.py:CLASS".
    Returns:
        the wrapper of the method that made it, in evaluation mode: `predict(loader)`,
        `evaluate(loader)`, `forward_logits(batch, n_samples=N)`. A temperature that the run has
        fitted is `temperature`, and `predict` and `evaluate` apply it.
    Raises:
        UsageError: no adapter or no bayes_config.json there, one that breaks a rule, an unknown
            method, or one that only the file names.
    """
    from accelerate import Accelerator

    from modelwrappers.engine.posterior import BASE_MODEL_FLAGS, RECORD_FILE, read_posterior_record
    from utils.args import build_parser, finish

    folder = Path(path_or_hub_id)
    if not _is_folder(folder):
        folder = _snapshot(str(path_or_hub_id))
    record = read_posterior_record(folder, "load_posterior")
    where = f"load_posterior: {folder / RECORD_FILE}"
    if modelwrapper is None and names_code(record.modelwrapper):
        raise UsageError(
            f"{where} names the method {quoted(record.modelwrapper)}, a file, and code is not "
            "taken from a hub repo or a folder on a file's word. Look at that file, then pass "
            'modelwrapper="path/to/file.py:CLASS".'
        )
    if record.choices is None:
        raise UsageError(f"{where} does not say what its answers are.")
    method = modelwrapper or record.modelwrapper
    wrapper_class = get_wrapper(method)
    flags = {key: record.flags[key] for key in wrapper_class.posterior_flags if key in record.flags}
    stored = record.model_dump(include={*BASE_MODEL_FLAGS, "dataset_type"})
    stored |= record.rows.model_dump() | flags
    stored |= {"bayes_eval_n_samples_final": record.n_draws}
    # A file's data set is a name here: nothing is looked up.
    stored |= {"dataset": record.dataset.rpartition(":")[2]}
    called = {"modelwrapper": method, "load_lora_path": str(folder), "device": device}
    called |= {"nowand": True}
    if model is not None:
        called |= {"model": str(model), "load_model_path": None}
    parser = build_parser(wrapper_class.add_arguments)
    settings = parser.settings(called, stored, where)
    args = finish(settings, parser, wrapper_class.check_arguments, adopts=False)
    accelerator = Accelerator(cpu=device == "cpu" or None)
    wrapper = build_wrapper(args, len(record.choices), accelerator)
    _take_answers(wrapper, record, where)
    wrapper.results = {name: scores.model_dump() for name, scores in record.metrics.items()}
    wrapper.temperature = wrapper.fitted_temperature
    if wrapper.temperature is not None:
        logger.info("Predictions are scaled by the fitted temperature %.4f.", wrapper.temperature)
    return wrapper.eval()


def _take_answers(wrapper: WrapperBase, record: PosteriorRecord, where: str) -> None:
    """Answers, their tokens and the padding token, which must be tokens of the model."""
    import torch

    wrapper.answers = list(record.choices)
    vocabulary = getattr(wrapper.base_model.config, "vocab_size", None)
    for name, tokens in (
        ("target_ids", record.target_ids),
        ("pad_token_id", [record.pad_token_id]),
    ):
        for token in tokens or ():
            if token is not None and vocabulary is not None and token >= vocabulary:
                raise UsageError(
                    f"{where}: {name} has {token}, but {quoted(record.model)} has "
                    f"{vocabulary} tokens."
                )
    wrapper.base_model.config.pad_token_id = record.pad_token_id
    if wrapper.is_causal:
        if record.target_ids is None:
            raise UsageError(f"{where}: key 'target_ids' is null; a causal LM needs them.")
        wrapper.target_ids = torch.tensor(record.target_ids, device=wrapper.accelerator.device)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, or of characters that no path has
        return False


def _snapshot(repo: str) -> Path:
    """The local copy of a hub repo.

    Raises:
        UsageError: it cannot be read.
    """
    from huggingface_hub import snapshot_download

    from utils.hub import go_offline_if_unreachable

    go_offline_if_unreachable()
    try:
        return Path(snapshot_download(repo))
    except Exception as error:
        raise UsageError(
            f"load_posterior: {quoted(repo)} is neither a folder nor a hub repo that can be "
            f"read ({type(error).__name__})."
        ) from None
