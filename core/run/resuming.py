"""May a run go on from this checkpoint, and what has changed since?"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .records import RecordFile


def check_resumable(
    folder: Path, tree: Mapping[str, Any], config_text: str, records: RecordFile, dropped: Iterable[str] = ()
) -> None:
    """Raise UsageError if the configuration or the records are not those of the checkpoint `tree`.

    dropped: plugins that are left out from here on.
    """
    if _without(tree["config"], dropped) != _without(config_text, dropped):
        raise UsageError(
            f"{folder / 'config.toml'} was changed since the run began; undo the change, or start a new run with: "
            "moe-engine run --config",
            code="config-changed",
        )
    if not records.begins(tree["records"]):
        message = f"{folder / 'metrics.jsonl'} is damaged: it does not begin with the records that its checkpoint knows"
        raise UsageError(message, code="damaged-run")


def _without(text: str, dropped: Iterable[str]) -> dict[str, Any]:
    """A configuration without some plugins, and without the versions that it was made with."""
    config, names = tomllib.loads(text), set(dropped)
    run = {**config["run"], "plugins": [name for name in config["run"]["plugins"] if name not in names]}
    run["no_plugin"] = sorted(set(run["no_plugin"]) - names)
    options = {name: table for name, table in config.get("plugins", {}).items() if name not in names}
    return {"run": run, "plugins": options}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a checkpoint was made with and is different now: libraries, distributions and the code of plugins."""
    old, new = then["versions"], now["versions"]
    found = [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new[name]]
    homes = [
        {one["name"]: f"{one['distribution']} {one['version']}" for one in made["plugins"]} for made in (then, now)
    ]
    moved = {name: (homes[0].get(name), home) for name, home in homes[1].items() if homes[0].get(name, home) != home}
    found += [f"plugin '{name}' ({before} -> {after})" for name, (before, after) in moved.items()]
    code = then["code"]
    return found + [
        f"the code of plugin '{name}'"
        for name, digest in now["code"].items()
        if name not in moved and code.get(name, digest) != digest
    ]
