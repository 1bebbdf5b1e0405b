"""What a plan says, in tables and sentences, and its page."""

from collections.abc import Sequence

import attrs

from ..errors import listed
from ..pages.blocks import Note, Page, Picture, Section, Table, sentence
from .sizes import Cluster, Model, Training
from .splits import Planned, best_of, where_it_stops

GIGA, MEGA, MILLI = 1e9, 1e6, 1e-3
COLUMNS = (
    *("data x expert", "GB", "weights", "gradients", "moments", "gathered", "activations"),
    *("all-to-all MB", "gradient MB", "products ms", "all-to-all ms", "gradients ms", "step ms"),
    *("tokens/s", "efficiency", ""),
)
LEGEND = "per rank: GB of memory, and MB that leave the one that sends most; times are a model's, see --help"


@attrs.frozen
class Told:
    """What is shown of a plan: every split and the best of each number of ranks, what is too large, where it stops."""

    splits: Table
    ranks: Table
    too_large: str
    scaling: str
    legend: str = LEGEND


def told_of(fitting: Sequence[Planned], others: Sequence[Planned], steps: Sequence[Planned], cluster: Cluster) -> Told:
    """The tables and sentences, for the terminal and the page. others: the splits that don't fit."""
    best = best_of(fitting)
    rows = [[*_cells(one), "best" if one is best else ""] for one in fitting]
    ladder = [[str(one.split.ranks), str(one.split), *_speed(one)] for one in steps]
    words = [f"{one.split} ({one.memory.total / GIGA:.3g} GB)" for one in others]
    return Told(
        Table(COLUMNS, rows, (0, len(COLUMNS) - 1), tones={"best": 0}),
        Table(("ranks", "best split", "GB", "step ms", "tokens/s", "efficiency"), ladder, (0, 1)),
        f"too large for {cluster.memory / GIGA:g} GB: {listed(words)}" if words else "",
        where_it_stops(steps),
    )


def plan_page(
    model: Model,
    training: Training,
    cluster: Cluster,
    best: Planned,
    told: Told,
    figure: bytes,
) -> Page:
    """The page of a plan. told: what the terminal shows. figure: as SVG."""
    memory, step, speed, efficiency = _speed(best)
    sizes = f"{model.layers} layers of {model.experts} experts, D {model.dim}, H {model.hidden}, top {model.top_k}"
    trained = f"{training.precision}, {training.optimizer}, {training.parallel}, skew {training.skew:g}"
    large = [Note(sentence(told.too_large))] if told.too_large else []
    return Page(
        about=f"plan: {sizes}; {trained}",
        verdict=f"{best.split} on {cluster.ranks} ranks: {speed} tokens/s",
        facts=[
            (memory, f"GB per rank, of {cluster.memory / GIGA:g}"),
            (step, "ms per step"),
            (efficiency, "efficiency"),
        ],
        notes=[f"{told.scaling}."],
        sections=[
            Section("Times", [Picture("Time of a step by split, and tokens per second by ranks", figure)]),
            Section("Splits, data x expert", [told.splits, *large], sentence(told.legend)),
            Section("More ranks", [told.ranks], "The best split of each number of ranks."),
        ],
    )


def cell(value: float) -> str:
    """A number of four digits, for quantities with a unit in their column's title."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _cells(one: Planned) -> list[str]:
    memory, times = one.memory, one.times
    held = (memory.total, memory.weights, memory.gradients, memory.moments, memory.gathered, memory.activations)
    sizes = [*(size / GIGA for size in held), one.exchanged / MEGA, one.reduced / MEGA]
    parts = [seconds / MILLI for seconds in (times.products, times.exchange, times.gradients)]
    return [str(one.split), *(cell(float(number)) for number in (*sizes, *parts)), *_speed(one)[1:]]


def _speed(one: Planned) -> list[str]:
    """Memory, step, tokens per second and efficiency."""
    step = cell(one.times.step / MILLI)
    return [cell(one.memory.total / GIGA), step, f"{one.tokens_per_second:,.0f}", f"{one.times.efficiency:.1%}"]
