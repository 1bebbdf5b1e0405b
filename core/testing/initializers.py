"""Claims about initializers of new experts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.growth import Growth, NewExpert
from ..engine.growing import initializers
from ..engine.measuring import observed
from ..growth.transaction import stage
from .bench import Bench, Rig, data
from .claims import claim, demand
from .comparing import agree, distance, same_bits


def _trained(bench: Bench) -> Rig:
    """A layer after a few steps, whose states are not what they began as."""
    rig = bench.rig()
    for _ in range(3):
        rig.step()
    rig.optimizer.zero_grad()
    return rig


def _born(rig: Rig, chance: int = 0, **growth: Any) -> list[tuple[dict[str, Any], NewExpert]]:
    """What the initializer is given and answers when experts are born, beside the live layer, which stays.

    chance: what every draw without a generator is seeded by.
    """
    answers: list[tuple[dict[str, Any], NewExpert]] = []
    batch = data().to(next(rig.layer.parameters()).dtype)
    _, routings = observed([rig.layer], rig.engine.plugins, lambda: batch.loss(rig.evaluate(batch)))
    asked = initializers(rig.engine.plugins, rig.layer, routings[rig.layer])

    def ask(of: str, origin: int | None, offer: Mapping[str, Any]) -> tuple[str, NewExpert]:
        before = {key: _copy(offer[key]) for key in ("parent", "fresh")}
        initializer, new = asked(of, origin, offer)
        answers.append(({**offer, "before": before}, new))
        return initializer, new

    torch.manual_seed(chance)
    stage(rig.layer, (), Growth(rig.layer.name, **growth), ask, torch.Generator().manual_seed(0))
    return answers


def _copy(rows: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: row.clone() for name, row in (rows or {}).items()}


@claim("moe_new_expert")
def newcomers_fit(bench: Bench) -> None:
    """A newcomer has every row, finite, of the right shape and precision, with a parent and without."""
    growths: list[dict[str, Any]] = [{"parents": (0,)}, {"parents": (None,)}, {"parents": (1,), "drop": (0,)}]
    for dtype in (torch.float32, torch.float64):
        for growth in growths:
            rig = _trained(bench)
            rig.layer.to(dtype)
            for offer, new in _born(rig, **growth):
                for name, row in (*new.values.items(), *new.parent_values.items()):
                    kept = row.dtype == offer["fresh"][name].dtype
                    demand(kept, f"'{name}' is {row.dtype} in a layer of {dtype}; what is drawn goes .to(row.dtype)")


@claim("moe_new_expert")
def given_rows_stay(bench: Bench) -> None:
    """The rows that it is given are not changed in place, nor is the live layer."""
    rig = _trained(bench)
    before = rig.state()
    for offer, _ in _born(rig, parents=(0, 1, None)):
        for key, rows in offer["before"].items():
            for name, row in rows.items():
                why = f"{key}['{name}'] is not what it was; write row + d and not row += d"
                demand(same_bits(row, offer[key][name]), why)
    rig.demand_still(before, "while a newcomer was made; change nothing but what is answered")


@claim("moe_new_expert")
def draws_from_its_generator(bench: Bench) -> None:
    """It draws from the generator that it is given and from nothing else: the same one gives the same newcomer."""
    rig = _trained(bench)
    one, other = (
        {f"'{name}' of newcomer {n}": row for n, (_, new) in enumerate(answers) for name, row in new.values.items()}
        for answers in (_born(rig, chance, parents=(0, None)) for chance in (1, 2))
    )
    agree(one, other, "the generator was the same; pass generator=generator to every draw", 0)


@claim("moe_new_expert")
def siblings_are_no_twins(bench: Bench) -> None:
    """Two newcomers of one parent differ from each other and from it, or the three would learn alike for ever."""
    rig = _trained(bench)
    (_, one), (offer, other) = _born(rig, parents=(0, 0))
    parent = {**offer["parent"], **other.parent_values}
    for mine, its, whom in ((one.values, other.values, "another newcomer"), (other.values, parent, "its parent")):
        gap = max(distance(row, its[name]) for name, row in mine.items())
        demand(gap > 0, f"a newcomer is the very copy of {whom}; draw something that parts them")
