"""Claims about reports."""

import hashlib
import shutil
from pathlib import Path

from ..contract.options import build
from ..contract.run import Run
from ..errors import UsageError
from ..registry.discovery import defaults
from ..run.config import RunConfig
from ..run.folder import read_run
from ..run.training import Training
from .bench import Bench
from .claims import NotApplicable, claim, demand

Checksums = dict[str, str]  # of files, by name


def _run(bench: Bench) -> Run:
    """A finished run of a few steps, without a report."""
    reports = tuple(name for name in defaults()["reports"] if name in bench.plugin.installed)
    config = {"epochs": 1, "batch_size": 512, "experts": 4, "device": "cpu", "log_every": 1, "no_plugin": reports}
    folder = bench.folder / "run"
    Training(build(RunConfig, "run", config), {}, folder).run()
    shutil.rmtree(folder / "checkpoints")
    return read_run(folder)


def _write(bench: Bench, run: Run) -> list[str]:
    """Write the report; returns the file names that the plugin returns."""
    tested = bench.plugin
    plugin = build(tested.cls, tested.title, tested.settings.get(tested.name, {}))
    try:
        names: list[str] = plugin.moe_report(run=run)
    except UsageError as error:  # a library that it needs is not installed
        raise NotApplicable(f"refused: {error}") from error
    return names


def _checksums(folder: Path) -> Checksums:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@claim("moe_report")
def written_files_are_listed(bench: Bench) -> None:
    """The report returns the names of the files it writes, all in the run's folder, and changes no other file."""
    run = _run(bench)
    before, outside = _checksums(run.folder), _checksums(run.folder.parent)
    names = _write(bench, run)
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    demand(is_list, f"it returns {names!r}; return a list of file names")
    after = _checksums(run.folder)
    for name in names:
        demand(name in after, f"'{name}' is not in the run's folder; return names relative to run.folder")
        demand((run.folder / name).stat().st_size, f"'{name}' is empty")
    for name, checksum in before.items():
        demand(after.get(name) == checksum, f"it changes the run's file '{name}'; write new files only")
    unlisted = sorted(after.keys() - before.keys() - set(names))
    demand(not unlisted, f"it writes {unlisted} without listing them; return the name of every file")
    inside = {f"{run.folder.name}/{name}" for name in after}
    strays = sorted(_checksums(run.folder.parent).keys() - outside.keys() - inside)
    demand(not strays, f"it writes {strays} outside the run's folder; write into run.folder only")


@claim("moe_report")
def report_can_be_rewritten(bench: Bench) -> None:
    """A report can be written again at any time, even after the run was moved, and replaces its old files."""
    run = _run(bench)
    first = _write(bench, run)
    moved = run.folder.with_name("elsewhere")
    run.folder.rename(moved)
    second = _write(bench, read_run(moved))
    same = len(second) == len(first)
    demand(same, f"it wrote {len(first)} files, then {len(second)}; read nothing but the run's folder")
    left = sorted(_checksums(moved).keys() & (set(first) - set(second)))
    demand(not left, f"written again, it leaves {left} behind; write to the same file names")


@claim("moe_report")
def missing_metrics_are_tolerated(bench: Bench) -> None:
    """A report can also be written for a run without accuracy or verdict, whose metrics returned nothing."""
    run = _run(bench)
    for record in run.records:
        record.pop("accuracy", None)
        record["layers"] = {name: {} for name in record["layers"]}
    run.summary["accuracy"] = run.summary["verdict"] = None
    _write(bench, run)
