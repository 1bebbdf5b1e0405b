"""`moe-engine compare-plugins`, through the command line; and the dense model that all rows are compared with."""

import json
import os
import re
import signal

import attrs
import pytest
import torch
from torch import nn

from moe_engine import Engine, LinearRouter, UsageError, assign, hookimpl
from moe_engine.cli import main
from moe_engine.layer.flops import Flops, model_flops
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from moe_engine.study.comparison import chosen_plugins, comparison_of
from moe_engine.study.statistics import interval
from support import refused
from warm import MOE_ENGINE

BLOBS = ["--task", "blobs", "--set", "blobs.images=300", "--set", "blobs.test_images=100", "--epochs", "1"]
QUICK = [*BLOBS, "--jobs", "1", "--out", "out"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(*words, code=0):
    """comparison.json, after a comparison that ends with this exit code."""
    assert main(["compare-plugins", *QUICK, "--quiet", *words]) == code
    with open("out/comparison.json") as file:
        return json.load(file)


def by_name(comparison):
    return {row["variant"]: row for row in comparison["rows"]}


def values(row, name):
    return row["numbers"][name]["values"]


# -- from the command line -------------------------------------------------------------------------


def test_two_routers_with_two_seeds(capsys, tmp_path):
    """A row each and one for the dense model; terminal, page and JSON show the same numbers."""
    got = compare("--routers", "topk,sigmoid_topk", "--seeds", "2")
    rows = by_name(got)
    assert {"dense model", "topk", "sigmoid_topk"} == rows.keys()
    assert got["rows"][0]["variant"] == "dense model"
    assert all(row["seeds"] == [0, 1] for row in got["rows"])
    alone = Training(
        RunConfig(task="blobs", plugins=("topk",), no_plugin=("plots", "html"), epochs=1, seed=1),
        {"blobs": {"images": 300, "test_images": 100}},
        tmp_path / "alone",
    ).run()
    assert alone.summary["accuracy"] == values(rows["topk"], "accuracy")[1]
    assert alone.summary["layers"][0]["cv"] == values(rows["topk"], "cv")[1]
    number = rows["topk"]["numbers"]["accuracy"]
    assert attrs.asdict(interval(number["values"])) == {**number, "values": tuple(number["values"])}
    out = capsys.readouterr().out
    cell = f"{100 * number['mean']:.2f} ± {100 * number['half']:.2f}"
    with open("out/comparison.md") as file:
        page = file.read()
    assert cell in out
    assert f"| topk | {cell} |" in page
    with open("out/comparison.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_results_are_those_of_a_study_with_one_part_and_one_axis(capsys):
    """So one mechanism judges, tabulates and prints both; rows also have a kind, by which they are ordered."""
    got = compare("--biases", "saturation", "--routers", "topk", "--seeds", "1")
    assert {"name", "title", "versions", "criteria", "parts", "published", "rows"} <= got.keys()
    columns = ["accuracy", "cv", "maxvio", "active", "flops.active", "step_seconds", "step_ratio"]
    assert got["parts"] == [{"name": "", "title": "", "columns": columns}]
    assert [(row["kind"], row["at"]) for row in got["rows"]] == [
        ("dense", {"plugin": "dense model"}),
        ("base", {"plugin": "base alone"}),
        ("router", {"plugin": "topk"}),
        ("bias", {"plugin": "saturation"}),
    ]
    assert got["rows"][1]["numbers"]["loss"] == got["rows"][2]["numbers"]["loss"]  # topk is the default router
    with open("out/comparison.md") as file:
        page = file.read()
    assert got["legend"] in page
    assert page.startswith("# blobs, 8 experts, top 2, 1 epochs\n\n|  | accuracy % | cv |")
    assert "kFLOPs" in page


def test_a_second_call_runs_nothing(monkeypatch):
    first = compare("--routers", "topk,sigmoid_topk", "--seeds", "2")
    before = {path: os.stat(f"out/cells/{path}").st_mtime_ns for path in os.listdir("out/cells")}

    def never(_):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(Training, "run", never)
    assert first == compare("--routers", "topk,sigmoid_topk", "--seeds", "2")
    assert before == {path: os.stat(f"out/cells/{path}").st_mtime_ns for path in os.listdir("out/cells")}
    assert len(before) == 6


def test_json_is_the_file_and_nothing_else(capsys):
    assert main(["compare-plugins", *QUICK, "--routers", "topk", "--seeds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    with open("out/comparison.json") as file:
        assert file.read() == out
    assert json.loads(out)["quality"] == "accuracy"
    lines = err.splitlines()
    assert lines[0] == "0/2  2 runs to do"
    assert re.fullmatch(r"1/2  dense model, seed 0: loss [\d.]+  accuracy [\d.]+%  \(\d+ s left\)", lines[1])


def test_one_seed_has_no_interval(capsys):
    got = by_name(compare("--routers", "topk", "--seeds", "1"))
    assert all(number["half"] is None for number in got["topk"]["numbers"].values())
    out = capsys.readouterr().out
    assert "One seed: no intervals" in out
    assert "±" not in out


def test_the_dense_model_takes_as_many_flops_as_the_active_experts():
    """8 experts of 64 - 64 - 64, top 3: dense 2 * 2 * 64 * 192; the others and 2 * 8 * 64 for the router."""
    rows = by_name(compare("--routers", "topk,hierarchical", "--seeds", "1", "--top-k", "3"))
    dense = values(rows["dense model"], "flops.active")[0]
    assert dense == 2 * 2 * 64 * 192 == values(rows["dense model"], "flops.total")[0]
    assert values(rows["topk"], "flops.active") == [dense + 2 * 8 * 64]
    assert values(rows["topk"], "flops.total") == [dense / 3 * 8 + 2 * 8 * 64]
    assert values(rows["hierarchical"], "flops.active") == [dense + 2 * (8 + 2) * 64]


def test_step_times_are_relative_to_the_dense_models_mean():
    rows = by_name(compare("--routers", "topk", "--seeds", "2"))
    mean = rows["dense model"]["numbers"]["step_seconds"]["mean"]
    expected = [value / mean for value in values(rows["topk"], "step_seconds")]
    assert expected == pytest.approx(values(rows["topk"], "step_ratio"))
    assert rows["dense model"]["numbers"]["step_ratio"]["mean"] == pytest.approx(1)


def test_drops_are_shown_if_there_is_a_capacity(capsys):
    rows = by_name(compare("--routers", "topk", "--seeds", "1", "--capacity", "1"))
    assert rows["topk"]["numbers"]["train_dropped"]["mean"] > 0
    assert "dropped %" in capsys.readouterr().out
    compare("--routers", "topk", "--seeds", "1")
    assert "dropped %" not in capsys.readouterr().out


def test_a_refused_row_says_why_and_stops_no_other(capsys):
    rows = by_name(compare("--routers", "topk,hierarchical", "--seeds", "1", "--set", "hierarchical.groups=5"))
    why = "groups_kept=1 of 5 groups hold fewer than top_k=2 experts"
    assert rows["hierarchical"]["status"] == "refused"
    assert rows["hierarchical"]["reason"].startswith(why)
    assert rows["topk"]["status"] == "finished"
    out = capsys.readouterr().out
    assert f"hierarchical was refused: {why}" in out
    with open("out/comparison.md") as file:
        assert f"- hierarchical was refused: {why}" in file.read()


def test_a_comparison_of_refused_rows_alone_is_bad_input(capsys):
    got = compare("--routers", "hierarchical", "--seeds", "1", "--set", "hierarchical.groups=5", code=2)
    assert [row["status"] for row in got["rows"]] == ["finished", "refused"]
    err = capsys.readouterr().err
    assert err.startswith("moe-engine: no plugin could be compared; the first reason: groups_kept=1 of 5 groups")


@attrs.define(eq=False)
class Odd:
    """A trigger, or with a router's hook a router, that fails in training."""

    @hookimpl
    def moe_growth(self):
        raise ValueError("I am odd")


def test_a_failed_row_says_why_and_stops_no_other(capsys, install):
    install("growth", "odd", Odd)
    got = compare("--growth", "odd", "--seeds", "1")
    assert [row["status"] for row in got["rows"]] == ["finished", "finished", "failed"]
    why = "growth 'odd' (elsewhere 1.0) in moe_growth failed at step 1: ValueError: I am odd"
    assert got["rows"][2]["reason"] == why
    assert f"odd failed: {why}" in capsys.readouterr().out


def test_a_comparison_of_failed_rows_alone_is_a_failure(capsys, install):
    @attrs.define(eq=False)
    class OddRouter(Odd):
        @hookimpl
        def moe_router(self, spec):
            return Plain(spec)

    class Plain(LinearRouter):
        def select(self, tokens, levels):
            gate_TK, expert_TK = levels[0].biased.softmax(-1).topk(self.top_k, dim=-1)
            return levels[0].biased.softmax(-1), assign(gate_TK, expert_TK, tokens)

    install("router", "odd", OddRouter)
    compare("--routers", "odd", "--seeds", "1", code=1)
    assert "no plugin could be compared; the first reason: router 'odd'" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_ctrl_c_keeps_finished_runs(jobs, capsys, commands):
    """Every process is stopped as by a terminal; the same command then runs only what is missing."""
    words = ["compare-plugins", *BLOBS, "--epochs", "8", "--routers", "topk", "--jobs", jobs, "--out", "out"]
    read, write = os.pipe()
    with open(write, "w") as stderr:
        process = commands.start([*MOE_ENGINE, *words], stderr=stderr, session=True)
    with open(read) as stderr:
        while not stderr.readline().startswith("2/6"):
            assert not process.ended()
        os.killpg(process.pid, signal.SIGINT)
        err = stderr.read()
    assert process.wait() == 130
    assert err.endswith("moe-engine: stopped\n")
    assert "Traceback" not in err
    kept = set(os.listdir("out/cells"))
    assert 2 <= len(kept) < 6
    assert main([*words, "--jobs", "1"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert f"{len(kept)}/6  {6 - len(kept)} runs to do, {len(kept)} already done" == first
    assert kept < set(os.listdir("out/cells"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["--routers", "--biases", "--losses", "--growth"]),
        (["--routers", "tpk"], ["--routers", "'tpk'", "did you mean 'topk'"]),
        (["--routers", "topk", "--task", "digitz"], ["'digitz'", "did you mean 'digits'?"]),
        (["--routers", "topk", "--top-k", "9"], ["top_k", "9", "8 experts"]),
        (["--routers", "topk", "--set", "digits.dimm=3"], ["task 'digits'", "'dimm'", "did you mean 'dim'?"]),
        (["--routers", "topk", "--set", "clone.noise=1"], ["'clone'", "not chosen"]),
        (["--routers", "topk", "--seeds", "0"], ["'--seeds'"]),
        (["--routers", "topk", "--seeds", "9" * 20], ["'--seeds'"]),
        (["--biases", "saturation", "--no-plugin", "saturation"], ["'saturation'", "--no-plugin"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, named, capsys):
    assert main(["compare-plugins", *words]) == 2
    err = capsys.readouterr().err
    assert [word for word in named if word not in err] == []
    assert err.count("\n") == 1
    assert not os.listdir()


def test_a_plugin_that_cannot_be_compared_is_named():
    with refused("unknown-plugin", "--routers", "'tpk'", "'topk'"):
        chosen_plugins("routers", ["tpk"])
    with refused("wrong-kind", "--routers", "'saturation'", "bias"):
        chosen_plugins("routers", ["saturation"])
    with refused("compared-and-shared", "'topk'", "--plugins"):
        comparison_of({"routers": ["sigmoid_topk"]}, ["topk"], {}, {})
    with refused("compared-and-shared", "'saturation'", "--plugins"):
        comparison_of({"biases": ["saturation"]}, ["saturation"], {}, {})
    with refused("plugin-not-chosen", "'clone'", "--plugins"):
        comparison_of({"routers": ["topk"]}, [], {"clone": {"noise": 1}}, {})


# -- the rows --------------------------------------------------------------------------------------


def planned(compared, base=(), settings=None, flags=None):
    """(kind, variant) of each row."""
    comparison = comparison_of(compared, base, settings or {}, flags or {})
    variants = [variant for _, _, variant in comparison.study.variants(comparison.flags)]
    return [(comparison.kinds[variant.name], variant) for variant in variants]


def test_each_plugin_is_added_to_the_base():
    compared = {"routers": ["topk"], "biases": ["saturation", "loss_free"]}
    got = planned(compared, ["switch_aux", "html"], {}, {"experts": 4})
    assert [(kind, variant.name, variant.plugins) for kind, variant in got] == [
        ("dense", "dense model", ("html",)),
        ("base", "base alone", ("switch_aux", "html")),
        ("router", "topk", ("switch_aux", "html", "topk")),
        ("bias", "saturation", ("switch_aux", "html", "saturation")),
        ("bias", "loss_free", ("switch_aux", "html", "loss_free")),
    ]
    assert [variant.flags for _, variant in got] == [{"experts": 4, "dense": True}, *[{"experts": 4}] * 4]


def test_routers_need_no_base_alone():
    assert [kind for kind, _ in planned({"routers": ["topk"]})] == ["dense", "router"]


def test_settings_go_to_the_rows_that_have_the_plugin():
    settings = {"saturation": {"beta": 2}, "switch_aux": {"weight": 0.1}, "blobs": {"dim": 8}}
    got = planned({"biases": ["saturation"], "losses": ["z_loss"]}, ["switch_aux"], settings, {"task": "blobs"})
    assert [list(variant.settings) for _, variant in got] == [
        ["blobs"],
        ["switch_aux", "blobs"],
        ["saturation", "switch_aux", "blobs"],
        ["switch_aux", "blobs"],
    ]


def test_all_is_every_installed_plugin_of_the_kind(install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_bias(self, spec, level):
            return None

    before = chosen_plugins("biases", ["all"])
    install("bias", "mine", Mine)
    assert {*before, "mine"} == set(chosen_plugins("biases", ["all"]))
    assert chosen_plugins("biases", ["saturation", "all"])[0] == "saturation"


# -- the dense model -------------------------------------------------------------------------------


def test_a_dense_layer_is_one_mlp_of_the_active_width():
    """act(x W_in) W_out with K + shared = 3 times the hidden units."""
    layer = Engine(experts=8, top_k=2, shared=1, dense=True).moe(4, 5, out=6)
    assert [tuple(tensor.shape) for tensor in layer.parameters()] == [(15, 4), (6, 15)]
    x = torch.randn(7, 4)
    assert torch.equal(torch.relu(x @ layer.enter.weight.T) @ layer.leave.weight.T, layer(x, labels=torch.zeros(7)))


def test_padding_takes_no_part_in_a_dense_layer():
    layer = Engine(top_k=2, bias=True, dense=True).moe(4, 5)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    x[~mask] = torch.nan
    y = layer(x, mask)
    assert torch.equal(torch.zeros(3, 4), y[~mask])
    y.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in layer.parameters())


def test_a_dense_engine_goes_through_a_step():
    engine = Engine(dense=True)
    model = nn.Sequential(engine.moe(4, 5))
    (model(torch.randn(3, 4)).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert engine.metrics() == {}
    assert engine.step == 1


def test_a_plugin_that_would_do_nothing_in_a_dense_model_is_refused():
    with pytest.raises(
        UsageError, match="dense model has no router: 'saturation' and 'switch_aux' would have no effect"
    ):
        Engine("saturation,switch_aux,balance", dense=True)


@pytest.mark.parametrize("modules", [None, [nn.Linear(4, 6), nn.Linear(4, 6)]])
def test_a_dense_layer_of_experts_without_a_width_is_one_of_them(modules):
    """At K = 1 it takes as many FLOPs as the experts of a token do, 2*4*3 + 2*3*5 + 2*5*6 or 2*4*6; not at K = 2."""

    def build(**spec):
        chosen = ([], []) if modules else (["deep_mlp"], ["deep_mlp.hidden=3,5"])
        return Engine(*chosen, dense=True, **spec).moe(4, 7, out=6, modules=modules)

    layer = build(top_k=1)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.where(mask[..., None], layer.bank.outputs(x.view(6, 4))[0].view(2, 3, 6), 0)
    torch.testing.assert_close(layer(x.masked_fill(~mask[..., None], torch.nan), mask), expected)
    flops = 2 * 4 * 6 if modules else 2 * (4 * 3 + 3 * 5 + 5 * 6)
    assert Flops(flops, flops) == model_flops(nn.Sequential(layer), {})
    for spec in ({"top_k": 2}, {"top_k": 1, "shared": 1}):
        with pytest.raises(UsageError, match="these have no width, so one of them stands for top_k=1"):
            build(**spec)


def test_a_folder_where_a_result_belongs_and_an_unknown_option_are_refused_first(capsys, tmp_path):
    (tmp_path / "out" / "comparison.json").mkdir(parents=True)
    assert main(["compare-plugins", "--routers", "topk", "--out", str(tmp_path / "out")]) == 2
    assert "comparison.json is a folder" in capsys.readouterr().err
    assert main(["compare-plugins", "--routers", "topk", "--set", "topk.nope=1", "--out", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert "router 'topk'" in err
    assert "'nope'" in err
    assert not (tmp_path / "no").exists() and not (tmp_path / "out" / "cells").exists()
