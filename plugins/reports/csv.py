"""The numbers of a run as tables."""

import csv
import io

import attrs

from moe_engine import hookimpl
from moe_engine.files import write_atomically


@attrs.define(eq=False)
class Csv:
    """Writes metrics.csv, a row for each record and layer with every number, and usage.csv, the load over time.

    metrics.csv: split, step, epoch, layer, then the run's own numbers (loss, accuracy) and the layer's; of a
    finding its name; what is null or was not measured then is empty; arrays are in metrics.jsonl alone.
    usage.csv: layer, step, expert in order of birth, its share of the load in training; an expert has rows
    while it lives. Both as RFC 4180 has it.
    """

    @hookimpl
    def moe_report(self, run):
        from moe_engine.run.figures import lives

        rows = [_row(record, layer) for record in run.records for layer in record["layers"]]
        usage = [
            {"layer": layer["name"], "step": step, "expert": expert, "load": share}
            for layer in run.summary["layers"]
            for step, shares in lives(run, layer["name"])[0]
            for expert, share in shares.items()
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_atomically(run.folder / "metrics.csv", _table(columns, rows))
        write_atomically(run.folder / "usage.csv", _table(["layer", "step", "expert", "load"], usage))
        return ["metrics.csv", "usage.csv"]


def _row(record, layer):
    head = {name: record.get(name) for name in ("split", "step", "epoch")}
    own = {name: value for name, value in record.items() if name not in (*head, "layers")}
    return {**head, "layer": layer, **_single(own), **_single(record["layers"][layer])}


def _single(values):
    """What fits into a cell."""
    named = {name: value.get("name") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in named.items() if value is None or isinstance(value, str | int | float)}


def _table(columns, rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
