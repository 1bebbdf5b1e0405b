"""A run and its folder."""

import json
import math
import tomllib

import attrs
import pytest
import safetensors.torch
import torch

from moe_engine import Engine, RunError, hookimpl
from moe_engine.runs import RunConfig, read_config, read_run
from moe_engine.training import Training, adam

SMALL = {"task": "blobs", "epochs": 2, "log_every": 20, "no_plugin": ("plots", "html")}
SETTINGS = {"blobs": {"images": 2000, "test_images": 400}}


def train(out, plugins=("saturation", "switch_aux"), settings=SETTINGS, **more):
    training = Training(RunConfig(plugins=plugins, **{**SMALL, **more}), settings, out)
    return training.run(), training


def test_the_same_seed_gives_the_same_bits(tmp_path):
    one, _ = train(tmp_path / "one")
    two, _ = train(tmp_path / "two")
    other, _ = train(tmp_path / "other", seed=1)
    assert one.records == two.records
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()
    assert one.records != other.records


def test_the_seed_fixes_what_plugins_draw_too(tmp_path, install):
    @attrs.define(eq=False)
    class Draws:
        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.probs.square().sum() * torch.rand(())

    install("loss", "draws", Draws)
    one, _ = train(tmp_path / "one", plugins=("draws",))
    torch.rand(1)  # whatever went before
    two, _ = train(tmp_path / "two", plugins=("draws",))
    assert one.records == two.records


def test_rerunning_config_toml_gives_the_same_run(tmp_path):
    one, _ = train(tmp_path / "one", capacity=1.5, lr=0.002)
    flags, settings = read_config(one.folder / "config.toml")
    config = RunConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
    two = Training(config, settings, tmp_path / "two").run()
    assert one.records == two.records
    assert (one.folder / "config.toml").read_text() == (two.folder / "config.toml").read_text()


def test_summary_holds_what_was_measured_on_the_test_set(tmp_path):
    run, training = train(tmp_path / "run")
    summary = json.loads((run.folder / "summary.json").read_text())
    last = [record for record in run.records if record["split"] == "eval"][-1]
    assert list(summary)[:11] == [
        *(
            "task",
            "plugins",
            "versions",
            "seed",
            "device",
            "steps",
            "seconds",
            "loss",
            "accuracy",
            "perplexity",
            "verdict",
        )
    ]
    assert [summary["loss"], summary["accuracy"]] == [last["loss"], last["accuracy"]]
    assert summary["perplexity"] is None
    (layer,) = summary["layers"]
    assert list(layer)[:11] == [
        *("name", "experts", "top_k", "active", "load", "cv", "gini", "entropy", "max_min", "maxvio", "dropped")
    ]
    assert sum(layer["load"]) == pytest.approx(1)
    assert layer["mutual_information"] == last["layers"]["moe"]["mutual_information"]
    assert layer["cv"] == last["layers"]["moe"]["cv"]
    assert summary["steps"] == training.step == 2 * math.ceil(2000 / 64)
    assert {"name": "saturation", "distribution": "moe-engine", "version": "0.1.0"} in summary["plugins"]


def test_the_weights_give_the_summarys_accuracy(tmp_path):
    run, training = train(tmp_path / "run")
    state = safetensors.torch.load_file(run.folder / "model.safetensors")
    fresh = Training(RunConfig(plugins=("saturation", "switch_aux"), seed=0, **SMALL), SETTINGS)
    fresh.model.load_state_dict(state)
    images, labels = fresh.task.test
    accuracy = (fresh.model.eval()(images).argmax(-1) == labels).float().mean()
    assert float(accuracy) == pytest.approx(run.summary["accuracy"])
    assert training.model is not fresh.model


def test_records_are_counted_per_window(tmp_path):
    run, _ = train(tmp_path / "run")
    steps = [record["step"] for record in run.records if record["split"] == "train"]
    assert steps == [20, 40, 60, 64]
    losses = [record["layers"]["moe"]["loss.switch_aux"] for record in run.records if record["split"] == "train"]
    assert all(0.9 < loss < 4 for loss in losses)


def test_undefined_is_null(tmp_path):
    run, _ = train(tmp_path / "run", plugins=("topk",), no_plugin=("plots", "html", "balance", "health"), epochs=1)
    (layer,) = run.summary["layers"]
    assert run.summary["verdict"] is None
    assert {layer[name] for name in ("cv", "load", "active", "max_min")} == {None}


