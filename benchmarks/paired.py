"""Paired timing: every repetition runs all candidates in a new order, and only ratios within a repetition count.

CPU time of one thread, so that what else the machine does, and how fast it runs today, cancel out.
"""

import argparse
import ctypes
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def steady() -> None:
    """One thread, and on glibc a heap that keeps what it has: page faults are noise as large as an effect."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def ratios(
    calls: Mapping[str, Callable[[], None]], base: str, repetitions: int, rounds: int = 1, warm_ups: int = 3
) -> dict[str, dict[str, Any]]:
    """Of each call but `base`: the median over repetitions of its time over base's, with quartiles.

    rounds: how often a repetition goes through all calls, each time in a new order. Short calls in many
    rounds see the same drift of the machine's speed.
    """
    gc.collect()
    gc.freeze()  # else a collection of all that was imported falls on whoever is running
    order, shuffled = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(-warm_ups, repetitions):
        taken = dict.fromkeys(calls, 0.0)
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                taken[name] += seconds(calls[name])
        if repetition >= 0:
            for name, total in taken.items():
                times[name].append(total)
    return {name: _summary(taken, times[base]) for name, taken in times.items() if name != base}


def _summary(taken: list[float], base: list[float]) -> dict[str, Any]:
    each = [a / b for a, b in zip(taken, base, strict=True)]
    first, median, third = statistics.quantiles(each, n=4, method="inclusive")
    ms, base_ms = (round(1000 * statistics.median(times), 3) for times in (taken, base))
    return {"ratio": median, "quartiles": [first, third], "ms": ms, "base_ms": base_ms, "repetitions": len(each)}


def arguments(about: str, repetitions: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repetitions", type=int, default=repetitions, help=f"[default: {repetitions}]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def tell(found: Mapping[str, Mapping[str, Any]], bar: float, as_json: bool, **more: Any) -> int:
    """Print the ratios; the exit code is 1 if one misses the bar."""
    met = all(one["ratio"] <= bar for one in found.values())
    if as_json:
        print(json.dumps({"bar": bar, "met": met, "torch": torch.__version__, **more, "results": found}, indent=2))
        return int(not met)
    for name, one in found.items():
        low, high = one["quartiles"]
        word = "" if one["ratio"] <= bar else "  MISSED"
        print(f"{name}: {one['ratio']:.3f} [{low:.3f}, {high:.3f}], {one['ms']:.1f} / {one['base_ms']:.1f} ms{word}")
    facts = "".join(f"; {name} {value}" for name, value in more.items())
    print(f"bar {bar}; medians of {one['repetitions']} paired repetitions [quartiles]{facts}")
    return int(not met)
