"""The counts of each step or row of a series.

Suffixes: R rows, N numbers, E experts, P points in time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .count_cells import label_text

CELLS = 20_000_000  # counts; more must be a mistake

Array = NDArray[Any]
Cells = Mapping[str, Sequence[Any]]  # columns by name


class Points:
    """The counts of each step of a series; without steps, of each row."""

    def __init__(self) -> None:
        self.codes: dict[tuple[Any, ...], int] = {}  # of points in time
        self.parts: list[tuple[Array, Array, Array, Array]] = []
        self.size = 0

    def times(self, names: Sequence[str], cells: Cells, size: int) -> Array:
        """[R]: a code of each row's point in time; 0 if no column gives one."""
        if not names:
            return np.zeros(size, np.int64)
        times = list(zip(*(cells[name] for name in names), strict=True))
        for time in dict.fromkeys(times):
            self.codes.setdefault(time, len(self.codes))
        return np.fromiter(map(self.codes.__getitem__, times), np.int64, size)

    def add(self, series_N: Array, expert_N: Array, count_N: Array, time_N: Array) -> None:
        """Add counts."""
        self.parts.append((series_N, expert_N, count_N, time_N))
        self.size += len(series_N)

    def of_series(self, file: str, sizes: list[int]) -> list[tuple[Array, list[str]]]:
        """The counts [P, E] of each series in the order of time, and the names of its points."""
        if self.size > CELLS:
            message = f"{file} holds {self.size:,} counts, too many to keep each row; take a part of its rows"
            raise UsageError(message, code="too-many-counts")
        series_N, expert_N, count_N, code_N = map(np.concatenate, zip(*self.parts, strict=True))
        names, rank = _in_order(list(self.codes))
        # without times, the first count of every expert is the first row, the second one the second, and so on
        time_N = rank[code_N] if names else _occurrence(series_N * (int(expert_N.max()) + 1) + expert_N)
        order_N = np.argsort(series_N, kind="stable")
        bounds = np.searchsorted(series_N[order_N], np.arange(len(sizes) + 1))
        out = []
        for at, size in enumerate(sizes):
            of_N = order_N[bounds[at] : bounds[at + 1]]
            times_P, point_N = np.unique(time_N[of_N], return_inverse=True)
            if len(times_P) * size > CELLS:
                message = f"{file} holds {len(times_P):,} steps of {size:,} experts, too many to keep each"
                raise UsageError(message, code="too-many-counts")
            count_PE = np.zeros((len(times_P), size))
            np.add.at(count_PE, (point_N.reshape(-1), expert_N[of_N]), count_N[of_N])
            out.append((count_PE, [names[time] if names else f"row {time + 1}" for time in times_P.tolist()]))
        return out


def _in_order(times: list[tuple[Any, ...]]) -> tuple[list[str], Array]:
    """The names of points in time, in order, and the rank of each: by number if all are numbers, else as they come."""
    try:
        order = sorted(range(len(times)), key=lambda at: [float(part) for part in times[at]])
    except (ValueError, TypeError):
        order = list(range(len(times)))
    rank = np.empty(len(times), np.int64)
    rank[order] = np.arange(len(times))
    return [" ".join(map(label_text, times[at])) for at in order], rank


def _occurrence(code_N: Array) -> Array:
    """How often the same code came before."""
    order_N = np.argsort(code_N, kind="stable")
    sorted_N = code_N[order_N]
    starts = np.flatnonzero(np.diff(sorted_N, prepend=-1))
    lengths = np.diff([*starts.tolist(), len(code_N)])
    out_N = np.empty(len(code_N), np.int64)
    out_N[order_N] = np.arange(len(code_N)) - np.repeat(starts, lengths)
    return out_N
