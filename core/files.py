"""Files that a crash or a second process can't damage, and the files of a checkpoint."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from .errors import UsageError

SEAL = "sha256"  # the key of a checksum in a JSON object

INDEX = "model.safetensors.index.json"


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


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of all else in it, as "sha256", so that a changed bit is noticed."""
    return {**value, SEAL: sha256(dump(value).encode()).hexdigest()}


def unsealed(text: str) -> dict[str, Any]:
    """The object that `sealed` made, read from JSON, without its checksum. Raises ValueError if it is another one."""
    value = json.loads(text)
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError("it has no checksum")
    seal = value.pop(SEAL)
    if sealed(value)[SEAL] != seal:
        raise ValueError("its checksum is wrong")
    return value


def safetensors_of(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, a folder, or an index such as model.safetensors.index.json.

    Raises OSError or ValueError if an index can't be read, or if there are none.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).exists():
            return safetensors_of(path / INDEX)
        if not (files := sorted(path.glob("*.safetensors"))):
            raise ValueError("the folder holds no *.safetensors")
        return files
    if path.suffix != ".json":
        return [path]
    try:
        index = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the index is not JSON ({error})") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError("the index holds no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"the index names {name!r}, which is not a file next to it")
    return [path.parent / name for name in sorted(set(names.values()))]
