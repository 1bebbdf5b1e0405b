"""Metrics of routing counts, for each layer and split, and for the difference between two splits."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..contract.routing import Routing, Spec
from ..contract.run import Run
from ..contract.stats import plain
from ..errors import UsageError, listed
from ..layer.sums import sums_of
from ..registry.manager import Plugins
from ..run.folder import read_run
from ..run.traces import FILE, read_trace
from .count_series import Array, Series
from .counted_layer import CountedLayer
from .replay import label_names, labels_of, only

TAIL = 0.9  # of a run's steps: the log points after that represent its training load


def row_of(plugins: Plugins, series: Series) -> tuple[dict[str, Any], list[str]]:
    """Every metric of a series, and the plugins that can't work on counts alone.

    K is 1 unless given. The number of tokens follows from the total unless given; for shares it counts as infinite,
    so no imbalance is attributed to chance.
    """
    top_k = series.top_k or 1
    tokens = series.tokens or (series.total / top_k if series.whole else math.inf)
    spec = Spec(dim=0, hidden=0, experts=len(series.count_E), top_k=top_k)
    layer = CountedLayer(plugins, series.layer, spec)
    dropped_E = torch.full((spec.experts,), math.nan, dtype=torch.float64)  # unknown
    layer.add({"tokens": torch.tensor([tokens]), "load": torch.from_numpy(series.count_E), "dropped": dropped_E})
    numbers = {name: plain(value) for name, value in layer.metrics().items()}
    place = {name: getattr(series, name) for name in ("file", "labels", "layer", "split", "source")}
    sizes = {"experts": spec.experts, "top_k": series.top_k, "tokens": series.tokens, "total": series.total}
    return {**place, **sizes, **numbers}, layer.unanswered


def changes(series: Sequence[Series], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each split of a layer compared with its training split, or else its first.

    total_variation: half the sum of |share - share before|. correlation: Pearson's, of the shares; null if either is
    constant. cv_change: cv minus cv before. moved: the expert whose share differs most, and its two shares.
    """
    groups: dict[Any, list[int]] = {}
    for at, counts in enumerate(series):
        groups.setdefault((counts.file, *counts.labels.items(), counts.layer), []).append(at)
    out = []
    for members in groups.values():
        base = next((at for at in members if series[at].split.lower().startswith("train")), members[0])
        for at in members:
            if at != base and series[at].count_E.shape == series[base].count_E.shape:
                out.append(_change(series[base], series[at], rows[base].get("cv"), rows[at].get("cv")))
    return out


def _change(before: Series, after: Series, cv_before: float | None, cv: float | None) -> dict[str, Any]:
    share_2E = np.stack([before.share_E, after.share_E])
    gap_E = np.abs(share_2E[1] - share_2E[0])
    most = int(gap_E.argmax())
    correlation = float(np.corrcoef(share_2E)[0, 1]) if (np.ptp(share_2E, axis=1) > 0).all() else None
    return {
        **{"file": after.file, "labels": after.labels, "layer": after.layer, "top_k": after.top_k},
        **{"split": after.split, "against": before.split, "total_variation": float(gap_E.sum() / 2)},
        "correlation": correlation,
        "cv_change": None if cv is None or cv_before is None else cv - cv_before,
        "moved": {"expert": most, "from": float(share_2E[0, most]), "to": float(share_2E[1, most])},
    }


# -- single experts and rows -----------------------------------------------------------------------


def by_expert(series: Sequence[Series]) -> list[dict[str, Any]]:
    """The sum, mean, minimum, maximum and range of each expert over the rows of a series, and over the layers.

    over: "rows" or "layers". number: how many of these. The sums of layers of one size are taken together under the
    layer "all"; each needs its rows to be kept by `read_counts(..., each_row=True)`, or counts as one row.
    """
    kept = [one.count_PE if len(one.count_PE) else one.count_E[None] for one in series]
    out = [_per_expert(one, one.layer, "rows", count_PE) for one, count_PE in zip(series, kept, strict=True)]
    groups: dict[Any, list[Series]] = {}
    for one in series:
        groups.setdefault((one.file, *one.labels.items(), one.split, len(one.count_E)), []).append(one)
    for layers in groups.values():
        if len(layers) > 1:
            out.append(_per_expert(layers[0], "all", "layers", np.stack([one.count_E for one in layers])))
    return out


def _per_expert(series: Series, layer: str, over: str, count_RE: Array) -> dict[str, Any]:
    low_E, high_E = count_RE.min(0), count_RE.max(0)
    numbers = {"sum": count_RE.sum(0), "mean": count_RE.mean(0), "minimum": low_E, "maximum": high_E}
    return {
        **{"file": series.file, "labels": series.labels, "layer": layer, "split": series.split, "top_k": series.top_k},
        **{"over": over, "number": len(count_RE)},
        **{name: value_E.tolist() for name, value_E in (numbers | {"range": high_E - low_E}).items()},
    }


