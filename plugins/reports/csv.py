import csv
import io

import attrs

from moe_engine import expert_loads, hookimpl, write_atomically


@attrs.define(eq=False)
class Csv:
    """Metrics and expert usage as CSV files (RFC 4180).

    metrics.csv: a row per record and layer with split, step, epoch, layer, the run's metrics (loss, accuracy) and
    the layer's; a finding is given by name, null or unmeasured values are empty, and arrays are in metrics.jsonl
    only. usage.csv: layer, step, expert (numbered in order of creation) and its share of the training load, while
    the expert exists.
    """

    @hookimpl
    def moe_report(self, run):
        rows = [_row(record, layer) for record in run.records for layer in record["layers"]]
        usage = [
            {"layer": layer["name"], "step": step, "expert": expert, "load": share}
            for layer in run.summary["layers"]
            for step, shares in expert_loads(run, layer["name"])
            for expert, share in shares.items()
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_atomically(run.folder / "metrics.csv", _table(columns, rows))
        write_atomically(run.folder / "usage.csv", _table(["layer", "step", "expert", "load"], usage))
        return ["metrics.csv", "usage.csv"]


def _row(record, layer):
    head = {name: record.get(name) for name in ("split", "step", "epoch")}
    of_run = {name: value for name, value in record.items() if name not in (*head, "layers")}
    return {**head, "layer": layer, **_scalars(of_run), **_scalars(record["layers"][layer])}


def _scalars(values):
    """The values that fit into a cell."""
    named = {name: value.get("name") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in named.items() if value is None or isinstance(value, str | int | float)}


def _table(columns, rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
