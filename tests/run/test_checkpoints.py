"""Saving and loading any state, atomically and with a checksum; resuming a run as if it had never stopped."""

import json
import os
import signal
import time

import attrs
import pytest
import torch
from torch import nn

from moe_engine import Engine, Growth, UsageError, adam, hookimpl, load, save
from moe_engine.cli import main
from moe_engine.registry import discovery
from moe_engine.run.checkpoints import Checkpoints
from moe_engine.run.config import RunConfig
from moe_engine.run.folder import old_folder
from moe_engine.run.training import Stopped, Training
from moe_engine.run.trees import read_tree, write_tree
from support import ends, refused
from warm import MOE_ENGINE

# -- trees and files -----------------------------------------------------------------------------------

TREE = {
    "plain": [1, 2.5, None, True, "text", float("inf")],
    "numbers": {0: {"exp_avg": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}, 1: {}},
    "tuple": (1, (2, torch.tensor([True, False]))),
    "types": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float64, torch.uint8, torch.int64)],
    "empty": torch.empty(0, 4),
    "a.b": torch.zeros(1),
    "a": {"b": torch.ones(1)},
    "$": "a key of ours",
}


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def test_a_tree_comes_back_as_it_was(tmp_path):
    write_tree(tmp_path / "x", TREE)
    assert equal(read_tree(tmp_path / "x"), TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_can_not_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="a.0.f is a function"):
        write_tree(tmp_path / "x", {"a": [{"f": equal}]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", range(0, 100, 9))
def test_a_damaged_file_is_refused(tmp_path, where):
    """Any byte of it; also half of it, and nothing of it."""
    write_tree(tmp_path / "x", {"w": torch.randn(40), "steps": [1, 2, 3]})
    content = (tmp_path / "x").read_bytes()
    at = where * len(content) // 100
    (tmp_path / "x").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with refused("damaged-file", tmp_path / "x"):
        read_tree(tmp_path / "x")
    (tmp_path / "x").write_bytes(content[:at])
    with refused("damaged-file", tmp_path / "x"):
        read_tree(tmp_path / "x")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    with refused("missing-file", "checkpoint", tmp_path / "x"):
        read_tree(tmp_path / "x")
    save_file({"w": torch.zeros(2)}, tmp_path / "x")
    with refused("foreign-file", "checkpoint", tmp_path / "x"):
        read_tree(tmp_path / "x")
    with refused("unwritable-path", tmp_path / "nowhere" / "x"):
        save(tmp_path / "nowhere" / "x", engine=Engine("topk"))


def test_the_last_two_and_the_best_are_kept(tmp_path):
    kept = Checkpoints(tmp_path / "c")
    for step in range(5):
        kept.write(step, {"step": step})
    kept.write_best({"step": 1})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        *("best.safetensors", "step-00000003.safetensors", "step-00000004.safetensors")
    ]
    assert read_tree(tmp_path / "c" / "best.safetensors") == {"step": 1}
    said = []
    assert kept.newest(said.append) == {"step": 4}
    (tmp_path / "c" / "step-00000004.safetensors").write_bytes(b"half")
    assert kept.newest(said.append) == {"step": 3}
    assert len(said) == 1
    assert "step-00000004.safetensors is damaged" in said[0]


# -- objects -------------------------------------------------------------------------------------------


def build(experts=3):
    torch.manual_seed(0)
    engine = Engine("saturation,loss_free,switch_aux,loss_plateau,clone", experts=experts, top_k=2)
    model = nn.Sequential(nn.Linear(3, 6), engine.moe(6, 5, name="moe"), nn.Linear(6, 1))
    optimizer = adam(model, 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    return {"engine": engine, "model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def steps(rig, seed, count=4):
    random, losses = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        x = torch.randn(16, 3, generator=random)
        loss = (rig["model"](x) - x.sum(1, keepdim=True)).square().mean()
        rig["scaler"].scale(loss + rig["engine"].aux_loss()).backward()
        rig["engine"].after_backward()
        rig["scaler"].step(rig["optimizer"])
        rig["scaler"].update()
        rig["engine"].after_step()
        rig["optimizer"].zero_grad()
        rig["schedule"].step()
        rig["engine"].due(loss)
        losses.append(float(loss.detach()))
    return losses


def test_save_and_load_go_on_as_if_nothing_had_been(tmp_path):
    rig = build()
    steps(rig, 0)
    rig["engine"].grow(Growth("moe", (1,)), rig["optimizer"])
    steps(rig, 1)
    save(tmp_path / "state", **rig)
    more = steps(rig, 2)
    other = build()
    load(tmp_path / "state", **other)
    assert steps(other, 2) == more
    assert equal(other["engine"].state_dict(), rig["engine"].state_dict())
    assert other["engine"].step == 12
    assert [one.after for one in other["engine"].growths] == [4]
    assert other["engine"].triggers.memory["loss_plateau"]["steps"] > 0
    assert equal(other["optimizer"].state_dict(), rig["optimizer"].state_dict())


def test_numbers_come_back_in_the_order_in_memory_that_they_had(tmp_path):
    """Fused Adam reads a weight and its moments in memory order, ignoring their strides."""

    def convolution():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.arange(75.0).view(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = convolution()
    step(model, optimizer)
    save(tmp_path / "state.safetensors", model=model, optimizer=optimizer)
    twin, its_optimizer = convolution()
    load(tmp_path / "state.safetensors", model=twin, optimizer=its_optimizer)
    for one in ((model, optimizer), (twin, its_optimizer)):
        step(*one)
    assert torch.equal(model.weight, twin.weight)


def test_loading_is_refused_before_anything_changes(tmp_path):
    rig, other = build(), build()
    steps(rig, 0)
    rig["engine"].grow(Growth("moe", (1,)), rig["optimizer"])
    save(tmp_path / "state", model=rig["model"], optimizer=rig["optimizer"])
    with refused("missing-state", "state holds model and optimizer", "engine"):
        load(tmp_path / "state", model=other["model"], engine=other["engine"])
    assert other["model"][1].spec.experts == 3
    with refused("state-mismatch", "'optimizer'", "'exp_avg'", "[4, 6]", "load its model with it"):
        load(tmp_path / "state", optimizer=other["optimizer"])
    with refused("state-mismatch", "'optimizer'", "number of parameters"):
        load(tmp_path / "state", optimizer=torch.optim.Adam(other["model"][0].parameters()))
    save(tmp_path / "mixed", optimizer=rig["model"], engine=rig["optimizer"])
    for name, kind in (("optimizer", "optimizer"), ("engine", "Engine")):
        with refused("foreign-state", f"'{name}'", kind):
            load(tmp_path / "mixed", **{name: other[name]})
    save(tmp_path / "engine", engine=Engine("topk"))
    with pytest.raises(UsageError, match="moe"):
        load(tmp_path / "engine", engine=other["engine"])


# -- runs ------------------------------------------------------------------------------------------------

RUN = {
    "task": "blobs",
    "plugins": ("saturation", "switch_aux", "schedule", "split", "noise"),
    "experts": 2,
    "epochs": 3,
    "log_every": 7,
    "checkpoint_every": 10,
    "no_plugin": ("plots", "html"),
}
SETTINGS = {"blobs": {"images": 700, "test_images": 200}, "schedule": {"every": 6, "max_experts": 5}}


@pytest.fixture(autouse=True)
def noise(install):
    """A loss that draws from the process's random state: resuming must bring that back too."""

    @attrs.define(eq=False)
    class Noise:
        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.probs.square().mean() * torch.rand(()).item()

    install("loss", "noise", Noise)


def whole(folder, **more):
    Training(RunConfig(**{**RUN, **more}), SETTINGS, folder).run()
    return folder


@pytest.fixture(scope="module")
def straight():
    """The end of the run that is never stopped, once a test has needed it."""
    return {}


@pytest.fixture
def expected(straight, tmp_path):
    """What a run must end as that was stopped: made inside a test, where `noise` is installed."""
    if not straight:
        straight["ends"] = ends(whole(tmp_path / "whole"))
    return straight["ends"]


def go_on(folder):
    """Resume with stops again and again until it is finished."""
    said = []
    Training(*old_folder(folder), folder, resumed=True, say=said.append).run()
    if said and said[-1].startswith("continuing from step "):
        assert said.pop().endswith((" of 33", " of 29"))
    return said


def stopped(folder, at, resumed=False, **more):
    config, settings = old_folder(folder) if resumed else (RunConfig(**{**RUN, **more}), SETTINGS)
    training = Training(config, settings, folder, resumed)
    after_step = training.engine.after_step

    def after(skipped=False):
        after_step(skipped)
        training.stop = training.engine.step >= at

    training.engine.after_step = after
    with pytest.raises(Stopped):
        training.run()
    return training


@pytest.mark.parametrize("at", [1, 6, 10, 11, 22, 30, 33])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, expected, at):
    """Inside a window, at a log point, at a growth, at the end of an epoch, in the last step."""
    stopped(tmp_path / "cut", at)
    assert go_on(tmp_path / "cut") == []
    assert ends(tmp_path / "cut") == expected


@pytest.mark.parametrize("at", [7, 8, 16, 28])
def test_a_run_with_its_own_steps_and_evaluations_goes_on_bit_for_bit(tmp_path, at):
    more = {"eval_every": 8, "steps": 29, "lr_schedule": "cosine", "weight_decay": 0.01}
    stopped(tmp_path / "cut", at, **more)
    assert go_on(tmp_path / "cut") == []
    assert ends(whole(tmp_path / "straight", **more)) == ends(tmp_path / "cut")


def test_stops_one_after_another_lose_nothing(tmp_path, expected):
    """Also between two log points, where nothing is written to metrics.jsonl in between."""
    stopped(tmp_path / "cut", 23)
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(b"half a record of a killed")
    for at in (24, 25, 26):
        stopped(tmp_path / "cut", at, resumed=True)
    assert go_on(tmp_path / "cut") == []
    assert ends(tmp_path / "cut") == expected


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, expected):
    stopped(tmp_path / "cut", 4)
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        path.unlink()
    assert go_on(tmp_path / "cut") == ["there is no checkpoint to continue from; starting over"]
    assert ends(tmp_path / "cut") == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, expected):
    stopped(tmp_path / "cut", 25)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000025.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    (said,) = go_on(tmp_path / "cut")
    assert said.startswith(f"{newest} is damaged")
    assert said.endswith("trying the one before")
    assert newest.with_suffix(".damaged").exists()
    assert ends(tmp_path / "cut") == expected


def test_a_finished_run_makes_its_end_again(tmp_path):
    before = ends(whole(tmp_path / "whole"))
    (tmp_path / "whole" / "summary.json").unlink()
    assert go_on(tmp_path / "whole") == []
    assert ends(tmp_path / "whole") == before


@pytest.mark.parametrize("change", [lambda _: b"{}\n", lambda old: old.replace(b"1", b"2", 1), lambda old: b"\n" + old])
def test_records_that_are_lost_or_changed_are_an_error(tmp_path, change):
    stopped(tmp_path / "cut", 25)
    records = tmp_path / "cut" / "metrics.jsonl"
    records.write_bytes(change(records.read_bytes()))
    with refused("damaged-run", "metrics.jsonl"):
        go_on(tmp_path / "cut")


def test_an_edited_configuration_is_refused(tmp_path):
    stopped(tmp_path / "cut", 25)
    config = tmp_path / "cut" / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.001", "lr = 0.1"))
    with refused("config-changed", "config.toml"):
        go_on(tmp_path / "cut")


def test_two_damaged_checkpoints_do_not_push_out_good_ones(tmp_path, expected):
    stopped(tmp_path / "cut", 25)
    for path in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        path.write_bytes(b"half")
    said = go_on(tmp_path / "cut")
    assert (len(said), said[-1]) == (3, "there is no checkpoint to continue from; starting over")
    assert ends(tmp_path / "cut") == expected
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert [name for name in names if name.endswith("safetensors")] == [
        *("step-00000030.safetensors", "step-00000033.safetensors")
    ]


def test_a_source_without_a_trigger_is_refused(capsys):
    assert main(["run", "--plugins", "clone"]) == 2
    assert "initializer 'clone' has no effect: no plugin makes the layers grow" in capsys.readouterr().err


def test_other_versions_are_said(tmp_path, monkeypatch):
    stopped(tmp_path / "cut", 25)
    monkeypatch.setattr("moe_engine.run.state.versions", lambda: {"torch": "0"})
    (said,) = go_on(tmp_path / "cut")
    assert said.startswith("since the run began torch ") and said.endswith("so its metrics may differ from here on")


def test_code_that_was_edited_since_is_said(tmp_path, monkeypatch):
    """An editable plugin keeps its version while it is worked on."""
    stopped(tmp_path / "cut", 25)
    monkeypatch.setattr("moe_engine.registry.manager.Plugins.fingerprints", lambda self: {"saturation": "edited"})
    (said,) = go_on(tmp_path / "cut")
    assert "the code of plugin 'saturation' changed" in said


def test_a_run_goes_on_without_a_metric_or_a_report(tmp_path, capsys, install):
    class Fails:
        @hookimpl
        def moe_metrics(self, stats):
            if stats.tokens > 0 and broken:
                raise LookupError("boom")
            return {}

    broken = []
    install("metric", "fails", attrs.define(eq=False)(Fails))
    stopped(tmp_path / "cut", 11, plugins=(*RUN["plugins"], "fails"))
    broken.append(True)
    assert main(["resume", str(tmp_path / "cut"), "--quiet"]) == 1
    assert main(["resume", str(tmp_path / "cut"), "--quiet", "--no-plugin", "fails"]) == 0
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["loss"] > 0
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "cut"), "--no-plugin", "switch_aux"]) == 2
    assert "'switch_aux' is a loss, without which the run would be another one" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "cut"), "--no-plugin", "fial"]) == 2
    assert "there is no plugin 'fial' to leave out" in capsys.readouterr().err


