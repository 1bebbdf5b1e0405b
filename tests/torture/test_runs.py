"""The short form on runs: kills and refusals at operations on the disk, damage, and commands that must not lie."""

import random

import attrs
import pytest

from moe_engine import hookimpl
from moe_engine.run.folder import new_folder, record_file
from support import refused
from torture import cases
from torture.shim import Strike, command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, end, operations) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *cases.whole(folder)


def places(done):
    """Where to strike: the first operation of each kind, the middle and the last of all."""
    first = {what: index for index, what in reversed(list(enumerate(done, 1)))}
    return sorted({*first.values(), len(done) // 2, len(done)})


def test_a_kill_at_any_operation_loses_nothing(finished, tmp_path):
    """Each kind of operation once, with half of a write on the disk."""
    _, expected, done = finished
    assert {"open", "write", "fsync", "replace", "mkdir"} <= {*done}
    verdicts = [cases.struck(tmp_path / "run", Strike(at, "half"), expected) for at in places(done)]
    assert [verdict for verdict in verdicts if verdict.wrong] == []
    assert sum(verdict.kills for verdict in verdicts) == len(verdicts)


@pytest.mark.parametrize(("how", "count"), [("ENOSPC", 2), ("EROFS", 1)])
def test_what_the_system_refuses_is_one_sentence_and_the_run_goes_on(finished, tmp_path, how, count):
    """The disk stays as it is until the command has ended; later there is room again."""
    _, expected, done = finished
    for at in (1, done.index("write") + 1, *random.Random(how).sample(range(5, len(done)), count)):
        verdict = cases.struck(tmp_path / "run", Strike(at, how, stays=True), expected)
        assert not verdict.wrong, verdict


def test_a_damaged_file_is_refused_or_changes_nothing(finished, tmp_path):
    """One file of each kind; the long form takes each of them, many times."""
    folder, _, _ = finished
    expected = cases.answers(folder, tmp_path)
    newest = str(max(folder.glob("checkpoints/step-*")).relative_to(folder))
    for seed, name in enumerate(["summary.json", "config.toml", newest, "metrics.jsonl"]):
        verdict = cases.damaged(
            folder, tmp_path, name, ("digit", "cut off", "flipped", "cut off")[seed], seed, expected
        )
        assert not verdict.wrong, verdict


def test_a_start_that_was_killed_leaves_a_folder_that_run_takes(finished, tmp_path):
    """Before there is a configuration, nothing can be resumed, which is said."""
    folder = tmp_path / "run"
    _, expected, done = finished
    command([*cases.RUN, "--out", folder], Strike(done.index("fsync") + 1, "kill"))
    assert not (folder / "config.toml").exists()
    outcome = command(["resume", folder])
    assert (outcome.code, "moe-engine run --out" in outcome.last) == (2, True)
    assert command([*cases.RUN, "--out", folder]).code == 0
    assert cases.ends(folder) == expected


def test_a_folder_that_is_replaced_under_a_run_is_noticed(tmp_path):
    """The run says so, and writes nothing into the other folder."""
    folder = tmp_path / "run"

    @attrs.define(eq=False)
    class Mover:
        @hookimpl
        def moe_metrics(self, stats):
            if folder.exists() and not (tmp_path / "moved").exists():
                folder.rename(tmp_path / "moved")
                folder.mkdir()
            return {}

    outcome = command([*cases.chosen("mover"), "--out", folder], plugins={"mover": ("metric", Mover)})
    assert (outcome.code, "moved or deleted" in outcome.last, outcome.sound) == (1, True, True), outcome
    assert list(folder.iterdir()) == []


def test_the_loser_of_two_starts_changes_nothing(tmp_path):
    """Both chose the folder while it was empty; the one that has not got the lock writes nothing."""
    folder = tmp_path / "run"
    chosen = new_folder(folder, "blobs")
    with record_file(folder, new=True):
        (folder / "config.toml").write_text("the winner's")
        outcome = command([*cases.RUN, "--out", folder])
        assert (outcome.code, outcome.sound) == (2, True), outcome
        with refused("folder-in-use", folder), record_file(chosen, new=True):
            pass
    with refused("folder-not-empty", folder, "moe-engine resume"), record_file(chosen, new=True):
        pass
    assert (folder / "config.toml").read_text() == "the winner's"
