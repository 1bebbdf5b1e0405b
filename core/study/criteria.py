"""Criteria: did the measurements meet what a study expected?"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import attrs

from .spec import Criterion, matches
from .statistics import interval

Row = Mapping[str, Any]  # of a study's results: "part", "at", "variant", "seeds" and "numbers"
PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": (">=", operator.ge),
    "at_most": ("<=", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}
OVER = {
    "each": "each seed",
    "some": "some seed",
    "mean": "the mean",
    "interval": "the whole interval",
    "within": "an end of the interval",
}


@attrs.frozen
class Judgement:
    """A judged criterion. value, half: of the worst variant. variant: its name, or that of an unmeasured one."""

    claim: str
    verdict: str
    limit: str
    value: float | None
    half: float | None
    variant: str | None


def judge(criterion: Criterion, rows: Sequence[Row]) -> Judgement:
    """Judge a criterion on a study's rows; it passes if every row that `where` names meets it."""
    limit_kind, limit = next((kind, value) for kind in LIMITS if (value := getattr(criterion, kind)) is not None)
    sign, meets = LIMITS[limit_kind]
    limit_text = f"{_quantity_text(criterion)} {sign} {limit:g}"
    named = [row for row in rows if matches(row, criterion.where)]
    measured = [(row, list(_values(criterion, row, rows, limit_kind).values())) for row in named]
    missing = [row for row, values in measured if not values]
    if missing or not named:
        variant = missing[0]["variant"] if missing else None
        return Judgement(criterion.claim, NOT_MEASURED, limit_text, None, None, variant)
    upward = sign.startswith(">")
    results = [
        (_passes(criterion.over, values, lambda value: meets(value, limit)), _central(criterion.over, values, upward))
        for _, values in measured
    ]
    worst = min(range(len(results)), key=lambda i: (results[i][0], results[i][1] * (1 if upward else -1)))
    (passes, value), (row, values) = results[worst], measured[worst]
    verdict = PASSED if passes else FAILED
    return Judgement(criterion.claim, verdict, limit_text, value, interval(values).half, row["variant"])


def _quantity_text(criterion: Criterion) -> str:
    """The judged quantity in words: "loss, ratio to the best of A, B: the mean"."""
    over = OVER[criterion.over]
    if not criterion.against:
        return f"{criterion.quantity}: {over}"
    references = [name for names in criterion.against.values() for name in names]
    best = "the best of " if len(references) > 1 else ""
    return f"{criterion.quantity}, {criterion.compare} to {best}{', '.join(references)}: {over}"


def _values(criterion: Criterion, row: Row, rows: Sequence[Row], limit_kind: str) -> dict[int, float]:
    """By seed: the row's quantity, or its ratio or difference to that of the best reference."""
    values = _by_seed(row, criterion.quantity)
    if not criterion.against:
        return values
    references = [
        found for other in _references(criterion, row, rows) if (found := _by_seed(other, criterion.quantity))
    ]
    if not values or not references:
        return {}
    best = (min if limit_kind in ("at_most", "below") else max)(references, key=lambda found: fmean(found.values()))
    relate = operator.truediv if criterion.compare == "ratio" else operator.sub
    if criterion.over == "mean":  # of means: the numbers of seeds may differ
        return {0: relate(fmean(values.values()), fmean(best.values()))}
    return {seed: relate(values[seed], best[seed]) for seed in values.keys() & best.keys()}


def _references(criterion: Criterion, row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """The rows that match `against` and differ from this one on no other axis that both have."""
    place = {"part": row["part"], **row["at"]}
    for other in rows:
        other_place = {"part": other["part"], **other["at"]}
        shared = place.keys() & other_place.keys() - criterion.against.keys()
        if matches(other, criterion.against) and all(place[axis] == other_place[axis] for axis in shared):
            yield other


def _by_seed(row: Row, quantity: str) -> dict[int, float]:
    values = row["numbers"].get(quantity, {"values": ()})["values"]
    return {seed: value for seed, value in zip(row["seeds"], values, strict=False) if value is not None}


def _passes(over: str, values: Sequence[float], meets: Callable[[float], bool]) -> bool:
    spread = interval(values)
    ends = (spread.mean - (spread.half or 0), spread.mean + (spread.half or 0))
    return {
        "each": all(map(meets, values)),
        "some": any(map(meets, values)),
        "mean": meets(spread.mean),
        "interval": spread.half is not None and all(map(meets, ends)),
        "within": any(map(meets, ends)),
    }[over]


def _central(over: str, values: Sequence[float], upward: bool) -> float:
    """The value that is compared with the limit: the worst seed, the best one, or the mean."""
    if over == "each":
        return min(values) if upward else max(values)
    if over == "some":
        return max(values) if upward else min(values)
    return fmean(values)
