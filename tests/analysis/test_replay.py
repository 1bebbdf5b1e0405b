"""Routing traces: recorded, replayed with other routers, and refused if they are invalid."""

import json
import math

import attrs
import pytest
import torch
from safetensors.torch import save_file

from moe_engine import Engine, LinearRouter, Traits, UsageError, assign, hookimpl
from moe_engine.analysis.replay import ReplayVariant, recorded, replay, variants
from moe_engine.cli import main
from moe_engine.contract.routing import Level, Routing, Slots, Spec, Tokens
from moe_engine.registry.discovery import find
from moe_engine.run import training
from moe_engine.run.folder import old_folder
from moe_engine.run.traces import FILE, LayerTrace, Trace, begin, read_trace, record
from moe_engine.run.trees import read_tree, write_tree
from support import refused

QUICK = ["--task", "blobs", "--set", "blobs.images=500", "--set", "blobs.test_images=100", "--epochs", "2"]
BALANCED = ["--plugins", "topk,loss_free", "--set", "loss_free.rate=0.1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, with a trace of a router that has a bias."""
    folder = tmp_path_factory.mktemp("run") / "A"
    words = ["run", *QUICK, *BALANCED, "--no-plugin", "plots,html", "--quiet", "--record-routing", "--out", str(folder)]
    assert main(words) == 0
    return folder


def trace_of(*logits, top_k=1, router="topk", mask=None, shape=None, causal=False, limit=20_000):
    """A trace of one forward of each layer, whose tokens take the top of the logits [T, E]."""
    trace = Trace(limit=limit)
    for index, logits_TE in enumerate(logits):
        spec = Spec(4, 4, experts=logits_TE.shape[1], top_k=top_k, causal=causal)
        layer = LayerTrace(f"layer{index}", router, {}, spec, {}, [])
        trace.add(layer, decided(logits_TE, top_k, mask, shape))
        trace.layers.append(layer)
    return trace


def decided(logits_TE, top_k=1, mask=None, shape=None):
    count, experts = logits_TE.shape
    tokens = Tokens(torch.zeros(count, 4), shape or (count,), mask)
    gate_TK, expert_TK = logits_TE.softmax(-1).topk(top_k)
    return Routing(
        tokens,
        (Level("expert", logits_TE, logits_TE, tokens),),
        None,
        assign(gate_TK, expert_TK, tokens),
        experts,
        top_k,
    )


def choosing(*experts, size):
    """Logits [T, size] with which token t chooses experts[t]."""
    return 3 * torch.nn.functional.one_hot(torch.tensor(experts), size).float()


def skewed(tokens=256, experts=8):
    """Logits that favour the first experts."""
    return torch.randn(tokens, experts) + torch.linspace(2, 0, experts)


# -- what is recorded --------------------------------------------------------------------------------


def test_the_recorded_router_chooses_as_it_did(finished):
    """The same choices for every token, and to the last digit the balance that the summary tells of the test set."""
    trace = read_trace(finished)
    (row, mean) = replay(trace, *variants(trace, [], [], [], [], {}))
    summary = json.loads((finished / "summary.json").read_text())["layers"][0]
    assert (row["agreement"], row["first"]) == (1, 1)
    assert [summary[name] for name in ("cv", "maxvio", "load", "entropy", "active", "dropped")] == [
        row[name] for name in ("cv", "maxvio", "load", "entropy", "active", "dropped")
    ]
    assert mean["layer"] == "mean"
    (then, _) = recorded(trace)
    assert {name: row[name] for name in ("cv", "load", "verdict")} == {
        name: then[name] for name in ("cv", "load", "verdict")
    }


@pytest.mark.parametrize("router", [name for name, (one, *_) in find().items() if one.kind == "router"])
def test_every_router_chooses_as_it_did(router):
    """What it learned is in the trace, and padding stays out; or it makes no choices, or reads tokens: that is said."""
    engine = Engine(router, experts=8, top_k=2, vocab=20)
    layer = engine.moe(8, 4).eval()
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.normal_()
    mask = torch.rand(3, 16) < 0.8

    def forward():
        return layer(torch.randn(3, 16, 8), mask, torch.randint(20, (3, 16)))

    trace = record(engine, [forward, forward], {})
    (row, *_) = replay(trace, ReplayVariant(router))
    if "refused" in row:
        said = (
            "mixes tokens into slots, so there are no choices",
            "can't decide on recorded logits alone (RuntimeError",
        )
        assert any(why in row["refused"] for why in said)
    else:
        then = recorded(trace)[0]
        assert [row[key] for key in ("agreement", "first", "load")] == [1, 1, then["load"]]


def test_the_recorded_biases_are_at_work(finished):
    """Without them, other experts are chosen."""
    trace = read_trace(finished)
    assert trace.layers[0].biases[0]["value"].abs().max() > 0.05
    (row, _) = replay(trace, ReplayVariant("topk"))
    assert row["agreement"] < 0.99


def test_what_the_file_holds(finished):
    """Raw fp32 logits, gates, labels, the spec, the router with its options."""
    (layer,) = read_trace(finished).layers
    (forward,) = layer.forwards
    assert (layer.router, layer.options["groups"], layer.spec.top_k) == ("topk", 1, 2)
    assert (layer.biases[0]["name"], layer.biases[0]["selection_only"]) == ("loss_free", True)
    assert (forward.logits["expert"].dtype, forward.logits["expert"].shape) == (torch.float32, (100, 8))
    assert (forward.labels.shape, forward.mask, forward.ids) == ((100,), None, None)
    assert torch.allclose(forward.gate.view(100, 2).sum(1), torch.ones(100))
    assert not list(finished.glob(".*.tmp"))


def test_nothing_is_recorded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "record", lambda *_: pytest.fail("work was done"))
    assert main(["run", *QUICK, "--no-plugin", "plots,html", "--quiet", "--out", str(tmp_path / "A")]) == 0
    assert not (tmp_path / "A" / FILE).exists()


