"""Routing counts by layer and split, summed from the rows of a file. Nothing here imports torch.

Suffixes: R rows, N numbers, S series, E experts, P points in time.
"""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, listed
from .count_columns import TOTAL_ROWS, Columns, Rows, expert_number, pick_labels, plain
from .count_files import Chunk, CountFile, open_counts

LARGEST, EXPERTS, SERIES, CELLS = 1e15, 100_000, 10_000, 20_000_000  # anything larger must be a mistake
ROUNDED = 0.015  # how far shares may be from 1 or 100 % in total
SURE = 10  # expected repeats in rows: if there is none, the rows hold different experts' ids (chance e^-10)
MOST_CHOICES = 64  # of a token
NAMED = 6  # names in a note

Array = NDArray[Any]
Cells = Mapping[str, Sequence[Any]]  # columns by name


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
            label if _has_letter(label) else f"{name} {label}"
            for name, label in self.labels.items()
            if name not in without
        ]
        return ", ".join([*labels, f"layer {self.layer}", self.split])


@attrs.frozen
class Header:
    """What was found in a file besides counts. names: of its columns. notes: sentences on how it was read."""

    names: set[str]
    notes: list[str]


def read_counts(
    path: Path,
    over: Iterable[str] = (),
    split: str = "split",
    experts: int | None = None,
    each_row: bool = False,
) -> tuple[list[Series], Header]:
    """The series in a file ("-": standard input) in the order of its rows, and what else was found in it.

    over: columns to sum over, besides those of time. split: the column of the split. experts: E, for the long form, in
    which each row names an expert. each_row: keep the counts of each step, or of each row if the file has no steps.
    Raises UsageError, which names the row.
    """
    file = open_counts(path)
    tables = _Tables(file, {*over}, split)
    sums = _Sums(file, tables.labels(), experts, each_row)
    tables.totals.clear()
    for table in tables:
        sums.add(table)
    if not sums.ids:
        raise UsageError(f"{file.name} holds no rows of counts; give it some below its header", code="no-counts")
    series = sums.series()
    for table in tables.totals:
        sums.check_totals(table)
    _refuse_unlikely(file, sums, series, summed=bool({*over} & sums.names))
    return series, Header(sums.names, [*file.notes, *tables.notes(sums)])


# -- tables ----------------------------------------------------------------------------------------


@attrs.frozen
class _Table:
    """Some rows. where: their places. cells: their columns."""

    columns: Columns
    where: Sequence[Any]
    cells: Cells


