"""The numbers of a finished cell by name: `[SCOPE.]NAME[:max|:min]`.

SCOPE: none is the test set; `tail` the last tenth of the training steps, loads added up; `settled` the log points from
60 steps after the last growth on, of which the largest counts; `stepN` and `evalN` the log point and the evaluation
at step N. NAME: a number of summary.json, of its measures or of its layers; `top_share` and `active_1pct` of the
load; `found.METRIC`, 1 where a finding has that name; `flops.active` and the other numbers of a cell by path. Of
several layers the mean counts, unless :max or :min.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np

from ..analysis.counts import Series
from ..analysis.routing_stats import row_of
from ..registry.discovery import defaults
from ..registry.manager import Plugins
from ..run.folder import number_of
from .grid import Record

SETTLED = 60  # steps after the last growth
OF_LOAD: dict[str, Callable[[Sequence[float]], float]] = {
    "top_share": max,
    "active_1pct": lambda load: float(sum(share >= 0.01 for share in load)),
}
FOLD: dict[str, Callable[[Sequence[float]], float]] = {"": fmean, "max": max, "min": min}
SCOPE = re.compile(r"(?:(tail|settled|step(\d+)|eval(\d+))\.)?([^:]+?)(?::(max|min))?")


def quantity(record: Record, name: str) -> float | None:
    """A finished cell's number; None where it has none."""
    match = SCOPE.fullmatch(name)
    if match is None or record["status"] != "finished":
        return None
    scope, step, evaluation, plain, how = match.groups()
    if scope is None:
        return _of_test(record, plain, FOLD[how or ""])
    points = [one for one in record["records"] if one["split"] == "train"]
    if scope == "tail":
        return _of_tail(record, points, plain, FOLD[how or ""])
    if scope == "settled":
        last = max((one["step"] for one in record["records"] if one["split"] == "growth"), default=0)
        values = [_of_point(one, plain, max) for one in points if one["step"] >= last + SETTLED]
        return max((value for value in values if value is not None), default=None)
    if evaluation:
        points = [one for one in record["records"] if one["split"] == "eval"]
    at = int(step or evaluation)
    return next((_of_point(one, plain, FOLD[how or ""]) for one in points if one["step"] == at), None)


def _of_test(record: Record, name: str, fold: Callable[[Sequence[float]], float]) -> float | None:
    summary = record["summary"]
    if name.startswith("found."):
        words = {word for one in summary["findings"] for word in (one["metric"], one["name"])}
        return float(name.removeprefix("found.") in words)
    if name in summary["measures"]:
        return _number(summary["measures"][name])
    own = [_of_layer(layer, name) for layer in summary["layers"]]
    values = [value for value in own if value is not None]
    if values:
        return fold(values)
    found = number_of(summary, name)
    return _number(found if found is not None else _path(record, name))


def _of_tail(
    record: Record, points: Sequence[Record], name: str, fold: Callable[[Sequence[float]], float]
) -> float | None:
    last = [one for one in points if one["step"] > 0.9 * points[-1]["step"]]
    if name in last[-1] and name != "layers":
        return fmean(one[name] for one in last)
    values = [_tail_of_layer(layer, last, name) for layer in record["summary"]["layers"]]
    known = [value for value in values if value is not None]
    return fold(known) if known else None


def _tail_of_layer(layer: Mapping[str, Any], points: Sequence[Record], name: str) -> float | None:
    """Of the loads of the log points added up, those with as many experts as at the end."""
    own = [one["layers"].get(layer["name"], {}) for one in points]
    loads = [np.array(one["load"]) for one in own if one.get("load") and len(one["load"]) == layer["experts"]]
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
    values = [value for own in point["layers"].values() if (value := _of_layer(own, name)) is not None]
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
