"""Start-up cost of the command line: --help and plugins within 0.4 s of CPU time."""

import resource
import statistics
import subprocess
import sys

from paired import Criterion, arguments, report

LIMIT = 0.4  # seconds
COMMANDS = {
    "--help": ["--help"],
    "run --help": ["run", "--help"],
    "plugins": ["plugins"],
    "plugins --json": ["plugins", "--json"],
}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one call of the command line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"from moe_engine.cli import main; raise SystemExit(main({words!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> int:
    options = arguments("CPU seconds of commands that do not train.", repetitions=15)
    criteria = []
    for name, words in COMMANDS.items():
        taken = sorted(cpu_seconds(words) for _ in range(options.repetitions))
        first, median, third = statistics.quantiles(taken, n=4, method="inclusive")
        measured = {"median": round(median, 3), "quartiles": [round(first, 3), round(third, 3)]}
        criteria.append(Criterion(name, measured, LIMIT, "s"))
    return report("startup", criteria, options.smoke)


if __name__ == "__main__":
    sys.exit(main())
