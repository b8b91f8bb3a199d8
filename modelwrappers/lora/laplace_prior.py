r"""The prior of a Laplace posterior: flags, mean, and precision by evidence or by held-out rows.

The prior is $N(\mu, \Lambda^{-1})$ over the LoRA matrices that the posterior covers: $\mu$ is 0 or
the adapter's start, $\Lambda$ one precision for all weights or one for each matrix.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from utils.args import add_switch, between, seed
from utils.errors import UsageError, quoted
from utils.logging import logger, notice_once
from utils.run_records import ARGS_FILE, read_run_record

SMALLEST, LARGEST = 1e-12, 1e12  # of a precision that a flag may name
GRID = (1e-2, 1e6)  # ends of --laplace-grid
POINTS_PER_DECADE = 4
# How much worse than the MAP's the evidence's predictive may be on training rows, in nats a row,
# before a warning: a posterior that is not even right about what it has seen is too wide.
WORSE_BY = 0.1
CHECKED_ROWS = 64  # training rows that this is looked up on, evenly spaced
# Standard deviations of the cosine between independent vectors that a start must exceed.
PLAUSIBLE = 4.0


# --- flags ----------------------------------------------------------------------------------------


def _prior_precision(text: str) -> str | float:
    return text if text in ("evidence", "validation") else between(SMALLEST, LARGEST)(text)


def add_prior_arguments(group) -> None:
    """The flags of the prior, for `Laplace.add_arguments`."""
    group.add_argument(
        "--laplace-prior-precision",
        type=_prior_precision,
        metavar="{evidence,validation,NUMBER}",
        help="how the prior's precision is found, or its value (default: validation where rows are "
        "held out, else evidence)",
    )
    group.add_argument(
        "--laplace-grid",
        nargs=2,
        type=between(SMALLEST, LARGEST),
        metavar=("LOW", "HIGH"),
        help=f"precisions that validation tries, {POINTS_PER_DECADE} a decade "
        f"(default: {GRID[0]:g} {GRID[1]:g})",
    )
    group.add_argument(
        "--laplace-prior-mean",
        choices=["zero", "init"],
        default="zero",
        help="the prior's mean: 0, or the adapter before it was trained",
    )
    group.add_argument(
        "--laplace-prior-structure",
        choices=["scalar", "layerwise"],
        default="scalar",
        help="one precision for all weights, or one for each LoRA matrix (by evidence)",
    )
    add_switch(
        group,
        "--laplace-refit",
        help="find the mode of the linearised model again under the chosen prior",
    )


def settle_prior(args) -> None:
    """Fill in the default of --laplace-prior-precision; for `Laplace.check_arguments`.

    Raises:
        UsageError: flags of the prior contradict each other, or there are no rows to choose by.
    """
    wanted, structure = args.laplace_prior_precision, args.laplace_prior_structure
    if structure == "layerwise":
        if args.laplace_hessian == "full":
            raise UsageError(
                "--laplace-prior-structure layerwise adds another number to each matrix's "
                "curvature, but --laplace-hessian full keeps one spectrum of all of it; pass "
                "--laplace-hessian kron or diag, or --laplace-prior-structure scalar."
            )
        if wanted not in (None, "evidence"):
            reason = (
                "searches one number by held-out rows, and a search over one for each LoRA matrix "
                "would fit these rows' noise"
                if wanted == "validation"
                else "is one number for all weights"
            )
            raise UsageError(
                f"--laplace-prior-precision {wanted} {reason}, but --laplace-prior-structure "
                "layerwise has many; pass --laplace-prior-precision evidence, or "
                "--laplace-prior-structure scalar."
            )
        wanted = "evidence"
    if wanted is None:
        wanted = "validation" if _has_rows_to_choose_by(args) else "evidence"
    args.laplace_prior_precision = wanted
    if wanted == "validation":
        if args.hold_out is False:
            raise UsageError(
                "--laplace-prior-precision validation needs rows that were not trained on, but "
                "the training set is whole (--hold-out false, or so the adapter's run was "
                "made); train with --hold-out, or pass evidence."
            )
        args.hold_out = True
    if args.laplace_grid is None:
        args.laplace_grid = list(GRID)
    elif wanted != "validation":
        raise UsageError(
            f"--laplace-grid is what --laplace-prior-precision validation tries, but that is "
            f"{wanted} here; drop --laplace-grid, or pass --laplace-prior-precision validation."
        )
    low, high = args.laplace_grid
    if not low < high:
        raise UsageError(
            f"--laplace-grid {low:g} {high:g}: the first number must be less than the second."
        )


def _has_rows_to_choose_by(args) -> bool:
    """Whether rows are held out that serve nothing which forbids to choose a prior by them."""
    if args.calibrate != "no" or args.testing_set == "train_val":
        return False  # sets and risks are promised by these rows, or they are what is evaluated
    is_kept = args.hold_out is None and args.adapter_hold_out
    return bool(args.hold_out or is_kept or args.temperature_scaling)


# --- the mean -------------------------------------------------------------------------------------


def settle_start(args) -> None:
    """For --laplace-prior-mean init: let this run begin as the loaded adapter's own began.

    The start is not stored, it is made again: building the model and its adapter from the seed of
    the run that trained it gives the same random numbers, so that a new wrapper has the adapter's
    start in its layers until the trained weights are loaded. `check_start` looks whether it has.

    Raises:
        UsageError: nothing says from which seed the adapter started.
    """
    if args.load_lora_path is None:
        return  # the adapter starts in this run
    flag, where = "--laplace-prior-mean init", quoted(args.load_lora_path)
    remedy = "train it in one run from its start, or pass --laplace-prior-mean zero."
    if args.max_train_steps or args.n_epochs:
        raise UsageError(
            f"{flag}: this run trains on from {where}, so the adapter has two starts; {remedy}"
        )
    file = Path(args.load_lora_path) / ARGS_FILE
    if args.load_lora_huggingface_repo is not None or not file.is_file():
        raise UsageError(
            f"{flag} makes the start of {where} again from the seed of the run that trained it, "
            f"but there is no {ARGS_FILE} beside it; {remedy}"
        )
    stored = read_run_record(file, "--load-lora-path").args
    if stored.get("load_lora_path") is not None:
        raise UsageError(
            f"{flag}: the run in {where} began with another adapter "
            f"({quoted(stored['load_lora_path'])}), not at a start of its own; {remedy}"
        )
    value = _stored_seed(stored, file)
    if args.given.get("seed", value) != value:
        raise UsageError(
            f"--seed {args.seed}: {flag} makes the start of {where} again, whose run has --seed "
            f"{value}; drop --seed (--seed-sampling chooses other draws)."
        )
    args.seed = value


def _stored_seed(stored: dict[str, Any], file: Path) -> int:
    value = stored.get("seed")
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(
            f"--load-lora-path: {file}: seed is {quoted(value)}, no whole number; restore the "
            "file, or pass --laplace-prior-mean zero."
        )
    try:
        return seed(str(value))
    except Exception as error:  # argparse's, which says the rule
        raise UsageError(f"--load-lora-path: {file}: seed {error}.") from None


def check_start(name: str, start: Tensor, trained: Tensor) -> None:
    r"""A LoRA matrix was trained from what is taken for its start.

    The cosine of independent vectors of d normal numbers has standard deviation $1/\sqrt d$; a
    matrix and its start are `PLAUSIBLE` of them apart from that, unless training has moved it by
    many times its norm. A start of 0 (of B) is right whatever the seed was.

    Raises:
        UsageError: it looks as if it was another one.
    """
    if not start.any():
        return
    start, trained = start.double().flatten(), trained.double().flatten()
    cosine = torch.nn.functional.cosine_similarity(start, trained, dim=0).item()
    if cosine * math.sqrt(start.numel()) < PLAUSIBLE:
        raise UsageError(
            f"--laplace-prior-mean init: {name} has nothing in common with the start that its "
            f"run's seed makes here (cosine {cosine:.3f}): it was trained from another one, with "
            "other versions of the libraries or other code. Train it again, or pass "
            "--laplace-prior-mean zero."
        )


# --- the precision --------------------------------------------------------------------------------


def grid(low: float, high: float) -> Float[Tensor, " G"]:
    """The precisions that validation tries: `POINTS_PER_DECADE` a decade, both ends among them."""
    points = max(2, round(POINTS_PER_DECADE * math.log10(high / low)) + 1)
    values = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    values[0], values[-1] = low, high  # not as rounded
    return values


def tell_end_of_grid(chosen: float, low: float, high: float) -> None:
    """A notice where held-out rows might prefer a precision beyond the grid."""
    if chosen == high:
        notice_once(
            f"--laplace-prior-precision validation chose {chosen:.4g}, the upper end of its grid: "
            "the posterior is as narrow as it may be, without --laplace-refit nearly the point "
            f"estimate. --laplace-grid {low:g} {high * 100:g} tries larger ones."
        )
    elif chosen == low:
        notice_once(
            f"--laplace-prior-precision validation chose {chosen:.4g}, the lower end of its grid; "
            f"--laplace-grid {low / 100:g} {high:g} tries smaller ones."
        )


def maximise_evidence(posterior, structure: str) -> None:
    """Set a posterior's prior precisions to where its Laplace evidence is largest.

    Args:
        posterior: laplace-torch's, with curvature, mean, prior mean and loss in it.
        structure: scalar or layerwise.
    """
    with warnings.catch_warnings():  # it warns of a default that evidence does not use
        warnings.simplefilter("ignore")
        posterior.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=300)


def shown_precision(values: Tensor) -> str:
    """One number, or the range of several."""
    if len(values) == 1:
        return f"{values.item():.4g}"
    return f"{values.min().item():.4g} to {values.max().item():.4g}"


def warn_if_worse(nll: float, nll_of_map: float, shown: str, is_refitted: bool = False) -> None:
    """Tell when the evidence's posterior is worse than the point estimate on training rows.

    Args:
        nll: the mean over training rows of the NLL of the posterior predictive, in nats.
        nll_of_map: the same of the point estimate.
        shown: the precision that the evidence chose.
        is_refitted: whether the mode belongs to it.
    """
    if nll - nll_of_map > WORSE_BY:
        logger.warning(
            "Laplace: the evidence's prior precision (%s) makes the NLL of the training rows %.3f "
            "nats, %.3f more than the point estimate's: the posterior is too wide. Choose it by "
            "rows held out (train with --hold-out, then --laplace-prior-precision validation)%s.",
            shown,
            nll,
            nll - nll_of_map,
            "" if is_refitted else ", or try --laplace-refit",
        )
