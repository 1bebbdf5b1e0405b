"""What is to become of a layer's experts, what became of them, and where each comes from."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from ..errors import UsageError
from ..optimizer_state import Moments


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
    "part.tensor", what each newcomer has in the place of what the initializer answers.
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
    initializer: str | None
    why: str
    change: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
