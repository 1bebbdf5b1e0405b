"""Growth at fixed steps."""

import attrs

from moe_engine import Growth, hookimpl, option


@attrs.define(eq=False)
class Schedule:
    """Every layer grows by `count` experts at fixed steps: at each of `at`, or else after every `every` steps.

    A newcomer descends from the expert with the largest load since the layer last grew.

    Source: kennycason/srnn, 2025 (one expert after about 7,000 images).
    """

    every: int = option(100, help="steps between two growths, where `at` names none", min=1)
    at: tuple[int, ...] = option((), help="the steps at which to grow, say 1000,2000")
    count: int = option(1, help="experts added to a layer each time", min=1)
    max_experts: int = option(16, help="a layer stops at this many experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        if others := setup.others(self, hook="moe_growth"):
            return f"schedule grows at its steps whatever {others[0]} has just done; choose one of them"
        return None

    @hookimpl
    def moe_growth(self, history):
        due = history.step in self.at if self.at else history.step % self.every == 0
        if not due:
            return None
        return [
            Growth(layer.name, parents=(history.busiest(layer),) * count, why=f"step {history.step}")
            for layer in history.layers
            if (count := min(self.count, self.max_experts - layer.spec.experts)) > 0
        ]
