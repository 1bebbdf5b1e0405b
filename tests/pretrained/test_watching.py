"""watch(engine, model): metrics and verdict on transformers' blocks, which are not changed."""

import attrs
import pytest
import torch
from torch.nn import functional as F

from moe_engine import Engine, RunningLoad, hookimpl, watch
from moe_engine.analysis.replay import ReplayVariant, replay
from moe_engine.cli import main
from moe_engine.run.traces import read_trace
from support import refused

from .tiny import ALL, EXPERTS, LAYERS, TOP_K, batch, build, chosen_by_gates, counted, name

# -- what is counted ---------------------------------------------------------------------------------


@ALL
def test_the_load_is_what_the_gates_chose(family):
    """Padding left out; the model's own choices, groups and biases included."""
    model, (ids, mask) = build(family), batch()
    caught = chosen_by_gates(model)
    with watch(Engine("balance,health"), model) as watcher:
        model(ids, attention_mask=mask)
        told = watcher.metrics()
    assert list(told) == [name(index) for index in range(LAYERS)]
    for index in range(LAYERS):
        ((_, indices_TK),) = caught[index]
        load = counted(indices_TK, mask)
        assert torch.equal(told[name(index)]["load"], load)
        assert float(told[name(index)]["maxvio"]) == pytest.approx(float(load.max() * EXPERTS - 1))
        assert told[name(index)]["verdict"].name in ("healthy", "imbalanced", "dead experts", "collapsed")


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe"])
def test_the_load_is_what_the_router_logits_say(family):
    """The logits that the model returns."""
    model, (ids, mask) = build(family), batch()
    watcher = watch(Engine("balance"), model)
    logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    told = watcher.metrics()
    for index in range(LAYERS):
        assert torch.equal(told[name(index)]["load"], counted(logits[index].topk(TOP_K).indices, mask))


@ALL
def test_without_a_mask_all_tokens_count(family):
    model, (ids, _) = build(family), batch()
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model)
    model(ids)
    assert torch.equal(watcher.metrics()[name(0)]["load"], counted(caught[0][0][1]))


@ALL
def test_the_trace_is_what_the_gates_saw(family, tmp_path):
    """Logits and choices bit for bit, mask and token ids; the trace can be replayed."""
    model, (ids, mask) = build(family), batch()
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model, record=True)
    model(input_ids=ids, attention_mask=mask)
    watcher.write_routing(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    for index, layer in enumerate(trace.layers):
        ((logits_TE, indices_TK),) = caught[index]
        (forward,) = layer.forwards
        assert torch.equal(forward.logits["expert"], logits_TE)
        assert torch.equal(forward.expert.view(-1, TOP_K).sort().values, indices_TK.sort().values)
        assert torch.equal(forward.mask.view_as(mask), mask.bool())
        assert torch.equal(forward.ids.view_as(ids), ids * mask)
        assert forward.shape == (3, 10)
    assert main(["replay", str(tmp_path / "x"), "--routers", "topk,sigmoid_topk", "--capacity", "none,1.0"]) == 0


def test_deepseeks_trace_replays_as_sigmoid_topk(tmp_path):
    """With its groups and its biases as they stood, every token chooses as it did."""
    model, (ids, mask) = build("DeepseekV3"), batch()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.num_group = layer.mlp.gate.topk_group = 1
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    watcher.write_routing(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    with_bias, without = (replay(trace, ReplayVariant("sigmoid_topk", bias))[-1] for bias in ("recorded", "none"))
    assert with_bias["agreement"] == with_bias["first"] == 1
    assert without["agreement"] < 0.95


def test_nothing_is_recorded_unless_asked(tmp_path):
    model, (ids, _) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model)
    model(ids)
    with refused("nothing-recorded", "watch(engine, model, record=True)"):
        watcher.write_routing(tmp_path / "x")


def test_forwards_add_up():
    """Until metrics are read; the mask of one forward is not that of the next."""
    model, (ids, mask) = build("Mixtral"), batch()
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model)
    model(ids, attention_mask=mask)
    model.model(ids)
    both = torch.cat([caught[0][0][1][mask.flatten().bool()], caught[0][1][1]])
    assert torch.equal(watcher.metrics()[name(0)]["load"], counted(both))
    assert watcher.metrics()[name(0)]["verdict"].name == "no data"


