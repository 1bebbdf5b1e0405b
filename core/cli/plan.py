"""`moe-engine plan`: memory, bytes and time of a model on many ranks, and the best split of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, listed
from .figures import check_figure, write_figure, write_page
from .flags import html_flag, json_flag, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..plan.measuring import Measured
    from ..plan.page import Told
    from ..plan.sizes import Cluster, Model, Training
    from ..plan.splits import Planned

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6
NEEDED = ("ranks", "memory", "rate", "bandwidth")  # of a cluster, unless it is measured
Command = Callable[..., Any]


def _size(name: str, text: str, default: int | None = None, least: int = 1) -> Callable[[Command], Command]:
    """A flag of a whole number, required if it has no default; a default of 0 is not shown."""
    kept: dict[str, Any] = (
        {"required": True} if default is None else {"default": default, "show_default": bool(default)}
    )
    return click.option(name, type=click.IntRange(least), metavar="INTEGER", help=text, **kept)


def _number(name: str, metavar: str, text: str, default: float | None = None) -> Callable[[Command], Command]:
    return click.option(name, type=float, metavar=metavar, default=default, show_default=bool(default), help=text)


@click.command(short_help="Plan memory, bytes and time of a model on many GPUs.")
@_size("--layers", "Blocks of the model, each with an MoE layer.")
@_size("--dim", "Model dimension D.")
@_size("--hidden", "Hidden units H of an expert.")
@click.option(
    "--experts", type=click.IntRange(1, 1_000_000), metavar="INTEGER", required=True, help="Experts E per layer."
)
@_size("--top-k", "Experts K per token.", 2)
@_size("--sequence", "Tokens of a sequence.", 1024)
@click.option(
    "--activation", type=click.Choice(["relu", "gelu", "swiglu"]), default="relu", show_default=True, help="Of experts."
)
@click.option(
    "--attention/--no-attention", default=True, help="Blocks have attention, of 4 D^2 weights.  [default: yes]"
)
@_size("--other", "Weights outside of the blocks that each token passes, such as a head.", 0, 0)
@click.option("--batch", type=click.IntRange(1), metavar="INTEGER", help="Sequences per rank and step.  [default: 8]")
@click.option(
    "--total-batch", type=click.IntRange(1), metavar="INTEGER", help="Sequences per step of all ranks, instead."
)
@_number("--skew", "MAXVIO", "The busiest expert's load over the mean, minus 1; 0: even.", 0.0)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: forwards under autocast; weights, gradients and moments stay fp32.",
)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True, help="Its moments."
)
@click.option(
    "--parallel",
    type=click.Choice(["data", "shard"]),
    default="data",
    show_default=True,
    help="data: weights are replicated, as by DDP; shard: cut over all ranks, as by FSDP2, but for experts if P > 1.",
)
@click.option("--ranks", type=click.IntRange(1, 4096), metavar="INTEGER", help="GPUs or processes.")
@_number("--memory", "GB", "Memory of a rank.")
@_number("--rate", "TFLOP/s", "Matrix products of a rank.")
@_number("--bandwidth", "GB/s", "What leaves a rank, and at the same time arrives.")
@_number("--latency", "US", "Microseconds per message.", 10.0)
@_size("--node", "Consecutive ranks of a node.", 1)
@_number("--node-bandwidth", "GB/s", "The bandwidth between ranks of a node.")
@click.option("--measure", is_flag=True, help="Measure rate, bandwidth and latency here, and print the flags to use.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a figure here: .png, .svg or .pdf.")
@html_flag
@wide_flag
@json_flag("the plan")
def plan(plot: Path | None, html: Path | None, wide: bool, as_json: bool, measure: bool, **given: Any) -> None:
    """Plan the training of an MoE model on many ranks: how much memory a rank
    needs, how many bytes it sends, how long a step takes, which split of the
    ranks into data x expert parallelism is best, and where more ranks stop
    helping. Nothing is trained.

    \b
    Measure a machine, alone or on all ranks, and get the flags to use:
        moe-engine plan --measure --layers 16 --dim 1024 --hidden 2048 \\
            --experts 64
        torchrun --nproc-per-node 8 -m moe_engine plan --measure --dim 1024
    Plan with them:
        moe-engine plan --layers 16 --dim 1024 --hidden 2048 --experts 64 \\
            --ranks 64 --memory 80 --rate 300 --bandwidth 50 --latency 15 \\
            --parallel shard --precision bf16 --skew 0.5 --plot plan.png

    Experts are cut over P consecutive ranks, ceil(E/P) each, and each part
    exists on W/P data ranks. A layer has five all-to-alls: the counts, then one
    row per assignment to the experts and back, and both again in backward. Rows
    that stay on their rank are not sent; tokens are not deduplicated. Bytes are
    exact for the load that is assumed: the same on each rank and layer, a power
    law with this skew, given to experts in a fixed random order.

    Times are a model: a step is the busiest rank's matrix products at --rate,
    then all-to-all, then gradients, without overlap, optimizer, norms or
    reading data; an all-to-all is P-1 messages, a ring of n ranks n-1 per pass.
    Efficiency is the share of a step that even products alone would take.
    Scaling stops where more ranks bring less than half of what they could.
    Activations are those of a forward without recomputation.
    """
    model, training = _model(given), _training(given)
    if measure and html is not None:
        raise UsageError("--measure plans nothing, so there is no page; remove --html", code="nothing-to-show")
    if measure:
        _show_measured(model, training, as_json)
        return
    if plot is not None:
        check_figure(plot)
    cluster = _cluster(given)

    from ..plan.page import told_of
    from ..plan.splits import ladder_of, plan_of, require_fit

    fitting, others = plan_of(model, training, cluster)
    require_fit(fitting, others, cluster)
    steps = ladder_of(model, training, cluster)
    told = told_of(fitting, others, steps, cluster)
    if plot is not None or html is not None:
        _draw(plot, html, (model, training, cluster), fitting, steps, told)
    if as_json:
        echo_json(_report(model, training, cluster, fitting, others, steps), 2)
    else:
        _show(told, wide)
        for what, path in (("figure", plot), ("page", html)):
            if path is not None:
                echo(f"{what}: {path}")


def _draw(
    plot: Path | None,
    html: Path | None,
    of: tuple["Model", "Training", "Cluster"],
    fitting: Sequence["Planned"],
    steps: Sequence["Planned"],
    told: "Told",
) -> None:
    """Write the figure and the page, where they are asked for."""
    from ..plan.figures import figure_of
    from ..plan.page import plan_page
    from ..plan.splits import best_of
    from ..run.figures import figure_bytes

    figure = figure_of(fitting, steps)
    if plot is not None:
        write_figure(plot, figure, "--plot")
    if html is not None:
        write_page(html, plan_page(*of, best_of(fitting), told, figure_bytes(figure, "svg")))


def _model(given: dict[str, Any]) -> "Model":
    from ..plan.sizes import Model

    names = ("layers", "dim", "hidden", "experts", "top_k", "sequence", "activation", "attention", "other")
    return Model(**{name: given[name] for name in names})


def _training(given: dict[str, Any]) -> "Training":
    from ..plan.loads import check_skew
    from ..plan.sizes import Training

    if given["batch"] is not None and given["total_batch"] is not None:
        raise UsageError("--batch and --total-batch both say how many sequences; remove one", code="two-batches")
    check_skew(given["experts"], given["top_k"], given["skew"])
    names = ("total_batch", "precision", "optimizer", "parallel", "skew")
    return Training(given["batch"] or 8, **{name: given[name] for name in names})


def _cluster(given: dict[str, Any]) -> "Cluster":
    from ..plan.sizes import Cluster

    if absent := [f"--{name}" for name in NEEDED if given[name] is None]:
        sentence = f"a plan needs {listed(absent)}; --measure measures rate, bandwidth and latency"
        raise UsageError(sentence, code="no-cluster")
    node = given["node_bandwidth"]
    return Cluster(
        given["ranks"],
        given["memory"] * GIGA,
        given["rate"] * TERA,
        given["bandwidth"] * GIGA,
        given["latency"] * MICRO,
        given["node"],
        None if node is None else node * GIGA,
    )


def _show_measured(model: "Model", training: "Training", as_json: bool) -> None:
    """Print what was measured as flags, on the first rank alone."""
    from ..parallel.launch import joined, rank
    from ..plan.measuring import measure
    from ..run.device import find_device

    with joined("auto") as device:
        measured = measure(model, training, find_device(device))
    if rank():
        return
    flags = _flags(measured)
    if as_json:
        echo_json({name.strip("-"): value for name, value in flags.items()})
    else:
        echo(" ".join(f"{name} {value:.4g}" for name, value in flags.items()))


def _flags(measured: "Measured") -> dict[str, float]:
    flags: dict[str, float] = {"--rate": measured.rate / TERA}
    if measured.bandwidth is not None and measured.latency is not None:
        flags |= {"--bandwidth": measured.bandwidth / GIGA, "--latency": measured.latency / MICRO}
        flags |= {"--ranks": measured.ranks}
    return flags


def _report(
    model: "Model",
    training: "Training",
    cluster: "Cluster",
    fitting: Sequence["Planned"],
    others: Sequence["Planned"],
    steps: Sequence["Planned"],
) -> dict[str, Any]:
    import attrs

    from ..plan.splits import best_of, where_it_stops

    return {
        "model": attrs.asdict(model),
        "training": attrs.asdict(training),
        "cluster": attrs.asdict(cluster),
        "splits": [one.as_dict() for one in fitting],
        "best": best_of(fitting).as_dict(),
        "too_large": [one.as_dict() for one in others],
        "ranks": [one.as_dict() for one in steps],
        "scaling": where_it_stops(steps),
    }


FIRST = ("", "GB", "step ms", "tokens/s", "efficiency", "products ms", "all-to-all ms", "gradients ms")


def _show(told: "Told", wide: bool) -> None:
    from .tables import print_line, table

    table(told.splits.columns, told.splits.rows, wide=wide, first=FIRST)
    if told.too_large:
        print_line(told.too_large)
    print_line("")
    table(told.ranks.columns, told.ranks.rows, wide=wide)
    print_line(told.scaling)
    print_line(told.legend)
