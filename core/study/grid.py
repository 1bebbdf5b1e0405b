"""Variants times seeds: each cell is one run, and one small file when it is finished, so that a grid can be resumed."""

import ast
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import util
from pathlib import Path
from typing import Any

import attrs
import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ..analysis.flops import forward_flops, model_flops, parameters_of
from ..contract.options import Settings, values_of
from ..errors import RunError, UsageError
from ..files import dump, locked, write_atomically
from ..processes import one_thread
from ..registry import discovery
from ..registry.discovery import defaults
from ..run.config import RunConfig, merge_options
from ..run.records import versions
from ..run.training import Training

Record = dict[str, Any]
Show = Callable[[int, int, Record | None], None]
FINISHED, REFUSED, FAILED = "finished", "refused", "failed"


@attrs.frozen
class Variant:
    """One of the things compared.

    plugins: in the order typed. settings: their options. flags: of the run, by name. seeds: its own, if not
    the grid's. keep: keep the weights of its runs too (`weights_of`).
    """

    name: str
    plugins: tuple[str, ...] = ()
    settings: Settings = attrs.field(factory=dict)
    flags: Mapping[str, Any] = attrs.field(factory=dict)
    seeds: Sequence[int] | None = None
    keep: bool = False

    def config(self, seed: int) -> RunConfig:
        """The run of one seed; it writes no default reports, which take longer than a small run."""
        without = (*self.flags.get("no_plugin", ()), *defaults()["reports"])
        return merge_options({}, {**self.flags, "plugins": self.plugins, "no_plugin": without, "seed": seed})


@attrs.frozen
class Cell:
    """One variant with one seed.

    inputs: all that decides its numbers: configuration, settings, versions, and what its plugins' files say,
    without comments and docstrings. key: a hash of them, without what is as by default, so that a new option
    changes no key; a finished record that lies under it need not be made again.
    """

    variant: str
    config: RunConfig
    settings: Settings
    inputs: Record
    key: str
    keep: bool = False


def cells_of(variant: Variant, seeds: Iterable[int]) -> list[Cell]:
    """A variant's cells."""
    cells = []
    plugins = _plugins((*variant.plugins, *_usual(), variant.config(0).task))
    for seed in seeds:
        config = variant.config(seed)
        inputs = {"config": values_of(config), "settings": variant.settings, "versions": versions(), "plugins": plugins}
        own = {name: value for name, value in values_of(config).items() if value != getattr(RunConfig(), name)}
        key = sha256(json.dumps({**inputs, "config": own}, sort_keys=True).encode()).hexdigest()[:20]
        cells.append(Cell(variant.name, config, variant.settings, inputs, key, variant.keep))
    return cells


def run_grid(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    show: Show = lambda done, total, record: None,
    backend: str = "loky",
) -> list[Record]:
    """The records of all cells, by seed and then in the variants' order; what lies in `out` is not run again.

    A record has "variant", "seed", "status" and "reason" beside the cell's inputs. A finished one also has
    "summary" and "records" (the run's), "dropped" (share over capacity in the last window of training, by
    layer), "flops" (of the layers, "active" and "total") and "step_seconds". What was refused (bad input) or
    failed is tried again the next time. jobs: processes, of one thread each; 1 is this process. backend: joblib's;
    "dask" takes the workers of the distributed.Client there is. show: gets how many cells are done, of how
    many, and the record that was made now; at first None. Raises UsageError for a folder that can't be used,
    RunError if a process was killed.
    """
    cells = [cell for variant in variants for cell in cells_of(variant, variant.seeds or seeds)]
    kept = {cell.key for cell in cells if cell.keep}  # one run may be of several variants
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


