"""A run's folder: config.toml, metrics.jsonl, checkpoints/, summary.json, model.safetensors and reports."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import IO, Any

import attrs

from ..contract.options import Settings
from ..contract.run import Run
from ..errors import UsageError, listed, nearest
from ..files import digest, dump, locked, read_file, refused, sealed, unsealed, write_atomically
from ..registry.discovery import WATCHING, find
from .config import RunConfig, merge_options, read_config

FILES = ("config.toml", "metrics.jsonl")  # whose checksums summary.json holds
MARK = "torchrun.id"  # the job of torchrun that the run belongs to


def new_folder(out: Path | None, task: str) -> Path:
    """Create a run's folder; runs/TASK-TIME if none is named. Raises UsageError.

    It must be empty or absent, but for what a start leaves behind that was killed before there was a configuration.
    """
    folder = out or Path("runs") / f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        if out is None:
            return _unused(folder)
        if folder.exists():
            _check_unused(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _check_unused(folder: Path) -> None:
    """Raise UsageError if a folder holds a run or files of others."""
    if not folder.is_dir() or not all(_is_leftover(path) for path in folder.iterdir()):
        message = f"{folder} is not an empty folder; name another one with --out"
        if (folder / "config.toml").exists():
            message += f", or continue the run in it with: moe-engine resume {folder}"
        raise UsageError(message, code="folder-not-empty")


def _is_leftover(path: Path) -> bool:
    """Whether a file is one that a start leaves behind that was killed before there was a configuration."""
    if path.name == "metrics.jsonl":
        return path.is_file() and not path.stat().st_size
    return path.name == MARK or any(path.match(f".{name}.*.tmp") for name in ("config.toml", MARK))


def _unwritable(folder: Path, error: OSError) -> UsageError:
    message = f"folder {folder} can't be written: {error.strerror}; name another one with --out"
    return UsageError(message, code="unwritable-path")


def _unused(folder: Path) -> Path:
    """Create a folder of this name, or with a number after it if there is one, also if other processes do the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        made = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            made.mkdir()
            return made
    raise AssertionError  # there is always a number that is free


def old_folder(folder: Path, dropped: Sequence[str] = ()) -> tuple[RunConfig, Settings]:
    """The configuration of a run that was started in this folder. Raises UsageError.

    dropped: metrics and reports to leave out from here on.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no run folder {folder}", code="unknown-run")
    if not (folder / "config.toml").exists():
        message = f"{folder} holds no config.toml, so no run was begun in it; begin one with: moe-engine run --out"
        raise UsageError(f"{message} {folder}", code="unknown-run")
    options, settings = read_config(folder / "config.toml", dropped)
    config = merge_options(options, {})
    known = find()
    for name in dropped:
        if name not in known and name not in config.plugins:
            message = f"there is no plugin '{name}' to leave out; {nearest(name, {*known, *config.plugins})}"
            raise UsageError(message, code="unknown-plugin")
        if name in known and known[name][0].kind not in WATCHING:
            message = f"'{name}' is a {known[name][0].kind}, without which the run would be another one; --no-plugin"
            raise UsageError(f"{message} of resume leaves out metrics and reports", code="not-a-watching-plugin")
    plugins = tuple(name for name in config.plugins if name not in dropped)
    config = attrs.evolve(config, plugins=plugins, no_plugin=(*config.no_plugin, *(known.keys() & {*dropped})))
    return config, {name: options for name, options in settings.items() if name not in dropped}


@contextmanager
def record_file(folder: Path, new: bool = False) -> Iterator[IO[bytes]]:
    """Open metrics.jsonl for reading and appending, exclusively for this process. Raises UsageError.

    new: a run begins in the folder. Another process may have begun one there since the folder was chosen.
    """
    path = folder / "metrics.jsonl"
    try:
        path.touch()
    except OSError as error:
        if new:
            raise _unwritable(folder, error) from error
        raise UsageError(refused(error), code="unwritable-path") from error
    with locked(path, folder) as file:
        if new:
            _check_unused(folder)
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
            leftover.unlink(missing_ok=True)  # from a write that was killed
        yield file


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises UsageError if it is missing, unfinished or damaged."""
    try:
        if not folder.is_dir():
            raise UsageError(f"there is no run folder {folder}", code="unknown-run")
        summary = unsealed(read_file(folder / "summary.json").decode())
        kept, known = {name: read_file(folder / name) for name in FILES}, summary.pop("files")
        if changed := [name for name in FILES if digest(kept[name]) != known[name]]:
            raise ValueError(f"{listed(changed)} changed after the run ended")
        records = [json.loads(line) for line in kept["metrics.jsonl"].decode().splitlines()]
        config = tomllib.loads(kept["config.toml"].decode())
    except FileNotFoundError as error:
        begun = (folder / "config.toml").exists() and (folder / "metrics.jsonl").exists()
        advice = f"; moe-engine resume {folder} continues it" if begun else ""
        message = f"{folder} holds no finished run: {Path(error.filename).name} is missing{advice}"
        raise UsageError(message, code="unfinished-run") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(f"run folder {folder} is damaged: {error}", code="damaged-run") from error
    if problem := _problem(summary, records, config):
        raise UsageError(f"run folder {folder} is damaged: {problem}", code="damaged-run")
    return Run(folder, summary, records, config)


def write_summary(folder: Path, summary: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Write summary.json, with its checksum and those of the other files that are read again. records: as synced."""
    config = digest((folder / "config.toml").read_bytes())
    files = dict(zip(FILES, (config, records), strict=True))
    write_atomically(folder / "summary.json", (dump(sealed({**summary, "files": files})) + "\n").encode())


def number_of(summary: Mapping[str, Any], name: str) -> Any:
    """A number of a run's summary, or the mean of a layer's number over the layers; None if there is none."""
    if name in summary:
        return summary[name]
    values = [layer[name] for layer in summary["layers"] if layer.get(name) is not None]
    return sum(values) / len(values) if values else None


def _problem(summary: Any, records: list[Any], config: dict[str, Any]) -> str | None:
    """What is wrong with the shape of a run's files, or None."""
    if not isinstance(summary, dict) or not _objects(summary.get("layers")) or "loss" not in summary:
        return "summary.json does not contain a run summary"
    if not records or not all(isinstance(r, dict) and {"split", "step", "layers"} <= r.keys() for r in records):
        return "metrics.jsonl holds no records"
    if not all(isinstance(record["layers"], dict) for record in records):
        return "metrics.jsonl holds no records"
    return None if is_config(config) else "config.toml has no [run]"


def is_config(config: dict[str, Any]) -> bool:
    """Whether a table has the shape of a run's config.toml."""
    run, options = config.get("run", {}), config.get("plugins", {})
    if not isinstance(run, dict) or not isinstance(options, dict):
        return False
    plugins = run.get("plugins", [])
    named = isinstance(plugins, list) and all(isinstance(name, str) for name in plugins)
    return named and all(isinstance(of_plugin, dict) for of_plugin in options.values())


def _objects(values: Any) -> bool:
    """Whether a value is a list of JSON objects."""
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)
