"""Inference time of trained models, measured in turns on one thread."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import safetensors.torch
import torch

from ..contract.options import build
from ..files import dump, read_file, sealed, unsealed, write_atomically
from ..processes import threads
from ..run.config import RunConfig
from ..run.training import Training
from .grid import FINISHED, Record, weights_of
from .spec import Planned

WARM_UPS, SINGLES, BATCHES = 5, 40, 5  # forwards to warm up; of one sample; of a batch
BATCH = 64  # samples


def time_inference(planned: Sequence[Planned], records: Sequence[Record], out: Path) -> None:
    """Add "latency" to the records of the parts that ask for it, measured or read from `out`.

    median, p95: seconds for one sample, over 40 forwards after 5 to warm up. throughput: samples per second in batches
    of 64, from the median of 5. The models take turns in random order, so other load on the machine affects all alike.
    """
    asked = {variant.name for part, _, variant in planned if part.latency}
    timed = {record["key"]: record for record in records if record["variant"] in asked and record["status"] == FINISHED}
    file = out / "latency.json"
    known = _read(file)
    if timed.keys() - known.keys():
        with threads(1):
            known |= _measured({key: _forward(record, out) for key, record in timed.items()})
        write_atomically(file, (dump(sealed(known)) + "\n").encode())
    for key, record in timed.items():
        record["latency"] = known[key]


def _read(file: Path) -> dict[str, Any]:
    """Earlier measurements; empty if the file is missing or damaged."""
    try:
        return unsealed(read_file(file).decode())
    except (OSError, ValueError, RecursionError):
        return {}


Forward = Callable[[int], Any]  # argument: how many samples


def _forward(record: Record, out: Path) -> Forward:
    """A record's trained model, as a function of the number of test samples."""
    config: RunConfig = build(RunConfig, "run", record["config"])
    training = Training(config, record["settings"])
    training.model.load_state_dict(safetensors.torch.load_file(weights_of(out, record["key"])))

    def forward(count: int) -> Any:
        with torch.no_grad():
            return training.score(count)

    return forward


def _measured(forwards: dict[str, Forward]) -> dict[str, dict[str, float]]:
    singles, batches = _times(forwards, 1, WARM_UPS, SINGLES), _times(forwards, BATCH, 1, BATCHES)
    return {
        key: {
            "median": median(singles[key]),
            "p95": quantiles(singles[key], n=20)[-1],
            "throughput": BATCH / median(batches[key]),
        }
        for key in forwards
    }


def _times(forwards: dict[str, Forward], count: int, warm_ups: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn by model, after `warm_ups` turns to warm up."""
    times: dict[str, list[float]] = {key: [] for key in forwards}
    order = random.Random(0)
    for _ in range(warm_ups + turns):
        for key in order.sample([*forwards], len(forwards)):
            started = time.perf_counter()
            forwards[key](count)
            times[key].append(time.perf_counter() - started)
    return {key: seconds[warm_ups:] for key, seconds in times.items()}
