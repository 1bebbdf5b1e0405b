"""Triggers of growth: what they see, and what they want."""

import math
from collections.abc import Sequence

import attrs

from ..contract.growth import Growth
from ..contract.history import History
from ..contract.setup import Bound
from ..errors import UsageError


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
