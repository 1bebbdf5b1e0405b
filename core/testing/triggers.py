"""Claims about growth triggers."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from ..contract.growth import Growth
from ..contract.options import options_of
from ..contract.stats import plain
from ..contract.traits import traits_of
from ..errors import UsageError
from .bench import EXPERTS, Bench, Trial
from .biases import balanced, skewed
from .claims import NotApplicable, claim, demand

STEPS = 240
SAVED_AT = STEPS // 2 - 7  # the step at which a run is saved and resumed


@attrs.define(eq=False)
class SimulatedRun:
    """A run with a trigger. requests: its growth requests after each step. refused: why some were refused."""

    trial: Trial
    requests: list[list[Growth]] = attrs.field(factory=list)
    refused: list[str] = attrs.field(factory=list)

    def run_until(self, steps: int) -> "SimulatedRun":
        """Continue to this step.

        The loss falls, stays flat, jumps and falls again; the load is balanced, then collapsed, then all logits are
        equal. Every tenth step there is an evaluation.
        """
        trial = self.trial
        for number in range(trial.engine.step, steps):
            if trial.layer.router.levels:
                trial.set_logits(*trial.logits((balanced, skewed, torch.zeros)[3 * number // STEPS]))
            trial.step(seed=number)
            trial.reset_logits()
            late = number >= 2 * STEPS // 3
            loss = 2 * math.exp(-(number - 2 * STEPS // 3) / 40) if late else 1 + math.exp(-number / 20)
            self.requests.append(trial.engine.due(loss, loss if number % 10 == 0 else None))
            for growth in self.requests[-1]:
                self._grow(growth)
        return self

    def _grow(self, growth: Growth) -> None:
        self.trial.optimizer.zero_grad()
        try:
            self.trial.engine.grow(growth, self.trial.optimizer)
        except UsageError as error:
            self.refused.append(str(error))

    def comparable(self, since: int = 0) -> list[list[dict[str, Any]]]:
        """The requests from a step on, as plain data."""
        return [[plain(attrs.asdict(growth)) for growth in growths] for growths in self.requests[since:]]


@attrs.frozen(eq=False)
class ReferenceRun:
    """A run that several claims share, and the state it was saved with at SAVED_AT."""

    run: SimulatedRun
    states: Mapping[str, Any]


def _reference(bench: Bench) -> ReferenceRun:
    if bench.plugin.reference_run is None:
        run = SimulatedRun(bench.trial()).run_until(SAVED_AT)
        parts = ("layer", "optimizer", "engine")
        states = {part: copy.deepcopy(getattr(run.trial, part).state_dict()) for part in parts}
        bench.plugin.reference_run = ReferenceRun(run.run_until(STEPS), states)
    reference: ReferenceRun = bench.plugin.reference_run
    return reference


@claim("moe_growth")
def requested_growth_is_possible(bench: Bench) -> str | None:
    """In a run of 240 steps the trigger returns a Growth, a list of them or None, and each can be carried out."""
    run = _reference(bench).run
    demand(not run.refused, "; ".join(run.refused[:1]))
    return None if any(run.requests) else f"it asked for no growth in {STEPS} steps"


@claim("moe_growth")
def orphans_are_declared(bench: Bench) -> None:
    """The trigger asks for experts without a parent if and only if its trait `orphans` is true."""
    declared = traits_of(bench.plugin.cls).orphans
    parents = [parent for growths in _reference(bench).run.requests for growth in growths for parent in growth.parents]
    if not parents:
        raise NotApplicable(f"it asked for no new expert in {STEPS} steps")
    asked = None in parents
    demand(declared or not asked, "it asks for an expert without a parent; declare traits = Traits(orphans=True)")
    demand(asked or not declared, "it declares Traits(orphans=True), but every new expert has a parent; remove it")


@claim("moe_growth")
def same_history_gives_same_growth(bench: Bench) -> None:
    """The same history gives the same requests, even if another engine has used the same plugin."""
    first, second = _reference(bench).run.comparable(), SimulatedRun(bench.trial()).run_until(STEPS).comparable()
    advice = "keep state in `memory`, which each run has for itself, not on the plugin"
    _demand_equal(first, second, 0, f"in a second run with the same history; {advice}")


@claim("moe_growth")
def resumed_run_grows_alike(bench: Bench) -> None:
    """A resumed run asks for the same growth as an uninterrupted one."""
    reference, trial = _reference(bench), bench.trial(seed=1)
    for part, state in reference.states.items():
        getattr(trial, part).load_state_dict(copy.deepcopy(state))
    resumed = SimulatedRun(trial).run_until(STEPS).comparable()
    advice = "keep state in `memory` or in a Part from moe_state; both are saved"
    _demand_equal(reference.run.comparable(SAVED_AT), resumed, SAVED_AT, f"in a resumed run; {advice}")


def _demand_equal(first: list[Any], second: list[Any], start: int, message: str) -> None:
    for number, (expected, found) in enumerate(zip(first, second, strict=True)):
        seen = f"after step {start + number + 1} it asks for {found or 'nothing'}, not {expected or 'nothing'}"
        demand(expected == found, f"{seen}, {message}")


@claim("moe_growth")
def max_experts_is_respected(bench: Bench) -> str | None:
    """The trigger does not grow a layer beyond its option `max_experts`."""
    if "max_experts" not in options_of(bench.plugin.cls):
        raise NotApplicable("it has no option 'max_experts'")
    trial = bench.trial(options={"max_experts": EXPERTS + 1})
    SimulatedRun(trial).run_until(STEPS)
    now = trial.layer.spec.experts
    message = f"with max_experts={EXPERTS + 1} the layer has {now} experts; count the requested experts too"
    demand(now <= EXPERTS + 1, message)
    return None if now > EXPERTS else f"it asked for no growth in {STEPS} steps"
