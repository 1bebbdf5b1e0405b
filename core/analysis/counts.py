"""Routing counts by layer and split, summed from the rows of a file. Nothing here imports torch.

Suffixes: R rows, N numbers, S series, E experts.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, listed
from .count_columns import Columns
from .count_files import Chunk, CountFile, open_counts

TOP_K = ("choices_per_token", "top_k")
TIMES = ("step", "epoch", "batch")  # columns that are summed over instead of being labels
LARGEST, EXPERTS, SERIES, CELLS = 1e15, 100_000, 10_000, 20_000_000  # anything larger must be a mistake

Array = NDArray[Any]
Cells = Mapping[str, Sequence[Any]]  # columns by name


@attrs.define(eq=False)
class Series:
    """The counts of one layer and split under one set of labels.

    count_E: assignments of each expert, or shares of them. tokens, top_k: None if not given.
    absent: the experts without a row. source: where the counts come from, if not from a file of counts.
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
            f"{name} {label}" if label.isdigit() else label
            for name, label in self.labels.items()
            if name not in without
        ]
        return ", ".join([*labels, f"layer {self.layer}", self.split])


def read_counts(
    path: Path, over: Iterable[str] = (), split: str = "split", experts: int | None = None
) -> tuple[list[Series], set[str]]:
    """The series in a file ("-": standard input) in the order of its rows, and the names of its columns.

    over: columns to sum over, besides TIMES. split: the column of the split. experts: E, for the long form, in which
    each row names an expert. Raises UsageError, which names the row.
    """
    file = open_counts(path)
    sums = _Sums(file, {*over, *TIMES}, split, experts)
    for chunk in file.chunks():
        sums.add(chunk)
    if not sums.ids:
        raise UsageError(f"{file.name} holds no rows of counts; give it some below its header", code="no-counts")
    return sums.series(), sums.names


