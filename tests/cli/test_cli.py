"""The command line when all is well: output, help, tables, progress."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from moe_engine.cli import COMMANDS, main, tables
from moe_engine.cli.plugin_lines import summary_of
from moe_engine.cli.plugins import HEADINGS
from moe_engine.registry.discovery import KINDS, Found, find
from moe_engine.run.folder import read_run
from support import forge
from warm import MOE_ENGINE

QUICK = ["--task", "blobs", "--set", "blobs.images=500", "--set", "blobs.test_images=100", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name, *flags):
    assert main(["run", *QUICK, "--no-plugin", "plots,html", "--quiet", "--out", name, *flags]) == 0


def test_json_is_the_summary_and_nothing_else(capsys):
    assert main(["run", *QUICK, "--out", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == read_run(Path("run")).summary
    assert out.count("\n") == 1
    assert "step" in err


def test_plain_lines_show_progress(capsys):
    assert main(["run", *QUICK, "--plugins", "saturation,switch_aux", "--out", "run", "--log-every", "4"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "blobs: saturation, switch_aux, topk; 8 experts, top 2; 8 steps on cpu"
    assert lines[1].startswith("step      4  epoch 1  train  loss ")
    assert all(word in lines[1] for word in ("accuracy", "cv", "maxvio", "active"))
    assert "epoch 1" in lines[1] and "switch_aux 1." in lines[1] and "ms/step" in lines[1]
    assert "report: run/report.html" in out


def on_a_terminal(commands, width, *words):
    """The output of the command line on a terminal of that width, without control sequences."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(width)}
    with open(theirs, "wb") as terminal:
        process = commands.start([*MOE_ENGINE, *words], environment=environment, stdout=terminal, stderr=terminal)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # Linux raises it at the end of a pseudo-terminal
        seen += b""
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert process.wait() == 0, text
    return re.split(r"[\r\n]+", text.strip())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("width", [80, pytest.param(160, marks=pytest.mark.long)])
def test_a_terminal_gets_a_live_bar(width, commands):
    """With loss, accuracy, cv and active experts of one split, and maxvio where there is room."""
    lines = on_a_terminal(
        commands, width, "run", *QUICK, "--out", "run", "--log-every", "4", "--no-plugin", "plots,html"
    )
    bars = [line for line in lines if "8/8" in line and "cv" in line]
    wanted = ("8/8", "loss", "test", "%", "cv", "active", *(["maxvio"] if width > 110 else []))
    assert all(word in bars[-1] for word in wanted), bars[-1]
    assert re.search(r"active \d+$", bars[-1].strip()), bars[-1]
    assert not [line for line in lines if "train  loss" in line or len(line.rstrip()) > width]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_table_fits_the_terminal(tmp_path, commands):
    """In parts where it is too wide, each with the columns that name its rows; cells stay whole."""
    run("one", "--plugins", "switch_aux")
    run("two")
    lines = on_a_terminal(commands, 80, "compare", "one", "two", "--wide")
    assert max(len(line.rstrip()) for line in lines) <= 80
    heads = [line.split() for line in lines if line.startswith("run ")]
    assert len(heads) > 1 and {"accuracy", "%", "loss", "entropy", "seconds"} < {
        word for head in heads for word in head
    }
    assert sum(line.startswith("one ") for line in lines) == len(heads)


def test_columns_are_split_by_the_room_there_is():
    """20: the key's 4, then as many as fit of 6, 6 and 8, each after 2; a last column of sentences is folded."""
    assert tables.blocks([4, 6, 6, 8], 1, 20) == [[0, 1, 2], [0, 3]]
    assert tables.blocks([4, 6, 6, 8], 1, 30) == [[0, 1, 2, 3]]
    assert tables.blocks([4, 500], 1, 40) == [[0, 1]]
    assert tables.blocks([4], 1, 40) == [[0]]


def test_quiet_shows_no_progress(capsys):
    run("run")
    out, err = capsys.readouterr()
    assert err == ""
    assert "accuracy" in out


def test_out_defaults_to_the_task_and_the_time(tmp_path):
    assert main(["run", *QUICK, "--quiet", "--no-plugin", "plots,html"]) == 0
    assert main(["run", *QUICK, "--quiet", "--no-plugin", "plots,html"]) == 0
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert first.startswith("blobs-20")
    assert first != second


