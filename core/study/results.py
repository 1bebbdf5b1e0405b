"""Run a study or a comparison: its cells, rows of results, and judged criteria."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import joblib

from ..run.summary import versions
from ..run.training import Training
from .clusters import LOKY, Backend
from .criteria import judge
from .grid import FINISHED, Record, Show, StudyVariant, run_grid
from .latency import time_inference
from .quantities import quantity
from .spec import At, Planned, Study, StudyPart, full_name
from .statistics import interval

Row = dict[str, Any]


def run_study(
    study: Study,
    flags: Mapping[str, Any],
    out: Path,
    seeds: int | None = None,
    jobs: int | None = None,
    show: Show = lambda done, total, record: None,
    backend: Backend = LOKY,
) -> tuple[dict[str, Any], list[Record]]:
    """Run the missing cells of a study; returns (the content of study.json, the records of the cells).

    flags: the runs' flags, which override the study's. seeds: the number of seeds for every part, instead of its own.
    jobs: None means one per core. backend: see `connected`. Raises UsageError, also for missing data, and RunError.
    """
    if seeds is not None:
        study = attrs.evolve(study, seeds=seeds, part=tuple(attrs.evolve(part, seeds=None) for part in study.part))
    planned = list(study.variants(flags))
    records = run_planned(planned, range(study.seeds), out, jobs, show, backend)
    time_inference(planned, records, out)
    return judged(study, {"rows": rows_of(study, planned, records), "versions": versions()}), records


def run_planned(
    planned: Sequence[Planned], seeds: Sequence[int], out: Path, jobs: int | None, show: Show, backend: Backend = LOKY
) -> list[Record]:
    """The records of all variants and seeds; see `run_grid`. Raises UsageError and RunError."""
    variants = [variant for _, _, variant in planned]
    first_of_task = {variant.config(0).task: variant for variant in reversed(variants)}
    for variant in first_of_task.values():  # missing data are fetched once, or refused before anything is written
        Training(variant.config(0), variant.settings)
    return run_grid(variants, seeds, out, jobs or joblib.cpu_count(), show, backend)


def judged(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results ("rows" and "versions") plus the study's texts and its criteria, judged now."""
    return {
        **{name: getattr(study, name) for name in ("name", "title", "question", "source")},
        "notes": list(study.notes),
        "versions": results["versions"],
        "criteria": [attrs.asdict(judge(criterion, results["rows"])) for criterion in study.criterion],
        "parts": [{"name": part.name, "title": part.title, "columns": list(part.columns)} for part in study.part],
        "published": [attrs.asdict(row) for row in study.published],
        "rows": results["rows"],
    }


def rows_of(study: Study, planned: Sequence[Planned], records: Iterable[Record]) -> list[Row]:
    """A row for each variant, with its position ("part", "at") and the results of its seeds.

    "seeds" are the finished ones; "status" and "reason" say why others are missing; "verdicts" counts each verdict;
    "numbers" has each quantity's mean, half of its 95 % interval (None for one seed) and its value for each seed.
    """
    by_variant: dict[str, list[Record]] = {variant.name: [] for _, _, variant in planned}
    for record in records:
        by_variant[record["variant"]].append(record)
    return [
        _row(part, at, variant, by_variant[variant.name], _quantities(study, part)) for part, at, variant in planned
    ]


def _row(part: StudyPart, at: At, variant: StudyVariant, records: Sequence[Record], quantities: Sequence[str]) -> Row:
    finished = [record for record in records if record["status"] == FINISHED]
    unfinished = [record for record in records if record["status"] != FINISHED]
    found = {name: [quantity(record, name) for record in finished] for name in quantities}
    verdicts = Counter(record["summary"]["verdict"] for record in finished if record["summary"]["verdict"])
    return {
        "part": part.name,
        "variant": variant.name.removeprefix(full_name(part.name, "")),
        "at": at,
        "plugins": list(variant.plugins),
        "status": FINISHED if finished else unfinished[0]["status"],
        "reason": unfinished[0]["reason"] if unfinished else None,
        "seeds": [record["seed"] for record in finished],
        "verdicts": dict(verdicts.most_common()),
        "numbers": {name: number for name, values in found.items() if (number := _number(values))},
    }


def _number(values: Sequence[float | None]) -> dict[str, Any] | None:
    """A quantity of a row; None if no seed has it."""
    known = [value for value in values if value is not None]
    return {**attrs.asdict(interval(known)), "values": values} if known else None


def _quantities(study: Study, part: StudyPart) -> list[str]:
    """The quantities of a part's columns, criteria and figures."""
    judged_here = [
        criterion.quantity
        for criterion in study.criterion
        if "part" not in criterion.where or part.name in (*criterion.where["part"], *criterion.against.get("part", ()))
    ]
    drawn = [name for figure in study.figure for name in figure.quantities]
    return list(dict.fromkeys((*part.columns, *judged_here, *drawn)))
