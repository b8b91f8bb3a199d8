r"""Posterior draws as layers see them: how many, fixed or fresh, with or without random signs.

N draws are one forward: the caller stacks a batch N times, and each stochastic layer splits it
again. Nothing here knows PEFT or which layers these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.seeding import mix_seed

FLIPOUT = ("token", "example", "none")


class Draws:
    """What all stochastic layers of a model share: how many draws the next forward is stacked of.

    Attributes:
        n_samples: N; 0 for the posterior mean.
        flipout: which rows share a draw. "none": all rows of a draw see the same weights, so a
            forward is N true draws. "example", "token": random signs decorrelate the rows or tokens
            (arXiv 1803.04386), the marginal of each stays as it is.
    """

    def __init__(self, flipout: str = "token") -> None:
        self.n_samples = 0
        self.flipout = flipout
        self._fixed: dict[int, Tensor] | None = None
        self._seed = 0
        self._total = 0
        self._first = 0

    @property
    def is_fixed(self) -> bool:
        """Whether forwards cycle through the same draws; else each draws anew."""
        return self._fixed is not None

    @contextmanager
    def stacked(self, n_samples: int) -> Iterator[None]:
        """Forwards in this context take a batch stacked `n_samples` times; 0 is the mean."""
        before = self.n_samples
        self.n_samples = n_samples
        try:
            yield
        finally:
            self.n_samples = before
            if before == 0:  # the next stack of the same evaluation goes on with the next draws
                self._first += n_samples

    @contextmanager
    def fixed(self, total: int, seed: int) -> Iterator[None]:
        """Stacks in this context cycle through the same `total` draws of the noise.

        Without flipout the n-th draw is then one set of weights for a whole data set, on whatever
        process.
        """
        self._fixed, self._total, self._first, self._seed = {}, total, 0, seed
        try:
            yield
        finally:
            self._fixed = None

    def noise(self, owner: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard Gaussian noise (N, *shape), one slice per draw.

        Args:
            owner: identifies the layer.
            shape: of one draw.
            like: gives data type and device.
        """
        if self._fixed is None:
            return torch.randn(self.n_samples, *shape, dtype=like.dtype, device=like.device)
        if owner not in self._fixed:
            # Layers ask in the order of the forward: the same everywhere, unlike their ids.
            generator = torch.Generator(like.device)
            generator.manual_seed(mix_seed("fixed draws", self._seed, len(self._fixed)))
            self._fixed[owner] = torch.randn(
                self._total, *shape, dtype=like.dtype, device=like.device, generator=generator
            )
        first = self._first % self._total
        return self._fixed[owner][first : first + self.n_samples]


# --- random signs ---------------------------------------------------------------------------------


def random_signs(shape: torch.Size, flipout: str, device: torch.device) -> Tensor | None:
    """Random bits for the signs of a tensor (rows, ..., d): new ones per "token" or "example".

    Returns:
        int32 words, 32 signs in each: drawing and keeping a float of +1 or -1 for each component
        would cost 32 times as much of both. None where `flipout` is "none".
    """
    if flipout == "none":
        return None
    lead = shape[:-1] if flipout == "token" else (shape[0], *[1] * (len(shape) - 2))
    words = -(-shape[-1] // 32)
    return torch.randint(-(2**31), 2**31, (*lead, words), dtype=torch.int32, device=device)


class NoisyProjection(torch.autograd.Function):
    r"""$u \circ (A' (t \circ x))$ for the noise A' of each draw: (N, r, in) and x (N*B, ..., in).

    Keeps x, which the mean's projection keeps anyway, and the signs' bits; not the flipped x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, noise: Tensor, signs_in, signs_out) -> Tensor:
        ctx.save_for_backward(x, noise, signs_in, signs_out)
        flipped = flip_signs(x, signs_in).reshape(len(noise), -1, x.shape[-1])  # (N, B*..., in)
        noisy = torch.bmm(flipped, noise.mT)
        return flip_signs(noisy.view(*x.shape[:-1], noise.shape[1]), signs_out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, noise, signs_in, signs_out = ctx.saved_tensors
        grad = flip_signs(grad, signs_out).reshape(len(noise), -1, noise.shape[1])  # (N, B*..., r)
        flipped = flip_signs(x, signs_in).reshape(len(noise), -1, x.shape[-1])
        grad_noise = torch.bmm(grad.mT, flipped)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = flip_signs(torch.bmm(grad, noise).view(x.shape), signs_in)
        return grad_x, grad_noise, None, None


class FlipSigns(torch.autograd.Function):
    """`flip_signs` with its gradient: the same flip."""

    @staticmethod
    def forward(ctx, x: Tensor, signs) -> Tensor:
        ctx.save_for_backward(signs)
        return flip_signs(x, signs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return flip_signs(grad, ctx.saved_tensors[0]), None


_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def flip_signs(x: Tensor, signs: Tensor | None) -> Tensor:
    """x with the sign bit of each component flipped where its bit in `signs` is set."""
    if signs is None:
        return x
    integer = _INTEGERS[x.dtype]
    shifts = torch.arange(32, dtype=torch.int32, device=x.device)
    mask = (signs.unsqueeze(-1) << shifts).flatten(-2)[..., : x.shape[-1]]
    if integer != torch.int32:  # an arithmetic shift by 31 spreads the bit over the whole word
        mask = mask.bitwise_right_shift_(31).to(integer)
    mask = mask.bitwise_and_(torch.iinfo(integer).min)
    values = x.contiguous().view(integer)
    flipped = mask.bitwise_xor_(values) if mask.shape == values.shape else mask ^ values
    return flipped.view(x.dtype)
