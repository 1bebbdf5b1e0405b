"""What a run recorded, by metric and by expert."""

from typing import Any

import numpy as np

from ..contract.run import Run


def series(run: Run, split: str, name: str, layer: str | None = None) -> tuple[list[int], list[Any]]:
    """(steps, values) of a metric over a run: a layer's, or the mean over the layers that have it."""
    steps, values = [], []
    for record in run.records:
        overall = record.get(name) if layer is None else None
        of = record["layers"].values() if layer is None else [record["layers"].get(layer, {})]
        layers = [metrics.get(name) for metrics in of]
        found: list[Any] = [value for value in ([overall] if overall is not None else layers) if value is not None]
        if record["split"] == split and found:
            steps.append(record["step"])
            values.append(found[0] if len(found) == 1 else float(np.mean(found)))
    return steps, values


def growths(run: Run, layer: str | None = None) -> list[dict[str, Any]]:
    """The growths of a run, or of one of its layers, oldest first."""
    events = [record["growth"] for record in run.records if record["split"] == "growth"]
    return [event for event in events if layer in (None, event["layer"])]


def lives(run: Run, layer: str) -> tuple[list[tuple[int, dict[int, float]]], dict[int, int], dict[int, int]]:
    """(step and load share by identity at each log point, step of creation, step of removal) of a layer's experts.

    An expert's index may change when others are removed; its identity, the order of creation, does not.
    """
    alive: list[int] = []
    loads: list[tuple[int, dict[int, float]]] = []
    born: dict[int, int] = {}
    dead: dict[int, int] = {}
    for record in run.records:
        if record["split"] == "growth" and record["growth"]["layer"] == layer:
            growth, step = record["growth"], record["step"]
            alive = alive or list(range(growth["before"]))
            dead.update({alive[old]: step for old in growth["drop"]})
            count = max([*alive, *born, *dead]) + 1
            fresh = iter(range(count, count + len(growth["rows"])))
            alive = [alive[old] if old is not None else next(fresh) for old in growth["rows"]]
            born.update({expert: step for expert in alive if expert >= count})
        load = record["layers"].get(layer, {}).get("load") if record["split"] == "train" else None
        if load:
            alive = alive or list(range(len(load)))
            loads.append((record["step"], {expert: share or 0.0 for expert, share in zip(alive, load, strict=True)}))
    return loads, born, dead