class _Tables:
    """The rows of a file in tables, without rows of totals; those are kept in `totals`, one row a table."""

    def __init__(self, file: CountFile, over: set[str], split: str) -> None:
        self.file, self.over, self.split = file, over, split
        self.totals: list[_Table] = []

    def __iter__(self) -> Iterator[_Table]:
        names: list[str] = []
        for chunk in self.file.chunks():
            if chunk.names != names:
                names, columns = chunk.names, Columns.of(self.file.name, chunk.names, self.over, self.split)
            table = self._table(columns, chunk)
            if not self.file.typed:
                table = self._without_totals(table)
            if table.where:
                yield table

    def labels(self) -> list[str]:
        """The columns that are labels, which all rows decide. It reads the file once more if it has such columns."""
        columns, rows = None, Rows()
        for table in self:
            columns = table.columns
            if not columns.candidates:
                return []
            expert = [columns.roles["expert"]] if "expert" in columns.roles else []
            names = {*columns.keys, *columns.summed, *columns.candidates, *expert}
            rows.add(names, table.cells, len(table.where))
        if columns is None:
            return []
        labels = pick_labels(columns, rows)
        named = columns.roles.keys() | {"layer" for block in columns.blocks if block.layer is not None}
        numbering = [name for name in columns.numbering if len(rows.texts(name)) > 1]
        if numbering and not {"layer", "expert"} & named and not labels + columns.summed:
            only = f"only {numbering[0]} tells its rows apart"
            message = f"{self.file.name}: {only}; call that column layer, step or what it is"
            raise UsageError(message, code="nameless-rows")
        return labels

    def notes(self, sums: "_Sums") -> Iterator[str]:
        """What the reader should know: the columns that were not used, and totals."""
        if self.totals:
            lines = listed(str(where) for table in self.totals[:NAMED] for where in table.where)
            yield f"{self.file.name}: totals are not counted again ({self.file.unit} {lines})"
        unused = [name for name in sums.candidates if name not in sums.labels]
        if unused:
            more = f" and {len(unused) - NAMED} more" if len(unused) > NAMED else ""
            yield f"{self.file.name}: neither labels nor counts, so left out: {', '.join(unused[:NAMED])}{more}"

    def _table(self, columns: Columns, chunk: Chunk) -> _Table:
        """A chunk by columns. Raises UsageError for a row of another length, or one whose label is not a label."""
        if {*map(len, chunk.rows)} != {len(chunk.names)}:
            where, row = next(
                (where, row) for where, row in zip(chunk.where, chunk.rows, strict=True) if len(row) != len(chunk.names)
            )
            what = f"it has {len(row)} cells, but the header has {len(chunk.names)}"
            raise self.file.refuse(where, what, "uneven-row")
        cells: dict[str, Sequence[Any]] = dict(zip(columns.at, zip(*chunk.rows, strict=True), strict=True))
        for name in columns.keys if self.file.typed else ():
            if not set(map(type, cells[name])) <= {str, int, float}:
                at = next(at for at, cell in enumerate(cells[name]) if type(cell) not in (str, int, float))
                what = f"{name} is {_short(cells[name][at])}, which is not a label"
                raise self.file.refuse(chunk.where[at], what, "bad-label")
        if self.file.typed:
            free = (*columns.summed, *columns.candidates)
            cells |= {name: ["" if cell is None else _hashable(cell) for cell in cells[name]] for name in free}
        return _Table(columns, chunk.where, cells)

    def _without_totals(self, table: _Table) -> _Table:
        """A table without the rows of totals: those with "total" where a layer, label or expert should be."""
        columns, found = table.columns, set()
        strict = {columns.roles[role] for role in ("layer", "expert") if role in columns.roles}
        for name in {*columns.keys, *columns.summed, *columns.candidates, *strict}:
            different = {*table.cells[name]}
            totals = {cell for cell in different if cell[:1].isalpha() and plain(cell) in TOTAL_ROWS}
            if name in strict:  # "all" may be a label, a split, or the only layer
                totals |= {cell for cell in different if cell.strip().lower() == "all" and len(different) > 1}
            found |= {row for row, cell in enumerate(table.cells[name]) if cell in totals} if totals else set()
        if not found:
            return table
        self.totals += [_chosen(table, [row]) for row in sorted(found)]
        return _chosen(table, [row for row in range(len(table.where)) if row not in found])


def _chosen(table: _Table, rows: Sequence[int]) -> _Table:
    """Some rows of a table."""
    cells = {name: [column[row] for row in rows] for name, column in table.cells.items()}
    return _Table(table.columns, [table.where[row] for row in rows], cells)


# -- sums ------------------------------------------------------------------------------------------


