"""What the page of a run says beside its charts."""

import html
import inspect
import json
import re

import pytest

from moe_engine.plugins.metrics.churn import Churn
from moe_engine.run.config import RunConfig
from moe_engine.run.forms import shown
from moe_engine.run.page import run_page
from moe_engine.run.training import Training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = RunConfig(task="blobs", plugins=("churn",), steps=12, log_every=3, epochs=2, lr_schedule="cosine")
    return Training(config, {"blobs": {"images": 500}}, tmp_path_factory.mktemp("page") / "run").run()


@pytest.fixture(scope="module")
def page(run):
    return run_page(run)


def facts(page):
    """{name: value} of the facts below the verdict."""
    return {name: value for value, name in re.findall(r"<li><b>(.*?)</b><span>(.*?)</span>", page)}


def test_the_speed_is_among_the_facts(run, page):
    speed, told = run.summary["speed"], facts(page)
    assert told["a training step"] == f"{shown('step_seconds', speed['step_seconds'])} ms"
    assert told["samples/s trained"] == f"{speed['trained_per_second']:,.0f}"
    assert told["samples/s tested"] == f"{speed['tested_per_second']:,.0f}"


def test_the_learning_rate_has_a_chart(run, page):
    charts = re.findall(r'<figcaption>(.*?)</figcaption>\s*<script type="application/json">(.*?)</script>', page)
    drawn = json.loads(html.unescape(dict(charts)["learning rate"]))
    train = [record for record in run.records if record["split"] == "train"]
    assert drawn["series"][0]["values"] == pytest.approx([record["learning_rate"] for record in train])


def test_each_plugin_says_what_it_is_in_its_own_words(page):
    told = html.unescape(page)
    paragraphs = inspect.getdoc(Churn).split("\n\n")
    assert len(paragraphs) > 2 and all(f"<p>{words}</p>" in told for words in paragraphs)
    assert "metric, moe-engine 0.1.0" in told
    assert "What each means is told below, under Plugins." in told
    assert "<details><summary>Plugins</summary>" in page
