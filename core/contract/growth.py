"""Records of growth: the request, the plan, a new expert's weights, and the result."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from ..errors import UsageError, listed
from ..optimizer_state import Moments

Parent = int | None | tuple[int, ...]  # of a new expert; several if it is merged from them


def _units(units: Any) -> tuple[Any, ...]:
    if not isinstance(units, list | tuple):
        raise UsageError(f"parents and drop of a Growth are tuples of experts, not {units!r}", code="bad-growth")
    return tuple(tuple(unit) if isinstance(unit, list) else unit for unit in units)


@attrs.frozen
class Order:
    """The order in which the rows of merged experts are averaged in one tensor.

    dim: the dimension of a row [...] (the tensor without its expert axis) that is reordered. of: by expert, a
    permutation [n] of that dimension: place i takes what the expert has at place index[i]. Others stay as they are.
    """

    dim: int
    of: Mapping[int, Tensor]


@attrs.frozen
class HiddenUnits:
    """Where a tensor of a bank has the hidden units of its experts: a bank that can be aligned names one for each.

    A bank's `hidden_units` holds these by tensor. axis: the dimension of the tensor, a multiple of H long; a tensor of
    2H has the gates' places and then those of the up projection. interleaved: they alternate instead.
    """

    axis: int
    interleaved: bool = False


@attrs.frozen
class Growth:
    """A change of a layer's experts: add, remove, or replace some.

    layer: its name. parents: one entry per new expert: the expert that it descends from, None, or a tuple of experts
    that it is merged from. drop: experts to remove; new experts fill their positions first, so one parent and one
    drop replace an expert, and parents=((a, b),), drop=(a, b) merges a and b. of: "expert", or the router level whose
    units are meant, such as "group"; a group is added or removed with all its experts. require_exact: refuse the
    growth if it changes the layer's output. rows: by "part.tensor", the rows of new units instead of the
    initializer's, [n, ...] for n of them in the order of `parents`, or one row [...] for all.

    A merged expert's rows and optimizer state are the mean over its parents, sum_i s_i row_i / sum_i s_i; a copy of
    the layer averages its own rows. shares: s_i by expert, 1 for others. orders: by "part.tensor", the order in which
    the parents' rows are averaged. why: the reason that the report shows. Raises UsageError.
    """

    layer: str
    parents: tuple[Parent, ...] = attrs.field(default=(), converter=_units)
    drop: tuple[int, ...] = attrs.field(default=(), converter=_units)
    of: str = "expert"
    require_exact: bool = False
    rows: Mapping[str, Tensor] = attrs.field(factory=dict, repr=False, eq=False)
    shares: Mapping[int, float] = attrs.field(factory=dict, hash=False)
    orders: Mapping[str, Order] = attrs.field(factory=dict, repr=False, eq=False)
    why: str = ""


@attrs.frozen
class NewExpert:
    """A new expert's rows by "part.tensor". parent_values: its parent's new rows, if that changes too.

    moments: the initial optimizer state of its rows: "fresh" (0 in Adam; see `optimizer_state.FRESH`), "copy" (its
    parent's) or "mean" (its parents', for an expert that is merged, of which no initializer is asked).
    """

    values: Mapping[str, Tensor]
    parent_values: Mapping[str, Tensor] = attrs.field(factory=dict)
    moments: Moments = "fresh"


@attrs.frozen
class Plan:
    """The origin of each unit of a population.

    origins: for each new position, the old position whose row it keeps; for a new unit, its parent's or None, its
    first parent's if it is merged. added: the positions of new units. homes: the groups of new experts, if those
    groups are new too. merged: for each position of a merged unit, its parents' old positions and their shares, which
    sum to 1.
    """

    origins: tuple[int | None, ...]
    added: tuple[int, ...]
    homes: tuple[int, ...] = ()
    merged: Mapping[int, Mapping[int, float]] = attrs.field(factory=dict, hash=False)

    @property
    def kept(self) -> dict[int, int]:
        """Old position -> new position of the units that stay."""
        return {old: new for new, old in enumerate(self.origins) if new not in self.added and old is not None}

    @property
    def heirs(self) -> dict[int, int]:
        """Old position of each unit that is removed and merged -> position of the first unit it is merged into."""
        kept, heirs = self.kept, {}
        for position, shares in self.merged.items():
            heirs.update({old: position for old in shares if old not in kept and old not in heirs})
        return heirs

    def refuse_mixed(self, values: Tensor, what: str) -> None:
        """Raise UsageError if units whose values [n] differ are to be merged; for parts with several kinds of units."""
        for shares in self.merged.values():
            if len(values[list(shares)].unique()) > 1:
                message = f"experts {listed(shares)} can't be merged: they are not of one {what}"
                raise UsageError(message, code="bad-growth")


@attrs.frozen
class Grown:
    """The record of one growth.

    rows: for each present expert, its index before; None for a new one. parents: the parent of each new expert, or
    the tuple of those that it was merged from.
    change: |y' - y| / |y| of the layer's output y on the probe batch. loss_before, loss_after: the task's loss on
    it. These three are None without a probe.
    """

    step: int
    layer: str
    of: str
    before: int
    after: int
    rows: tuple[int | None, ...] = attrs.field(converter=_units)
    parents: tuple[Parent, ...] = attrs.field(converter=_units)
    drop: tuple[int, ...] = attrs.field(converter=_units)
    initializer: str | None
    why: str
    change: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
