"""Plans: the origin and the position of each unit in a growth, experts of a growing group included."""

import math
from collections.abc import Mapping, Sequence

import attrs

from ..contract.growth import Growth, Parent, Plan
from ..errors import UsageError, listed
from ..layer.moe import MoE


def plans_of(layer: MoE, growth: Growth) -> dict[str, Plan]:
    """The plan of each population that a growth changes. Raises UsageError for an impossible growth."""
    if growth.of not in layer.sizes:
        message = f"layer '{layer.name}' has no '{growth.of}' that could grow; it has {listed(layer.sizes)}"
        raise UsageError(message, code="unknown-population")
    plan = _plan(layer.name, growth.of, layer.sizes[growth.of], growth.parents, growth.drop, growth.shares)
    if growth.of == "expert":
        return {"expert": plan}
    unit_of = layer.router.unit_of_expert(growth.of)
    if unit_of is None or any(parent is None for parent in growth.parents):
        message = f"a new {growth.of} of layer '{layer.name}' needs a parent, whose experts it starts from"
        raise UsageError(message, code="growth-needs-parent")
    members = [(unit_of == unit).nonzero().flatten().tolist() for unit in range(layer.sizes[growth.of])]
    homes = zip(growth.parents, plan.added, strict=True)
    born = [(expert, home) for parent, home in homes if isinstance(parent, int) for expert in members[parent]]
    drop = [expert for unit in growth.drop for expert in members[unit]]
    experts = _plan(layer.name, "expert", layer.sizes["expert"], [expert for expert, _ in born], drop, {})
    return {growth.of: plan, "expert": attrs.evolve(experts, homes=tuple(home for _, home in born))}


def _plan(
    layer: str, of: str, size: int, parents: Sequence[Parent], drop: Sequence[int], given: Mapping[int, float]
) -> Plan:
    _check_units(layer, of, size, parents, drop, given)
    waiting = list(parents)
    rows: list[tuple[Parent, bool]] = []
    for old in range(size):
        if old not in drop:
            rows.append((old, False))
        elif waiting:
            rows.append((waiting.pop(0), True))
    rows += [(parent, True) for parent in waiting]
    if not rows:
        raise UsageError(f"a growth of layer '{layer}' would remove every {of}", code="bad-growth")
    merged = {at: _shares(parent, given) for at, (parent, _) in enumerate(rows) if isinstance(parent, tuple)}
    origins = tuple(parent[0] if isinstance(parent, tuple) else parent for parent, _ in rows)
    return Plan(origins, tuple(at for at, (_, new) in enumerate(rows) if new), merged=merged)


def _shares(merged: Sequence[int], given: Mapping[int, float]) -> dict[int, float]:
    """Each parent's share in the mean; they sum to 1."""
    total = sum(given.get(unit, 1.0) for unit in merged)
    return {unit: given.get(unit, 1.0) / total for unit in merged}


def _check_units(
    layer: str, of: str, size: int, parents: Sequence[Parent], drop: Sequence[int], given: Mapping[int, float]
) -> None:
    merges = [parent for parent in parents if isinstance(parent, tuple)]
    single = [parent for parent in parents if not isinstance(parent, tuple) and parent is not None]
    named = [*single, *(unit for merge in merges for unit in merge), *drop, *given]
    unknown = [unit for unit in named if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < size]
    if unknown:
        problem = f"layer '{layer}' has no {of} {unknown[0]!r}; they are 0 to {size - 1}"
    elif both := sorted(set(single) & set(drop)):
        problem = f"{of} {both[0]} of layer '{layer}' can't be removed and be a parent in one growth"
    elif len(set(drop)) < len(drop):
        problem = f"a growth of layer '{layer}' drops an {of} twice: {list(drop)}"
    elif not parents and not drop:
        problem = f"a growth of layer '{layer}' names neither a parent nor an {of} to drop: it does nothing"
    elif merges and of != "expert":
        problem = f"a growth of layer '{layer}' merges units of '{of}'; only experts can be merged"
    elif odd := [merge for merge in merges if len(set(merge)) < max(len(merge), 2)]:
        problem = f"a merge in layer '{layer}' takes two different experts or more, not {list(odd[0])}"
    elif not all(isinstance(share, int | float) and 0 <= share < math.inf for share in given.values()):
        problem = f"the shares of a merge in layer '{layer}' are numbers from 0, not {dict(given)}"
    elif empty := [merge for merge in merges if not sum(given.get(unit, 1.0) for unit in merge)]:
        problem = f"a merge in layer '{layer}' gives all of {list(empty[0])} the share 0"
    else:
        return
    raise UsageError(problem, code="bad-growth")
