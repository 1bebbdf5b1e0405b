"""Read rows of routing counts from CSV, JSON and JSONL. Nothing here imports torch."""

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import attrs

from ..errors import UsageError, listed
from ..files import read_file
from .count_columns import (
    COUNTS,
    LAYER,
    ROLES,
    SPLITS,
    TIMES,
    expert_number,
    looks_like,
    names_expert,
    no_counts,
    plain,
)

MOST_PIPED = 1 << 26  # bytes of standard input
MOST_COLUMNS = 60_000  # of which a file of more experts needs none: it can have a row for each
CHUNK, MOST_CELLS = 2_000, 1_000_000  # rows and cells held at once; few enough to stay in the processor's cache
DELIMITERS = ",;\t|"
HOLDERS = ("layers", "blocks", "data", "records", "rows", "results")
DEEPEST = 8  # levels of JSON, of lists and objects in each other
SLACK = 0.1  # how far the totals of layers may differ where nothing but numbers says what they are

READ = "routing-stats reads CSV, JSON and JSONL text"
BINARY = (  # how a file begins, and what it is
    (b"\x1f\x8b", "is compressed with gzip"),
    (b"BZh", "is compressed with bzip2"),
    (b"\xfd7zXZ", "is compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
    (b"\x93NUMPY", "is a NumPy array (.npy)"),
    (b"PAR1", "is a Parquet file"),
    (b"ARROW1", "is an Arrow file"),
    (b"\x89HDF", "is an HDF5 file"),
    (b"SQLite format 3", "is an SQLite database"),
    (b"\x89PNG", "is a PNG image"),
    (b"%PDF", "is a PDF"),
)
ZIPPED = (  # what the name of a zip archive's first member says
    (b".npy", "is a NumPy archive (.npz)"),
    (b".pkl", "is a PyTorch file (.pt)"),
    (b"[Content_Types]", "is an Excel workbook or another Office file"),
)

Path_ = tuple[Any, ...]  # of a value in JSON: the keys and places that lead to it
Record = tuple[Path_, dict[str, Any]]  # a path, and fields by name; "counts" is a list, or an object by expert


@attrs.define(eq=False)
class Chunk:
    """Some rows of a file. names: the columns. where: each row's line or record number. rows: their cells."""

    names: list[str]
    where: Sequence[Any]
    rows: Sequence[Sequence[Any]]


@attrs.define(eq=False)
class CountFile:
    """An open file. typed: cells are JSON values, not text. unit: the unit of `where`, "line" or "record".

    header: of CSV, the line that names the columns, and its number from 0 on. notes: what a reader should know of how
    it was read.
    """

    name: str
    typed: bool
    unit: str
    text: str = attrs.field(repr=False)
    header: tuple[str, int] = ("", 0)
    delimiter: str = ","
    notes: list[str] = attrs.field(factory=list)

    def refuse(self, where: Any, what: str, code: str) -> UsageError:
        """The error that names a row."""
        return UsageError(f"{self.name}, {self.unit} {where}: {what}", code=code)

    def chunks(self) -> Iterator[Chunk]:
        """The rows in chunks. Raises UsageError for a row that is not CSV or JSON."""
        if not self.typed:
            return self._csv_chunks()
        return self._record_chunks(self._jsonl_records() if self.unit == "line" else self._json_records())

    def _csv_chunks(self) -> Iterator[Chunk]:
        reader = csv.reader(self._lines(), strict=True, skipinitialspace=True, delimiter=self.delimiter)
        try:
            names = _without_end([name.strip() for name in next(filter(any, reader), [])])
            line, blank = reader.line_num, [""] * len(names)
            while rows := list(islice(reader, min(CHUNK, 1 + MOST_CELLS // (1 + len(names))))):
                where: Sequence[int] = range(line + 1, reader.line_num + 1)
                if {*map(len, rows)} != {len(names)} or len(where) > len(rows) or blank in rows:
                    where, rows = _cleaned(line, rows, len(names))
                if rows:
                    yield Chunk(names, where, rows)
                line = reader.line_num
        except csv.Error as error:
            raise self.refuse(reader.line_num, f"this is not CSV: {error}", "invalid-csv") from error

    def check_width(self, columns: int) -> None:
        """Raise UsageError for more columns than can be handled in seconds."""
        if columns > MOST_COLUMNS:
            message = f"{self.name} has {columns:,} columns, more than {MOST_COLUMNS:,}; give each expert a row, with "
            raise UsageError(f"{message}the columns layer, expert and count", code="too-many-columns")

    def _lines(self) -> Iterable[str]:
        """The lines, those of comments emptied; the header of `numpy.savetxt`, a comment, is kept."""
        lines = io.StringIO(self.text, newline="")
        header, at = self.header
        if at == 0 and "#" not in self.text and self.delimiter != " ":
            return lines
        return (header if number == at else _uncommented(line) for number, line in enumerate(lines))

    def _jsonl_records(self) -> Iterator[Record]:
        for number, line in enumerate(io.StringIO(self.text, newline=""), 1):
            if not line.isspace():
                try:
                    value = _value(line)
                except (ValueError, RecursionError) as error:
                    raise self.refuse(number, f"this is not JSON: {error}", "invalid-json") from error
                yield from self._records(value, (number,), {})

    def _json_records(self) -> Iterator[Record]:
        try:
            value = _value(self.text)
        except json.JSONDecodeError as error:
            message = f"{self.name}, line {error.lineno}: this is not JSON: {error.msg}"
            raise UsageError(message, code="invalid-json") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.name} is not readable JSON: {error}", code="invalid-json") from error
        if isinstance(value, list) and not _is_matrix(value):
            for number, item in enumerate(value, 1):
                yield from self._records(item, (number,), {})
        elif value:
            yield from self._records(value, () if isinstance(value, list) or _nested(value) else (1,), {})

    def _records(self, value: Any, path: Path_, fields: dict[str, Any], named: bool = False) -> Iterator[Record]:
        """The records in a JSON value. fields: of the objects around it. named: a name says that it holds counts."""
        if len(path) > DEEPEST:
            raise self.refuse(_where(path), "it is nested too deep; give rows of a layer and its counts", "too-deep")
        if _is_vector(value, by_name=bool(fields)) and (fields or named or isinstance(value, dict)):
            yield path, {**fields, "counts": value}
        elif isinstance(value, list) and _is_matrix(value):
            yield from self._matrix(value, path, fields, named)
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                yield from self._records(item, (*path, number), fields)
        elif isinstance(value, dict):
            yield from self._object(value, path, fields)
        else:
            what = f"{str(value)[:40]!r} is not an object of names and numbers"
            raise self.refuse(_where(path), what, "not-a-record")

    def _matrix(self, lists: list[Any], path: Path_, fields: dict[str, Any], named: bool) -> Iterator[Record]:
        """Lists in a list, as layers; if no name says that they are counts, their totals must agree."""
        if "layer" in fields or (not named and not fields and any(isinstance(part, int) for part in path)):
            what = "its counts are lists in a list, of which nothing says what they are; name them, such as by step"
            raise self.refuse(_where(path), what, "nameless-lists")
        totals = [sum(numbers) for numbers in lists]
        if not named and min(totals) < (1 - SLACK) * max(totals):
            what = f"its lists add up to {min(totals):g} and {max(totals):g}, but layers of the same tokens agree"
            hint = 'if these are counts, name the layers, as in {"0": [5, 3], "1": [4, 4]}'
            raise UsageError(f"{self.name}: {what}; {hint}", code="nameless-lists")
        note = f"{self.name}: lists without names are taken as layers 0, 1, ..."
        self.notes += [note] if note not in self.notes else []
        for layer, numbers in enumerate(lists):
            yield (*path, layer), {**fields, "layer": layer, "counts": numbers}

    def _object(self, value: dict[str, Any], path: Path_, fields: dict[str, Any]) -> Iterator[Record]:
        """The records in an object: a table, one record, or objects and lists by layer, split or step."""
        if (table := _table(value)) is not None:
            for number, record in enumerate(table, 1):
                yield (*path, number), {**fields, **record}
            return
        inner = {name: item for name, item in value.items() if isinstance(item, list | dict)}
        own = {name: item for name, item in value.items() if name not in inner}
        if any(plain(name) in ROLES["layer"] for name in own):  # the name around it numbers rows, as in pandas
            fields = {name: item for name, item in fields.items() if name != "layer"}
        around = {**fields, **own}
        spelled = {plain(name): name for name in reversed(inner)}
        by_number = [name for name in ("experts", "expert") if isinstance(inner.get(name), dict)]  # a list may hold ids
        if counts := next((spelled[name] for name in (*COUNTS, *by_number) if name in spelled), None):
            yield from self._records(inner[counts], (*path, None), around, named=True)
        elif not inner or any(map(names_expert, around)):
            # only a list where a label belongs matters; the reader refuses it
            labels: dict[str, Any] = {name: inner[spelled[name]] for name in ("layer", "split") if name in spelled}
            yield path, {**around, **labels}
        elif holders := [name for name, item in inner.items() if plain(name) in HOLDERS or _are_objects(item)]:
            for name in holders:
                yield from self._records(inner[name], (*path, name), around)
        else:
            levels = {name: level for name in inner if (level := _level(name, fields, len(inner) == len(value)))}
            if not levels:
                raise no_counts(self.name, list(value))
            for name, level in levels.items():
                yield from self._records(inner[name], (*path, name), {**around, level: name})

    def _record_chunks(self, records: Iterator[Record]) -> Iterator[Chunk]:
        """Rows of records with equal names; a list of counts becomes columns, an object of them a row per expert."""
        names: list[str] = []
        held: dict[tuple[str, ...], tuple[list[Any], list[list[Any]]]] = {}
        for path, record in records:
            names = names or list(record)
            if record.keys() != set(names):
                differing = listed(sorted(record.keys() ^ set(names)))[:120]
                what = f"it and the first record differ in {differing}"
                raise self.refuse(_where(path), what, "uneven-records")
            columns, rows = _spread([name for name in names if name != "counts"], record)
            self.check_width(len(columns))
            at, cells = held.setdefault(columns, ([], []))
            at += [_where(path)] * len(rows)
            cells += rows
            if len(cells) >= CHUNK:
                yield Chunk(list(columns), *held.pop(columns))
        for columns, (at, cells) in held.items():
            yield Chunk(list(columns), at, cells)


def is_trace(file: Path) -> bool:
    """Whether this is the file of a routing trace; False for one that can't be read, or for a pipe."""
    if not file.is_file():
        return False
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            return length < file.stat().st_size and b"routing_trace" in opened.read(length)
    except OSError:
        return False


def open_counts(path: Path) -> CountFile:
    """A file, or standard input for "-". JSON begins with a bracket. Raises UsageError."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        content = _standard_input() if str(path) == "-" else read_file(path)
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}", code="unreadable-file") from error
    text = _decoded(name, content)
    if not text.strip():
        raise UsageError(f"{name} is empty; give it a header and rows of counts", code="no-counts")
    typed = text.lstrip()[0] in "[{"
    unit = "record" if typed and not _is_jsonl(text) else "line"
    if typed:
        return CountFile(name, typed, unit, text)
    header = _header(text)
    delimiter, columns = _fields(header[0])
    file = CountFile(name, typed, unit, text, header, delimiter)
    file.check_width(columns)  # before there is a string for each
    return file


def _standard_input() -> bytes:
    """All of standard input, which must end."""
    content: bytes = sys.stdin.buffer.read(MOST_PIPED + 1)
    if len(content) > MOST_PIPED:
        raise UsageError(f"standard input has more than {MOST_PIPED} bytes; name a file", code="too-large")
    return content


def _decoded(name: str, content: bytes) -> str:
    """The text of a file. Raises UsageError, which names the kind of a binary file."""
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as Excel and PowerShell write it
    if not utf16 and (kind := _binary(content)):
        advice = "unpack it first" if "compressed" in kind else "write the counts to such a file"
        raise UsageError(f"{name} {kind}; {READ}: {advice}", code="binary-file")
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{name}, line {line}: this is not UTF-8; save the file as UTF-8 text"
        raise UsageError(message, code="not-utf8") from error


def _binary(content: bytes) -> str | None:
    """What a binary file is; None of text."""
    if content.startswith(b"PK\x03\x04"):
        member = content[30 : 30 + int.from_bytes(content[26:28], "little")]
        return next((kind for part, kind in ZIPPED if part in member), "is a zip archive")
    if len(content) > 8 and content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        return "is a safetensors file"
    if content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a Python pickle, such as an older PyTorch file (.pt)"
    known = next((kind for start, kind in BINARY if content.startswith(start)), None)
    return known or ("is a binary file" if b"\0" in content[:100_000] else None)


# -- CSV -------------------------------------------------------------------------------------------


def _header(text: str) -> tuple[str, int]:
    """The line that names the columns, and its number from 0 on: the first one that is not a comment.

    If that line holds numbers alone, the names are in the comment right before it, as `numpy.savetxt` writes them.
    """
    comment = ("", 0)
    for number, line in enumerate(io.StringIO(text, newline="")):
        bare = line.strip()
        if bare.startswith("#"):
            comment = (bare.lstrip("# "), number)
        elif bare and not re.fullmatch(r"sep=.", bare):  # Excel's first line
            named = comment[0] and comment[1] == number - 1 and _fields(comment[0])[1] == _fields(bare)[1]
            return comment if named and _only_numbers(bare) else (line, number)
    return comment


def _fields(line: str) -> tuple[str, int]:
    """What separates the fields of a line, and their number."""
    bare = re.sub(r'"[^"]*"', "x", line.strip())
    best = max(DELIMITERS, key=bare.count)
    if best in bare:
        return best, bare.count(best) + 1
    return (" ", len(bare.split())) if " " in bare else (",", 1)


def _only_numbers(line: str) -> bool:
    try:
        return bool([float(cell) for cell in re.split(rf"[{DELIMITERS} ]+", line.replace('"', "")) if cell])
    except ValueError:
        return False


def _uncommented(line: str) -> str:
    bare = line.lstrip(" ")
    return "\n" if bare.startswith(("#", "sep=")) else bare


def _without_end(names: list[str]) -> list[str]:
    """Names without the empty ones at the end."""
    while names and not names[-1]:
        names.pop()
    return names


def _cleaned(line: int, rows: list[list[str]], width: int) -> tuple[list[int], list[list[str]]]:
    """The last line of each row that is not empty, and those rows without empty cells beyond the header.

    A cell may contain line breaks.
    """
    ends = accumulate(1 + sum(cell.count("\n") for cell in row) for row in rows)
    kept = [(line + end, row) for end, row in zip(ends, rows, strict=True) if any(row)]
    return [end for end, _ in kept], [row[:width] if not any(row[width:]) else row for _, row in kept]


# -- JSON ------------------------------------------------------------------------------------------


def _is_jsonl(text: str) -> bool:
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(_value(first), dict)
    except (ValueError, RecursionError):
        return False


def _nested(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, list | dict) for item in value.values())


def _is_vector(value: Any, by_name: bool) -> bool:
    """Whether a value holds one number per expert: a list of scalars, or {expert: number}; by_name: also of "e0"."""
    if isinstance(value, list):
        return bool(value) and not any(isinstance(item, list | dict) for item in value)
    if not isinstance(value, dict) or not value or any(isinstance(item, list | dict) for item in value.values()):
        return False
    return all(name.isdigit() or (by_name and expert_number(name) is not None) for name in value)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, list) and item and {*map(type, item)} <= {int, float} for item in value)
    )


def _table(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table by columns, such as {"expert": [0, 1], "count": [5, 3]}; of anything else None.

    Pandas and W&B write {"columns": [...], "data": [[...], ...]} too, and pandas {"expert": {"0": 0}, ...}.
    """
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]
    spelled = {plain(name) for name in value}
    long = not spelled.isdisjoint(ROLES["expert"]) and not spelled.isdisjoint(COUNTS)
    wide = any(map(names_expert, spelled))
    sizes = {len(column) if isinstance(column, list | dict) else -1 for column in value.values()}
    if -1 in sizes or len(sizes) != 1 or not (wide or long):
        return None
    index = next(([*column] for column in value.values() if isinstance(column, dict)), None)
    lists = [[*column.values()] if isinstance(column, dict) else column for column in value.values()]
    columns = {**({"": index} if index else {}), **dict(zip(value, lists, strict=True))}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _level(name: str, fields: dict[str, Any], alone: bool) -> str | None:
    """What the name of a list or object is one of: a layer, a split or a step. alone: it stands alone."""
    words = plain(name).split("_")
    if words[0] in SPLITS and "split" not in fields:
        return "split"
    if words[0] in TIMES and words[-1].isdigit() and words[0] not in fields:
        return words[0]
    if (name.isdigit() or LAYER.search(plain(name))) and "layer" not in fields:
        return "layer"
    free = [level for level in ("layer", "split") if level not in fields]
    return free[0] if free and alone and not looks_like([name]) else None


def _spread(names: list[str], record: dict[str, Any]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """The columns and rows of a record."""
    fields, counts = [record[name] for name in names], record.get("counts")
    if isinstance(counts, list):
        return (*names, *(f"e{number}" for number in range(len(counts)))), [[*fields, *counts]]
    if isinstance(counts, dict):
        return (*names, "expert", "count"), [[*fields, expert_number(name), count] for name, count in counts.items()]
    return (*names, *(["counts"] if "counts" in record else [])), [[*fields, *([counts] if "counts" in record else [])]]


def _where(path: Path_) -> Any:
    return ", ".join(repr(part) for part in path if part is not None) or 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names must all differ."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"an object has the name {twice[:40]!r} twice")
    return record


_value = json.JSONDecoder(object_pairs_hook=_unique).decode
