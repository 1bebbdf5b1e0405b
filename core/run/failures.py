"""Whose failure ends a run, and reports of which one may fail."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..engine.engine import Engine
from ..engine.measuring import backward_culprit
from ..errors import RunError, UsageError
from ..files import write_atomically
from ..processes import distributed
from .folder import read_run


def culprit_of(engine: Engine, error: BaseException, probe: Callable[[], Tensor]) -> str | None:
    """The plugin that an exception came from, in its code or in backward; None if it came from none.

    probe: a forward on a held-out batch.
    """
    who = engine.culprit(error)
    if who is None and isinstance(error, RuntimeError) and not distributed():  # other ranks would not join the probe
        who = backward_culprit(engine.layers, engine.plugins, probe, error)
    return who


@contextmanager
def failing(engine: Engine) -> Iterator[None]:
    """In the body, what would be bad input before a run began makes it fail. What a plugin raises is left alone."""
    try:
        yield
    except UsageError as error:
        if engine.culprit(error) is not None:
            raise
        code = error.code
        raise RunError(str(error), code=code) from error


def write_reports(engine: Engine, folder: Path) -> None:
    """Write every report of a finished run; one that fails costs no other. Raises RunError afterwards."""
    failures = []
    run = read_run(folder)
    for bound in engine.plugins.bind("moe_report"):
        try:
            bound({"run": read_run(folder)})  # its own, so that what it changes there reaches no other
        except BaseException as error:
            who = engine.culprit(error) or f"{engine.plugins.origin(bound.plugin)} in moe_report"
            failures.append((f"{who} failed at step {run.records[-1]['step']}: {type(error).__name__}: {error}", error))
    if failures:
        where = write_log(run.folder, "".join("".join(traceback.format_exception(error)) for _, error in failures))
        sentences = "; ".join(sentence for sentence, _ in failures)
        message = f"{sentences} ({where}); the run and its other reports are complete"
        raise RunError(message, code="plugin-failed") from failures[0][1]


def write_log(folder: Path, text: str) -> str:
    """Write tracebacks into a run's folder, as run.log; returns where they are, in words."""
    try:
        write_atomically(folder / "run.log", text.encode(errors="backslashreplace"))
    except OSError:  # where the disk is full, a message on it is worth more than a log
        return "--debug shows the traceback"
    return f"traceback in {folder / 'run.log'}, or use --debug"
