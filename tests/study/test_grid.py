"""Variants times seeds: what runs, what is not run again, and that a failed cell leaves the others alone."""

import subprocess
import sys

import attrs
import pytest
import safetensors.torch
import torch

from moe_engine import UsageError, hookimpl
from moe_engine.run.training import Training
from moe_engine.study.grid import StudyVariant, cells_of, run_grid, weights_of
from support import refused

SETTINGS = {"blobs": {"images": "200", "test_images": "50"}}
FLAGS = {"task": "blobs", "epochs": 1, "device": "cpu"}


def variant(*plugins, name=None, settings=None, **flags):
    return StudyVariant(name or "+".join(plugins), plugins, {**SETTINGS, **(settings or {})}, {**FLAGS, **flags})


@pytest.fixture
def ran(monkeypatch):
    """The (plugins, seed) of every run that begins in this process."""
    begun, run = [], Training.run

    def noted(training):
        begun.append((training.config.plugins, training.config.seed))
        return run(training)

    monkeypatch.setattr(Training, "run", noted)
    return begun


def files(out):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "cells").iterdir()}


def test_every_variant_is_run_with_every_seed(tmp_path, ran):
    records = run_grid([variant("topk"), variant("sigmoid_topk")], [0, 1], tmp_path / "out")
    expected = [(("topk",), 0), (("sigmoid_topk",), 0), (("topk",), 1), (("sigmoid_topk",), 1)]
    assert expected == ran
    assert [(plugins[0], seed) for plugins, seed in expected] == [
        (record["variant"], record["seed"]) for record in records
    ]


def test_a_cell_has_the_numbers_of_the_run_of_its_configuration(tmp_path):
    (record,) = run_grid([variant("topk", capacity=1.0)], [3], tmp_path / "out")
    config = variant("topk", capacity=1.0).config(3)
    run = Training(config, SETTINGS, tmp_path / "alone").run()
    assert run.summary["loss"] == record["summary"]["loss"]
    assert run.summary["layers"] == record["summary"]["layers"]
    last = [record for record in run.records if record["split"] == "train"][-1]["layers"]["moe"]["dropped"]
    assert {"moe": last} == record["dropped"]
    assert last > 0
    # dim = hidden = 64: the router 2*8*64, two experts of 2*64*64 + 2*64*64 each
    assert record["flops"] == {"active": 1024 + 2 * 16384, "total": 1024 + 8 * 16384}
    assert record["step_seconds"] > 0


def test_weights_are_kept_if_any_variant_of_a_shared_run_asks_for_them(tmp_path, ran):
    variants = [variant("topk", name="kept"), variant("topk", name="other")]
    variants = [attrs.evolve(each, keep=each.name == "kept") for each in variants]
    for _ in range(2):
        kept, other = run_grid(variants, [0], tmp_path / "out")
        assert kept["key"] == other["key"]
    assert ran == [(("topk",), 0)]
    model = Training(variants[0].config(0), SETTINGS).model
    model.load_state_dict(safetensors.torch.load_file(weights_of(tmp_path / "out", kept["key"])))


def test_a_finished_cell_is_not_run_again(tmp_path, ran):
    out, variants = tmp_path / "out", [variant("topk"), variant("sigmoid_topk")]
    first = run_grid(variants, [0, 1], out)
    before = files(out)
    ran.clear()
    assert first == run_grid(variants, [0, 1], out)
    assert not ran
    assert before == files(out)


def test_only_missing_cells_are_run(tmp_path, ran):
    out = tmp_path / "out"
    run_grid([variant("topk")], [0], out)
    ran.clear()
    run_grid([variant("topk"), variant("sigmoid_topk")], [0, 1], out)
    assert ran == [(("sigmoid_topk",), 0), (("topk",), 1), (("sigmoid_topk",), 1)]


@pytest.mark.parametrize(
    "damage", [lambda _: '{"status": "fini', lambda text: text.replace('"seconds": ', '"seconds": 1', 1)]
)
def test_a_damaged_cell_is_run_again(tmp_path, ran, damage):
    out = tmp_path / "out"
    (record,) = run_grid([variant("topk")], [0], out)
    cell = out / "cells" / f"{record['key']}.json"
    before = cell.read_text()
    cell.write_text(damage(before))
    assert cell.read_text() != before
    ran.clear()
    assert record["summary"]["loss"] == run_grid([variant("topk")], [0], out)[0]["summary"]["loss"]
    assert ran == [(("topk",), 0)]


