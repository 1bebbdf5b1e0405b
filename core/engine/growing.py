"""One growth from start to end: checks, the transaction, and the measured change of the output."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract.growth import Grown, Growth, NewExpert
from ..contract.routing import Routing, Tokens
from ..contract.setup import Setup
from ..contract.traits import traits_of
from ..errors import UsageError, listed, nearest
from ..growth.transaction import Ask, Staged, all_or_nothing, commit, recorded, stage
from ..growth.triggers import Triggers
from ..layer.ledger import invalidate
from ..layer.moe import MoE
from ..layer.probing import output_on
from ..layer.sharded import whole
from ..optimizer_state import refuse_holders
from ..processes import agreed
from ..registry.manager import Plugins
from ..seeds import generator
from .measuring import Probe, observed

EXACT = 1e-5  # the largest relative change of a layer's output that still counts as none


@attrs.frozen
class Growing:
    """What a growth needs from an engine. growths: receives the record. in_step: between backward and after_step."""

    plugins: Plugins
    layers: Sequence[MoE]
    growths: list[Grown]
    step: int
    seed: int
    in_step: bool


def grow(
    engine: Growing,
    growth: Growth,
    optimizers: Sequence[Optimizer],
    followers: Sequence[nn.Module],
    probe: Probe | None,
) -> Grown:
    """Grow a layer, its copies and the optimizers' state; see `Engine.grow`. Raises UsageError."""
    if not isinstance(growth, Growth):
        raise UsageError(f"grow() takes a Growth, not {growth!r}", code="bad-growth")
    device = engine.layers[0].sums.step.device if engine.layers else torch.device("cpu")
    with agreed(str(growth), device):
        layer = _named(engine, growth.layer)
        copies = [twin for follower in followers for twin in _copies(follower, layer)]
        refuse_holders(layer, optimizers, followers)
    with whole([layer, *copies]):
        record = _grow(engine, layer, copies, growth, optimizers, probe)
    return record


def _grow(
    engine: Growing,
    layer: MoE,
    copies: Sequence[MoE],
    growth: Growth,
    optimizers: Sequence[Optimizer],
    probe: Probe | None,
) -> Grown:
    """Stage and commit one growth of a layer whose weights are whole."""
    device = layer.sums.step.device
    steps = [twin.sums.step for twin in (layer, *copies)]
    with all_or_nothing([layer, *copies], optimizers, engine.growths):
        with agreed(str(growth), device):
            _check_moment(engine, layer, growth, probe)
            before, size = _look(engine, layer, probe), layer.spec.experts
            random = generator(engine.seed, f"growth {len(engine.growths)}")
            asked = initializers(engine.plugins, layer, before.routing if before else None)
            staged = stage(layer, copies, growth, asked, random, optimizers)
            _check_staged(engine.plugins, layer, growth, staged)
        with agreed(str(growth), device):
            commit(staged, [layer, *copies])
            after = _look(engine, layer, probe, before)
            change = _change(before, after)
            if growth.require_exact and not (change is not None and change <= EXACT):
                message = f"growth of layer '{layer.name}' changed its output by {change}; it was rolled back"
                raise UsageError(message, code="growth-not-exact")
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # after eight sizes a compiled model would silently fall back to eager
        losses = [None if look is None else look.loss for look in (before, after)]
        record = recorded(engine.step, growth, staged, size, change, *losses)
        engine.growths.append(record)
    for step in steps:
        invalidate(step)  # not before all is done: a failure puts them back
    return record


def check_growable(plugins: Plugins, triggers: Triggers, layer: MoE, seed: int) -> None:
    """If a trigger is chosen, stage a growth of a new layer: one that can't grow fails now, with UsageError."""
    asking = [traits_of(plugins.active[bound.plugin]) for bound in triggers.bounds]
    for parent in {None if traits.orphans else 0 for traits in asking}:
        growth, random = Growth(layer.name, (parent,)), generator(seed, "rehearsal")
        stage(layer, (), growth, initializers(plugins, layer), random)


def initializers(plugins: Plugins, layer: MoE, seen: Routing | None = None) -> Ask:
    """A function that makes a layer's new experts, with its settings. seen: its routing of the probe batch."""
    bounds = plugins.bind("moe_new_expert", plugins.override(layer.settings))

    def ask(of: str, origin: int | None, offer: Mapping[str, Any]) -> tuple[str, NewExpert]:
        inputs = None if seen is None else _inputs(layer, of, origin, seen)
        for bound in bounds:
            new = bound({**offer, "inputs": inputs})
            if isinstance(new, NewExpert):
                return bound.plugin, new
            if new is not None:
                message = f"moe_new_expert of '{bound.plugin}' returned {new!r}, which is not a NewExpert"
                raise UsageError(message, code="bad-new-expert")
        asked = listed(bound.plugin for bound in bounds) or "no plugin"
        message = f"no plugin makes a new expert for layer '{layer.name}' (asked: {asked}); add an initializer"
        raise UsageError(message, code="no-initializer")

    return ask