def test_a_plugin_that_was_uninstalled_is_named_with_what_to_install(tmp_path, capsys, install):
    @attrs.define(eq=False)
    class Gone:
        @hookimpl
        def moe_metrics(self, stats):
            return {}

    install("metric", "gone", Gone)
    stopped(tmp_path / "cut", 11, plugins=(*RUN["plugins"], "gone"))
    with discovery.pretend({name: found for name, found in discovery.find().items() if name != "gone"}):
        for words in (["resume", str(tmp_path / "cut")], ["run", "--config", str(tmp_path / "cut" / "config.toml")]):
            assert main(words) == 2
            err = capsys.readouterr().err
            assert "plugin 'gone' of elsewhere 1.0, which is not installed: pip install elsewhere==1.0" in err
        assert main(["resume", str(tmp_path / "cut"), "--no-plugin", "gone", "--quiet"]) == 0


def test_two_processes_can_not_write_one_run(tmp_path):
    stopped(tmp_path / "cut", 4)
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with refused("folder-in-use", tmp_path / "cut"):
            go_on(tmp_path / "cut")


def test_checkpoints_change_no_number(tmp_path):
    often = whole(tmp_path / "often", checkpoint_every=1)
    assert ends(often) == ends(whole(tmp_path / "never", checkpoint_every=10_000))


