"""A run as far as it is on the disk: its records so far, Nothing is written, and no lock taken."""

import json
from pathlib import Path
from typing import Any

from ..contract.run import Run
from ..errors import UsageError
from ..files import MOST_TOML, read_file, read_toml
from .folder import is_config


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
    """A run that may not have ended. Its summary has the layers that were recorded. Raises UsageError."""
    try:
        config = read_toml(read_file(folder / "config.toml", MOST_TOML))
        content = read_file(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UsageError(f"{folder} does not hold a run; name a run's folder", code="unknown-run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} can't be read: {error}", code="unreadable-file") from error
    if not is_config(config):
        raise UsageError(f"run folder {folder} is damaged: config.toml has no [run]", code="damaged-run")
    records = records_of(content)
    sizes = {
        name: len(metrics["load"])
        for record in records
        for name, metrics in record["layers"].items()
        if isinstance(metrics.get("load"), list)
    }
    layers = [{"name": name, "experts": experts} for name, experts in sizes.items()]
    return Run(folder, {"layers": layers}, records, config)
