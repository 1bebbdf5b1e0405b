"""What README.md shows, runs."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import attrs
import click
import pytest
import torch

from moe_engine import Engine, hookimpl
from moe_engine.cli import group, main
from moe_engine.registry.discovery import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def named(language, first_line):
    return next(block for block in blocks(language) if block.startswith(first_line))


def test_the_plugins_on_the_page_run(install, tmp_path, monkeypatch):
    module = {}
    exec(named("python", "# my_moe_plugins.py"), module)
    project = tomllib.loads(named("toml", "# pyproject.toml"))["project"]
    for kind, points in project["entry-points"].items():
        for name, target in points.items():
            install(KINDS[kind.removeprefix("moe_engine.")], name, module[target.partition(":")[2]])
    monkeypatch.chdir(tmp_path)
    command = next(line for line in blocks("sh")[-1].splitlines() if "coin.noise" in line).split()[1:]
    assert main([*command, "--epochs", "2", "--out", "run", "--quiet"]) == 0
    for file in ("metrics.jsonl", "summary.json", "report.html"):
        assert "top_share" in (tmp_path / "run" / file).read_text().split("[run]")[0]


def test_the_parts_in_the_hooks_documentation_work(install):
    page = (ROOT / "docs" / "hooks.md").read_text("utf-8")
    parts = {}
    exec("import torch\nfrom moe_engine import *", parts)
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, parts)
    router = {"moe_router": hookimpl(lambda self, spec: parts["Plain"](spec))}
    bias = {"moe_bias": hookimpl(lambda self, spec, level: parts["Nudge"](level.size))}
    install("router", "plain", attrs.define(eq=False)(type("PlainPlugin", (), router)))
    install("bias", "nudge", attrs.define(eq=False)(type("NudgePlugin", (), bias)))
    engine = Engine("plain,nudge", experts=4)
    layer = engine.moe(6, 8)
    layer(torch.randn(9, 6)).sum().backward()
    engine.after_backward()
    engine.after_step()
    assert layer.biases[0]["nudge"].b.abs().sum() > 0
    for kind, name, cls in (("growth", "hundred", "EveryHundred"), ("initializer", "half", "HalfNew")):
        install(kind, name, attrs.define(eq=False)(parts[cls]))
    engine = Engine("plain,nudge,hundred,half", experts=4)
    layer = engine.moe(6, 8)
    wanted = []
    for _ in range(100):
        engine.step += 1
        wanted.append(engine.due(0.0))
    assert wanted[:99] == [[]] * 99
    engine.grow(*wanted[99])
    assert layer.spec.experts == 5


def test_the_loop_on_the_page_runs(capsys, tmp_path, monkeypatch):
    """It builds, trains, grows, measures, saves and loads, in under 25 lines."""
    monkeypatch.chdir(tmp_path)
    block = named("python", "import torch\nfrom moe_engine import Engine")
    assert len(block.splitlines()) < 25
    page = {}
    exec(block, page)
    printed = capsys.readouterr().out
    assert printed.count("Grown(step=") == 3
    assert "Finding(name=" in printed
    assert page["model"][1].spec.experts == 7
    assert (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_on_the_page_leads_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("moe-engine ")]
)
def test_every_command_and_flag_on_the_page_exists(line):
    _, name, *words = shlex.split(line, comments=True)
    with group.commands[name].make_context(name, words, parent=click.Context(group)):
        pass


def test_every_plugin_on_the_page_is_installed(capsys):
    main(["plugins", "--json"])
    plugins = json.loads(capsys.readouterr().out)
    families = {path.stem for path in (ROOT / "plugins" / "families").glob("*.py")}  # others are names of their kin
    listed = {plugin["name"] for plugin in plugins if plugin["kind"] != "family" or plugin["name"] in families}
    table = README[README.index("## Built in") : README.index("## A plugin on one page")]
    assert set(re.findall(r"`(\w+)`", table)) == listed
