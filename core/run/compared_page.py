"""The page of several runs: their curves over each other, their loads next to each other, and their table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ..contract.run import Run
from ..errors import listed
from ..pages.blocks import Block, Chart, Heat, Page, Section, Table, fact
from .forms import FORMATS, Format, heading, percent, shown
from .recorded import series

QUALITIES = ("accuracy", "perplexity", "loss")  # the first that all runs have says which is best
CURVES = (
    *(("eval", "loss", "on the test set"), ("eval", "accuracy", "on the test set")),
    *(("eval", "perplexity", "on the test set"), ("train", "cv", "of the load in training (0 = even)")),
    ("train", "maxvio", "of the load in training (0 = even)"),
)
CURVES_NOTE = "A click on a name hides its line. Drag over a chart to zoom, double-click to go back."
ZERO = ("cv", "maxvio")  # whose axis begins at 0
MOST_ROWS = 64  # loads that stand in one heatmap
MOST_FOUND = 4  # findings that are told


def compared_page(runs: Sequence[Run], table: Table) -> Page:
    """The page of `moe-engine compare`. table: what the command prints."""
    names = names_of(runs)
    tasks = sorted({str(run.config.get("run", {}).get("task", "")) for run in runs})
    return Page(
        about=f"comparison of {', '.join(names)}",
        verdict=_best(runs, names) if len(tasks) == 1 else f"{len(runs)} runs of {len(tasks)} tasks",
        findings=_findings(runs, names)[:MOST_FOUND],
        facts=[fact(len(runs), "run"), (", ".join(tasks), "task" if len(tasks) == 1 else "tasks")],
        sections=[section for section in _sections(runs, names, table) if section.blocks],
        footer=_footer(runs),
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's; where several have the same, the path, and a number if that is the same."""
    by_name = Counter(run.name for run in runs)
    names = [run.name if by_name[run.name] == 1 else str(run.folder) for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})" for at, name in enumerate(names)
    ]


def verdict_tones(runs: Sequence[Run]) -> dict[str, int]:
    """The severity of each verdict that the runs have, for a table."""
    judged = [one for run in runs for one in run.summary.get("findings", []) if one["metric"] == "verdict"]
    return {one["name"]: one["severity"] for one in judged}


def _best(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Which run is best, by the first quality that all have."""
    known = [name for name in QUALITIES if all(run.summary.get(name) is not None for run in runs)]
    if not known or len(runs) == 1:
        return f"{len(runs)} runs" if len(runs) > 1 else str(runs[0].summary.get("verdict") or "no verdict")
    values = [run.summary[known[0]] for run in runs]
    best = max(values) if known[0] == "accuracy" else min(values)
    number = percent(best) if known[0] == "accuracy" else shown(known[0], best)
    first = [name for name, value in zip(names, values, strict=True) if value == best]
    return f"{' and '.join(first)}: best {heading(known[0]).removesuffix(' %')}, {number}"


def _findings(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """The worst verdict of each run that is not healthy, with its name; those of one name are told once."""
    groups: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        judged = [one for one in run.summary.get("findings", []) if one["metric"] == "verdict" and one["severity"]]
        for one in judged[:1]:
            groups.setdefault(one["name"], {**one, "runs": []})["runs"].append(name)
    for group in groups.values():
        first, *others = group["runs"]
        group["where"] = f"{first}; also {listed(others)}" if others else first
    return sorted(groups.values(), key=lambda one: -one["severity"])


def _sections(runs: Sequence[Run], names: Sequence[str], table: Table) -> Iterator[Section]:
    yield Section(
        "Curves", [*_curves(runs, names)], "A click on a name hides its line. Drag to zoom, double-click back."
    )
    yield Section("Test set", [table], "A metric of layers is averaged over the layers.")
    yield Section("What differs", [*_differing(runs, names)], "Settings that are not the same in all runs.")
    yield Section("Loads", [*_loads(runs, names)])


def _differing(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Table]:
    """The settings of [run] and of the plugins in which the runs differ."""
    settings = [{name: _told(value) for name, value in _flat(run.config)} for run in runs]
    differing = [name for name in dict.fromkeys(chain(*settings)) if len({one.get(name) for one in settings}) > 1]
    if differing:
        rows = [[name, *(one.get(name, "-") for one in settings)] for name in differing]
        yield Table(("setting", *names), rows, range(len(names) + 1))


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting, those of plugins as plugin.option."""
    yield from config.get("run", {}).items()
    for plugin, options in config.get("plugins", {}).items():
        yield from ((f"{plugin}.{name}", value) for name, value in options.items())


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Block]:
    """A chart of each metric, a line for each run that has it."""
    for split, metric, where in CURVES:
        form = FORMATS.get(metric, Format(metric))
        lines: dict[str, tuple[Sequence[float], Sequence[float | None]]] = {}
        for run, name in zip(runs, names, strict=True):
            steps, values = series(run, split, metric)
            if steps:
                lines[name] = (steps, [form.factor * value for value in values])
        if lines:
            yield Chart(f"{form.title} {where}", lines, decimals=form.digits, zero=metric in ZERO)


def _loads(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Heat]:
    """Each layer's load on the test set, over an even share."""
    rows: dict[str, list[float]] = {}
    for run, name in zip(runs, names, strict=True):
        layers = run.summary["layers"]
        for layer in layers:
            load = layer.get("load") or []
            rows[f"{name}, {layer['name']}" if len(layers) > 1 else name] = [(part or 0.0) * len(load) for part in load]
    filled = {name: row for name, row in rows.items() if row}
    if 0 < len(filled) <= MOST_ROWS:
        title = "load of each expert on the test set, over an even share"
        yield Heat(title, [*filled], [("", [*filled.values()])], row="run")


def _footer(runs: Sequence[Run]) -> str:
    """The versions that the runs were made with, if they are the same."""
    made: list[Mapping[str, Any]] = [run.summary.get("versions", {}) for run in runs]
    return ", ".join(f"{name} {version}" for name, version in made[0].items() if all(one == made[0] for one in made))
