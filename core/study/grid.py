"""Grids of variants and seeds, one run each; finished runs are not repeated."""

import ast
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from hashlib import sha256
from importlib import util
from pathlib import Path
from typing import Any

import attrs
import joblib

from ..contract.options import Settings, values_of
from ..errors import RunError, UsageError
from ..files import dump, locked, read_file, sealed, unsealed, write_atomically
from ..layer.flops import forward_flops, model_flops, parameters_of
from ..processes import threads
from ..registry import discovery
from ..registry.discovery import defaults
from ..run.config import RunConfig, merge_options
from ..run.summary import versions
from ..run.training import Training
from .clusters import LOKY, Backend

Record = dict[str, Any]
Show = Callable[[int, int, Record | None], None]
FINISHED, REFUSED, FAILED = "finished", "refused", "failed"
_ALONE = threading.Lock()  # cells of one process share its working folder and torch's random state: one at a time


@attrs.frozen
class StudyVariant:
    """One of the compared configurations.

    plugins: in the order typed. settings: their options. flags: the run's flags by name. seeds: replaces the grid's
    number of seeds. keep: also keep the weights of its runs (`weights_of`).
    """

    name: str
    plugins: tuple[str, ...] = ()
    settings: Settings = attrs.field(factory=dict)
    flags: Mapping[str, Any] = attrs.field(factory=dict)
    seeds: Sequence[int] | None = None
    keep: bool = False

    def config(self, seed: int) -> RunConfig:
        """The run with one seed, without the default reports, which take longer than a small run."""
        without = (*self.flags.get("no_plugin", ()), *defaults()["reports"])
        return merge_options({}, {**self.flags, "plugins": self.plugins, "no_plugin": without, "seed": seed})


@attrs.frozen
class Cell:
    """One variant with one seed.

    inputs: all that determines its results: configuration, settings, versions, and the code of its plugins' files
    without comments and docstrings. key: a hash of the inputs, without options at their defaults, so a new option
    does not change it; a cell is not run again if a finished record is stored under its key.
    """

    variant: str
    config: RunConfig
    settings: Settings
    inputs: Record
    key: str
    keep: bool = False


def cells_of(variant: StudyVariant, seeds: Iterable[int]) -> list[Cell]:
    """A variant's cells, one per seed."""
    cells = []
    plugins = _plugins((*variant.plugins, *_usual(), variant.config(0).task))
    for seed in seeds:
        config = variant.config(seed)
        inputs = {"config": values_of(config), "settings": variant.settings, "versions": versions(), "plugins": plugins}
        changed = {name: value for name, value in values_of(config).items() if value != getattr(RunConfig(), name)}
        key = sha256(json.dumps({**inputs, "config": changed}, sort_keys=True).encode()).hexdigest()[:20]
        cells.append(Cell(variant.name, config, variant.settings, inputs, key, variant.keep))
    return cells