def test_two_runs_of_one_process_do_not_meet(tmp_path):
    alone, _ = train(tmp_path / "alone")
    Training(RunConfig(plugins=("topk",), **SMALL), SETTINGS)
    again, _ = train(tmp_path / "again")
    assert alone.records == again.records


def test_a_loss_that_is_not_finite_names_step_and_term(tmp_path, install):
    @attrs.define(eq=False)
    class Explodes:
        steps: int = 0

        @hookimpl
        def moe_aux_loss(self, routing, layer):
            self.steps += layer.training
            return routing.probs.sum() * (torch.inf if self.steps == 10 else 0.0)  # one is the rehearsal's

    install("loss", "explodes", Explodes)
    with pytest.raises(
        RunError, match="^the loss term 'explodes' of layer 'moe' stopped being finite at step 9; lower"
    ):
        train(tmp_path / "run", plugins=("explodes",))


def test_a_task_loss_that_is_not_finite_names_its_step(tmp_path):
    with pytest.raises(RunError, match=r"^the task loss.* stopped being finite at step \d; lower"):
        train(tmp_path / "run", lr=1e30)


def test_adam_is_fused_where_it_can_be():
    assert adam(torch.nn.Linear(2, 2), 0.1).defaults["fused"] is True


def test_the_task_loss_comes_without_the_auxiliary_one(tmp_path):
    """A loss term of huge weight moves the router, not the reported loss's scale."""
    run, _ = train(tmp_path / "run", settings={**SETTINGS, "switch_aux": {"weight": 100.0}}, epochs=1)
    assert all(record["loss"] < 5 for record in run.records)


def test_read_run_gives_back_the_configuration(tmp_path):
    run, _ = train(tmp_path / "run", epochs=1)
    again = read_run(run.folder)
    assert again.config == tomllib.loads((run.folder / "config.toml").read_text())
    assert again.config["plugins"]["saturation"]["form"] == "log"
    assert [plugin["name"] for plugin in again.plugins] == list(
        Engine("saturation,switch_aux", without=["plots", "html"], task="blobs").plugins.active
    )


def test_a_trigger_that_lets_nothing_grow_is_named(tmp_path):
    run, _ = train(tmp_path / "run", ("schedule",), settings={**SETTINGS, "schedule": {"at": (10_000,)}}, epochs=1)
    whys = [one["why"] for one in run.summary["findings"]]
    assert "schedule let nothing grow in 32 steps" in whys
    run, _ = train(tmp_path / "other", ("schedule",), settings={**SETTINGS, "schedule": {"every": 9}}, epochs=1)
    assert not any("let nothing grow" in one["why"] for one in run.summary["findings"])


def test_where_every_token_takes_every_expert_no_term_is_blamed(tmp_path):
    run, _ = train(tmp_path / "run", experts=2, top_k=2, epochs=1)
    assert [one["metric"] for one in run.summary["findings"]] == ["verdict"]


def test_a_run_grows_live_from_2_to_16_experts_all_of_which_are_used(tmp_path):
    """The trigger's defaults, on generated images."""
    blobs = {"blobs": {"images": 20_000, "classes": 30}}
    plugins = ("saturation", "switch_aux", "loss_plateau")
    run, _ = train(tmp_path / "run", plugins, blobs, experts=2, epochs=8, log_every=50)
    (layer,) = run.summary["layers"]
    assert (layer["experts"], layer["active"]) == (16, 16)
    assert run.summary["accuracy"] >= 0.97
    growths = run.summary["growths"]
    assert [(one["before"], one["after"]) for one in growths] == [(size, size + 1) for size in range(2, 16)]
    assert growths == [record["growth"] for record in run.records if record["split"] == "growth"]
    assert all(one["change"] > 0 or one["loss_before"] == one["loss_after"] for one in growths)
    assert growths[0]["why"].startswith("loss_plateau: loss ")
    sizes = [len(record["layers"]["moe"]["load"]) for record in run.records if record["split"] == "train"]
    assert (sizes[0], sizes[-1], sorted(sizes)) == (2, 16, sizes)


def test_a_remark_on_the_mix_is_said_and_kept_in_the_summary(tmp_path):
    said = []
    config = RunConfig(plugins=("sigmoid_topk", "loss_free", "switch_aux"), no_plugin=("plots", "html"), epochs=1)
    run = Training(config, {}, tmp_path / "run", say=said.append).run()
    assert any(remark.startswith("loss_free: switch_aux pulls at the gradients") for remark in said)
    assert [one["name"] for one in run.summary["findings"] if one["metric"] == "remark.loss_free"] == ["two remedies"]