@pytest.mark.parametrize(
    "other", [{"experts": 4}, {"epochs": 2}, {"settings": {"topk": {"renorm": "false"}}}, {"no_plugin": ("health",)}]
)
def test_another_flag_or_setting_is_another_cell(other):
    keys = [cells_of(each, [0])[0].key for each in (variant("topk"), variant("topk", **other))]
    assert keys[0] != keys[1]


def test_the_name_of_a_variant_does_not_change_its_cells():
    keys = {cells_of(each, [0])[0].key for each in (variant("topk"), variant("topk", name="another"))}
    assert len(keys) == 1


def test_a_plugin_whose_file_was_changed_is_run_again(tmp_path, monkeypatch, install):
    """An editable plugin keeps its version while it is worked on."""

    @attrs.define(eq=False)
    class Idle:
        @hookimpl
        def moe_metrics(self, stats):
            return {"idle": 1.0}

    install("metric", "idle", Idle)
    file = tmp_path / "elsewhere.py"
    spec = type("Spec", (), {"origin": str(file)})
    monkeypatch.setattr("moe_engine.study.grid.util.find_spec", lambda module: spec)
    keys = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        keys.append(cells_of(variant("topk", "idle"), [0])[0].key)
    assert keys[0] == keys[2] != keys[1]


def odd(how):
    """A loss plugin that goes wrong in training."""

    @attrs.define(eq=False)
    class Odd:
        @hookimpl
        def moe_aux_loss(self, routing, layer):
            if layer.training and routing.tokens.x.shape[0] > 4:  # four tokens are the rehearsal of a new layer
                if how == "raise":
                    raise ValueError("I am odd")
                return routing.probs.sum() * float("nan")
            return routing.probs.sum()

    return Odd


def test_a_plugin_that_raises_fails_its_cell_alone(tmp_path, install):
    install("loss", "odd", odd("raise"))
    bad, good = run_grid([variant("odd"), variant("topk")], [0], tmp_path / "out")
    expected = "loss 'odd' (elsewhere 1.0) in moe_aux_loss failed at step 0: ValueError: I am odd"
    assert ("failed", expected) == (bad["status"], bad["reason"])
    assert "ValueError: I am odd" in bad["traceback"]
    assert good["status"] == "finished"


def test_a_loss_that_is_not_finite_fails_its_cell_alone(tmp_path, install):
    install("loss", "odd", odd("nan"))
    bad, good = run_grid([variant("odd"), variant("topk")], [0], tmp_path / "out")
    assert (bad["status"], good["status"]) == ("failed", "finished")
    assert "stopped being finite at step 1" in bad["reason"]


def test_a_refused_cell_says_why_and_is_tried_again(tmp_path, ran):
    variants, out = [variant("topk", settings={"topk": {"groups": "3"}}), variant("topk")], tmp_path / "out"
    bad, good = run_grid(variants, [0], out)
    assert (bad["status"], bad["reason"]) == ("refused", "groups=3 does not divide 8 experts")
    assert good["status"] == "finished"
    shown = []
    run_grid(
        variants, [0], out, 1, lambda done, total, record: shown.append((done, total, record and record["status"]))
    )
    assert shown == [(1, 2, None), (2, 2, "refused")]
    assert len(ran) == 1


def test_the_folders_of_runs_are_deleted(tmp_path):
    run_grid([variant("topk")], [0], tmp_path / "out")
    assert {".lock", "cells"} == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.long
def test_processes_give_the_numbers_of_one(tmp_path):
    variants = [variant("topk"), variant("sigmoid_topk")]
    one, two = (run_grid(variants, [0], tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert [record["summary"]["loss"] for record in one] == [record["summary"]["loss"] for record in two]
    assert [record["key"] for record in one] == [record["key"] for record in two]


def test_a_cell_leaves_the_processs_threads_alone(tmp_path):
    torch.set_num_threads(2)
    run_grid([variant("topk")], [0], tmp_path / "out")
    assert torch.get_num_threads() == 2


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with refused("foreign-folder", tmp_path, "--out"):
        run_grid([variant("topk")], [0], tmp_path)


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    out = tmp_path / "out"
    run_grid([variant("topk")], [0], out)
    code = (
        f"import fcntl, sys; f = open({str(out / '.lock')!r}); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UsageError, match="another process is writing"):
            run_grid([variant("topk")], [0], out)
        other.stdin.close()
