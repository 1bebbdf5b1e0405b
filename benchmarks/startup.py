"""What the command line costs before it does anything: bar 0.4 s of CPU time for --help and plugins."""

import json
import resource
import statistics
import subprocess
import sys

BAR = 0.4
COMMANDS = {
    "--help": ["--help"],
    "run --help": ["run", "--help"],
    "plugins": ["plugins"],
    "plugins --json": ["plugins", "--json"],
}
REPETITIONS = 15


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one call of the command line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"from moe_engine.cli import main; raise SystemExit(main({words!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> int:
    medians = {
        name: statistics.median(cpu_seconds(words) for _ in range(REPETITIONS)) for name, words in COMMANDS.items()
    }
    if "--json" in sys.argv:
        print(json.dumps(medians))
    else:
        for name, seconds in medians.items():
            print(f"{name:16} {seconds:.2f} s of CPU time, median of {REPETITIONS} (bar {BAR})")
    return int(any(seconds > BAR for seconds in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
