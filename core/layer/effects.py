"""What moves a router: gradients and choices on one held-out batch."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..contract.routing import Routing
from ..contract.stats import Effects
from .moe import MoE
from .probing import evaluating

LEARNABLE = 1e-5  # the least share of the gates' gradient that must reach a router's logits


def effects_of(layer: MoE, routing: Routing, loss: Tensor, layers: int) -> Effects:
    """The effects on one of a model's layers, given its routing and the task loss of the same forward."""
    with evaluating(layer):  # a router that is noisy in training would differ from itself
        return _effects(layer, routing, loss, layers)


def _effects(layer: MoE, routing: Routing, loss: Tensor, layers: int) -> Effects:
    logits = [level.logits for level in routing.levels if level.logits.requires_grad]
    terms = layer.aux_terms(routing) if logits else {}
    found = {name: _gradients(layer.weight_of(name) / layers * term, logits) for name, term in terms.items()}
    losses = {name: _norm(grads) for name, grads in found.items() if grads}
    values = [(name, bias()) for biases in layer.bias_levels() for name, bias in biases.items()]
    spreads: dict[str, float] = {}
    for name, bias_n in values:
        spreads[name] = max(spreads.get(name, 0.0), float(bias_n.detach().max() - bias_n.detach().min()))
    moved = {name: _moved(layer, routing, name) for name in spreads}
    return Effects(_norm(_gradients(loss, logits)), losses, moved, spreads)


def without_gradient(loss: Tensor, routings: Mapping[MoE, Routing]) -> Iterator[tuple[MoE, str]]:
    """(layer, sentence) for each level of a router that gets no gradient from the loss, though the gates get one."""
    for layer, routing in routings.items():
        gate_N = routing.plan.weight
        at_gates = _norm([g * gate_N.detach() for g in _gradients(loss, [gate_N])]) if gate_N.requires_grad else 1.0
        for level in routing.levels:
            within = layer.router.competes_in(level.name)
            competing = int(within.bincount().max()) if within is not None else level.logits.shape[-1]
            able = level.logits.requires_grad and competing > 1
            stuck = able and _norm(_gradients(loss, [level.logits])) < LEARNABLE * at_gates
            if stuck and _constant(gate_N, level.logits):
                yield (
                    layer,
                    f"layer '{layer.name}': the task gives the router's level '{level.name}' no gradient, so it "
                    f"can't learn; with top_k={layer.spec.top_k} its gates must not be renormalised to a constant",
                )


def _constant(gate_N: Tensor, logits: Tensor) -> bool:
    """Whether the gates do not move with the logits: while experts are still equal, the task's gradient cancels too."""
    mixed_N = gate_N * torch.arange(gate_N.shape[0], device=gate_N.device).cos()
    return _norm(_gradients(mixed_N.sum(), [logits])) <= LEARNABLE * _norm([mixed_N.detach()])


@torch.no_grad()
def _moved(layer: MoE, routing: Routing, plugin: str) -> float:
    """The share of choices that differ without one plugin's biases."""
    chosen_TE = routing.chosen()
    without = layer.decide(routing.tokens, [level.logits for level in routing.levels], without=plugin)
    return float((chosen_TE - without.chosen()).clamp(min=0).sum() / chosen_TE.sum().clamp(min=1))


def _gradients(value: Tensor, at: Sequence[Tensor]) -> list[Tensor]:
    """value's gradients at some tensors, without those that it does not depend on."""
    if not at or not value.requires_grad:
        return []
    grads = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def _norm(grads: Sequence[Tensor]) -> float:
    """The norm of all of them together."""
    return float(sum((grad.float().square().sum() for grad in grads), torch.zeros(())).sqrt())