class _Sums:
    """Sums rows by series."""

    def __init__(self, file: CountFile, labels: list[str], experts: int | None, each_row: bool) -> None:
        self.file, self.labels, self.experts = file, {*labels}, experts
        self.points = _Points() if each_row else None
        self.names: set[str] = set()
        self.candidates: list[str] = []
        self.wide = self.has_times = self.of_tokens = self.has_tokens = False
        self.ids_or_not: set[bool] = set()  # what parts of the file say on whether it holds ids
        self.others: list[str] = []  # the columns of each key after layer and split
        self.ids: dict[tuple[str, ...], int] = {}
        self.raw: dict[tuple[Any, ...], int] = {}  # the same, by cells before they are stripped
        self.firsts: list[Any] = []  # the place of each series' first row
        self.sizes: dict[int, int] = {}  # E of each series of the wide form
        self.count_SE = self.token_SE = self.row_SE = np.zeros((0, 0))

    def add(self, table: _Table) -> None:
        """Add rows. Raises UsageError for the first bad one."""
        columns, cells, where = table.columns, table.cells, table.where
        self.names |= {*columns.at, *columns.roles}
        self.candidates = columns.candidates
        self.others = sorted([*columns.top_k, *self.labels], key=columns.at.__getitem__)
        self.wide, self.has_times, self.of_tokens = bool(columns.blocks), bool(columns.times), columns.token is not None
        self.has_tokens = "tokens" in columns.roles
        tokens_R = self._numbers(columns.roles["tokens"], cells, where) if self.has_tokens else np.zeros(len(where))
        time_R = self.points.times(columns.times, cells, len(where)) if self.points else np.zeros(len(where))
        if not columns.blocks:
            series_R = self._series(table, None, None)
            expert_R = self._expert_column(columns.roles["expert"], cells, where)
            self._total(series_R, expert_R, self._numbers(columns.roles["count"], cells, where), tokens_R, time_R)
        for block in columns.blocks:
            series_R = self._series(table, block.layer, block.split)
            size = len(block.names)
            self._check_sizes(series_R, size, where)
            count_ER = np.stack([self._numbers(name, cells, where) for name in block.names])
            if False not in self.ids_or_not:
                self.ids_or_not |= _look_like_ids(count_ER, self.of_tokens)
            expert_ER = np.repeat(np.arange(size), len(series_R))
            series_N, tokens_N, time_N = (np.tile(one_R, size) for one_R in (series_R, tokens_R, time_R))
            self._total(series_N, expert_ER, count_ER.ravel(), tokens_N, time_N)

    def series(self) -> list[Series]:
        """The sums, as series."""
        size = self.count_SE.shape[1]
        sizes = [self.sizes.get(at, size) for at in range(len(self.ids))]
        points = self.points.of_series(self.file.name, sizes) if self.points else [(np.zeros((0, 0)), [])] * len(sizes)
        return [self._one(key, at, sizes[at], *points[at]) for key, at in self.ids.items()]

    def check_totals(self, table: _Table) -> None:
        """Raises UsageError if a row of totals is not the sum of the rows that it names."""
        columns, cells = table.columns, {name: column[0] for name, column in table.cells.items()}
        named = [columns.roles.get("layer"), columns.roles.get("split"), *self.others]
        texts = [_label(cells[name]) if name is not None else "" for name in named]
        any_text = ["" if plain(text) in (*TOTAL_ROWS, "all") else text for text in texts]
        rows = [
            at
            for key, at in self.ids.items()
            if all(text in ("", part) for text, part in zip(any_text, key, strict=True))
        ]
        sum_E = self.count_SE[rows].sum(0)
        given = [(name, sum_E[number]) for block in columns.blocks for number, name in enumerate(block.names)]
        if not self.wide:
            number = expert_number(cells[columns.roles["expert"]])
            given = [(columns.roles["count"], sum_E.sum() if number is None else sum_E[number : number + 1].sum())]
        for name, value in given:
            found = _parsed(cells[name], self.file.delimiter)
            if cells[name].strip() and not math.isclose(found, value, rel_tol=ROUNDED if value % 1 else 1e-9):
                what = f"{name} is {_short(cells[name])} in a row of totals, but the rows add up to {value:,.15g}"
                raise self.file.refuse(table.where[0], what, "wrong-total")

    def _one(self, key: tuple[str, ...], at: int, size: int, count_PE: Array, points: list[str]) -> Series:
        layer, split, *others = key
        labels = dict(zip(self.others, others, strict=True))
        top_ks = [self._top_k(labels[name], size, self.firsts[at]) for name in labels if name not in self.labels]
        return Series(
            self.file.name,
            labels,
            layer,
            split,
            self.count_SE[at, :size],
            float(self.token_SE[at].max()) if self.has_tokens else None,  # each expert's rows give all tokens
            top_ks[0] if top_ks else None,
            np.flatnonzero(self.row_SE[at, :size] == 0).tolist(),
            count_PE=count_PE,
            points=points,
        )

    def _series(self, table: _Table, layer: str | None, split: str | None) -> Array:
        """[R]: the number of each row's series; new series are opened. layer, split: None if cells give them."""
        roles, size = table.columns.roles, len(table.where)
        given = {"layer": layer, "split": split}
        columns = [
            table.cells[roles[role]] if text is None and role in roles else [default if text is None else text] * size
            for (role, text), default in zip(given.items(), ("0", "all"), strict=True)
        ]
        keys = list(zip(*columns, *(table.cells[name] for name in self.others), strict=True))
        new = [key for key in dict.fromkeys(keys) if key not in self.raw]
        first = dict(zip(reversed(keys), reversed(table.where), strict=True)) if new else {}
        for key in new:
            self._open(key, first[key])
        if len(self.ids) > SERIES:
            by = [*(roles[role] for role in ("layer", "split") if role in roles), *self.others]
            raise UsageError(
                f"{self.file.name} holds more than {SERIES} series, one for each combination of {listed(by)}; "
                "sum over one of them with --sum",
                code="too-many-series",
            )
        return np.fromiter(map(self.raw.__getitem__, keys), np.int64, len(keys))

    def _open(self, key: tuple[Any, ...], where: Any) -> None:
        texts = tuple(map(_label, key))
        if not texts[0]:
            raise self.file.refuse(where, "the layer is empty; write it in every row", "bad-label")
        if texts not in self.ids:
            self.ids[texts] = len(self.ids)
            self.firsts.append(where)
        self.raw[key] = self.ids[texts]

    def _numbers(self, name: str, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: a column of numbers from 0 on."""
        column = cells[name]
        usual: set[type] = {int, float} if self.file.typed else {str}
        try:
            value_R = np.fromiter(map(float, column), np.float64, len(column))
        except (ValueError, TypeError, OverflowError):
            value_R = np.full(len(column), math.nan)
        odd = not {*map(type, column)} <= usual if self.file.typed else "_" in "".join(column)
        if odd or not ((value_R >= 0) & (value_R <= LARGEST)).all():  # also for nan
            value_R = np.array([self._number(name, cell, at) for cell, at in zip(column, where, strict=True)])
        return value_R

    def _number(self, name: str, cell: Any, where: Any) -> float:
        """One number from 0 on, of a column in which not all are written plainly."""
        value = math.nan
        if not self.file.typed:
            value = _parsed(cell, self.file.delimiter)
        elif type(cell) in (int, float):
            value = _float(cell)
        if 0 <= value <= LARGEST:
            return value
        what = "which is not a number"
        if value < 0:
            logits = "; negative fractions look like a router's logits" if value % 1 else ""
            what = f"and a count is never below 0{logits}"
        elif value > LARGEST:
            what = f"and a count is never above {LARGEST:g}"
        elif not self.file.typed and re.fullmatch(r" *[0-9]{1,3},[0-9]{3} *", cell):
            what = "which may be a fraction or thousands; write it without a comma"
        raise self.file.refuse(where, f"{name} is {_short(cell)}, {what}", "bad-count")

    def _expert_column(self, name: str, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: the column that names experts, as whole numbers; "expert_3" is 3."""
        named = {cell for cell in {*cells[name]} if isinstance(cell, str) and (self.file.typed or _has_letter(cell))}
        number = {cell: number for cell in named if (number := expert_number(cell)) is not None}
        kind = int if self.file.typed else str
        bare = [kind(number[cell]) if cell in number else cell for cell in cells[name]] if number else cells[name]
        expert_R = self._numbers(name, {name: bare}, where)
        limit = self.experts or EXPERTS
        bad_R = (expert_R != np.floor(expert_R)) | (expert_R >= limit)
        if bad_R.any():
            row = int(bad_R.argmax())
            what = f"{name} is {_short(cells[name][row])}, but experts are whole numbers from 0 to {limit - 1}"
            raise self.file.refuse(where[row], what, "bad-expert")
        return expert_R.astype(np.int64)

    def _check_sizes(self, series_R: Array, size: int, where: Sequence[Any]) -> None:
        numbers, firsts = np.unique(series_R, return_index=True)
        for number, row in zip(numbers.tolist(), firsts.tolist(), strict=True):
            if (before := self.sizes.setdefault(number, size)) != size:
                what = f"it has {size} experts, but its layer has {before} further up"
                raise self.file.refuse(where[row], what, "expert-number-changed")

    def _total(self, series_N: Array, expert_N: Array, count_N: Array, tokens_N: Array, time_N: Array) -> None:
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
        if self.points:
            self.points.add(series_N, expert_N, count_N, time_N)

    def _top_k(self, text: str, size: int, where: Any) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:7]) <= size):
            what = f"'{text[:40]}' choices a token; with {size} experts it must be 1 to {size}"
            raise self.file.refuse(where, what, "bad-top-k")
        return int(text)


