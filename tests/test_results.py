"""The committed results: judged again by the studies as they are now, and reported faithfully in docs/results.md."""

import json
import shutil
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.files import unsealed
from moe_engine.study.page import markdown_of
from moe_engine.study.reading import read_study, shipped
from moe_engine.study.results import judged

DOCS = Path(__file__).parents[1] / "docs"
STORED = sorted(path.parent.name for path in DOCS.glob("results/*/study.json"))
PAGE = (DOCS / "results.md").read_text("utf-8")


@pytest.mark.parametrize("name", STORED)
def test_committed_results_are_those_of_the_study(name):
    """Its variants and columns, and every run is there."""
    study, stored = read_study(name), unsealed((DOCS / "results" / name / "study.json").read_text("utf-8"))
    assert json.loads(json.dumps(judged(study, stored))) == stored
    planned = [(part.name, at) for part, at, _ in study.variants({})]
    assert planned == [(row["part"], row["at"]) for row in stored["rows"]]
    for (part, _, variant), row in zip(study.variants({}), stored["rows"], strict=True):
        assert list(variant.seeds or range(study.seeds)) == row["seeds"]
        assert set(part.columns) >= set(row["numbers"]) & set(part.columns)


@pytest.mark.parametrize("name", STORED)
def test_the_results_page_reports_every_criterion_and_its_verdict(name):
    stored = unsealed((DOCS / "results" / name / "study.json").read_text("utf-8"))
    assert stored["criteria"]
    for criterion in stored["criteria"]:
        assert f"| {criterion['claim']} | {criterion['verdict']} |" in PAGE, criterion
    assert f"moe-engine study {name} " in PAGE


@pytest.mark.parametrize("name", STORED)
def test_the_committed_page_is_that_of_the_results(name):
    folder = DOCS / "results" / name
    stored, page = json.loads((folder / "study.json").read_text("utf-8")), (folder / "study.md").read_text("utf-8")
    figures = [f"{figure.name}.png" for figure in read_study(name).figure]
    assert markdown_of(stored, figures) == page
    assert all((folder / figure).exists() for figure in figures)


@pytest.mark.parametrize("name", STORED)
def test_results_are_small(name):
    for path in {*(DOCS / "results" / name).iterdir()} - {DOCS / "results" / name / "study.html"}:
        assert path.suffix in (".json", ".md", ".png"), path
        assert path.stat().st_size < (150_000 if path.suffix == ".png" else 1_000_000), path


def failed_of(name):
    stored = unsealed((DOCS / "results" / name / "study.json").read_text("utf-8"))
    return [criterion for criterion in stored["criteria"] if criterion["verdict"] != "passed"]


QUICK = {bool(failed_of(name)): name for name in STORED}.values()  # one that fails, one that does not


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in STORED]
)
def test_checking_committed_results_fails_where_a_criterion_does_and_writes_the_page(name, tmp_path):
    folder = shutil.copytree(DOCS / "results" / name, tmp_path / name)
    (folder / "study.html").unlink(missing_ok=True)
    criteria, failed = unsealed((folder / "study.json").read_text("utf-8"))["criteria"], failed_of(name)
    assert main(["study", name, "--check", "--out", str(folder)]) == bool(failed)
    page = (folder / "study.html").read_text("utf-8")
    assert f"{len(criteria) - len(failed)} of {len(criteria)} criteria passed" in page
    assert page.count("data:image/png") == len(read_study(name).figure)
    assert len(page) < 3_000_000


def test_all_results_are_of_shipped_studies():
    assert set(STORED) <= set(shipped())
