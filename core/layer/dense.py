"""What replaces an MoE layer in a dense model: one MLP as wide as the experts that a token is sent to."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from ..contract.parts import Experts
from ..contract.routing import Spec
from ..errors import UsageError
from .activations import ACTIVATIONS


class Dense(nn.Module):
    """What stands in the place of an MoE layer: all tokens go one way. Takes its arguments; answers 0 at padding."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            x = torch.where(mask[..., None], x, 0)  # even NaN at a pad must reach nobody
        y = self.through(x)
        return y if mask is None else torch.where(mask[..., None], y, 0)

    def through(self, x: Tensor) -> Tensor:
        """[..., out] of tokens x [..., D]."""
        raise NotImplementedError


class DenseMLP(Dense):
    """One perceptron through which every token goes.

    hidden: its width, that of one expert unless given.
    """

    def __init__(self, spec: Spec, hidden: int | None = None) -> None:
        super().__init__()
        hidden = spec.hidden if hidden is None else hidden
        self.act = ACTIVATIONS[spec.activation]
        self.enter = nn.Linear(spec.dim, 2 * hidden if spec.activation == "swiglu" else hidden, bias=spec.bias)
        self.leave = nn.Linear(hidden, spec.out_dim, bias=spec.bias)

    def through(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.act(self.enter(x)))
        return y


class DenseExpert(Dense):
    """The one expert of a bank, through which every token goes. dim: D."""

    def __init__(self, bank: Experts, dim: int) -> None:
        super().__init__()
        self.bank, self.dim = bank, dim

    def through(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TO: Tensor = self.bank(x_TD, torch.full((1,), x_TD.shape[0], device=x.device))
        return y_TO.view(*x.shape[:-1], y_TO.shape[1])


def shared_expert(spec: Spec) -> DenseMLP | None:
    """The MLP through which every token goes, as wide as `spec.shared` experts, or None (DeepSeekMoE, 2024)."""
    return DenseMLP(spec, spec.hidden * spec.shared) if spec.shared else None


class DenseTwin(DenseMLP):
    """The MLP in the place of a layer."""


def dense_twin(spec: Spec, bank: Callable[[Spec], Experts | None] = lambda spec: None) -> Dense:
    """What does as much for a token as the layer's experts do.

    bank: builds the experts, if they are no stacked MLP. Of those one takes every token, as at top_k=1. An MLP is as
    wide as top_k experts and the shared ones together. Raises UsageError for more than one expert without a width.
    """
    if (own := bank(attrs.evolve(spec, experts=1, top_k=1))) is None:
        return DenseTwin(spec, spec.hidden * (spec.top_k + spec.shared))
    if spec.top_k + spec.shared > 1:
        raise UsageError(
            "a dense model is as wide as the experts that a token is sent to; these have no width, so one of them "
            f"stands for top_k=1 without shared ones alone, not for {spec.top_k} + {spec.shared}"
        )
    return DenseExpert(own, spec.dim)
