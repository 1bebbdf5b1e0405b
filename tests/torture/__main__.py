"""The long form: `python -m torture OUT [MINUTES] [SEED]`, from the folder tests. `make torture` calls it.

Every case is drawn from a seed, which is printed with its verdict and kept in OUT/cases.jsonl; a case that is there is
not done again, so a torture that was stopped goes on. First come a kill and a refusal at every operation on the disk,
then random cases until the time is over. The last lines are the totals; the exit code is 1 if anything was wrong.
"""

import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from moe_engine import cli
from torture import cases
from torture.shim import Strike

WRONG = ("lost", "different", "silent", "traceback", "bug", "hang", "unclear")
FILE_CASES = ("flipped", "digit", "cut off")


def plan(finished, scratch, expected, done, seed):
    """(name, call) of every case, without end."""
    count = len(done)
    answers = cases.answers(finished, scratch / "answers")
    for at in range(1, count + 1):
        how = "half" if done[at - 1] == "write" else "kill"
        yield f"kill at {at}", lambda at=at, how=how: cases.struck(scratch / "run", Strike(at, how), expected)
        yield f"full at {at}", lambda at=at: cases.struck(scratch / "run", Strike(at, "ENOSPC", True), expected)
    names = cases.files_of(finished)
    for number in itertools.count(seed):
        draws = random.Random(number)
        kind = draws.randrange(4)
        if kind == 0:
            strike = cases.strike_of(number, count)
            yield f"struck {number}", lambda strike=strike: cases.struck(scratch / "run", strike, expected)
        elif kind == 1:
            strike = cases.strike_of(number, count)
            yield f"resumed {number}", lambda strike=strike: cases.struck(scratch / "run", strike, expected, True)
        elif kind == 2:
            yield f"killed {number}", lambda n=number: cases.killed_at_random(scratch / "run", n, expected, 1.5)
        else:
            name, how = draws.choice(names), draws.choice(FILE_CASES)
            yield (
                f"damaged {number}",
                lambda n=number, name=name, how=how: cases.damaged(
                    finished, scratch / "damaged", name, how, n, answers
                ),
            )


def soak(scratch):
    """Runs with growths and checkpoints, one after another in one process: (KiB, handles) after the 2nd and last."""

    def size():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))

    sizes = []
    for number in range(8):
        assert cli.main([*cases.RUN, "--out", str(scratch / f"soak{number}")]) == 0
        sizes.append(size())
    return sizes[1], sizes[-1]


def main(out, minutes="60", seed="0"):
    """Torture until the time is over; returns the exit code."""
    out, end = Path(out), time.monotonic() + 60 * float(minutes)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "cases.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = {record["name"] for record in known}
    with tempfile.TemporaryDirectory(dir=out) as place, open(log, "a") as file:
        scratch = Path(place)
        (scratch / "answers").mkdir()
        (scratch / "damaged").mkdir()
        finished = scratch / "finished"
        expected, done = cases.whole(finished)
        for name, call in plan(finished, scratch, expected, done, int(seed)):
            if time.monotonic() > end:
                break
            if name in names:
                continue
            verdict = call()
            record = {"name": name, "case": verdict.case, "kills": verdict.kills, "wrong": verdict.wrong}
            known.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{name}: {verdict.case}: {verdict.wrong or 'as it should be'}", flush=True)
        before, after = soak(scratch)
    return report(known, before, after)


def report(known, before, after):
    """Print the totals; returns the exit code."""
    wrong = Counter(what for record in known for what in record["wrong"])
    print(f"{len(known)} cases, {sum(record['kills'] for record in known)} kills,", end=" ")
    print(f"{sum(record['name'].startswith('damaged') for record in known)} damaged files")
    print(", ".join(f"{what}: {wrong[what]}" for what in WRONG))
    print(f"8 runs in one process: memory {before[0]} -> {after[0]} KiB, handles {before[1]} -> {after[1]}")
    return int(bool(wrong) or after[1] > before[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
