"""`moe-engine compare-plugins`: plugins beside each other on one task, over several seeds."""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..contract.options import build, parse_settings
from ..errors import RunError, UsageError
from ..files import write_atomically
from ..registry.discovery import find, load, pick
from ..run.config import merge_options
from .flags import Command, flag, names, settings_flag

RESULTS = ("comparison.json", "comparison.md", "comparison.png")
GROUPS = ("routers", "biases", "losses", "growth")  # what can be compared, by entry-point group


def _compared(group: str) -> Callable[[Command], Command]:
    kind = f"Compare these {group}" if group != "growth" else "Compare these triggers of growth"
    return click.option(f"--{group}", metavar="A,B,...", callback=names, help=f"{kind}; all: every installed one.")


@click.command()
@_compared("routers")
@_compared("biases")
@_compared("losses")
@_compared("growth")
@click.option(
    "--seeds", type=click.IntRange(1, 1000), default=3, help="Runs of each, with seeds 0, 1, ...  [default: 3]"
)
@flag("plugins", metavar="A,B,...", callback=names)
@flag("no_plugin", metavar="A,B,...", callback=names)
@flag("task")
@flag("experts", int)
@flag("top_k", int)
@flag("capacity", float)
@flag("epochs", int)
@flag("batch_size", int)
@flag("lr", float)
@flag("device")
@flag("data_dir", metavar="FOLDER")
@settings_flag
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time, of one thread each.  [default: one a core]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result.  [default: comparisons/TASK]")
@click.option(
    "--json", "as_json", is_flag=True, help="Print comparison.json on standard output, and nothing else there."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def compare_plugins(
    seeds: int, settings: tuple[str, ...], jobs: int | None, out: Path | None, as_json: bool, quiet: bool, **flags: Any
) -> int:
    """Set plugins beside each other and a dense model: quality, balance, drops and step time, with intervals.

    \b
    All routers on the embedded digits, three seeds each:
        moe-engine compare-plugins --routers all
    Yours against two others, with five seeds, each balanced by the same bias:
        moe-engine compare-plugins --routers mine,topk,sigmoid_topk --plugins saturation --seeds 5
    What balances the best, and at what price, with 16 experts:
        moe-engine compare-plugins --biases all --losses switch_aux --experts 16

    Each plugin of --routers, --biases, --losses and --growth is one row: that plugin alone, added to the
    plugins of --plugins, which all rows share. Lists are not multiplied with each other; for a pair of
    plugins put one into --plugins. Two rows come by themselves: the base alone, without what is compared
    (unless only routers are), and a dense model: one MLP, as wide as the experts that a token is sent to,
    in the place of each layer, without any router. --set acts on every row that has the plugin.

    The folder gets comparison.json, comparison.md and comparison.png; cells/ holds each finished run's
    numbers. The same command goes on where it was stopped, and one with a further plugin, or more seeds,
    runs only what is new; what is run again is what has changed: a setting, a version, a plugin's file. The
    runs themselves, their weights and reports, are not kept.

    A row that can't run says why and stops no other; if none but the dense model can, the exit code is 2
    (1 if they failed in training). Step times are medians of the processor's time on a CPU; on a GPU,
    which all jobs share, use --jobs 1.
    """
    lists = {group: flags.pop(group) for group in GROUPS}
    if not any(lists.values()):
        raise UsageError("there is nothing to compare; name plugins with --routers, --biases, --losses or --growth")
    config = merge_options({}, {**flags, "plugins": flags["plugins"] or ()})  # also checks what was typed
    if both := {name for words in lists.values() for name in words or ()} & {*config.no_plugin}:
        raise UsageError(f"'{min(both)}' is compared, but --no-plugin leaves it out; choose one")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would not be interrupted
    given = {name: value for name, value in flags.items() if value is not None and name != "plugins"}

    from ..study.comparison import chosen_plugins, compare, comparison_of
    from ..study.page import markdown_of
    from .progress import Cells

    compared = {group: chosen_plugins(group, words) for group, words in lists.items() if words}
    own, installed = parse_settings(settings), find()
    for name, table in own.items():  # an option that does not exist is known before anything is written
        found = pick(name, installed)
        build(load(found), found.title, table)
    planned = comparison_of(compared, config.plugins, own, given)
    folder = out or Path("comparisons") / config.task
    for file in (".lock", *RESULTS):
        if (folder / file).is_dir():
            raise UsageError(f"{folder / file} is a folder, where a file is to be written; name another with --out")
    with Cells(quiet) as cells:
        comparison = compare(planned, range(seeds), folder, jobs, cells.show)
    from ..run.figures import compared as drawn
    from ..run.figures import figure_bytes

    text = json.dumps(comparison, indent=2, allow_nan=False, ensure_ascii=False)
    contents = (
        (text + "\n").encode(),
        markdown_of(comparison, RESULTS[2:]).encode(),
        figure_bytes(drawn(comparison), "png"),
    )
    for file, content in zip(RESULTS, contents, strict=True):
        write_atomically(folder / file, content)
    if as_json:
        click.echo(text)
    else:
        _print(comparison, folder)
    return _ending([row for row in comparison["rows"] if row["kind"] != "dense"])


def _print(comparison: Mapping[str, Any], folder: Path) -> None:
    from ..study.tables import legend_of, remarks, tables_of
    from .progress import table

    for _, columns, lines in tables_of(comparison):
        table(columns, lines)
    for line in (*remarks(comparison), legend_of(comparison), f"figure: {folder / 'comparison.png'}"):
        click.echo(line)


def _ending(rows: Sequence[Mapping[str, Any]]) -> int:
    """0 if anything could be compared with the dense model. Raises UsageError or RunError otherwise."""
    if any(row["seeds"] for row in rows):
        return 0
    failed = [row for row in rows if row["status"] == "failed"]
    kind = RunError if failed else UsageError
    raise kind(f"nothing could be compared; the first reason: {(failed or rows)[0]['reason']}")