def test_flag_goes_before_set_before_file_before_default(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[run]\nplugins = ["switch_aux"]\nexperts = 4\nseed = 3\n[plugins.switch_aux]\nweight = 0.5\n'
    )
    run("run", "--config", "c.toml", "--experts", "6", "--set", "switch_aux.weight=0.25")
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "experts = 6" in text
    assert "seed = 3" in text
    assert "weight = 0.25" in text
    assert "top_k = 2" in text


def test_a_flag_that_removes_a_plugin_removes_its_options_in_the_file_too(tmp_path, capsys):
    run("one", "--plugins", "saturation,switch_aux")
    run("two", "--config", "one/config.toml", "--plugins", "sigmoid_topk")
    assert "saturation" not in (tmp_path / "two" / "config.toml").read_text()
    capsys.readouterr()
    (tmp_path / "c.toml").write_text("[plugins.saturatoin]\nbeta = 1.0\n")
    assert main(["run", "--config", "c.toml", "--plugins", "topk"]) == 2
    assert "'saturatoin'" in capsys.readouterr().err


def test_compare_has_a_column_for_any_other_metric(capsys, tmp_path):
    run("one")
    summary = read_run(tmp_path / "one").summary
    summary["layers"][0]["mine"] = 0.25
    forge(tmp_path / "one", summary)
    capsys.readouterr()
    assert main(["compare", "one"]) == 0
    out = capsys.readouterr().out
    assert "mine" in out
    assert "0.25" in out


