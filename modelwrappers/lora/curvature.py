r"""Jacobians and Gauss-Newton curvature of class logits in the matrices of a LoRA adapter.

Every LoRA matrix is a plain `nn.Linear`, whatever it is attached to: a float, an 8-bit or a 4-bit
base layer, a head. `Tape` records the inputs $a_{nt}$ of those projections in one forward, and
pulls vectors in logit space back to their outputs in one backward each. That gives, for example n,
token t and class c, the gradient $g_{ntc}$ of a projection's output, and with it

- the Jacobian of each example, $J_{nc} = \sum_t g_{ntc} a_{nt}^\top$, of the shape of the weight;
- the generalised Gauss-Newton matrix $\sum_n J_n^\top \Lambda_n J_n$,
  $\Lambda_n = \mathrm{diag}(p_n) - p_n p_n^\top$: whole, its diagonal, or Kronecker-factored
  (Martens and Grosse, arXiv 1503.05671), in one of the three ways of `KronCurvature` to treat a
  row's tokens (Eschenhagen et al., arXiv 2311.00636; Yang et al., arXiv 2308.13111).

functorch cannot do this on bitsandbytes layers, and KFAC libraries count padding tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from utils.errors import RunError, quoted
from utils.records import check_tensor
from utils.seeding import mix_seed

Block = list[tuple[Tensor, Tensor]]  # (eigenvectors, eigenvalues) of each factor of a projection


class Projection(NamedTuple):
    """One LoRA matrix.

    Attributes:
        name: as in PEFT's state dict.
        module: whose weight it is, (out, in).
        rows: the outputs that class logits depend on, if not all: a head's answer tokens.
    """

    name: str
    module: nn.Linear
    rows: Tensor | None = None

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        weight = self.module.weight.detach().float()
        return weight if self.rows is None else weight[self.rows]

    def restrict(self, gradients: Tensor) -> Tensor:
        """Of gradients at the module's output those of `rows`."""
        return gradients if self.rows is None else gradients[..., self.rows]


class Tape:
    """Inputs and outputs of the projections in one forward.

        with Tape(projections) as tape:
            logits = model(...)                       # (B, C), with gradients enabled
        jacobians = tape.jacobians(logits)            # (B, C, P)

    A projection that the model calls several times in one forward (shared layers) has as many
    entries; its gradients are their sums, so they count as further tokens.
    """

    def __init__(self, projections: list[Projection]) -> None:
        self.projections = projections
        self._calls: list[tuple[int, Tensor, Tensor]] = []  # (projection, input, output)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Tape:
        for position, projection in enumerate(self.projections):

            def record(module, inputs, output, position=position) -> None:
                self._calls.append((position, inputs[0].detach(), output))

            self._hooks.append(projection.module.register_forward_hook(record))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def inputs(self) -> list[Float[Tensor, "B T in"]]:
        """What each projection was applied to."""
        return self._by_projection([_tokens(x) for _, x, _ in self._calls])

    def pull_back(
        self, logits: Float[Tensor, "B C"], vectors: Float[Tensor, "B C K"]
    ) -> Iterator[list[Float[Tensor, "B T out"]]]:
        """For each k the gradients of $\\sum_{nc} v_{nck} f_{nc}$ at the projections' outputs."""
        outputs = [output for _, _, output in self._calls]
        last = vectors.shape[-1] - 1
        for k in range(last + 1):
            gradients = torch.autograd.grad(
                logits,
                outputs,
                vectors[..., k].to(logits.dtype),
                retain_graph=k < last,
                materialize_grads=True,
            )
            by_projection = self._by_projection([_tokens(g) for g in gradients])
            pairs = zip(self.projections, by_projection, strict=True)
            yield [projection.restrict(g) for projection, g in pairs]

    def jacobians(self, logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C P"]:
        """Gradients of every class logit in all projections' weights, flattened row by row."""
        rows, classes = logits.shape
        basis = torch.eye(classes, device=logits.device).expand(rows, -1, -1)
        inputs = self.inputs()
        return torch.stack(
            [per_example(gradients, inputs) for gradients in self.pull_back(logits, basis)], dim=1
        )

    def _by_projection(self, values: list[Tensor]) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in self.projections]
        for (position, _, _), value in zip(self._calls, values, strict=True):
            found[position].append(value)
        for projection, parts in zip(self.projections, found, strict=True):
            if not parts:
                raise RunError(
                    f"{projection.name} has no part in the class logits, so there is no posterior "
                    "over it; leave its layer out with --target-modules."
                )
        return [torch.cat(parts, dim=1) for parts in found]


