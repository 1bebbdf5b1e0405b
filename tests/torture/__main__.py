"""The long form: `python -m torture OUT [MINUTES] [SEED]`, from the folder tests. `make torture` calls it.

Every case is drawn from a seed, which is printed with its verdict and kept in OUT/cases.jsonl; a case that is there is
not done again, so a torture that was stopped goes on. Each kind of case has a goal, and the kind that is farthest from
it comes next; beyond all goals random cases follow until the time is over. The last lines are the totals; the exit code
is 1 if anything was wrong.
"""

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import attrs

from torture import cases, damage, hostile, inputs, soak
from torture.shim import Strike

GOALS = {"kills": 500, "ranks": 30, "faults": 240, "damage": 2000, "inputs": 50_000, "hostile": 300, "soak": 100}
BLOCK = 250  # inputs in a case
LEAST_SOAK = 20  # minutes from which runs are soaked


class Plan:
    """The cases of each kind, without end or until there are no more: (name, call, how many it counts for)."""

    def __init__(self, scratch, seed):
        self.place, self.seed = scratch, seed
        for name in ("damaged", "hostile", "inputs", "soaked"):
            (scratch / name).mkdir()
        self.expected, self.done = cases.whole(scratch / "whole")
        self.half = scratch / "half"
        self.of_resume = cases.halfway(self.half, self.done)
        place = scratch / "damaged"
        self.folders = (damage.of_run(place), damage.of_study(place), *damage.of_language(place))

    def kills(self):
        """At each operation of a run and of a resume, then several per run at operations and at random moments."""
        for resumed, done in ((False, self.done), (True, self.of_resume)):
            for at, what in enumerate(done, 1):
                how = "half" if what == "write" else "kill"
                yield f"{how} at {at}{' of resume' * resumed}", self._struck(Strike(at, how), resumed)
        for number in itertools.count(self.seed):
            yield f"kills {number}", lambda n=number: cases.killed_again(self.place / "run", n, self.expected)
            yield f"killed {number}", lambda n=number: cases.killed_at_random(self.place / "run", n, self.expected, 1.5)

    def ranks(self):
        """Kills of one of two ranks."""
        expected, done = cases.whole_on_two(self.place / "two")
        for number in itertools.count(self.seed):
            yield f"ranks {number}", lambda n=number: cases.killed_on_two(self.place / "run", n, expected, len(done))

    def faults(self):
        """Every operation of a run, its saves and its growth, and of a resume, refused once and for good."""
        for resumed, done in ((False, self.done), (True, self.of_resume)):
            for at in range(1, len(done) + 1):
                where = f"{at}{' of resume' * resumed}"
                yield f"full from {where}", self._struck(Strike(at, "ENOSPC", True), resumed)
                yield f"failing at {where}", self._struck(Strike(at, "EIO"), resumed)
        for number in itertools.count(self.seed):
            strike = cases.strike_of(number, len(self.done))
            yield f"struck {number}", self._struck(strike, number % 2)

    def _struck(self, strike, resumed):
        half = self.half if resumed else None
        return lambda: cases.struck(self.place / "run", strike, self.expected, half)

    def damage(self):
        """Each file with each damage, then any."""
        for folder in self.folders:
            for name, how in itertools.product(folder.names(), damage.HOWS):
                yield f"damaged {folder.path.name}/{name} {how}", self._damaged(folder, self.seed, name, how)
        for number in itertools.count(self.seed):
            folder = self.folders[max(0, number % 8 - 4)]  # five of eight in a run's
            yield f"damaged {number}", self._damaged(folder, number)

    def _damaged(self, folder, seed, name=None, how=None):
        return lambda: damage.damaged(folder, self.place / "damaged", seed, name, how)

    def inputs(self):
        """Blocks of generated input."""
        for number in itertools.count(self.seed):
            yield f"inputs {number}", lambda n=number: inputs.block(self.place / "inputs", n, BLOCK)

    def hostile(self):
        """Every hostile case, once."""
        for name, call in hostile.cases():
            yield name, lambda call=call: call(self.place / "hostile")

    def soak(self):
        """Runs in this process, if there is time."""
        yield "soak", lambda: soak.soak(self.place / "soaked", GOALS["soak"])


def counted(kind, record):
    """What a case counts for towards the goal of its kind."""
    return {"kills": record["kills"], "ranks": record["kills"], "inputs": BLOCK, "soak": GOALS["soak"]}.get(kind, 1)


def main(out, minutes="60", seed="0"):
    """Torture until the time is over; returns the exit code."""
    out, end = Path(out), time.monotonic() + 60 * float(minutes)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "cases.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = {record["name"] for record in known}
    counts = Counter()
    for record in known:
        counts[record["kind"]] += counted(record["kind"], record)
    with tempfile.TemporaryDirectory(dir=out) as place, open(log, "a") as file:
        plan = Plan(Path(place).absolute(), int(seed))
        kinds = {kind: getattr(plan, kind)() for kind in GOALS if kind != "soak" or float(minutes) >= LEAST_SOAK}
        while kinds and time.monotonic() < end:
            kind = min(kinds, key=lambda kind: counts[kind] / GOALS[kind])
            name, call = next(kinds[kind], (None, None))
            if name is None:
                del kinds[kind]
            elif name not in names:
                record = {"name": name, "kind": kind, **attrs.asdict(call())}
                counts[kind] += counted(kind, record)
                known.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(f"{name}: {record['case']}: {record['wrong'] or 'as it should be'}", flush=True)
    return report(known, counts)


def report(known, counts):
    """Print the totals; returns the exit code."""
    wrong = Counter(what for record in known for what in record["wrong"])
    for kind, goal in GOALS.items():
        of_kind = [record for record in known if record["kind"] == kind]
        bad = Counter(what for record in of_kind for what in record["wrong"])
        print(f"{kind}: {counts[kind]} of {goal} in {len(of_kind)} cases; wrong: {dict(bad) or 'nothing'}")
    held = [record for record in known if record["mebibytes"]]
    if held:
        longest, largest = (max(record[name] for record in held) for name in ("seconds", "mebibytes"))
        print(f"hostile cases took at most {longest:.1f} s of a processor and {largest} MiB")
    for record in known:
        if record["kind"] == "soak":
            print(record["case"])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
