"""Reports: their files contain what was recorded."""

import csv
import importlib.util
import json

import attrs
import pytest

from moe_engine import Engine, Growth, UsageError, hookimpl
from moe_engine.cli import main
from moe_engine.contract.run import Run
from moe_engine.plugins.reports.csv import Csv
from moe_engine.plugins.reports.tensorboard import TensorBoard
from moe_engine.run.folder import read_run
from support import refused

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")


@attrs.define(eq=False)
class Mover:
    """Adds one, then replaces one."""

    @hookimpl
    def moe_growth(self, history):
        acts = {10: {"parents": (0,)}, 20: {"parents": (0,), "drop": (1,)}}
        return Growth("moe", **acts[history.step]) if history.step in acts else None


@pytest.fixture
def grown(install, tmp_path, monkeypatch):
    """A run that grew from 3 to 4 experts, with a report by csv."""
    monkeypatch.chdir(tmp_path)
    install("growth", "mover", Mover)
    argv = ["run", "--plugins", "mover,csv", "--experts", "3", "--epochs", "1", "--log-every", "5", "--out", "run"]
    assert main([*argv, "--task", "blobs", "--set", "blobs.images=2000", "--no-plugin", "html,plots", "--quiet"]) == 0
    return read_run(tmp_path / "run")


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_metrics_csv_holds_every_number_of_every_record(grown):
    rows = table(grown.folder / "metrics.csv")
    records = [record for record in grown.records if record["layers"]]
    assert len(rows) == len(records) > 3
    for row, record in zip(rows, records, strict=True):
        metrics = record["layers"]["moe"]
        assert [row["layer"], row["split"], row["step"]] == ["moe", record["split"], str(record["step"])]
        assert float(row["loss"]) == record["loss"]
        for name, value in metrics.items():
            if isinstance(value, list):
                assert name not in row
            elif isinstance(value, dict):
                assert row[name] == value["name"]
            else:
                assert row[name] == "" if value is None else float(row[name]) == value
    assert {row["active"] for row in rows} <= {"1", "2", "3", "4"}


def test_usage_csv_follows_each_expert_through_growth(grown):
    """3 experts until step 10; expert 3 is born then; at 20 expert 4 replaces 1."""
    rows = table(grown.folder / "usage.csv")
    alive = {int(row["step"]): sorted(int(r["expert"]) for r in rows if r["step"] == row["step"]) for row in rows}
    assert alive[5] == alive[10] == [0, 1, 2]
    assert alive[15] == alive[20] == [0, 1, 2, 3]
    assert alive[25] == [0, 2, 3, 4]
    for step in alive:
        assert sum(float(row["load"]) for row in rows if row["step"] == str(step)) == pytest.approx(1)


def run_of(folder, *records):
    folder.mkdir(exist_ok=True)
    return Run(folder, {"layers": [{"name": name} for name in records[0]["layers"]]}, list(records), {})


def record(split="train", step=1, **layers):
    return {"split": split, "step": step, "epoch": 1, "loss": 0.5, "layers": layers}


def test_cells_are_quoted_empty_or_absent_as_rfc_4180_has_it(tmp_path):
    odd = 'a "b", c\nd'
    one = record(**{odd: {"cv": None, "load": [1.0], "verdict": {"name": "healthy"}}})
    two = record(step=2, **{odd: {"cv": 0.1, "late": 3}})
    run = run_of(tmp_path / "run", one, two)
    assert Csv().moe_report(run) == ["metrics.csv", "usage.csv"]
    text = (run.folder / "metrics.csv").read_bytes().decode()
    quoted = '"a ""b"", c\nd"'
    lines = [
        "split,step,epoch,layer,loss,cv,verdict,late",
        f"train,1,1,{quoted},0.5,,healthy,",
        f"train,2,1,{quoted},0.5,0.1,,3",
    ]
    assert text == "".join(f"{line}\r\n" for line in lines)
    assert table(run.folder / "usage.csv") == [{"layer": odd, "step": "1", "expert": "0", "load": "1.0"}]


def events(folder):
    """{tag: [(step, value), ...]} of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_reads_back_what_was_recorded_once(tmp_path):
    records = [
        record(step=5, moe={"cv": 0.25, "load": [1.0], "gini": None, "verdict": {"name": "healthy"}}),
        record(step=10, moe={"cv": 0.5, "active": 3}),
        record("eval", 10, moe={"cv": 0.75}),
        {"split": "growth", "step": 10, "epoch": 1, "layers": {}, "growth": {"layer": "moe"}},
    ]
    run = run_of(tmp_path / "run", *records)
    for _ in range(2):  # a second time doubles nothing
        files = TensorBoard().moe_report(run)
    assert sorted(path.name for path in run.folder.iterdir()) == ["tensorboard"]
    assert all((run.folder / name).is_file() for name in files)
    expected = {"loss": [(5, 0.5), (10, 0.5)], "moe/cv": [(5, 0.25), (10, 0.5)], "moe/active": [(10, 3)]}
    assert events(run.folder / "tensorboard" / "train") == expected
    assert events(run.folder / "tensorboard" / "eval") == {"loss": [(10, 0.5)], "moe/cv": [(10, 0.75)]}


def test_a_missing_tensorboard_is_one_sentence_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    assert main(["run", "--plugins", "tensorboard", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.strip()
    assert "pip install tensorboard" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    with refused("missing-package", "pip install tensorboard"):
        TensorBoard().moe_report(run_of(tmp_path / "other", record(moe={})))
    with pytest.raises(UsageError, match="pip install"):
        Engine("tensorboard").moe(4, 4)


@needs_tensorboard
def test_a_run_writes_events(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["run", "--plugins", "tensorboard", "--epochs", "1", "--out", "run", "--task", "blobs", "--quiet"]
    assert main([*argv, "--set", "blobs.images=500", "--no-plugin", "html,plots"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = events(tmp_path / "run" / "tensorboard" / "eval")["moe/cv"][-1]
    assert last == (summary["steps"], pytest.approx(summary["layers"][0]["cv"]))