def _tokens(values: Tensor) -> Float[Tensor, "B T width"]:
    """A pooled head sees (B, width): one token."""
    values = values.float()
    return values if values.dim() == 3 else values.unsqueeze(1)


def per_example(gradients: list[Tensor], inputs: list[Tensor]) -> Float[Tensor, "B P"]:
    """$\\sum_t g_{nt} a_{nt}^\\top$ of every projection, flattened and side by side."""
    blocks = [g.transpose(1, 2) @ a for g, a in zip(gradients, inputs, strict=True)]  # (B, out, in)
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def softmax_hessian_root(logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C C-1"]:
    r"""S with $S S^\top = \mathrm{diag}(p) - p p^\top$, the Hessian of the NLL in the logits.

    A constant added to all logits changes nothing, so its rank is C - 1: one backward is saved.
    """
    probs = logits.detach().double().softmax(-1)
    hessian = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    return root[..., 1:].float()  # the first eigenvalue is 0


# --- sums over the training set -------------------------------------------------------------------


class GramSum:
    r"""$F = \sum_m v_m v_m^\top$ over rows $v_m$ of `width`, exact or as a sketch of low rank.

    Wider than `rank`, only $Y = F \Omega$ is kept, for one random $\Omega$ of 2 `rank` columns: it
    adds up over batches and processes, and Nystrom's $Y (\Omega^\top Y)^{-1} Y^\top$ approximates F
    from below (Tropp et al., *Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data*, arXiv 1706.05736). A direction that is left out keeps the prior's variance.

    Args:
        rank: 0 for no limit.
    """

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        self.rank = rank if 0 < 2 * rank < width else 0
        self.test = None
        columns = width
        if self.rank:
            columns = 2 * self.rank
            generator = torch.Generator().manual_seed(mix_seed("sketch", width, columns))
            test = torch.randn(width, columns, generator=generator, dtype=torch.float64)
            self.test = torch.linalg.qr(test).Q.float().to(device)
        self.total = torch.zeros(width, columns, device=device)

    def add(self, vectors: Float[Tensor, "m width"]) -> None:
        self.total += vectors.T @ (vectors if self.test is None else vectors @ self.test)

    def eigen(self) -> tuple[Float[Tensor, "width k"], Float[Tensor, " k"]]:
        """Orthonormal eigenvectors and eigenvalues (float64); k is the width, or the rank."""
        total = self.total.double()
        if self.test is None:
            values, vectors = torch.linalg.eigh((total + total.T) / 2)
            return vectors.float(), values.clamp(min=0)
        shift = torch.finfo(torch.float32).eps * total.norm()
        test = self.test.double()
        shifted = total + shift * test
        core = test.T @ shifted
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        keep = values > values.max() * torch.finfo(torch.float32).eps  # a sum of few rows
        root = shifted @ (vectors[:, keep] / values[keep].sqrt())
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        eigenvalues = (singular.square() - shift).clamp(min=0)
        return left[:, : self.rank].float(), eigenvalues[: self.rank]


class KronCurvature:
    r"""Two Gram sums per projection: B of gradients and A of inputs, whose Kronecker product is H.

    With $g_{nt}$ (for each column of the root of $\Lambda_n$) and $a_{nt}$ at token t of row n:

    - `reduce`, KFAC-reduce, for one loss per row: $B = \sum_n \tilde g_n \tilde g_n^\top$,
      $A = \frac1N \sum_n \bar a_n \bar a_n^\top$, with $\tilde g_n$ the sum and $\bar a_n$ the mean
      over the tokens that some class logit depends on; N counts the rows that have any.
    - `expand`, KFAC-expand, where every token is an example: $B = \sum_{nt} g_{nt} g_{nt}^\top$,
      $A = \frac1M \sum_{nt} a_{nt} a_{nt}^\top$ over the M tokens that some logit depends on.
    - `published`, as the code of arXiv 2308.13111 computes them: the same B, but
      $A = \frac1N \sum_{nt} a_{nt} a_{nt}^\top$ over all T tokens, padding included, so that H is
      about T times that of `expand`, and depends on how rows were batched. Factors are dense.

    The first two are of arXiv 2311.00636; tokens that no logit depends on are left out here.

    Args:
        rank: of factors wider than twice as much; 0 for no limit, and always with `published`.
        sharing: `reduce`, `expand` or `published`.
    """

    def __init__(self, projections: list[Projection], rank: int, sharing: str = "reduce") -> None:
        self.sharing = sharing
        rank = 0 if sharing == "published" else rank
        device = projections[0].weight.device
        shapes = [projection.weight.shape for projection in projections]
        self.gradients = [GramSum(out, rank, device) for out, _ in shapes]
        self.inputs = [GramSum(width, rank, device) for _, width in shapes]
        self.num_examples = torch.zeros(len(shapes), device=device)  # what A is a mean over

    def add(self, tape: Tape, logits: Tensor, root: Tensor, new: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tape: of its forward.
            logits: (B, C), with gradients.
            root: of the Hessian of the NLL in the logits, (B, C, K); 0 for rows that do not count.
            new: 1 for rows that count, (B,); None: all do. Where the root is 0 a row adds nothing
                to B, but its tokens would add to `published`'s A.
        """
        inputs = tape.inputs()
        reached = [torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device) for a in inputs]
        for gradients in tape.pull_back(logits, root):
            for i, g in enumerate(gradients):
                self.gradients[i].add(g.sum(1) if self.sharing == "reduce" else g.flatten(0, 1))
                reached[i] |= (g != 0).any(-1)
        for i, (a, tokens) in enumerate(zip(inputs, reached, strict=True)):
            if self.sharing == "reduce":
                number = tokens.sum(1, keepdim=True)  # (B, 1)
                mean = (a * tokens.unsqueeze(-1)).sum(1) / number.clamp(min=1)
                has_any = number[:, 0] > 0
                self.inputs[i].add(mean[has_any])
                self.num_examples[i] += has_any.sum()
            elif self.sharing == "expand":
                self.inputs[i].add(a[tokens])
                self.num_examples[i] += tokens.sum()
            else:
                rows = a if new is None else a[new > 0]
                self.inputs[i].add(rows.flatten(0, 1))
                self.num_examples[i] += len(rows)

    def tensors(self) -> list[Tensor]:
        """What adds up over processes."""
        return [
            self.num_examples,
            *(gram.total for grams in (self.gradients, self.inputs) for gram in grams),
        ]

    def blocks(self) -> list[Block]:
        """Per projection (eigenvectors, eigenvalues) of the gradients' and the inputs' factor."""
        result = []
        for gradients, inputs, number in zip(
            self.gradients, self.inputs, self.num_examples.clamp(min=1), strict=True
        ):
            vectors, values = inputs.eigen()
            result.append([gradients.eigen(), (vectors, values / number)])
        return result


class FullCurvature:
    """The whole Gauss-Newton matrix over all parameters, (P, P)."""

    def __init__(self, projections: list[Projection]) -> None:
        number = sum(projection.weight.numel() for projection in projections)
        self.gram = GramSum(number, 0, projections[0].weight.device)

    def add(self, tape: Tape, logits: Tensor, root: Tensor, new: Tensor | None = None) -> None:
        inputs = tape.inputs()
        for gradients in tape.pull_back(logits, root):
            self.gram.add(per_example(gradients, inputs))

    def tensors(self) -> list[Tensor]:
        return [self.gram.total]

    def blocks(self) -> list[Block]:
        return [[self.gram.eigen()]]


class DiagonalCurvature:
    """The diagonal of the Gauss-Newton matrix, (P,)."""

    def __init__(self, projections: list[Projection]) -> None:
        number = sum(projection.weight.numel() for projection in projections)
        self.total = torch.zeros(number, device=projections[0].weight.device)

    def add(self, tape: Tape, logits: Tensor, root: Tensor, new: Tensor | None = None) -> None:
        inputs = tape.inputs()
        for gradients in tape.pull_back(logits, root):
            self.total += per_example(gradients, inputs).square().sum(0)

    def tensors(self) -> list[Tensor]:
        return [self.total]

    def blocks(self) -> list[Block]:
        """The eigenvectors of a diagonal matrix are not stored."""
        return [[(torch.empty(0), self.total.double())]]


STRUCTURES = ("diag", "full", "kron")
SHARINGS = ("reduce", "expand", "published")
Curvature = KronCurvature | FullCurvature | DiagonalCurvature


def build_curvature(
    structure: str, projections: list[Projection], rank: int, sharing: str | None
) -> Curvature:
    """An empty sum of one of `STRUCTURES`; rank and sharing are of Kronecker factors."""
    if structure == "kron":
        return KronCurvature(projections, rank, sharing or "reduce")
    return {"diag": DiagonalCurvature, "full": FullCurvature}[structure](projections)


# --- on disk --------------------------------------------------------------------------------------


def block_tensors(blocks: list[Block]) -> dict[str, Tensor]:
    """Eigenvectors and eigenvalues of every factor, by projection and factor."""
    tensors = {}
    for i, block in enumerate(blocks):
        for j, (vectors, values) in enumerate(block):
            tensors |= {f"{i}.{j}.vectors": vectors, f"{i}.{j}.values": values}
    return tensors


def read_blocks(
    tensors: Mapping[str, Tensor],
    shapes: list[tuple[int, ...]],
    is_diagonal: bool,
    where: str,
    refuse: Callable[[str], NoReturn],
) -> list[Block]:
    """The inverse of `block_tensors`, of tensors that a file holds.

    Args:
        tensors: the file's.
        shapes: of the projections' weights, or the one number of all parameters.
        is_diagonal: whether there are no eigenvectors to store.
        where: the file, for messages.
        refuse: raises the error, given the reason.
    Raises:
        UsageError: they are not the spectrum of a curvature of these shapes.
    """
    blocks, taken = [], set()
    for i, shape in enumerate(shapes):
        blocks.append([])
        for j, width in enumerate(shape):
            names = f"{i}.{j}.vectors", f"{i}.{j}.values"
            taken.update(names)
            values = check_tensor(tensors, names[1], (None,), where)
            expected = (0,) if is_diagonal else (width, len(values))
            vectors = check_tensor(tensors, names[0], expected, where)
            number = width if is_diagonal else min(width, len(values))
            if len(values) != number:
                refuse(f"{names[1]} has {len(values)} eigenvalues, more than {width}")
            if (values < 0).any():
                refuse(f"{names[1]} has negative eigenvalues, which no curvature has")
            if not is_diagonal and not _is_orthonormal(vectors):
                refuse(f"the columns of {names[0]} are not orthonormal")
            blocks[-1].append((vectors, values))
    if tensors.keys() - taken:
        refuse(f"unknown tensor {quoted(min(tensors.keys() - taken))}")
    return blocks


def _is_orthonormal(vectors: Tensor) -> bool:
    """Up to the rounding of float32 factors."""
    gram = vectors.double().mT @ vectors.double()
    return (
        bool((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max() < 1e-3)
        if len(gram)
        else True
    )
