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

Files = dict[str, str]  # checksum by name


def _run(bench: Bench) -> Run:
    """A finished run of a few steps, which has no report yet."""
    subject = bench.subject
    reports = tuple(name for name in defaults()["reports"] if name in subject.installed)
    own = {"epochs": 1, "batch_size": 512, "experts": 4, "device": "cpu", "log_every": 1, "no_plugin": reports}
    folder = bench.folder / "run"
    Training(build(RunConfig, "run", own), {}, folder).run()
    shutil.rmtree(folder / "checkpoints")
    return read_run(folder)


def _write(bench: Bench, run: Run) -> list[str]:
    """Let the subject write."""
    plugin = build(bench.subject.cls, bench.subject.title, bench.subject.settings.get(bench.subject.name, {}))
    try:
        names: list[str] = plugin.moe_report(run=run)
    except UsageError as error:  # what it needs is not installed
        raise NotApplicable(f"refused: {error}") from error
    return names


def _files(folder: Path) -> Files:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@claim("moe_report")
def files_are_what_it_says(bench: Bench) -> None:
    """It answers the names of the files that it writes, which are in the run's folder, and writes no other."""
    run = _run(bench)
    before, outside = _files(run.folder), _files(run.folder.parent)
    names = _write(bench, run)
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    demand(listed, f"it answers {names!r}; answer a list of file names")
    after = _files(run.folder)
    for name in names:
        demand(name in after, f"'{name}' is not in the run's folder; answer names relative to run.folder")
        demand((run.folder / name).stat().st_size, f"'{name}' is empty")
    for name, checksum in before.items():
        demand(after.get(name) == checksum, f"it changes '{name}' of the run; write files of its own")
    more = sorted(after.keys() - before.keys() - set(names))
    demand(not more, f"it writes {more} and does not say so; answer the name of every file")
    strays = sorted(_files(run.folder.parent).keys() - outside.keys() - {f"{run.folder.name}/{name}" for name in after})
    demand(not strays, f"it writes {strays} outside of the run's folder; write into run.folder only")


@claim("moe_report")
def it_can_be_written_again(bench: Bench) -> None:
    """A report can be written again at any time, also where the run was moved to, and replaces what was there."""
    run = _run(bench)
    first = _write(bench, run)
    moved = run.folder.with_name("elsewhere")
    run.folder.rename(moved)
    names = _write(bench, read_run(moved))
    demand(len(names) == len(first), f"it wrote {len(first)} files, and then {len(names)}; read nothing but the run")
    left = sorted(_files(moved).keys() & (set(first) - set(names)))
    demand(not left, f"written again it leaves {left}; write over what is there")


@claim("moe_report")
def missing_numbers_are_no_error(bench: Bench) -> None:
    """A run without accuracy, and with metrics that answered nothing, has a report too."""
    run = _run(bench)
    for record in run.records:
        record.pop("accuracy", None)
        record["layers"] = {name: {} for name in record["layers"]}
    run.summary["accuracy"] = run.summary["verdict"] = None
    _write(bench, run)
