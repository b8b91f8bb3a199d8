r"""Posterior draws as layers see them: how many, fixed or fresh, with or without random signs.

N draws are one forward: the caller stacks a batch N times, and each stochastic layer splits it
again. Nothing here knows PEFT or which layers these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from utils.seeding import mix_seed

FLIPOUT = ("token", "example", "none")
KINDS = ("independent", "antithetic")


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
        try:
            yield
        finally:
            self.n_samples, self.signs, self.in_pairs = before
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
            generator = None
            if like.device.type != "meta":  # which has no numbers to seed
                generator = torch.Generator(like.device)
                generator.manual_seed(mix_seed("fixed draws", self._seed, len(self._fixed)))
            self._fixed[owner] = self._normal(self._total, shape, like, generator)
        first = self._first % self._total
        return self._fixed[owner][first : first + self.n_samples]

    def _normal(
        self, number: int, shape: tuple[int, ...], like: Tensor, generator=None
    ) -> Float[Tensor, "number ..."]:
        own = (number + 1) // 2 if self.in_pairs else number
        noise = torch.randn(own, *shape, dtype=like.dtype, device=like.device, generator=generator)
        return _paired(noise, -noise, number) if self.in_pairs else noise

    def random_signs(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """`random_signs` of a stacked tensor (N*B, ..., d); a pair's two copies have the same."""
        if not self.in_pairs or self.signs == "none":
            return random_signs(shape, self.signs, device)
        rows, pairs = shape[0] // self.n_samples, (self.n_samples + 1) // 2
        signs = random_signs(torch.Size((pairs * rows, *shape[1:])), self.signs, device)
        signs = signs.unflatten(0, (pairs, rows))
        return _paired(signs, signs, self.n_samples).flatten(0, 1)


def _paired(first: Tensor, second: Tensor, number: int) -> Tensor:
    """The slices of two stacks in turn, `number` of them."""
    return torch.stack([first, second], dim=1).flatten(0, 1)[:number]


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
    r"""$M x + u \circ ((G^2 \circ E)(t \circ x))$: the mean's projection, and that of each draw.

    One function for all of it: it keeps x once and the signs' bits, not the flipped x, both parts
    of x's gradient are added up in one buffer, and few small operations are left. On a CPU each of
    those costs as much as a product with a rank of 8.

    Args of `apply`:
        x: (N*B, ..., in)
        mean: M, (r, in)
        rho: G, (r, in); the standard deviation is its square.
        noise: E, (N, r, in)
        signs_in, signs_out: of t and u; None for no signs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, rho: Tensor, noise: Tensor, signs_in, signs_out):
        ctx.save_for_backward(x, mean, rho, noise, signs_in, signs_out)
        draws = (rho.square() * noise).to(x.dtype)
        flipped = flip_signs(x, signs_in).reshape(len(draws), -1, x.shape[-1])  # (N, B*..., in)
        # one draw, as in training, is a plain product, which is faster than a stack of one
        noisy = flipped[0] @ draws[0].T if len(draws) == 1 else torch.bmm(flipped, draws.mT)
        hidden = flip_signs(noisy.view(*x.shape[:-1], len(mean)), signs_out)
        return hidden.add_(nn.functional.linear(x, mean))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rho, noise, signs_in, signs_out = ctx.saved_tensors
        flipped_grad = flip_signs(grad, signs_out).reshape(len(noise), -1, len(mean))
        mask = sign_mask(signs_in, x)  # for both flips of its width; the second one uses it up
        grad_x = None
        if ctx.needs_input_grad[0]:
            draws = (rho.square() * noise).to(x.dtype)
            grad_x = x.new_zeros(x.shape)
            grad_x.view(len(noise), -1, x.shape[-1]).baddbmm_(flipped_grad, draws)
            if mask is not None:  # of one row, maybe, for all tokens of an example
                grad_x.view(mask.dtype).bitwise_xor_(mask)
            rows_of(grad_x).addmm_(rows_of(grad), mean)
        flipped = flipped_by(x, mask).reshape(len(noise), -1, x.shape[-1])
        by_draw = torch.bmm(flipped_grad.mT, flipped) * noise  # (N, r, in)
        by_draw = by_draw[0] if len(by_draw) == 1 else by_draw.sum(0)
        grad_rho = by_draw.to(rho.dtype).mul_(rho).mul_(2)
        grad_mean = rows_of(grad).T @ rows_of(x)
        return grad_x, grad_mean, grad_rho, None, None, None


def rows_of(values: Tensor) -> Tensor:
    """(..., width) as a matrix."""
    return values.reshape(-1, values.shape[-1])


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
    return flipped_by(x, sign_mask(signs, x))


def sign_mask(signs: Tensor | None, x: Tensor) -> Tensor | None:
    """Integers of x's width, with just the sign bit set where it has to be flipped."""
    if signs is None:
        return None
    integer = _INTEGERS[x.dtype]
    shifts = _shifts(x.device)
    mask = (signs.unsqueeze(-1) << shifts).flatten(-2)[..., : x.shape[-1]]
    if integer != torch.int32:  # an arithmetic shift by 31 spreads the bit over the whole word
        mask = mask.bitwise_right_shift_(31).to(integer)
    return mask.bitwise_and_(torch.iinfo(integer).min)


@cache
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)


def flipped_by(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with its sign bits flipped by a mask, which is used up."""
    if mask is None:
        return x
    values = x.contiguous().view(mask.dtype)
    flipped = mask.bitwise_xor_(values) if mask.shape == values.shape else mask ^ values
    return flipped.view(x.dtype)
