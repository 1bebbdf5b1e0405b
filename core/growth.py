"""What is to become of a layer's experts, what became of them, and where each comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from .errors import UsageError, listed
from .layer import MoE
from .optimizers import Moments


def _several(units: Any) -> tuple[Any, ...]:
    if not isinstance(units, list | tuple):
        raise UsageError(f"parents and drop of a Growth are tuples of experts, not {units!r}")
    return tuple(units)


@attrs.frozen
class Growth:
    """What is to become of a layer's experts.

    layer: its name. parents: one newcomer for each; the expert that it descends from, or None. drop:
    experts to remove; newcomers take their places first, so that one parent and one drop replace an
    expert. of: "expert", or the level of a hierarchical router whose units these are: a group comes
    and goes with its experts. require_exact: refuse a growth that changes what the layer computes. rows: by
    "part.tensor", what each newcomer has in the place of what the source answers.
    """

    layer: str
    parents: tuple[int | None, ...] = attrs.field(default=(), converter=_several)
    drop: tuple[int, ...] = attrs.field(default=(), converter=_several)
    of: str = "expert"
    require_exact: bool = False
    rows: Mapping[str, Tensor] = attrs.field(factory=dict, repr=False, eq=False)
    why: str = ""


@attrs.frozen
class NewExpert:
    """A newcomer's rows by "part.tensor". parent_values: the same of its parent, where it changes too.

    moments: what the optimizer's state of its rows starts as: "fresh" (`optimizers.FRESH`: 0 in Adam) or
    "copy" (its parent's).
    """

    values: Mapping[str, Tensor]
    parent_values: Mapping[str, Tensor] = attrs.field(factory=dict)
    moments: Moments = "fresh"


@attrs.frozen
class Plan:
    """Where each unit of a population comes from.

    origins: for each new position the old one whose row it goes on with; for a newcomer its parent's, or
    None. newcomers: their positions. homes: of newcomers in a group that is new itself, that group.
    """

    origins: tuple[int | None, ...]
    newcomers: tuple[int, ...]
    homes: tuple[int, ...] = ()

    @property
    def kept(self) -> dict[int, int]:
        """Old position -> new position of all that stay."""
        return {old: new for new, old in enumerate(self.origins) if new not in self.newcomers and old is not None}


@attrs.frozen
class Grown:
    """What one growth did.

    rows: for each expert now, which one it was before; None for a newcomer. parents: each newcomer's.
    change: |y' - y| / |y| of the layer on the probe batch; loss_before, loss_after: the task's there;
    None where there was no probe.
    """

    step: int
    layer: str
    of: str
    before: int
    after: int
    rows: tuple[int | None, ...]
    parents: tuple[int | None, ...]
    drop: tuple[int, ...]
    source: str | None
    why: str
    change: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


def plans_of(layer: MoE, growth: Growth) -> dict[str, Plan]:
    """The plan of each population that a growth changes. Raises UsageError if it makes no sense."""
    if growth.of not in layer.sizes:
        raise UsageError(f"layer '{layer.name}' has no '{growth.of}' that could grow; it has {listed(layer.sizes)}")
    plan = _plan(layer.name, growth.of, layer.sizes[growth.of], growth.parents, growth.drop)
    if growth.of == "expert":
        return {"expert": plan}
    unit_of = layer.router.unit_of(growth.of)
    if unit_of is None or any(parent is None for parent in growth.parents):
        raise UsageError(f"a new {growth.of} of layer '{layer.name}' needs a parent, whose experts it starts from")
    members = [(unit_of == unit).nonzero().flatten().tolist() for unit in range(layer.sizes[growth.of])]
    homes = zip(growth.parents, plan.newcomers, strict=True)
    born = [(expert, home) for parent, home in homes if parent is not None for expert in members[parent]]
    drop = [expert for unit in growth.drop for expert in members[unit]]
    experts = _plan(layer.name, "expert", layer.sizes["expert"], [expert for expert, _ in born], drop)
    return {growth.of: plan, "expert": attrs.evolve(experts, homes=tuple(home for _, home in born))}


def _plan(layer: str, of: str, size: int, parents: Sequence[int | None], drop: Sequence[int]) -> Plan:
    for one in (*parents, *drop):
        if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < size):
            raise UsageError(f"layer '{layer}' has no {of} {one!r}; they are 0 to {size - 1}")
    if both := sorted({one for one in parents if one is not None} & set(drop)):
        raise UsageError(f"{of} {both[0]} of layer '{layer}' can't be removed and be a parent in one growth")
    if len(set(drop)) < len(drop):
        raise UsageError(f"a growth of layer '{layer}' drops an {of} twice: {list(drop)}")
    if not parents and not drop:
        raise UsageError(f"a growth of layer '{layer}' names no parent and nobody to drop: it does nothing")
    waiting = list(parents)
    rows: list[tuple[int | None, bool]] = []
    for old in range(size):
        if old not in drop:
            rows.append((old, False))
        elif waiting:
            rows.append((waiting.pop(0), True))
    rows += [(parent, True) for parent in waiting]
    if not rows:
        raise UsageError(f"a growth of layer '{layer}' would remove every {of}")
    return Plan(tuple(old for old, _ in rows), tuple(position for position, (_, new) in enumerate(rows) if new))
