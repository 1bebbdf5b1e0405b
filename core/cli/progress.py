"""Live progress of a run: a bar with the numbers that matter, or plain lines where there is no terminal."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import rich.progress
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..contract.run import Run
    from ..run.training import Training


class Progress:
    """A context in which `show` takes each record of a run. All goes to standard error."""

    def __init__(self, training: "Training", quiet: bool) -> None:
        self.training, self.quiet = training, quiet
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.bar = _Bar(training, self.console) if self.console.is_terminal and not quiet else None
        self.latest: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Progress":
        if not self.quiet:
            engine, config = self.training.engine, self.training.config
            chosen = [
                name
                for name, one in engine.plugins.found.items()
                if name in config.plugins or one.kind not in ("metric", "report", "task", "initializer")
            ]
            model = f"{config.experts} experts, top {config.top_k}"
            work = f"{self.training.total_steps} steps on {self.training.device.type}"
            self._print(f"{config.task}: {', '.join(chosen)}; {model}; {work}")
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
        self.latest[record["split"]] = record
        if self.bar is not None:
            self.bar.say(_facts(self.latest.get("train"), self.latest.get("eval")))
        elif not self.quiet:
            words = "test " if record["split"] == "eval" else "train"
            self._print(f"step {record['step']:>6}/{self.training.total_steps}  {words}  {_facts(record)}")

    def say(self, remark: str) -> None:
        """A remark, above the bar where there is one."""
        if not self.quiet:
            (self.bar.console if self.bar is not None else self.console).print(remark, highlight=False, soft_wrap=True)

    def finish(self, run: "Run") -> None:
        """The result, on standard output."""
        summary = run.summary
        console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        result = f"loss {summary['loss']}"
        if summary["perplexity"] is not None:
            result = f"perplexity {summary['perplexity']:.4g}"
        elif summary["accuracy"] is not None:
            result = f"accuracy {summary['accuracy']:.2%}"
        work = f"{summary['steps']} steps, {summary['seconds']:.0f} s"
        console.print(f"{summary['verdict'] or 'no verdict'}: {result} on the test set after {work}")
        for finding in summary["findings"]:
            console.print(
                f"  {finding['layer']}: {finding['why']}" + (f"; {finding['advice']}" if finding["advice"] else "")
            )
        report = run.folder / "report.html"
        console.print(f"report: {report}" if report.exists() else f"run: {run.folder}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class _Bar(rich.progress.Progress):
    """A bar that reads the step by itself, so that the training loop need not report each one."""

    def __init__(self, training: "Training", console: Console) -> None:
        self.training = training
        self.only: rich.progress.TaskID | None = None  # rich draws once before there is a task
        super().__init__(
            rich.progress.BarColumn(24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=console,
        )
        self.only = self.add_task("", total=training.total_steps)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.only is not None:
            self.update(self.only, completed=self.training.step)
        yield from super().get_renderables()

    def say(self, facts: str) -> None:
        if self.only is not None:
            self.update(self.only, description=facts)


class Cells:
    """A context in which `show` takes each cell of a grid. All goes to standard error."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.bar = rich.progress.Progress(
            rich.progress.BarColumn(24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self.console,
            speed_estimate_period=1e6,  # a cell may take longer than the 30 seconds that rich looks back
            disable=quiet or not self.console.is_terminal,
        )
        self.only = self.bar.add_task("", total=None)
        self.began = (0, time.monotonic())  # cells that were there already, and when the others were begun

    def __enter__(self) -> "Cells":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int, record: dict[str, Any] | None) -> None:
        """Take one cell's record; None at first, when `done` of the `total` are there already."""
        if record is None:
            self.began = (done, time.monotonic())
            words = f"{total - done} runs to do" + (f", {done} are there already" if done else "")
        else:
            words = f"{record['variant']}, seed {record['seed']}: {_summed(record)}"
        self.bar.update(self.only, completed=done, total=total, description=words)
        if not self.quiet and not self.console.is_terminal:
            self._line(done, total, words)

    def _line(self, done: int, total: int, words: str) -> None:
        before, start = self.began
        made = done - before
        left = f"  ({(time.monotonic() - start) / made * (total - done):.0f} s left)" if made and done < total else ""
        self.console.print(f"{done}/{total}  {words}{left}", highlight=False, soft_wrap=True)


def _summed(record: dict[str, Any]) -> str:
    """A cell's summary in the words of `_facts`, or why it has none."""
    if "summary" not in record:
        return str(record["reason"])
    summary = record["summary"]
    return _facts({**summary, "layers": {layer["name"]: layer for layer in summary["layers"]}})


def _facts(record: dict[str, Any] | None, other: dict[str, Any] | None = None) -> str:
    """Loss, accuracy, cv, maxvio and active experts of a record; layers are averaged."""
    record = record or other
    if record is None:
        return ""
    facts = ["loss not finite" if record["loss"] is None else f"loss {record['loss']:.4f}"]
    source = other if other is not None and other.get("accuracy") is not None else record
    if source.get("accuracy") is not None:
        facts.append(f"{'test ' if source is not record else ''}accuracy {source['accuracy']:.2%}")
    layers = list(record["layers"].values())
    for name, digits in (("cv", 2), ("maxvio", 2), ("active", 0)):
        values = [layer[name] for layer in layers if layer.get(name) is not None]
        if values:
            facts.append(f"{name} {sum(values) / len(values):.{digits}f}")
    return "  ".join(facts)


def event(growth: dict[str, Any]) -> str:
    """A growth in words."""
    born, gone = growth["rows"].count(None), len(growth["drop"])
    source = f"{born} born by {growth['initializer']}" if born else ""
    what = " and ".join(part for part in (source, f"{gone} removed" if gone else "") if part)
    moved = "" if growth["change"] is None else f", output changed by {growth['change']:.1%}"
    return f"{growth['layer']} has {growth['after']} experts, {what}{moved} ({growth['why']})"


def cell(value: Any) -> str:
    """One cell of a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on standard output, folded to a terminal's width; in a file no line is folded."""
    drawn = Table()
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=10_000)
    console.print(drawn)
