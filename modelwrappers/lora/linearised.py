r"""The linearised model: its MAP under a Gaussian prior, and draws of its Gaussian logits.

Around a trained adapter $\theta$ the class logits of row n are taken for linear in the weights,
$F_n(\theta') = f_n + J_n (\theta' - \theta)$ (Khan et al., arXiv 1906.01930; Immer et al., arXiv
2008.08400). Under the prior $N(\mu, \Lambda^{-1})$ the trained adapter is no mode of that model in
general; the mode minimises the convex

    sum_n CE(F_n(theta'), y_n) + (theta' - mu)^T Lambda (theta' - mu) / 2

(Antoran et al., arXiv 2206.08900, on why the mode should be that of the linearised model). It lies
at $\theta' = \mu + \Lambda^{-1} J^\top \alpha$ for some $\alpha$ of one number per row and class,
so Newton's method runs on these, as in Gaussian process classification (Rasmussen and Williams
2006, algorithm 3.3): with $K = J \Lambda^{-1} J^\top$, p the softmax and W its Jacobian

    (I + W K) alpha' = W K alpha + y - p,      F = f + J (mu - theta) + K alpha,

with the step halved while it does not descend. At the mode $\alpha = y - p$. The posterior around
it gives a row's class logits a Gaussian law $N(F, \Sigma)$.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from utils.errors import RunError

MOST_LOGITS = 5_000  # rows x classes: the side of K, a few seconds for each of Newton's steps
MOST_NUMBERS = 2**29  # of J: 2 GiB
MOST_STEPS = 200
TOLERANCE = 1e-7  # of the gradient in each logit, which is a difference of probabilities


class Mode(NamedTuple):
    """Of the linearised model.

    Attributes:
        shift: from the trained adapter to the mode, (P,), float64.
        logits: of the rows at the mode, (N, C), float64.
    """

    shift: Float[Tensor, " P"]
    logits: Float[Tensor, "N C"]


class LinearisedModel:
    """Logits that are linear in the weights, of the training rows.

    Args:
        logits: f at the trained adapter.
        jacobians: J, in the weights of all projections side by side.
        labels: y.
        sizes: how many weights each projection has; they add up to P.
    """

    def __init__(
        self,
        logits: Float[Tensor, "N C"],
        jacobians: Float[Tensor, "N C P"],
        labels: Int[Tensor, " N"],
        sizes: list[int],
    ) -> None:
        self.logits = logits.double()
        self.labels = labels
        self._targets = nn.functional.one_hot(labels, logits.shape[1]).double()
        self._blocks = list(jacobians.flatten(0, 1).split(sizes, dim=1))  # (N C, P_k) each
        self._unit_gram: Tensor | None = None

    def mode(self, offset: Float[Tensor, " P"], precisions: Float[Tensor, " K"]) -> Mode:
        r"""The minimum.

        Args:
            offset: $\theta - \mu$, the trained adapter from the prior's mean.
            precisions: the diagonal of Lambda, one value a projection, or one for all.
        Raises:
            RunError: Newton's method has not converged.
        """
        gram = self._gram(precisions)  # (N C, N C)
        base = self.logits.flatten() - self._apply(offset)
        alpha = torch.zeros_like(base)
        logits = base
        value = self._objective(logits, alpha, base)
        identity = torch.eye(len(base), dtype=base.dtype, device=base.device)
        for _ in range(MOST_STEPS):
            probs = logits.view_as(self.logits).softmax(-1)
            residual = (self._targets - probs).flatten()
            if (residual - alpha).abs().max() < TOLERANCE:
                return Mode(self._weights(alpha, precisions) - offset, logits.view_as(self.logits))
            hessian = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
            weighted = (hessian @ gram.view(*probs.shape, -1)).view_as(gram)  # W K
            target = torch.linalg.solve(identity + weighted, weighted @ alpha + residual)
            step = 1.0
            while True:
                trial = alpha + step * (target - alpha)
                logits = base + gram @ trial
                trial_value = self._objective(logits, trial, base)
                # near the minimum the difference is below what the sum can show
                if trial_value <= value + 1e-12 * abs(value) or step < 1e-9:
                    break
                step /= 2
            alpha, value = trial, trial_value
        raise RunError(
            f"the mode of the linearised model was not found in {MOST_STEPS} steps of Newton's "
            "method: the adapter or the prior precision is extreme; pass a larger "
            "--laplace-prior-precision, or leave out --laplace-refit."
        )

    def _objective(self, logits: Tensor, alpha: Tensor, base: Tensor) -> float:
        likelihood = nn.functional.cross_entropy(
            logits.view_as(self.logits), self.labels, reduction="sum"
        )
        return (likelihood + alpha @ (logits - base) / 2).item()

    def _gram(self, precisions: Tensor) -> Tensor:
        r"""$J \Lambda^{-1} J^\top$; of one precision for all it is a multiple of one matrix."""
        if len(precisions) == 1:
            if self._unit_gram is None:
                self._unit_gram = sum(block.double() @ block.double().T for block in self._blocks)
            return self._unit_gram / precisions
        pairs = zip(self._blocks, precisions, strict=True)
        return sum(block.double() @ block.double().T / value for block, value in pairs)

    def _apply(self, weights: Tensor) -> Float[Tensor, " NC"]:
        parts = weights.double().split([block.shape[1] for block in self._blocks])
        return sum(block.double() @ part for block, part in zip(self._blocks, parts, strict=True))

    def _weights(self, alpha: Tensor, precisions: Tensor) -> Float[Tensor, " P"]:
        values = precisions.expand(len(self._blocks))
        pairs = zip(self._blocks, values, strict=True)
        return torch.cat([block.double().T @ alpha / value for block, value in pairs])


# --- Gaussian logits ------------------------------------------------------------------------------


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
