"""Every benchmark runs through, small and without its bars: speed is not judged in a test."""

import importlib
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


def test_the_page_has_the_committed_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    page = importlib.import_module("page")
    told = page.PAGE.read_text(encoding="utf-8")
    assert page.entered(told) == told
    assert all(f"\n{table}\n" in told for table in page.tables().values())
