"""A run's folder: config.toml, metrics.jsonl, checkpoints/, summary.json, model.safetensors, and what reports add."""

import fcntl
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import attrs
import tomli_w

from .errors import UsageError, listed
from .manager import defaults
from .options import Settings, build, option, options_of, values_of


@attrs.define(eq=False)
class RunConfig:
    """What a run is told, apart from the plugins' options: the flags of `moe-engine run` and [run] of a config file."""

    task: str = option(defaults()["task"], help="task plugin: the data, the model and how it is measured")
    plugins: tuple[str, ...] = option((), help="plugins to use, in this order")
    no_plugin: tuple[str, ...] = option((), help="plugins to leave out, also default ones")
    experts: int = option(8, help="number of experts in a layer", min=1)
    top_k: int = option(2, help="experts that a token is sent to", min=1)
    dense: bool = option(
        False, help="a plain MLP as wide as the experts that a token is sent to, in each layer's place"
    )
    capacity: float | None = option(
        None, help="an expert keeps at most ceil(C*T*K/E) of T real tokens in training; unset: drops nothing"
    )
    allow_no_gradient: bool = option(
        False, help="run also with a router that can't learn, as the task gives it no gradient; the report says so"
    )
    epochs: int = option(20, help="passes over the training data", min=1)
    steps: int | None = option(None, help="optimizer steps after which to end before that; unset: all epochs", min=1)
    batch_size: int = option(64, help="samples in a step", min=1)
    lr: float = option(0.001, help="learning rate of Adam", min=0)
    lr_schedule: str = option(
        "constant", help="cosine: the learning rate falls to 0 over the run", choices=("constant", "cosine")
    )
    weight_decay: float = option(0.0, help="share of lr by which a step shrinks every weight, as AdamW does", min=0)
    seed: int = option(0, help="fixes every random draw", min=0)
    device: str = option("auto", help="auto (cuda, mps, cpu: the first there is), or a device by name")
    precision: str = option(
        "fp32", help="fp32, or bf16: forwards under autocast, weights stay fp32", choices=("fp32", "bf16")
    )
    bf16_products: str = option(
        "auto",
        help="at precision bf16, what a CPU multiplies experts' numbers in; auto: what it measures as faster",
        choices=("auto", "bf16", "fp32"),
    )
    data_dir: str = option("data", help="folder of the data sets that are not embedded")
    eval_every: int | None = option(
        None, help="steps between two evaluations on the test set; unset: at the end of each epoch", min=1
    )
    log_every: int = option(50, help="steps between two log points", min=1)
    checkpoint_every: int = option(500, help="steps between two checkpoints, from which a run is resumed", min=1)
    record_routing: bool = option(False, help="save what each layer chose on the test set, for `moe-engine replay`")


def read_config(file: Path | None) -> tuple[dict[str, Any], Settings]:
    """([run], [plugins.NAME]) of a TOML file; ({}, {}) without one. Raises UsageError."""
    if file is None:
        return {}, {}
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config file {file} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of too many digits, which is no TOMLDecodeError
        raise UsageError(f"config file {file} is not TOML: {error}") from error
    if unknown := sorted(tables.keys() - {"run", "plugins"}):
        raise UsageError(f"config file {file} has {listed(unknown)}; its tables are [run] and [plugins.NAME]")
    run, plugins = tables.get("run", {}), tables.get("plugins", {})
    for name, table in [("run", run), ("plugins", plugins), *(plugins.items() if isinstance(plugins, dict) else ())]:
        if not isinstance(table, dict):
            raise UsageError(f"config file {file}: '{name}' is a table of options, not {table!r}")
    return run, plugins


