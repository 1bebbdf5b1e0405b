"""Bars: is what a study expects what was measured?"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import attrs

from .spec import Bar
from .statistics import interval

Row = Mapping[str, Any]  # of a study's table: "part", "at", "seeds" and "numbers"
HELD, MISSED, UNKNOWN = "held", "missed", "not measured"
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": (">=", operator.ge),
    "at_most": ("<=", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}


@attrs.frozen
class Judged:
    """One bar held against the rows. value: of the variant that is worst, or the first one missing."""

    says: str
    verdict: str
    limit: str
    value: float | None
    half: float | None
    variant: str | None


def judge(bar: Bar, rows: Sequence[Row]) -> Judged:
    """The bar against a study's rows; it must hold for each that it names."""
    name, limit = next((name, getattr(bar, name)) for name in LIMITS if getattr(bar, name) is not None)
    sign, holds = LIMITS[name]
    said = f"{_what(bar)} {sign} {limit:g}"
    named = [row for row in rows if _within(row, bar.where)]
    found = [(row, list(_values(bar, row, rows, name).values())) for row in named]
    missing = [row for row, values in found if not values]
    if missing or not named:
        return Judged(bar.says, UNKNOWN, said, None, None, missing[0]["variant"] if missing else None)
    results = [(row, values, _held(bar.over, values, lambda value: holds(value, limit))) for row, values in found]
    upward = sign.startswith(">")
    worst = min(results, key=lambda one: (one[2], _central(bar.over, one[1], upward) * (1 if upward else -1)))
    row, values, held = worst
    spread = interval(values)
    value = _central(bar.over, values, upward)
    return Judged(bar.says, HELD if held else MISSED, said, value, spread.half, row["variant"])


def _what(bar: Bar) -> str:
    seeds = {"each": "each seed", "some": "some seed", "mean": "the mean", "interval": "the interval"}
    over = seeds.get(bar.over, "what the interval reaches")
    if not bar.against:
        return f"{bar.quantity}: {over}"
    others = ", ".join(name for names in bar.against.values() for name in names)
    best = "the best of " if len([*others.split(", ")]) > 1 else ""
    return f"{bar.quantity}, {bar.compare} to {best}{others}: {over}"


def _within(row: Row, where: Mapping[str, Sequence[str]]) -> bool:
    place = {"part": row["part"], **row["at"]}
    return all(place.get(axis) in choices for axis, choices in where.items())


def _values(bar: Bar, row: Row, rows: Sequence[Row], limit: str) -> dict[int, float]:
    """By seed: the quantity, or how it stands to that of the best reference."""
    own = _of(row, bar.quantity)
    if not bar.against:
        return own
    references = [values for one in _twins(bar, row, rows) if (values := _of(one, bar.quantity))]
    if not own or not references:
        return {}
    best = (min if limit in ("at_most", "below") else max)(references, key=lambda values: fmean(values.values()))
    relate = operator.truediv if bar.compare == "ratio" else operator.sub
    if bar.over == "mean":  # of means: the seeds need not be as many
        return {0: relate(fmean(own.values()), fmean(best.values()))}
    return {seed: relate(own[seed], best[seed]) for seed in own.keys() & best.keys()}


def _twins(bar: Bar, row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """The rows that are what `against` says, and differ from this one on no other axis that both have."""
    for one in rows:
        place = {"part": one["part"], **one["at"]}
        mine = {"part": row["part"], **row["at"]}
        same = all(place[axis] == mine[axis] for axis in place.keys() & mine.keys() - bar.against.keys())
        if same and _within(one, bar.against):
            yield one


def _of(row: Row, quantity: str) -> dict[int, float]:
    """The values by seed."""
    values = row["numbers"].get(quantity, {"values": ()})["values"]
    return {seed: value for seed, value in zip(row["seeds"], values, strict=False) if value is not None}


def _held(over: str, values: Sequence[float], holds: Callable[[float], bool]) -> bool:
    spread = interval(values)
    ends = (spread.mean - (spread.half or 0), spread.mean + (spread.half or 0))
    return {
        "each": all(map(holds, values)),
        "some": any(map(holds, values)),
        "mean": holds(spread.mean),
        "interval": spread.half is not None and all(map(holds, ends)),
        "within": any(map(holds, ends)),
    }[over]


def _central(over: str, values: Sequence[float], upward: bool) -> float:
    """The value that is held against the limit: the worst seed, the best one, or the mean."""
    if over == "each":
        return min(values) if upward else max(values)
    if over == "some":
        return max(values) if upward else min(values)
    return fmean(values)
