"""Variants side by side: which there are, and a row of numbers with intervals for each, the dense model first."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs
import joblib

from ..contract.options import Settings
from ..errors import UsageError, listed, nearest
from ..registry import discovery
from ..registry.discovery import KINDS, WATCHING
from ..run.folder import number_of
from ..run.records import versions
from ..run.training import Training
from .grid import FINISHED, Record, Show, Variant, run_grid
from .statistics import interval
from .tables import markdown, remarks, spread, verdicts

DENSE, BASE = "dense model", "base alone"  # no entry point has a space in its name
QUALITY = ("accuracy", "perplexity", "loss")  # the first that a task has is what a row is judged by
BALANCE = ("cv", "maxvio", "active")
Row = dict[str, Any]


def wanted(group: str, words: Sequence[str]) -> tuple[str, ...]:
    """The plugins of an entry-point group that are to be compared; "all" is every installed one. Raises UsageError."""
    kind, installed = KINDS[group], discovery.find()
    of_kind = [name for name, several in installed.items() if any(one.kind == kind for one in several)]
    for name in words:
        if name != "all" and name not in of_kind:
            what = f"'{name}' is a {installed[name][0].kind}" if name in installed else f"there is no {kind} '{name}'"
            raise UsageError(f"--{group}: {what}; {nearest(name, of_kind)}")
    return tuple(dict.fromkeys(one for name in words for one in (of_kind if name == "all" else (name,))))


def variants_of(
    compared: Mapping[str, Sequence[str]], base: Sequence[str], settings: Settings, flags: Mapping[str, Any]
) -> list[tuple[str, Variant]]:
    """(kind, variant) of the dense model, of the base alone if it is one without what is compared, then of each plugin.

    compared: plugins by entry-point group; each is added to the base by itself. base: plugins that all but the
    dense model share. settings: a plugin's go to the variants that have it. Raises UsageError.
    """
    installed = discovery.find()
    kinds = {name: installed[name][0].kind for name in base if name in installed}
    names = {name for group in compared.values() for name in group}
    if both := sorted(names & set(base)):
        raise UsageError(f"{listed(map(repr, both))}: shared by all, or compared? Take it out of --plugins")
    routers = [name for name, kind in kinds.items() if kind == "router"]
    if routers and compared.get("routers"):
        raise UsageError(f"routers are compared, but --plugins gives all of them '{routers[0]}'; take it out")

    def variant(title: str, plugins: Iterable[str], **more: Any) -> Variant:
        own = tuple(plugins)
        others = (names | set(base)) - set(own)
        return Variant(title, own, {one: t for one, t in settings.items() if one not in others}, {**flags, **more})

    dense = variant(DENSE, (name for name in base if kinds.get(name) in WATCHING), dense=True)
    alone = [("base", variant(BASE, base))] if any(compared[group] for group in compared if group != "routers") else []
    added = [(KINDS[group], variant(name, (*base, name))) for group in compared for name in compared[group]]
    return [("dense", dense), *alone, *added]


# -- what came out ---------------------------------------------------------------------------------


def compare(
    variants: Sequence[tuple[str, Variant]],
    seeds: Sequence[int],
    out: Path,
    jobs: int | None = None,
    show: Show = lambda done, total, record: None,
) -> dict[str, Any]:
    """Run what is missing of a comparison, and answer all of it: what comparison.json holds.

    "rows", by kind in their order, the best of a kind first, have variant, kind, plugins, status, reason,
    seeds (the finished ones), verdicts (how often each) and numbers: by name the mean, half of the 95 % interval
    over the seeds (None for one seed) and the values. "quality" says which number a row is judged by.
    jobs: None is one a core. Raises UsageError and RunError.
    """
    first = variants[0][1]
    dense = first.config(0)
    Training(dense, first.settings)  # what is wrong with it is wrong with all; data that are absent are fetched once
    records = run_grid([variant for _, variant in variants], seeds, out, jobs or joblib.cpu_count(), show)
    rows = _rows(variants, records)
    quality = next((name for name in QUALITY if any(name in row["numbers"] for row in rows)), "loss")
    shared = list(variants[-1][1].plugins[:-1])
    title = f"{dense.task}, {dense.experts} experts, top {dense.top_k}, {dense.epochs} epochs"
    return {
        "title": title + (f", all with {listed(shared)}" if shared else ""),
        "task": dense.task,
        "quality": quality,
        "seeds": list(seeds),
        "shared": shared,
        "run": {name: getattr(dense, name) for name in ("experts", "top_k", "capacity", "epochs", "batch_size", "lr")},
        "versions": versions(),
        "rows": sorted(rows, key=lambda row: _place(row, quality, [kind for kind, _ in variants])),
    }


def _place(row: Row, quality: str, kinds: list[str]) -> tuple[float, ...]:
    number = row["numbers"].get(quality)
    sign = -1 if quality == "accuracy" else 1
    return kinds.index(row["kind"]), number is None, sign * number["mean"] if number else 0


def _rows(variants: Sequence[tuple[str, Variant]], records: Iterable[Record]) -> list[Row]:
    by_variant: dict[str, list[Record]] = {variant.name: [] for _, variant in variants}
    for record in records:
        by_variant[record["variant"]].append(record)
    times = [record["step_seconds"] for record in by_variant[DENSE] if record["status"] == FINISHED]
    dense = fmean(times) if times else None
    return [_row(kind, variant, by_variant[variant.name], dense) for kind, variant in variants]


def _row(kind: str, variant: Variant, records: Sequence[Record], dense: float | None) -> Row:
    done = [record for record in records if record["status"] == FINISHED]
    missed = [record for record in records if record["status"] != FINISHED]
    numbers: dict[str, list[float]] = {}
    for record in done:
        for name, value in _numbers(record, dense).items():
            if value is not None:
                numbers.setdefault(name, []).append(value)
    counted = Counter(record["summary"]["verdict"] for record in done if record["summary"]["verdict"])
    return {
        "variant": variant.name,
        "kind": kind,
        "plugins": list(variant.plugins),
        "status": FINISHED if done else missed[0]["status"],
        "reason": missed[0]["reason"] if missed else None,
        "seeds": [record["seed"] for record in done],
        "verdicts": dict(counted.most_common()),
        "numbers": {name: attrs.asdict(interval(values)) for name, values in numbers.items()},
    }


def _numbers(record: Record, dense: float | None) -> dict[str, float | None]:
    """One finished cell's numbers by name. All but `dropped` and the times are of the test set."""
    shares = [share for share in record["dropped"].values() if share is not None]
    seconds = record["step_seconds"]
    return {
        **{name: number_of(record["summary"], name) for name in (*QUALITY, *BALANCE)},
        "dropped": fmean(shares) if shares else None,
        "active_flops": record["flops"]["active"],
        "total_flops": record["flops"]["total"],
        "step_ms": 1000 * seconds,
        "step_ratio": seconds / dense if dense else None,
    }


