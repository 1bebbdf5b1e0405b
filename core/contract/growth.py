"""Records of growth: the request, the plan, a new expert's weights, and the result."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from ..errors import UsageError
from ..optimizer_state import Moments


def _units(units: Any) -> tuple[Any, ...]:
    if not isinstance(units, list | tuple):
        raise UsageError(f"parents and drop of a Growth are tuples of experts, not {units!r}", code="bad-growth")
    return tuple(units)


@attrs.frozen
class Growth:
    """A change of a layer's experts: add, remove, or replace some.

    layer: its name. parents: one entry per new expert: the expert that it descends from, or None. drop: experts to
    remove; new experts fill their positions first, so one parent and one drop replace an expert. of: "expert", or
    the router level whose units are meant, such as "group"; a group is added or removed with all its experts.
    require_exact: refuse the growth if it changes the layer's output. rows: by "part.tensor", the rows of new units
    instead of the initializer's, [n, ...] for n of them in the order of `parents`, or one row [...] for all. why: the
    reason that the report shows. Raises UsageError.
    """

    layer: str
    parents: tuple[int | None, ...] = attrs.field(default=(), converter=_units)
    drop: tuple[int, ...] = attrs.field(default=(), converter=_units)
    of: str = "expert"
    require_exact: bool = False
    rows: Mapping[str, Tensor] = attrs.field(factory=dict, repr=False, eq=False)
    why: str = ""


@attrs.frozen
class NewExpert:
    """A new expert's rows by "part.tensor". parent_values: its parent's new rows, if that changes too.

    moments: the initial optimizer state of its rows: "fresh" (0 in Adam; see `optimizer_state.FRESH`) or "copy"
    (its parent's).
    """

    values: Mapping[str, Tensor]
    parent_values: Mapping[str, Tensor] = attrs.field(factory=dict)
    moments: Moments = "fresh"


@attrs.frozen
class Plan:
    """The origin of each unit of a population.

    origins: for each new position, the old position whose row it keeps; for a new unit, its parent's or None.
    added: the positions of new units. homes: the groups of new experts, if those groups are new too.
    """

    origins: tuple[int | None, ...]
    added: tuple[int, ...]
    homes: tuple[int, ...] = ()

    @property
    def kept(self) -> dict[int, int]:
        """Old position -> new position of the units that stay."""
        return {old: new for new, old in enumerate(self.origins) if new not in self.added and old is not None}


@attrs.frozen
class Grown:
    """The record of one growth.

    rows: for each present expert, its index before; None for a new one. parents: the parent of each new expert.
    change: |y' - y| / |y| of the layer's output y on the probe batch. loss_before, loss_after: the task's loss on
    it. These three are None without a probe.
    """

    step: int
    layer: str
    of: str
    before: int
    after: int
    rows: tuple[int | None, ...]
    parents: tuple[int | None, ...]
    drop: tuple[int, ...]
    initializer: str | None
    why: str
    change: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
