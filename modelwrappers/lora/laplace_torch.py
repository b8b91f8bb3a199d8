r"""laplace-torch's posteriors over a curvature that is given, not computed (arXiv 2106.14806).

The curvature of LoRA matrices comes from `lora.curvature`, as eigenvectors and eigenvalues; the
algebra of the posterior and the Laplace evidence are the library's. It is an optional requirement:
this file is imported by the function that needs it.
"""

from __future__ import annotations

import math

import torch
from laplace import DiagLaplace, KronLaplace
from laplace.utils.matrix import KronDecomposed
from torch import Tensor

from modelwrappers.lora.curvature import Block


class LowRankKron(KronDecomposed):
    """Eigenvectors (p, k) of a factor may be few: on the rest of the space it is 0."""

    def __add__(self, deltas: Tensor) -> LowRankKron:
        return LowRankKron(self.eigenvectors, self.eigenvalues, self.deltas + deltas)

    def __mul__(self, scalar: float) -> LowRankKron:
        scaled = super().__mul__(scalar)
        return LowRankKron(scaled.eigenvectors, scaled.eigenvalues, scaled.deltas)

    def logdet(self) -> Tensor:
        total = torch.zeros((), dtype=self.deltas.dtype, device=self.deltas.device)
        for vectors, values, delta in self._blocks():
            spectrum = _outer(values)
            size = math.prod(len(q) for q in vectors)
            total = total + (spectrum + delta).log().sum()
            total = total + (size - spectrum.numel()) * delta.log()
        return total

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        parts, start = [], 0
        for vectors, values, delta in self._blocks():
            shape = [len(q) for q in vectors]
            block = W[..., start : start + math.prod(shape)].unflatten(-1, shape)
            inside = _project(block, [q.mT for q in vectors])
            outside = block - _project(inside, vectors)
            scale = (_outer(values) + delta).pow(exponent).to(W.dtype)
            result = _project(inside * scale, vectors)
            if scale.numel() < math.prod(shape):
                result = result + delta.pow(exponent).to(W.dtype) * outside
            parts.append(result.flatten(-len(shape)))
            start += math.prod(shape)
        return torch.cat(parts, dim=-1)

    def inv_square_form(self, W: Tensor) -> Tensor:
        root = self._bmm(W, -0.5)  # symmetric and never negative, whatever the rounding
        return root @ root.mT

    def _blocks(self):
        return zip(self.eigenvectors, self.eigenvalues, self.deltas, strict=True)


class GivenKron(KronLaplace):
    """Kronecker-factored curvature, or with one block of one factor the whole of it."""

    def _init_H(self) -> None:
        self.H = self.H_facs = None  # the library would allocate every dense factor

    def take(self, blocks: list[Block]) -> None:
        vectors = [[q for q, _ in block] for block in blocks]
        self.H = self.H_facs = LowRankKron(vectors, [[v for _, v in block] for block in blocks])


class GivenDiagonal(DiagLaplace):
    """Diagonal curvature."""

    def take(self, blocks: list[Block]) -> None:
        self.H = blocks[0][0][1]

    def functional_variance(self, Js: Tensor) -> Tensor:
        root = Js * self.posterior_scale.to(Js.dtype)
        return root @ root.mT


POSTERIORS = {"kron": GivenKron, "full": GivenKron, "diag": GivenDiagonal}


def _outer(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.outer(*values)


def _project(block: Tensor, factors: list[Tensor]) -> Tensor:
    """(Q1 x Q2) applied to blocks (..., p1, p2), or Q to vectors (..., p)."""
    if len(factors) == 1:
        return block @ factors[0].mT
    return factors[0] @ block @ factors[1].mT
