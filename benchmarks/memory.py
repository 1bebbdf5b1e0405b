"""Memory at the peak of a forward and backward pass, beside what is there before: inputs and weights.

allocated: what torch's allocator had given out at once. resident: by how much the process grew, each candidate in a
process of its own. The gradients of weights (32 MiB in this cell) are in both.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cells import Cell, dense, engine, problem, step
from paired import Bar, Call, arguments, steady, tell
from peers import FORWARDS, ONLY_SMALL, installed

CELL = Cell(dim=512, hidden=1024)
MIB = 2**20
BAR = 110  # MiB allocated


def peak_allocated(call: Call) -> float:
    """MiB above what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / MIB


def measured(name: str, cell: Cell) -> dict[str, float]:
    """In this process: nothing else may have grown it."""
    steady()
    torch.manual_seed(0)
    given = problem(cell, checked=False)  # what a check leaves free in the heap would hide growth
    if name == "dense":
        call = dense(cell, given)
    else:
        call = step(cell, given, {"engine": engine, **FORWARDS}[name](cell, given))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for one in given.learnt.values():
        one.grad = None
    return {"allocated": round(peak_allocated(call), 1), "resident": round(grown, 1)}


def apart(name: str, smoke: bool) -> dict[str, float]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--one", name, *(["--smoke"] if smoke else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    if "--one" in sys.argv:
        name = sys.argv[sys.argv.index("--one") + 1]
        print(json.dumps(measured(name, CELL.small() if "--smoke" in sys.argv else CELL)))
        return 0
    options = arguments("Memory at the peak of a step of the experts.")
    names = ["dense", "engine", *(name for name in FORWARDS if installed(name) and name not in ONLY_SMALL)]
    found: dict[str, Any] = {name: apart(name, options.smoke) for name in names}
    for name, one in found.items():
        print(f"{name:24} {one['allocated']:6.1f} MiB allocated, {one['resident']:6.1f} MiB resident")
    own = found["engine"]["allocated"]
    bar = Bar(f"{CELL.name}: allocated", {"median": own, "quartiles": [own, own]}, BAR, "MiB")
    return tell("memory", [bar], options.smoke, cell=CELL.name, found=found)


if __name__ == "__main__":
    sys.exit(main())