def _inputs(layer: MoE, of: str, origin: int | None, seen: Routing) -> Tensor:
    """[n, D]: the tokens routed to one unit, or, if `origin` is None, the tokens that no expert received."""
    unit_of = layer.router.unit_of_expert(of) if of != "expert" else None
    chosen_TE = seen.chosen() > 0
    if origin is None:
        real_T = torch.ones_like(chosen_TE[:, 0]) if seen.tokens.mask is None else seen.tokens.mask
        mine_T = real_T & ~chosen_TE.any(-1)
    else:
        mine_T = (chosen_TE[:, origin] if unit_of is None else chosen_TE[:, unit_of == origin].any(-1)).bool()
    return seen.tokens.x[mine_T].detach().cpu()


# -- checks ------------------------------------------------------------------------------------------


def _named(engine: Growing, name: str) -> MoE:
    layers = {layer.name: layer for layer in engine.layers}
    if name not in layers:
        hint = "engine.attach, which callbacks call too, names layers by their place in the model"
        raise UsageError(f"there is no layer '{name}' to grow; {nearest(name, layers)} ({hint})", code="unknown-layer")
    return layers[name]


def _copies(model: nn.Module, layer: MoE) -> list[MoE]:
    """The copy of a layer in a follower such as a weight average; none in a model that wraps the layer itself."""
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.copy_id == layer.copy_id]
    if layer in layers:
        return []
    if len(layers) != 1:
        message = f"follower {type(model).__name__} holds {len(layers)} copies of layer '{layer.name}', not one"
        raise UsageError(f"{message}; make it after engine.attach(model)", code="bad-follower")
    if layers[0].sizes != layer.sizes:
        sizes = f"{layers[0].spec.experts} experts, not {layer.spec.experts}"
        message = f"follower {type(model).__name__} holds a copy of layer '{layer.name}' with {sizes}"
        raise UsageError(f"{message}; pass it at every growth", code="bad-follower")
    return layers


def _check_moment(engine: Growing, layer: MoE, growth: Growth, probe: Probe | None) -> None:
    if growth.require_exact and probe is None:
        raise UsageError("require_exact needs a probe, on which the change is measured", code="growth-needs-probe")
    if engine.in_step:
        message = f"layer '{layer.name}' can't grow: a step is not finished; call engine.after_step() first"
        raise UsageError(message, code="layer-cannot-grow")
    mine = {id(parameter) for parameter in layer.all_parameters()}
    for other in engine.layers:
        if other is not layer and any(id(parameter) in mine for parameter in other.all_parameters()):
            message = f"layer '{layer.name}' shares weights with '{other.name}', which would not grow with it"
            raise UsageError(message, code="layer-cannot-grow")


def _check_staged(plugins: Plugins, layer: MoE, growth: Growth, staged: Staged) -> None:
    """Ask the plugins about the grown layer; refuse a growth that must be exact but can't be."""
    sizes = {**layer.sizes, **{of: len(plan.origins) for of, plan in staged.plans.items()}}
    spec = attrs.evolve(layer.spec, experts=sizes["expert"])
    plugins.check(Setup(plugins.override(layer.settings), spec, sizes=sizes))
    if growth.require_exact and not set(_effects(plugins, staged)) & set(layer.router.keeps_function):
        (router,) = (bound.plugin for bound in plugins.bind("moe_router"))
        cause = f"initializer '{staged.initializer}'" if staged.initializer else "merging or removal"
        message = f"{cause} can't preserve what a layer with router '{router}' computes; remove require_exact"
        raise UsageError(message, code="growth-not-exact")


def _effects(plugins: Plugins, staged: Staged) -> tuple[str, ...]:
    return traits_of(plugins.active[staged.initializer]).effects if staged.initializer else ()


# -- the change of the output --------------------------------------------------------------------------


@attrs.frozen
class _Look:
    """A layer on the probe batch: the task loss, the layer's routing and tokens, and its output for them."""

    loss: float
    routing: Routing | None
    tokens: Tokens | None
    output: Tensor | None


def _look(engine: Growing, layer: MoE, probe: Probe | None, same: _Look | None = None) -> _Look | None:
    """Run the layer on the probe batch; with `same`, on the tokens of that earlier look."""
    if probe is None:
        return None
    loss, routings = observed(engine.layers, engine.plugins, probe)
    seen = routings.get(layer)
    own = attrs.evolve(seen.tokens, x=seen.tokens.x.detach()) if seen else None
    tokens = same.tokens if same else own
    return _Look(float(loss.detach()), seen, tokens, None if tokens is None else output_on(layer, tokens))


def _change(before: _Look | None, after: _Look | None) -> float | None:
    """|y' - y| / |y|."""
    if before is None or after is None or before.output is None or after.output is None:
        return None
    y, new = before.output.cpu().double(), after.output.cpu().double()
    return float((new - y).norm() / y.norm().clamp(min=1e-300))
