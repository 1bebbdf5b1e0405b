"""What a replay says, in a table and sentences, and its page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from ..errors import visible
from ..pages.blocks import Heat, Note, Page, Section, Table, fact, sentence
from ..run.forms import heading, shown
from ..run.traces import Trace

KEYS = ("router", "bias", "capacity", "top_k", "layer", "label")
COLUMNS = ("cv", "maxvio", "active", "entropy", "dropped", "agreement", "first", "verdict")
MEAN, ALL = "mean", "all"  # layer of a row of means, and label of a row of all tokens
MOST_HEATS = 12  # layers whose loads are shown
LEGEND = (
    "agreement: the share of a token's experts that are the recorded ones; first: the share of tokens whose first "
    "choice is the recorded one. Gates and experts do not train here, so this is load and choices, not quality."
)

Row = Mapping[str, Any]


@attrs.frozen
class Told:
    """What is shown of a replay. keys: columns that name a row. rows: those of the table."""

    table: Table
    keys: int
    rows: Sequence[Row]
    notes: Sequence[str]


def told_of(trace: Trace, rows: Sequence[Row]) -> Told:
    """The table and sentences, for the terminal and the page. rows: of `recorded` and `replay`."""
    told = [row for row in rows if "refused" not in row and (row["layer"] != MEAN or len(trace.layers) > 1)]
    told = [{**row, "label": visible(row["label"] or ALL)} for row in told]
    told = [{**row, "router": f"{row['router']}, recorded"} if "recorded" in row else row for row in told]
    keys = KEYS if any(row["label"] != ALL for row in told) else KEYS[:-1]
    columns = [*keys, *COLUMNS]
    words = [at for at, name in enumerate(columns) if name in (*KEYS, "verdict") and name not in ("capacity", "top_k")]
    lines = [[shown(name, row.get(name)) for name in columns] for row in told]
    return Told(Table([*map(heading, columns)], lines, words), len(keys), told, [*_notes(trace, rows)])


def _notes(trace: Trace, rows: Sequence[Row]) -> Iterator[str]:
    for reason in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
        yield f"not replayed: {' '.join(reason.split())}"
    if all("recorded" in row for row in rows):
        yield f"its router, {trace.router}, is not a plugin; --routers names some to compare with it"
    yield f"{'the first' if trace.cut else 'all'} {trace.tokens} tokens of each layer, padding included"


def replay_page(name: str, trace: Trace, told: Told) -> Page:
    """The page of a replay. name: of the trace. told: what the terminal shows."""
    notes = [Note(sentence(note)) for note in told.notes]
    loads = [*_loads(told.rows, [layer.name for layer in trace.layers])]
    return Page(
        about=f"replay of {name}, recorded with {trace.router}",
        verdict=_verdict(_whole(told.rows, len(trace.layers) > 1)),
        facts=[
            fact(len(trace.layers), "layer"),
            (f"{trace.tokens:,}", "tokens of each layer"),
        ],
        sections=[
            Section("Loads", loads[:1], "A row for each way to choose; its load over an even share."),
            Section("Balance and choices", [told.table, *notes], LEGEND),
            *(Section(heat.title, [heat], folded=True) for heat in loads[1:MOST_HEATS]),
        ],
    )


def _whole(rows: Sequence[Row], several: bool) -> list[Row]:
    """The rows of all tokens: means over the layers, where there are several."""
    return [row for row in rows if row["label"] == ALL and (row["layer"] == MEAN) == several]


def _verdict(rows: Sequence[Row]) -> str:
    """Which way to choose is most even."""
    known = [row for row in rows if row.get("cv") is not None]
    if not known:
        return "no loads to compare"
    best = min(known, key=lambda row: float(row["cv"]))
    then = next((row for row in known if "recorded" in row), best)
    number = f"cv {shown('cv', best['cv'])}"
    if "recorded" in best:
        return f"the recorded choice is the most even: {number}" if len(known) > 1 else f"as recorded: {number}"
    return f"most even: {_way(best, rows)}, {number} instead of {shown('cv', then['cv'])}"


def _way(row: Row, rows: Sequence[Row]) -> str:
    """A row by its router, and by what else differs among the replayed ones."""
    replayed = [one for one in rows if "recorded" not in one]
    differing = [name for name in KEYS[1:4] if len({one.get(name) for one in replayed}) > 1 and "recorded" not in row]
    words = {name: shown(name, row.get(name)) for name in differing}
    named = [
        ("no bias" if word == "none" else word) if name == "bias" else f"{heading(name)} {word}"
        for name, word in words.items()
    ]
    return ", ".join([str(row["router"]), *named])


def _loads(rows: Sequence[Row], layers: Sequence[str]) -> Iterator[Heat]:
    """For each layer the loads of all rows that have one; a slider moves through the labels to all tokens."""
    for layer in layers:
        of_layer = [row for row in rows if row["layer"] == layer and row.get("load")]
        labels = sorted(dict.fromkeys(row["label"] for row in of_layer), key=lambda label: label == ALL)
        frames = [
            (f"label {label}" if label != ALL else "all tokens", [row for row in of_layer if row["label"] == label])
            for label in labels
        ]
        if frames:
            names = [_way(row, frames[-1][1]) for row in frames[-1][1]]
            loads = [
                (name, [[share * len(row["load"]) for share in row["load"]] for row in members])
                for name, members in frames
            ]
            yield Heat(f"layer {layer}", names, loads, row="")