def merged(file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """The run's configuration: flag over file over default. A flag of None was not given."""
    given = {**file, **{name: value for name, value in flags.items() if value is not None}}
    config: RunConfig = build(RunConfig, "run", given)
    return config


def config_toml(config: RunConfig, settings: Settings) -> str:
    """The config file that gives the same run again."""
    return tomli_w.dumps(
        {"run": _written(values_of(config)), "plugins": {k: _written(v) for k, v in settings.items() if v}}
    )


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    # TOML has no null: the word "none" is what options of type `X | None` read it from
    return {key: "none" if one is None else list(one) if isinstance(one, tuple) else one for key, one in values.items()}


def flag_names() -> dict[str, Any]:
    """Every option of a run by name, for the command line."""
    return dict(options_of(RunConfig))


# -- the folder ----------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(out: Path | None, task: str) -> Path:
    """A run's folder, which must be empty or absent; runs/TASK-TIME if none is named. Raises UsageError."""
    folder = out or _unused(Path("runs") / f"{task}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not an empty folder; name another one with --out")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"folder {folder} can't be written: {error.strerror}; name another one with --out") from error
    return folder


def old_folder(folder: Path) -> tuple[RunConfig, Settings]:
    """The configuration of a run that was begun in this folder, to be resumed. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"there is no run folder {folder}")
    if not (folder / "config.toml").exists():
        raise UsageError(f"{folder} holds no config.toml, so no run was begun in it")
    flags, settings = read_config(folder / "config.toml")
    return merged(flags, {}), settings


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[IO[bytes]]:
    """A file, open for reading and appending, which keeps other processes out of its folder. Raises UsageError."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process is writing {folder}; wait for it, or stop it") from error
        yield file


@contextmanager
def record_file(folder: Path) -> Iterator[IO[bytes]]:
    """metrics.jsonl, open for reading and appending by this process alone. Raises UsageError."""
    path = folder / "metrics.jsonl"
    try:
        path.touch()
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
    with locked(path, folder) as file:
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
            leftover.unlink(missing_ok=True)  # of a write that was killed
        yield file


def _unused(folder: Path) -> Path:
    count, free = 1, folder
    while free.exists():
        count += 1
        free = folder.with_name(f"{folder.name}-{count}")
    return free


@attrs.frozen
class Run:
    """A finished run as it stands on disk: what reports and `compare` read.

    summary: summary.json. records: the lines of metrics.jsonl. config: config.toml, parsed. plugins:
    name, distribution and version of each that took part.
    """

    folder: Path
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def plugins(self) -> list[dict[str, str]]:
        plugins: list[dict[str, str]] = self.summary.get("plugins", [])
        return plugins

    @property
    def typed(self) -> str:
        """The plugins as they were typed."""
        return ",".join(self.config.get("run", {}).get("plugins", [])) or "defaults"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises UsageError if it is not there, not finished or damaged."""
    try:
        if not folder.is_dir():
            raise UsageError(f"there is no run folder {folder}")
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        config = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    except FileNotFoundError as error:
        begun = (folder / "config.toml").exists() and (folder / "metrics.jsonl").exists()
        advice = f"; moe-engine resume {folder} goes on with it" if begun else ""
        raise UsageError(f"{folder} holds no finished run: {Path(error.filename).name} is missing{advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"run folder {folder} is damaged: {error}") from error
    if problem := _problem(summary, records, config):
        raise UsageError(f"run folder {folder} is damaged: {problem}")
    return Run(folder, summary, records, config)


def number_of(summary: Mapping[str, Any], name: str) -> Any:
    """A number of a run's summary, or the mean over its layers of a number of theirs; None if there is none."""
    if name in summary:
        return summary[name]
    values = [layer[name] for layer in summary["layers"] if layer.get(name) is not None]
    return sum(values) / len(values) if values else None


def _problem(summary: Any, records: list[Any], config: dict[str, Any]) -> str | None:
    """What is wrong with the shape of a run's files, or None."""
    if not isinstance(summary, dict) or not _objects(summary.get("layers")) or "loss" not in summary:
        return "summary.json is no summary"
    if not records or not all(isinstance(r, dict) and {"split", "step", "layers"} <= r.keys() for r in records):
        return "metrics.jsonl holds no records"
    if not all(isinstance(record["layers"], dict) for record in records):
        return "metrics.jsonl holds no records"
    run = config.get("run", {})
    typed = run.get("plugins", []) if isinstance(run, dict) else None
    if not isinstance(typed, list) or not all(isinstance(name, str) for name in typed):
        return "config.toml has no [run]"
    return None


def _objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def dump(value: Any) -> str:
    """JSON, on one line, without NaN or Infinity."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
