"""Drive a run to its end: progress, signals, exit codes. Shared by `run` and `resume`."""

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

from ..errors import RunError
from ..files import dump, write_atomically
from ..parallel.launch import rank

if TYPE_CHECKING:
    from ..run.training import Training

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same seed, same bits on a GPU; must precede CUDA


def follow(training: "Training", as_json: bool, quiet: bool, debug: bool) -> int:
    """Run a training under a progress display; returns the exit code."""
    from ..run.training import Stopped
    from .progress import Progress

    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        training.stop = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        with Progress(training, quiet or rank() > 0) as progress:
            training.listener, training.say = progress.show, progress.say
            finished = training.run()
    except Stopped:
        advice = f"continue with: moe-engine resume {training.folder}"
        if rank() == 0:
            click.echo(f"moe-engine: stopped at step {training.step} of {training.total_steps}; {advice}", err=True)
        return STOPS[signal.Signals(received[0])] if received else STOPS[signal.SIGTERM]
    except (Exception, SystemExit) as error:
        failure = training.culprit(error)
        if failure is None:
            raise
        raise _blame(training, failure, error, debug) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if rank() > 0:
        return 0
    if as_json:
        click.echo(dump(finished.summary))
    else:
        progress.finish(finished)
    return 0


def _blame(training: "Training", failure: str, error: BaseException, debug: bool) -> RunError:
    text = "".join(traceback.format_exception(error))
    if debug:
        sys.stderr.write(text)
    log = training.folder / "run.log"
    write_atomically(log, text.encode())
    return RunError(f"{failure} (traceback in {log}, or use --debug)", code="plugin-failed")
