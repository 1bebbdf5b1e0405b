"""A run as far as it is on the disk: its records so far. Nothing is written, and no lock taken."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors

from ..contract.run import Run
from ..errors import UsageError
from ..files import MOST_TOML, check_file, digest, read_file, read_toml
from .folder import is_config, read_run


def records_of(content: bytes) -> list[dict[str, Any]]:
    """The records in metrics.jsonl while a run may be writing it: its whole lines, but for those that are damaged."""
    found = []
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        layers = record.get("layers") if isinstance(record, dict) else None
        whole = isinstance(layers, dict) and all(isinstance(metrics, dict) for metrics in layers.values())
        if whole and "split" in record and isinstance(record.get("step"), int):
            found.append(record)
    return found


def read_live(folder: Path) -> Run:
    """A run that may not have ended. Its summary has the layers that were recorded.

    Raises UsageError, also for records that are not those that summary.json or the newest checkpoint knows.
    """
    if (folder / "summary.json").exists():
        ended = read_run(folder)
        return Run(folder, {"layers": _layers(ended.records)}, ended.records, ended.config)
    try:
        config = read_toml(read_file(folder / "config.toml", MOST_TOML))
        known = _known(folder)  # first: a checkpoint that is written meanwhile knows more records
        content = read_file(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UsageError(f"{folder} does not hold a run; name a run's folder", code="unknown-run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} can't be read: {error}", code="unreadable-file") from error
    if not is_config(config):
        raise UsageError(f"run folder {folder} is damaged: config.toml has no [run]", code="damaged-run")
    if known and digest(content[: known["bytes"]]) != known:
        message = f"run folder {folder} is damaged: metrics.jsonl does not begin with what its checkpoint knows"
        raise UsageError(message, code="damaged-run")
    records = records_of(content)
    return Run(folder, {"layers": _layers(records)}, records, config)


def _known(folder: Path) -> dict[str, Any] | None:
    """Size and checksum of the records that the newest checkpoint knows; None without one that can be read."""
    for path in sorted(folder.glob("checkpoints/step-*.safetensors"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
            check_file(path)
            with safetensors.safe_open(path, framework="np") as file:
                known: dict[str, Any] = json.loads(file.metadata()["tree"])["records"]
            if isinstance(known["bytes"], int):
                return known
    return None


def _layers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers that were recorded, each with its number of experts."""
    sizes = {
        name: len(metrics["load"])
        for record in records
        for name, metrics in record["layers"].items()
        if isinstance(metrics.get("load"), list)
    }
    return [{"name": name, "experts": experts} for name, experts in sizes.items()]