def test_generation_with_a_cache():
    """26 real tokens of the prompt, then three rows of one new token; the last one is not fed back."""
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True)
    model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    forwards = watcher.trace.layers[0].forwards
    assert [int(one.mask.sum()) for one in forwards] == [26, 3, 3, 3]
    assert [one.shape for one in forwards] == [(3, 10), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_count(training):
    model, (ids, mask) = build("Qwen3Moe").train(training), batch()
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert torch.equal(watcher.metrics()[name(1)]["load"], counted(caught[1][0][1], mask))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_a_recomputed_forward_counts_once(family, reentrant):
    """The gates run twice, in the forward and in the backward."""
    model, (ids, mask) = build(family).train(), batch()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model, record=True)
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    assert len(caught[0]) == 2
    assert [len(layer.forwards) for layer in watcher.trace.layers] == [1, 1]
    assert torch.equal(watcher.metrics()[name(0)]["load"], counted(caught[0][0][1], mask))


@pytest.mark.filterwarnings("ignore")  # of torch's own, about what it finds in transformers
@torch.no_grad()
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_compiled_model_is_counted(whole):
    model, (ids, mask) = build("Mixtral"), batch()
    caught = chosen_by_gates(model)
    watcher = watch(Engine("balance"), model)
    for layer in [] if whole else model.model.layers:
        layer.mlp.compile(backend="eager")
    (torch.compile(model, backend="eager") if whole else model)(ids, attention_mask=mask)
    assert torch.equal(watcher.metrics()[name(0)]["load"], counted(caught[0][0][1], mask))


# -- what is said ------------------------------------------------------------------------------------


@ALL
def test_a_collapsed_gate_is_called_collapsed(family):
    """All rows but two are turned away from every token, which all have the same first feature."""
    model, (ids, _) = build(family), batch()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _, __, out: torch.ones_like(out))
        gate.weight.fill_(-0.1)
        gate.weight[:TOP_K] = 0.1
    watcher = watch(Engine("health"), model)
    model(ids)
    told = watcher.metrics()
    assert told[name(0)]["verdict"].name == "collapsed"
    assert told[name(1)]["verdict"].name != "collapsed"


def test_no_data_is_called_no_data():
    """Before the model runs, and when all that came through was padding; never healthy, never nothing."""
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance,health"), model)
    for _ in range(2):
        told = watcher.metrics()
        assert list(told) == [name(index) for index in range(LAYERS)]
        assert all(list(one) == ["verdict"] and one["verdict"].name == "no data" for one in told.values())
        assert all(one["verdict"].severity == 1 for one in told.values())
        model(ids, attention_mask=torch.zeros_like(mask))


def test_a_metric_that_needs_more_answers_nothing(install):
    """Only a block's decisions are known: exactly the metrics that ask for weights or a state are left out."""
    install("metric", "norms", Norms)
    install("metric", "measured_norms", MeasuredNorms)
    model, (ids, _) = build("Mixtral"), batch()
    install("metric", "stateful", Stateful)
    watcher = watch(Engine("norms,measured_norms,stateful,balance"), model)
    model(ids)
    told = watcher.metrics()[name(0)]
    assert "cv" in told
    assert "norm" not in told
    assert "measured_norm" not in told
    assert "steps" not in told


@attrs.define(eq=False)
class Norms:
    """The norm of the experts' weights."""

    @hookimpl
    def moe_metrics(self, layer):
        return {"norm": layer.experts.w_in.norm()}


@attrs.define(eq=False)
class MeasuredNorms:
    """The norm of the router's rows, in each forward."""

    @hookimpl
    def moe_measure(self, layer):
        return {"norm": layer.router.weight.norm().view(1)}

    @hookimpl
    def moe_metrics(self, stats):
        return {"measured_norm": stats["measured_norms.norm"]}


@attrs.define(eq=False)
class Stateful:
    """The steps that its own state has counted."""

    @hookimpl
    def moe_state(self, spec):
        return RunningLoad(spec.experts, 0.9)

    @hookimpl
    def moe_measure(self, state):
        return {"load": state.load}

    @hookimpl
    def moe_metrics(self, stats):
        return {"steps": stats["stateful.load"].sum()}


