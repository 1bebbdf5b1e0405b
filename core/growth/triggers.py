"""The chosen triggers, called after each step, and the memory that each keeps."""

import math
import warnings
from collections.abc import Callable, Sequence

import attrs

from ..contract.growth import Growth
from ..contract.history import History
from ..contract.setup import Bound
from ..errors import UsageError, listed

MANY_STEPS = 100  # without a question to the triggers


@attrs.define(eq=False)
class Triggers:
    """The chosen triggers. memory: each plugin's memory. asked: the step for which they were last called.

    unasked: the number of steps since then. watching: those that wait for the loss of an evaluation. last: the
    step after which no expert is added. late: receives a sentence about each trigger that asks for one.
    """

    bounds: Sequence[Bound]
    memory: dict[str, dict[str, float]] = attrs.field(factory=dict)
    asked: int = 0
    unasked: int = 0
    watching: set[str] = attrs.field(factory=set)
    last: int | None = None
    late: Callable[[str], None] = lambda sentence: None
    _told: set[str] = attrs.field(init=False, factory=set)

    def count_step(self) -> None:
        """Warn if a loop never asks its triggers."""
        self.unasked += 1
        if self.bounds and self.unasked == MANY_STEPS:
            names = listed(f"'{bound.plugin}'" for bound in self.bounds)
            warnings.warn(
                f"{names} can't make any layer grow: engine.due(loss) was not called for {MANY_STEPS} steps; call it "
                "after each engine.after_step(), and engine.grow for each growth that it returns",
                stacklevel=3,
            )

    def add_until(self, share: float, steps: int, late: Callable[[str], None]) -> None:
        """Add no expert after this share of a run's steps, because too few are left to train it; say so once.

        Experts are still removed and merged, which leaves trained ones.
        """
        self.last = math.floor(share * steps)
        rest = f"but no expert is added after step {self.last} of {steps} (--grow-until)"
        self.late = lambda sentence: late(f"{sentence}, {rest}")

    def ask(self, history: History) -> list[Growth]:
        """The first trigger's growths, if any; none if this step was already asked, as after a skipped step."""
        self.unasked = 0
        finite = all(loss is None or math.isfinite(loss) for loss in (history.loss, history.eval_loss))
        if self.asked == history.step or not finite:
            return []
        self.asked = history.step
        wanted = [self._growths(bound, history) for bound in self.bounds]  # call all: each counts every step
        growths = next((growths for growths in wanted if growths), [])
        if self.last is None or history.step <= self.last:
            return growths
        for growth in growths:
            trigger = growth.why.partition(":")[0]
            if _adds(growth) and trigger not in self._told:
                self._told.add(trigger)
                self.late(f"step {history.step}: {trigger} asked for a growth of {growth.layer}")
        return [growth for growth in growths if not _adds(growth)]

    def _growths(self, bound: Bound, history: History) -> list[Growth]:
        name, memory = bound.plugin, self.memory.setdefault(bound.plugin, {})
        answer = bound({"history": attrs.evolve(history, asked=name, watching=self.watching), "memory": memory})
        growths = [] if answer is None else list(answer) if isinstance(answer, list | tuple) else [answer]
        if not all(isinstance(growth, Growth) for growth in growths):
            message = f"moe_growth of '{name}' returned {answer!r}, not a Growth, a list of them, or None"
            raise UsageError(message, code="growth-not-a-growth")
        for key, value in memory.items():
            if not isinstance(value, int | float | str | None):
                message = f"trigger '{name}' keeps {value!r} as '{key}' in its memory, which is not a number"
                raise UsageError(message, code="memory-not-a-number")
        return [attrs.evolve(growth, why=f"{name}: {growth.why}" if growth.why else name) for growth in growths]


def _adds(growth: Growth) -> bool:
    """Whether a growth adds an expert that is not merged from others."""
    return any(not isinstance(parent, tuple) for parent in growth.parents)
