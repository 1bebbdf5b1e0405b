"""Files that a crash or a second process can't damage."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UsageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: readers, and a crash, see the old file or the new one, never a partial one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending, and lock other processes out of its folder. Raises UsageError."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = f"another process is writing {folder}; wait for it, or stop it"
            raise UsageError(message, code="folder-in-use") from error
        yield file


def dump(value: Any) -> str:
    """JSON on one line, without NaN or Infinity."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
