"""What a trained posterior is worth, kept: metrics.json, predictions, temperature, shifted sets.

    predict -> log_probs (n, N, C) by row -> posterior_predictive (n, C) -> utils.metrics.score
            -> Metrics -> the data set's block of metrics.json

Without a run's folder the same numbers are computed and nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decisions.calibration import Calibration
from decisions.conformal import MOST_ROWS
from modelwrappers.engine.answers import Answers
from modelwrappers.engine.calibration import CalibrationFacts
from modelwrappers.engine.prediction import Batch, Predictions
from modelwrappers.engine.tracking import track
from utils.data_set_names import data_set_name
from utils.errors import RunError
from utils.interrupts import interrupts
from utils.logging import logger
from utils.metrics import Metrics, posterior_predictive, score
from utils.run_paths import CALIBRATION, HELD_OUT, predictions_file
from utils.temperature import fit_temperature, scale

if TYPE_CHECKING:
    from modelwrappers.wrapperbase import WrapperBase


def evaluate_run(wrapper: WrapperBase, training_seconds: float) -> Metrics:
    """Evaluate on all data sets of the run, and leave results and adapter in its folder.

    Returns:
        the metrics of the run's own data set.
    """
    args = wrapper.args
    if args.temperature_scaling:
        wrapper.fitted_temperature = _fit_temperature(wrapper)
    if args.calibrate != "no":
        wrapper.calibration = calibration = _calibrate(wrapper)
        wrapper.calibration_facts = CalibrationFacts(
            rows=len(calibration.labels),
            n_draws=wrapper.final_draws(),
            temperature=wrapper.fitted_temperature,
            unseen=_is_unseen(wrapper),
        )
    name, split = data_set_name(args.dataset), args.testing_set
    if split != "train_val":  # the others may name where anchors come from, too
        split = getattr(wrapper.dataset, "eval_split", split)
    metrics = _score_and_keep(wrapper, wrapper.eval_loader, name, split, predictions_file())
    track(wrapper, {f"final/{key}": value for key, value in metrics._asdict().items()})
    own = wrapper.predictions
    for other, (dataset, loader) in wrapper.shifted.items():
        file = predictions_file(other)
        if not getattr(dataset, "is_labelled", True):  # a data set of a caller's own may not say
            _keep_unlabelled(wrapper, loader, other, dataset.eval_split, file)
            continue
        shifted = _score_and_keep(wrapper, loader, other, dataset.eval_split, file)
        track(wrapper, {f"final/{other}/{k}": value for k, value in shifted._asdict().items()})
        logger.info("%s: ACC %.4f  ECE %.4f  NLL %.4f  Brier %.4f", other, *shifted)
    wrapper.predictions = own
    if wrapper.run_folder is not None:
        _finish(wrapper, training_seconds)
    return metrics


def _finish(wrapper: WrapperBase, training_seconds: float) -> None:
    """The adapter, and last of all metrics.json: it says that the run is finished."""
    args, folder = wrapper.args, wrapper.run_folder
    if args.checkpoint:
        for file in wrapper.save_adapter(folder.files) or ():  # an overridden one
            folder.file(file)
    elif args.load_lora_path is not None:
        folder.keep_adapter_of(Path(args.load_lora_path))
    with interrupts.deferred():  # a signal has nothing left to end
        if wrapper.accelerator.is_main_process:
            folder.write_metrics(
                {
                    "modelwrapper": args.modelwrapper,
                    "model": args.model,
                    "seed": args.seed,
                    "updates": wrapper.global_step,
                    "training_seconds": round(training_seconds, 3),
                    "peak_memory_bytes": peak_memory(wrapper.accelerator.device),
                    "datasets": wrapper.results,
                },
            )
        wrapper.accelerator.wait_for_everyone()
        folder.finish()


def _calibrate(wrapper: WrapperBase) -> Calibration:
    """What sets and selective answers need, of held-out rows; their predictions are kept."""
    name = data_set_name(wrapper.args.dataset)
    predictions = wrapper.predict(wrapper.calibration_loader)
    unseen = {"unseen": "true" if _is_unseen(wrapper) else "false"}  # metadata holds text alone
    file = predictions_file(CALIBRATION)
    _write_predictions(wrapper, predictions, name, CALIBRATION, file, unseen)
    if wrapper.fitted_temperature is not None:
        scaled = scale(predictions.log_probs, wrapper.fitted_temperature).float()
        predictions = Predictions(scaled, *predictions[1:], predictions.num_draws)
    calibration = Answers.of(predictions).as_calibration()
    if len(calibration.labels) > MOST_ROWS:
        kept = np.sort(np.random.default_rng(0).permutation(len(calibration.labels))[:MOST_ROWS])
        calibration = Calibration(*(values[kept] for values in calibration))
    return calibration


def _is_unseen(wrapper: WrapperBase) -> bool:
    """Whether it is known that the adapter was not trained on the calibration rows."""
    args = wrapper.args
    return args.load_lora_path is None or args.adapter_dataset is not None


def _fit_temperature(wrapper: WrapperBase) -> float:
    """T from predictions on the part of the training set that was held out; they are kept."""
    predictions = wrapper.predict(wrapper.held_out_loader)
    name = data_set_name(wrapper.args.dataset)
    _write_predictions(wrapper, predictions, name, HELD_OUT, predictions_file(HELD_OUT))
    return fit_temperature(predictions.log_probs, predictions.labels, predictions.num_draws)


def _score_and_keep(
    wrapper: WrapperBase, loader: Iterable[Batch], dataset: str, split: str, file: str
) -> Metrics:
    """Evaluate; keep the data set's block of metrics.json and its predictions."""
    num_bins = wrapper.args.num_bins
    started = time.perf_counter()
    metrics = Metrics(*map(float, wrapper.evaluate(loader)))  # a method's own may give tensors
    broken = [key for key, value in metrics._asdict().items() if not math.isfinite(value)]
    if broken:
        raise RunError(
            f"the evaluation of {dataset} gave {metrics}: {', '.join(broken)} must be finite; "
            "look at the method's own `evaluate`. --resume goes on from the last state."
        )
    block: dict[str, Any] = metrics._asdict() | {
        "split": split,
        "num_bins": num_bins,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if wrapper.predictions is not None:  # an overridden `evaluate` may keep none
        log_probs, labels, _ = wrapper.predictions
        num_draws = wrapper.predictions.num_draws
        block |= _counts(wrapper.predictions)
        temperature = wrapper.fitted_temperature
        if temperature is not None:
            scaled = posterior_predictive(scale(log_probs, temperature), num_draws)
            block["temperature_scaled"] = {
                "temperature": temperature,
                **score(scaled, labels, num_bins)._asdict(),
            }
        _write_predictions(wrapper, wrapper.predictions, dataset, split, file)
    wrapper.results[dataset] = block
    return metrics


def _keep_unlabelled(
    wrapper: WrapperBase, loader: Iterable[Batch], dataset: str, split: str, file: str
) -> None:
    """Keep what is predicted for rows of none of the classes, which no metric is defined for.

    The report holds their uncertainties against those of the run's own data set.
    """
    started = time.perf_counter()
    predictions = wrapper.predict(loader)
    wrapper.results[dataset] = {
        "unlabelled": True,
        "split": split,
        "seconds": round(time.perf_counter() - started, 3),
        **_counts(predictions),
    }
    if wrapper.fitted_temperature is not None:
        scaled = {"temperature": wrapper.fitted_temperature}
        wrapper.results[dataset]["temperature_scaled"] = scaled
    _write_predictions(wrapper, predictions, dataset, split, file)
    logger.info(
        "%s: %d rows of none of the classes; the report says how well they are told from the "
        "others.",
        dataset,
        len(predictions.labels),
    )


def _counts(predictions: Predictions) -> dict[str, Any]:
    """A block's numbers of rows and draws."""
    counts = {"n_examples": len(predictions.labels), "n_draws": predictions.log_probs.shape[1]}
    if predictions.num_draws is not None:
        counts["mean_draws"] = predictions.num_draws.double().mean().item()
    return counts


def _write_predictions(
    wrapper: WrapperBase,
    predictions: Predictions,
    dataset: str,
    split: str,
    file: str,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    if wrapper.run_folder is None or not wrapper.accelerator.is_main_process:
        return
    wrapper.run_folder.write_tensors(
        file,
        predictions.tensors(),
        {
            "dataset": dataset,
            "split": split,
            "seed": str(wrapper.args.seed),
            "modelwrapper": wrapper.args.modelwrapper,
            "draws": getattr(wrapper, "draws_kind", "independent"),
            **more,
        },
    )


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