class _Sums:
    """Sums rows by series."""

    def __init__(self, file: CountFile, over: set[str], split: str, experts: int | None) -> None:
        self.file, self.over, self.split, self.experts = file, over, split, experts
        self.names: set[str] = set()
        self.keys: list[str] = []
        self.ids: dict[tuple[str, ...], int] = {}
        self.raw: dict[tuple[Any, ...], int] = {}  # the same, by cells before they are stripped
        self.firsts: list[Any] = []  # the place of each series' first row
        self.sizes: dict[int, int] = {}  # E of each series of the wide form
        self.count_SE = self.token_SE = self.row_SE = np.zeros((0, 0))

    def add(self, chunk: Chunk) -> None:
        """Add rows. Raises UsageError for the first bad one."""
        columns = Columns.of(self.file.name, chunk.names, self.over)
        self.names, self.keys = set(columns.at), columns.keys
        if {*map(len, chunk.rows)} != {len(chunk.names)}:
            where, row = next(
                (where, row) for where, row in zip(chunk.where, chunk.rows, strict=True) if len(row) != len(chunk.names)
            )
            what = f"it has {len(row)} cells, but the header has {len(chunk.names)}"
            raise self.file.refuse(where, what, "uneven-row")
        cells = dict(zip(columns.at, zip(*chunk.rows, strict=True), strict=True))
        series_R = self._series(cells, chunk.where)
        tokens_R = self._numbers("tokens", cells, chunk.where) if "tokens" in cells else np.zeros(len(series_R))
        size = len(columns.experts)
        if not size:
            expert_R, count_R = self._expert_column(cells, chunk.where), self._numbers("count", cells, chunk.where)
            self._total(series_R, expert_R, count_R, tokens_R)
            return
        self._check_sizes(series_R, size, chunk.where)
        count_ER = np.stack([self._numbers(name, cells, chunk.where) for name in columns.experts])
        expert_ER = np.repeat(np.arange(size), len(series_R))
        self._total(np.tile(series_R, size), expert_ER, count_ER.ravel(), np.tile(tokens_R, size))

    def series(self) -> list[Series]:
        """The sums, as series."""
        return [self._one(dict(zip(self.keys, key, strict=True)), at) for key, at in self.ids.items()]

    def _one(self, labels: dict[str, str], at: int) -> Series:
        size = self.sizes.get(at, self.count_SE.shape[1])
        top_ks = [self._top_k(labels[name], size, self.firsts[at]) for name in TOP_K if name in labels]
        split, layer = labels.pop(self.split, "all"), labels.pop("layer", "0")
        return Series(
            self.file.name,
            labels,
            layer,
            split,
            self.count_SE[at, :size],
            float(self.token_SE[at].max()) if "tokens" in self.names else None,  # each expert's rows give all tokens
            top_ks[0] if top_ks else None,
            np.flatnonzero(self.row_SE[at, :size] == 0).tolist(),
        )

    def _series(self, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: the number of each row's series; new series are opened."""
        columns = [cells[name] for name in self.keys]
        for name, column in zip(self.keys, columns, strict=True) if self.file.typed else ():
            if not set(map(type, column)) <= {str, int, float}:
                row = next(row for row, cell in enumerate(column) if type(cell) not in (str, int, float))
                raise self.file.refuse(
                    where[row], f"{name} is {_short(column[row])}, which is not a label", "bad-label"
                )
        keys = list(zip(*columns, strict=True)) if columns else [()] * len(where)
        for key in dict.fromkeys(keys):
            if key not in self.raw:
                texts = tuple(str(cell).strip() for cell in key)
                if texts not in self.ids:
                    self.ids[texts] = len(self.ids)
                    self.firsts.append(where[keys.index(key)])
                self.raw[key] = self.ids[texts]
        if len(self.ids) > SERIES:
            raise UsageError(
                f"{self.file.name} holds more than {SERIES} series, one for each combination of {listed(self.keys)}; "
                "sum over one of them with --sum",
                code="too-many-series",
            )
        return np.fromiter(map(self.raw.__getitem__, keys), np.int64, len(keys))

    def _numbers(self, name: str, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: a column of numbers from 0 on."""
        column = cells[name]
        usual: set[type] = {int, float} if self.file.typed else {str}
        try:
            value_R = np.fromiter(map(float, column), np.float64, len(column))
        except (ValueError, TypeError, OverflowError):
            value_R = np.full(len(column), math.nan)
        bad = not ((value_R >= 0) & (value_R <= LARGEST)).all()  # also for nan
        if bad or (not {*map(type, column)} <= usual if self.file.typed else "_" in "".join(column)):
            what, row = next((what, row) for row, cell in enumerate(column) if (what := _problem(cell, usual)))
            raise self.file.refuse(where[row], f"{name} is {_short(column[row])}, {what}", "bad-count")
        return value_R

    def _expert_column(self, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: the column `expert`, as whole numbers."""
        expert_R = self._numbers("expert", cells, where)
        limit = self.experts or EXPERTS
        bad_R = (expert_R != np.floor(expert_R)) | (expert_R >= limit)
        if bad_R.any():
            row = int(bad_R.argmax())
            what = f"expert is {_short(cells['expert'][row])}, but experts are whole numbers from 0 to {limit - 1}"
            raise self.file.refuse(where[row], what, "bad-expert")
        return expert_R.astype(np.int64)

    def _check_sizes(self, series_R: Array, size: int, where: Sequence[Any]) -> None:
        numbers, firsts = np.unique(series_R, return_index=True)
        for number, row in zip(numbers.tolist(), firsts.tolist(), strict=True):
            if (before := self.sizes.setdefault(number, size)) != size:
                what = f"it has {size} experts, but its layer has {before} further up"
                raise self.file.refuse(where[row], what, "expert-number-changed")

    def _total(self, series_N: Array, expert_N: Array, count_N: Array, tokens_N: Array) -> None:
        size = max(self.count_SE.shape[1], int(expert_N.max()) + 1, self.experts or 0)
        shape = (len(self.ids), size)
        if math.prod(shape) > CELLS:
            message = f"{self.file.name} holds {shape[0]} series of {size} experts, too much for memory"
            raise UsageError(message, code="too-many-counts")
        if shape != self.count_SE.shape:
            self.count_SE, self.token_SE, self.row_SE = (
                _grown(total_SE, shape) for total_SE in (self.count_SE, self.token_SE, self.row_SE)
            )
        flat_N = series_N * size + expert_N
        np.add.at(self.count_SE.reshape(-1), flat_N, count_N)
        np.add.at(self.token_SE.reshape(-1), flat_N, tokens_N)
        np.add.at(self.row_SE.reshape(-1), flat_N, 1)

    def _top_k(self, text: str, size: int, where: Any) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:7]) <= size):
            what = f"'{text[:40]}' choices a token; with {size} experts it must be 1 to {size}"
            raise self.file.refuse(where, what, "bad-top-k")
        return int(text)


def _grown(total_SE: Array, shape: tuple[int, int]) -> Array:
    """The totals, padded with zeros to a larger shape."""
    grown_SE = np.zeros(shape)
    grown_SE[: total_SE.shape[0], : total_SE.shape[1]] = total_SE
    return grown_SE


def _problem(cell: Any, usual: set[type]) -> str | None:
    """What is wrong with a cell that should hold a number from 0 on, or None."""
    try:
        value = float(cell) if type(cell) in usual and "_" not in str(cell) else math.nan
    except ValueError:
        value = math.nan
    except OverflowError:
        value = math.inf
    if math.isnan(value):
        return "which is not a number"
    if value < 0:
        return "and a count is never below 0"
    return f"and a count is never above {LARGEST:g}" if value > LARGEST else None


def _short(cell: Any) -> str:
    return f"'{str(cell).strip()[:40]}'"