def stability(series: Sequence[Series]) -> list[dict[str, Any]]:
    """How far the load of a series moves from row to row, for those with several rows that are not empty.

    moved: the mean total variation between successive rows. by_chance: what it would be if every row were drawn from
    the same load; null for shares, of which the number of tokens is unknown. moved_most: the largest, and where.
    cv_rows: the mean cv of single rows, which a sum can hide. busiest: for each expert, the part of the rows in which
    it is among the `busy` with most, ties included.
    """
    out = []
    for one in series:
        kept = np.flatnonzero(one.count_PE.sum(1) > 0)
        if len(kept) > 1:
            place = {name: getattr(one, name) for name in ("file", "labels", "layer", "split", "top_k")}
            out.append({**place, **_stability(one.count_PE[kept], [one.points[at] for at in kept], one.whole)})
    return out


def _stability(count_PE: Array, points: list[str], whole: bool) -> dict[str, Any]:
    total_P = count_PE.sum(1)
    share_PE = count_PE / total_P[:, None]
    move_P = np.abs(np.diff(share_PE, axis=0)).sum(1) / 2
    most = int(move_P.argmax())
    busy = max(1, count_PE.shape[1] // 4)
    limit_P = np.maximum(-np.sort(-count_PE, axis=1)[:, busy - 1], np.finfo(float).tiny)  # an idle expert is not busy
    share_E = count_PE.sum(0) / total_P.sum()
    chance_P = np.sqrt(1 / total_P[1:] + 1 / total_P[:-1])
    return {
        **{"rows": len(points), "moved": float(move_P.mean())},
        # the mean of |x| is sqrt(2 / pi) of the deviation of a difference of two binomial shares
        "by_chance": float(np.sqrt(share_E * (1 - share_E)).sum() * chance_P.mean() / math.sqrt(2 * math.pi))
        if whole
        else None,
        "moved_most": {"from": points[most], "to": points[most + 1], "total_variation": float(move_P[most])},
        "cv_rows": float((share_PE.std(1) / share_PE.mean(1)).mean()),
        **{"busy": busy, "busiest": (count_PE >= limit_P[:, None]).mean(0).tolist()},
    }


# -- contradictions --------------------------------------------------------------------------------


def contradictions(series: Sequence[Series]) -> list[str]:
    """A sentence for each contradiction in counts for which every token makes the same number of choices."""
    within = [f"{layer.file}: {layer.title()}: {problem}" for layer in series for problem in _within(layer)]
    return [*within, *_between(series)]


def _within(series: Series) -> Iterator[str]:
    """Contradictions in the counts of one layer."""
    if series.absent:
        more = " and more" if len(series.absent) > 8 else ""
        yield f"there is no row for expert {listed(series.absent[:8])}{more}; counted as 0"
    top_k, most, top = series.top_k or 1, int(series.count_E.argmax()), float(series.count_E.max())
    if series.whole and series.top_k and series.total != (series.tokens or series.total // top_k) * top_k:
        known = f"{series.tokens:,.15g} tokens x {top_k}" if series.tokens else f"any number of tokens x {top_k}"
        yield f"its {series.total:,.15g} assignments are not {known} choices"
    if series.whole and series.tokens is not None and top > series.tokens:
        found = f"{top:,.15g} assignments of {series.tokens:,.15g} tokens"
        yield f"expert {most} has {found}, but a token chooses an expert once"
    elif top_k * top > series.total * (1 + 1e-9):
        limit = f"if each token chooses {top_k} different experts, none can have more than {1 / top_k:.4g}"
        yield f"expert {most} has a share of {top / series.total:.4g}, but {limit}"


def _between(series: Sequence[Series]) -> Iterator[str]:
    """Contradictions between layers. All see the same tokens, so their totals are equal; shares may be rounded."""
    groups: dict[Any, list[Series]] = {}
    for layer in series:
        groups.setdefault((layer.file, *layer.labels.items(), layer.split), []).append(layer)
    for layers in groups.values():
        low, high = min(layers, key=lambda layer: layer.total), max(layers, key=lambda layer: layer.total)
        slack = 0 if all(layer.whole for layer in layers) else 0.01 * high.total
        if high.total - low.total > slack:
            totals = f"{low.total:,.15g} in layer {low.layer}, but {high.total:,.15g} in layer {high.layer}"
            where = ", ".join([*low.labels.values(), low.split])
            yield f"{low.file}: {where}: assignments are {totals}; layers of the same tokens have equal totals"


# -- a trace ---------------------------------------------------------------------------------------


def of_trace(file: Path) -> list[Series]:
    """The loads of a trace's layers: of each label by itself, or of all tokens if it has none. Raises UsageError."""
    trace, out = read_trace(file), []
    names = label_names(trace)
    source = f"counts of {'the first' if trace.cut else 'all'} {trace.tokens} recorded tokens of each layer"
    for layer in trace.layers:
        labels: list[int | None] = [*labels_of(layer)]
        for label in labels or [None]:
            forwards = [forward.routing(layer.spec) for forward in layer.forwards]
            parts = forwards if label is None else [only(routing, label) for routing in forwards]
            count_E, tokens = _summed(parts)
            split = "all" if label is None else names.get(label, str(label))
            out.append(Series(str(file), {}, layer.name, split, count_E, tokens, layer.spec.top_k, source=source))
    return out


# -- a run's folder --------------------------------------------------------------------------------


def of_run(folder: Path) -> list[Series]:
    """The training and test loads of a run's layers; counts where the run kept them, else shares. Raises UsageError."""
    run = read_run(folder)
    traced = _traced(folder) if (folder / FILE).exists() else {}
    try:
        out = [series for layer in run.summary["layers"] for series in _of_layer(run, layer, traced)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"run folder {folder} is damaged: its loads can't be read ({error!r})"
        raise UsageError(message, code="damaged-run") from error
    if not out:
        message = f"run {folder} holds no loads: its layers assign nothing, or its metrics were left out"
        raise UsageError(message, code="no-loads")
    return out


def _of_layer(run: Run, layer: dict[str, Any], traced: dict[str, tuple[Any, float]]) -> Iterator[Series]:
    found = {"train": _trained(run, layer["name"]), "test": _tested(run, layer["name"], traced)}
    for split, (source, counts, tokens) in found.items():
        if counts is not None:
            _check(layer, counts)
        if counts is not None and counts.sum():
            one = Series(str(run.folder), {}, layer["name"], split, counts, tokens, layer["top_k"], source=source)
            if split == "train":
                last = _last_loads(run, layer["name"])
                one.count_PE, one.points = np.array([load for _, load in last]), [f"step {step}" for step, _ in last]
            yield one


def _check(layer: dict[str, Any], count_E: Array) -> None:
    """Raise ValueError for what no run writes, whatever its checksum says."""
    if count_E.ndim != 1 or not (count_E >= 0).all() or not np.isfinite(count_E).all():
        raise ValueError("the load is not a list of numbers from 0 on")
    if not isinstance(layer["name"], str) or not isinstance(layer["top_k"], int | None):
        raise ValueError(f"the layer {layer['name']!r} has top_k {layer['top_k']!r}")


Loads = tuple[str, Any, float | None]  # source, counts or shares [E], tokens


def _trained(run: Run, name: str) -> Loads:
    """The mean of the load at the last log points."""
    if not (last := _last_loads(run, name)):
        return "", None, None
    about = f"mean of the load shares at {len(last)} log points, steps {last[0][0]} to {last[-1][0]}"
    return about, np.mean([load for _, load in last], axis=0, dtype=float), None


def _last_loads(run: Run, name: str) -> list[tuple[int, list[float]]]:
    """The last log points of a layer, as steps and loads."""
    train = [record for record in run.records if record["split"] == "train"]
    points = [(record["step"], record["layers"].get(name, {}).get("load")) for record in train]
    last = [(step, load) for step, load in points if load and step > TAIL * points[-1][0]]
    return [(step, load) for step, load in last if len(load) == len(last[-1][1])]  # the layer may have grown


def _tested(run: Run, name: str, traced: dict[str, tuple[Any, float]]) -> Loads:
    """The counts by class if the run kept them, else those of its trace, else shares."""
    last = [record["layers"].get(name, {}) for record in run.records if record["split"] == "eval"][-1:]
    table = last[0].get("class_expert") if last else None
    if table:
        return "counts of the test set, summed over classes", np.sum(table, axis=0, dtype=float), None
    if name in traced:
        counts, tokens = traced[name]
        return f"counts of the recorded routing of the test set, {tokens:,.0f} tokens", counts, tokens
    shares = last[0].get("load") if last else None
    return "load shares on the test set", np.array(shares, dtype=float) if shares else None, None


def _traced(folder: Path) -> dict[str, tuple[Any, float]]:
    """The load [E] and number of tokens of each layer in the run's trace."""
    out = {}
    for layer in read_trace(folder).layers:
        out[layer.name] = _summed([forward.routing(layer.spec) for forward in layer.forwards])
    return out


def _summed(routings: Sequence[Routing]) -> tuple[Array, float]:
    """The load [E] of some decisions, and their number of tokens."""
    sums = [sums_of(routing) for routing in routings]
    load_E: Array = torch.stack([of_forward["load"].double() for of_forward in sums]).sum(0).numpy()
    return load_E, float(sum(float(of_forward["tokens"].sum()) for of_forward in sums))