class _Points:
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
    return [" ".join(map(_label, times[at])) for at in order], rank


def _occurrence(code_N: Array) -> Array:
    """How often the same code came before."""
    order_N = np.argsort(code_N, kind="stable")
    sorted_N = code_N[order_N]
    starts = np.flatnonzero(np.diff(sorted_N, prepend=-1))
    lengths = np.diff([*starts.tolist(), len(code_N)])
    out_N = np.empty(len(code_N), np.int64)
    out_N[order_N] = np.arange(len(code_N)) - np.repeat(starts, lengths)
    return out_N


def _grown(total_SE: Array, shape: tuple[int, int]) -> Array:
    """The totals, padded with zeros to a larger shape."""
    grown_SE = np.zeros(shape)
    grown_SE[: total_SE.shape[0], : total_SE.shape[1]] = total_SE
    return grown_SE


# -- what is not counts ----------------------------------------------------------------------------


def _look_like_ids(count_ER: Array, of_tokens: bool) -> set[bool]:
    """Whether rows hold ids of the experts that a token chose: True for sure, False for sure, or nothing.

    Ids differ within a row; counts need not. of_tokens: a column numbers tokens. Without one it takes rows enough to
    expect repeats of the same numbers, and totals that vary as those of unrelated numbers do: counts of equal batches
    have equal totals, and those of different batches grow together.
    """
    size, rows = count_ER.shape
    if size > MOST_CHOICES:
        return {False}
    if (count_ER != np.floor(count_ER)).any() or (np.diff(np.sort(count_ER, axis=0), axis=0) == 0).any():
        return {False}
    if of_tokens:
        return {True} if (count_ER > 1).any() else set()
    values, code_N = np.unique(count_ER, return_inverse=True)
    if size < 2 or len(values) * size > CELLS:
        return set()
    often_EV = np.zeros((size, len(values)))
    np.add.at(often_EV, (np.repeat(np.arange(size), rows), code_N.reshape(-1)), 1 / rows)
    repeats = rows / 2 * float((often_EV.sum(0) ** 2 - (often_EV**2).sum(0)).sum())
    total_R = count_ER.sum(0)
    unrelated = 0.05 * total_R.mean() < total_R.std() < 1.1 * math.sqrt(count_ER.var(1).sum())
    return {True} if repeats >= SURE and unrelated else set()


