"""A study run, judged, and written: study.json, study.md, study.html and its pictures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import joblib

from ..run.records import versions
from ..run.training import Training
from .criteria import judge
from .grid import FINISHED, Record, Show, Variant, run_grid
from .latency import timed
from .quantities import quantity
from .spec import At, Part, Study
from .statistics import interval
from .tables import markdown, remarks, spread, verdicts


def run_study(
    study: Study,
    flags: Mapping[str, Any],
    out: Path,
    seeds: int | None = None,
    jobs: int | None = None,
    show: Show = lambda done, total, record: None,
    backend: str = "loky",
) -> tuple[dict[str, Any], list[Record]]:
    """Run what is missing, and answer (what study.json holds, the cells' records).

    flags: of the runs, over the study's. seeds: of every part, instead of its own. jobs: None is one a core.
    Raises UsageError, for absent data too, and RunError.
    """
    if seeds is not None:
        study = attrs.evolve(study, seeds=seeds, part=tuple(attrs.evolve(part, seeds=None) for part in study.part))
    planned = list(study.variants(flags))
    variants = [variant for _, _, variant in planned]
    for variant in {variant.config(0).task: variant for variant in reversed(variants)}.values():
        Training(variant.config(0), variant.settings)  # data that are absent are fetched once, or said to be absent
    records = run_grid(variants, range(study.seeds), out, jobs or joblib.cpu_count(), show, backend)
    timed(planned, records, out)
    rows = _rows(study, planned, records)
    return judged(study, {"rows": rows, "versions": versions()}), records


def judged(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results with all that the study's file says beside them, and its bars held against them."""
    bars = [attrs.asdict(judge(bar, results["rows"])) for bar in study.bar]
    parts = [{"name": part.name, "title": part.title, "columns": list(part.columns)} for part in study.part]
    return {
        **{name: getattr(study, name) for name in ("name", "title", "question", "source")},
        "notes": list(study.notes),
        "versions": results["versions"],
        "bars": bars,
        "parts": parts,
        "published": [attrs.asdict(one) for one in study.published],
        "rows": results["rows"],
    }


def _rows(study: Study, planned: Sequence[tuple[Part, At, Variant]], records: Iterable[Record]) -> list[dict[str, Any]]:
    by_variant: dict[str, list[Record]] = {variant.name: [] for _, _, variant in planned}
    for record in records:
        by_variant[record["variant"]].append(record)
    return [_row(study, part, at, variant, by_variant[variant.name]) for part, at, variant in planned]


def _row(study: Study, part: Part, at: At, variant: Variant, records: Sequence[Record]) -> dict[str, Any]:
    done = [record for record in records if record["status"] == FINISHED]
    missed = [record for record in records if record["status"] != FINISHED]
    numbers = {}
    for name in _wanted(study, part):
        values = [quantity(record, name) for record in done]
        if known := [value for value in values if value is not None]:
            numbers[name] = {**attrs.asdict(interval(known)), "values": values}
    return {
        "part": part.name,
        "variant": variant.name.partition(": ")[2],
        "at": at,
        "plugins": list(variant.plugins),
        "status": FINISHED if done else missed[0]["status"],
        "reason": missed[0]["reason"] if missed else None,
        "seeds": [record["seed"] for record in done],
        "verdicts": dict(
            Counter(record["summary"]["verdict"] for record in done if record["summary"]["verdict"]).most_common()
        ),
        "numbers": numbers,
    }


def _wanted(study: Study, part: Part) -> list[str]:
    """The quantities of a part's columns, bars and pictures."""
    named = [(bar.quantity, bar.where.get("part"), bar.against.get("part", ())) for bar in study.bar]
    bars = [quantity for quantity, own, other in named if own is None or part.name in (*own, *other)]
    pictures = [one for picture in study.picture for one in picture.quantities]
    return list(dict.fromkeys((*part.columns, *bars, *pictures)))


# -- how it is written -----------------------------------------------------------------------------

# quantity without scope: (title, factor, digits after the point)
TITLES = {
    "accuracy": ("accuracy %", 100, 2),
    "precision": ("precision %", 100, 2),
    "recall": ("recall %", 100, 2),
    "f1": ("F1 %", 100, 2),
    "loss": ("loss", 1, 4),
    "perplexity": ("perplexity", 1, 2),
    "active": ("active", 1, 1),
    "active_1pct": ("active (1 %)", 1, 1),
    "top_share": ("top share %", 100, 1),
    "flops.active": ("MFLOPs", 1e-6, 2),
    "flops.total": ("MFLOPs, all experts", 1e-6, 2),
    "model.active": ("model MFLOPs", 1e-6, 1),
    "model.total": ("model MFLOPs, all experts", 1e-6, 1),
    "model.parameters": ("parameters (M)", 1e-6, 2),
    "model.active_parameters": ("active (M)", 1e-6, 2),
    "step_seconds": ("step ms", 1000, 2),
    "summary.seconds": ("seconds", 1, 0),
    "latency.median": ("inference ms", 1000, 2),
    "latency.p95": ("inference p95 ms", 1000, 2),
    "latency.throughput": ("samples/s", 1, 0),
}
SCOPES = {"tail": "stream", "settled": "settled"}


def title_of(name: str) -> tuple[str, float, int]:
    """(title, factor, digits after the point) of a quantity."""
    scope, _, rest = name.partition(".")
    scoped = scope in SCOPES or (scope[:4] in ("step", "eval") and scope[4:].isdigit())
    plain, _, fold = (rest if scoped else name).partition(":")
    title, factor, digits = TITLES.get(plain, (plain, 1, 3))
    words = [SCOPES.get(scope, f"step {scope[4:]}") if scoped else "", title, f"({fold})" if fold else ""]
    return " ".join(word for word in words if word), factor, digits


def tables_of(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, column titles, lines of cells) of each part: published rows first, then ours."""
    tables = []
    for part in results["parts"]:
        shown = part["columns"]
        titles = ["", *(title_of(name)[0] for name in shown), "verdicts"]
        lines = [
            [f"published: {row['name']}", *(_plain(row["numbers"].get(name), name) for name in shown), "-"]
            for row in results["published"]
            if row["part"] == part["name"]
        ]
        own = [row for row in results["rows"] if row["part"] == part["name"]]
        lines += [
            [row["variant"], *(spread(row["numbers"].get(name), *title_of(name)[1:]) for name in shown), verdicts(row)]
            for row in own
        ]
        tables.append((part["title"], titles, lines))
    return tables


def _plain(value: float | None, name: str) -> str:
    _, factor, digits = title_of(name)
    return "-" if value is None else f"{factor * value:,.{digits}f}"


def bars_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column titles, lines of cells): what was expected, and what came of it."""
    lines = [
        [
            bar["says"],
            bar["verdict"],
            "-" if bar["value"] is None else f"{bar['value']:.4g}",
            bar["limit"],
            bar["variant"] or "-",
        ]
        for bar in results["bars"]
    ]
    return ["expected", "", "worst", "limit", "of"], lines


LEGEND = (
    "Ours: mean over the seeds ± half of the 95 % interval (Student's t), on data that was not trained on; "
    "stream: over the last tenth of the training steps. Published rows are quoted."
)


def page_of(results: Mapping[str, Any], pictures: Iterable[str] = ()) -> str:
    """A study as Markdown."""
    about = [f"# {results['title']}", results["question"], f"Source: {results['source']}"]
    notes = ["\n".join(f"- {note}" for note in results["notes"])] if results["notes"] else []
    parts = [*about, *(["What is wrong with it:", *notes] if notes else [])]
    if results["bars"]:
        parts += ["## What was expected", markdown(*bars_table(results))]
    for title, columns, lines in tables_of(results):
        parts += [f"## {title}", markdown(columns, lines)]
    parts += [LEGEND, "\n".join(f"- {remark}" for remark in remarks(results["rows"]))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"