def _made(cells: Sequence[Cell], folder: Path, jobs: int, backend: str) -> Iterator[Record]:
    """The records of these cells, each as soon as it is there."""
    work = (joblib.delayed(_run)(cell, folder) for cell in cells)
    # Ctrl-C goes to all processes; the first one ends the others
    loky: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with joblib.parallel_config(backend, **(loky if backend == "loky" else {})):
        try:
            yield from joblib.Parallel(n_jobs=min(jobs, len(cells)) or 1, return_as="generator_unordered")(work)
        except TerminatedWorkerError as error:
            why = "a process of the comparison was killed, perhaps for lack of memory"
            raise RunError(f"{why}; the same command goes on from what is finished, --jobs 1 needs least") from error


def _run(cell: Cell, folder: Path) -> Record:
    """Run one cell in a folder of its own, which goes when it is finished, and keep its record."""
    scratch = folder / "running" / cell.key
    shutil.rmtree(scratch, ignore_errors=True)  # of a cell that was killed
    try:
        with one_thread():
            result = _result(cell, scratch)
        record: Record = {
            "variant": cell.variant,
            "seed": cell.config.seed,
            "key": cell.key,
            **cell.inputs,
            **result,
        }
        if cell.keep and record["status"] == FINISHED:
            os.replace(scratch / "model.safetensors", weights_of(folder, cell.key))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = dump(record)
    write_atomically(_file(folder, cell), (text + "\n").encode())
    made: Record = json.loads(text)  # just as it will be read the next time
    return made


def _result(cell: Cell, scratch: Path) -> Record:
    training = None
    try:
        training = Training(cell.config, cell.settings, scratch, timed=True)
        run = training.run()
    except UsageError as error:
        return {"status": REFUSED, "reason": str(error)}
    except RunError as error:
        return {"status": FAILED, "reason": str(error)}
    except (Exception, SystemExit) as error:  # of a plugin, or a bug: it is one cell's
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
    """Of the whole model: forward FLOPs of one test sample, and parameters; used by it, and all."""
    flops = forward_flops(training.model, lambda: training.score(1))
    parameters = parameters_of(training.model)
    return {
        "active": flops.active,
        "total": flops.total,
        "active_parameters": parameters.active,
        "parameters": parameters.total,
    }


# -- what lies on disk ---------------------------------------------------------------------------------


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """The grid's folder, for this process and its workers alone. Raises UsageError."""
    try:
        if out.exists() and not (out / "cells").is_dir() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} is neither empty nor of an earlier comparison; name another folder with --out")
        (out / "cells").mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise UsageError(f"folder {out} can't be written: {error.strerror}; name another one with --out") from error
    with locked(out / ".lock", out):
        try:
            yield out
        finally:
            shutil.rmtree(out / "running", ignore_errors=True)


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def weights_of(folder: Path, key: str) -> Path:
    """Where the weights of a finished cell are, if its variant keeps them."""
    return folder / "cells" / f"{key}.safetensors"


def _read(folder: Path, cell: Cell) -> Record | None:
    """A cell's record if it is finished and whole."""
    if cell.keep and not weights_of(folder, cell.key).exists():
        return None
    try:
        record: Record = json.loads(_file(folder, cell).read_text("utf-8"))
        return record if record["status"] == FINISHED and record["key"] == cell.key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _usual() -> tuple[str, ...]:
    """The plugins that a run has unless told otherwise."""
    usual = defaults()
    return (usual["router"], usual["initializer"], *usual["metrics"])


def _plugins(names: Iterable[str]) -> dict[str, Any]:
    """What decides how plugins act: distribution, version and the text of the file, by name."""
    installed = discovery.find()
    return {
        name: [[one.distribution, one.version, _digest(one.entry_point.module)] for one in installed.get(name, ())]
        for name in sorted(set(names))
    }


def _digest(module: str) -> str | None:
    """A hash of what a module's file says to Python: an editable plugin that is changed is another plugin."""
    try:
        found = util.find_spec(module)
        if not found or not found.origin:
            return None
        tree = ast.parse(Path(found.origin).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        return sha256(ast.dump(tree).encode()).hexdigest()[:20]
    except Exception:  # of a package that does not load: the run will say so
        return None
