"""The short form on runs: kills and refusals at operations on the disk, damage, input, and folders."""

import random
import shutil

import attrs
import pytest

from moe_engine import UsageError, hookimpl
from moe_engine.run.checkpoints import DAMAGED
from moe_engine.run.folder import new_folder, record_file
from moe_engine.run.trees import read_tree
from support import refused
from torture import cases, damage, hostile, inputs
from torture.shim import Strike, command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, end, operations) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *cases.whole(folder)


@pytest.fixture(scope="module")
def half(finished, tmp_path_factory):
    """(folder, operations of its resuming) of a run that was killed halfway."""
    folder = tmp_path_factory.mktemp("half") / "run"
    return folder, cases.halfway(folder, finished[2])


# -- kills and refusals ----------------------------------------------------------------------------


def test_whatever_is_renamed_is_on_the_disk_first(finished):
    """No kill of a process shows that; a power failure would."""
    _, _, done = finished
    assert {"open", "write", "flock", "fsync", "replace", "unlink", "mkdir"} == {*done}
    assert {tuple(done[at - 3 : at]) for at, what in enumerate(done) if what == "replace"} == {
        ("open", "write", "fsync")
    }


def test_a_kill_at_any_operation_loses_nothing(finished, half, tmp_path):
    """Of a start, and of resuming what a kill has left; half of a write is done."""
    (_, expected, begun), (folder, done) = finished, half
    strikes = [(begun.index("write"), None), *((done.index(what), folder) for what in ("truncate", "write", "replace"))]
    verdicts = [cases.struck(tmp_path / "run", Strike(at + 1, "half"), expected, of) for at, of in strikes]
    assert [verdict for verdict in verdicts if verdict.wrong] == []
    assert sum(verdict.kills for verdict in verdicts) == len(verdicts)


def test_several_kills_lose_nothing(finished, tmp_path):
    _, expected, _ = finished
    verdict = cases.killed_again(tmp_path / "run", 3, expected, 4)
    assert not verdict.wrong, verdict
    assert verdict.kills >= 2


@pytest.mark.parametrize(("how", "stays"), [("ENOSPC", True), ("EIO", False)])
def test_what_the_system_refuses_is_one_sentence_and_the_run_goes_on(finished, half, tmp_path, how, stays):
    """Once, or until the command has ended; later there is room again."""
    (_, expected, _), (folder, done) = finished, half
    for at in (done.index("flock"), random.Random(how).randrange(4, len(done))):
        verdict = cases.struck(tmp_path / "run", Strike(at + 1, how, stays), expected, folder)
        assert not verdict.wrong, verdict


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(place, folder of a run, folder of a study) with what every command says of them."""
    place = tmp_path_factory.mktemp("read")
    return place, damage.of_run(place), damage.of_study(place)


@pytest.mark.parametrize("how", ["digit", "cut off"])
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.toml", "checkpoints/step", "routing"])
def test_a_damaged_file_of_a_run_is_refused_or_changes_nothing(read, name, how):
    """The long form takes each of them, many times."""
    place, run, _ = read
    found = [one for one in run.names() if one.startswith(name)][-1]
    verdict = damage.damaged(run, place, 1, found, how)
    assert not verdict.wrong, verdict


def test_a_damaged_file_of_a_study_is_refused_or_made_again(read):
    place, _, study = read
    for name, how in ((study.names()[0], "digit"), ("study.json", "digit"), ("study.json", "cut off")):
        verdict = damage.damaged(study, place, 1, name, how)
        assert not verdict.wrong, verdict


def test_no_bit_of_a_checkpoint_changes_unnoticed(half, tmp_path):
    """Whether it is of a weight, of a moment that a finished run needs no more, or of the text around them."""
    draws, content = random.Random(0), max(half[0].glob("checkpoints/step-*")).read_bytes()
    for at in draws.sample(range(len(content)), 40):
        changed = content[:at] + bytes([content[at] ^ 1 << draws.randrange(8)]) + content[at + 1 :]
        (tmp_path / "x").write_bytes(changed)
        with pytest.raises(UsageError) as caught:
            read_tree(tmp_path / "x")
        assert caught.value.code in DAMAGED, at


def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(half, tmp_path):
    """Not the whole run."""
    folder = tmp_path / "run"
    shutil.copytree(half[0], folder)
    newest = max(folder.glob("checkpoints/step-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = command(["resume", folder])
    said = ("is damaged", "trying the one before", "continuing from step 2")
    assert (outcome.code, [words for words in said if words not in outcome.err]) == (0, []), outcome.err


def test_a_checkpoint_that_cannot_be_read_now_is_kept(finished, half, tmp_path):
    """A disk that fails for a moment costs no step."""
    folder = tmp_path / "run"
    shutil.copytree(half[0], folder)
    newest = max(folder.glob("checkpoints/step-*"))
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(newest.name)  # opening it fails
    outcome = command(["resume", folder, "--quiet"])
    assert (outcome.code in (1, 2), outcome.sound, str(newest) in outcome.last) == (True, True, True), outcome
    newest.unlink()
    (tmp_path / "elsewhere").rename(newest)
    assert command(["resume", folder, "--quiet"]).code == 0
    assert cases.ends(folder) == finished[1]


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    """The run ends, and its checkpoints are those from before."""
    folder = tmp_path / "run"
    outcome = command([*cases.RUN, "--out", folder, "--lr", "1e30", "--log-every", "1000"])
    assert (outcome.code, "stopped being finite at step" in outcome.last) == (1, True), outcome
    for path in folder.glob("checkpoints/*"):
        assert all(value.isfinite().all() for value in read_tree(path)["model"].values()), path


# -- input -----------------------------------------------------------------------------------------


def test_no_input_is_a_bug(tmp_path):
    """A sample of the long form's, of each kind."""
    verdict = inputs.block(tmp_path / "place", 0, 96)
    assert not verdict.wrong, verdict


HOSTILE = (
    "fifo to routing-stats",
    "folder_of_fifos to study growth",
    "folder_of_depth to study growth",
    "link_to_zero to run --config",
    "a_pickle to resume",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path, name):
    (call,) = [call for known, call in hostile.cases() if known.startswith(name)]
    verdict = call(tmp_path / "place")
    assert not verdict.wrong, verdict


# -- folders ---------------------------------------------------------------------------------------


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
