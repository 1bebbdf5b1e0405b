"""Routing counts by layer and split, summed from the rows of a file. Nothing here imports torch.

Suffixes: R rows, N numbers, S series, E experts, P points in time.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, listed
from .count_cells import has_letter, hashable, label_text, parsed, quoted, to_float
from .count_checks import ROUNDED, Evidence, look_like_ids, refuse_unlikely
from .count_columns import TOTAL_ROWS, Columns, Rows, expert_number, pick_labels, plain
from .count_files import Chunk, CountFile, open_counts
from .count_points import CELLS, Points
from .count_series import Header, Series

LARGEST, EXPERTS, SERIES = 1e15, 100_000, 10_000  # anything larger must be a mistake
NAMED = 6  # names in a note

Array = NDArray[Any]
Cells = Mapping[str, Sequence[Any]]  # columns by name


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
    refuse_unlikely(file, sums.evidence(), series, summed=bool({*over} & sums.names))
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
        names: list[str] | None = None
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
                what = f"{name} is {quoted(cells[name][at])}, which is not a label"
                raise self.file.refuse(chunk.where[at], what, "bad-label")
        if self.file.typed:
            free = (*columns.summed, *columns.candidates)
            cells |= {name: ["" if cell is None else hashable(cell) for cell in cells[name]] for name in free}
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
        self.points = Points() if each_row else None
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
                self.ids_or_not |= look_like_ids(count_ER, self.of_tokens)
            expert_ER = np.repeat(np.arange(size), len(series_R))
            series_N, tokens_N, time_N = (np.tile(one_R, size) for one_R in (series_R, tokens_R, time_R))
            self._total(series_N, expert_ER, count_ER.ravel(), tokens_N, time_N)

    def evidence(self) -> Evidence:
        """What the rows show about the file."""
        return Evidence(self.row_SE, self.ids_or_not, self.of_tokens, self.has_times, self.experts)

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
        texts = [label_text(cells[name]) if name is not None else "" for name in named]
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
            found = parsed(cells[name], self.file.delimiter)
            if cells[name].strip() and not math.isclose(found, value, rel_tol=ROUNDED if value % 1 else 1e-9):
                what = f"{name} is {quoted(cells[name])} in a row of totals, but the rows add up to {value:,.15g}"
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
        texts = tuple(map(label_text, key))
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
            value = parsed(cell, self.file.delimiter)
        elif type(cell) in (int, float):
            value = to_float(cell)
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
        raise self.file.refuse(where, f"{name} is {quoted(cell)}, {what}", "bad-count")

    def _expert_column(self, name: str, cells: Cells, where: Sequence[Any]) -> Array:
        """[R]: the column that names experts, as whole numbers; "expert_3" is 3."""
        named = {cell for cell in {*cells[name]} if isinstance(cell, str) and (self.file.typed or has_letter(cell))}
        number = {cell: number for cell in named if (number := expert_number(cell)) is not None}
        kind = int if self.file.typed else str
        bare = [kind(number[cell]) if cell in number else cell for cell in cells[name]] if number else cells[name]
        expert_R = self._numbers(name, {name: bare}, where)
        limit = self.experts or EXPERTS
        bad_R = (expert_R != np.floor(expert_R)) | (expert_R >= limit)
        if bad_R.any():
            row = int(bad_R.argmax())
            what = f"{name} is {quoted(cells[name][row])}, but experts are whole numbers from 0 to {limit - 1}"
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


def _grown(total_SE: Array, shape: tuple[int, int]) -> Array:
    """The totals, padded with zeros to a larger shape."""
    grown_SE = np.zeros(shape)
    grown_SE[: total_SE.shape[0], : total_SE.shape[1]] = total_SE
    return grown_SE
