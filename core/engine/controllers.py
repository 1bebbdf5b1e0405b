"""After an optimizer step: update a layer's biases and states from the step's sums."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..contract.numerics import count_by
from ..contract.stats import Step
from ..layer.moe import MoE
from ..layer.sums import numel, unflat


def apply_controllers(layer: MoE, flat: Tensor, with_load: bool) -> None:
    """Update one layer's biases and states from the sums of a step, as `LayerSums.take_step` returns them.

    with_load: also accumulate the load since the layer last grew.
    """
    sums = layer.sums
    raw = unflat(flat, sums.step_layout)
    sums.last_terms = {name.removeprefix("loss."): v for name, v in raw.items() if name.startswith("loss.")}
    flat = torch.where(flat.isfinite().all(), flat, 0)  # nothing that is not finite reaches a state
    sums.add_step(flat[: numel(sums.step_layout)], with_load)
    named, signals = unflat(flat, sums.step_layout), sums.signals(flat)
    states, levels = layer.parts_of_plugins(), layer.bias_levels()
    acting = [*(bias for level in levels for bias in level.values()), *states.values()]
    grad_E = _expert_grad(layer) if any(part.wants_expert_grad for part in acting) else None
    for index, (level, biases) in enumerate(zip(layer.router.levels, levels, strict=True)):
        for plugin, bias in biases.items():
            measured = _named(named, f"{level.name}/{plugin}/")
            bias.after_step(_step_at(layer, level.name, named["load"], measured, signals.get((index, plugin)), grad_E))
    for plugin, state in states.items():
        state.after_step(Step(named["load"], _named(named, f"{plugin}."), expert_grad=grad_E))


def _named(sums: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}


def _expert_grad(layer: MoE) -> Tensor:
    learning = [parameter for parameter in layer.experts.parameters() if parameter.requires_grad]
    if learning and all(parameter.grad is None for parameter in learning):
        raise RuntimeError("a bias needs the experts' gradients: call engine.after_step() before optimizer.zero_grad()")
    grad_E = layer.experts.expert_grad()
    return torch.where(grad_E.isfinite().all(), grad_E, 0)


def _step_at(
    layer: MoE,
    level: str,
    load_E: Tensor,
    measured: Mapping[str, Tensor],
    signal_n: Tensor | None,
    grad_E: Tensor | None,
) -> Step:
    """The step as a bias of this level sees it."""
    unit_of, competes_in = layer.router.unit_of_expert(level), layer.router.competes_in(level)
    if unit_of is None:
        return Step(load_E, measured, signal_n, grad_E, competes_in)
    size = next(spec.size for spec in layer.router.levels if spec.name == level)
    sizes = count_by(unit_of, torch.ones_like(load_E), size).clamp(min=1)
    grad_n = None if grad_E is None else count_by(unit_of, grad_E, size) / sizes
    return Step(count_by(unit_of, load_E, size), measured, signal_n, grad_n, competes_in)