def test_a_resumed_run_records_too(finished, tmp_path):
    """The flag is in config.toml; what a finished run's last evaluation gives is the same trace."""
    assert old_folder(finished)[0].record_routing
    (before,) = read_trace(finished).layers[0].forwards
    (finished / FILE).unlink()
    assert main(["resume", str(finished), "--quiet"]) == 0
    (after,) = read_trace(finished).layers[0].forwards
    assert torch.equal(before.logits["expert"], after.logits["expert"])
    assert torch.equal(before.expert, after.expert)


def test_recording_counts_nothing():
    """The metrics afterwards are as if nothing had been recorded."""
    engine = Engine("topk", experts=4)
    layer = engine.moe(8, 4, name="moe").eval()
    layer(torch.randn(10, 8))
    before = layer.sums.evaluated.clone()
    record(engine, [lambda: layer(torch.randn(6, 8))], {})
    assert torch.equal(layer.sums.evaluated, before)


def test_a_trace_has_an_end():
    """Whole rows of the leading shape up to the limit; of sequences of 4, two and a half fit into 10 tokens."""
    logits_TE = torch.randn(12, 4)
    trace = trace_of(logits_TE, top_k=2, shape=(3, 4), limit=10)
    (forward,) = trace.layers[0].forwards
    assert (forward.shape, trace.cut, trace.tokens) == ((2, 4), True, 8)
    assert torch.equal(forward.logits["expert"], logits_TE[:8])
    assert torch.equal(forward.expert.view(8, 2), logits_TE[:8].topk(2).indices)
    assert not trace.add(trace.layers[0], decided(torch.randn(4, 4), 2, shape=(1, 4)))
    assert len(trace.layers[0].forwards) == 1


def test_recording_ends_at_the_limit(monkeypatch):
    """The rest of the data is not even looked at."""
    engine, looked = Engine("topk", experts=4), []
    layer = engine.moe(8, 4).eval()
    trace = Trace([begin(engine, layer)], limit=16)
    monkeypatch.setattr("moe_engine.run.traces.Trace", lambda *_: trace)

    def forward(index):
        looked.append(index)
        layer(torch.randn(10, 8))

    record(engine, [lambda index=index: forward(index) for index in range(5)], {})
    assert looked == [0, 1]
    assert (trace.tokens, trace.cut) == (16, True)


def test_a_trace_comes_back_as_it_was(tmp_path):
    """Mask, sequences, causality and the note on what was left out."""
    mask = torch.tensor([True, True, False, True])
    trace = trace_of(torch.randn(4, 3), shape=(2, 2), mask=mask, causal=True)
    trace.cut, trace.about = True, {"task": "none"}
    trace.write(tmp_path / "x")
    again = read_trace(tmp_path / "x")
    assert attrs.asdict(trace.layers[0].spec) == attrs.asdict(again.layers[0].spec)
    assert (again.cut, again.limit, again.about) == (True, 20_000, {"task": "none"})
    (before,), (after,) = trace.layers[0].forwards, again.layers[0].forwards
    assert after.shape == (2, 2)
    assert torch.equal(before.mask, after.mask)
    assert torch.equal(before.logits["expert"], after.logits["expert"])


