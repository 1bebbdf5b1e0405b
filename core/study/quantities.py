"""Quantities of a finished cell by name: `[SCOPE.]NAME[:max|:min]`.

SCOPE: none is the test set; `tail` the last tenth of the training steps, loads added up; `after_growth` the largest
value at the log points from 60 steps after the last growth; `stepN` and `evalN` the log point and the evaluation at
step N. NAME: a number of summary.json, of its measures or of its layers; `top_share` and `active_1pct` of the load;
`found.METRIC`, 1 if a finding has that name; `flops.active` and the cell's other numbers by path. Several layers are
averaged, unless :max or :min is given.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np

from ..analysis.count_series import Series
from ..analysis.routing_stats import row_of
from ..registry.discovery import defaults
from ..registry.manager import Plugins
from ..run.folder import number_of
from .grid import FINISHED, Record

AFTER_GROWTH = 60  # steps after the last growth
OF_LOAD: dict[str, Callable[[Sequence[float]], float]] = {
    "top_share": max,
    "active_1pct": lambda load: float(sum(share >= 0.01 for share in load)),
}
FOLD: dict[str, Callable[[Sequence[float]], float]] = {"": fmean, "max": max, "min": min}
SCOPE = re.compile(r"(?:(tail|after_growth|step(\d+)|eval(\d+))\.)?([^:]+?)(?::(max|min))?")


def quantity(record: Record, name: str) -> float | None:
    """A finished cell's quantity; None if it has none of that name."""
    match = SCOPE.fullmatch(name)
    if match is None or record["status"] != FINISHED:
        return None
    scope, step, evaluation, bare_name, fold_name = match.groups()
    fold = FOLD[fold_name or ""]
    if scope is None:
        return _of_test(record, bare_name, fold)
    if scope == "tail":
        return _of_tail(record, _points(record, "train"), bare_name, fold)
    if scope == "after_growth":
        last = max((point["step"] for point in _points(record, "growth")), default=0)
        points = [point for point in _points(record, "train") if point["step"] >= last + AFTER_GROWTH]
        values = [_of_point(point, bare_name, max) for point in points]
        return max((value for value in values if value is not None), default=None)
    points = _points(record, "eval" if evaluation else "train")
    at = int(step or evaluation)
    return next((_of_point(point, bare_name, fold) for point in points if point["step"] == at), None)


def _points(record: Record, split: str) -> list[Record]:
    return [point for point in record["records"] if point["split"] == split]


def _of_test(record: Record, name: str, fold: Callable[[Sequence[float]], float]) -> float | None:
    summary = record["summary"]
    if name.startswith("found."):
        words = {word for finding in summary["findings"] for word in (finding["metric"], finding["name"])}
        return float(name.removeprefix("found.") in words)
    if name in summary["measures"]:
        return _number(summary["measures"][name])
    values = [value for layer in summary["layers"] if (value := _of_layer(layer, name)) is not None]
    if values:
        return fold(values)
    found = number_of(summary, name)
    return _number(found if found is not None else _path(record, name))


def _of_tail(
    record: Record, points: Sequence[Record], name: str, fold: Callable[[Sequence[float]], float]
) -> float | None:
    last = [point for point in points if point["step"] > 0.9 * points[-1]["step"]]
    if name in last[-1] and name != "layers":
        return fmean(point[name] for point in last)
    layers = record["summary"]["layers"]
    values = [value for layer in layers if (value := _tail_of_layer(layer, last, name)) is not None]
    return fold(values) if values else None


def _tail_of_layer(layer: Mapping[str, Any], points: Sequence[Record], name: str) -> float | None:
    """Of the summed loads of those log points at which the layer had as many experts as at the end."""
    numbers = [point["layers"].get(layer["name"], {}) for point in points]
    loads = [np.array(entry["load"]) for entry in numbers if len(entry.get("load") or ()) == layer["experts"]]
    if not loads:
        return None
    load = np.mean(loads, axis=0)
    return _of_layer({**_balance(tuple(load), layer["top_k"]), "load": list(load)}, name)


@cache
def _balance(load: tuple[float, ...], top_k: int) -> dict[str, Any]:
    row, _ = row_of(_metrics(), Series("", {}, "", "", np.array(load), top_k=top_k))
    return row


@cache
def _metrics() -> Plugins:
    return Plugins((defaults()["router"],))


def _of_point(point: Record, name: str, fold: Callable[[Sequence[float]], float]) -> float | None:
    if name in point and name != "layers":
        return _number(point[name])
    values = [value for numbers in point["layers"].values() if (value := _of_layer(numbers, name)) is not None]
    return fold(values) if values else None


def _of_layer(numbers: Mapping[str, Any], name: str) -> float | None:
    if name in OF_LOAD:
        return OF_LOAD[name](numbers["load"]) if numbers.get("load") else None
    return _number(numbers.get(name))


def _path(record: Mapping[str, Any], name: str) -> Any:
    """record["a"]["b"] for "a.b"."""
    found: Any = record
    for word in name.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
