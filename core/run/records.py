"""metrics.jsonl: the records that a run writes as it goes."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import attrs

from ..contract.stats import Metrics, plain
from ..errors import RunError
from ..files import digest, dump, naming

Listener = Callable[[dict[str, Any]], None]


@attrs.frozen(eq=False)
class RecordFile:
    """metrics.jsonl: one JSON object per line. listener: receives each record as it is written.

    file: on ranks other than the first, one that keeps nothing and has no name.
    """

    file: IO[bytes]
    name: Path | None = None
    listener: Listener = lambda record: None

    def write(self, record: dict[str, Any]) -> None:
        """Write one record."""
        left = memoryview((dump(record) + "\n").encode())
        with naming(self.name):
            while left:  # a file that is not buffered may take a part
                left = left[self.file.write(left) :]
            self.file.flush()
        self.listener(record)

    def write_metrics(
        self, split: str, step: int, epoch: int, means: Mapping[str, float], layers: Mapping[str, Metrics]
    ) -> None:
        """Write the means and every layer's metrics on "train" or "eval"."""
        numbers = {layer: {name: plain(value) for name, value in metrics.items()} for layer, metrics in layers.items()}
        head = {"split": split, "step": step, "epoch": epoch}
        self.write({**head, **{name: plain(value) for name, value in means.items()}, "layers": numbers})

    def sync(self) -> dict[str, Any]:
        """Make sure that all records are on the disk; returns the file's size in "bytes" and its "sha256".

        Raises RunError if the file was replaced or deleted, and so was its folder, perhaps.
        """
        with naming(self.name):
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.name is not None and not self._in_place(self.name):
            message = f"{self.name} was moved or deleted while the run wrote it; nothing more is saved there"
            raise RunError(message, code="folder-gone")
        self.file.seek(0)
        content = self.file.read()
        return digest(content)

    def _in_place(self, name: Path) -> bool:
        """Whether the name still leads to this file."""
        try:
            return bool(os.path.samestat(os.stat(name), os.fstat(self.file.fileno())))
        except FileNotFoundError:
            return False

    def begins(self, with_: Mapping[str, Any]) -> bool:
        """Whether the file begins with the records of an earlier `sync`."""
        self.file.seek(0)
        return digest(self.file.read(with_["bytes"])) == with_

    def truncate(self, size: int) -> None:
        """Discard everything after the first `size` bytes."""
        self.file.truncate(size)
