r"""Draws until a row is settled: most rows need few, and which ones need more shows while drawing.

Rows get draws in stages of 4, 8, 16, ... up to N. After a stage a row stops if, at the level
$\alpha$ (--draws-error-rate),

- its answer is that of all N draws;
- its answer's probability is that of the N draws to within $\tau$ (--draws-tolerance).

With $d_i$ the margin of the answer over another class in draw i, the mean over all N draws differs
from that over the first n by a quantity with standard error $s \sqrt{1/n - 1/N}$ (the N draws are a
finite population, of which n are a sample): Student's t with n - 1 degrees of freedom if the draws
are normal. Probabilities are not, and four draws that agree say little of a fifth. So one draw
without an opinion, $d = 0$, is added to the margins (the idea of Agresti and Coull 1998). In
simulations (`benchmarks/bench_draws.py settling`) the answers then differ in less than a share
$\alpha$ of the rows, for draws with two modes, too. The second statement is nominal: it takes the
draws to be about normal, and where they are skewed or have two modes it fails several times as
often.

Looking several times must not break the rate: the looks share $\alpha$ out among them by the
spending function $\alpha \log(1 + (e - 1) n / N)$ (Lan and DeMets 1983), each gets what is spent
since the one before, and by the union bound no joint distribution is needed. The classes share what
a look has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from modelwrappers.engine.prediction import Batch

FIRST_STAGE = 4


class Settling(NamedTuple):
    """When a row has enough draws.

    Attributes:
        error_rate: alpha, the share of rows whose answer may be another one than that of N draws.
        tolerance: tau, of the answer's probability.
        antithetic: whether draws come in pairs: the means of pairs are what is independent.
        first: draws of the first stage.
    """

    error_rate: float = 0.01
    tolerance: float = 0.05
    antithetic: bool = False
    first: int = FIRST_STAGE

    @classmethod
    def of(cls, args) -> Settling:
        """As the flags have it."""
        antithetic = getattr(args, "draws", "independent") == "antithetic"
        return cls(args.draws_error_rate, args.draws_tolerance, antithetic)

    def stages(self, most: int) -> Iterator[tuple[int, float]]:
        """(draws, share of the error rate) of each look, up to `most` draws."""
        number, spent = self.first, 0.0
        while number < most:
            spending = self.error_rate * math.log1p((math.e - 1) * number / most)
            yield number, spending - spent
            number, spent = 2 * number, spending
        yield most, 0.0


def is_settled(
    probs: Float[Tensor, "B n C"], most: int, level: float, settling: Settling
) -> Bool[Tensor, " B"]:
    """Which rows need no further draws, after n of `most`.

    Args:
        probs: of the first n draws.
        most: N.
        level: the error rate that this look may use up.
    """
    from scipy.stats import t as student  # slow

    units, total = probs.double(), float(most)
    if settling.antithetic:
        if probs.shape[1] % 2:
            raise ValueError(f"{probs.shape[1]} draws are no pairs")
        units, total = units.unflatten(1, (-1, 2)).mean(2), most / 2
    number, classes = units.shape[1:]
    if number < 2:
        return torch.zeros(len(units), dtype=torch.bool, device=units.device)
    answer = units.mean(1).argmax(-1)[:, None, None]  # (B, 1, 1)
    own = units.gather(2, answer.expand(-1, number, 1))  # (B, n, 1)

    def half_width(values: Tensor, share: float, among: float) -> Tensor:
        """Of the interval around the mean of `values` (B, n, ...) for that of all of `among`."""
        count = values.shape[1]
        quantile = float(student.isf(level * share, count - 1))
        return quantile * values.std(1) * math.sqrt(max(1 / count - 1 / among, 0.0))

    margins = own - units  # (B, n, C)
    margins = torch.cat([margins, torch.zeros_like(margins[:, :1])], dim=1)
    lowest = margins.mean(1) - half_width(margins, 1 / max(classes - 1, 1), total + 1)
    has_answer = (lowest > 0).scatter(1, answer[:, :, 0], True).all(-1)
    return has_answer & (half_width(own[..., 0], 0.5, total) <= settling.tolerance)


def settled_draws(
    draw_logits: Callable[..., Iterator[Float[Tensor, "n B C"]]],
    batch: Batch,
    most: int,
    settling: Settling,
    temperature: float | None = None,
) -> tuple[Float[Tensor, "B N C"], Int[Tensor, " B"]]:
    """Log-probabilities of as many draws as each row needs.

    After each stage the rows that are left are stacked anew.

    Args:
        draw_logits: of a batch, a number of draws and the number of the first one.
        batch: model inputs of B rows.
        most: N.
        temperature: what the logits are divided by, if anything.
    Returns:
        (B, N, C), NaN for draws that were not made, and how many each row has, (B,).
    """
    left = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    log_probs = numbers = None
    done = 0
    for number, level in settling.stages(most):
        some = {key: value[left] for key, value in batch.items()}
        logits = torch.cat(list(draw_logits(some, number - done, done))).transpose(0, 1)
        if log_probs is None:
            shape = (len(left), most, logits.shape[-1])
            log_probs = torch.full(shape, torch.nan, device=logits.device)
            numbers = torch.zeros(len(left), dtype=torch.long, device=logits.device)
        log_probs[left, done:number] = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        numbers[left] = done = number
        if number < most:
            left = left[~is_settled(log_probs[left, :number].exp(), most, level, settling)]
            if not len(left):
                break
    return log_probs, numbers
