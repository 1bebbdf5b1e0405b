"""`moe-engine study`, through the command line: what it runs, writes, judges and refuses."""

import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import attrs
import pytest

from moe_engine import hookimpl
from moe_engine.cli import main
from moe_engine.run.training import Training
from moe_engine.seeds import generator
from moe_engine.study.grid import cells_of
from moe_engine.study.reading import read_study, shipped
from support import refused
from warm import MOE_ENGINE

MINE = """
title = "Two ways"
question = "Does it run?"
source = "A. Author, 2026"
notes = ["It is wrong."]
seeds = 2

[base.run]
task = "blobs"
epochs = 1
device = "cpu"
log_every = 2
[base.set.blobs]
images = 200
test_images = 50

[axis.method.nothing]
[axis.method.loud]
plugins = ["switch_aux"]
set = { switch_aux = { weight = 0.5 } }
[axis.experts."2"]
run = { experts = 2 }
[axis.experts."4"]
run = { experts = 4 }

[[part]]
name = "main"
title = "All of them"
columns = ["accuracy", "tail.cv", "flops.active"]
[part.cross]
method = []
experts = []

[[published]]
part = "main"
name = "theirs"
numbers = { accuracy = 0.5 }

[[criterion]]
claim = "all are better than chance"
quantity = "accuracy"
where = { part = "main" }
over = "each"
at_least = 0.11

[[figure]]
name = "numbers"
kind = "numbers"
title = "Numbers"
where = { part = "main" }
quantities = ["accuracy", "tail.cv"]

[[figure]]
name = "against"
kind = "against"
title = "Over the experts"
where = { part = "main" }
x = "experts"
quantities = ["accuracy"]

[[figure]]
name = "usage"
kind = "usage"
title = "Usage"
where = { part = "main" }

[[figure]]
name = "over_time"
kind = "over_time"
title = "Over time"
where = { part = "main", experts = "4" }

[[figure]]
name = "classes"
kind = "classes"
title = "Classes"
where = { part = "main", experts = "4" }

[quick.run]
steps = 1
[quick.cross]
experts = ["2"]
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(MINE)


@pytest.fixture
def ran(monkeypatch):
    """The (experts, plugins, seed) of every run that begins in this process."""
    begun, run = [], Training.run

    def noted(training):
        config = training.config
        begun.append((config.experts, config.plugins, config.seed))
        return run(training)

    monkeypatch.setattr(Training, "run", noted)
    return begun


def study(*words, code=0, name="mine.toml"):
    assert main(["study", name, "--jobs", "1", "--quiet", "--out", "out", *words]) == code
    return json.loads(Path("out/study.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the study, run once for all tests that need nothing but its results."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        Path("mine.toml").write_text(MINE)
        study()
    return home / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, where `study` writes."""
    return shutil.copytree(finished, tmp_path / "out")


