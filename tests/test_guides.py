"""The guides about real models run as they stand, on tiny models."""

import re
import shlex
from pathlib import Path

import pytest

from moe_engine.cli import main

pytest.importorskip("transformers")

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["see_experts", "balance_model", "grow_model", "upcycle_model"])
def test_a_guide_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text("utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(block, names)
    printed = capsys.readouterr().out
    if page == "see_experts":
        assert printed.count("share of each expert: [") == 4
        assert (tmp_path / "routing").exists()
    if page == "balance_model":
        assert "can't hold the bias 'saturation' in model.layers.0.mlp" in printed
    if page == "grow_model":
        assert names["exported"].experts == 7
        assert names["exported"].change < 1e-4
        assert (tmp_path / "grown" / "config.json").exists()
    if page == "upcycle_model":
        assert names["upcycled"].change < 1e-5 < names["varied"].change
        assert "can't hold the bias 'saturation' in model.layers.1.mlp" in printed


def test_the_commands_of_the_fine_tuning_guide_run(tmp_path, monkeypatch, capsys):
    """On the tiny models and texts that it makes, two steps of each run."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "finetune_mixture.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(block, {})
    for commands in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in commands.splitlines():
            _, *words = shlex.split(line)
            few = ["--steps", "2", "--batch-size", "2", "--no-plugin", "plots,html", "--quiet"]
            assert main([*words, *(few if words[0] == "run" else ())]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "tuned: 8 experts per layer" in printed and "We came into" in printed
    assert (tmp_path / "tuned" / "config.json").exists()