def test_an_empty_trace_is_not_written(tmp_path):
    with refused("empty-trace", tmp_path / "x"):
        Trace([LayerTrace("moe", "topk", {}, Spec(4, 4), {}, [])]).write(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# -- what others would have done ---------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "dropped"), [(None, 0), (1.0, 3 / 8), (1.25, 2 / 8), (2.5, 0)])
def test_capacity_by_hand(capacity, dropped):
    """Eight tokens, one choice, four experts: 5, 1, 2 and 0. An expert keeps ceil(C * 8 / 4): 2, 3 or 5 tokens."""
    trace = trace_of(choosing(0, 0, 0, 1, 0, 2, 2, 0, size=4))
    (row, _) = replay(trace, ReplayVariant("topk", capacity=capacity))
    assert row["dropped"] == dropped
    assert row["load"] == [5 / 8, 1 / 8, 2 / 8, 0]
    assert row["maxvio"] == 1.5
    assert row["agreement"] == 1


def test_capacity_is_of_a_step():
    """In two steps of four tokens each expert keeps one of each: of 3, 1, 0, 0 and 2, 0, 2, 0, four go."""
    trace = trace_of(choosing(0, 0, 0, 1, 0, 2, 2, 0, size=4))
    (row, _) = replay(trace, ReplayVariant("topk", capacity=1.0), batch=4)
    assert row["dropped"] == 4 / 8


def test_padding_takes_no_part():
    mask = torch.tensor([True, False, True, True, True])
    trace = trace_of(choosing(0, 1, 0, 1, 0, size=2), mask=mask)
    (row, _) = replay(trace, ReplayVariant("topk", capacity=1.0))
    assert row["load"] == [3 / 4, 1 / 4]
    assert row["dropped"] == 1 / 4


def test_agreement_by_hand():
    """Two choices then, one now: one of two is shared. Three now: two of three."""
    trace = trace_of(torch.randn(40, 6), top_k=2)
    same = [replay(trace, ReplayVariant("topk", top_k=k))[0]["agreement"] for k in (1, 2, 3)]
    assert same == pytest.approx([1 / 2, 1, 2 / 3])


def test_agreement_of_another_router(install):
    """One that takes the smallest logit: it shares nothing, but where a token's experts are all there are."""
    install("router", "smallest", Smallest)
    trace = trace_of(choosing(0, 1, 1, size=3))
    trace.layers[0].forwards[0].logits["expert"] = torch.tensor([[3.0, 0, 1], [0, 3, 1], [3, 0, 1]])
    (row, _) = replay(trace, ReplayVariant("smallest"))
    assert row["agreement"] == row["first"] == pytest.approx(1 / 3)  # recorded 0, 1, 1; smallest 1, 0, 1


@attrs.define(eq=False)
class Smallest:
    """The smallest logit."""

    @hookimpl
    def moe_router(self, spec):
        return SmallestRouter(spec)


class SmallestRouter(LinearRouter):
    def select(self, tokens, levels):
        probs_TE = levels[0].biased.softmax(-1)
        expert_TK = levels[0].logits.topk(self.top_k, largest=False).indices
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)


@pytest.mark.parametrize("batch", [None, 16])
def test_a_bias_learns_on_the_trace(batch):
    """loss_free against a loop of its own: the same load in the end, and a lower maxvio than without."""
    logits_TE, rate = skewed(), 0.05
    trace = trace_of(logits_TE, top_k=2)
    b = torch.zeros(8)
    for piece in logits_TE.split(batch or len(logits_TE)):
        load = (piece + b).topk(2).indices.flatten().bincount(minlength=8).float()
        b = b + rate * torch.sign(load.mean() - load)
        b = b - b.mean()
    load = (logits_TE + b).topk(2).indices.flatten().bincount(minlength=8).double()
    (row, _) = replay(trace, ReplayVariant("topk", "loss_free"), {"loss_free": {"rate": rate}}, batch)
    (without, _) = replay(trace, ReplayVariant("topk"), batch=batch)
    assert row["load"] == pytest.approx((load / load.sum()).tolist())
    assert row["maxvio"] == pytest.approx(float(load.max() / load.mean() - 1))
    assert row["maxvio"] < without["maxvio"]
    assert row["agreement"] < 1