def _refuse_unlikely(file: CountFile, sums: _Sums, series: Sequence[Series], summed: bool) -> None:
    """Raise UsageError for numbers that look like something else than counts or shares of a layer.

    summed: the user asked to sum over columns of this file.
    """
    if sums.ids_or_not == {True}:
        raise UsageError(
            f"{file.name} looks like the ids of the experts that each token chose, not counts: they all differ within "
            "a row; count how often each id occurs in a layer",
            code="expert-ids",
        )
    row_S = sums.row_SE.max(axis=1)
    shares = [(one, one.total / row_S[at]) for at, one in enumerate(series) if not one.whole]
    near = [_is_share(one, total) for one, total in shares]
    if shares and 2 * sum(near) < len(near):
        one, total = shares[near.index(False)]
        raise UsageError(
            f"{file.name} holds fractions that add up to {total:.6g} in {one.title()}, not to 1 or 100 %; they look "
            "like averages or scores, so give whole counts or shares of a layer",
            code="not-counts",
        )
    repeated = any(row_S[at] > 1 for at, one in enumerate(series) if not one.whole)
    if shares and (sums.of_tokens or (repeated and not sums.has_times and not summed)):
        raise UsageError(
            f"{file.name} looks like router probabilities of tokens, not counts: it has several rows of fractions for "
            "a layer, and no step; count the experts that each token chose, or add a column step to shares",
            code="router-probabilities",
        )
    seen_E = (sums.row_SE > 0).sum(axis=0)
    if sums.experts is None and len(seen_E) > 2 and not seen_E[0] and (seen_E[1:] == len(series)).all():
        raise UsageError(
            f"{file.name} seems to number its experts from 1 to {len(seen_E) - 1}; number them from 0 on, or give "
            f"--experts {len(seen_E)} if expert 0 is never chosen",
            code="experts-from-1",
        )


