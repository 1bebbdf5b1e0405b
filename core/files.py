"""Files that a crash or a second process can't damage, and the files of a checkpoint."""

import errno
import fcntl
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from .errors import UsageError

SEAL = "sha256"  # the key of a checksum in a JSON object

MOST_TOML, LONGEST_LINE = 1 << 18, 4_000  # bytes of a configuration or a study, and characters of a line in it

INDEX = "model.safetensors.index.json"

ADVICE = {  # what to do about what the operating system refuses
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a place that is not read-only",
    errno.EACCES: "allow yourself access",
    errno.EPERM: "allow yourself access",
    errno.ENOENT: "put back what was moved or deleted",
    errno.ENOTDIR: "move the file that stands where a folder belongs",
    errno.EEXIST: "move what stands in its place",
    errno.EISDIR: "move the folder that stands where a file belongs",
    errno.ENOTEMPTY: "move the folder that stands where a file belongs",
    errno.ESTALE: "reconnect the network's file system",
    errno.EIO: "check the disk",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOLCK: "choose a file system that can lock files",
    errno.ENOMEM: "free some memory",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: readers, and a crash, see the old file or the new one, never a partial one.

    Raises OSError, which names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Let an error of the operating system name this path: that of a full disk names none, others a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def refused(error: OSError) -> str:
    """What the operating system refused, and what to do, without a full stop."""
    where = f"{error.filename} can't be used: " if error.filename is not None else ""
    advice = ADVICE.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {advice}" if advice else "")


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file: not of a pipe or device, which may never end.

    most: the largest size in bytes. Raises OSError, whose `strerror` is a reason in words, too, for another kind of
    file or a larger one.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    with naming(path), open(number, "rb") as file:
        _check_file(os.fstat(number), path, most)
        return file.read()


def read_toml(content: bytes) -> dict[str, Any]:
    """TOML of people. Raises ValueError, also for a line so long that its nested keys would take minutes."""
    text = content.decode()
    if any(len(line) > LONGEST_LINE for line in text.splitlines()):
        raise ValueError(f"a line has more than {LONGEST_LINE} characters")
    return tomllib.loads(text)


def check_file(path: Path) -> None:
    """Raise OSError if this is not a regular file, for libraries that open it by its name."""
    _check_file(os.stat(path), path)


def _check_file(status: os.stat_result, path: Path, most: int | None = None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    if most is not None and status.st_size > most:
        reason = f"its {status.st_size} bytes are more than the {most} that are allowed here"
        raise OSError(errno.EFBIG, reason, str(path))


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending, and lock other processes out of its folder. Raises UsageError.

    The file is not buffered: what `write` returns is how much was written.
    """
    with naming(path):
        opened = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below)
    with opened as file:
        try:
            with naming(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
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


def digest(content: bytes) -> dict[str, Any]:
    """The size and checksum by which other content is told apart."""
    return {"bytes": len(content), SEAL: sha256(content).hexdigest()}


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
        index = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the index is not JSON ({error})") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError("the index holds no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"the index names {name!r}, which is not a file next to it")
    return [path.parent / name for name in sorted(set(names.values()))]
