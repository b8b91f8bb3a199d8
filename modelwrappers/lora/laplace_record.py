"""What a Laplace posterior's files say: its part of bayes_config.json, and its factors."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from pydantic import Field, FiniteFloat, field_validator, model_validator
from torch import Tensor

from modelwrappers.lora.curvature import Block, Projection, read_blocks
from utils.adapter_base import RECORD_FILE
from utils.errors import UsageError, quoted
from utils.records import Count, Name, Nonnegative, Positive, Record, check_tensor

Precision = Annotated[Positive, Field(le=1e30)]


class Fit(Record):
    """How a posterior was fitted: what is needed again, and what is told.

    Attributes:
        hessian: structure of the curvature.
        curvature: how Kronecker factors treat a row's tokens; None for other structures, and in
            records of before there was a choice, which have `reduce`.
        prior_precision: of all weights, or of each projection.
        prior_precision_by: how it was found.
        prior_mean: 0, or the adapter's start.
        refit_rounds: how many modes of the linearised model --laplace-refit has found, the last of
            which is kept; None: the adapter is the mode.
    """

    hessian: Literal["kron", "diag", "full"]
    curvature: Literal["reduce", "expand", "published"] | None = None
    prior_precision: Precision | Annotated[list[Precision], Field(min_length=1)]
    prior_precision_by: Literal["evidence", "validation", "number"] | None = None
    prior_mean: Literal["zero", "init"] = "zero"
    refit_rounds: Annotated[Count, Field(ge=1)] | None = None
    log_marginal_likelihood: FiniteFloat | None = None
    n_parameters: Count | None = None
    n_examples: Count | None = None
    factor_bytes: Count | None = None
    seconds: Nonnegative | None = None
    peak_memory_bytes: Count | None = None
    peak_memory_before_bytes: Count | None = None

    @property
    def precisions(self) -> Float[Tensor, " K"]:
        """One, or one for each projection."""
        value = self.prior_precision
        values = value if isinstance(value, list) else [value]
        return torch.tensor(values, dtype=torch.float64)

    @model_validator(mode="after")
    def _only_kronecker_factors_have_a_variant(self) -> Fit:
        if self.curvature is not None and self.hessian != "kron":
            raise ValueError(
                f"'curvature' is {self.curvature!r}, a kind of Kronecker factors, but 'hessian' is "
                f"{self.hessian!r}"
            )
        return self


class Description(Record):
    """Laplace's part of bayes_config.json.

    Attributes:
        laplace: the fit; None while the adapter is a point estimate.
        projections: the LoRA matrices that the posterior covers, in the order of its factors.
    """

    laplace: Fit | None
    projections: list[Name]

    @field_validator("laplace", mode="before")
    @classmethod
    def _nothing_fitted(cls, value: Any) -> Any:
        return None if value == {} else value

    @model_validator(mode="after")
    def _covers_something(self) -> Description:
        if self.laplace is not None and not self.projections:
            raise ValueError("'projections' names no LoRA matrix")
        if len(set(self.projections)) < len(self.projections):
            raise ValueError("'projections' names a LoRA matrix twice")
        if self.laplace is not None and isinstance(self.laplace.prior_precision, list):
            number = len(self.laplace.prior_precision)
            if number != len(self.projections) or self.laplace.hessian == "full":
                raise ValueError(
                    f"'prior_precision' has {number} numbers for {len(self.projections)} "
                    f"projections and a curvature of structure {self.laplace.hessian!r}"
                )
        return self


class Factors(NamedTuple):
    """What laplace.safetensors holds.

    Attributes:
        projections: that the posterior covers.
        blocks: their curvature, as `curvature.read_blocks` gives it.
        shift: from the adapter to the posterior's mode, (P,); None: they are the same.
    """

    projections: list[Projection]
    blocks: list[Block]
    shift: Float[Tensor, " P"] | None


def read_factors(
    found: Description,
    tensors: dict[str, Tensor],
    candidates: list[Projection],
    head: str | None,
    where: str,
) -> Factors:
    """The factors of a posterior, held against its record and the adapter.

    Args:
        found: the record, of a posterior that was fitted.
        tensors: of the file.
        candidates: the adapter's LoRA matrices.
        head: the name of a causal LM's head's B, of which some rows are covered.
        where: the files, for messages.
    Raises:
        UsageError: they do not fit each other.
    """

    def refuse(reason: str) -> NoReturn:
        raise UsageError(
            f"{where}: {reason}; fit the posterior again on the adapter that it was made from."
        )

    fit, tensors = found.laplace, dict(tensors)
    modules = {p.name: p.module for p in candidates}
    rows = shift = None
    if "rows" in tensors:
        rows = check_tensor(tensors, "rows", (None,), where, (torch.int64,))
        del tensors["rows"]
    projections = []
    for name in found.projections:
        if name not in modules:
            refuse(f"{RECORD_FILE} names {quoted(name)}, which is no LoRA matrix of the adapter")
        if name == head and rows is None:
            refuse("the tensor 'rows', the head's answer tokens, is missing")
        weight = modules[name].weight
        if name == head and not (
            0 < len(rows) == len(rows.unique()) and rows.min() >= 0 and rows.max() < len(weight)
        ):
            refuse(f"'rows' must be different numbers below {len(weight)}, rows of the head")
        own = rows.to(weight.device) if name == head else None
        projections.append(Projection(name, modules[name], own))
    shapes = [tuple(projection.weight.shape) for projection in projections]
    total = sum(math.prod(shape) for shape in shapes)
    if ("shift" in tensors) != (fit.refit_rounds is not None):
        refuse("the tensor 'shift' and the record's 'refit_rounds' must be there both, or neither")
    if fit.refit_rounds is not None:
        shift = check_tensor(tensors, "shift", (total,), where).float()
        del tensors["shift"]
    shapes = shapes if fit.hessian == "kron" else [(total,)]
    return Factors(
        projections, read_blocks(tensors, shapes, fit.hessian == "diag", where, refuse), shift
    )
