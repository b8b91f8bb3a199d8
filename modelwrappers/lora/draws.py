r"""Posterior draws as layers see them: how many, fixed or fresh, with or without random signs.

N draws are one forward: the caller stacks a batch N times, and each stochastic layer splits it
again. Nothing here knows PEFT or which layers these are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
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
        self._flipped: tuple[weakref.ref[Tensor], Tensor] | None = None

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
            self._flipped = None
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

    def flipped(self, x: Tensor) -> Tensor | None:
        """x (N*B, ..., d) with random signs, or None for x as it is; not for autograd.

        Layers that read one tensor, like the projections of an attention, get the same signs: their
        noise is independent anyway, and on a CPU flipping costs as much as a product of rank 8.
        """
        if self.signs == "none":
            return None
        if self._flipped is None or self._flipped[0]() is not x:
            bits = self._by_row(x.shape, lambda lead: random_bits((*lead, x.shape[-1]), x.device))
            self._flipped = weakref.ref(x), flip_signs(x.detach(), bits)
        return self._flipped[1]

    def random_signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """+1 and -1 for a stacked tensor (N*B, ..., d), or None for +1 alone; broadcasts to it.

        Args:
            like: gives data type and device.
        """
        if self.signs == "none":
            return None
        return self._by_row(shape, lambda lead: random_signs((*lead, shape[-1]), like))

    def _by_row(self, shape: tuple[int, ...], make: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """What `make` gives for the leading sizes that have signs of their own, in pairs or not."""
        rest = shape[1:-1] if self.signs == "token" else (1,) * (len(shape) - 2)
        if not self.in_pairs:
            return make((shape[0], *rest))
        rows, pairs = shape[0] // self.n_samples, (self.n_samples + 1) // 2
        signs = make((pairs * rows, *rest)).unflatten(0, (pairs, rows))
        return _paired(signs, signs, self.n_samples).flatten(0, 1)  # the same for both of a pair


def _paired(first: Tensor, second: Tensor, number: int) -> Tensor:
    """The slices of two stacks in turn, `number` of them."""
    return torch.stack([first, second], dim=1).flatten(0, 1)[:number]


# --- random signs ---------------------------------------------------------------------------------


def random_signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """+1 or -1 for each component of a tensor (..., d), by eights from a table."""
    width = shape[-1]
    patterns = torch.randint(256, (*shape[:-1], -(-width // 8)), device=like.device)
    signs = nn.functional.embedding(patterns, _sign_patterns(like.device, like.dtype))
    return signs.flatten(-2)[..., :width]


@cache
def _sign_patterns(device: torch.device, dtype: torch.dtype) -> Tensor:
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


def random_bits(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A random bit for each component of a tensor (..., d), as int32 words with 32 bits in each.

    For wide tensors: drawing a float for each component would cost many times as much.
    """
    words = -(-shape[-1] // 32)
    return torch.randint(-(2**31), 2**31, (*shape[:-1], words), dtype=torch.int32, device=device)


_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def flip_signs(x: Tensor, bits: Tensor) -> Tensor:
    """x with the sign of each component flipped where its bit is set."""
    integer = _INTEGERS[x.dtype]
    mask = (bits.unsqueeze(-1) << _shifts(x.device)).flatten(-2)[..., : x.shape[-1]]
    if integer != torch.int32:  # an arithmetic shift by 31 spreads the bit over the whole word
        mask = mask.bitwise_right_shift_(31).to(integer)
    mask = mask.bitwise_and_(torch.iinfo(integer).min)
    values = _as_integers(x)
    flipped = mask.bitwise_xor_(values) if mask.shape == values.shape else mask ^ values
    return flipped.view(x.dtype)


def _as_integers(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.dtype])


@cache
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)


# --- the noisy layer's product --------------------------------------------------------------------


class NoisyProjection(torch.autograd.Function):
    r"""$M x + u \circ ((G^2 \circ E)(t \circ x))$: the mean's projection, and that of each draw.

    One function for all of it: what is flipped is kept once for all layers that read x, both parts
    of x's gradient are added up in one buffer, and few small operations are left. On a CPU each of
    those costs as much as a product with a rank of 8.

    Args of `apply`:
        x: (N*B, ..., in)
        mean: M, (r, in)
        rho: G, (r, in); the standard deviation is its square.
        noise: E, (N, r, in)
        flipped: t * x, or None where t is 1.
        signs_out: u, broadcasts to (N*B, ..., r); None where it is 1.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, rho: Tensor, noise: Tensor, flipped, signs_out):
        draws = (rho.square() * noise).to(x.dtype)
        ctx.save_for_backward(x, mean, rho, noise, draws, flipped, signs_out)
        flipped = _by_draw(x if flipped is None else flipped, draws)
        # one draw, as in training, is a plain product, which is faster than a stack of one
        noisy = flipped[0] @ draws[0].T if len(draws) == 1 else torch.bmm(flipped, draws.mT)
        noisy = noisy.view(*x.shape[:-1], len(mean))
        if signs_out is not None:
            noisy.mul_(signs_out)
        return noisy.add_(nn.functional.linear(x, mean))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rho, noise, draws, flipped, signs_out = ctx.saved_tensors
        flipped_grad = _by_draw(grad if signs_out is None else grad * signs_out, noise)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(flipped_grad, draws).view(x.shape)
            if flipped is not None:  # x and t * x differ in just the sign bits that t flips
                bits = _as_integers(grad_x)
                bits.bitwise_xor_(_as_integers(x)).bitwise_xor_(_as_integers(flipped))
            rows_of(grad_x).addmm_(rows_of(grad), mean)
        by_draw = torch.bmm(flipped_grad.mT, _by_draw(x if flipped is None else flipped, noise))
        by_draw = by_draw.mul_(noise)  # (N, r, in)
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
