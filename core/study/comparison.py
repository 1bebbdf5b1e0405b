"""Comparisons of plugins: studies with plugins as their only axis."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs

from ..contract.options import Settings
from ..errors import UsageError, listed, nearest
from ..registry import discovery
from ..registry.discovery import KINDS, WATCHING
from ..run.summary import versions
from .clusters import LOKY, Backend
from .grid import FINISHED, Record, Show
from .results import Row, judged, rows_of, run_planned
from .spec import Choice, Study, StudyPart

DENSE, BASE = "dense model", "base alone"  # no entry point has a space in its name
QUALITY = ("accuracy", "perplexity", "loss")  # rows are ranked by the first that the task has
BALANCE = ("cv", "maxvio", "active")
COST = ("train_dropped", "flops.active", "flops.total", "step_seconds", "step_ratio")


@attrs.frozen
class Comparison:
    """A study of plugins. kinds: each row's "dense", "base" or plugin kind. shared: plugins of all rows but "dense"."""

    study: Study
    kinds: Mapping[str, str]
    shared: tuple[str, ...]
    flags: Mapping[str, Any]


def chosen_plugins(group: str, words: Sequence[str]) -> tuple[str, ...]:
    """The plugins of an entry-point group to compare; "all" is every installed one. Raises UsageError."""
    kind, installed = KINDS[group], discovery.find()
    of_kind = [name for name, plugins in installed.items() if any(plugin.kind == kind for plugin in plugins)]
    for name in words:
        if name == "all" or name in of_kind:
            continue
        if name in installed:
            message = f"--{group}: '{name}' is a {installed[name][0].kind}, not a {kind}; {nearest(name, of_kind)}"
            raise UsageError(message, code="wrong-kind")
        message = f"--{group}: there is no {kind} '{name}'; {nearest(name, of_kind)}"
        raise UsageError(message, code="unknown-plugin")
    return tuple(dict.fromkeys(found for name in words for found in (of_kind if name == "all" else (name,))))


def comparison_of(
    compared: Mapping[str, Sequence[str]], base: Sequence[str], settings: Settings, flags: Mapping[str, Any]
) -> Comparison:
    """The dense model, the base alone (unless only routers are compared), then each plugin added to the base.

    compared: plugins by entry-point group. base: plugins that all rows but the dense model share. settings: plugin
    options, applied to the rows that have the plugin. flags: the runs' flags. Raises UsageError.
    """
    kinds = _kinds_of_base(base)
    names = {name for group in compared.values() for name in group}
    _check(compared, base, kinds, names)

    def choice(plugins: Iterable[str], **run: Any) -> Choice:
        active = tuple(plugins)
        absent = (names | set(base)) - set(active)
        return Choice(active, run, {name: table for name, table in settings.items() if name not in absent})

    choices = {DENSE: choice((name for name in base if kinds.get(name) in WATCHING), dense=True)}
    rows = {DENSE: "dense"}
    if any(compared[group] for group in compared if group != "routers"):
        choices[BASE], rows[BASE] = choice(base), "base"
    for group, plugins in compared.items():
        choices |= {name: choice((*base, name)) for name in plugins}
        rows |= dict.fromkeys(plugins, KINDS[group])
    part = StudyPart("", "", {"plugin": ()}, (*QUALITY, *BALANCE, *COST))
    study = Study("comparison", "", "", "", (part,), {"plugin": choices})
    used = {name for _, _, variant in study.variants(flags) for name in variant.settings}
    if unused := sorted(settings.keys() - used):
        message = f"options are set for plugin '{unused[0]}', which is not chosen; add it to --plugins"
        raise UsageError(message, code="plugin-not-chosen")
    return Comparison(study, rows, tuple(base), flags)


def _kinds_of_base(base: Sequence[str]) -> dict[str, str]:
    installed = discovery.find()
    return {name: installed[name][0].kind for name in base if name in installed}


