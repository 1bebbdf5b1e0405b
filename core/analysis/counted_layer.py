"""A layer of which only the decisions are seen: somebody else's, or one that was recorded."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.parts import Experts, Part, Router
from ..contract.routing import Routing, Spec
from ..contract.setup import Bound
from ..contract.stats import Finding, Metrics, Stats, Unmeasured, merged
from ..layer.moe import measured, sums_of
from ..registry.manager import Plugins

NO_DATA = Finding("no data", 1, "no real token has come through since the last look", "run the model, then ask again")


class NotRecorded(Exception):
    """A metric asked for a part of a layer of which only the decisions are seen."""


class CountedLayer:
    """What stands for a MoE layer where there is none: metrics find its `name` and its `spec`.

    spec: of which dim, hidden, experts, top_k and causal are known. A plugin that asks for more (the
    router, the experts' weights, a state of its own) measures and answers nothing.
    """

    def __init__(self, plugins: Plugins, name: str, spec: Spec) -> None:
        self.name, self.spec = name, spec
        self._measures, self._metrics = plugins.bind("moe_measure"), plugins.bind("moe_metrics")
        self._memory: dict[str, dict[str, Any]] = {bound.plugin: {} for bound in self._metrics}
        # plugins that need what is not seen: a state, or what they will ask for
        self._unanswered = {bound.plugin for bound in plugins.bind("moe_state")}
        self._sums: dict[str, Tensor] = {}

    @property
    def router(self) -> Router:
        raise self._not_recorded("router")

    @property
    def experts(self) -> Experts:
        raise self._not_recorded("experts")

    @property
    def load_since_growth(self) -> Tensor | None:
        return None

    def parts(self) -> Iterator[tuple[str, Part]]:
        return iter(())

    def state_of(self, plugin: str) -> None:
        """No plugin has a state here."""

    def step_load(self, routing: Routing) -> Tensor:
        return routing.load

    def _not_recorded(self, what: str) -> NotRecorded:
        return NotRecorded(f"of layer '{self.name}' only the decisions are known, not its {what}")

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add one forward's decision."""
        sums = sums_of(routing)
        for bound in self._seeing(self._measures):
            try:
                sums |= measured(routing, [bound], self)
            except NotRecorded:
                self._unanswered.add(bound.plugin)
        self.add(sums)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add what was counted of some forwards: tokens, load, dropped, and what there is beside."""
        for name, value in sums.items():
            wide = value.to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def metrics(self) -> Metrics:
        """What every metric says since the last call; without a real token the verdict is "no data"."""
        stats, self._sums = Stats(self.spec, self._sums), {}
        if "tokens" not in stats.sums or not stats.tokens:
            return {"verdict": NO_DATA}
        stats.sums["load.expert"] = stats.load
        answers = []
        for bound in self._seeing(self._metrics):
            offer = {"stats": stats, "layer": self, "effects": None, "probe": None}
            try:
                answers.append((bound.plugin, bound({**offer, "memory": self._memory[bound.plugin]})))
            except NotRecorded:
                self._unanswered.add(bound.plugin)
            except Unmeasured:  # only counts were added, and nothing measured
                if stats.of(bound.plugin):
                    raise
                self._unanswered.add(bound.plugin)
        return merged(answers)

    @property
    def unanswered(self) -> list[str]:
        """The plugins that asked for what is not seen, and so say nothing."""
        return sorted(self._unanswered)

    def _seeing(self, bounds: tuple[Bound, ...]) -> list[Bound]:
        return [bound for bound in bounds if bound.plugin not in self._unanswered]
