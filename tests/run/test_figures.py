"""The data of figures: which expert lived when."""

import attrs
import pytest

from moe_engine import Growth, hookimpl
from moe_engine.cli import main
from moe_engine.cli.progress import event
from moe_engine.run.folder import read_run
from moe_engine.run.recorded import growths, lives


@attrs.define(eq=False)
class Mover:
    """Adds one, replaces one, removes one."""

    @hookimpl
    def moe_growth(self, history):
        acts = {10: {"parents": (0,)}, 20: {"parents": (0,), "drop": (1,)}, 30: {"drop": (0,)}}
        return Growth("moe", **acts[history.step], why="planned") if history.step in acts else None


@pytest.fixture
def grown(install, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install("growth", "mover", Mover)
    argv = ["run", "--plugins", "mover,clone", "--experts", "3", "--epochs", "2", "--log-every", "5", "--out", "run"]
    assert main([*argv, "--task", "blobs", "--set", "blobs.images=1500"]) == 0
    return read_run(tmp_path / "run")


def test_identities_last_through_removals(grown):
    """Expert 4 takes the place of 1; when 0 goes, all others move up by one."""
    loads, born, dead = lives(grown, "moe")
    assert (born, dead) == ({3: 10, 4: 20}, {1: 20, 0: 30})
    alive = {step: sorted(load) for step, load in loads}
    assert alive[5] == alive[10] == [0, 1, 2]
    assert alive[15] == alive[20] == [0, 1, 2, 3]
    assert alive[25] == alive[30] == [0, 2, 3, 4]
    assert alive[35] == [2, 3, 4]
    raw = next(one["layers"]["moe"]["load"] for one in grown.records if one["split"] == "train" and one["step"] == 35)
    assert [dict(loads)[35][who] for who in (4, 2, 3)] == raw


def test_growth_is_in_the_report_the_records_and_on_the_terminal(grown, capsys):
    events = growths(grown)
    assert [one["step"] for one in events] == [10, 20, 30]
    assert events == grown.summary["growths"]
    assert event(events[0]).startswith("moe has 4 experts, 1 added by clone (parent 0), output changed by ")
    assert "1 added by clone (parent " in event(events[1]) and "and 1 removed" in event(events[1])
    assert event(events[2]).endswith("(mover: planned)")
    assert "1 removed, output" in event(events[2])
    page = (grown.folder / "report.html").read_text()
    assert "<h2>Growth</h2>" in page
    assert page.count('<td class="word">mover: planned</td>') == 3
    assert '"step": 10.0, "text": "' in page.replace('"step": 10,', '"step": 10.0,')
    assert "load of each expert over training, over an even share, in the order of their creation" in page


def test_a_run_that_did_not_grow_has_no_marks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["run", "--epochs", "1", "--out", "run", "--task", "blobs", "--set", "blobs.images=500", "--quiet"]
    assert main(argv) == 0
    run = read_run(tmp_path / "run")
    assert (growths(run), run.summary["growths"], lives(run, "moe")[1:]) == ([], [], ({}, {}))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Growth</h2>" not in page
    assert "order of their creation" not in page
