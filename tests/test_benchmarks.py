"""Every benchmark runs, small and without its criteria: a test does not judge speed."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "name",
    [
        "growth",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("experts", "memory", "step", "startup", "adopted", "plan", "threads")
        ),
    ],
)
def test_a_benchmark_runs(name, commands):
    before = sorted(FOLDER.glob("results/*"))
    done = commands.run([FOLDER / f"{name}.py", "--smoke"], FOLDER)
    assert done.returncode == 0, done.stderr
    assert sorted(FOLDER.glob("results/*")) == before


def test_the_page_has_the_committed_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    page = importlib.import_module("page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text
    assert all(f"\n{table}\n" in text for table in page.tables().values())
