"""Triggers of growth: what they see, and what they want."""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .errors import UsageError
from .growth import Grown, Growth
from .layer import MoE
from .manager import Bound


@attrs.frozen
class History:
    """A run so far, after an optimizer step; the same in every process.

    step: optimizer steps. loss: the task's of this step. eval_loss: of an evaluation since the last
    step, or None. layers: the layers. growths: what has grown, oldest first. asked: the plugin that is asked.
    """

    step: int
    loss: float
    eval_loss: float | None
    layers: Sequence[MoE]
    growths: Sequence[Grown]
    asked: str = ""

    @property
    def since_growth(self) -> int:
        """Steps since anything grew, whichever trigger wanted it, or since the start."""
        return self.step - max((one.step for one in self.growths), default=0)

    def settled(self, cooldown: int) -> bool:
        """Whether more than `cooldown` steps have passed since anything grew, and more than one."""
        return self.since_growth > max(cooldown, 1)

    def load(self, layer: MoE) -> Tensor:
        """[E]: assignments of real tokens to each expert since the layer grew last, over all processes."""
        return torch.zeros(layer.spec.experts) if layer.recent is None else layer.recent

    def state(self, layer: MoE) -> Any:
        """What the asked plugin's own `moe_state` answered for this layer."""
        return layer.parts_of_plugins()[self.asked]

    def busiest(self, layer: MoE) -> int:
        """The expert with the largest load since the layer grew last; 0 where there is no load yet."""
        return int(self.load(layer).argmax())


def lasting(memory: dict[str, float], layer: MoE, holds: bool) -> float:
    """For how many askings in a row something has held of a layer; kept in the trigger's memory by the layer's name."""
    memory[layer.name] = memory.get(layer.name, 0) + 1 if holds else 0
    return memory[layer.name]


def children_of_peaks(trigger: Any, history: History, memory: dict[str, float], what: str) -> list[Growth]:
    """A child for the unit with the largest value in each layer, where that stays above the trigger's threshold.

    trigger: with the options threshold, patience, cooldown and max_experts. Its state in a layer has
    `value` [E], over the mean; what: what that is, for the reason.
    """
    wanted = []
    for layer in history.layers:
        value_E = history.state(layer).value
        ready = history.settled(trigger.cooldown) and layer.spec.experts < trigger.max_experts
        peak, highest = int(value_E.argmax()), float(value_E.max())
        if lasting(memory, layer, ready and highest > trigger.threshold) >= trigger.patience:
            why = f"expert {peak} has {highest:.2f} of the mean {what}"
            wanted.append(Growth(layer.name, parents=(peak,), why=why))
    return wanted


@attrs.define(eq=False)
class Triggers:
    """The chosen triggers and what each remembers. asked: the step for which they were asked last."""

    bounds: Sequence[Bound]
    memory: dict[str, dict[str, float]] = attrs.field(factory=dict)
    asked: int = 0

    def ask(self, history: History) -> list[Growth]:
        """What the first of them that wants something wants; nothing twice for one step, as after a skipped one."""
        fine = all(loss is None or math.isfinite(loss) for loss in (history.loss, history.eval_loss))
        if self.asked == history.step or not fine:
            return []
        self.asked = history.step
        answers = [self._answer(bound, history) for bound in self.bounds]  # each keeps its account of every step
        return next((several for several in answers if several), [])

    def _answer(self, bound: Bound, history: History) -> list[Growth]:
        name, memory = bound.plugin, self.memory.setdefault(bound.plugin, {})
        answer = bound({"history": attrs.evolve(history, asked=name), "memory": memory})
        several = [] if answer is None else list(answer) if isinstance(answer, list | tuple) else [answer]
        if not all(isinstance(one, Growth) for one in several):
            raise UsageError(f"moe_growth of '{name}' answers {answer!r}, not a Growth, several, or None")
        for key, value in memory.items():
            if not isinstance(value, int | float | str | None):
                raise UsageError(f"trigger '{name}' remembers {value!r} as '{key}', which is no number")
        return [attrs.evolve(one, why=f"{name}: {one.why}" if one.why else name) for one in several]
