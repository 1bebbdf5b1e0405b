import attrs

from moe_engine import Growth, hookimpl, option


@attrs.define(eq=False)
class Schedule:
    """Grow every layer at fixed steps.

    Each layer grows by `count` experts at each step of `at`, or else after every `every` steps. The parent is the
    busiest expert since the layer's last growth.

    Source: kennycason/srnn, 2025 (one expert after about 7,000 images).
    """

    every: int = option(100, help="steps between two growths, if `at` is empty", min=1)
    at: tuple[int, ...] = option((), help="steps at which to grow, as in 1000,2000")
    count: int = option(1, help="experts added to each layer each time", min=1)
    max_experts: int = option(16, help="a layer stops growing at this many experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        if others := setup.others(self, hook="moe_growth"):
            return f"schedule grows at fixed steps, regardless of {others[0]}; remove one of them"
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
