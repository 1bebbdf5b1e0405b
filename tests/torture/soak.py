"""Soak: many runs with steps, growths and checkpoints in one process, whose memory and handles must stay flat."""

import gc
import os
import resource
import shutil
from pathlib import Path

from torture.cases import Verdict
from torture.shim import here

STEPS, GROWTHS, CHECKPOINTS = 100, 5, 2  # of each run
SETTLED = 5  # runs after which all that is kept once is there
RUN = (
    *("run", "--task", "blobs", "--set", "blobs.images=1600", "--set", "blobs.test_images=16", "--batch-size", "16"),
    *("--plugins", "saturation,switch_aux,schedule,split", "--set", "schedule.every=15"),
    *("--set", f"schedule.max_experts={2 + GROWTHS}", "--experts", "2", "--epochs", "1", "--log-every", "50"),
    *("--checkpoint-every", str(STEPS // CHECKPOINTS), "--no-plugin", "plots,html", "--quiet"),
)


def size():
    """(KiB of memory now, open handles)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 10, len(os.listdir("/proc/self/fd"))


def soak(place, runs, say=print):
    """Runs, one after another in this process: what they held is in the verdict. Memory may grow by 5 %."""
    gc.collect()
    gc.freeze()  # growths, which look for optimizers among all objects, need not look at what was imported
    verdict, sizes = Verdict(f"{runs} runs in one process"), []
    for number in range(runs):
        folder = place / f"soak{number}"
        outcome = here([*RUN, "--out", folder], 600)
        verdict.judge(outcome, f"run {number}")
        if outcome.code != 0:
            verdict.blame("lost", f"run {number}: {outcome.err}")
        found = (folder / "metrics.jsonl").read_text().count('"split": "growth"')
        saved = len(list(folder.glob("checkpoints/step-*.safetensors")))
        if (found, saved) != (GROWTHS, CHECKPOINTS):
            verdict.blame("lost", f"run {number}: {found} growths, {saved} checkpoints")
        shutil.rmtree(folder)
        gc.collect()
        sizes.append(size())
        say(f"run {number + 1}: {sizes[-1][0]} KiB, {sizes[-1][1]} handles", flush=True)
    settled, last = sizes[min(SETTLED, runs - 1)], sizes[-1]
    if last[1] > settled[1]:
        verdict.blame("handles", f"{settled[1]} -> {last[1]}")
    if last[0] > settled[0] * 1.05:
        verdict.blame("memory", f"{settled[0]} -> {last[0]} KiB")
    verdict.case += f": memory {settled[0]} -> {last[0]} KiB, handles {settled[1]} -> {last[1]}"
    return verdict
