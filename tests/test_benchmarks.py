"""Every benchmark runs through, small and without its bars: speed is not judged in a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["experts", "memory", "step", "growth", "startup"])
def test_runs_through(name):
    before = sorted(FOLDER.glob("results/*"))
    words = [sys.executable, f"{name}.py", "--smoke"]
    done = subprocess.run(
        words, check=False, cwd=FOLDER, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(FOLDER.glob("results/*")) == before


@pytest.mark.parametrize("file", sorted(FOLDER.glob("results/*.json")), ids=lambda file: file.stem)
def test_every_committed_bar_is_told(file):
    told = (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    for bar in json.loads(file.read_text(encoding="utf-8"))["bars"]:
        (line,) = [line for line in told if line.startswith(f"| {bar['what']} |")]
        assert line.endswith(f"| {bar['verdict']} |") and f"{bar['ratio']:.2f}" in line
