"""What growth triggers see of a run, and helpers that they share."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .growth import Grown, Growth
from .protocols import Layer


@attrs.frozen
class History:
    """A run so far, after an optimizer step; the same in every process.

    step: optimizer steps so far. loss: the task loss of this step. eval_loss: the loss of an evaluation since the
    last step, or None. growths: all growths, oldest first. asked: the plugin being asked. watching: the plugins that
    have read eval_loss, so that a loop without evaluations can name them.
    """

    step: int
    loss: float
    _eval_loss: float | None
    layers: Sequence[Layer]
    growths: Sequence[Grown]
    asked: str = ""
    watching: set[str] = attrs.field(factory=set, repr=False)

    @property
    def eval_loss(self) -> float | None:
        """The loss of an evaluation since the last step, or None."""
        self.watching.add(self.asked)
        return self._eval_loss

    @property
    def since_growth(self) -> int:
        """Steps since the last growth, whichever trigger caused it, or since the start."""
        return self.step - max((one.step for one in self.growths), default=0)

    def cooled_down(self, cooldown: int) -> bool:
        """Whether more than `cooldown` steps, and more than one, have passed since the last growth."""
        return self.since_growth > max(cooldown, 1)

    def load(self, layer: Layer) -> Tensor:
        """[E]: assignments of real tokens to each expert since the layer last grew, over all processes."""
        return torch.zeros(layer.spec.experts) if layer.load_since_growth is None else layer.load_since_growth

    def state(self, layer: Layer) -> Any:
        """The asked plugin's state in this layer: what its `moe_state` returned."""
        return layer.state_of(self.asked)

    def busiest(self, layer: Layer) -> int:
        """The expert with the largest load since the layer last grew; 0 if there is no load yet."""
        return int(self.load(layer).argmax())


def consecutive(memory: dict[str, float], layer: Layer, holds: bool) -> float:
    """The number of calls in a row for which a condition has held; counted in the trigger's memory by layer name."""
    memory[layer.name] = memory.get(layer.name, 0) + 1 if holds else 0
    return memory[layer.name]


def least_experts(layer: Layer, value_E: Tensor, keep: int) -> list[int]:
    """The experts to remove so that `keep` remain, least value [E] first; at least as many remain as a token chooses.

    Where experts compete in groups, each group keeps as many as a token chooses in it.
    """
    within, levels = layer.router.competes_in("expert"), layer.router.levels
    group_E = [0] * len(value_E) if within is None else within.tolist()
    least = layer.spec.top_k if within is None else levels[-1].top_k
    dropped: list[int] = []
    for expert in value_E.argsort(stable=True).tolist():
        left = [group for other, group in enumerate(group_E) if other not in dropped]
        if len(left) > keep and left.count(group_E[expert]) > least:
            dropped.append(expert)
    return dropped


def grow_at_peaks(trigger: Any, history: History, memory: dict[str, float], what: str) -> list[Growth]:
    """Grow each layer at the expert with the largest value, once that has stayed above the trigger's threshold.

    trigger: needs the options threshold, patience, cooldown and max_experts, and a state whose `value` [E] is
    relative to the mean. what: a name for that value, for the reason in the report.
    """
    wanted = []
    for layer in history.layers:
        value_E = history.state(layer).value
        ready = history.cooled_down(trigger.cooldown) and layer.spec.experts < trigger.max_experts
        peak, highest = int(value_E.argmax()), float(value_E.max())
        if consecutive(memory, layer, ready and highest > trigger.threshold) >= trigger.patience:
            why = f"expert {peak} has {highest:.2f} of the mean {what}"
            wanted.append(Growth(layer.name, parents=(peak,), why=why))
    return wanted