def test_variants_times_seeds_are_run_written_and_drawn(ran, capsys):
    results = study()
    expected = [(size, plugins, seed) for seed in (0, 1) for plugins in ((), ("switch_aux",)) for size in (2, 4)]
    assert expected == ran
    assert [row["variant"] for row in results["rows"]] == ["nothing, 2", "nothing, 4", "loud, 2", "loud, 4"]
    row = results["rows"][3]
    assert (row["at"], row["plugins"], row["seeds"]) == ({"method": "loud", "experts": "4"}, ["switch_aux"], [0, 1])
    values = row["numbers"]["accuracy"]["values"]
    assert row["numbers"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert [criterion["verdict"] for criterion in results["criteria"]] == ["passed"]
    page = Path("out/study.md").read_text()
    out = capsys.readouterr().out
    for text in (page, out, Path("out/study.html").read_text()):
        assert "published: theirs" in text
        assert "all are better than chance" in text
    assert "| published: theirs | 50.00 | - | - | - |" in page
    names = {"numbers.png", "against.png", "usage.png", "over_time.png", "classes.png"}
    assert names == {path.name for path in Path("out").glob("*.png")}
    for name in names:
        assert f"({name})" in page
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again(out, ran):
    first = json.loads((out / "study.json").read_text())
    assert first == study()
    assert ran == []
    more = study("--seeds", "3")
    assert [seed for _, _, seed in ran] == [2, 2, 2, 2]
    assert more["rows"][0]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_a_killed_study_continues_to_the_same_numbers(jobs, finished, tmp_path, commands):
    words = [*MOE_ENGINE, "study", "mine.toml", "--jobs", jobs, "--out", "killed"]
    killed = commands.start(words, session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/cells/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not Path("killed/study.json").exists()
    assert main(["study", "mine.toml", "--jobs", "1", "--quiet", "--out", "killed"]) == 0
    straight = json.loads((finished / "study.json").read_text())
    assert straight == json.loads(Path("killed/study.json").read_text())


def test_results_are_judged_again_without_a_run(out, ran, capsys):
    study("--check")
    Path("mine.toml").write_text(MINE.replace("at_least = 0.11", "at_least = 1.01"))
    capsys.readouterr()
    stored = Path("out/study.json").read_bytes()
    study("--check", code=1)
    assert "1 of 1 criteria failed; the first: all are better than chance" in capsys.readouterr().err
    assert ran == []
    assert stored == Path("out/study.json").read_bytes()


def test_results_with_a_changed_digit_are_refused(out, capsys):
    text = Path("out/study.json").read_text()
    at = text.index('"mean": 0.') + len('"mean": 0.')
    Path("out/study.json").write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    study("--check", code=2)
    assert "damaged (its checksum is wrong)" in capsys.readouterr().err


@pytest.mark.usefixtures("out")
def test_a_failed_criterion_is_shown_and_does_not_fail_the_run():
    Path("mine.toml").write_text(MINE.replace("at_least = 0.11", "at_least = 1.01"))
    assert [criterion["verdict"] for criterion in study()["criteria"]] == ["failed"]


def test_a_failed_run_is_named_and_stops_no_other(install, capsys):
    @attrs.define(eq=False)
    class Broken:
        @hookimpl
        def moe_aux_loss(self, routing):
            if routing.experts == 4:
                raise RuntimeError("no luck")
            return routing.probs.sum() * 0

    install("loss", "broken", Broken)
    text = MINE.replace('plugins = ["switch_aux"]', 'plugins = ["broken"]').replace("switch_aux =", "blobs =")
    Path("mine.toml").write_text(text.replace("weight = 0.5", "images = 200"))
    results = study(code=1)
    assert {row["variant"]: row["status"] for row in results["rows"]} == {
        "nothing, 2": "finished",
        "nothing, 4": "finished",
        "loud, 2": "finished",
        "loud, 4": "refused",
    }
    assert "no luck" in results["rows"][3]["reason"]
    assert results["criteria"][0]["verdict"] == "not measured"
    err = capsys.readouterr().err
    assert "1 of 4 variants lack a run; main, loud, 4 was refused" in err


def test_quick_is_short_and_judges_nothing(ran, capsys):
    results = study("--quick")
    assert ran == [(2, (), 0), (2, ("switch_aux",), 0)]
    assert results["criteria"] == results["published"] == []


def test_two_seeds_never_share_a_random_stream():
    """Every named generator starts in a different state for every seed and name."""
    cells = [cell for _, _, variant in read_study("mine.toml").variants({}) for cell in cells_of(variant, range(50))]
    names = ("weights", "data order", "training", "blobs")
    states = {name: {seed: generator(seed, name).initial_seed() for seed in range(50)} for name in names}
    assert len({state for by_seed in states.values() for state in by_seed.values()}) == 50 * len(names)
    assert {cell.config.seed for cell in cells} == set(range(50))
    assert len({cell.key for cell in cells}) == len(cells)


@pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="needs dask and distributed")
@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_numbers(finished, commands):
    """On a real cluster: two workers on this machine."""
    command = [*MOE_ENGINE, "study", "mine.toml", "--quiet", "--jobs", "2"]
    forked = {**os.environ, "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "fork"}  # torch is imported already
    assert commands.run([*command, "--backend", "dask", "--out", "dask"], environment=forked).returncode == 0
    expected = json.loads((finished / "study.json").read_text())
    assert expected == json.loads(Path("dask/study.json").read_text())


QUICKEST = ("densenet",)  # the others take 7 to 50 s


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICKEST else pytest.mark.long) for name in shipped()]
)
def test_every_shipped_study_runs_in_its_quick_form(name, tmp_path, capsys):
    results = study("--quick", name=name)
    assert all(row["numbers"] for row in results["rows"])
    assert list(tmp_path.glob("out/*.png"))


