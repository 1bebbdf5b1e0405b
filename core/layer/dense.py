"""Dense layers: the shared expert, and the MLP that replaces an MoE layer in a dense model."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from ..contract.parts import Experts
from ..contract.routing import Spec
from ..errors import UsageError
from .activations import ACTIVATIONS


class Dense(nn.Module):
    """A layer without routing, called like an MoE layer: x [..., D] and optional mask, ids and labels.

    Returns [..., out], 0 at padding. Subclasses implement `transform`.
    """

    carries = 0  # it has no router that would pass anything on

    def forward(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            x = torch.where(mask[..., None], x, 0)  # not even NaN at padding may reach an output or a gradient
        y = self.transform(x)
        return y if mask is None else torch.where(mask[..., None], y, 0)

    def transform(self, x: Tensor) -> Tensor:
        """[..., out]: the output for tokens x [..., D]."""
        raise NotImplementedError


class DenseMLP(Dense):
    """A two-layer MLP for every token. hidden: its width; by default that of one expert.

    gated: multiply the output by sigmoid(x w), one number per token, w learned.
    """

    def __init__(self, spec: Spec, hidden: int | None = None, gated: bool = False) -> None:
        super().__init__()
        hidden = spec.hidden if hidden is None else hidden
        self.act = ACTIVATIONS[spec.activation]
        # enter and leave are the up and down projections; their names are keys of state_dicts
        self.enter = nn.Linear(spec.dim, 2 * hidden if spec.activation == "swiglu" else hidden, bias=spec.bias)
        self.leave = nn.Linear(hidden, spec.out_dim, bias=spec.bias)
        self.gate = nn.Linear(spec.dim, 1, bias=False) if gated else None

    def transform(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.act(self.enter(x)))
        return y if self.gate is None else self.gate(x).sigmoid() * y


class DenseExpert(Dense):
    """A bank of one expert that every token goes through. dim: D."""

    def __init__(self, bank: Experts, dim: int) -> None:
        super().__init__()
        self.bank, self.dim = bank, dim

    def transform(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TO: Tensor = self.bank(x_TD, torch.full((1,), x_TD.shape[0], device=x.device))
        return y_TO.view(*x.shape[:-1], y_TO.shape[1])


def shared_expert(spec: Spec) -> DenseMLP | None:
    """An MLP for every token, as wide as `spec.shared` experts, or None if there are none (DeepSeekMoE, 2024).

    With `spec.shared_gate` it has a gate (Qwen1.5-MoE, 2024).
    """
    return DenseMLP(spec, spec.hidden * spec.shared, spec.shared_gate) if spec.shared else None


class DenseTwin(DenseMLP):
    """The MLP that replaces an MoE layer."""


def dense_twin(spec: Spec, bank: Callable[[Spec], Experts | None] = lambda spec: None) -> Dense:
    """The dense layer with as much compute per token as this layer's experts.

    bank: builds the layer's bank from a spec, or returns None for a StackedMLP. A StackedMLP is replaced by an MLP as
    wide as top_k experts and the shared ones together; any other bank by one of its experts. Raises UsageError if a
    token uses several experts of such a bank, because their widths can't be added.
    """
    if (single := bank(attrs.evolve(spec, experts=1, top_k=1))) is None:
        return DenseTwin(spec, spec.hidden * (spec.top_k + spec.shared))
    if spec.top_k + spec.shared > 1:
        message = (
            "a dense model is as wide as the experts that a token is sent to; these have no width, so one of them "
            f"stands for top_k=1 without shared experts only, not for top_k={spec.top_k} and shared={spec.shared}"
        )
        raise UsageError(message, code="no-dense-twin")
    return DenseExpert(single, spec.dim)
