"""What a terminal of 80 columns shows: whole words, no long line, and the same number in the same form."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from moe_engine.cli import main
from moe_engine.cli.output import folded
from moe_engine.cli.progress import facts
from moe_engine.cli.tables import chosen, fitted, narrowed
from moe_engine.run.folder import read_run
from moe_engine.run.forms import FORMATS, fixed, percent, shown
from moe_engine.run.page import run_page
from warm import MOE_ENGINE

ROOT = Path(__file__).parents[2]
WIDTH = 80
QUICK = ["--task", "blobs", "--set", "blobs.images=640", "--set", "blobs.test_images=100", "--experts", "3"]
GROW = ["--plugins", "saturation,switch_aux,schedule,clone", "--set", "schedule.every=4"]
SIZES = {"layers": 4, "dim": 64, "hidden": 128, "experts": 8, "ranks": 4, "memory": 8, "rate": 3, "bandwidth": 1}
PLAN = ["plan", *(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))]
HINT = ("not", "shown", "for", "lack", "of", "room:", "and", "(--wide", "shows", "all)")
COUNTS = str(ROOT / "examples" / "counts" / "olmoe.csv")
STUDY = ["study", "growth", "--check", "--out", str(ROOT / "docs" / "results" / "growth")]
OUTPUTS = {
    "compare": ["compare", "one", "two"],
    "compare --wide": ["compare", "one", "two", "--wide"],
    "replay": ["replay", "one", "--routers", "topk,sigmoid_topk", "--capacity", "none,1.0"],
    "routing-stats": ["routing-stats", COUNTS, "--split", "domain"],
    "routing-stats of a run": ["routing-stats", "one"],
    "routing-stats --per-expert": ["routing-stats", COUNTS, "--per-expert", "--wide"],
    "studies": ["study"],
    "study --check": STUDY,
    "plan": PLAN,
    "plan --wide": [*PLAN, "--wide"],
    "plugins": ["plugins"],
    "plugins saturation": ["plugins", "saturation"],
    "resume": ["resume", "two"],
    "resume of nothing": ["resume", "a-folder-that-is-not-there"],
    "a misspelt plugin": ["run", "--plugins", "saturatoin,switch_aux", "--out", "three"],
    "a misspelt option": ["run", "--plugins", "switch_aux", "--set", "switch_aux.wieght=0.1", "--out", "three"],
    "a bad number": ["run", "--epochs", "none at all", "--out", "three"],
    "plugins --check": ["plugins", "--check"],
    "check": ["check", "csv"],
    "export of no language model": ["export", "one", "folder"],
    "evaluate of no language model": ["evaluate", "one", "--text", "missing.txt"],
}
on_terminals = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def screen(commands, cwd, *words):
    """The lines that a command leaves on a terminal, and its exit code."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(WIDTH)}
    with open(theirs, "wb") as terminal:
        process = commands.start(
            [*MOE_ENGINE, *words], cwd=cwd, environment=environment, stdout=terminal, stderr=terminal
        )
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # Linux raises it at the end of a pseudo-terminal
        pass
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text)], process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs, of which the second grew."""
    folder = tmp_path_factory.mktemp("runs")
    plain = [*QUICK, "--no-plugin", "plots,html", "--quiet", "--epochs", "2"]
    for name, flags in (("one", ["--plugins", "switch_aux", "--record-routing"]), ("two", GROW)):
        assert main(["run", *plain, *flags, "--out", str(folder / name)]) == 0
    return folder


@on_terminals
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_fits_80_columns_and_breaks_no_word(name, runs, commands, capsys, monkeypatch):
    """Every word on the terminal is a whole word of the output in a file, where nothing is folded."""
    lines, code = screen(commands, runs, *OUTPUTS[name])
    assert [line for line in lines if len(line) > WIDTH] == []
    monkeypatch.chdir(runs)
    wide = [word for word in OUTPUTS[name] if word != "--wide"]
    assert main(wide) == code, lines
    out, err = capsys.readouterr()
    hints = [line for line in lines if "--wide shows all" in line]
    known = {*re.split(r"[\s,/]+", out + err), *HINT}
    shown_words = {word for line in lines for word in re.split(r"[\s,/]+", line) if "\u2501" not in word}
    assert {word for word in shown_words - known if not re.fullmatch(r"[\d.:%-]*", word)} <= {"replaying"}
    assert not ("--wide" in OUTPUTS[name] and hints)


@on_terminals
def test_a_table_that_does_not_fit_says_what_it_leaves_out(runs, commands):
    lines, _ = screen(commands, runs, "compare", "one", "two")
    told = " ".join(lines)
    assert "verdict" in lines[0]
    assert re.search(r"not shown for lack of room: .*seconds.*\(--wide shows all\)", told), lines
    whole, _ = screen(commands, runs, "compare", "one", "two", "--wide")
    assert "seconds" in " ".join(line for line in whole if line.startswith("run "))


@on_terminals
def test_a_run_shows_step_time_left_and_numbers_of_one_split(tmp_path, commands):
    lines, code = screen(
        commands, tmp_path, "run", *QUICK, *GROW, "--epochs", "2", "--log-every", "4", "--no-plugin", "plots,html"
    )
    assert code == 0
    assert [line for line in lines if len(line) > WIDTH] == []
    bars = [line for line in lines if re.search(r"\d+/20 ", line) and "cv" in line]
    form = r"\d+/20 \S+ (train|test) loss \d+\.\d{4}, accuracy \d+\.\d\d%, cv \d\.\d{3}, active \d+"
    assert bars and all(re.fullmatch(rf"\s*{form}", bar.split("\u2501 ")[-1]) for bar in bars), bars[:3]
    assert {re.search("train|test", bar)[0] for bar in bars} == {"train", "test"}
    assert any("1 added by clone (parent" in line for line in lines)


def test_plain_lines_carry_epoch_loss_terms_and_time_per_step(capsys, tmp_path):
    words = ["--plugins", "switch_aux", "--log-every", "4", "--no-plugin", "plots,html", "--epochs", "1"]
    assert main(["run", *QUICK, *words, "--out", str(tmp_path / "run")]) == 0
    train, *_, test = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    form = (
        r"step +4  epoch 1  train  loss [\d.]+  switch_aux 1\.\d{3}  accuracy [\d.]+%  cv .*active \d+  [\d.]+ ms/step"
    )
    assert re.fullmatch(form, train), train
    assert "test   loss" in test and "switch_aux" not in test and "ms/step" not in test


def test_numbers_of_one_line_are_of_one_record():
    record = {"split": "eval", "loss": 0.25, "accuracy": 0.98053, "layers": {"a": {"cv": 0.2}, "b": {"cv": 0.4}}}
    assert facts(record, ("cv",)) == ["loss 0.2500", "accuracy 98.05%", "cv 0.300"]


def test_the_same_number_has_the_same_form_everywhere(runs, tmp_path, monkeypatch, capsys):
    """An accuracy in the last line of a run, in compare, in the report and on an axis."""
    shutil.copytree(runs / "one", tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    accuracy = read_run(Path("one")).summary["accuracy"]
    assert main(["resume", "one"]) == 0
    assert f"accuracy {100 * accuracy:.2f}%" in capsys.readouterr().out
    assert main(["compare", "one", "--out", "curves.svg"]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert "accuracy %" in head and f" {100 * accuracy:.2f} " in row
    assert "accuracy %" in Path("curves.svg").read_text()
    page = run_page(read_run(Path("one")))
    assert f"<b>{100 * accuracy:.2f}%</b><span>test accuracy</span>" in page


def test_a_tiny_number_is_not_shown_as_zero():
    assert [fixed(1e-10, 3), fixed(8e-7, 3), fixed(0.0, 3), fixed(-2e-9, 2)] == [
        "1.0e-10",
        "8.0e-07",
        "0.000",
        "-2.0e-09",
    ]
    assert [percent(0.9805), percent(0.0)] == ["98.05%", "0.00%"]
    assert [shown("accuracy", 0.98053), shown("cv", 0.2), shown("active", 8.0), shown("cv", None)] == [
        *("98.05", "0.200", "8", "-")
    ]
    assert FORMATS["accuracy"].title == "accuracy %"


def test_lines_are_folded_at_words_and_a_path_stays_whole():
    assert folded("  a layer has too few experts", 16) == ["  a layer has", "    too few", "    experts"]
    assert folded(f"report: {'x' * 30}", 20) == ["report:", f"  {'x' * 30}"]
    assert fitted("saturation,switch_aux,schedule", 22) == ["saturation,switch_aux,", "schedule"]
    assert fitted("a" * 30, 9) == ["aaaa\u2026aaaa"]


def test_columns_are_kept_by_priority():
    """20: the key's 4, then the last, which is wanted first, then what fits of 6 and 6, each after 2."""
    assert chosen([4, 6, 6, 8], 1, 20, [3]) == [0, 3]
    assert chosen([4, 6, 6, 8], 1, 22, [3]) == [0, 1, 3]
    assert chosen([4, 6, 6, 8], 1, 30, []) == [0, 1, 2, 3]
    assert narrowed([40, 30], [9, 25], 80) == [15, 25]
    assert narrowed([12], [12], 30) == [12]


def test_json_holds_the_numbers_as_they_are(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["compare", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["accuracy"] == read_run(Path("one")).summary["accuracy"]
