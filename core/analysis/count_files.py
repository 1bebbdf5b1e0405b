"""Read rows of routing counts from CSV, JSON and JSONL. Nothing here imports torch."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import attrs

from ..errors import UsageError, listed

CHUNK = 2_000  # rows held at once; few enough to stay in the processor's cache


@attrs.define(eq=False)
class Chunk:
    """Some rows of a file. names: the columns. where: each row's line or record number. rows: their cells."""

    names: list[str]
    where: Sequence[Any]
    rows: Sequence[Sequence[Any]]


@attrs.define(eq=False)
class CountFile:
    """An open file. typed: cells are JSON values, not text. unit: the unit of `where`, "line" or "record"."""

    name: str
    typed: bool
    unit: str
    content: bytes = attrs.field(repr=False)

    def refuse(self, where: Any, what: str, code: str) -> UsageError:
        """The error that names a row."""
        return UsageError(f"{self.name}, {self.unit} {where}: {what}", code=code)

    def chunks(self) -> Iterator[Chunk]:
        """The rows in chunks. Raises UsageError for a row that is not CSV or JSON."""
        if not self.typed:
            return self._csv_chunks()
        return self._record_chunks(self._jsonl_records() if self.unit == "line" else self._json_records())

    def _text(self, newline: str | None) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(self.content), "utf-8-sig", newline=newline)

    def _csv_chunks(self) -> Iterator[Chunk]:
        reader = csv.reader(self._text(""), strict=True, skipinitialspace=True)
        try:
            names = [name.strip() for name in next(filter(None, reader))]
            line = reader.line_num
            while rows := list(islice(reader, CHUNK)):
                where: Sequence[int] = range(line + 1, reader.line_num + 1)
                if len(where) > len(rows) or [] in rows:
                    where, rows = _without_empty(line, rows)
                if rows:
                    yield Chunk(names, where, rows)
                line = reader.line_num
        except csv.Error as error:
            raise self.refuse(reader.line_num, f"this is not CSV: {error}", "invalid-csv") from error

    def _jsonl_records(self) -> Iterator[tuple[Any, Any]]:
        for number, line in enumerate(self._text(None), 1):
            if not line.isspace():
                try:
                    yield number, _value(line)
                except (ValueError, RecursionError) as error:
                    raise self.refuse(number, f"this is not JSON: {error}", "invalid-json") from error

    def _json_records(self) -> Iterator[tuple[Any, Any]]:
        """A list of records, one record, or {layer: counts} or {layer: {split: counts}}."""
        try:
            value = _value(self.content.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            message = f"{self.name}, line {error.lineno}: this is not JSON: {error.msg}"
            raise UsageError(message, code="invalid-json") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.name} is not readable JSON: {error}", code="invalid-json") from error
        if isinstance(value, list):
            yield from enumerate(value, 1)
        elif "counts" in value or not all(isinstance(field, list | dict) for field in value.values()):
            yield 1, value
        else:
            for layer, by_split in value.items():
                for split, counts in (by_split if isinstance(by_split, dict) else {"all": by_split}).items():
                    yield f"{layer!r}, {split!r}", {"layer": layer, "split": split, "counts": counts}

    def _record_chunks(self, records: Iterator[tuple[Any, Any]]) -> Iterator[Chunk]:
        """Rows from records with equal names; a list of `counts` becomes columns, the same number in each chunk."""
        names: list[str] = []
        held: dict[int, tuple[list[Any], list[list[Any]]]] = {}
        for where, record in records:
            if not isinstance(record, dict):
                raise self.refuse(where, f"{str(record)[:40]!r} is not an object of names and numbers", "not-a-record")
            names = names or list(record)
            if record.keys() != set(names):
                differing = listed(sorted(record.keys() ^ set(names)))[:120]
                raise self.refuse(where, f"it and the first record differ in {differing}", "uneven-records")
            counts = record.get("counts")
            spread = counts if isinstance(counts, list) else []
            at, rows = held.setdefault(len(spread), ([], []))
            at.append(where)
            rows.append([*(record[name] for name in names if not spread or name != "counts"), *spread])
            if len(rows) == CHUNK:
                yield Chunk(_columns(names, len(spread)), *held.pop(len(spread)))
        for size, (at, rows) in held.items():
            yield Chunk(_columns(names, size), at, rows)


def open_counts(path: Path) -> CountFile:
    """A file, or standard input for "-". JSON begins with a bracket. Raises UsageError."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}", code="unreadable-file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{name}, line {line}: this is not UTF-8; save the file as UTF-8 text"
        raise UsageError(message, code="not-utf8") from error
    if not text.strip():
        raise UsageError(f"{name} is empty; give it a header and rows of counts", code="no-counts")
    typed = text.lstrip()[0] in "[{"
    return CountFile(name, typed, "record" if typed and not _is_jsonl(text) else "line", content)


def _is_jsonl(text: str) -> bool:
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(_value(first), dict)
    except (ValueError, RecursionError):
        return False


def _without_empty(line: int, rows: list[list[str]]) -> tuple[list[int], list[list[str]]]:
    """The last line of each row that is not empty, and those rows; a cell may contain line breaks."""
    ends = accumulate(1 + sum(cell.count("\n") for cell in row) for row in rows)
    kept = [(line + end, row) for end, row in zip(ends, rows, strict=True) if row]
    return [end for end, _ in kept], [row for _, row in kept]


def _columns(names: list[str], size: int) -> list[str]:
    """The names of columns, with `counts` replaced by `size` columns unless that is 0."""
    return [*(name for name in names if name != "counts"), *(f"e{at}" for at in range(size))] if size else names


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names must all differ."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice[:40]!r} twice")
    return record


_value = json.JSONDecoder(object_pairs_hook=_unique).decode
