"""The calibration rows that a posterior keeps, by its record and in a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from decisions.calibration import Calibration
from decisions.conformal import MOST_ROWS
from utils.errors import UsageError
from utils.files import write_tensors
from utils.logging import logger
from utils.records import Record, check_tensor, read_tensors

if TYPE_CHECKING:
    from modelwrappers.engine.posterior import Saved
    from modelwrappers.wrapperbase import WrapperBase

CALIBRATION_FILE = "calibration.safetensors"  # predictions of calibration rows


class CalibrationFacts(Record):
    """What a calibration is of: predictions that are made otherwise have no promise.

    Attributes:
        rows: how many.
        n_draws: of each row; 0 is the posterior mean.
        temperature: that they were scaled by.
        unseen: whether the run knew that the adapter was not trained on these rows.
    """

    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    n_draws: Annotated[int, Field(ge=0, le=100_000)]
    temperature: Annotated[float, Field(gt=1e-3, lt=1e3)] | None = None
    unseen: bool = True


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Keep a calibration beside the adapter in a folder."""
    tensors = {name: torch.from_numpy(array) for name, array in calibration._asdict().items()}
    write_tensors(folder / CALIBRATION_FILE, tensors, {})


def take_calibration(wrapper: WrapperBase, saved: Saved) -> None:
    """Keep the calibration of a loaded posterior, unless this run changes what it is of.

    Raises:
        UsageError: its file is missing, or breaks a rule.
    """
    calibration = read_calibration(saved)
    if calibration is None:
        return
    facts = saved.record.calibration
    changed = None
    if type(wrapper).tunes_on_held_out(wrapper.args):
        changed = "a temperature or a prior is chosen by held-out rows, which may be its own"
    elif wrapper.held_out_seen:
        changed = "--testing-set train_val evaluates its rows, which may then choose the posterior"
    elif facts.temperature != wrapper.fitted_temperature:
        changed = "its temperature is another"
    elif wrapper.run_folder is not None and wrapper.final_draws() != facts.n_draws:
        changed = f"it had {facts.n_draws} draws (0 is the mean), this run {wrapper.final_draws()}"
    elif wrapper.run_folder is not None and wrapper.args.draws_adaptive:
        changed = "it had a fixed number of draws"
    if changed is not None:
        logger.warning("The calibration of %s is not kept: %s.", saved.folder, changed)
        return
    wrapper.calibration, wrapper.calibration_facts = calibration, facts


def read_calibration(saved: Saved) -> Calibration | None:
    """What the posterior in a folder keeps of its calibration rows, if anything.

    Raises:
        UsageError: the file is missing, or breaks a rule.
    """
    record = saved.record
    if record is None or record.calibration is None or record.choices is None:
        return None
    file, n = saved.folder / CALIBRATION_FILE, record.calibration.rows
    num_answers = len(record.choices)
    tensors = read_tensors(file, "calibration")
    where = f"calibration: {file}"
    shapes = {
        "predictive": ((n, num_answers), ("float64",)),
        "labels": ((n,), ("int64",)),
        "mutual_information": ((n,), ("float64",)),
        "index": ((n,), ("int64",)),
    }
    calibration = Calibration(
        **{
            name: check_tensor(tensors, name, shape, where, kinds).numpy()
            for name, (shape, kinds) in shapes.items()
        }
    )
    if (problem := calibration.problem(num_answers)) is not None:
        raise UsageError(f"{where}: {problem}. Calibrate again, or download the posterior again.")
    return calibration
