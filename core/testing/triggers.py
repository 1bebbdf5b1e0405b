"""Claims about triggers of growth."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from ..contract.growth import Growth
from ..contract.options import options_of
from ..contract.stats import plain
from ..errors import UsageError
from .bench import EXPERTS, Bench, Rig
from .biases import balanced, skewed
from .claims import NotApplicable, claim, demand

STEPS = 240
CUT = STEPS // 2 - 7  # where a run is stopped and resumed


@attrs.define(eq=False)
class Life:
    """What a trigger wanted in a run: wishes: after each step. refused: those that could not be granted, and why."""

    rig: Rig
    wishes: list[list[Growth]] = attrs.field(factory=list)
    refused: list[str] = attrs.field(factory=list)

    def go_on(self, steps: int) -> "Life":
        """Live on to this step.

        The loss falls, is flat, and jumps and falls again; the load is balanced, then collapsed, then the logits are
        all the same. There is an evaluation every tenth step.
        """
        rig = self.rig
        for number in range(rig.engine.step, steps):
            if rig.layer.router.levels:
                rig.give_logits(*rig.logits((balanced, skewed, torch.zeros)[3 * number // STEPS]))
            rig.step(seed=number)
            rig.own_logits()
            late = number >= 2 * STEPS // 3
            loss = 2 * math.exp(-(number - 2 * STEPS // 3) / 40) if late else 1 + math.exp(-number / 20)
            self.wishes.append(rig.engine.due(loss, loss if number % 10 == 0 else None))
            for growth in self.wishes[-1]:
                self._grant(growth)
        return self

    def _grant(self, growth: Growth) -> None:
        self.rig.optimizer.zero_grad()
        try:
            self.rig.engine.grow(growth, self.rig.optimizer)
        except UsageError as error:
            self.refused.append(str(error))

    def told(self, since: int = 0) -> list[list[dict[str, Any]]]:
        """The wishes from a step on, to be compared."""
        return [[plain(attrs.asdict(one)) for one in several] for several in self.wishes[since:]]


@attrs.frozen(eq=False)
class First:
    """A life that several claims look at, and its state at the cut."""

    life: Life
    states: Mapping[str, Any]


def _first(bench: Bench) -> First:
    if bench.subject.first_life is None:
        life = Life(bench.rig()).go_on(CUT)
        parts = ("layer", "optimizer", "engine")
        states = {part: copy.deepcopy(getattr(life.rig, part).state_dict()) for part in parts}
        bench.subject.first_life = First(life.go_on(STEPS), states)
    first: First = bench.subject.first_life
    return first


@claim("moe_growth")
def wishes_can_be_granted(bench: Bench) -> str | None:
    """What it wants in a life of 240 steps is a Growth, several or None, and can be done."""
    life = _first(bench).life
    demand(not life.refused, "; ".join(life.refused[:1]))
    return None if any(life.wishes) else f"it wanted nothing in {STEPS} steps"


@claim("moe_growth")
def same_history_same_wishes(bench: Bench) -> None:
    """The same history gives the same answers, whatever another engine with it has seen."""
    one, other = _first(bench).life.told(), Life(bench.rig()).go_on(STEPS).told()
    _demand_same(one, other, 0, "keep what it remembers in memory, which is each run's own, not on the plugin")


@claim("moe_growth")
def resumed_run_decides_alike(bench: Bench) -> None:
    """A run that was saved and resumed decides as if it had never stopped."""
    first, rig = _first(bench), bench.rig(seed=1)
    for part, state in first.states.items():
        getattr(rig, part).load_state_dict(copy.deepcopy(state))
    resumed = Life(rig).go_on(STEPS).told()
    _demand_same(
        first.life.told(CUT), resumed, CUT, "keep what it remembers in memory or in a state Part, which are saved"
    )


def _demand_same(one: list[Any], other: list[Any], start: int, advice: str) -> None:
    for number, (mine, its) in enumerate(zip(one, other, strict=True)):
        demand(
            mine == its, f"at step {start + number + 1} it wants {its or 'nothing'}, not {mine or 'nothing'}; {advice}"
        )


@claim("moe_growth")
def limit_is_kept(bench: Bench) -> str | None:
    """It lets no layer grow above its option `max_experts`."""
    if "max_experts" not in options_of(bench.subject.cls):
        raise NotApplicable("it has no option 'max_experts'")
    rig = bench.rig(options={"max_experts": EXPERTS + 1})
    Life(rig).go_on(STEPS)
    now = rig.layer.spec.experts
    demand(now <= EXPERTS + 1, f"with max_experts={EXPERTS + 1} the layer has {now} experts; count those to come too")
    return None if now > EXPERTS else "it wanted none in that time"