def _check(
    compared: Mapping[str, Sequence[str]], base: Sequence[str], kinds: Mapping[str, str], names: set[str]
) -> None:
    """Raise UsageError for plugins that are both compared and shared, or for a shared router among routers."""
    if both := sorted(names & set(base)):
        message = f"{listed(map(repr, both))} is both compared and in --plugins, which all rows share; remove one"
        raise UsageError(message, code="compared-and-shared")
    routers = [name for name, kind in kinds.items() if kind == "router"]
    if routers and compared.get("routers"):
        message = f"--routers compares routers, but --plugins gives all rows '{routers[0]}'; remove it"
        raise UsageError(message, code="compared-and-shared")


def compare(
    comparison: Comparison,
    seeds: Sequence[int],
    out: Path,
    jobs: int | None = None,
    show: Show = lambda done, total, record: None,
    backend: Backend = LOKY,
) -> dict[str, Any]:
    """Run the missing cells of a comparison; returns the content of comparison.json.

    It has the keys of a study's results plus "task", "seeds", "run" (flags), "shared", "legend" and "quality", the
    quantity by which rows are ranked. Rows also have a "kind"; they are sorted by kind, the best of each kind first.
    jobs: None means one per core. backend: see `connected`. Raises UsageError and RunError.
    """
    from ..contract.routing import Spec

    study = comparison.study
    planned = list(study.variants(comparison.flags))
    records = run_planned(planned, seeds, out, jobs, show, backend)
    _add_derived(records)
    rows = [row | {"kind": comparison.kinds[row["variant"]]} for row in rows_of(study, planned, records)]
    config = planned[0][2].config(0)
    quality = next((name for name in QUALITY if any(name in row["numbers"] for row in rows)), "loss")
    kinds = list(dict.fromkeys(comparison.kinds.values()))
    rows.sort(key=lambda row: _rank(row, quality, kinds))
    columns = (quality, *BALANCE, *(name for name in COST if name != "flops.total"))
    if config.capacity is None:
        columns = tuple(name for name in columns if name != "train_dropped")
    sizes = {name: getattr(config, name) or getattr(Spec(0, 0), name) for name in ("experts", "top_k")}
    title = f"{config.task}, {sizes['experts']} experts, top {sizes['top_k']}, {config.epochs} epochs"
    title += f", all with {listed(comparison.shared)}" if comparison.shared else ""
    study = attrs.evolve(study, title=title, part=(attrs.evolve(study.part[0], columns=columns),))
    return {
        **judged(study, {"rows": rows, "versions": versions()}),
        "task": config.task,
        "quality": quality,
        "seeds": list(seeds),
        "shared": list(comparison.shared),
        "run": sizes | {name: getattr(config, name) for name in ("capacity", "epochs", "batch_size", "lr")},
        "legend": _legend(len(seeds), config.capacity is not None),
    }


def _add_derived(records: Iterable[Record]) -> None:
    """Add to finished records `step_ratio`, over the dense model's mean, and `train_dropped`, a mean over layers."""
    finished = [record for record in records if record["status"] == FINISHED]
    times = [record["step_seconds"] for record in finished if record["variant"] == DENSE]
    for record in finished:
        shares = [share for share in record["dropped"].values() if share is not None]
        record["train_dropped"] = fmean(shares) if shares else None
        record["step_ratio"] = record["step_seconds"] / fmean(times) if times else None


def _rank(row: Row, quality: str, kinds: list[str]) -> tuple[float, ...]:
    number = row["numbers"].get(quality)
    sign = -1 if quality == "accuracy" else 1
    return kinds.index(row["kind"]), number is None, sign * number["mean"] if number else 0


def _legend(seeds: int, capacity: bool) -> str:
    """The legend of the table."""
    several = f"Means over {seeds} seeds ± half of their 95 % interval (Student's t)"
    return (
        f"{several if seeds > 1 else 'One seed: no intervals'}, on the test set"
        f"{'; dropped: in the last window of training' if capacity else ''}. FLOPs: forward, of the MoE layers, for a "
        "token. Step: median time of a training step. The dense model has one MLP instead of each MoE layer, as wide "
        "as the experts that a token is sent to."
    )
