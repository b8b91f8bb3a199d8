r"""Class logits with a Gaussian law $N(f, \Sigma)$: draws of them, and their mean softmax."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def standard_normal(mean: Float[Tensor, "B C"], n_samples: int) -> Float[Tensor, "B N C"]:
    """Pairs of opposite sign: odd parts of what is averaged have no noise."""
    shape = (mean.shape[0], (n_samples + 1) // 2, mean.shape[1])
    half = torch.randn(shape, dtype=torch.float64, device=mean.device)
    return torch.stack([half, -half], dim=2).flatten(1, 2)[:, :n_samples]


def draw(
    mean: Float[Tensor, "B C"], covariance: Float[Tensor, "B C C"], noise: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """f = mean + S e with S S^T the covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)  # (B, C, C)
    return (mean.double().unsqueeze(1) + noise @ root.mT).float()


def probit(mean: Float[Tensor, "B C"], covariance: Float[Tensor, "B C C"]) -> Float[Tensor, "B C"]:
    r"""$f / \sqrt{1 + \frac\pi8 \mathrm{var} f}$, whose softmax is near the mean softmax.

    MacKay's approximation (1992) as laplace-torch has it: it takes each logit's own variance, the
    part that all logits share included.
    """
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (mean / (1 + math.pi / 8 * variance).sqrt()).float()
