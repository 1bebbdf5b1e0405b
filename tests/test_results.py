"""The committed results: judged again by the studies of today, and told as they are."""

import json
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.study.results import judged
from moe_engine.study.spec import read_study, shipped

DOCS = Path(__file__).parents[1] / "docs"
STORED = sorted(path.parent.name for path in DOCS.glob("results/*/study.json"))
PAGE = (DOCS / "results.md").read_text("utf-8")


@pytest.mark.parametrize("name", STORED)
def test_committed_results_are_those_of_the_study(name):
    """Its variants, its columns; and every run of them is there."""
    study, stored = read_study(name), json.loads((DOCS / "results" / name / "study.json").read_text("utf-8"))
    assert json.loads(json.dumps(judged(study, stored))) == stored
    planned = [(part.name, at) for part, at, _ in study.variants({})]
    assert planned == [(row["part"], row["at"]) for row in stored["rows"]]
    for (part, _, variant), row in zip(study.variants({}), stored["rows"], strict=True):
        assert list(variant.seeds or range(study.seeds)) == row["seeds"]
        assert set(part.columns) >= set(row["numbers"]) & set(part.columns)


@pytest.mark.parametrize("name", STORED)
def test_the_page_of_results_tells_every_bar_and_whether_it_was_held(name):
    stored = json.loads((DOCS / "results" / name / "study.json").read_text("utf-8"))
    assert stored["bars"]
    for bar in stored["bars"]:
        assert f"| {bar['says']} | {bar['verdict']} |" in PAGE, bar
    assert f"moe-engine study {name} " in PAGE


@pytest.mark.parametrize("name", STORED)
def test_results_are_small(name):
    for path in (DOCS / "results" / name).iterdir():
        assert path.suffix in (".json", ".md", ".png"), path
        assert path.stat().st_size < (150_000 if path.suffix == ".png" else 1_000_000), path


def test_checking_committed_results_says_what_is_missed(capsys):
    for name in STORED:
        stored = json.loads((DOCS / "results" / name / "study.json").read_text("utf-8"))
        missed = any(bar["verdict"] != "held" for bar in stored["bars"])
        assert main(["study", name, "--check", "--out", str(DOCS / "results" / name)]) == missed
        capsys.readouterr()


def test_nothing_else_lies_among_the_results():
    assert set(STORED) <= set(shipped())
