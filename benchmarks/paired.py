"""Paired timing: every repetition runs all candidates in a new order, and only ratios within a repetition count.

CPU time first, so that what else the machine does cancels out; wall time beside it.
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
TIE = 1.05  # what is within 5 % of its bar is no difference
WARM_UPS = 2  # repetitions that do not count

Call = Callable[[], None]


class Seconds(NamedTuple):
    """What one call took: of all threads' CPU time, and on the clock."""

    cpu: float
    wall: float


Times = Mapping[str, Sequence[Seconds]]


def steady() -> None:
    """One thread, and on glibc a heap that keeps what it has: page faults are noise as large as an effect."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seconds(call: Call) -> Seconds:
    """Of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def timed(calls: Mapping[str, Call], repetitions: int, rounds: int = 1, steps: int = 1) -> Times:
    """Of each call in each repetition, over the number of steps that a call makes.

    rounds: how often a repetition goes through all calls, each time in a new order, to take the mean. Short calls in
    many rounds see the same drift of the machine's speed.
    """
    gc.collect()
    gc.freeze()  # else a collection of all that was imported falls on whoever is running
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
                times[name].append(Seconds(*(one / (rounds * steps) for one in total)))
    return times


def over(times: Times, one: str, base: str, clock: str = "cpu") -> dict[str, Any]:
    """The median over repetitions of one's time over base's, with quartiles; the same on the wall's clock."""
    pairs = list(zip(times[one], times[base], strict=True))
    each = [getattr(a, clock) / getattr(b, clock) for a, b in pairs]
    first, median, third = statistics.quantiles(each, n=4, method="inclusive")
    ms, base_ms = (
        round(1000 * statistics.median(getattr(one, clock) for one in side), 3) for side in zip(*pairs, strict=True)
    )
    wall = statistics.median(a.wall / b.wall for a, b in pairs)
    found = {"median": median, "quartiles": [first, third], "wall": wall, "ms": ms, "base_ms": base_ms}
    return {name: _rounded(value) for name, value in found.items()} | {"repetitions": len(pairs)}


def _rounded(value: Any) -> Any:
    return [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4)


@attrs.frozen
class Bar:
    """What a median is expected to be at most; within 5 % of that is a tie. unit: none of a ratio."""

    what: str
    found: Mapping[str, Any]
    at_most: float
    unit: str = ""

    @property
    def verdict(self) -> str:
        """held, tie or missed."""
        median = self.found["median"]
        return "held" if median <= self.at_most else "tie" if median <= TIE * self.at_most else "missed"

    def __str__(self) -> str:
        low, high = self.found["quartiles"]
        figures = f"{self.found['median']:.3f} [{low:.3f}, {high:.3f}], at most {self.at_most:g} {self.unit}"
        return f"{self.verdict:6}  {self.what}: {figures}".rstrip()


def arguments(about: str, repetitions: int | None = None) -> argparse.Namespace:
    """--repetitions where something is repeated, and --smoke: twice and small, nothing judged or written."""
    parser = argparse.ArgumentParser(description=about)
    if repetitions:
        parser.add_argument("--repetitions", type=int, default=repetitions, help=f"[default: {repetitions}]")
    parser.add_argument("--smoke", action="store_true", help="see whether it runs: small, few repetitions, no bars")
    options = parser.parse_args()
    if options.smoke:
        options.repetitions = 2
    return options


def tell(name: str, bars: Sequence[Bar], smoke: bool = False, **facts: Any) -> int:
    """Print each bar and write results/NAME.json; the exit code is 1 if one is missed."""
    if smoke:
        return 0
    for bar in bars:
        print(bar)
    judged = [
        {"what": bar.what, "unit": bar.unit, "at_most": bar.at_most, "verdict": bar.verdict, **bar.found}
        for bar in bars
    ]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "bars": judged, **facts}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return int(any(bar.verdict == "missed" for bar in bars))


def machine() -> dict[str, Any]:
    """What the figures are of."""
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text(encoding="utf-8").splitlines() if flags.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    day = time.strftime("%Y-%m-%d")
    return {"date": day, "processor": model, "cores": os.cpu_count(), "torch": torch.__version__}
