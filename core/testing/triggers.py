"""Claims about triggers of growth."""

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import attrs

from ..errors import UsageError
from ..growth import Growth
from ..options import options_of
from .bench import EXPERTS, Bench, Rig, data
from .biases import balanced, skewed
from .claims import NotApplicable, claim, demand

STEPS = 240


def _live(rig: Rig, start: int = 0, stop: int = STEPS, strict: bool = False) -> Iterator[list[Growth]]:
    """What a trigger wants after each step of a life in which much happens.

    The loss falls, then is flat, then falls again from a jump; the load is balanced, then collapsed, then the
    router's own. There is an evaluation every tenth step. strict: a wish that can't be granted raises.
    """
    for number in range(start, stop):
        make = (balanced, skewed, None)[3 * number // STEPS]
        if make is not None and rig.layer.router.levels:
            rig.give_logits(*rig.logits(make))
        rig.step(seed=number)
        rig.own_logits()
        loss = 1 + math.exp(-number / 20) if number < 2 * STEPS // 3 else 2 * math.exp(-(number - STEPS) / 40)
        wanted = rig.engine.due(loss, loss if number % 10 == 0 else None)
        yield wanted
        for growth in wanted:
            rig.optimizer.zero_grad()
            with suppress(() if strict else UsageError):
                rig.engine.grow(growth, rig.optimizer)


def _said(wanted: list[Growth]) -> list[dict[str, Any]]:
    return [attrs.asdict(one) for one in wanted]


@claim("moe_growth")
def wishes_can_be_granted(bench: Bench) -> str | None:
    """What it wants in a life of 240 steps is a Growth, several or None, and can be done."""
    rig = bench.rig()
    count = 0
    for wanted in _live(rig, strict=True):
        count += len(wanted)
        for growth in wanted:
            demand(growth.layer == rig.layer.name, f"it wants to grow '{growth.layer}', which is no layer; use layer.name")
    return None if count else f"it wanted nothing in {STEPS} steps"


@claim("moe_growth")
def same_history_same_wishes(bench: Bench) -> None:
    """The same history gives the same answers, whatever another engine with it has seen."""
    first = [_said(wanted) for wanted in _live(bench.rig())]
    second = [_said(wanted) for wanted in _live(bench.rig())]
    advice = "keep what it remembers in memory, which is each run's own, not on the plugin"
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        demand(one == other, f"at step {step + 1} it wanted {one} and then {other}; {advice}")


@claim("moe_growth")
def resumed_run_decides_alike(bench: Bench) -> None:
    """A run that was saved and resumed decides as if it had never stopped."""
    cut = STEPS // 2 - 7
    whole, rest = bench.rig(), bench.rig(seed=1)
    for _ in _live(whole, 0, cut):
        pass
    rest.layer.load_state_dict(copy.deepcopy(whole.layer.state_dict()))
    rest.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    rest.engine.load_state_dict(copy.deepcopy(whole.engine.state_dict()))
    advice = "keep what it remembers in memory or in a state Part, which are saved"
    for step, (one, other) in enumerate(zip(_live(whole, cut), _live(rest, cut), strict=True)):
        why = f"{step + 1} steps after the checkpoint it wants {_said(other)}, not {_said(one)}; {advice}"
        demand(_said(one) == _said(other), why)


@claim("moe_growth")
def limit_is_kept(bench: Bench) -> str | None:
    """It lets no layer grow above its option `max_experts`."""
    if "max_experts" not in options_of(bench.subject.cls):
        raise NotApplicable("it has no option 'max_experts'")
    rig = bench.rig(settings={"max_experts": EXPERTS + 1})
    for _ in _live(rig):
        now = rig.layer.spec.experts
        demand(now <= EXPERTS + 1, f"with max_experts={EXPERTS + 1} the layer has {now} experts; count those to come too")
    return None if rig.layer.spec.experts > EXPERTS else "it wanted none in that time"
