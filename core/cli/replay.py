"""`moe-engine replay`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import parse_settings
from ..errors import UsageError
from .flags import settings_flag

if TYPE_CHECKING:
    from ..run.traces import Trace

COLUMNS = ("router", "bias", "capacity", "top_k", "layer", "cv", "maxvio", "active", "entropy", "dropped")
SAME = ("agreement", "first", "verdict")


def _several(kind: type) -> Callable[[Any, click.Option, str | None], list[Any]]:
    """What reads "1.0,none,2" as values of a kind."""

    def read(_: Any, option: click.Option, value: str | None) -> list[Any]:
        words = [word.strip() for word in (value or "").split(",") if word.strip()]
        try:
            return [None if word == "none" and kind is float else kind(word) for word in words]
        except ValueError as error:
            raise UsageError(f"{option.opts[0]} takes numbers separated by commas, not {value!r}") from error

    return read


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--routers", metavar="A,B,...", callback=_several(str), help="Routers to try.  [default: the recorded one]"
)
@click.option(
    "--biases",
    metavar="A,B,...",
    callback=_several(str),
    help="Biases to try, one at a time; also none, and recorded: those of the run as they stood.  "
    "[default: recorded for the recorded router, none for others]",
)
@click.option(
    "--capacity", "capacities", metavar="C,...", callback=_several(float), help="Capacity factors to try; also none."
)
@click.option(
    "--top-k", "top_ks", metavar="K,...", callback=_several(int), help="Choices a token.  [default: as recorded]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Rows (samples, or sequences) of a step: what a bias learns from, and what a capacity is of.  "
    "[default: the evaluation's forwards]",
)
@settings_flag
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def replay(
    trace: Path,
    routers: list[str],
    biases: list[str],
    capacities: list[float | None],
    top_ks: list[int],
    batch: int | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what other routers, biases and capacities would have done with the logits of a run.

    \b
    Record the routing of a run's test set, then let other routers choose:
        moe-engine run --plugins topk --record-routing --out runs/A
        moe-engine replay runs/A --routers topk,sigmoid_topk --capacity none,1.0,1.25
    How far a bias would even out the load, learning from steps of 64 samples:
        moe-engine replay runs/A --biases none,loss_free --set loss_free.rate=0.05 --batch 64

    TRACE is a run's folder or a file. All combinations are tried. Routers decide as in evaluation. A bias goes
    through the trace once; what counts is the bias as it ends. Gates and experts learn nothing here, so
    this tells of load and choice alone. agreement: mean over tokens of the share of chosen experts that are
    the recorded ones; first: share of tokens whose first choice is the same. What a trace can't tell is
    named with the reason.
    """
    from ..analysis.replay import recorded, variants
    from ..analysis.replay import replay as replayed
    from ..run.traces import read_trace

    read, own = read_trace(trace), parse_settings(settings)
    tried = variants(read, routers, biases, capacities, top_ks, own)
    rows = recorded(read)
    for variant in _with_progress(tried):
        rows += replayed(read, variant, own, batch)
    refused = [row["refused"] for row in rows if "refused" in row]
    if len(refused) == len(tried):
        raise UsageError("; ".join(dict.fromkeys(refused)))
    if as_json:
        click.echo(json.dumps({"trace": _about(read), "rows": rows}, indent=2))
    else:
        _show(read, rows)


def _with_progress(several: list[Any]) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(several, "replaying", console=console, transient=True, disable=not console.is_terminal)


def _about(trace: "Trace") -> dict[str, Any]:
    return {**trace.about, "router": trace.router, "tokens": trace.tokens, "limit": trace.limit, "cut": trace.cut}


def _show(trace: "Trace", rows: list[dict[str, Any]]) -> None:
    from .progress import cell, table

    shown = [row for row in rows if "refused" not in row and (row["layer"] != "mean" or len(trace.layers) > 1)]
    shown = [{**row, "router": f"{row['router']}, recorded"} if "recorded" in row else row for row in shown]
    table([*COLUMNS, *SAME], [[cell(row.get(name)) for name in (*COLUMNS, *SAME)] for row in shown])
    for reason in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
        click.echo(f"not replayed: {' '.join(reason.split())}")
    click.echo(f"{'the first' if trace.cut else 'all'} {trace.tokens} tokens of each layer, padding included")
