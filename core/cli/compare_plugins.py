"""`moe-engine compare-plugins`: plugins and a dense model on one task, over several seeds."""

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..contract.options import Settings, build, parse_settings
from ..errors import RunError, UsageError
from ..files import write_atomically
from ..registry.discovery import find, load, pick
from ..run.config import RunConfig, merge_options
from .figures import write_page
from .flags import (
    Decorator,
    address_flag,
    backend_flag,
    flags,
    html_flag,
    jobs_flag,
    json_flag,
    names,
    out_flag,
    quiet_flag,
    settings_flag,
    wide_flag,
)
from .output import echo_json

RESULTS = ("comparison.json", "comparison.md", "comparison.png")
GROUPS = ("routers", "biases", "losses", "growth")  # the entry-point groups that can be compared


def _compared(group: str) -> Decorator:
    what = group if group != "growth" else "growth triggers"
    return click.option(f"--{group}", metavar="A,B,...", callback=names, help=f"Compare these {what}; all: every one.")


@click.command(short_help="Compare plugins and a dense model over several seeds.")
@_compared("routers")
@_compared("biases")
@_compared("losses")
@_compared("growth")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    metavar="INTEGER",
    default=3,
    show_default=True,
    help="Runs per variant, with seeds 0, 1, ...",
)
@flags("plugins", "no_plugin", "task", "experts", "top_k", "capacity", "epochs", "batch_size", "lr", "device")
@flags("data_dir")
@settings_flag
@jobs_flag
@backend_flag
@address_flag
@out_flag("Result folder.", "comparisons/TASK")
@html_flag
@wide_flag
@json_flag("the comparison")
@quiet_flag
def compare_plugins(
    seeds: int,
    settings: tuple[str, ...],
    jobs: int | None,
    backend: str,
    address: str | None,
    out: Path | None,
    html: Path | None,
    wide: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> int:
    """Compare plugins with each other and with a dense model: quality,
    balance, dropped tokens and step time, with confidence intervals.

    \b
    Compare all routers on the built-in digits, three seeds each:
        moe-engine compare-plugins --routers all
    Compare your router with two others, five seeds, all with one bias:
        moe-engine compare-plugins --routers mine,topk,sigmoid_topk \\
            --plugins saturation --seeds 5
    Find the best balancing for 16 experts, and what it costs:
        moe-engine compare-plugins --biases all --losses switch_aux \\
            --experts 16

    Each plugin of --routers, --biases, --losses and --growth gets one row: that
    plugin alone, with the plugins of --plugins, which all rows share. The lists
    are not crossed; to compare pairs, put one plugin into --plugins. Two rows
    are added: the shared plugins alone (unless only routers are compared), and
    a dense model, in which one MLP as wide as the experts per token replaces
    each MoE layer. --set applies to every row that has the plugin.

    The folder gets comparison.json, comparison.md and comparison.png; cells/
    keeps the metrics of each finished run, not its weights. Repeat the command
    to continue after a stop, or to add plugins or seeds: only new runs, and
    those whose settings, versions or plugin files changed, are run.

    A row that cannot run states the reason, and the others still run. If only
    the dense model can, the exit code is 2, or 1 if the others failed in
    training. A step time is the median CPU time of a step; with --device cuda
    use --jobs 1, since all jobs share the GPU.
    """
    lists = {group: flags.pop(group) for group in GROUPS}
    config = _checked(lists, flags)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    given = {name: value for name, value in flags.items() if value is not None and name != "plugins"}

    from ..study.clusters import connected
    from ..study.comparison import chosen_plugins, compare, comparison_of
    from .progress import Cells

    compared = {group: chosen_plugins(group, words) for group, words in lists.items() if words}
    options = _options(settings)
    planned = comparison_of(compared, config.plugins, options, given)
    folder = out or Path("comparisons") / config.task
    for file in (".lock", *RESULTS):
        if (folder / file).is_dir():
            sentence = f"{folder / file} is a folder, but a file must be written there; name another folder with --out"
            raise UsageError(sentence, code="folder-in-the-way")
    with connected(backend, address, jobs) as chosen, Cells(quiet) as cells:
        comparison = compare(planned, range(seeds), folder, jobs, cells.show, chosen)
    _write(comparison, folder, html)
    if as_json:
        echo_json(comparison, 2)
    else:
        _print(comparison, folder, html, wide)
    return _ending([row for row in comparison["rows"] if row["kind"] != "dense"])


def _checked(lists: Mapping[str, Sequence[str] | None], flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that all rows share. Raises UsageError, also if nothing is left to compare."""
    if not any(lists.values()):
        sentence = "there is nothing to compare; name plugins with --routers, --biases, --losses or --growth"
        raise UsageError(sentence, code="nothing-to-compare")
    config = merge_options({}, {**flags, "plugins": flags["plugins"] or ()})
    if both := {name for words in lists.values() for name in words or ()} & {*config.no_plugin}:
        sentence = f"plugin '{min(both)}' is compared, but --no-plugin leaves it out; remove it from one of them"
        raise UsageError(sentence, code="compared-and-left-out")
    return config


def _options(settings: Sequence[str]) -> Settings:
    """The plugins' options, checked now so that an unknown one is reported before anything is written."""
    options, installed = parse_settings(settings), find()
    for name, table in options.items():
        found = pick(name, installed)
        build(load(found), found.title, table)
    return options


def _write(comparison: Mapping[str, Any], folder: Path, html: Path | None) -> None:
    """Write the three files of the result, and the page where it is asked for."""
    from ..run.figures import compared, figure_bytes
    from ..study.page import comparison_page, markdown_of

    text = json.dumps(comparison, indent=2, allow_nan=False, ensure_ascii=False)
    figure = compared(comparison)
    contents = ((text + "\n").encode(), markdown_of(comparison, RESULTS[2:]).encode(), figure_bytes(figure, "png"))
    for file, content in zip(RESULTS, contents, strict=True):
        write_atomically(folder / file, content)
    if html is not None:
        write_page(html, comparison_page(comparison, figure_bytes(figure, "svg")))


def _print(comparison: Mapping[str, Any], folder: Path, html: Path | None, wide: bool) -> None:
    from ..study.tables import legend_of, remarks, tables_of
    from .tables import print_line, table

    for _, part in tables_of(comparison):
        table(part.columns, part.rows, wide=wide, first=(*part.columns[1:2], "cv", "verdicts"))
    files = [f"figure: {folder / 'comparison.png'}", *([f"page: {html}"] if html is not None else [])]
    for line in (*remarks(comparison), legend_of(comparison), *files):
        print_line(line)


def _ending(rows: Sequence[Mapping[str, Any]]) -> int:
    """0 if any plugin could be compared. Raises UsageError or RunError otherwise."""
    if any(row["seeds"] for row in rows):
        return 0
    failed = [row for row in rows if row["status"] == "failed"]
    kind = RunError if failed else UsageError
    reason = (failed or rows)[0]["reason"]
    raise kind(f"no plugin could be compared; the first reason: {reason}", code="no-variant-ran")
