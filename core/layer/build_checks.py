"""Checks of a new layer: the router returns assignments, each loss is a scalar that trains the router."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.parts import Experts
from ..contract.routing import Assignments, Routing, Spec
from ..errors import UsageError
from .dispatch import dispatch


def drawn(spec: Spec, like: Tensor) -> dict[str, Tensor | None]:
    """A forward's arguments: four random tokens, with ids and labels if the layer takes them."""
    zeros = torch.zeros(4, dtype=torch.long, device=like.device)
    x = torch.randn(4, spec.dim).to(like)
    return {"x": x, "ids": zeros if spec.vocab else None, "labels": zeros if spec.classes else None}


@torch.no_grad()
def output_of(experts: Experts, routing: Routing, out: int) -> Tensor:
    """[T, out]: the experts' output; running statistics of their modules do not change."""
    training = [module for module in experts.modules() if module.training]
    experts.eval()
    y_TO = dispatch(experts, routing, out)
    for module in training:
        module.training = True
    return y_TO


def check_plan(layer: str, plan: Any) -> None:
    """Raise UsageError unless the router's select returned assignments."""
    if not isinstance(plan, Assignments):
        message = f"layer '{layer}': its router's select returned {type(plan).__name__}, not Assignments"
        raise UsageError(message, code="select-not-assignments")


def check_terms(layer: str, terms: Mapping[str, Any]) -> None:
    """Raise UsageError unless each loss term is a scalar that depends on the router."""
    for term, value in terms.items():
        if not isinstance(value, Tensor):
            why = f"is {value!r}, not a tensor"
        elif value.dim():
            why = f"is of shape {list(value.shape)}, not a scalar; take a mean, say routing.mean(...)"
        elif not value.requires_grad:
            why = "does not depend on the router or on any other weight of its layer, so it trains nothing here"
        else:
            continue
        raise UsageError(f"layer '{layer}': loss '{term}' {why}", code="bad-loss-term")
