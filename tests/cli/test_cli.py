"""What the command line answers when all is well."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from moe_engine.cli import main
from moe_engine.registry.discovery import KINDS, find

QUICK = ["--task", "blobs", "--set", "blobs.images=500", "--set", "blobs.test_images=100", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name, *flags):
    assert main(["run", *QUICK, "--no-plugin", "plots,html", "--quiet", "--out", name, *flags]) == 0


def test_json_is_the_summary_and_nothing_else(capsys):
    assert main(["run", *QUICK, "--out", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    with open("run/summary.json") as file:
        assert json.loads(out) == json.load(file)
    assert out.count("\n") == 1
    assert "step" in err


def test_plain_lines_tell_progress(capsys):
    assert main(["run", *QUICK, "--plugins", "saturation,switch_aux", "--out", "run", "--log-every", "4"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "blobs: saturation, switch_aux, topk; 8 experts, top 2; 8 steps on cpu"
    assert lines[1].startswith("step      4/8  train  loss ")
    assert all(word in lines[1] for word in ("accuracy", "cv", "maxvio", "active"))
    assert "report: run/report.html" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_live_bar():
    """With loss, accuracy, cv, maxvio and active experts, which the plain lines would repeat."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", "import sys; from moe_engine.cli import main; sys.exit(main(sys.argv[1:]))"]
    words = ["run", *QUICK, "--out", "run", "--log-every", "4", "--no-plugin", "plots,html"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 65536):
                seen += piece
        except OSError:  # what Linux says at the end of a pseudo-terminal
            seen += b""
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert process.returncode == 0, text
    last = text.strip().splitlines()[-1]
    assert all(word in last for word in ("8/8", "loss", "test accuracy", "cv", "maxvio", "active")), last
    assert "train  loss" not in text


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


def test_a_flag_that_takes_a_plugin_away_takes_its_options_in_the_file_away_too(tmp_path, capsys):
    run("one", "--plugins", "saturation,switch_aux")
    run("two", "--config", "one/config.toml", "--plugins", "sigmoid_topk")
    assert "saturation" not in (tmp_path / "two" / "config.toml").read_text()
    capsys.readouterr()
    (tmp_path / "c.toml").write_text("[plugins.saturatoin]\nbeta = 1.0\n")
    assert main(["run", "--config", "c.toml", "--plugins", "topk"]) == 2
    assert "plugin 'saturatoin', which does not exist" in capsys.readouterr().err


def test_compare_has_a_column_for_any_other_number(capsys, tmp_path):
    run("one")
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    summary["layers"][0]["mine"] = 0.25
    (tmp_path / "one" / "summary.json").write_text(json.dumps(summary))
    capsys.readouterr()
    assert main(["compare", "one"]) == 0
    out = capsys.readouterr().out
    assert "mine" in out
    assert "0.25" in out


def test_plugins_lists_by_metadata(capsys):
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(find())
    assert {row["kind"] for row in rows} <= set(KINDS.values())
    assert {"name": "topk", "kind": "router", "distribution": "moe-engine", "version": "0.1.0"} in rows


def test_plugins_check_finds_the_built_in_ones_fine(capsys):
    assert main(["plugins", "--check"]) == 0
    assert "plugins are fine" in capsys.readouterr().out


def test_plugins_name_shows_options_types_and_defaults(capsys):
    assert main(["plugins", "saturation", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (form,) = [option for option in shown["options"] if option["name"] == "signal"]
    assert form == {
        "name": "signal",
        "type": "a word",
        "default": "mass",
        "choices": ["mass", "weights"],
        "help": "what an expert is judged by",
    }
    assert main(["plugins", "saturation"]) == 0
    text = capsys.readouterr().out
    assert "signal = mass" in text
    assert "--set saturation.OPTION=VALUE" in text


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["plugins"], ["plugins", "--json"], ["compare", "--help"]]
)
def test_help_and_plugins_import_no_torch(words):
    code = f"import sys; from moe_engine.cli import main; main({words!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_shows_every_flag_with_its_default(capsys):
    main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--plugins",
        "--no-plugin",
        "--task",
        "--experts",
        "--top-k",
        "--capacity",
        "--epochs",
        "--batch-size",
    ):
        assert flag in text
    for flag in ("--lr", "--seed", "--device", "--data-dir", "--set", "--config", "--out", "--log-every", "--json"):
        assert flag in text
    assert "[default: 50]" in text


def test_compare_sets_runs_side_by_side(capsys, tmp_path):
    run("one", "--plugins", "switch_aux")
    run("two", "--plugins", "topk")
    capsys.readouterr()
    assert main(["compare", "one", "two"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "two", "switch_aux", "accuracy", "picture: compare.png"))
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
    """One page: verdict first, no address of anything outside, every picture inside, balanced markup."""
    assert main(["run", *QUICK, "--plugins", "saturation,switch_aux", "--quiet", "--out", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    verdict = json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"]
    assert page.index(f">{verdict}</div>") < page.index("<svg")
    assert page.count("<svg") == page.count("</svg>") == 6
    outside = [
        part for part in page.split('href="')[1:] + page.split('src="')[1:] if not part.startswith(("#", "data:"))
    ]
    assert outside == []
    ids = [part.split('"')[0] for part in page.split('id="')[1:]]
    assert len(ids) == len(set(ids))
    used = {part.split('"')[0] for part in page.split('href="#')[1:]} | {
        p.split(")")[0] for p in page.split("url(#")[1:]
    }
    assert used <= set(ids)
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        *("loss.png", "accuracy.png", "balance-moe.png", "usage-moe.png", "classes-moe.png", "effects-moe.png")
    }


def test_a_report_says_what_the_balance_is_and_which_term_did_nothing(tmp_path):
    assert main(["run", *QUICK, "--plugins", "absolute_saturation", "--quiet", "--out", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "bias absolute_saturation had no effect" in page
    assert page.index("verdict s") < page.index("bias absolute_saturation had no effect") < page.index("<svg")


def test_untrusted_text_is_escaped(tmp_path, monkeypatch):
    assert main(["run", *QUICK, "--quiet", "--out", "<script>x"]) == 0
    assert "<script>" not in (tmp_path / "<script>x" / "report.html").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_used_where_there_is_one(tmp_path):
    run("run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == "cuda"
