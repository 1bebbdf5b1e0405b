"""Live progress of a run or a grid, on standard error, and the result of a run."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import rich.progress
from rich.console import Console, RenderableType

from ..errors import visible
from ..run.forms import fixed, percent, shown
from .tables import print_line, print_on

if TYPE_CHECKING:
    from ..contract.run import Run
    from ..run.training import Training

FACTS = 76  # columns for the steps, the time left and the facts; a bar fills the rest of the terminal, if there is any
LEAST_BAR = 8  # columns below which there is no bar
ROOMY = 110  # columns from which the facts have room for maxvio
UNTITLED = ("metric", "report", "task", "initializer")  # kinds that the first line names only where they were typed


class Progress:
    """A context for showing a run's records as they arrive; all output goes to standard error."""

    def __init__(self, training: "Training", quiet: bool) -> None:
        self.training, self.quiet = training, quiet
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.bar = _Bar(training, self.console) if self.console.is_terminal and not quiet else None
        self.began: tuple[int, float] | None = None  # step and time of the last record, or of the start

    def __enter__(self) -> "Progress":
        engine, config = self.training.engine, self.training.config
        chosen = [
            name for name, found in engine.plugins.found.items() if name in config.plugins or found.kind not in UNTITLED
        ]
        model = f"{config.experts or 'varying'} experts, top {config.top_k or 'varying'}"
        work = f"{self.training.total_steps} steps on {self.training.device.type}"
        self.say(f"{config.task}: {', '.join(chosen)}; {model}; {work}")
        self.began = (0, time.monotonic()) if not self.training.resumed else None
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Take one record of metrics.jsonl."""
        if record["split"] == "growth":
            self.say(f"step {record['step']}: {event(record['growth'])}")
            return
        if self.bar is not None:
            names = ("cv", "maxvio", "active") if self.console.width >= ROOMY else ("cv", "active")
            self.bar.say(f"{_split(record)} {', '.join(facts(record, names, terms=False))}")
            return
        words = [f"step {record['step']:>6}", f"epoch {record['epoch']}", f"{_split(record):5}", *facts(record)]
        self.say("  ".join([*words, *self._pace(record)]))

    def _pace(self, record: dict[str, Any]) -> list[str]:
        """The time per step before a training record, since the record before it; so evaluations are left out."""
        now, began = time.monotonic(), self.began
        self.began = (record["step"], now)
        if record["split"] != "train" or began is None or record["step"] <= began[0]:
            return []
        return [f"{1000 * (now - began[1]) / (record['step'] - began[0]):.1f} ms/step"]

    def say(self, remark: str) -> None:
        """Print a remark, above the progress bar if there is one."""
        if not self.quiet:
            self.warn(remark)

    def warn(self, remark: str) -> None:
        """Print a remark even if quiet. A standard error that fails ends no run."""
        with suppress(OSError):
            print_on(self.bar.console if self.bar is not None else self.console, remark)

    def finish(self, run: "Run") -> None:
        """Print the result on standard output."""
        summary = run.summary
        result = f"loss {fixed(summary['loss'], 4)}"
        if summary["perplexity"] is not None:
            result = f"perplexity {fixed(summary['perplexity'], 2)}"
        elif summary["accuracy"] is not None:
            result = f"accuracy {percent(summary['accuracy'])}"
        work = f"{summary['steps']} steps, {summary['seconds']:.0f} s"
        print_line(f"{summary['verdict'] or 'no verdict'}: {result} on the test set after {work}")
        for finding in summary["findings"]:
            advice = f"; {finding['advice']}" if finding["advice"] else ""
            print_line(f"  {finding['layer']}: {finding['why']}{advice}")
        report = run.folder / "report.html"
        print_line(f"report: {report}" if report.exists() else f"run: {run.folder}")


class _Bar(rich.progress.Progress):
    """A bar that reads the step from the training, so the training loop need not report it."""

    def __init__(self, training: "Training", console: Console) -> None:
        self.training = training
        self.task_id: rich.progress.TaskID | None = None  # rich draws once before there is a task
        super().__init__(
            *_columns(console), rich.progress.TextColumn("{task.description}", markup=False), console=console
        )
        self.task_id = self.add_task("", total=training.total_steps)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.task_id is not None:
            self.update(self.task_id, completed=self.training.step)
        yield from super().get_renderables()

    def say(self, facts: str) -> None:
        if self.task_id is not None:
            self.update(self.task_id, description=facts)


def _columns(console: Console) -> tuple[rich.progress.ProgressColumn, ...]:
    """The bar, steps done and time left, narrow enough for the facts that follow on the same line."""
    width = min(24, console.width - FACTS)
    bar = (rich.progress.BarColumn(width),) if width >= LEAST_BAR else ()
    time_left = rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    return (*bar, rich.progress.MofNCompleteColumn(), time_left)


class Cells:
    """A context for showing a grid's cells as they finish; all output goes to standard error."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.bar = rich.progress.Progress(
            *_columns(self.console),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self.console,
            speed_estimate_period=1e6,  # a cell may take longer than the 30 seconds that rich looks back
            disable=quiet or not self.console.is_terminal,
        )
        self.task_id = self.bar.add_task("", total=None)
        self.began = (0, time.monotonic())  # cells that were stored already, and when the others began

    def __enter__(self) -> "Cells":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int, record: dict[str, Any] | None) -> None:
        """Take one cell's record, or None at first, when `done` of the `total` are stored already."""
        if record is None:
            self.began = (done, time.monotonic())
            words = f"{total - done} runs to do" + (f", {done} already done" if done else "")
        else:
            words = f"{record['variant']}, seed {record['seed']}: {_result(record)}"
        self.bar.update(self.task_id, completed=done, total=total, description=visible(words))
        if not self.quiet and not self.console.is_terminal:
            self._line(done, total, words)

    def _line(self, done: int, total: int, words: str) -> None:
        before, start = self.began
        new = done - before
        left = f"  ({(time.monotonic() - start) / new * (total - done):.0f} s left)" if new and done < total else ""
        print_on(self.console, f"{done}/{total}  {words}{left}")


