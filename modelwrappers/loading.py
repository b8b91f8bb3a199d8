"""To a ready wrapper: from the flags of a run, or from the record of a saved posterior."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from modelwrappers import WRAPPERS, get_wrapper
from modelwrappers.engine.adaptive import Settling
from modelwrappers.engine.posterior import (
    BASE_MODEL_FLAGS,
    EVALUATION_FLAGS,
    SETTLING_FLAGS,
    PosteriorRecord,
    Saved,
    has_seen_held_out,
    is_tuned,
    load_posterior_of,
    read_posterior_record,
    read_saved,
    snapshot,
)
from modelwrappers.lora.backbone import load_base, lora_config
from modelwrappers.lora.sharding import check_sharding, shards_base
from modelwrappers.wrapperbase import WrapperBase
from utils.adapter_base import CONFIG_FILE, RECORD_FILE
from utils.args import settings_of
from utils.data_set_names import data_set_name, same_data_set
from utils.errors import UsageError, quoted
from utils.hub import adapter_folder
from utils.logging import logger
from utils.registry import names_code


def build_wrapper(args, num_labels: int, accelerator, saved: Saved | None = None) -> WrapperBase:
    """Base model, LoRA layers and method, as the flags say; with --load-lora-path's weights.

    Args:
        args: flags, of a run or of a posterior's record.
        num_labels: C.
        accelerator: of this process.
        saved: the content of --load-lora-path, where it was read already.
    """
    if is_sharded := shards_base(accelerator):
        check_sharding(args)
    wrapper_class = get_wrapper(args.modelwrapper)
    if args.load_lora_path is not None and saved is None:  # before the model: it may be damaged
        saved = read_saved(adapter_folder(args), "--load-lora-path")
    if saved is not None:
        _check_members(saved, wrapper_class, args.modelwrapper)
    model, new_layers = load_base(args, num_labels, accelerator.device, stay_on_cpu=is_sharded)
    config = lora_config(args, model, saved.config if saved is not None else None)
    wrapper = wrapper_class(model, config, args, accelerator)
    wrapper.new_layers = new_layers
    if saved is not None:
        trains = args.max_train_steps or args.n_epochs
        is_own = not trains and _is_by(saved.record, wrapper_class)
        load_posterior_of(wrapper, saved, is_own)
        if is_own and args.calibrate != "no" and is_tuned(saved.record):
            raise UsageError(
                f"--calibrate {args.calibrate}: a temperature or a prior of the posterior in "
                f"{saved.folder} was chosen by held-out rows, so they cannot calibrate it any "
                "more; pass --calibrate in the run that chooses it."
            )
        _check_unseen(saved, args)
    wrapper.settle()
    return wrapper


def _check_unseen(saved: Saved, args) -> None:
    """Rows that an adapter was compared with others on are no calibration rows, of any method.

    Raises:
        UsageError: they would be.
    """
    if args.calibrate == "no" or saved.record is None or not has_seen_held_out(saved.record):
        return
    if same_data_set(args.dataset, args.adapter_dataset):
        raise UsageError(
            f"--calibrate {args.calibrate}: the adapter in {saved.folder} was evaluated on its "
            "held-out rows (--testing-set train_val), and if it was chosen by them, they promise "
            "too much; calibrate an adapter whose run was evaluated on other rows."
        )


def _is_by(record: PosteriorRecord | None, wrapper_class: type[WrapperBase]) -> bool:
    """Whether a method made this posterior, as far as names tell."""
    if record is None:
        return False
    name = record.modelwrapper
    if not names_code(name) and name.lower() in WRAPPERS:
        return WRAPPERS[name.lower()] is wrapper_class
    # a class of the user's, which is not asked
    return name.rpartition(":")[2].lower() == wrapper_class.__name__.lower()


def _check_members(saved: Saved, wrapper_class: type[WrapperBase], method: str) -> None:
    """A folder of several adapters is for a method that knows what to do with them.

    Raises:
        UsageError: this one does not.
    """
    maker = WRAPPERS.get(saved.record.modelwrapper.lower()) if saved.record is not None else None
    if maker is None or not maker.has_members or wrapper_class.has_members:
        return
    patterns = [name for name in maker.adapter_files if name.endswith(f"/{CONFIG_FILE}")]
    members = sorted(f for name in patterns for f in saved.folder.glob(name.replace("{n}", "*")))
    if members:
        raise UsageError(
            f"--load-lora-path: {saved.folder} holds an ensemble of {len(members) + 1} members; "
            f"--modelwrapper {method} takes one of them, e.g. {members[0].parent}, or pass "
            f"--modelwrapper {saved.record.modelwrapper}."
        )


def load_posterior(
    path_or_hub_id: str | Path,
    model: str | None = None,
    device: str = "auto",
    modelwrapper: str | None = None,
    dataset: str | None = None,
    shared_draws: bool = False,
    **settings,
) -> WrapperBase:
    """The posterior that a run or `push_to_hub` left, ready to predict.

    Everything that is needed stands in the adapter's bayes_config.json: no flags of the run. What
    that file says is data; a method in a file of one's own runs on the caller's word only.

    Args:
        path_or_hub_id: a run's folder, or a hub repo.
        model: the base model, if it has moved since: hub id, folder or embedded alias.
        device: "auto", "cpu" or "cuda".
        modelwrapper: for a posterior of a method of your own, its "path/to/file.py:CLASS"; or
            another method, which then takes the adapter that the posterior is over.
        dataset: whose rows `answer` reads, where they are not those of the data set that the
            posterior was trained on: a name, or for a task of your own its "path/to/file.py:NAME".
        shared_draws: whether a draw must be one set of weights for all rows, as what is said of
            several rows together needs it: without random signs.
        settings: flags of draws and evaluation by their names, instead of the run's own:
            `bayes_eval_n_samples_final=50`, `eval_batch_size=64`, `seed_sampling=2`.
    Returns:
        the wrapper of the method that made it, in evaluation mode: `answer(rows)`,
        `predict(loader)`, `evaluate(loader)`, `forward_logits(batch, n_samples=N)`. A temperature
        that the run has fitted is `temperature`, and the first three apply it.
    Raises:
        UsageError: no adapter or no bayes_config.json there, one that breaks a rule, an unknown
            method, or one that only the file names.
    """
    folder = Path(path_or_hub_id)
    if not _is_folder(folder):
        folder = snapshot(str(path_or_hub_id))
    _check_described(folder)
    record = read_posterior_record(folder, "load_posterior")
    saved = read_saved(folder, "load_posterior", record)
    where = f"load_posterior: {folder / RECORD_FILE}"
    if modelwrapper is None and names_code(record.modelwrapper):
        raise UsageError(
            f"{where} names the method {quoted(record.modelwrapper)}, a file, and code is not "
            "taken from a hub repo or a folder on a file's word. Look at that file, then pass "
            'modelwrapper="path/to/file.py:CLASS".'
        )
    if record.choices is None:
        raise UsageError(
            f"{where} does not say what its answers are; set `wrapper.answers`, the C choices in "
            "label order, before you save the posterior."
        )
    method = modelwrapper or record.modelwrapper
    called = {"modelwrapper": method, "load_lora_path": str(folder), "device": device}
    called |= _checked_settings(settings)
    if shared_draws and "flipout_eval" in get_wrapper(method).posterior_flags:
        called["flipout_eval"] = "none"
    if model is not None:
        called |= {"model": str(model), "load_model_path": None}
    args = settings_of(get_wrapper(method), called, _settings(record, get_wrapper(method)), where)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "load_posterior: device is 'cuda', but there is no CUDA device here; pass 'auto' or "
            "'cpu'."
        )
    accelerator = Accelerator(cpu=device == "cpu" or None)
    wrapper = build_wrapper(args, len(record.choices), accelerator, saved)
    _take_answers(wrapper, record, where)
    wrapper.results = {name: scores.model_dump() for name, scores in record.metrics.items()}
    wrapper.prompt, wrapper.table_task = record.prompt, record.task
    wrapper.read_rows_by(partial(_reader, wrapper, record, dataset, where))
    is_settling = record.evaluation is not None and record.evaluation.draws_adaptive
    if is_settling and _is_by(record, type(wrapper)) and not shared_draws:
        wrapper.settling = Settling.of(record.evaluation)
    if shared_draws:
        check_shared_draws(wrapper)
    wrapper.temperature = wrapper.fitted_temperature
    if wrapper.temperature is not None:
        logger.info("Predictions are scaled by the fitted temperature %.4f.", wrapper.temperature)
    return wrapper.eval()


def _check_described(folder: Path) -> None:
    """An adapter is no posterior yet.

    Raises:
        UsageError: it lies there without a record; the message says how it becomes one.
    """
    if not (folder / RECORD_FILE).exists() and (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"load_posterior: there is no file {folder / RECORD_FILE}: what lies there is an "
            "adapter, and no posterior yet. Make one of it: `python main.py --load-lora-path "
            f"{folder} --modelwrapper METHOD --dataset-type TYPE --dataset NAME --checkpoint` "
            "evaluates it with METHOD (and trains it, with --max-train-steps N); then load that "
            "run's folder."
        )


def _settings(record: PosteriorRecord, wrapper_class: type[WrapperBase]) -> dict[str, object]:
    """What a record says, by the names of the flags whose rules it is held against."""
    settings = {
        **record.model_dump(include={*BASE_MODEL_FLAGS, "dataset_type"}),
        **record.rows.model_dump(),
        "dataset": data_set_name(record.dataset),  # a name: nothing is looked up
    }
    if not _is_by(record, wrapper_class):  # only the adapter is taken
        return settings
    own = wrapper_class.recorded_flags(record.flags)
    evaluation = {}
    if record.evaluation is not None:
        # without what settles: `predict` gives every row all of its draws unless it is told else
        evaluation = record.evaluation.model_dump(exclude=set(SETTLING_FLAGS))
    return settings | evaluation | own | {"bayes_eval_n_samples_final": record.n_draws}


def check_shared_draws(wrapper: WrapperBase) -> None:
    """A draw is one set of weights for all rows, so that something can be said of them together.

    Raises:
        UsageError: it is not.
    """
    with wrapper.evaluation_draws(wrapper.final_draws()):
        if wrapper.rows_share_draws:
            return
    remedy = "take blob, tfb or deepensemble"
    if hasattr(wrapper.args, "flipout_eval"):
        remedy = "pass --flipout-eval none"
    raise UsageError(
        f"{wrapper.args.modelwrapper}: a draw is other weights in every row, so nothing can be "
        f"said of several rows together; {remedy}, or choose by what looks at rows one by one."
    )


SETTINGS = ("bayes_eval_n_samples_final", "prefix_cache", *EVALUATION_FLAGS)


def _checked_settings(settings: dict[str, object]) -> dict[str, object]:
    """What a caller may say of draws and evaluation.

    Raises:
        UsageError: another flag, which the posterior's record decides.
    """
    for name in settings:
        if name not in SETTINGS:
            raise UsageError(
                f"load_posterior takes no {quoted(name)}: its settings are {', '.join(SETTINGS)}; "
                "all else stands in the posterior's record."
            )
    return settings


def _reader(wrapper: WrapperBase, record: PosteriorRecord, dataset: str | None, where: str):
    """How rows of the posterior's task become tokens: `dataset.reading.RowReader`."""
    from dataset.reading import reader_of

    if dataset is None and names_code(record.dataset):
        raise UsageError(
            f"{where} names the data set {quoted(record.dataset)}, a file, and code is not taken "
            "from a hub repo or a folder on a file's word. Look at that file, then pass "
            'dataset="path/to/file.py:NAME".'
        )
    reader = reader_of(
        wrapper.args.replaced(dataset=dataset or record.dataset),
        wrapper.accelerator,
        record.choices,
        shots=record.prompt.shots if record.prompt is not None else "",
        table=record.task if dataset is None else None,
        example_tokens=record.prompt.input_ids if record.prompt is not None else (),
    )
    own = wrapper.target_ids
    if own is not None and reader.target_ids.tolist() != own.tolist():
        raise UsageError(
            f"{where}: the answers' tokens are {quoted(own.tolist())}, but the tokenizer of "
            f"{quoted(wrapper.args.model)} gives {quoted(reader.target_ids.tolist())}: it is not "
            "the one that the posterior was trained with."
        )
    return reader


def _take_answers(wrapper: WrapperBase, record: PosteriorRecord, where: str) -> None:
    """Answers, their tokens and the padding token, which must be tokens of the model."""
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
