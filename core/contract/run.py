"""A finished run, as reports and comparisons read it."""

from pathlib import Path
from typing import Any

import attrs

from ..errors import visible


@attrs.frozen
class Run:
    """A finished run as stored on disk: what reports and `compare` read.

    summary: summary.json. records: the lines of metrics.jsonl. config: config.toml, parsed. plugins:
    name, distribution and version of each plugin of the run.
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
        """The folder's name, as it can be shown anywhere."""
        return visible(self.folder.resolve().name)
