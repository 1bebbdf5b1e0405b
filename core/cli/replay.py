"""`moe-engine replay`: let other routers choose on a run's recorded routing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import parse_settings
from ..errors import UsageError
from .figures import write_page
from .flags import html_flag, json_flag, settings_flag, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..analysis.replay_page import Told
    from ..run.traces import Trace


def _values(kind: type) -> Callable[[Any, click.Option, str | None], list[Any]]:
    """A callback that reads "1.0,none,2" as values of a kind."""

    def read(_: Any, option: click.Option, value: str | None) -> list[Any]:
        words = [word.strip() for word in (value or "").split(",") if word.strip()]
        try:
            return [None if word == "none" and kind is float else kind(word) for word in words]
        except ValueError as error:
            sentence = f"{option.opts[0]} takes numbers separated by commas, not {value!r}"
            raise UsageError(sentence, code="not-a-list-of-numbers") from error

    return read


@click.command(short_help="Try other routers on the recorded routing of a run.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--routers", metavar="A,B,...", callback=_values(str), help="Routers to try.  [default: the recorded one]"
)
@click.option(
    "--biases",
    metavar="A,B,...",
    callback=_values(str),
    help="Biases to try, one at a time; none: no bias; recorded: the run's own, frozen.  "
    "[default: recorded for the recorded router, none for others]",
)
@click.option(
    "--capacity",
    "capacities",
    metavar="C,...",
    callback=_values(float),
    help="Capacity factors to try; none: no limit.",
)
@click.option(
    "--top-k", "top_ks", metavar="K,...", callback=_values(int), help="Experts per token.  [default: as recorded]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="INTEGER",
    help="Samples or sequences per step, the unit of a bias update and of a capacity.  [default: as evaluated]",
)
@click.option("--by-label", is_flag=True, help="Add rows for the tokens of each label.")
@settings_flag
@html_flag
@wide_flag
@json_flag("the table")
def replay(
    trace: Path,
    routers: list[str],
    biases: list[str],
    capacities: list[float | None],
    top_ks: list[int],
    batch: int | None,
    by_label: bool,
    settings: tuple[str, ...],
    html: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Show how other routers, biases and capacities would have routed the tokens
    of a run or of a checkpoint, given its recorded logits.

    \b
    Record the routing of a run's test set, then let other routers choose:
        moe-engine run --plugins topk --record-routing --out runs/A
        moe-engine replay runs/A --routers topk,sigmoid_topk
    Vary the capacity:
        moe-engine replay runs/A --capacity none,1.0,1.25
    See how far a bias evens out the load when it steps every 64 samples:
        moe-engine replay runs/A --biases none,loss_free --batch 64
    Try it on a checkpoint, each label of its texts by itself:
        moe-engine inspect models/olmoe --text a.txt b.txt --trace olmoe.routing
        moe-engine replay olmoe.routing --biases none,loss_free --by-label

    TRACE is a run's folder or a trace file, as of `inspect`. All combinations are tried. Routers
    choose as in evaluation; a bias passes over the trace once, and its final
    state is measured. Gates and experts do not train here, so replay shows load
    and choices, not quality.

    agreement is the share of a token's experts that are the recorded ones,
    averaged over tokens; first is the share of tokens whose first choice is the
    recorded one. A variant that cannot be replayed states the reason.
    """
    from ..analysis.replay import labels_of, recorded, variants
    from ..analysis.replay import replay as replayed
    from ..analysis.replay_page import replay_page, told_of
    from ..run.traces import read_trace
    from .progress import tracked

    read, options = read_trace(trace), parse_settings(settings)
    tried = variants(read, routers, biases, capacities, top_ks, options)
    if by_label and not any(map(labels_of, read.layers)):
        raise UsageError(f"{trace} holds no labels; remove --by-label", code="no-labels")
    rows = recorded(read, by_label)
    for variant in tracked(tried, "replaying"):
        rows += replayed(read, variant, options, batch, by_label)
    refused = [row["refused"] for row in rows if "refused" in row]
    if tried and len(refused) == len(tried):
        raise UsageError("; ".join(dict.fromkeys(refused)), code="nothing-to-replay")
    told = told_of(read, rows)
    if html is not None:
        write_page(html, replay_page(trace.resolve().name, read, told))
    if as_json:
        echo_json({"trace": _about(read), "rows": rows}, 2)
    else:
        _show(told, wide)
        if html is not None:
            echo(f"page: {html}")


def _about(trace: "Trace") -> dict[str, Any]:
    return {**trace.about, "router": trace.router, "tokens": trace.tokens, "limit": trace.limit, "cut": trace.cut}


def _show(told: "Told", wide: bool) -> None:
    from .tables import print_line, table

    first = ("cv", "verdict", "agreement %", "dropped %", "active")
    table(told.table.columns, told.table.rows, keys=told.keys, wide=wide, first=first)
    for note in told.notes:
        print_line(note)
