"""Methods, by the name that --modelwrapper takes.

To add one: write `modelwrappers/<method>.py` with a subclass of `WrapperBase` that overrides one to
three of its hooks, and add one line to `WRAPPERS`. Or leave the repository alone and pass
`--modelwrapper path/to/file.py:ClassName`.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from modelwrappers.lora.exact_4bit import deny_avx512bf16

deny_avx512bf16()  # before the first import of PEFT, which imports bitsandbytes

from modelwrappers import wrapperbase
from modelwrappers.backbone import adapter_folder, load_model, lora_config
from modelwrappers.blob import BLoB
from modelwrappers.deepensemble import DeepEnsemble
from modelwrappers.laplace import Laplace
from modelwrappers.map import MAP
from modelwrappers.mcdropout import MCDropout
from modelwrappers.sharding import check_sharding, shards_base
from modelwrappers.tfb import TFB
from modelwrappers.wrapperbase import BASE_MODEL_FLAGS, WrapperBase
from utils.args import build_parser, finish
from utils.errors import UsageError
from utils.hub import go_offline_if_unreachable
from utils.records import read_json
from utils.registry import lookup

WRAPPERS: dict[str, type[WrapperBase]] = {
    "map": MAP,
    "mle": MAP,
    "mcdropout": MCDropout,
    "deepensemble": DeepEnsemble,
    "blob": BLoB,
    "laplace": Laplace,
    "tfb": TFB,
    "tfblora": TFB,  # the original's names: tfb, and tfb with --tfb-criterion flips
    "tfblora_acc": TFB,
}


def get_wrapper(name: str) -> type[WrapperBase]:
    """The class for --modelwrapper.

    Raises:
        UsageError: an unknown name, or a file whose class is no `WrapperBase`.
    """
    # Files written for the original code say `from wrapperbase import WrapperBase`.
    sys.modules.setdefault("wrapperbase", wrapperbase)
    cls = lookup(WRAPPERS, name, "method")
    if not (isinstance(cls, type) and issubclass(cls, WrapperBase)):
        raise UsageError(f"--modelwrapper {name}: it must be a subclass of WrapperBase.")
    return cls


def build_wrapper(args, num_labels: int, accelerator) -> WrapperBase:
    """Base model, LoRA layers and method, as the flags say; with --load-lora-path's weights."""
    if is_sharded := shards_base(accelerator):
        check_sharding(args)
    if args.load_lora_path is not None:
        adapter_folder(args)  # before the model: it may be missing
    model = load_model(args, num_labels, accelerator.device, stay_on_cpu=is_sharded)
    wrapper = get_wrapper(args.modelwrapper)(model, lora_config(args, model), args, accelerator)
    if args.load_lora_path is not None:
        wrapper.load_adapter_weights(adapter_folder(args))
    wrapper.settle()
    return wrapper


def load_posterior(
    path_or_hub_id: str | Path, model: str | None = None, device: str = "auto"
) -> WrapperBase:
    """The posterior that `--checkpoint` or `push_to_hub` left, ready to predict.

    Everything that is needed stands in the adapter's bayes_config.json: no flags of the run.

    Args:
        path_or_hub_id: a run's folder, or a hub repo.
        model: the base model, if it has moved since: hub id, folder or embedded alias.
        device: "auto", "cpu" or "cuda".
    Returns:
        the wrapper of the method that made it, in evaluation mode: `predict(loader)`,
        `evaluate(loader)`, `forward_logits(batch, n_samples=N)`.
    Raises:
        UsageError: no adapter or no bayes_config.json there, an unknown method, or one whose code
            would have to come from the hub.
    """
    folder = Path(path_or_hub_id)
    is_local = folder.is_dir()
    if not is_local:
        from huggingface_hub import snapshot_download

        go_offline_if_unreachable()
        try:
            folder = Path(snapshot_download(str(path_or_hub_id)))
        except Exception as error:
            raise UsageError(
                f"load_posterior: {path_or_hub_id} is neither a folder nor a hub repo that can be "
                f"read ({type(error).__name__})."
            ) from None
    config = read_json(folder / "bayes_config.json", "load_posterior")
    if ".py:" in config["modelwrapper"] and not is_local:
        raise UsageError(
            f"load_posterior: {path_or_hub_id} names the method {config['modelwrapper']}, a file; "
            "code is not taken from a hub repo. Download it, look at it, and load the folder."
        )
    if not config["choices"]:
        raise UsageError(f"load_posterior: {folder} does not say what its answers are.")
    wrapper_class = get_wrapper(config["modelwrapper"])
    # Named one by one: a file from the hub must not set other flags, --trust-remote-code above all.
    known = {key: config[key] for key in (*BASE_MODEL_FLAGS, *_POSTERIOR_FLAGS)}
    known |= {key: config["flags"][key] for key in wrapper_class.posterior_flags}
    known |= {"load_lora_path": str(folder), "nowand": True, "device": device}
    known |= {"bayes_eval_n_samples_final": config["n_draws"]}
    if model is not None:
        known |= {"model": model, "load_model_path": None}
    parser = build_parser(wrapper_class.add_arguments)
    args = finish(parser, [], known, wrapper_class.check_arguments)
    wrapper = build_wrapper(args, len(config["choices"]), Accelerator(cpu=device == "cpu" or None))
    wrapper.answers = config["choices"]
    wrapper.results = config["metrics"]
    wrapper.base_model.config.pad_token_id = config["pad_token_id"]
    if config["target_ids"] is not None:
        wrapper.target_ids = torch.tensor(config["target_ids"], device=wrapper.accelerator.device)
    return wrapper.eval()


_POSTERIOR_FLAGS = ("modelwrapper", "dataset", "dataset_type")
