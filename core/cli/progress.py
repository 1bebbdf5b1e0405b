"""Live progress of a run or a grid, and tables of results that fit the terminal."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import rich.progress
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import visible
from .output import standard_output

if TYPE_CHECKING:
    from ..contract.run import Run
    from ..run.training import Training

FACTS = 76  # columns for the text next to the progress bar, which fills the rest of the terminal
GAP = 2  # columns between two columns of a table
FOLDED = 30  # the least width to which a table's last column is folded
UNTITLED = ("metric", "report", "task", "initializer")  # kinds that the first line names only where they were typed


class Progress:
    """A context for showing a run's records as they arrive; all output goes to standard error."""

    def __init__(self, training: "Training", quiet: bool) -> None:
        self.training, self.quiet = training, quiet
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.bar = _Bar(training, self.console) if self.console.is_terminal and not quiet else None
        self.latest: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Progress":
        engine, config = self.training.engine, self.training.config
        chosen = [
            name for name, found in engine.plugins.found.items() if name in config.plugins or found.kind not in UNTITLED
        ]
        model = f"{config.experts or 'varying'} experts, top {config.top_k or 'varying'}"
        work = f"{self.training.total_steps} steps on {self.training.device.type}"
        self.say(f"{config.task}: {', '.join(chosen)}; {model}; {work}")
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
        else:
            split = "test " if record["split"] == "eval" else "train"
            self.say(f"step {record['step']:>6}  {split}  {_facts(record)}")

    def say(self, remark: str) -> None:
        """Print a remark, above the progress bar if there is one."""
        if not self.quiet:
            self.warn(remark)

    def warn(self, remark: str) -> None:
        """Print a remark even if quiet. A standard error that fails ends no run."""
        with suppress(OSError):
            _print(self.bar.console if self.bar is not None else self.console, remark)

    def finish(self, run: "Run") -> None:
        """Print the result on standard output."""
        summary = run.summary
        result = f"loss {summary['loss']}"
        if summary["perplexity"] is not None:
            result = f"perplexity {summary['perplexity']:.4g}"
        elif summary["accuracy"] is not None:
            result = f"accuracy {summary['accuracy']:.2%}"
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
    width = max(4, min(24, console.width - FACTS))
    time_left = rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    return rich.progress.BarColumn(width), rich.progress.MofNCompleteColumn(), time_left


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
        _print(self.console, f"{done}/{total}  {words}{left}")


def _result(record: dict[str, Any]) -> str:
    """A cell's loss and accuracy, or the reason why it has none."""
    if "summary" not in record:
        return str(record["reason"])
    return "  ".join(_quality(record["summary"]))


def _quality(record: dict[str, Any], accuracy: str = "accuracy") -> list[str]:
    facts = ["loss not finite" if record["loss"] is None else f"loss {record['loss']:.4f}"]
    if record.get("accuracy") is not None:
        facts.append(f"{accuracy} {record['accuracy']:.1%}")
    return facts


def _facts(record: dict[str, Any] | None, test: dict[str, Any] | None = None) -> str:
    """Loss, accuracy, cv, maxvio and active experts of a record, averaged over layers.

    The accuracy is that of `test`, the latest evaluation, if there is one.
    """
    record = record or test
    if record is None:
        return ""
    facts = _quality(record)
    if test is not None and test is not record and test.get("accuracy") is not None:
        facts = [facts[0], *_quality(test, "test")[1:]]
    layers = list(record["layers"].values())
    for name, digits in (("cv", 2), ("maxvio", 2), ("active", 0)):
        values = [layer[name] for layer in layers if layer.get(name) is not None]
        if values:
            facts.append(f"{name} {sum(values) / len(values):.{digits}f}")
    return "  ".join(facts)


def event(growth: dict[str, Any]) -> str:
    """A growth in words."""
    merged = sum(isinstance(parent, list) for parent in growth["parents"])
    added, removed = growth["rows"].count(None) - merged, len(growth["drop"])
    counts = {f"added by {growth['initializer']}": added, "merged": merged, "removed": removed}
    what = " and ".join(f"{count} {how}" for how, count in counts.items() if count)
    moved = "" if growth["change"] is None else f", output changed by {growth['change']:.1%}"
    return f"{growth['layer']} has {growth['after']} experts, {what}{moved} ({growth['why']})"


def tracked(items: Sequence[Any], words: str, quiet: bool = False) -> Iterable[Any]:
    """The items, with a bar and the time left on standard error if that is a terminal."""
    console = Console(stderr=True)
    return rich.progress.track(items, words, console=console, transient=True, disable=quiet or not console.is_terminal)


# -- what is printed at the end --------------------------------------------------------------------


def _print(console: Console, line: str) -> None:
    """Print plain text: folded at words on a terminal, and one whole line in a file, for grep."""
    console.print(Text(visible(line)), highlight=False, soft_wrap=not console.is_terminal)


def print_line(line: str) -> None:
    """Print plain text on standard output: folded at words on a terminal, whole in a file."""
    with standard_output() as stream:
        _print(Console(file=stream, highlight=False, markup=False, emoji=False), line)


def cell(value: Any) -> str:
    """One cell of a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1) -> None:
    """Print a table on standard output.

    If the terminal is too narrow, the columns are split into several tables, each with the first `keys` columns,
    which name the rows. In a file there is one table with one line per row, for grep.
    """
    columns, rows = list(map(visible, columns)), [list(map(visible, row)) for row in rows]
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    with standard_output() as stream:
        terminal = Console(file=stream)
        console = terminal if terminal.is_terminal else Console(file=stream, width=10_000)
        _print_blocks(console, columns, rows, blocks(widths, keys, console.width))


def _print_blocks(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], parts: Sequence[Sequence[int]]
) -> None:
    """Print one table for each part of the columns."""
    for number, block in enumerate(parts):
        if number:
            console.print()
        drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for index in block:
            numeric = index and all(row[index][:1] in "-+.0123456789" for row in rows)
            drawn.add_column(Text(columns[index]), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(row[index]) for index in block))
        console.print(drawn)


def blocks(widths: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The columns of each table that fits `width`: the keys, and as many of the others as there is room for.

    The last column, which may hold a sentence, is folded instead of being put into a separate table.
    """
    widths = [*widths[:-1], min(widths[-1], FOLDED)]
    named = [*range(min(keys, len(widths)))]
    found: list[list[int]] = []
    room = 0
    for index in range(len(named), len(widths)):
        if not found or widths[index] + GAP > room:
            found.append([*named])
            room = width - sum(widths[key] + GAP for key in named) + GAP
        found[-1].append(index)
        room -= widths[index] + GAP
    return found or [named]
