"""Reports: their files contain what was recorded."""

import base64
import csv
import importlib.util
import io
import json
import re

import attrs
import numpy as np
import pytest
import torch

from moe_engine import Engine, Growth, Sample, SampledLayer, UsageError, hookimpl
from moe_engine.cli import main
from moe_engine.contract.run import Run
from moe_engine.plugins.reports.csv import Csv
from moe_engine.plugins.reports.gallery import Gallery
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


# -- gallery -------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


def sampled(folder, layer, records=(), load=None, **shown):
    """A run's folder with a sample of one layer, and the run."""
    folder.mkdir(exist_ok=True)
    Sample(torch.arange(len(layer.expert)), layers=[layer], **shown).write(folder / "sample.safetensors")
    return Run(folder, {"layers": [{"name": layer.name, "load": load}]}, list(records), {})


def gallery(run):
    """The page of a gallery: its text, and the cards of its experts."""
    assert Gallery().moe_report(run) == ["gallery.html"]
    text = (run.folder / "gallery.html").read_text("utf-8")
    assert "alert(1)</script>" not in text and "\x1b" not in text
    return text, text.split('<div class="card"')[1:]


def test_a_gallery_shows_images_by_gate_their_mean_and_how_exclusive_an_expert_is(tmp_path):
    """Expert 0 gets the dark images, of class 0 alone; 1 gets both classes; 2 gets nothing."""
    image = pytest.importorskip("PIL.Image")
    images = torch.tensor([0, 100, 200, 40], dtype=torch.uint8).view(4, 1, 1).expand(4, 2, 2)
    expert = torch.tensor([[0, 1], [1, -1], [1, -1], [0, 1]], dtype=torch.int16)[:, None]
    gate = torch.tensor([[0.5, 0.5], [0.25, 0], [1, 0], [0.75, 0.25]], dtype=torch.float16)[:, None]
    counts = torch.tensor([[60, 30, 0], [0, 30, 0]])
    record = {"split": "eval", "step": 1, "layers": {HOSTILE: {"class_expert": counts.tolist()}}}
    layer = SampledLayer(HOSTILE, 3, expert, gate, torch.tensor([[0], [0], [1], [0]], dtype=torch.int32))
    layer.nearest, layer.cka = torch.tensor([1, 0, -1], dtype=torch.int16), torch.tensor([0.625, 0.625, torch.nan])
    text, cards = gallery(sampled(tmp_path, layer, [record], [0.5, 0.5, 0.0], images=images))
    bits = np.log2(1 / 0.75)  # p(0 | expert 0) = 1, p(0) = 90 / 120
    half = 0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25) - 1 / (2 * 60 * np.log(2))
    assert f"50.0 % of the load; {bits:.2f} bits about the class; nearest: 1 (CKA 0.625)" in cards[0]
    assert f"50.0 % of the load; {half:.2f} bits about the class" in cards[1]
    assert "classes: 0 (100.0 %)" in cards[0] and "classes: 0 (50.0 %), 1 (50.0 %)" in cards[1]
    assert "0.0 % of the load<" in cards[2] and "no image of the sample" in cards[2]
    assert "Expert 0 is the most exclusive of those with at least half an even share" in text
    assert "Experts 0 and 1 are the most alike" in text
    shots = re.findall(r'base64,([^"]+)"><span>([^<]*)<', cards[1])
    assert [told for _, told in shots] == ["mean", "1: 1.00", "0: 0.50", "0: 0.25", "0: 0.25"]
    pixels = [image.open(io.BytesIO(base64.b64decode(content))).getpixel((0, 0)) for content, _ in shots]
    assert pixels == [round((0.5 * 0 + 0.25 * 100 + 200 + 0.25 * 40) / 2), 200, 0, 100, 40]


def test_a_gallery_of_texts_shows_tokens_by_lift_and_the_places_with_the_largest_gates(tmp_path):
    """Expert 1 gets every b; a b is a third of the tokens, and expert 1 a third of the choices."""
    texts = [["a", "b\n", HOSTILE] * 8]
    expert = torch.tensor([0, 1, 0] * 8, dtype=torch.int16).view(1, 24, 1)
    gate = torch.linspace(0.25, 0.75, 24).half().view(1, 24, 1)
    _, cards = gallery(sampled(tmp_path, SampledLayer("moe", 2, expert, gate), texts=texts))
    assert re.findall(r'<span title="(lift[^"]*)">([^<]*)<', cards[1]) == [
        ("lift 3.0: 8 of 8 chose this expert", "b\u21b5")
    ]
    assert [told[1] for told in re.findall(r'title="(gate [^"]*)">[^<]*<mark>([^<]*)<', cards[1])] == ["b\u21b5"]
    assert "gate 0.73" in cards[1]  # of the last b
    first = re.findall(r'title="gate [^"]*">[^<]*<mark>([^<]*)<', cards[0])
    assert len(first) == 2 and first[1] == "a"  # of two different tokens, the larger gate first
    assert "bits about the token" in cards[0] and "% of the load" not in cards[0]


def test_a_gallery_without_a_sample_says_so(tmp_path):
    run = run_of(tmp_path / "run", record(moe={}))
    assert Gallery().moe_report(run) == ["gallery.html"]
    assert "--no-sample" in (run.folder / "gallery.html").read_text()


def test_a_gallery_of_a_task_that_shows_nothing_has_numbers(tmp_path):
    expert = torch.zeros(3, 2, 1, dtype=torch.int16)
    text, cards = gallery(sampled(tmp_path, SampledLayer("moe", 2, expert, torch.ones(3, 2, 1)), load=[1.0, 0.0]))
    assert "Task.show" in text and "100.0 % of the load" in cards[0] and len(cards) == 2


def test_a_large_gallery_stays_small_and_says_what_it_leaves_out(tmp_path):
    expert = torch.randint(256, (64, 32, 8), dtype=torch.int16)
    layers = [SampledLayer(f"layer {at}", 256, expert, torch.rand(64, 32, 8).half()) for at in range(6)]
    texts = [[f"token{(row * column) % 97}" for column in range(32)] for row in range(64)]
    run = sampled(tmp_path, layers[0])
    Sample(torch.arange(64), texts=texts, layers=layers).write(tmp_path / "sample.safetensors")
    Gallery().moe_report(run)
    text = (tmp_path / "gallery.html").read_text()
    assert "leaves out 2 of 6 layers" in text
    assert len(text.encode()) < 3_000_000
