"""How long a trained model takes to answer: one thread, alone, the models by turns."""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import safetensors.torch
import torch

from ..contract.options import build
from ..files import dump, write_atomically
from ..processes import one_thread
from ..run.config import RunConfig
from ..run.training import Training
from .grid import FINISHED, Record, Variant, weights_of
from .spec import At, Part

WARM, TIMES, MANY = 5, 40, 5  # forwards before; of one sample; of a batch
BATCH = 64


def timed(planned: Sequence[tuple[Part, At, Variant]], records: Sequence[Record], out: Path) -> None:
    """Give the records of the parts that ask for it "latency"; what lies in `out` is not measured again.

    median, p95: seconds for one sample, of 40 forwards after 5. throughput: samples a second in batches of 64,
    by the median of 5. The models answer by turns, in an order drawn for each, so that what else the
    machine does meets all alike.
    """
    asked = {variant.name for part, _, variant in planned if part.latency}
    mine = {record["key"]: record for record in records if record["variant"] in asked and record["status"] == FINISHED}
    file = out / "latency.json"
    known = _read(file)
    if mine.keys() - known.keys():
        with one_thread():
            known |= _measured({key: _forward(record, out) for key, record in mine.items()})
        write_atomically(file, (dump(known) + "\n").encode())
    for key, record in mine.items():
        record["latency"] = known[key]


def _read(file: Path) -> dict[str, Any]:
    """What was measured before; nothing, if the file is not there or damaged."""
    try:
        known: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


Forward = Callable[[int], Any]  # of so many samples


def _forward(record: Record, out: Path) -> Forward:
    """The trained model of a record, to be called with a number of test samples."""
    config: RunConfig = build(RunConfig, "run", record["config"])
    training = Training(config, record["settings"])
    training.model.load_state_dict(safetensors.torch.load_file(weights_of(out, record["key"])))

    def forward(count: int) -> Any:
        with torch.no_grad():
            return training.score(count)

    return forward


def _measured(forwards: dict[str, Forward]) -> dict[str, dict[str, float]]:
    ones, many = _times(forwards, 1, WARM, TIMES), _times(forwards, BATCH, 1, MANY)
    return {
        key: {
            "median": median(ones[key]),
            "p95": quantiles(ones[key], n=20)[-1],
            "throughput": BATCH / median(many[key]),
        }
        for key in forwards
    }


def _times(forwards: dict[str, Forward], count: int, warm: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn by model, after `warm` turns that do not count."""
    times: dict[str, list[float]] = {key: [] for key in forwards}
    order = random.Random(0)
    for _ in range(warm + turns):
        for key in order.sample([*forwards], len(forwards)):
            started = time.perf_counter()
            forwards[key](count)
            times[key].append(time.perf_counter() - started)
    return {key: own[warm:] for key, own in times.items()}
