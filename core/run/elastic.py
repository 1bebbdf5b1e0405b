"""A run that torchrun starts again, after a failure or in a new job of the same id, goes on in its folder."""

import os
from pathlib import Path

from ..files import write_atomically
from ..parallel.launch import rank, started
from ..processes import of_first
from .folder import MARK


def begun(out: Path | None, task: str) -> Path | None:
    """The folder of an earlier start of the same job, for all ranks; None if there is none.

    out: the run's folder, if one is named; otherwise the folders of this task in runs/ are searched.
    """
    if started() == 1:
        return None
    found = ""
    if rank() == 0:
        marks = [out / MARK] if out is not None else sorted(Path("runs").glob(f"{task}-*/{MARK}"))
        mine = [mark.parent for mark in marks if mark.is_file() and mark.read_text("utf-8") == _job()]
        found = str(mine[-1]) if mine and (mine[-1] / "config.toml").exists() else ""
    found = of_first(found)
    return Path(found) if found else None


def remember(folder: Path) -> None:
    """Note in a run's folder which job it belongs to."""
    if started() > 1 and rank() == 0:
        write_atomically(folder / MARK, _job().encode())


def _job() -> str:
    """torchrun's id of the job, or, if none was given, of its launcher, which outlives a restart."""
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return named if named not in ("", "none") else f"launcher {os.getppid()}"