def test_plugins_lists_all_by_kind_with_a_line_each(capsys):
    assert main(["plugins"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if not line.startswith("  ")] == list(HEADINGS.values())
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(find())
    assert all(len(line.split()) > 1 for line in lines)
    assert "moe-engine plugins NAME" in last
    assert HEADINGS.keys() == {*KINDS.values()}


def test_plugins_lists_by_metadata(capsys):
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(find())
    assert {row["kind"] for row in rows} <= set(KINDS.values())
    (topk,) = [row for row in rows if row["name"] == "topk"]
    summary = topk.pop("summary")
    assert topk == {"name": "topk", "kind": "router", "distribution": "moe-engine", "version": "0.1.0"}
    assert summary == find()["topk"][0].entry_point.load().__doc__.splitlines()[0]


@pytest.mark.parametrize("name", find())
def test_a_summary_is_the_first_line_of_the_docstring(name):
    """Read from the source, it is what Python gives."""
    (found,) = find()[name]
    assert summary_of(found) == found.entry_point.load().__doc__.splitlines()[0]


@pytest.mark.parametrize(
    ("source", "summary"),
    [
        ("raise ImportError('imported')\n\n\nclass Mine:\n    '''It is mine.\n\n    All of it.'''\n", "It is mine."),
        ("'''A module.\n\nOf two paragraphs.'''\n\n\nclass Mine:\n    pass\n", "A module."),
        ("from elsewhere import Mine\n", "elsewhere"),
        ("class Mine(:\n", "elsewhere"),
        (None, "elsewhere"),
    ],
    ids=["class", "module", "no docstring", "no Python", "no file"],
)
def test_a_summary_imports_neither_the_plugin_nor_its_package(tmp_path, monkeypatch, source, summary):
    """A third party's package may import anything; without a line to show, its distribution is named."""
    package = f"heavy_{abs(hash(source))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('imported')\n")
    if source is not None:
        (tmp_path / package / "plugin.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("mine", f"{package}.plugin:Mine", "moe_engine.metrics")
    assert summary_of(Found("mine", "metric", "elsewhere", "1.0", point)) == summary
    assert package not in sys.modules


def test_a_plugin_of_another_distribution_is_listed_with_it(capsys, install):
    install("router", "theirs", None)
    assert main(["plugins"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  theirs ")]
    assert line.endswith(" [elsewhere 1.0]") and len(line) <= 80


def test_plugins_check_finds_the_built_in_ones_fine(capsys):
    assert main(["plugins", "--check"]) == 0
    assert "plugins are fine" in capsys.readouterr().out


def test_plugins_name_shows_options_types_and_defaults(capsys):
    assert main(["plugins", "saturation", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (signal,) = [option for option in shown["options"] if option["name"] == "signal"]
    help_text = signal.pop("help")
    assert signal == {"name": "signal", "type": "a word", "default": "mass", "choices": ["mass", "weights"]}
    assert shown["hooks"] == ["moe_bias"]
    assert shown["traits"]["requires"] == ["logits", "load"]
    assert main(["plugins", "saturation"]) == 0
    text = capsys.readouterr().out
    for words in (
        *("saturation: bias (moe-engine ", "Hooks: moe_bias", "requires logits: ", help_text),
        *("signal: mass | weights  [default: mass]", "decay: a number, 0 to 1  [default: 0.95]"),
        *("beta: a number or none, at least 0  [default: none]", "--set saturation.OPTION=VALUE"),
    ):
        assert words in text


@pytest.mark.parametrize("name", find())
def test_every_plugins_page_fits_80_columns(name, capsys):
    """With every word of its docstring."""
    assert main(["plugins", name]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert " ".join(find()[name][0].entry_point.load().__doc__.split()) in " ".join(out.split())


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["plugins"], ["plugins", "--json"], ["compare", "--help"]]
)
def test_help_and_plugins_import_no_torch(words):
    code = f"import sys; from moe_engine.cli import main; main({words!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_bad_file_of_counts_is_refused_without_torch(tmp_path):
    """Which takes ten times the memory and time of looking at the file."""
    (tmp_path / "counts.csv").write_text("layer,expert,count\n0,0,many\n")
    words = ["routing-stats", str(tmp_path / "counts.csv")]
    code = (
        f"import sys; from moe_engine.cli import main; assert main({words!r}) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_shows_every_flag_with_its_default(capsys):
    main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in (
        *("--plugins", "--no-plugin", "--task", "--experts", "--top-k", "--capacity", "--eval-capacity", "--epochs"),
        *("--capacity-per", "--batch-size"),
        *("--lr", "--seed", "--device", "--data-dir", "--set", "--config", "--out", "--log-every", "--json"),
    ):
        assert flag in text
    for words in (
        "[default: 50]",
        "--precision [fp32|bf16|fp64]",
        "--parallel [data|shard]",
        "--lr-schedule [constant|cosine]",
    ):
        assert words in text


@pytest.mark.parametrize("command", [None, *(command.name for command in COMMANDS)])
@pytest.mark.parametrize("width", ["80", "200"])
def test_every_help_fits_80_columns_and_is_not_cut(command, width, capsys, monkeypatch):
    """On a wide terminal too; a short help that click cuts ends with dots."""
    monkeypatch.setenv("COLUMNS", width)
    assert main([*([command] if command else []), "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Usage:")]
    assert [line for line in lines if len(line) > 80 or line.endswith("...")] == []


def test_every_command_is_listed_with_its_short_help_on_one_line(capsys):
    """In the order in which users meet them, not by letter."""
    assert main([]) == 0
    listed = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[command.name, command.short_help] for command in COMMANDS]


def test_compare_sets_runs_side_by_side(capsys, tmp_path):
    run("one", "--plugins", "switch_aux")
    run("two", "--plugins", "topk")
    capsys.readouterr()
    assert main(["compare", "one", "two"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "two", "switch_aux", "accuracy", "figure: compare.png"))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", "one", "two", "--json", "--out", "other.svg"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["one", "two"]
    assert (tmp_path / "other.svg").exists()


def test_a_name_that_looks_like_a_formula_is_only_a_name(tmp_path):
    run(r"$\frac$")
    run("other")
    assert main(["compare", r"$\frac$", "other", "--json"]) == 0


def test_the_report_stands_alone(tmp_path):
    """One page: verdict first, no outside address, every figure inside; and the same figures as files, if asked for."""
    assert main(["run", *QUICK, "--plugins", "saturation,switch_aux,plots", "--quiet", "--out", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    verdict = json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"]
    assert page.index(f">{verdict}</div>") < page.index("<figure")
    assert page.count("<figure") == page.count("</figure>") >= 8
    loaded = [part for part in page.split('src="')[1:] if not part.startswith("data:")]
    assert loaded == [] and "<link" not in page
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        *("loss.png", "accuracy.png", "balance-moe.png", "usage-moe.png", "classes-moe.png", "effects-moe.png")
    }


def test_a_report_states_the_balance_and_the_term_that_did_nothing(tmp_path):
    assert main(["run", *QUICK, "--plugins", "absolute_saturation", "--quiet", "--out", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "bias absolute_saturation had no effect" in page
    assert page.index("verdict s") < page.index("bias absolute_saturation had no effect") < page.index("<figure")


def test_untrusted_text_is_escaped(tmp_path, monkeypatch):
    assert main(["run", *QUICK, "--quiet", "--out", "<script>x"]) == 0
    assert "<script>x" not in (tmp_path / "<script>x" / "report.html").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_used_where_there_is_one(tmp_path):
    run("run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == "cuda"
