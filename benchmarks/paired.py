"""Paired timing: every repetition runs all candidates in a new order, and only ratios within a repetition count.

Ratios are of CPU time, which other load on the machine affects least; wall time is reported too.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RESULTS = Path(__file__).parent / "results"
TIE = 1.05  # within 5 % of the limit counts as no difference
WARM_UPS = 2  # repetitions that do not count

Call = Callable[[], None]


class Seconds(NamedTuple):
    """The time of one call: CPU time of all threads, and wall time."""

    cpu: float
    wall: float


Times = Mapping[str, Sequence[Seconds]]


def steady() -> None:
    """Use one thread and, on glibc, a heap that never shrinks: page faults are noise as large as an effect."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seconds(call: Call) -> Seconds:
    """The time of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def timed(calls: Mapping[str, Call], repetitions: int, rounds: int = 1, steps: int = 1) -> Times:
    """Seconds a step of each call in each repetition. steps: how many steps a call makes.

    rounds: a repetition is the mean of so many passes over all calls, each in a new order; in many rounds, short calls
    see the same drift of the machine's speed.
    """
    gc.collect()
    gc.freeze()  # otherwise collecting all imported modules is charged to whichever call is running
    order, shuffled = list(calls), random.Random(0)
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for repetition in range(-WARM_UPS, repetitions):
        taken = dict.fromkeys(calls, Seconds(0.0, 0.0))
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                taken[name] = Seconds(*map(sum, zip(taken[name], seconds(calls[name]), strict=True)))
        if repetition >= 0:
            for name, total in taken.items():
                times[name].append(Seconds(*(part / (rounds * steps) for part in total)))
    return times


def ratio(times: Times, name: str, base: str, clock: str = "cpu") -> dict[str, Any]:
    """The ratio of two candidates' times: median over repetitions and quartiles; its median in wall time."""
    pairs = list(zip(times[name], times[base], strict=True))
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in pairs]
    first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    ms, base_ms = (
        round(1000 * statistics.median(getattr(taken, clock) for taken in side), 3) for side in zip(*pairs, strict=True)
    )
    wall = statistics.median(a.wall / b.wall for a, b in pairs)
    numbers = {"median": median, "quartiles": [first, third], "wall": wall, "ms": ms, "base_ms": base_ms}
    return {key: _rounded(value) for key, value in numbers.items()} | {"repetitions": len(pairs)}


def _rounded(value: Any) -> Any:
    return [round(part, 4) for part in value] if isinstance(value, list) else round(value, 4)


@attrs.frozen
class Criterion:
    """A limit that a median should not exceed; within 5 % of it is a tie. unit: empty for a ratio."""

    claim: str
    measured: Mapping[str, Any]
    at_most: float
    unit: str = ""

    @property
    def verdict(self) -> str:
        """passed, tie or failed."""
        median = self.measured["median"]
        return "passed" if median <= self.at_most else "tie" if median <= TIE * self.at_most else "failed"

    def __str__(self) -> str:
        low, high = self.measured["quartiles"]
        figures = f"{self.measured['median']:.3f} [{low:.3f}, {high:.3f}], at most {self.at_most:g} {self.unit}"
        return f"{self.verdict:6}  {self.claim}: {figures}".rstrip()


def arguments(about: str, repetitions: int | None = None) -> argparse.Namespace:
    """Parse --repetitions, if anything is repeated, and --smoke: small and twice, nothing judged or written."""
    parser = argparse.ArgumentParser(description=about)
    if repetitions:
        parser.add_argument("--repetitions", type=int, default=repetitions, help=f"[default: {repetitions}]")
    parser.add_argument(
        "--smoke", action="store_true", help="only check that it runs: small, two repetitions, no criteria"
    )
    options = parser.parse_args()
    if options.smoke:
        options.repetitions = 2
    return options


def report(name: str, criteria: Sequence[Criterion], smoke: bool = False, **facts: Any) -> int:
    """Print each criterion and write results/NAME.json; returns the exit code, 1 if one failed."""
    if smoke:
        return 0
    for criterion in criteria:
        print(criterion)
    judged = [
        {"claim": each.claim, "unit": each.unit, "at_most": each.at_most, "verdict": each.verdict, **each.measured}
        for each in criteria
    ]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "criteria": judged, **facts}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return int(any(criterion.verdict == "failed" for criterion in criteria))


def machine() -> dict[str, Any]:
    """The machine that was measured."""
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text(encoding="utf-8").splitlines() if flags.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    day = time.strftime("%Y-%m-%d")
    return {"date": day, "processor": model, "cores": os.cpu_count(), "torch": torch.__version__}