def _is_share(series: Series, total: float) -> bool:
    """Whether the rows of a series, of this total on average, are shares of assignments or of its tokens."""
    near = [one for one in (1.0, 100.0) if abs(total - one) <= ROUNDED * one]
    top_k = round(total)
    of_tokens = series.count_E.max() <= series.total / total and abs(total - top_k) <= ROUNDED
    return bool(near) or (1 <= top_k < len(series.count_E) and bool(of_tokens))


# -- cells -----------------------------------------------------------------------------------------


def _parsed(cell: str, delimiter: str) -> float:
    """A number as spreadsheets write it: 1,234 or 1 234 in thousands, 12.5%, 12,5 where a comma separates nothing.

    nan for anything else, and for 1,234 in a file of semicolons, where it may be a fraction, too.
    """
    text, scale = cell.strip(), 1.0
    if text.endswith("%"):
        text, scale = text[:-1].rstrip(), 100.0
    if re.fullmatch(r"[0-9]{1,3}(?:[ '\u00a0\u202f\u2019][0-9]{3})+", text):
        text = re.sub(r"[^0-9]", "", text)
    elif re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text):
        text = "" if delimiter == ";" and text.count(",") == 1 and "." not in text else text.replace(",", "")
    elif re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?", text):
        text = text.replace(".", "").replace(",", ".")
    elif delimiter != "," and re.fullmatch(r"[0-9]+,[0-9]+", text):
        text = text.replace(",", ".")
    return math.nan if "_" in text else _float(text) / scale


def _float(value: Any) -> float:
    """A number; nan if it is not one."""
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def _label(cell: Any) -> str:
    """A label as text; pandas writes whole numbers as 3.0 in a column with gaps."""
    text = str(cell).strip()
    return text[:-2] if re.fullmatch(r"[0-9]+\.0", text) else text


def _hashable(cell: Any) -> Any:
    return cell if type(cell) in (str, int, float) else str(cell)


def _has_letter(cell: str) -> bool:
    return any(map(str.isalpha, cell))


def _short(cell: Any) -> str:
    return f"'{str(cell).strip()[:40]}'"