# -- the command line ----------------------------------------------------------------------------------

QUICK = ["--task", "blobs", "--set", "blobs.images=2000", "--epochs", "4", "--experts", "2", "--checkpoint-every", "9"]
QUICK += [
    "--plugins",
    "saturation,switch_aux,schedule",
    "--set",
    "schedule.every=11",
    "--no-plugin",
    "plots,html",
    "--quiet",
]


def test_resume_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for argv, sentence in (
        (["resume", "nowhere"], "there is no run folder nowhere"),
        (
            ["resume", "empty"],
            "empty holds no config.toml, so no run was begun in it; begin one with: moe-engine run --out empty",
        ),
    ):
        assert main(argv) == 2
        assert capsys.readouterr().err == f"moe-engine: {sentence}\n"


def _written(folder):
    """When the run wrote its records last."""
    file = folder / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else 0


def kill_at(commands, folder, delay, number):
    """Run in another process, which is killed after a while; returns whether it was still running."""
    words = ["resume", folder] if (folder / "config.toml").exists() else ["run", *QUICK, "--out", folder]
    began = _written(folder)
    with open(folder.with_suffix(".err"), "w") as stderr:
        process = commands.start([*MOE_ENGINE, *words], stderr=stderr)
        while not process.ended() and _written(folder) == began:
            time.sleep(0.005)
        time.sleep(delay)
        process.kill(number)
        code = process.wait()
    assert _written(folder) > began
    assert "Traceback" not in folder.with_suffix(".err").read_text()
    return code != 0


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, commands):
    assert main(["run", *QUICK, "--out", str(tmp_path / "whole")]) == 0
    folder, killed = tmp_path / "cut", 0
    for number, delay in ((signal.SIGKILL, 0.2), (signal.SIGTERM, 0.15)):
        killed += kill_at(commands, folder, delay, number)
    assert killed
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert ends(folder) == ends(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_thirty_kills_at_random_moments_have_thirty_equal_ends(tmp_path, commands):
    """Each of 30 runs on the digits is killed once, at any moment, also inside saving and inside growth."""
    import random

    digits = ["run", "--plugins", "saturation,switch_aux,schedule", "--experts", "2", "--set", "schedule.every=30"]
    digits += ["--checkpoint-every", "5", "--quiet", "--no-plugin", "plots,html", "--out"]
    assert main([*digits, str(tmp_path / "whole")]) == 0
    expected, draws, killed = ends(tmp_path / "whole"), random.Random(0), []
    for number in range(30):
        folder = tmp_path / f"cut{number}"
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        process = commands.start([*MOE_ENGINE, *digits, folder])
        while not process.ended() and not (folder / "metrics.jsonl").exists():
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 2.5))
        process.kill(how)
        killed.append(process.wait())
        assert main(["resume", str(folder), "--quiet"]) == 0
        assert ends(folder) == expected, (number, how)
    print(f"return codes of the killed: {killed}")
    assert sum(code != 0 for code in killed) >= 20
