r"""A Gaussian prior on the LoRA matrices of an adapter that is trained as a point estimate.

$-\log p(\theta) = \frac\lambda2 |\theta - \theta_0|^2$ up to a constant, over the entries of all A
and B. With the mean negative log-likelihood of N rows as the loss, its share of the objective is
$\frac{\lambda}{2N} |\theta - \theta_0|^2$ (MacKay, *A practical Bayesian framework for
backpropagation networks*, 1992).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

MEANS = ("zero", "init")
# PEFT's own list of what a LoRA layer trains, but DoRA's magnitudes, which are no entries of A or B
MATRICES = frozenset(LoraLayer.adapter_layer_names) - {"lora_magnitude_vector"}


class GaussianPrior:
    """The prior's share of the objective, and of its gradient.

    Args:
        named_parameters: (name, parameter) of all that is trained; A and B are picked out. Biases
            and the weights of a classification head that is trained whole are outside the prior.
        precision: lambda.
        mean: "init": theta_0 is what the parameters are now; "zero": the origin.
        num_rows: N, the number of training rows.
    Attributes:
        parameters: the matrices that the prior is over.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        precision: float,
        mean: str,
        num_rows: int,
    ) -> None:
        self.parameters = [p for name, p in named_parameters if MATRICES & set(name.split("."))]
        self.weight = precision / num_rows
        self._means: list[Tensor] | None = None
        if mean == "init":
            self._means = [p.detach().clone() for p in self.parameters]

    def add_gradients(self) -> Tensor:
        r"""Add $\frac\lambda N (\theta - \theta_0)$ to `.grad`, once an update.

        To be called between the last backward and the optimizer's step: the gradients are those of
        all batches and processes by then, so the prior counts once however many there are, and the
        optimizer sees it as it sees the likelihood.

        Returns:
            the share of the objective, $\frac{\lambda}{2N} |\theta - \theta_0|^2$: a scalar.
        """
        with torch.no_grad():
            away = [p.detach() for p in self.parameters]
            if self._means is not None:
                away = torch._foreach_sub(away, self._means)
            for parameter in self.parameters:
                if parameter.grad is None:  # a layer that no row of the update went through
                    parameter.grad = torch.zeros_like(parameter)
            torch._foreach_add_([p.grad for p in self.parameters], away, alpha=self.weight)
            squares = torch.stack(torch._foreach_norm(away)).double().square().sum()
            return self.weight / 2 * squares
