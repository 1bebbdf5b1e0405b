"""What the page of a run says beside its charts."""

import html
import inspect
import json
import re

import attrs
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


def test_a_learning_rate_that_changes_has_a_chart(run, page):
    charts = re.findall(r'<figcaption>(.*?)</figcaption>\s*<script type="application/json">(.*?)</script>', page)
    drawn = json.loads(html.unescape(dict(charts)["learning rate"]))
    train = [record for record in run.records if record["split"] == "train"]
    constant = attrs.evolve(run, records=[{**record, "learning_rate": 0.1} for record in train])
    assert "<figcaption>learning rate</figcaption>" not in run_page(constant)
    assert drawn["series"][0]["values"] == pytest.approx([record["learning_rate"] for record in train])


def test_each_plugin_says_what_it_is_in_its_own_words(page):
    told = html.unescape(page)
    paragraphs = inspect.getdoc(Churn).split("\n\n")
    assert len(paragraphs) > 2 and all(f"<p>{words}</p>" in told for words in paragraphs)
    assert "metric, moe-engine 0.1.0" in told
    assert "What each means is told below, under Plugins." in told
    assert "<details><summary>Plugins</summary>" in page


def test_a_verdict_is_told_with_the_step_since_which_training_has_had_it(run):
    """Training's own verdict of each log point; one that came and went does not count."""
    bad = {"name": "collapsed", "severity": 2, "why": "why", "advice": ""}
    good = {"name": "healthy", "severity": 0, "why": "fine", "advice": None}

    def told(verdicts):
        train = [
            {"split": "train", "step": at, "epoch": 1, "layers": {"moe": {"verdict": one}}}
            for at, one in enumerate(verdicts, 1)
        ]
        finding = {"layer": "moe", "metric": "verdict", **bad}
        other = attrs.evolve(run, records=train, summary={**run.summary, "findings": [finding]})
        return re.findall(r"<strong>collapsed</strong>(.*?): why", run_page(other))

    assert told([bad, good, bad, bad]) == [" (in training since step 3)"]
    assert told([bad, bad, good]) == [""]


def test_columns_tell_what_they_mean(page):
    assert '<th title="largest load over the mean, minus 1; 0: even">maxvio</th>' in page
