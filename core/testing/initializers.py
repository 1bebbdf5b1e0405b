"""Claims about initializers of new experts."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.growth import Growth, NewExpert
from ..contract.traits import traits_of
from ..engine.growing import initializers
from ..engine.measuring import observed
from ..growth.transaction import stage
from .bench import EXPERTS, Bench, Trial, data
from .claims import NotApplicable, claim, demand
from .comparing import demand_close, distance, same_bits


@attrs.frozen(eq=False)
class Birth:
    """One call of moe_new_expert.

    offer: the arguments. before: copies of offer["parent"] and offer["fresh"], made before the call. new: the result.
    """

    offer: Mapping[str, Any]
    before: Mapping[str, Mapping[str, Tensor]]
    new: NewExpert


def _trained(bench: Bench) -> Trial:
    """A layer after a few steps, whose state is no longer at its initial values."""
    trial = bench.trial()
    for _ in range(3):
        trial.step()
    trial.optimizer.zero_grad()
    return trial


def _births(trial: Trial, seed: int = 0, **growth: Any) -> list[Birth]:
    """Stage a growth, which does not change the live layer, and record each call of the initializer.

    seed: seeds torch's global generator, from which an initializer must not draw.
    """
    births: list[Birth] = []
    batch = data().to(next(trial.layer.parameters()).dtype)
    _, routings = observed([trial.layer], trial.engine.plugins, lambda: batch.loss(trial.evaluate(batch)))
    ask_plugin = initializers(trial.engine.plugins, trial.layer, routings[trial.layer])

    def ask(of: str, origin: int | None, offer: Mapping[str, Any]) -> tuple[str, NewExpert]:
        before = {key: _copy(offer[key]) for key in ("parent", "fresh")}
        initializer, new = ask_plugin(of, origin, offer)
        births.append(Birth(offer, before, new))
        return initializer, new

    torch.default_generator.manual_seed(seed)
    stage(trial.layer, (), Growth(trial.layer.name, **growth), ask, torch.Generator().manual_seed(0))
    return births


def _copy(rows: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: row.clone() for name, row in (rows or {}).items()}


@claim("moe_new_expert")
def new_expert_is_complete(bench: Bench) -> None:
    """With or without a parent, a new expert has every row, each finite and of the right shape and dtype."""
    growths: list[dict[str, Any]] = [{"parents": (0,)}, {"parents": (None,)}, {"parents": (1,), "drop": (0,)}]
    for dtype in (torch.float32, torch.float64):
        for growth in growths:
            trial = _trained(bench)
            trial.layer.to(dtype)
            for birth in _births(trial, **growth):
                for name, row in (*birth.new.values.items(), *birth.new.parent_values.items()):
                    kept = row.dtype == birth.offer["fresh"][name].dtype
                    demand(
                        kept, f"'{name}' is {row.dtype} in a layer of {dtype}; cast drawn numbers with .to(row.dtype)"
                    )


@claim("moe_new_expert")
def given_rows_are_not_modified(bench: Bench) -> None:
    """The initializer modifies neither the rows that it is given nor the live layer."""
    trial = _trained(bench)
    before = trial.state()
    for birth in _births(trial, parents=(0, 1, None)):
        for key, rows in birth.before.items():
            for name, row in rows.items():
                message = f"{key}['{name}'] was modified in place; write row + d, not row += d"
                demand(same_bits(row, birth.offer[key][name]), message)
    trial.demand_unchanged(before, "while a new expert was made; change nothing but the rows that you return")


@claim("moe_new_expert")
def draws_only_from_its_generator(bench: Bench) -> None:
    """The initializer draws random numbers only from the given generator: equal generators give equal experts."""
    trial = _trained(bench)
    first, second = (
        {
            f"'{name}' of new expert {number}": row
            for number, birth in enumerate(_births(trial, seed, parents=(0, None)))
            for name, row in birth.new.values.items()
        }
        for seed in (1, 2)
    )
    demand_close(first, second, "between two calls with equal generators; pass generator=generator to every draw", 0)


@claim("moe_new_expert")
def siblings_differ(bench: Bench) -> None:
    """Two new experts of one parent differ from each other and from the parent; identical ones would never diverge."""
    trial = _trained(bench)
    first, second = _births(trial, parents=(0, 0))
    parent = {**second.offer["parent"], **second.new.parent_values}
    pairs = (
        (first.new.values, second.new.values, "another new expert of the same parent"),
        (second.new.values, parent, "its parent"),
    )
    for rows, others, whose in pairs:
        gap = max(distance(row, others[name]) for name, row in rows.items())
        demand(gap > 0, f"a new expert is an exact copy of {whose}; add noise that separates them")


def _only_with(bench: Bench, effect: str) -> None:
    if effect not in traits_of(bench.plugin.cls).effects:
        raise NotApplicable(f"its traits do not list the effect '{effect}'")


@claim("moe_new_expert")
def silent_start_outputs_zero(bench: Bench) -> None:
    """With the effect 'silent_start', a new expert's output is 0 for every token, with or without a parent."""
    _only_with(bench, "silent_start")
    trial = _trained(bench)
    for origin in (0, None):
        trial.engine.grow(Growth(trial.layer.name, parents=(origin,)), trial.optimizer)
    with torch.no_grad():
        new_outputs = trial.layer.experts.eval().outputs(data(20).x)[EXPERTS:]
    largest = float(new_outputs.abs().max())
    demand(not largest, f"a new expert outputs values up to {largest:.2g}; start the rows of role 'output' at 0")


@claim("moe_new_expert")
def copies_expert_starts_near_the_parent(bench: Bench) -> None:
    """With the effect 'copies_expert', a new expert's weights are its parent's, apart from noise."""
    _only_with(bench, "copies_expert")
    (birth,) = _births(_trained(bench), parents=(0,))
    parent, new, fresh = (
        torch.cat([rows[name].flatten() for name in sorted(birth.before["parent"]) if name.startswith("experts.")])
        for rows in (birth.before["parent"], birth.new.values, birth.before["fresh"])
    )
    near = float((new - parent).norm()) < float((fresh - parent).norm())
    demand(near, "a new expert is as far from its parent as freshly drawn weights are; start from the parent's rows")


@claim("moe_new_expert")
def copies_router_row_copies_it(bench: Bench) -> None:
    """With the effect 'copies_router_row', a new expert's router row equals its parent's, bit for bit."""
    _only_with(bench, "copies_router_row")
    (birth,) = _births(_trained(bench), parents=(0,))
    parent = {**birth.before["parent"], **birth.new.parent_values}
    for name, role in birth.offer["roles"].items():
        if role == "logit_row":
            equal = same_bits(parent[name], birth.new.values[name])
            demand(equal, f"'{name}' differs from the parent's; return the parent's row, or remove the effect")
