"""A run and its folder."""

import json
import math
import tomllib

import attrs
import pytest
import safetensors.torch
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassRecall

from moe_engine import Engine, RunError, Task, UsageError, hookimpl, option
from moe_engine.layer import fused_cpu
from moe_engine.run.config import RunConfig, merge_options, read_config
from moe_engine.run.folder import read_run
from moe_engine.run.training import Training, adam, learning_rate
from support import refused

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
    two = Training(merge_options(flags, {}), settings, tmp_path / "two").run()
    assert one.records == two.records
    assert (one.folder / "config.toml").read_text() == (two.folder / "config.toml").read_text()


@pytest.mark.parametrize(("measured", "products"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_a_run_in_bf16_writes_down_what_it_multiplies_in(tmp_path, monkeypatch, measured, products):
    monkeypatch.setitem(fused_cpu.MATMUL_DTYPES, torch.bfloat16, measured)
    half, training = train(tmp_path / "half", precision="bf16", steps=40)
    wide, _ = train(tmp_path / "wide", steps=40)
    assert tomllib.loads((half.folder / "config.toml").read_text())["run"]["bf16_matmul"] == products
    assert half.records != wide.records
    assert half.summary["loss"] == pytest.approx(wide.summary["loss"], rel=0.2)
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    monkeypatch.setitem(
        fused_cpu.MATMUL_DTYPES, torch.bfloat16, torch.float64
    )  # what is written goes before what is measured
    flags, settings = read_config(half.folder / "config.toml")
    again = Training(merge_options(flags, {}), settings, tmp_path / "again").run()
    assert again.records == half.records


def test_a_run_ends_at_its_step_in_the_middle_of_an_epoch(tmp_path):
    run, _ = train(tmp_path / "run", steps=40, log_every=5)  # an epoch has 32
    long, _ = train(tmp_path / "long", log_every=5)
    assert run.summary["steps"] == 40
    assert [(record["step"], record["epoch"]) for record in run.records if record["split"] == "eval"] == [
        (32, 1),
        (40, 2),
    ]
    before = [record for record in run.records if record["split"] == "train"]
    assert before == [record for record in long.records if record["split"] == "train"][: len(before)]


def test_evaluations_come_every_so_many_steps_and_change_nothing(tmp_path):
    often, _ = train(tmp_path / "often", eval_every=10, steps=50)
    rarely, _ = train(tmp_path / "rarely", steps=50)
    assert [record["step"] for record in often.records if record["split"] == "eval"] == [10, 20, 30, 40, 50]
    assert often.summary["loss"] == rarely.summary["loss"]
    assert often.summary["layers"] == rarely.summary["layers"]


def test_the_learning_rate_falls_as_a_cosine(tmp_path):
    """Of 64 steps: lr at the first, half of it in the middle, next to nothing at the last."""
    _, training = train(tmp_path / "run", lr=0.002, lr_schedule="cosine")
    assert training.total_steps == 64
    for step, factor in ((0, 1.0), (32, 0.5), (63, (1 - math.cos(math.pi / 64)) / 2)):
        assert learning_rate(training.config, step, training.total_steps) == pytest.approx(0.002 * factor, rel=1e-9)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.002 * (1 - math.cos(math.pi / 64)) / 2)


def test_weight_decay_shrinks_every_weight_by_its_share(tmp_path):
    """Without a gradient a step of AdamW only multiplies by 1 - lr decay (Loshchilov and Hutter, 2019)."""
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    adam(model, 0.1, 0.5).step()
    torch.testing.assert_close(model.weight.detach(), before * 0.95)


SHOWN = []


@attrs.define(eq=False)
class Stream:
    """Rows whose numbers tell which they are, shown as they stand."""

    shift: float = option(0.0, help="added to every batch for training, times a random draw")

    @hookimpl
    def moe_task(self, spec):
        rows = torch.arange(20.0).view(-1, 1).expand(-1, 4) / 20
        return Task(
            (rows,),
            (rows[:6] + 0.01,),
            lambda engine: engine.moe(4, 4),
            score,
            ordered=True,
            augment=lambda batch: (batch[0] + self.shift * torch.rand(()),),
            measures=lambda: MetricCollection({"recall": MulticlassRecall(2)}),
        )


def score(model, batch):
    (x,) = batch
    if model.training:
        SHOWN.append(x[:, 0] * 20)
    late = x[:, 0] > 0.1
    parts = {"late": x[late].sum() / 4, "count.late": late.sum()}
    judged = {} if model.training else {"predicted": torch.zeros(len(x)), "true": late.long()}
    return {"loss": (model(x) - x).square().mean(), **parts, **judged}


def test_a_stream_is_shown_as_it_stands_and_judged_by_its_measures(tmp_path, install):
    install("task", "stream", Stream)
    SHOWN.clear()
    run, _ = train(tmp_path / "run", plugins=(), settings={}, task="stream", batch_size=6)
    assert [*range(20), *range(20)] == torch.cat(SHOWN).round().int().tolist()
    # of the test rows .01 .06 .11 .16 .21 .26 four are late; all six are taken for early
    assert run.summary["measures"] == {"late": pytest.approx(0.185), "recall": 0.5}


def test_a_batch_is_augmented_by_the_runs_own_draws(tmp_path, install):
    install("task", "stream", Stream)
    seen = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        SHOWN.clear()
        torch.rand(len(seen))  # whatever went before
        train(tmp_path / name, plugins=(), settings={"stream": {"shift": 1.0}}, task="stream", seed=seed)
        seen.append(torch.cat(SHOWN).tolist())
    assert seen[0] == seen[1] != seen[2]
    assert len({round(value) for value in seen[0]}) > 20


def test_summary_holds_what_was_measured_on_the_test_set(tmp_path):
    run, training = train(tmp_path / "run")
    summary = json.loads((run.folder / "summary.json").read_text())
    last = [record for record in run.records if record["split"] == "eval"][-1]
    assert list(summary)[:13] == [
        *(
            "task",
            "plugins",
            "versions",
            "seed",
            "device",
            "steps",
            "seconds",
            "speed",
            "loss",
            "accuracy",
            "perplexity",
            "measures",
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
    (saturation,) = (plugin for plugin in summary["plugins"] if plugin["name"] == "saturation")
    assert saturation.pop("about").startswith("Offer more tokens to experts with little gradient.\n")
    assert saturation == {"name": "saturation", "kind": "bias", "distribution": "moe-engine", "version": "0.1.0"}


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
    with refused("not-finite", "the loss term 'explodes' of layer 'moe'", "step 9", kind=RunError):
        train(tmp_path / "run", plugins=("explodes",))


def test_a_task_loss_that_is_not_finite_names_its_step(tmp_path):
    with pytest.raises(RunError, match=r"^the task loss.* stopped being finite at step \d; lower --lr, or a loss's"):
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
    assert again.config["plugins"]["saturation"]["signal"] == "mass"
    assert [plugin["name"] for plugin in again.plugins] == list(
        Engine("saturation,switch_aux", without=["plots", "html"], task="blobs").plugins.active
    )


def test_a_trigger_that_lets_nothing_grow_is_named(tmp_path):
    run, _ = train(tmp_path / "run", ("schedule",), settings={**SETTINGS, "schedule": {"at": (10_000,)}}, epochs=1)
    whys = [one["why"] for one in run.summary["findings"]]
    assert "schedule triggered no growth in 32 steps" in whys
    run, _ = train(tmp_path / "other", ("schedule",), settings={**SETTINGS, "schedule": {"every": 9}}, epochs=1)
    assert not any("triggered no growth" in one["why"] for one in run.summary["findings"])


def test_where_every_token_takes_every_expert_no_term_is_blamed(tmp_path):
    run, _ = train(tmp_path / "run", experts=2, top_k=2, epochs=1)
    assert [one["metric"] for one in run.summary["findings"]] == ["verdict"]


@pytest.mark.parametrize(
    ("most", "classes", "images", "epochs", "trigger"),
    [
        (5, 10, 4000, 5, {"cooldown": 10, "patience": 2, "epsilon": 0.1, "max_experts": 5}),
        pytest.param(16, 30, 20_000, 8, {}, marks=pytest.mark.long),  # the trigger's defaults
    ],
)
def test_a_run_grows_live_from_2_experts_to_the_most_all_of_which_are_used(
    tmp_path, most, classes, images, epochs, trigger
):
    """On generated images."""
    settings = {"blobs": {"images": images, "classes": classes}, "loss_plateau": trigger}
    plugins = ("saturation", "switch_aux", "loss_plateau")
    run, _ = train(tmp_path / "run", plugins, settings, experts=2, epochs=epochs, log_every=50)
    (layer,) = run.summary["layers"]
    assert (layer["experts"], layer["active"]) == (most, most)
    assert run.summary["accuracy"] >= 0.97
    growths = run.summary["growths"]
    assert [(one["before"], one["after"]) for one in growths] == [(size, size + 1) for size in range(2, most)]
    assert growths == [record["growth"] for record in run.records if record["split"] == "growth"]
    assert all(one["change"] > 0 or one["loss_before"] == one["loss_after"] for one in growths)
    assert growths[0]["why"].startswith("loss_plateau: loss ")
    sizes = [len(record["layers"]["moe"]["load"]) for record in run.records if record["split"] == "train"]
    assert (sizes[0], sizes[-1], sorted(sizes)) == (2, most, sizes)


def test_a_remark_on_the_mix_is_said_and_kept_in_the_summary(tmp_path):
    said = []
    config = RunConfig(plugins=("sigmoid_topk", "loss_free", "switch_aux"), no_plugin=("plots", "html"), epochs=1)
    run = Training(config, {}, tmp_path / "run", say=said.append).run()
    assert any(remark.startswith("loss_free: switch_aux adds a balancing gradient") for remark in said)
    assert [one["name"] for one in run.summary["findings"] if one["metric"] == "remark.loss_free"] == ["two remedies"]


def test_a_run_with_a_router_without_gradient_says_so_in_its_findings(tmp_path):
    """As published: one gate, divided by itself. For comparison the raw probability, which has a gradient."""
    flags = {"task": "blobs", "steps": 3, "top_k": 1, "no_plugin": ("plots", "html")}
    settings = {"blobs": {"images": 200, "test_images": 200}, "topk": {"renorm": True}}
    with pytest.raises(UsageError, match="topk.renorm at top_k=1"):
        Training(RunConfig(**flags), settings)
    theirs = Training(RunConfig(**flags, allow_no_gradient=True), settings, tmp_path / "theirs").run().summary
    (found,) = [one for one in theirs["findings"] if one["metric"] == "remark.learning"]
    assert (found["name"], found["severity"]) == ("no gradient", 2)
    settings["topk"] = {"renorm": False}
    ours = Training(RunConfig(**flags), settings, tmp_path / "ours").run().summary
    assert not [one for one in ours["findings"] if one["metric"] == "remark.learning"]
    assert theirs["layers"][0]["router_gradient"] < 1e-5 * ours["layers"][0]["router_gradient"]


@pytest.mark.parametrize(("batch", "given", "threads"), [(8, None, 1), (10**6, None, 2), (8, 3, 3), (10**6, 1, 1)])
def test_a_small_model_computes_on_one_thread(monkeypatch, batch, given, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    config = RunConfig(plugins=("switch_aux",), batch_size=batch, threads=given, **SMALL)
    assert Training(config, SETTINGS).config.threads == threads


def test_a_run_computes_on_its_threads_and_leaves_the_others_alone(tmp_path, install):
    before, seen = torch.get_num_threads(), set()

    @attrs.define(eq=False)
    class Counted:
        @hookimpl
        def moe_metrics(self, stats):
            seen.add(torch.get_num_threads())
            return {}

    install("metric", "counted", Counted)
    run, _ = train(tmp_path / "run", ("counted",), threads=3)
    assert run.config["run"]["threads"] == 3
    assert seen == {3} and torch.get_num_threads() == before