def _result(record: dict[str, Any]) -> str:
    """A cell's loss and accuracy, or the reason why it has none."""
    if "summary" not in record:
        return str(record["reason"])
    return "  ".join(_quality(record["summary"]))


def _quality(record: dict[str, Any]) -> list[str]:
    quality = ["loss not finite" if record["loss"] is None else f"loss {fixed(record['loss'], 4)}"]
    if record.get("accuracy") is not None:
        quality.append(f"accuracy {percent(record['accuracy'])}")
    return quality


def _split(record: dict[str, Any]) -> str:
    """What a record was measured on, as people call it."""
    return "test" if record["split"] == "eval" else str(record["split"])


def facts(record: dict[str, Any], names: Sequence[str] = ("cv", "maxvio", "active"), terms: bool = True) -> list[str]:
    """Loss, accuracy and balance of a record, all of its split; balance is averaged over layers.

    terms: the loss terms too, unweighted, each averaged over the layers; an evaluation has none.
    """
    loss, *accuracy = _quality(record)
    layers = list(record["layers"].values())
    losses = sorted({name for layer in layers for name in layer if name.startswith("loss.")}) if terms else []
    found = {name: [layer[name] for layer in layers if layer.get(name) is not None] for name in [*losses, *names]}
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    told = [f"{name.removeprefix('loss.')} {shown(name, float(mean))}" for name, mean in means.items()]
    count = sum(name in means for name in losses)
    return [loss, *told[:count], *accuracy, *told[count:]]


def event(growth: dict[str, Any]) -> str:
    """A growth in words."""
    merged = sum(isinstance(parent, list) for parent in growth["parents"])
    added, removed = growth["rows"].count(None) - merged, len(growth["drop"])
    parents = ["none" if one is None else str(one) for one in growth["parents"] if not isinstance(one, list)]
    whose = f" (parent {', '.join(dict.fromkeys(parents))})" if parents else ""
    counts = {f"added by {growth['initializer']}{whose}": added, "merged": merged, "removed": removed}
    what = " and ".join(f"{count} {how}" for how, count in counts.items() if count)
    moved = "" if growth["change"] is None else f", output changed by {percent(growth['change'])}"
    return f"{growth['layer']} has {growth['after']} experts, {what}{moved} ({growth['why']})"


def tracked(items: Sequence[Any], words: str, quiet: bool = False) -> Iterable[Any]:
    """The items, with a bar and the time left on standard error if that is a terminal."""
    console = Console(stderr=True)
    return rich.progress.track(items, words, console=console, transient=True, disable=quiet or not console.is_terminal)
