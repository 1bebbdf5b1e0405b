"""How fast a run is: only training counts as training."""

import math

import pytest
import torch

from moe_engine.run import pace
from moe_engine.run.config import RunConfig
from moe_engine.run.pace import Pace
from moe_engine.run.training import Training


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def forward(seconds):
        now[0] += seconds
        return now[0]

    return forward


def test_what_is_not_training_is_left_out_and_loading_is_not(clock):
    measured = Pace(torch.device("cpu"))
    for _ in range(2):
        measured.start()
        clock(2.0)
        measured.add_step(16)
        clock(1.0)  # the next batch is loaded
        measured.start()
        clock(2.0)
        measured.add_step(16)
        measured.pause()
        clock(1000.0)  # a log point
        measured.pause()
    measured.evaluate(500, started=clock(0.0) - 10)
    speed = {"unit": "samples", "step_seconds": 2.5, "trained_per_second": 6.4, "tested_per_second": 50.0}
    assert measured.speed() == pytest.approx(speed)
    tokens = measured.speed(8)
    assert (tokens["unit"], tokens["trained_per_second"]) == ("tokens", pytest.approx(8 * 6.4))


def test_nothing_trained_has_no_speed():
    assert Pace(torch.device("cpu")).speed() == {"unit": "samples"}


@pytest.mark.parametrize(("task", "unit", "each"), [("blobs", "samples", 1), ("lm", "tokens", 24)])
def test_every_sample_of_a_run_is_counted(tmp_path, task, unit, each):
    settings = {"blobs": {"images": 500}, "lm": {"length": each}}
    config = RunConfig(task=task, epochs=2, steps=10, batch_size=48, log_every=3, no_plugin=("html",))
    training = Training(config, {task: settings[task]}, tmp_path / "run")
    run = training.run()
    rows = len(training.task.train[0])
    steps = min(10, 2 * math.ceil(rows / 48))
    whole, last = divmod(steps * 48, 48 * math.ceil(rows / 48))
    assert training._pace.steps == steps == run.summary["steps"]
    assert training._pace.trained == whole * rows + last
    assert training._pace.evaluated == len(training.task.test[0])
    speed = run.summary["speed"]
    assert speed["unit"] == unit
    per_step = each * training._pace.trained / steps
    assert speed["trained_per_second"] * speed["step_seconds"] == pytest.approx(per_step)


def test_the_learning_rate_is_recorded_as_it_was_used(tmp_path):
    config = RunConfig(
        task="blobs", epochs=9, steps=12, log_every=4, lr=0.02, lr_schedule="cosine", no_plugin=("html",)
    )
    run = Training(config, {"blobs": {"images": 500}}, tmp_path / "run").run()
    train = [record for record in run.records if record["split"] == "train"]
    used = [0.01 * (1 + math.cos(math.pi * (record["step"] - 1) / 12)) for record in train]
    assert [record["learning_rate"] for record in train] == pytest.approx(used)
    assert len(train) == 3 and not any("learning_rate" in record for record in run.records if record not in train)
