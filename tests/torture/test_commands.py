"""The short form on commands: streams that fail, names no terminal should obey, plugins that misbehave, signals."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import attrs
import pytest

from moe_engine import hookimpl
from torture.cases import RUN, chosen, ends
from torture.shim import command

BRIEF = (*RUN, "--steps", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with a name that no terminal should get."""
    folder = tmp_path_factory.mktemp("whole") / "run\x1b[31m\udcff\x9b"
    assert command([*BRIEF, "--out", folder]).code == 0
    return folder


def plugin(**hooks):
    """A plugin class with these hooks."""
    for name, function in hooks.items():
        function.__name__ = name
    return attrs.define(eq=False)(type("Bad", (), {name: hookimpl(function) for name, function in hooks.items()}))


def run(tmp_path, kind, cls, *words):
    """A run with a plugin "bad"."""
    words = [*chosen("bad"), "--steps", "2", "--out", tmp_path / "run", *words]
    return command(words, plugins={"bad": (kind, cls)}, limit=60)


# -- streams and names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["routing-stats", "--json"], ["routing-stats"], ["--help"], ["run", "-h"], ["--version"]]
)
def test_a_full_standard_output_is_one_sentence(finished, words):
    outcome = command([*words, *([finished] if "routing-stats" in words else [])], out="/dev/full")
    expected = "moe-engine: standard output can't be used: No space left on device; free some space\n"
    assert (1, expected) == (outcome.code, outcome.err)


def test_names_that_an_ascii_terminal_cannot_show_are_escaped(tmp_path):
    """In a process that starts there: what names are decoded as is settled before it runs."""
    (tmp_path / "z\u00e4hl.csv").write_text("layer,expert,count\n0,0,gr\u00f6\u00dfer\n")
    names = ("z\u00e4hl.csv", "gr\u00f6\u00dfe", "\u00fc.toml")
    lines = "zip((['routing-stats'], ['compare'], ['run', '--config']), sys.argv[1:])"
    code = (
        f"import sys; from moe_engine.cli import main; assert all(main([*words, name]) == 2 for words, name in {lines})"
    )
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, *names]
    done = subprocess.run(words, check=False, cwd=tmp_path, env={**os.environ, **plain}, capture_output=True)
    err = done.stderr.decode("ascii")
    assert (done.returncode, len(err.splitlines())) == (0, 3), err
    assert "count is 'gr\\xf6\\xdfer'" in err and "this is a bug" not in err


def test_no_stream_that_fails_ends_a_run(tmp_path):
    """Progress that can't be shown costs nothing; only the answer is missed."""
    outcome = command([word for word in BRIEF if word != "--quiet"] + ["--out", tmp_path / "run"], err="/dev/full")
    assert outcome.code == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_name_reaches_the_terminal_without_control_characters(finished, tmp_path):
    for words in (
        ["compare", finished, "--out", tmp_path / "x.svg"],
        ["routing-stats", finished],
        ["resume", finished],
    ):
        outcome = command(words)
        assert outcome.code == 0 and outcome.sound, outcome
        raw = [char for char in outcome.out + outcome.err if not char.isprintable() and char != "\n"]
        assert raw == []
    row = json.loads(command(["routing-stats", finished, "--json"]).out)["rows"][0]["file"]
    assert row.endswith("run\x1b[31m\udcff\x9b")


def test_the_warning_of_damage_is_never_hidden(tmp_path):
    folder = tmp_path / "run"
    assert command([*BRIEF, "--out", folder]).code == 0
    newest = max(folder.glob("checkpoints/step-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = command(["resume", folder, "--quiet", "--json"])
    assert (outcome.code, "is damaged" in outcome.err, newest.name in outcome.err) == (0, True, True)
    assert json.loads(outcome.out)["steps"] == 2


# -- plugins ---------------------------------------------------------------------------------------


class Weird(BaseException):
    """Not an Exception."""


def throws(error):
    """A hook that raises."""

    def hook(self, stats):
        raise error

    return hook


@pytest.mark.parametrize(
    "error", [Weird("why"), GeneratorExit(), KeyboardInterrupt(), OSError(28, "full"), MemoryError()]
)
def test_whatever_a_plugin_raises_names_it(tmp_path, error):
    outcome = run(tmp_path, "metric", plugin(moe_metrics=throws(error)))
    assert outcome.code in (1, 2) and outcome.sound, outcome
    assert "metric 'bad' (elsewhere 1.0) in moe_metrics failed" in outcome.last


def test_what_a_plugin_prints_goes_to_standard_error(tmp_path):
    def speaks(self, stats):
        print("a remark of a plugin")
        return {}

    outcome = run(tmp_path, "metric", plugin(moe_metrics=speaks), "--json")
    assert json.loads(outcome.out)["steps"] == 2
    assert "a remark of a plugin" in outcome.err


WRONG = {
    "a word": lambda self, history: "grow",
    "a number": lambda self, history: 3,
    "a generator without end": lambda self, history: itertools.count(),
    "a list of words": lambda self, history: ["moe"],
    "later": lambda self, history: 3 if history.step > 2 else None,
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_a_wrong_growth_ends_the_run_and_leaves_it_resumable(tmp_path, answer):
    folder = tmp_path / "run"
    words = [word.replace(",schedule,split", ",split,bad") for word in RUN if word != "schedule.every=2"]
    del words[words.index("--experts") - 1]  # the --set before it
    outcome = command([*words, "--out", folder], plugins={"bad": ("growth", plugin(moe_growth=answer))}, limit=60)
    assert (outcome.code, outcome.sound, "'bad'" in outcome.last) == (1, True, True), outcome
    quiet = plugin(moe_growth=lambda self, history: None)
    assert command(["resume", folder, "--quiet"], plugins={"bad": ("growth", quiet)}).code == 0


def test_a_report_can_change_nothing_that_another_one_reads(tmp_path):
    def spoils(self, run):
        run.summary.clear()
        run.records.clear()
        run.config.clear()

    assert run(tmp_path, "report", plugin(moe_report=spoils)).code == 0
    assert command(["routing-stats", tmp_path / "run"]).code == 0


def test_a_thread_that_a_plugin_leaves_does_not_keep_the_program(tmp_path):
    def leaves(self, stats):
        threading.Thread(target=time.sleep, args=(600,)).start()
        return {}

    outcome = run(tmp_path, "metric", plugin(moe_metrics=leaves))
    assert outcome.code == 0


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "code"), [(1, 143), (2, -signal.SIGTERM)])
def test_signals_while_reports_are_written(tmp_path, count, code):
    """The first lets them end; the second ends the process at once. Either way the run is whole or resumable."""

    def slow(self, run):
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGTERM)
        (run.folder / "late").write_bytes(b"")

    outcome = run(tmp_path, "report", plugin(moe_report=slow))
    assert (outcome.code, (tmp_path / "run" / "late").exists()) == (code, count == 1)
    quick = plugin(moe_report=lambda self, run: None)
    assert command(["resume", tmp_path / "run", "--quiet"], plugins={"bad": ("report", quick)}).code == 0
    assert ends(tmp_path / "run")
