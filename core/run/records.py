"""metrics.jsonl: the records that a run writes as it goes."""

import os
from collections.abc import Callable, Mapping
from typing import IO, Any

import attrs

from ..contract.stats import Metrics, plain
from ..files import dump

Listener = Callable[[dict[str, Any]], None]


@attrs.frozen(eq=False)
class RecordFile:
    """metrics.jsonl: one JSON object per line. listener: receives each record as it is written.

    file: on ranks other than the first, one that keeps nothing.
    """

    file: IO[bytes]
    listener: Listener = lambda record: None

    def write(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self.file.write((dump(record) + "\n").encode())
        self.file.flush()
        self.listener(record)

    def write_metrics(
        self, split: str, step: int, epoch: int, means: Mapping[str, float], layers: Mapping[str, Metrics]
    ) -> None:
        """Write the means and every layer's metrics on "train" or "eval"."""
        numbers = {layer: {name: plain(value) for name, value in metrics.items()} for layer, metrics in layers.items()}
        head = {"split": split, "step": step, "epoch": epoch}
        self.write({**head, **{name: plain(value) for name, value in means.items()}, "layers": numbers})

    def sync(self) -> int:
        """Make sure that all records are on the disk; returns the file's size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def size(self) -> int:
        """The file's size in bytes."""
        return self.file.seek(0, os.SEEK_END)

    def truncate(self, size: int) -> None:
        """Discard everything after the first `size` bytes."""
        self.file.truncate(size)