# -- how it is written -----------------------------------------------------------------------------

# number: (title, factor, digits after the point)
COLUMNS = {
    "accuracy": ("accuracy %", 100, 1),
    "perplexity": ("perplexity", 1, 2),
    "loss": ("loss", 1, 3),
    "cv": ("cv", 1, 2),
    "maxvio": ("maxvio", 1, 2),
    "active": ("active", 1, 1),
    "dropped": ("dropped %", 100, 1),
    "active_flops": ("FLOPs/token", 1, 0),
    "step_ms": ("step ms", 1, 2),
    "step_ratio": ("step/dense", 1, 2),
}


def table_of(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles, lines of cells) for a terminal or a page."""
    rows = comparison["rows"]
    shown = [name for name in COLUMNS if name == comparison["quality"] or name not in QUALITY]
    if comparison["run"]["capacity"] is None:
        shown.remove("dropped")
    titles = ["", *(COLUMNS[name][0] for name in shown), "verdicts"]
    lines = [
        [row["variant"], *(spread(row["numbers"].get(name), *COLUMNS[name][1:]) for name in shown), verdicts(row)]
        for row in rows
    ]
    return titles, lines


def legend_of(comparison: Mapping[str, Any]) -> str:
    """What the numbers are."""
    many = len(comparison["seeds"])
    over = (
        f"Means over {many} seeds ± half of their 95 % interval (Student's t)" if many > 1 else "One seed: no intervals"
    )
    dropped = "" if comparison["run"]["capacity"] is None else "; dropped is of the last window of training"
    return (
        f"{over}, on the test set{dropped}. FLOPs: forward, of the MoE layers. Step: median time of a training step. "
        "The dense model has one MLP in each layer's place, as wide as the experts that a token is sent to."
    )


def page_of(comparison: Mapping[str, Any]) -> str:
    """A comparison as Markdown."""
    table = markdown(*table_of(comparison))
    missing = "\n".join(f"- {remark}" for remark in remarks(comparison["rows"]))
    picture = "![The same numbers as a picture](comparison.png)"
    parts = (f"# {comparison['title']}", table, legend_of(comparison), missing, picture)
    return "\n\n".join(part for part in parts if part) + "\n"
