"""Metrics of layers, and probes: uncounted forwards on a held-out batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.numerics import count_by
from ..contract.routing import Routing
from ..contract.setup import Bound
from ..contract.stats import Effects, Finding, Metrics, Stats, merge_metrics
from ..errors import PluginError, RunError, UsageError
from ..layer.moe import MoE
from ..layer.probe_effects import effects_of, without_gradient
from ..layer.probing import observe
from ..layer.sharded import gathered
from ..registry.manager import Plugins

Probe = Callable[[], Tensor]
Probed = Mapping[MoE, tuple[Routing, Effects]]
Memory = dict[str, dict[str, dict[str, Any]]]  # what metrics keep, by layer, plugin and split


def measure(
    layers: Sequence[MoE], bounds: Sequence[Bound], memory: Memory, split: str, probed: Probed
) -> dict[str, Metrics]:
    """The metrics of each layer since the last call for this split; a layer without data is left out."""
    answers: dict[str, Metrics] = {}
    for layer in layers:
        stats = _taken(layer, split)
        if stats is not None and stats.tokens:
            routing, effects = probed.get(layer, (None, None))
            offer = {"layer": layer, "effects": effects, "probe": routing}
            core: Metrics = {f"loss.{term}": value for term, value in stats.terms().items()}
            core |= stats.work()
            with gathered(layer):
                answered = [
                    (bound.plugin, _asked(bound, stats, {**offer, "memory": _memory(memory, layer, bound, split)}))
                    for bound in bounds
                ]
            answers[layer.name] = merge_metrics([("the core", core), *answered])
    return answers


def _asked(bound: Bound, stats: Stats, offer: dict[str, Any]) -> Any:
    """One metric's answer. It gets a copy of the sums; a change of the weights or the routing raises RunError.

    Those are too large to copy: torch counts the changes of a tensor in place.
    """
    watched = [*_tensors(offer["probe"]), *offer["layer"].parameters()]
    before = [tensor._version for tensor in watched]
    answer = bound({**offer, "stats": Stats(stats.spec, stats.sums)})
    if before != [tensor._version for tensor in watched]:
        message = f"metric '{bound.plugin}' changed in place what other metrics read; let it work on a clone"
        raise RunError(message, code="changed-in-place")
    return answer


def _tensors(part: Any) -> Iterator[Tensor]:
    """The tensors of a record."""
    if isinstance(part, Tensor):
        yield part
    elif attrs.has(type(part)):
        for field in attrs.fields(type(part)):
            yield from _tensors(getattr(part, field.name, None))
    elif isinstance(part, tuple | list):
        for item in part:
            yield from _tensors(item)


def _taken(layer: MoE, split: str) -> Stats | None:
    """Take the sums of one split so far, which restart at zero; None if there are none."""
    sums = layer.sums.take_evaluated() if split == "eval" else layer.sums.take_since_log()
    if sums is None:
        return None
    stats = Stats(layer.spec, sums)
    for level in layer.router.levels:
        if level.top_k:
            unit_of = layer.router.unit_of_expert(level.name)
            load = stats.load if unit_of is None else count_by(unit_of.cpu(), stats.load, level.size)
            stats.sums[f"load.{level.name}"] = load
    return stats


def _memory(memory: Memory, layer: MoE, bound: Bound, split: str) -> dict[str, Any]:
    """A metric's memory of a layer between log points; empty if the metric does not ask for it."""
    if "memory" not in bound.arguments:
        return {}
    kept: dict[str, Any] = memory.setdefault(layer.name, {}).setdefault(bound.plugin, {}).setdefault(split, {})
    return kept


def observed(layers: Sequence[MoE], plugins: Plugins, run: Probe) -> tuple[Tensor, dict[MoE, Routing]]:
    """(task loss, routing of each layer) of an uncounted forward. Raises PluginError, naming the plugin."""
    try:
        return observe(layers, run)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if (culprit := plugins.culprit(error)) is None:
            raise
        message = f"{culprit} failed on a held-out batch: {type(error).__name__}: {error}"
        raise PluginError(message, code="plugin-failed") from error


def backward_culprit(layers: Sequence[MoE], plugins: Plugins, run: Probe, error: RuntimeError) -> str | None:
    """The plugin whose loss, router or bank fails in backward with this error; or None.

    run: as for `probed`. A part may hold a graph that is gone: only its backward fails, where none of its code runs, so
    the backward of each is tried again, alone.
    """
    try:
        loss, routings = observe(layers, run)
        tried = [value for layer, routing in routings.items() for value in _differentiated(layer, routing, loss)]
    except Exception:
        return None
    for hook, plugin, value, inputs in tried:
        try:
            if value.requires_grad:
                torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        except RuntimeError as again:
            names = [plugin] if plugin else [bound.plugin for bound in plugins.bind(hook)]
            if str(again) == str(error) and names:
                return f"{plugins.origin(names[0])} in the backward of {hook}"
    return None


def _differentiated(layer: MoE, routing: Routing, loss: Tensor) -> Iterator[tuple[str, str, Tensor, list[Tensor]]]:
    """(hook, its plugin if several may implement it, a value, what it is differentiated by) of one layer."""
    weights: list[Tensor] = [parameter for parameter in layer.all_parameters() if parameter.requires_grad]
    for term, value in layer.aux_terms(routing).items():
        yield "moe_aux_loss", term.partition(".")[0], value, weights
    yield "moe_router", "", routing.plan.weight.sum(), weights
    yield "moe_experts", "", loss, [p for p in layer.experts.parameters() if p.requires_grad]


def probed(layers: Sequence[MoE], plugins: Plugins, run: Probe) -> dict[MoE, tuple[Routing, Effects]]:
    """Routing and effects of each layer on one batch."""
    loss, routings = observed(layers, plugins, run)
    return {layer: (routing, effects_of(layer, routing, loss, len(layers))) for layer, routing in routings.items()}


def check_learning(layers: Sequence[MoE], plugins: Plugins, run: Probe) -> None:
    """Raise UsageError if a router level gets no gradient from the task; if that is allowed, add a remark."""
    found = list(without_gradient(*observed(layers, plugins, run)))
    for layer, why in found:
        if not layer.spec.allow_no_gradient:
            raise UsageError(why, code="router-without-gradient")
    if found:
        advice = "only losses and biases move it; let gates be the raw probabilities, or raise top_k"
        plugins.remarks["learning"] = Finding("no gradient", 2, "; ".join(why for _, why in found), advice)
