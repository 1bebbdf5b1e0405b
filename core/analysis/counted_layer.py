"""A layer of which only the decisions are known: a foreign block, a recorded layer, or counts."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.parts import Experts, Part, Router
from ..contract.routing import Routing, Spec
from ..contract.setup import Bound
from ..contract.stats import Finding, Metrics, Stats, Unmeasured, merge_metrics
from ..layer.sums import measured, sums_of
from ..registry.manager import Plugins

NO_DATA = Finding("no data", 1, "no real token has come through since the last call", "run the model, then ask again")


class NotRecorded(Exception):
    """A plugin asked for a part of the layer that is not recorded."""


class CountedLayer:
    """Stands in for an MoE layer of which only the decisions are known: metrics can read its `name` and `spec`.

    spec: only dim, hidden, experts, top_k and causal are known. A plugin that asks for more (the router, the experts'
    weights, its state) is left out and listed in `unanswered`.
    """

    def __init__(self, plugins: Plugins, name: str, spec: Spec) -> None:
        self.name, self.spec, self.training = name, spec, False
        self._measures, self._metrics = plugins.bind("moe_measure"), plugins.bind("moe_metrics")
        self._memory: dict[str, dict[str, Any]] = {bound.plugin: {} for bound in self._metrics}
        # plugins that need something unknown here: those with a state, and those that turn out to ask for more
        self._unanswered = {bound.plugin for bound in plugins.bind("moe_state")}
        self._sums: dict[str, Tensor] = {}

    # -- what plugins may use of a layer -----------------------------------------------------------

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
        """None, because no plugin has a state here."""

    def step_load(self, routing: Routing) -> Tensor:
        return routing.load

    def _not_recorded(self, what: str) -> NotRecorded:
        return NotRecorded(f"only the decisions of layer '{self.name}' are known, not its {what}")

    # -- counting ----------------------------------------------------------------------------------

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add one forward's decision."""
        sums = sums_of(routing)
        for bound in self._answering(self._measures):
            try:
                sums |= measured(routing, [bound], self)
            except NotRecorded:
                self._unanswered.add(bound.plugin)
        self.add(sums)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add sums of some forwards by name: tokens, load, dropped, and whatever else was measured."""
        for name, value in sums.items():
            wide = value.to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def metrics(self) -> Metrics:
        """All metrics since the last call; without a real token only the verdict "no data"."""
        stats, self._sums = Stats(self.spec, self._sums), {}
        if "tokens" not in stats.sums or not stats.tokens:
            return {"verdict": NO_DATA}
        stats.sums["load.expert"] = stats.load
        answers = []
        for bound in self._answering(self._metrics):
            offer = {"stats": stats, "layer": self, "effects": None, "probe": None}
            try:
                answers.append((bound.plugin, bound({**offer, "memory": self._memory[bound.plugin]})))
            except NotRecorded:
                self._unanswered.add(bound.plugin)
            except Unmeasured:
                if stats.of(bound.plugin):
                    raise
                self._unanswered.add(bound.plugin)  # only counts were added, so its own measure never ran
        return merge_metrics(answers)

    @property
    def unanswered(self) -> list[str]:
        """The plugins that asked for something unknown here, whose metrics are therefore missing."""
        return sorted(self._unanswered)

    def _answering(self, bounds: tuple[Bound, ...]) -> list[Bound]:
        return [bound for bound in bounds if bound.plugin not in self._unanswered]