def test_means_are_over_layers():
    """A layer with one expert of two, and an even one: maxvio 1 and 0."""
    trace = trace_of(choosing(0, 0, 0, 0, size=2), choosing(0, 1, 0, 1, size=2))
    first, second, mean = replay(trace, ReplayVariant("topk"))
    assert (first["maxvio"], second["maxvio"], mean["maxvio"]) == (1, 0, 0.5)
    assert (first["verdict"], mean["top_k"]) == ("collapsed", 1)


def test_what_a_router_had_learned_is_in_the_trace(tmp_path):
    """Groups that are ragged: two experts in the first, four in the second."""
    engine = Engine("hierarchical", experts=6, top_k=1)
    layer = engine.moe(8, 4).eval()
    layer.router.group_of.copy_(torch.tensor([0, 1, 1, 1, 0, 1]))
    record(engine, [lambda: layer(torch.randn(50, 8))], {}).write(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    (row, _) = replay(trace, ReplayVariant("hierarchical"))
    assert (row["agreement"], row["cv"]) == (1, recorded(trace)[0]["cv"])
    (refused,) = replay(trace, ReplayVariant("topk"))
    assert "needs logits for 6 of 'expert', but the trace holds them for 2 of 'group' and 6 of 'expert'" in str(refused)


def test_a_router_is_not_noisy_in_a_replay(install):
    """Its mode is that of the recording, also where capacity acts."""
    install("router", "training_only", TrainingOnly)
    (row, _) = replay(trace_of(torch.randn(20, 4)), ReplayVariant("training_only", capacity=1.0))
    assert row["agreement"] == 1
    assert row["dropped"] > 0


@attrs.define(eq=False)
class TrainingOnly:
    """Top-k, turned round in training."""

    @hookimpl
    def moe_router(self, spec):
        return TrainingOnlyRouter(spec)


class TrainingOnlyRouter(LinearRouter):
    def select(self, tokens, levels):
        scores_TE = -levels[0].biased if self.training else levels[0].biased
        expert_TK = scores_TE.topk(self.top_k).indices
        return scores_TE.softmax(-1), assign(scores_TE.gather(-1, expert_TK), expert_TK, tokens)


# -- what is refused -----------------------------------------------------------------------------------


def refusal(variant, trace=None, **given):
    (row,) = replay(trace or trace_of(torch.randn(8, 4)), variant, **given)
    return row["refused"]


@pytest.mark.parametrize(
    ("plugin", "settings"),
    [("saturation", {}), ("saturation", {"saturation": {"signal": "weights"}}), ("absolute_saturation", {})],
)
def test_a_bias_that_wants_gradients(plugin, settings):
    assert f"'{plugin}' acts on gradients, which a trace does not hold" in refusal(
        ReplayVariant("topk", plugin), settings=settings
    )


def test_a_router_of_other_levels():
    why = "router 'hierarchical' needs logits for 2 of 'group' and 4 of 'expert', but the trace holds them for 4 of"
    assert why in refusal(ReplayVariant("hierarchical"))


def test_a_router_with_weights_of_its_own(install):
    """Also a threshold that is declared as part of the logits: who knows whether it is added to them."""
    install("router", "scaled", Scaled)
    assert "router 'threshold' has further learned weights ('G')" in refusal(ReplayVariant("threshold"))
    assert "router 'scaled' has further learned weights ('scale')" in refusal(ReplayVariant("scaled"))


@attrs.define(eq=False)
class Scaled:
    """Top-k of scaled logits."""

    @hookimpl
    def moe_router(self, spec):
        router = SmallestRouter(spec)
        router.scale = torch.nn.Parameter(torch.ones(()))
        return router


def test_a_router_that_reads_the_tokens(install):
    install("router", "reading", Reading)
    why = refusal(ReplayVariant("reading"))
    assert "router 'reading': it can't decide on recorded logits alone" in why


@attrs.define(eq=False)
class Reading:
    """The largest features of a token."""

    @hookimpl
    def moe_router(self, spec):
        return ReadingRouter(spec)


class ReadingRouter(LinearRouter):
    def select(self, tokens, levels):
        scores_TE = tokens.x @ self.weight.t()
        expert_TK = scores_TE.topk(self.top_k).indices
        return scores_TE.softmax(-1), assign(scores_TE.gather(-1, expert_TK), expert_TK, tokens)


def test_a_router_without_choices(install):
    """It mixes tokens into slots; its own trace holds none either, and agrees with nobody."""
    install("router", "mixing", Mixing)
    assert "mixes tokens into slots, so there are no choices to compare" in refusal(ReplayVariant("mixing"))
    engine = Engine("mixing", experts=4)
    layer = engine.moe(8, 4).eval()
    trace = record(engine, [lambda: layer(torch.randn(10, 8))], {})
    assert recorded(trace)[0]["load"] == [None] * 4
    (row, _) = replay(trace, ReplayVariant("topk"))
    assert (row["agreement"], row["first"], sum(row["load"])) == (None, None, 1)


@attrs.define(eq=False)
class Mixing:
    """One slot an expert, of all tokens alike."""

    traits = Traits(provides=("probs",))

    @hookimpl
    def moe_router(self, spec):
        return MixingRouter(spec)


class MixingRouter(LinearRouter):
    def select(self, tokens, levels):
        probs_TE = levels[0].biased.softmax(-1)
        even = torch.full_like(probs_TE, 1 / len(probs_TE))
        return probs_TE, Slots(even[None, :, :, None], probs_TE[None, :, :, None])


def test_a_mix_that_makes_no_sense():
    for top_k in (0, 5):
        assert f"top_k={top_k}" in refusal(ReplayVariant("topk", top_k=top_k))
    settings = {"topk": {"groups": 3}}
    assert "groups=3 does not divide 4 experts" in refusal(ReplayVariant("topk"), settings=settings)


def test_a_causal_layer_stays_causal(install):
    """What refuses causal layers refuses their traces."""
    install("router", "seer", Seer)
    assert refusal(ReplayVariant("seer"), trace_of(torch.randn(8, 4), causal=True)) == "seer sees later tokens"
    assert "refused" not in replay(trace_of(torch.randn(8, 4)), ReplayVariant("seer"))[0]


@attrs.define(eq=False)
class Seer:
    """Not causal."""

    @hookimpl
    def moe_check(self, setup):
        return "seer sees later tokens" if setup.spec.causal else None

    @hookimpl
    def moe_router(self, spec):
        return SmallestRouter(spec)


@pytest.mark.parametrize(
    ("routers", "biases", "settings", "words"),
    [
        (["topl"], [], {}, ("'topl'", "'topk'")),
        (["switch_aux"], [], {}, ("'switch_aux'", "loss", "router")),
        (["topk"], ["sigmoid_topk"], {}, ("'sigmoid_topk'", "router", "bias")),
        (["topk"], [], {"topk": {"nonsense": "1"}}, ("router 'topk'", "'nonsense'")),
        (["topk"], [], {"loss_free": {"rate": "1"}}, ("loss_free", "not replayed")),
        ([], ["loss_free"], {}, ("'SomeBlock'", "--routers")),
    ],
)
def test_names_that_are_wrong(routers, biases, settings, words):
    with pytest.raises(UsageError) as error:
        variants(trace_of(torch.randn(8, 4), router="SomeBlock"), routers, biases, [], [], settings)
    assert [word for word in words if word not in str(error.value)] == []


def test_every_combination_is_a_variant():
    trace = trace_of(torch.randn(8, 4))
    several = variants(trace, ["topk", "sigmoid_topk"], ["none", "loss_free"], [None, 1.0], [1, 2], {})
    assert len(set(several)) == 16
    assert variants(trace, [], [], [], [], {}) == [ReplayVariant("topk", "none")]


# -- files and the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("where", range(0, 100, 11))
def test_a_damaged_file_is_one_sentence(finished, tmp_path, capsys, where):
    """Any byte of it; and half of it."""
    content = bytearray((finished / FILE).read_bytes())
    content[len(content) * where // 100] ^= 0xFF
    (tmp_path / "x").write_bytes(content if where else content[: len(content) // 2])
    assert main(["replay", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "is damaged" in err or "is not a moe_engine routing trace" in err


def test_a_foreign_file_is_one_sentence(tmp_path, capsys):
    save_file({"w": torch.ones(2)}, tmp_path / "weights")
    write_tree(tmp_path / "checkpoint", {"model": {"w": torch.ones(2)}})
    write_tree(
        tmp_path / "half", {"routing_trace": 1, "layers": [{"name": "moe"}], "about": {}, "limit": 1, "cut": False}
    )
    write_tree(tmp_path / "empty", {"routing_trace": 1, "layers": [], "about": {}, "limit": 1, "cut": False})
    trace = trace_of(torch.randn(4, 3))
    trace.layers[0].forwards[0].expert += 2
    trace.write(tmp_path / "wrong")
    (tmp_path / "text").write_text("routing")
    said = {
        "weights": "is not a moe_engine routing trace",
        "checkpoint": "holds no routing trace; `moe-engine run --record-routing` writes one",
        "half": "is damaged: its routing trace is invalid",
        "empty": "is damaged: its routing trace is invalid (ValueError: it is empty)",
        "wrong": "is damaged: its routing trace is invalid",
        "text": "is damaged",
        "nowhere": "there is no routing trace",
    }
    for name, why in said.items():
        assert main(["replay", str(tmp_path / name), "--routers", "topk"]) == 2
        err = capsys.readouterr().err
        assert why in err, name
        assert err.count("\n") == 1


def test_from_the_command_line(finished, capsys):
    """A folder in, a table of the recorded choices and of each variant out."""
    words = ["--routers", "topk,sigmoid_topk,hierarchical", "--capacity", "none,1.0"]
    assert main(["replay", str(finished), *words]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert sum("topk, recorded" in line for line in lines) == 1
    assert sum("sigmoid_topk" in line for line in lines) == 2
    assert sum("not replayed: router 'hierarchical' needs logits" in line for line in lines) == 1
    assert "all 100 tokens of each layer" in lines[-1]
    assert err == ""


def test_json_from_the_command_line(finished, capsys):
    words = ["--biases", "recorded,none,loss_free", "--set", "loss_free.rate=0.2", "--batch", "10", "--top-k", "2"]
    assert main(["replay", str(finished / FILE), "--capacity", "1.25", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trace"]["tokens"], told["trace"]["limit"], told["trace"]["cut"]) == (100, 20_000, False)
    rows = [row for row in told["rows"] if row["layer"] != "mean"]
    assert [row["bias"] for row in rows] == ["loss_free", "recorded", "none", "loss_free"]
    assert [row["agreement"] for row in rows[:2]] == [1, 1]
    assert all(0 < row["dropped"] < 1 for row in rows[1:])
    assert not any(math.isnan(value) for row in rows for value in row.values() if isinstance(value, float))


def test_a_bias_that_is_refused_from_the_command_line(finished, capsys):
    """Nothing to show is bad input, as is a word for a number."""
    assert main(["replay", str(finished), "--biases", "saturation"]) == 2
    assert "'saturation' acts on gradients" in capsys.readouterr().err
    assert main(["replay", str(finished), "--capacity", "much"]) == 2
    assert "--capacity takes numbers separated by commas, not 'much'" in capsys.readouterr().err


def test_the_run_says_how_much_it_recorded(tmp_path, capsys):
    assert main(["run", *QUICK, "--no-plugin", "plots,html", "--record-routing", "--out", str(tmp_path / "A")]) == 0
    assert f"routing of the test set: {tmp_path / 'A' / FILE} (all tokens)" in capsys.readouterr().err


def test_frozen_biases_are_no_controllers(finished):
    """They stand still through a walk."""
    trace = read_trace(finished)
    value = trace.layers[0].biases[0]["value"].clone()
    replay(trace, ReplayVariant("topk", "recorded"), batch=10)
    assert torch.equal(trace.layers[0].biases[0]["value"], value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("layers", 0, "router"), [1, 2]),
        (("layers", 0, "options"), None),
        (("layers", 0, "state"), -1),
        (("layers", 0, "biases"), [{}]),
        (("layers", 0, "forwards", 0, "gate"), "x"),
        (("layers", 0, "forwards", 0, "token"), torch.tensor([10**6])),
        (("layers", 0, "forwards", 0, "labels"), torch.zeros(3)),
        (("layers", 0, "forwards", 0, "shape"), ""),
    ],
)
def test_a_file_that_is_whole_and_wrong_inside_is_damaged(finished, tmp_path, capsys, where, value):
    """A field was rewritten and the checksum is right."""
    tree = read_tree(finished / FILE, "routing trace")
    inside = tree
    for step in where[:-1]:
        inside = inside[step]
    inside[where[-1]] = value
    write_tree(tmp_path / "trace", tree)
    assert main(["replay", str(tmp_path / "trace")]) == 2
    assert "is damaged: its routing trace is invalid" in capsys.readouterr().err