def test_a_metric_has_a_memory(install):
    install("metric", "looks", Looks)
    model, (ids, _) = build("Mixtral"), batch()
    watcher = watch(Engine("looks"), model)
    for expected in (1, 2):
        model(ids)
        assert [told["looks"] for told in watcher.metrics().values()] == [expected] * LAYERS


@attrs.define(eq=False)
class Looks:
    """How often the metrics were read."""

    @hookimpl
    def moe_metrics(self, memory):
        memory["count"] = memory.get("count", 0) + 1
        return {"looks": memory["count"]}


def test_a_model_without_a_known_block():
    with refused("no-known-block", "Linear", "tried the 'generic' family", "moe-engine new-plugin family NAME"):
        watch(Engine("balance"), torch.nn.Linear(2, 2))


# -- what stays as it is -------------------------------------------------------------------------------


@ALL
def test_the_model_stays_as_it_is(family):
    """Outputs, gradients, weights and random draws, bit for bit; after close no hook is left."""
    ids, mask = batch()

    def seen(watched):
        model = build(family).train()
        names = [key for key, _ in model.named_modules()]
        watcher = watch(Engine("balance,health"), model) if watched else None
        torch.manual_seed(5)
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert names == [key for key, _ in model.named_modules()]
        if watcher is not None:
            watcher.close()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return [out.logits, torch.get_rng_state(), *grads, *model.state_dict().values()], list(model.state_dict())

    (plain, keys), (watched, same) = seen(False), seen(True)
    assert keys == same
    assert all(torch.equal(one, two) for one, two in zip(plain, watched, strict=True))


def test_close_ends_it():
    model, (ids, _) = build("Olmoe"), batch()
    with watch(Engine("balance"), model) as watcher:
        model(ids)
    model(ids)
    told = watcher.metrics()
    assert float(told[name(0)]["load"].sum()) == pytest.approx(1)
    assert watcher.metrics()[name(0)]["verdict"].name == "no data"


def test_two_models():
    """Of one engine, each by itself; also two watchers of one model."""
    engine, (ids, mask) = Engine("balance"), batch()
    first, second = build("Mixtral"), build("DeepseekV3", seed=1)
    one, other, again = watch(engine, first), watch(engine, second), watch(engine, first)
    first(ids, attention_mask=mask)
    assert other.metrics()[name(0)]["verdict"].name == "no data"
    assert torch.equal(one.metrics()[name(0)]["load"], again.metrics()[name(0)]["load"])
    assert engine.metrics() == {}


def test_a_part_of_a_model():
    """The model without its head, and a block alone."""
    model, (ids, mask) = build("Qwen2Moe"), batch()
    caught = chosen_by_gates(model)
    inner = watch(Engine("balance"), model.model)
    model(ids, attention_mask=mask)
    assert torch.equal(inner.metrics()["layers.1.mlp"]["load"], counted(caught[1][0][1], mask))
    block = model.model.layers[0].mlp
    alone = watch(Engine("balance"), block)
    with pytest.warns(UserWarning, match="saw no attention mask"):
        block(torch.randn(2, 5, 16))
    assert torch.equal(alone.metrics()["Qwen2MoeSparseMoeBlock"]["load"], counted(caught[0][1][1]))


def test_a_wrapped_model():
    """Its forward takes anything by keyword; padding is found there too."""
    model, (ids, mask) = build("Mixtral"), batch()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *inputs, **kwargs):
            return self.inner(*inputs, **kwargs)

    caught, wrapped = chosen_by_gates(model), Wrapped()
    watcher = watch(Engine("balance"), wrapped)
    wrapped(ids, attention_mask=mask)
    assert torch.equal(watcher.metrics()["inner.model.layers.0.mlp"]["load"], counted(caught[0][0][1], mask))


def test_embeddings_in_place_of_ids():
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True)
    model(inputs_embeds=F.embedding(ids, model.get_input_embeddings().weight), attention_mask=mask)
    (forward,) = watcher.trace.layers[0].forwards
    assert (forward.shape, forward.ids, int(forward.mask.sum())) == ((3, 10), None, 26)


def test_what_is_no_model_is_refused():
    with refused("not-a-model", "None"):
        watch(Engine("topk"), None)