# -- mistakes in a study's file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("method = []\n", "methods = []\n", "unknown-axis", ["part 'main'", "'methods'", "'method'"]),
        ("[axis.method.loud]", "[axis.method.loud]\nplugs = []", "invalid-study", ["plugs"]),
        ('plugins = ["switch_aux"]', 'plugins = ["swich_aux"]', "unknown-plugin", ["'swich_aux'", "'switch_aux'"]),
        ("at_least = 0.11", "", "invalid-study", ["all are better than chance", "at_least"]),
        ("at_least = 0.11", "at_least = 0.11\nabove = 3", "invalid-study", ["all are better than chance", "at_least"]),
        ('over = "each"', 'over = "all"', "invalid-study", ["'over'", "'all'"]),
        ('kind = "usage"', 'kind = "pie"', "invalid-study", ["'kind'", "'pie'"]),
        ('where = { part = "main" }\nover', 'where = { parts = "main" }\nover', "unknown-axis", ["'parts'", "'part'"]),
        ('where = { part = "main" }\nover', 'where = { part = "min" }\nover', "unknown-choice", ["'min'", "'main'"]),
        ('part = "main"\nname = "theirs"', 'part = "man"\nname = "theirs"', "unknown-choice", ["'theirs'", "'man'"]),
        ("seeds = 2", "seeds = 'two'", "invalid-study", ["seeds"]),
        ("seeds = 2", "seeds = 0", "invalid-study", ["'seeds'", ">= 1"]),
        ('x = "experts"', 'x = "expert"', "unknown-axis", ["figure 'against'", "'expert'", "'experts'"]),
        ('name = "usage"', 'name = "../usage"', "invalid-study", ["'name'", "../usage"]),
        ("title = ", "titel = ", "invalid-study", ["title"]),
        ("question", "= question", "invalid-toml", ["mine.toml"]),
        ("[[criterion]]", "[[criteria]]", "invalid-study", ["criteria"]),
        ('columns = ["accuracy", "tail.cv", "flops.active"]', "columns = 3", "invalid-study", ["3", "columns"]),
        (
            "[[published]]",
            '[[part]]\nname = "main"\ntitle = ""\ncolumns = []\ncross = {}\n[[published]]',
            "duplicate-name",
            ["'main'"],
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(old, new, code, words):
    text = MINE.replace(old, new)
    assert text != MINE
    Path("mine.toml").write_text(text)
    with refused(code, "study mine", *words):
        read_study("mine.toml")


def test_a_mistake_in_the_file_is_one_line_and_nothing_is_written(capsys):
    Path("mine.toml").write_text(MINE.replace("seeds = 2", "seeds = 0"))
    assert main(["study", "mine.toml", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert "'seeds'" in err
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_unknown_studies_and_missing_files_are_named():
    with refused("unknown-study", "'grwth'", "'growth'"):
        read_study("grwth")
    with refused("unreadable-file", "none.toml"):
        read_study("none.toml")


def test_check_needs_results_and_criteria(capsys):
    for words, sentence in (
        (["mine.toml", "--check", "--out", "nowhere"], "nowhere/study.json"),
        (["mine.toml", "--check", "--quick"], "--quick"),
    ):
        assert main(["study", *words]) == 2
        assert sentence in capsys.readouterr().err
    Path("out").mkdir()
    Path("out/study.json").write_text("[1]")
    assert main(["study", "mine.toml", "--check", "--out", "out"]) == 2
    assert "out/study.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["growth", "hierarchy"])
def test_missing_data_are_named_before_anything_is_written(name, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("offline")))
    assert main(["study", name, "--data-dir", "empty", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert "--data-dir" in err
    assert not Path("out").exists()


def test_the_list_names_every_study_and_its_question(capsys):
    assert main(["study"]) == 0
    out = capsys.readouterr().out
    for name in shipped():
        assert name in out
        assert read_study(name).question in out
