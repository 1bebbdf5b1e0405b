"""Peak memory of a forward and backward pass, in addition to inputs and weights.

allocated: the peak of torch's allocator. resident: the growth of the process; each candidate has a separate one. Both
include the gradients of the weights (32 MiB in this cell).
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cells import Cell, dense, engine_experts, problem_of, step
from paired import Call, Criterion, arguments, report, steady
from peers import FORWARDS, ONLY_SMALL, installed

CELL = Cell(dim=512, hidden=1024)
MIB = 2**20
LIMIT = 110  # MiB allocated


def peak_allocated(call: Call) -> float:
    """MiB in addition to those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / MIB


def measured(name: str, cell: Cell) -> dict[str, float]:
    """Of a candidate in this process, which nothing else may have grown before."""
    steady()
    torch.manual_seed(0)
    given = problem_of(cell, checked=False)  # heap that a check leaves free would hide growth
    if name == "dense":
        call = dense(cell, given)
    else:
        call = step(cell, given, {"engine": engine_experts, **FORWARDS}[name](cell, given))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for tensor in given.trained.values():
        tensor.grad = None
    return {"allocated": round(peak_allocated(call), 1), "resident": round(grown, 1)}


def measured_apart(name: str, smoke: bool) -> dict[str, float]:
    """The same in a new process."""
    words = [sys.executable, __file__, "--one", name, *(["--smoke"] if smoke else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    peak: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peak


def main() -> int:
    if "--one" in sys.argv:
        name = sys.argv[sys.argv.index("--one") + 1]
        print(json.dumps(measured(name, CELL.small() if "--smoke" in sys.argv else CELL)))
        return 0
    options = arguments("Peak memory of a step of the experts.")
    names = ["dense", "engine", *(name for name in FORWARDS if installed(name) and name not in ONLY_SMALL)]
    peaks: dict[str, Any] = {name: measured_apart(name, options.smoke) for name in names}
    for name, peak in peaks.items():
        print(f"{name:24} {peak['allocated']:6.1f} MiB allocated, {peak['resident']:6.1f} MiB resident")
    mib = peaks["engine"]["allocated"]
    criterion = Criterion(f"{CELL.name}: allocated", {"median": mib, "quartiles": [mib, mib]}, LIMIT, "MiB")
    return report("memory", [criterion], options.smoke, cell=CELL.name, peaks=peaks)


if __name__ == "__main__":
    sys.exit(main())
