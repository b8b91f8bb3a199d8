r"""Posterior draws as layers see them: how many, fixed or fresh, with or without random signs.

N draws are one forward: the caller stacks a batch N times, and each stochastic layer splits it
again. Nothing here knows PEFT or which layers these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from utils.seeding import mix_seed

FLIPOUT = ("token", "example", "none")
KINDS = ("independent", "antithetic")
# How many rows further down in a table of signs the next layer begins.
STEPS = {"in": 2, "out": 1}


class Draws:
    """What all stochastic layers of a model share: how many draws the next forward is stacked of.

    Two settings say what draws are like, one for training and one for prediction.

    Args:
        flipout: in training, which rows share a draw. "none": all rows of a draw see the same
            weights, so a forward is N true draws. "example", "token": random signs decorrelate the
            rows or tokens (arXiv 1803.04386), the marginal of each stays as it is.
        flipout_eval: the same at prediction; None: as in training. A row's logits under signs per
            token are no draw of weights: its tokens see different ones.
        antithetic: at prediction draws come in pairs of opposite noise, E and -E, under the same
            signs (Hammersley and Morton 1956). Pairs are independent, the two of a pair are not;
            the mean over draws stays unbiased.
    Attributes:
        n_samples: N; 0 for the posterior mean.
        signs: of the two, the one that is in force.
        in_pairs: whether the draws that are taken now are antithetic.
        num_layers: how many layers have signs of their own.
    """

    def __init__(
        self, flipout: str = "token", flipout_eval: str | None = None, antithetic: bool = False
    ) -> None:
        self.n_samples = 0
        self.flipout = self.signs = flipout
        self.flipout_eval = flipout_eval or flipout
        self.antithetic = antithetic
        self.in_pairs = False
        self._fixed: dict[int, Tensor] | None = None
        self._seed = 0
        self._total = 0
        self._first = 0
        self._signs: dict[tuple, Tensor] = {}
        self._sign_seed = 0
        self.num_layers = 1

    @property
    def is_fixed(self) -> bool:
        """Whether forwards cycle through the same draws; else each draws anew."""
        return self._fixed is not None

    @contextmanager
    def stacked(self, n_samples: int, training: bool = True) -> Iterator[None]:
        """Forwards in this context take a batch stacked `n_samples` times; 0 is the mean."""
        before = self.n_samples, self.signs, self.in_pairs
        self.n_samples = n_samples
        self.signs = self.flipout if training else self.flipout_eval
        self.in_pairs = self.antithetic and not training
        signs_before = self._signs, self._sign_seed
        now = self.n_samples, self.signs, self.in_pairs
        if n_samples and self.signs != "none" and now != before:
            self._signs, self._sign_seed = {}, int(torch.randint(2**31, ()))
        try:
            yield
        finally:
            self.n_samples, self.signs, self.in_pairs = before
            self._signs, self._sign_seed = signs_before
            if before[0] == 0:  # the next stack of the same evaluation goes on with the next draws
                self._first += n_samples

    @contextmanager
    def fixed(self, total: int, seed: int) -> Iterator[None]:
        """Stacks in this context cycle through the same `total` draws of the noise.

        Without flipout the n-th draw is then one set of weights for a whole data set, on whatever
        process.
        """
        before = self._fixed, self._total, self._first, self._seed
        self._fixed, self._total, self._first, self._seed = {}, total, 0, seed
        try:
            yield
        finally:
            self._fixed, self._total, self._first, self._seed = before

    @contextmanager
    def starting_at(self, first: int) -> Iterator[None]:
        """Of fixed draws the stacks in this context begin with the one of this number."""
        before, self._first = self._first, first
        try:
            yield
        finally:
            self._first = before

    def noise(self, owner: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard Gaussian noise (N, *shape), one slice per draw.

        Args:
            owner: identifies the layer.
            shape: of one draw.
            like: gives data type and device.
        """
        if self._fixed is None:
            return self._normal(self.n_samples, shape, like)
        if owner not in self._fixed:
            # Layers ask in the order of the forward: the same everywhere, unlike their ids.
            generator = _seeded(like.device, mix_seed("fixed draws", self._seed, len(self._fixed)))
            self._fixed[owner] = self._normal(self._total, shape, like, generator)
        first = self._first % self._total
        return self._fixed[owner][first : first + self.n_samples]

    def _normal(
        self, number: int, shape: tuple[int, ...], like: Tensor, generator=None
    ) -> Float[Tensor, "number ..."]:
        own = (number + 1) // 2 if self.in_pairs else number
        noise = torch.randn(own, *shape, dtype=like.dtype, device=like.device, generator=generator)
        return _paired(noise, -noise, number) if self.in_pairs else noise

    def random_signs(
        self, place: int, side: str, shape: tuple[int, ...], like: Tensor
    ) -> Tensor | None:
        """+1 and -1 for a stacked tensor (N*B, ..., d), or None for +1 alone; broadcasts to it.

        They are drawn once in a context of `stacked` for all layers, which is what makes them
        cheap. Each layer starts further down than the one before, by two rows for its input and by
        one for its output. A layer's row shares signs with other rows of other layers, but never
        those of input and output with the same one, so where a row's input has noise of earlier
        layers in it, its own or, by attention, that of any other row, the product of the four signs
        has mean 0: the noise of two rows is uncorrelated, as with signs drawn for each layer.

        Args:
            place: of the layer, 0 to num_layers - 1.
            side: "in" or "out", which have nothing to do with each other.
            like: gives data type and device.
        """
        if self.signs == "none":
            return None
        lead = shape[:-1] if self.signs == "token" else (shape[0], *[1] * (len(shape) - 2))
        if not self.in_pairs:
            return self._rows(place, side, (*lead, shape[-1]), like)
        rows, pairs = shape[0] // self.n_samples, (self.n_samples + 1) // 2
        signs = self._rows(place, side, (pairs * rows, *lead[1:], shape[-1]), like)
        signs = signs.unflatten(0, (pairs, rows))
        return _paired(signs, signs, self.n_samples).flatten(0, 1)  # the same for both of a pair

    def _rows(self, place: int, side: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        rows = math.prod(shape[:-1])
        start = STEPS[side] * place
        key = side, rows, shape[-1], like.dtype, like.device, torch.is_inference_mode_enabled()
        if key not in self._signs:
            # A generator of their own: activation checkpointing runs a block again from the random
            # state before it, and whether the block was the first to ask must not matter.
            seed = mix_seed(f"signs {side}", self._sign_seed, rows, shape[-1])
            size = rows + STEPS[side] * (self.num_layers - 1), shape[-1]
            self._signs[key] = random_signs(size, like, _seeded(like.device, seed))
        return self._signs[key][start : start + rows].view(shape)


def _seeded(device: torch.device, seed: int) -> torch.Generator | None:
    if device.type == "meta":  # which has no numbers to seed
        return None
    return torch.Generator(device).manual_seed(seed)


def _paired(first: Tensor, second: Tensor, number: int) -> Tensor:
    """The slices of two stacks in turn, `number` of them."""
    return torch.stack([first, second], dim=1).flatten(0, 1)[:number]


# --- random signs ---------------------------------------------------------------------------------


def random_signs(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """+1 or -1 for each component of a tensor (..., d), by eights from a table."""
    width = shape[-1]
    lead = (*shape[:-1], -(-width // 8))
    patterns = torch.randint(256, lead, device=like.device, generator=generator)
    signs = nn.functional.embedding(patterns, _sign_patterns(like.device, like.dtype))
    return signs.flatten(-2)[..., :width].contiguous()


@cache
def _sign_patterns(device: torch.device, dtype: torch.dtype) -> Tensor:
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


# --- the noisy layer's product --------------------------------------------------------------------


class NoisyProjection(torch.autograd.Function):
    r"""$M x + u \circ ((G^2 \circ E)(t \circ x))$: the mean's projection, and that of each draw.

    One function for all of it: x is kept once, not with and without signs, both parts of its
    gradient are added up in one buffer, and few small operations are left. On a CPU each of those
    costs as much as a product with a rank of 8.

    Args of `apply`:
        x: (N*B, ..., in)
        mean: M, (r, in)
        rho: G, (r, in); the standard deviation is its square.
        noise: E, (N, r, in)
        signs_in, signs_out: t and u, which broadcast to (N*B, ..., in) and (N*B, ..., r); None
            where they are 1.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, rho: Tensor, noise: Tensor, signs_in, signs_out):
        draws = (rho.square() * noise).to(x.dtype)
        ctx.save_for_backward(x, mean, rho, noise, draws, signs_in, signs_out)
        flipped = _by_draw(x if signs_in is None else x * signs_in, draws)
        # one draw, as in training, is a plain product, which is faster than a stack of one
        noisy = flipped[0] @ draws[0].T if len(draws) == 1 else torch.bmm(flipped, draws.mT)
        noisy = noisy.view(*x.shape[:-1], len(mean))
        if signs_out is not None:
            noisy.mul_(signs_out)
        return noisy.add_(nn.functional.linear(x, mean))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rho, noise, draws, signs_in, signs_out = ctx.saved_tensors
        flipped_grad = _by_draw(grad if signs_out is None else grad * signs_out, noise)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(flipped_grad, draws).view(x.shape)
            if signs_in is not None:
                grad_x.mul_(signs_in)
            rows_of(grad_x).addmm_(rows_of(grad), mean)
        flipped = _by_draw(x if signs_in is None else x * signs_in, noise)
        by_draw = torch.bmm(flipped_grad.mT, flipped).mul_(noise)  # (N, r, in)
        by_draw = by_draw[0] if len(by_draw) == 1 else by_draw.sum(0)
        grad_rho = by_draw.to(rho.dtype).mul_(rho).mul_(2)
        grad_mean = rows_of(grad).T @ rows_of(x)
        return grad_x, grad_mean, grad_rho, None, None, None


def _by_draw(values: Tensor, draws: Tensor) -> Tensor:
    """(N*B, ..., width) as a stack (N, B*..., width)."""
    return values.reshape(len(draws), -1, values.shape[-1])


def rows_of(values: Tensor) -> Tensor:
    """(..., width) as a matrix."""
    return values.reshape(-1, values.shape[-1])
