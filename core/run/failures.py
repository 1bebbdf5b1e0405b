"""Whose failure ends a run, and reports of which one may fail."""

import traceback
from collections.abc import Callable

from torch import Tensor

from ..contract.run import Run
from ..engine.engine import Engine
from ..engine.measuring import backward_culprit
from ..errors import RunError
from ..files import write_atomically
from ..processes import distributed


def culprit_of(engine: Engine, error: BaseException, probe: Callable[[], Tensor]) -> str | None:
    """The plugin that an exception came from, in its code or in backward; None if it came from none.

    probe: a forward on a held-out batch.
    """
    who = engine.culprit(error)
    if who is None and isinstance(error, RuntimeError) and not distributed():  # other ranks would not join the probe
        who = backward_culprit(engine.layers, engine.plugins, probe, error)
    return who


def write_reports(engine: Engine, run: Run) -> None:
    """Write every report of a finished run; one that fails costs no other. Raises RunError afterwards."""
    failures = []
    for bound in engine.plugins.bind("moe_report"):
        try:
            bound({"run": run})
        except (Exception, SystemExit) as error:
            who = engine.culprit(error) or f"{engine.plugins.origin(bound.plugin)} in moe_report"
            failures.append((f"{who} failed at step {run.records[-1]['step']}: {type(error).__name__}: {error}", error))
    if failures:
        log = run.folder / "run.log"
        write_atomically(log, "".join("".join(traceback.format_exception(error)) for _, error in failures).encode())
        sentences = "; ".join(sentence for sentence, _ in failures)
        message = f"{sentences} (traceback in {log}, or use --debug); the run and its other reports are complete"
        raise RunError(message, code="plugin-failed") from failures[0][1]
