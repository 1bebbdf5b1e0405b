"""Measure what moves a router: gradients and choices on a held-out batch."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..contract.routing import Routing
from ..contract.stats import Effects
from .moe import MoE
from .probing import evaluating
from .sharded import gathered

LEAST_SHARE = 1e-5  # of the gates' gradient that must reach the logits; less is rounding error


def effects_of(layer: MoE, routing: Routing, loss: Tensor, layers: int) -> Effects:
    """The effects of the task, losses and biases on one of a model's `layers` layers.

    routing: the layer's, with its graph. loss: the scalar task loss of the same forward.
    """
    with (
        gathered(layer),
        evaluating(layer),
    ):  # choices of a router that draws noise in training would differ without any bias
        return _effects(layer, routing, loss, layers)


def _effects(layer: MoE, routing: Routing, loss: Tensor, layers: int) -> Effects:
    logits = [level.logits for level in routing.levels if level.logits.requires_grad]
    terms = layer.aux_terms(routing) if logits else {}
    by_term = {name: _gradients(layer.weight_of(name) / layers * term, logits) for name, term in terms.items()}
    losses = {name: _norm(grads) for name, grads in by_term.items() if grads}
    spreads: dict[str, float] = {}
    for biases in layer.bias_levels():
        for name, bias in biases.items():
            bias_n = bias().detach()
            spreads[name] = max(spreads.get(name, 0.0), float(bias_n.max() - bias_n.min()))
    moved = {name: _share_moved(layer, routing, name) for name in spreads}
    return Effects(_norm(_gradients(loss, logits)), losses, moved, spreads)


def without_gradient(loss: Tensor, routings: Mapping[MoE, Routing]) -> Iterator[tuple[MoE, str]]:
    """(layer, finding) for each router level that gets no gradient from the loss although the gates get one."""
    for layer, routing in routings.items():
        gate_N = routing.plan.weight
        at_gates = _norm([g * gate_N.detach() for g in _gradients(loss, [gate_N])]) if gate_N.requires_grad else 1.0
        for level in routing.levels:
            group_n = layer.router.competes_in(level.name)
            competing = level.logits.shape[-1] if group_n is None else int(group_n.bincount().max())
            can_learn = level.logits.requires_grad and competing > 1
            stuck = can_learn and _norm(_gradients(loss, [level.logits])) < LEAST_SHARE * at_gates
            if stuck and not _gates_depend_on(gate_N, [level.logits]):
                learned = [parameter for parameter in layer.router.parameters() if parameter.requires_grad]
                advice = f"with top_k={layer.spec.top_k} its gates must not be renormalised to a constant"
                if _gates_depend_on(gate_N, learned):
                    advice = "its gates are computed from something else; compute them from level.biased"
                why = f"the task gives the router's level '{level.name}' no gradient, so it can't learn"
                yield layer, f"layer '{layer.name}': {why}; {advice}"


def _gates_depend_on(gate_N: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the gates depend on these tensors.

    The task's gradient alone can't tell: while all experts are equal, it also cancels out.
    """
    weighted_N = gate_N * torch.arange(gate_N.shape[0], device=gate_N.device).cos()  # so nothing cancels
    return _norm(_gradients(weighted_N.sum(), inputs)) > LEAST_SHARE * _norm([weighted_N.detach()])


@torch.no_grad()
def _share_moved(layer: MoE, routing: Routing, plugin: str) -> float:
    """The share of choices that would differ without one plugin's biases."""
    chosen_TE = routing.chosen()
    without = layer.decide(routing.tokens, [level.logits for level in routing.levels], without=plugin)
    return float((chosen_TE - without.chosen()).clamp(min=0).sum() / chosen_TE.sum().clamp(min=1))


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a scalar with respect to those inputs that it depends on."""
    if not inputs or not value.requires_grad:
        return []
    grads = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def _norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    return float(sum((tensor.float().square().sum() for tensor in tensors), torch.zeros(())).sqrt())
