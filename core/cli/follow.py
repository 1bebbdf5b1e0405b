"""Drive a run to its end: progress, signals, exit codes. Shared by `run` and `resume`."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..files import refused
from ..parallel.launch import rank
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..run.training import Training

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same seed, same bits on a GPU; must precede CUDA


@contextmanager
def stopping(training: "Training") -> Iterator[list[int]]:
    """In the body, a signal stops the run after the present step, and a second one ends the process at once.

    Yields the list of the signals received.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        training.stop = True
        for each in STOPS:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(training: "Training", as_json: bool, quiet: bool, debug: bool) -> int:
    """Run a training under a progress display; returns the exit code."""
    from ..run.training import Stopped
    from .progress import Progress

    received: list[int] = []
    try:
        with stopping(training) as received, Progress(training, quiet or rank() > 0) as progress:
            training.listener, training.say = progress.show, progress.say
            training.warn = progress.warn if rank() == 0 else progress.say
            finished = training.run()
    except Stopped:
        advice = f"continue with: moe-engine resume {training.folder}"
        if rank() == 0:
            echo(f"moe-engine: stopped at step {training.step} of {training.total_steps}; {advice}", err=True)
        return STOPS[signal.Signals(received[0])] if received else STOPS[signal.SIGTERM]
    except BaseException as error:  # a plugin may raise any kind
        if (explained := _explained(training, error, debug)) is None:
            raise
        raise explained from error
    if rank() == 0:
        if as_json:
            echo_json(finished.summary)
        else:
            progress.finish(finished)
        if received:
            echo("moe-engine: told to stop when nothing but the reports was missing; all is complete", err=True)
    return STOPS[signal.Signals(received[0])] if received else 0


def _explained(training: "Training", error: BaseException, debug: bool) -> RunError | None:
    """What a plugin or the operating system did, as an error that says so; None if it was neither."""
    from ..run.failures import write_log

    folder: Path | None = getattr(training, "folder", None)
    if failure := training.culprit(error):
        text = "".join(traceback.format_exception(error))
        if debug:
            sys.stderr.write(text)
        where = write_log(folder, text) if folder else "--debug shows the traceback"
        return RunError(f"{failure} ({where})", code="plugin-failed")
    if isinstance(error, OSError) and folder and (folder / "config.toml").exists():
        message = f"{refused(error)}, then continue with: moe-engine resume {folder}"
        return RunError(message, code="system-refused")
    return None