def run_grid(
    variants: Sequence[StudyVariant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    show: Show = lambda done, total, record: None,
    backend: Backend = LOKY,
) -> list[Record]:
    """The records of all cells, sorted by seed, then variant; cells finished in `out` are not run again.

    A record has "variant", "seed", "status", "reason" and the cell's inputs. A finished one also has "summary" and
    "records" (the run's), "dropped" (share over capacity in the last window of training, by layer), "flops" (of the
    layers, "active" and "total"), "model" (the same and parameters, of the whole model) and "step_seconds". A cell
    that was refused (bad input) or failed is tried again the next time. jobs: processes, of one thread each; 1 is
    this process, and a cluster has its own number. backend: see `connected`. show: called with the number of cells
    done, the total, and the new record, which is None at first. Raises UsageError for a folder that cannot be used,
    and for a worker that sees other folders or versions; RunError if a process was killed, and, of a cluster, if that
    happened again and again.
    """
    cells = [cell for variant in variants for cell in cells_of(variant, variant.seeds or seeds)]
    kept = {cell.key for cell in cells if cell.keep}  # several variants may share a run
    cells = [attrs.evolve(cell, keep=cell.key in kept) for cell in cells]
    cells.sort(key=lambda cell: cell.config.seed)
    with _folder(out) as folder:
        records = {cell.key: record for cell in cells if (record := _read(folder, cell))}
        missing = {cell.key: cell for cell in cells if cell.key not in records}
        total = len(records) + len(missing)
        show(len(records), total, None)
        for record in _made(list(missing.values()), folder, jobs, backend):
            records[record["key"]] = record
            show(len(records), total, record)
    return [{**records[cell.key], "variant": cell.variant} for cell in cells]


def _made(cells: Sequence[Cell], folder: Path, jobs: int, backend: Backend) -> Iterator[Record]:
    """The records of these cells, each as soon as its run ends."""
    if not cells:
        return
    home = None if backend.workers is None else Path.cwd()
    work = (joblib.delayed(_run)(cell, folder.absolute(), home) for cell in cells)
    processes = backend.workers or min(jobs, len(cells))
    with backend.watched():
        # one cell in a batch, so that a killed worker takes one along
        parallel = joblib.Parallel(
            n_jobs=processes, return_as="generator_unordered", batch_size=1, pre_dispatch=backend.dispatch
        )
        yield from parallel(work)


def _run(cell: Cell, folder: Path, home: Path | None) -> Record:
    """Run one cell in a scratch folder, which is then deleted, and store its record.

    home: on a worker of a cluster, the folder where the grid was started. Raises UsageError for a worker that can't
    take part.
    """
    if home is not None:
        _check_worker(cell, folder, home)
    # a separate folder: a worker that a cluster believes dead may still run the same cell
    place = tempfile.TemporaryDirectory(prefix=f"{cell.key}-{os.getpid()}-", dir=folder / "running")
    with _ALONE, chdir(home or "."), threads(1), place as scratch:
        result = _result(cell, Path(scratch) / "run")
        if not Path(scratch).is_dir():  # so this cell is not waited for, and another process may have finished it
            raise RunError("the grid ended before this run did", code="grid-ended")
        record: Record = {
            "variant": cell.variant,
            "seed": cell.config.seed,
            "key": cell.key,
            **cell.inputs,
            **result,
        }
        if cell.keep and record["status"] == FINISHED:
            os.replace(Path(scratch) / "run" / "model.safetensors", weights_of(folder, cell.key))
    text = dump(sealed(record))
    write_atomically(_file(folder, cell), (text + "\n").encode())
    return unsealed(text)  # exactly as the next call will read it


def _check_worker(cell: Cell, folder: Path, home: Path) -> None:
    """Raise UsageError on a worker whose results would be lost, or would not be those of the cell."""
    worker = f"the worker on {socket.gethostname()}"
    for needed in (home, folder / "running"):  # the second one exists only while the grid runs
        if not needed.is_dir():
            message = f"{worker} does not see the folder {needed}; workers must share this machine's folders"
            raise UsageError(message, code="worker-without-folder")
    own = {**versions(), **_plugins(cell.inputs["plugins"])}
    for name, wanted in {**cell.inputs["versions"], **cell.inputs["plugins"]}.items():
        if own[name] != wanted:
            message = f"{worker} has {name} {_named(own[name])}, this machine {_named(wanted)}"
            raise UsageError(f"{message}; install the same there", code="worker-versions")


def _named(version: Any) -> str:
    """A version, or what identifies a plugin, in words."""
    return version if isinstance(version, str) else " ".join(str(part) for found in version for part in found) or "not"


def _result(cell: Cell, scratch: Path) -> Record:
    training = None
    try:
        with redirect_stdout(sys.stderr):  # standard output is the command's; plugins may print
            config = attrs.evolve(cell.config, no_sample=True)  # the folder is deleted
            training = Training(config, cell.settings, scratch, timed=True)
            run = training.run()
    except UsageError as error:
        return {"status": REFUSED, "reason": str(error)}
    except RunError as error:
        return {"status": FAILED, "reason": str(error)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # from a plugin, or a bug: it fails this cell alone
        sentence = training and training.culprit(error)
        text = "".join(traceback.format_exception(error))
        return {
            "status": FAILED,
            "reason": sentence or f"unexpected {type(error).__name__}: {error}",
            "traceback": text,
        }
    layers = run.summary["layers"]
    work = {layer["name"]: {name: layer[name] for name in ("rows", "slots") if name in layer} for layer in layers}
    windows = [record["layers"] for record in run.records if record["split"] == "train"]
    return {
        "status": FINISHED,
        "reason": None,
        "summary": run.summary,
        "records": run.records,
        "dropped": {layer: numbers.get("dropped") for layer, numbers in windows[-1].items()},
        "flops": attrs.asdict(model_flops(training.model, work)),
        "model": _size(training),
        "step_seconds": training.step_seconds,
    }


def _size(training: Training) -> dict[str, float]:
    """The whole model's forward FLOPs per test sample and its parameters, active and total."""
    flops = forward_flops(training.model, lambda: training.score(1))
    parameters = parameters_of(training.model)
    return {
        "active": flops.active,
        "total": flops.total,
        "active_parameters": parameters.active,
        "parameters": parameters.total,
    }


# -- on disk -------------------------------------------------------------------------------------------


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """The grid's folder, locked for this process and its workers. Raises UsageError."""
    try:
        if out.exists() and not (out / "cells").is_dir() and (not out.is_dir() or any(out.iterdir())):
            message = f"{out} is not empty and holds no earlier study or comparison; name another folder with --out"
            raise UsageError(message, code="foreign-folder")
        (out / "cells").mkdir(parents=True, exist_ok=True)
        (out / "running").mkdir(exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        message = f"cannot write to folder {out}: {error.strerror}; name another one with --out"
        raise UsageError(message, code="unwritable-folder") from error
    with locked(out / ".lock", out):
        try:
            yield out
        finally:
            shutil.rmtree(out / "running", ignore_errors=True)


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def weights_of(folder: Path, key: str) -> Path:
    """The file of a finished cell's weights, if its variant keeps them."""
    return folder / "cells" / f"{key}.safetensors"


def _read(folder: Path, cell: Cell) -> Record | None:
    """A cell's stored record, if it is finished and undamaged."""
    if cell.keep and not weights_of(folder, cell.key).exists():
        return None
    try:
        record = unsealed(read_file(_file(folder, cell)).decode())
        return record if record["status"] == FINISHED and record["key"] == cell.key else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _usual() -> tuple[str, ...]:
    """The plugins that a run has by default."""
    usual = defaults()
    return (usual["router"], usual["initializer"], *usual["metrics"])


def _plugins(names: Iterable[str]) -> dict[str, Any]:
    """What identifies each plugin's behaviour, by name: distribution, version and a hash of the file's code."""
    installed = discovery.find()
    return {
        name: [
            [found.distribution, found.version, _digest(found.entry_point.module)] for found in installed.get(name, ())
        ]
        for name in sorted(set(names))
    }


def _digest(module: str) -> str | None:
    """A hash of the code in a module's file: an edited plugin counts as another, even at the same version."""
    try:
        found = util.find_spec(module)
        if not found or not found.origin:
            return None
        tree = ast.parse(Path(found.origin).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        return sha256(ast.dump(tree).encode()).hexdigest()[:20]
    except Exception:  # from a package that does not load: the run will report it
        return None
