"""Pruning in one call: rank the experts of each layer on one batch and remove the least."""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract.growth import Grown, Growth
from ..contract.history import least_experts
from ..contract.routing import Routing
from ..errors import UsageError, listed
from ..layer.moe import MoE
from ..layer.probing import evaluating
from ..layer.sharded import gathered
from ..processes import all_reduce_sum
from .engine import Engine
from .measuring import observed

By = Literal["load", "gate_mass", "output_norm"]
CHUNK = 256  # tokens that every expert is run on at once


def prune(
    engine: Engine,
    probe: Callable[[], Tensor],
    keep: int,
    by: By = "load",
    optimizers: Optimizer | Iterable[Optimizer] = (),
    followers: nn.Module | Iterable[nn.Module] = (),
) -> list[Grown]:
    """Remove the least experts of each layer until `keep` remain; returns one record for each layer that changed.

    Experts are ranked on one batch, over all processes, which must all call it. probe: as in `engine.metrics`; it is
    run once. optimizers, followers: as for `engine.grow`. by, a sum over the real tokens t that expert i receives:

    - load: 1.
    - gate_mass: g_ti, the gate.
    - output_norm: g_ti |f_i(x_t)|, the gate times the norm of the expert's output. For it every expert runs on every
      token of the batch, `CHUNK` tokens at a time. REAP takes the mean over those tokens instead of the sum.

    Where experts compete in groups, each group keeps as many as a token chooses in it, so more than `keep` may
    remain. Each layer is pruned entirely or not at all; what is wrong with the arguments is refused before the first.
    Sources: Lasby et al., 2025 (REAP the Experts), output_norm; Chen et al., 2022 (Task-Specific Expert Pruning),
    load. Raises UsageError.
    """
    if by not in get_args(By):
        raise UsageError(f"experts are pruned by {listed(get_args(By))}, not {by!r}", code="unknown-ranking")
    most = max((layer.spec.top_k for layer in engine.layers), default=1)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < most:
        message = f"keep={keep!r} must be a whole number from {most}, the number of experts that a token chooses"
        raise UsageError(message, code="too-few-experts")
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    followers = [followers] if isinstance(followers, nn.Module) else list(followers)
    _, routings = observed(engine.layers, engine.plugins, probe)
    values = {layer: _values(layer, routings.get(layer), by) for layer in engine.layers if layer.spec.experts > keep}
    wanted = [(layer, value_E, least_experts(layer, value_E, keep)) for layer, value_E in values.items()]
    return [
        engine.grow(Growth(layer.name, drop=sorted(drop), why=_why(by, value_E, drop)), optimizers, followers)
        for layer, value_E, drop in wanted
        if drop
    ]


def _why(by: str, value_E: Tensor, drop: list[int]) -> str:
    return f"pruned by {by}, {float(value_E[drop].sum() / value_E.sum()):.1%} of it"


@torch.no_grad()
def _values(layer: MoE, routing: Routing | None, by: By) -> Tensor:
    """[E]: what a layer's experts are ranked by, over all processes."""
    value_E = torch.zeros(layer.spec.experts, device=layer.sums.step.device)
    if routing is not None and by == "load":
        value_E = routing.load.to(value_E)
    elif routing is not None:
        value_TE = routing.gates().detach().abs()  # 0 at padding
        if by == "output_norm":
            value_TE = value_TE * _output_norms(layer, routing.tokens.x)
        value_E = value_TE.sum(0).to(value_E)
    value_E = all_reduce_sum(value_E)
    if not float(value_E.min()) < float(value_E.max()) < float("inf"):
        message = f"the batch does not rank the experts of layer '{layer.name}': {by} is {value_E.tolist()}"
        raise UsageError(message, code="nothing-to-rank")
    return value_E


def _output_norms(layer: MoE, x_TD: Tensor) -> Tensor:
    """[T, E]: |f_i(x_t)|, in fp32 or better."""
    with evaluating(layer), gathered(layer):
        chunks = [layer.experts.outputs(x_SD).float().norm(dim=-1) for x_SD in x_TD.detach().split(CHUNK)]
    return torch.cat(chunks, 1).t()
