"""The counts of one layer and split, and what a file says besides.

Suffixes: E experts, P points in time.
"""

from collections.abc import Container
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from .count_cells import has_letter

Array = NDArray[Any]


@attrs.define(eq=False)
class Series:
    """The counts of one layer and split under one set of labels.

    count_E: assignments of each expert, or shares of them. tokens, top_k: None if not given.
    absent: the experts without a row. source: where the counts come from, if not from a file of counts.
    count_PE, points: the counts of each row or step, and what it is called; empty unless asked for.
    """

    file: str
    labels: dict[str, str]
    layer: str
    split: str
    count_E: Array
    tokens: float | None = None
    top_k: int | None = None
    absent: list[int] = attrs.field(factory=list)
    source: str | None = None
    count_PE: Array = attrs.field(factory=lambda: np.zeros((0, 0)))
    points: list[str] = attrs.field(factory=list)

    @property
    def total(self) -> float:
        """The number of assignments, or the sum of the shares."""
        return float(self.count_E.sum())

    @property
    def whole(self) -> bool:
        """Whether these are counts, not shares."""
        return bool((self.count_E == np.floor(self.count_E)).all())

    @property
    def share_E(self) -> Array:
        """Shares of the total."""
        return self.count_E / max(self.total, 1e-300)

    def title(self, without: Container[str] = ()) -> str:
        """Its name in a sentence; without: labels to leave out."""
        labels = [
            label if has_letter(label) else f"{name} {label}"
            for name, label in self.labels.items()
            if name not in without
        ]
        return ", ".join([*labels, f"layer {self.layer}", self.split])


@attrs.frozen
class Header:
    """What was found in a file besides counts. names: of its columns. notes: sentences on how it was read."""

    names: set[str]
    notes: list[str]
