"""What the metrics say of routing counts: of each layer and split, and of two splits of one layer."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..contract.routing import Spec
from ..contract.run import Run
from ..contract.stats import plain
from ..errors import UsageError, listed
from ..layer.sums import sums_of
from ..registry.manager import Plugins
from ..run.folder import read_run
from ..run.traces import FILE, read_trace
from .counts import Series
from .observed import CountedLayer

TAIL = 0.9  # of a run's steps: the log points after that are its training


def row_of(plugins: Plugins, one: Series) -> tuple[dict[str, Any], list[str]]:
    """What every metric says of a series, and the plugins that can't say anything of counts alone.

    Where nothing says K it is 1; where nothing says how many tokens there were, it follows from the
    total, or, of shares, is taken as infinite, so that nothing is put down to chance.
    """
    top_k = one.top_k or 1
    tokens = one.tokens or (one.total / top_k if one.whole else math.inf)
    spec = Spec(dim=0, hidden=0, experts=len(one.count_E), top_k=top_k)
    layer = CountedLayer(plugins, one.layer, spec)
    dropped_E = torch.full((spec.experts,), math.nan, dtype=torch.float64)  # nothing tells
    layer.add({"tokens": torch.tensor([tokens]), "load": torch.from_numpy(one.count_E), "dropped": dropped_E})
    numbers = {name: plain(value) for name, value in layer.metrics().items()}
    place = {"file": one.file, "labels": one.labels, "layer": one.layer, "split": one.split, "source": one.source}
    sizes = {"experts": spec.experts, "top_k": one.top_k, "tokens": one.tokens, "total": one.total}
    return {**place, **sizes, **numbers}, layer.unanswered


def changes(series: Sequence[Series], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each split of a layer against its training split, or else its first.

    total_variation: half the sum of |share - share before|. correlation: Pearson's, of the shares; null if one
    has none. cv_change: cv less cv before. moved: the expert whose share differs most, and its two shares.
    """
    groups: dict[Any, list[int]] = {}
    for at, one in enumerate(series):
        groups.setdefault((one.file, *one.labels.items(), one.layer), []).append(at)
    out = []
    for own in groups.values():
        base = next((at for at in own if series[at].split.lower().startswith("train")), own[0])
        for at in own:
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


# -- contradictions --------------------------------------------------------------------------------


def contradictions(series: Sequence[Series]) -> list[str]:
    """What can't be true of counts of a fixed number of choices a token, in sentences."""
    within = [f"{one.file}: {one.title()}: {said}" for one in series for said in _within(one)]
    return [*within, *_between(series)]


def _within(one: Series) -> Iterator[str]:
    if one.absent:
        more = " and more" if len(one.absent) > 8 else ""
        yield f"no row is of expert {listed(one.absent[:8])}{more}; counted as 0"
    top_k, most, top = one.top_k or 1, int(one.count_E.argmax()), float(one.count_E.max())
    if one.whole and one.top_k and one.total != (one.tokens or one.total // top_k) * top_k:
        known = f"{one.tokens:,.15g} tokens x {top_k}" if one.tokens else f"any number of tokens x {top_k}"
        yield f"its {one.total:,.15g} assignments are not {known} choices"
    if one.whole and one.tokens is not None and top > one.tokens:
        seen = f"{top:,.15g} assignments of {one.tokens:,.15g} tokens"
        yield f"expert {most} has {seen}, but a token chooses an expert once"
    elif top_k * top > one.total * (1 + 1e-9):
        limit = f"where a token chooses {top_k} different experts none can have more than {1 / top_k:.4g}"
        yield f"expert {most} has a share of {top / one.total:.4g}, but {limit}"


def _between(series: Sequence[Series]) -> Iterator[str]:
    """Layers see the same tokens, so that their totals are equal; those of shares may be rounded."""
    groups: dict[Any, list[Series]] = {}
    for one in series:
        groups.setdefault((one.file, *one.labels.items(), one.split), []).append(one)
    for own in groups.values():
        low, high = min(own, key=lambda one: one.total), max(own, key=lambda one: one.total)
        slack = 0 if all(one.whole for one in own) else 0.01 * high.total
        if high.total - low.total > slack:
            totals = f"{low.total:,.15g} in layer {low.layer}, but {high.total:,.15g} in layer {high.layer}"
            where = ", ".join([*low.labels.values(), low.split])
            yield f"{low.file}: {where}: assignments are {totals}; equally many choices of the same tokens can't differ"


# -- a run of ours ---------------------------------------------------------------------------------


def of_run(folder: Path) -> list[Series]:
    """The training and test loads of a run's layers, as counts where it kept them. Raises UsageError."""
    run = read_run(folder)
    traced = _traced(folder) if (folder / FILE).exists() else {}
    try:
        out = [one for layer in run.summary["layers"] for one in _of_layer(run, layer, traced)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"run folder {folder} is damaged: its loads can't be read ({error!r})") from error
    if not out:
        raise UsageError(f"run {folder} holds no loads: its layers assign nothing, or its metrics were left out")
    return out


def _of_layer(run: Run, layer: dict[str, Any], traced: dict[str, tuple[Any, float]]) -> Iterator[Series]:
    found = {"train": _trained(run, layer["name"]), "test": _tested(run, layer["name"], traced)}
    for split, (source, counts, tokens) in found.items():
        if counts is not None and counts.sum():
            yield Series(str(run.folder), {}, layer["name"], split, counts, tokens, layer["top_k"], source=source)


Loads = tuple[str, Any, float | None]  # where they are from, counts or shares [E], tokens


def _trained(run: Run, name: str) -> Loads:
    """The mean of the load at the last log points."""
    points = [(one["step"], one["layers"].get(name, {}).get("load")) for one in run.records if one["split"] == "train"]
    last = [(step, load) for step, load in points if load and step > TAIL * points[-1][0]]
    last = [(step, load) for step, load in last if len(load) == len(last[-1][1])]  # it may have grown
    if not last:
        return "", None, None
    about = f"mean of the load shares at {len(last)} log points, steps {last[0][0]} to {last[-1][0]}"
    return about, np.mean([load for _, load in last], axis=0, dtype=float), None


def _tested(run: Run, name: str, traced: dict[str, tuple[Any, float]]) -> Loads:
    """Counts by class, if the run kept them, or of its trace, or else shares."""
    last = [one["layers"].get(name, {}) for one in run.records if one["split"] == "eval"][-1:]
    table = last[0].get("class_expert") if last else None
    if table:
        return "counts of the test set, summed over classes", np.sum(table, axis=0, dtype=float), None
    if name in traced:
        counts, tokens = traced[name]
        return f"counts of the recorded routing of the test set, {tokens:,.0f} tokens", counts, tokens
    shares = last[0].get("load") if last else None
    return "load shares on the test set", np.array(shares, dtype=float) if shares else None, None


def _traced(folder: Path) -> dict[str, tuple[Any, float]]:
    """Load [E] and number of tokens of each layer that was recorded."""
    out = {}
    for layer in read_trace(folder).layers:
        sums = [sums_of(forward.routing(layer.spec)) for forward in layer.forwards]
        load_E = torch.stack([one["load"].double() for one in sums]).sum(0)
        out[layer.name] = (load_E.numpy(), float(sum(float(one["tokens"].sum()) for one in sums)))
    return out
