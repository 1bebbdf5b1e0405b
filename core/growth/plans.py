"""Plans: the origin and the position of each unit in a growth, experts of a growing group included."""

from collections.abc import Sequence

import attrs

from ..contract.growth import Growth, Plan
from ..errors import UsageError, listed
from ..layer.moe import MoE


def plans_of(layer: MoE, growth: Growth) -> dict[str, Plan]:
    """The plan of each population that a growth changes. Raises UsageError for an impossible growth."""
    if growth.of not in layer.sizes:
        message = f"layer '{layer.name}' has no '{growth.of}' that could grow; it has {listed(layer.sizes)}"
        raise UsageError(message, code="unknown-population")
    plan = _plan(layer.name, growth.of, layer.sizes[growth.of], growth.parents, growth.drop)
    if growth.of == "expert":
        return {"expert": plan}
    unit_of = layer.router.unit_of_expert(growth.of)
    if unit_of is None or any(parent is None for parent in growth.parents):
        message = f"a new {growth.of} of layer '{layer.name}' needs a parent, whose experts it starts from"
        raise UsageError(message, code="growth-needs-parent")
    members = [(unit_of == unit).nonzero().flatten().tolist() for unit in range(layer.sizes[growth.of])]
    homes = zip(growth.parents, plan.added, strict=True)
    born = [(expert, home) for parent, home in homes if parent is not None for expert in members[parent]]
    drop = [expert for unit in growth.drop for expert in members[unit]]
    experts = _plan(layer.name, "expert", layer.sizes["expert"], [expert for expert, _ in born], drop)
    return {growth.of: plan, "expert": attrs.evolve(experts, homes=tuple(home for _, home in born))}


def _plan(layer: str, of: str, size: int, parents: Sequence[int | None], drop: Sequence[int]) -> Plan:
    _check_units(layer, of, size, parents, drop)
    waiting = list(parents)
    rows: list[tuple[int | None, bool]] = []
    for old in range(size):
        if old not in drop:
            rows.append((old, False))
        elif waiting:
            rows.append((waiting.pop(0), True))
    rows += [(parent, True) for parent in waiting]
    if not rows:
        raise UsageError(f"a growth of layer '{layer}' would remove every {of}", code="bad-growth")
    return Plan(tuple(old for old, _ in rows), tuple(position for position, (_, new) in enumerate(rows) if new))


def _check_units(layer: str, of: str, size: int, parents: Sequence[int | None], drop: Sequence[int]) -> None:
    named = [unit for unit in (*parents, *drop) if unit is not None]
    unknown = [unit for unit in named if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < size]
    if unknown:
        problem = f"layer '{layer}' has no {of} {unknown[0]!r}; they are 0 to {size - 1}"
    elif both := sorted({unit for unit in parents if unit is not None} & set(drop)):
        problem = f"{of} {both[0]} of layer '{layer}' can't be removed and be a parent in one growth"
    elif len(set(drop)) < len(drop):
        problem = f"a growth of layer '{layer}' drops an {of} twice: {list(drop)}"
    elif not parents and not drop:
        problem = f"a growth of layer '{layer}' names neither a parent nor an {of} to drop: it does nothing"
    else:
        return
    raise UsageError(problem, code="bad-growth")
