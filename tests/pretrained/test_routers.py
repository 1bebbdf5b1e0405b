"""A block's decision is what its router returned and its experts were given, whatever is around them; and the strategy
of ours that decides alike."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize

from moe_engine import Engine, watch
from moe_engine.analysis.replay import ReplayVariant, replay, variants
from moe_engine.cli import main
from moe_engine.pretrained.families import blocks_of
from moe_engine.run.traces import read_trace
from support import refused

from .tiny import ALL, EXPERTS, TOP_K, batch, build, counted, name


def decisions(model, end):
    """What the modules whose names end so returned or were given, caught by hooks of this test: [(logits, experts)]."""
    found = [module for path, module in model.named_modules() if path.endswith(end)]
    logits, choices = [], []
    for block in found:
        block.gate.register_forward_hook(lambda _, __, out: logits.append(out[0].detach().clone().float()))
        block.experts.register_forward_pre_hook(lambda _, args: choices.append((args[1].clone(), args[2].detach())))
    return logits, choices


def check(watcher, logits, choices, mask):
    """Logits bit for bit, choices, gates and padding, in every layer."""
    assert len(watcher.trace.layers) == len(logits) == len(choices) == 2
    for layer, logits_TE, (expert_TK, gate_TK) in zip(watcher.trace.layers, logits, choices, strict=True):
        (forward,) = layer.forwards
        assert torch.equal(forward.logits["expert"], logits_TE)
        assert torch.equal(forward.mask.view_as(mask), mask.bool())
        expected = torch.zeros(len(logits_TE), EXPERTS).scatter(1, expert_TK, gate_TK.float())
        given = torch.zeros_like(expected)
        given[forward.token, forward.expert] = forward.gate.float()
        assert torch.equal(given, expected)
    for told, (expert_TK, _) in zip(watcher.metrics().values(), choices, strict=True):
        assert torch.equal(told["load"], counted(expert_TK, mask))


# -- logits ----------------------------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """As PEFT adapts parameters: what is added to them is there only while the module runs."""

    def __init__(self, base_layer, parameter):
        super().__init__()
        self.base_layer, self.parameter = base_layer, parameter
        self.change = torch.nn.Parameter(0.5 * torch.randn_like(getattr(unwrapped(base_layer), parameter)))

    def forward(self, *args, **kwargs):
        parametrize.register_parametrization(unwrapped(self.base_layer), self.parameter, Added(self.change))
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parametrize.remove_parametrizations(unwrapped(self.base_layer), self.parameter, leave_parametrized=False)


class Added(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, weight):
        return weight + self.change


def unwrapped(module):
    return unwrapped(module.base_layer) if isinstance(module, Adapted) else module


def adapt(model):
    for layer in model.model.layers:
        layer.mlp.gate = Adapted(layer.mlp.gate, "weight")
        layer.mlp.experts = Adapted(Adapted(layer.mlp.experts, "down_proj"), "gate_up_proj")


@ALL
@pytest.mark.parametrize("order", ["adapted, then watched", "watched, then adapted"])
def test_adapters_around_router_and_experts(family, order):
    """Those added later take over the hooks, so that nothing is missed or counts twice."""
    model, (ids, mask) = build(family), batch()
    steps = {"adapted": lambda: adapt(model), "watched": lambda: watch(Engine("balance"), model, record=True)}
    done = {step: steps[step]() for step in order.split(", then ")}
    caught = decisions(model, ".mlp")
    model(ids, attention_mask=mask)
    check(done["watched"], *caught, mask)
    done["watched"].close()
    model(ids, attention_mask=mask)
    assert done["watched"].metrics()[name(0)]["verdict"].name == "no data"


@ALL
def test_parts_replaced_while_watched(family):
    """As PEFT's modules_to_save does, with a trained copy of the router; copies have no hooks."""
    model, (ids, mask) = build(family), batch()
    watcher = watch(Engine("balance"), model, record=True)
    for layer in model.model.layers:
        layer.mlp.gate, layer.mlp.experts = copy.deepcopy(layer.mlp.gate), copy.deepcopy(layer.mlp.experts)
        layer.mlp.gate.weight.data.neg_()
    caught = decisions(model, ".mlp")
    model(ids, attention_mask=mask)
    check(watcher, *caught, mask)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("targets", [["gate.weight"], ["gate.weight", "experts.gate_up_proj", "experts.down_proj"], []])
def test_peft(targets, late):
    """LoRA of router and experts, or a trained copy of the router."""
    peft = pytest.importorskip("peft")
    model, (ids, mask) = build("Mixtral"), batch()
    settings = (
        {"target_parameters": targets, "target_modules": []}
        if targets
        else {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}
    )
    watcher = watch(Engine("balance"), model, record=True) if late else None
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.normal_(std=0.5)
    watcher = watcher or watch(Engine("balance"), adapted, record=True)
    caught = decisions(adapted, ".mlp")
    adapted(ids, attention_mask=mask)
    check(watcher, *caught, mask)


@ALL
def test_autocast(family):
    """The logits are those in bf16 that the block used."""
    model, (ids, mask) = build(family), batch()
    caught = decisions(model, ".mlp")
    watcher = watch(Engine("balance"), model, record=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, attention_mask=mask)
    check(watcher, *caught, mask)


@ALL
def test_a_subclass_is_a_block(family):
    """Whatever its name."""
    model, (ids, mask) = build(family), batch()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Mine", (type(layer.mlp),), {})
    caught = decisions(model, ".mlp")
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    check(watcher, *caught, mask)


RETURNED = {
    "a tuple": (lambda logits, gates, choice: (logits, gates, choice), True),
    "a list, by sequence": (lambda logits, gates, choice: [logits.view(3, 10, EXPERTS), gates, choice, None], True),
    "probabilities": (lambda logits, gates, choice: (logits.softmax(-1), gates, choice), False),
}


@pytest.mark.parametrize(("returned", "exact"), RETURNED.values(), ids=RETURNED)
def test_what_a_router_may_return(returned, exact):
    """Some returned probabilities before transformers 5.10: those are logits up to a constant of each token.

    The experts are given their arguments by keyword.
    """
    model, (ids, mask) = build("Mixtral"), batch()
    raw = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: raw.append(out[0].detach()))
        layer.mlp.gate.register_forward_hook(lambda _, __, out: returned(*out))
        layer.mlp.forward = lambda x, block=layer.mlp: by_keyword(block, x)
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    for layer, logits_TE in zip(watcher.trace.layers, raw, strict=True):
        given_TE = layer.forwards[0].logits["expert"]
        assert torch.equal(given_TE, logits_TE) is exact
        assert torch.allclose(given_TE.log_softmax(-1), logits_TE.log_softmax(-1), atol=1e-5)


def by_keyword(block, x):
    _, gate_TK, expert_TK, *_ = block.gate(x)
    x_TD = x.view(-1, x.shape[-1])
    return block.experts(hidden_states=x_TD, top_k_index=expert_TK, top_k_weights=gate_TK).view_as(x)


def test_a_block_that_does_not_call_its_router():
    """It multiplies by the router's weight itself, as DeepSeek-V2 did before transformers 5.16."""
    model, (ids, mask) = build("DeepseekV2"), batch()
    inputs = []
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, block=layer.mlp: by_weight(block, x, inputs)
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    for layer, module, x in zip(watcher.trace.layers, model.model.layers, inputs, strict=True):
        expected = F.linear(x, module.mlp.gate.weight)
        assert torch.equal(layer.forwards[0].logits["expert"], expected)


def by_weight(block, x, inputs):
    inputs.append(x.detach().reshape(-1, 16))
    gate_TK, expert_TK = F.linear(inputs[-1], block.gate.weight).softmax(-1).topk(TOP_K)
    return block.experts(inputs[-1], expert_TK, gate_TK).view_as(x)


def test_a_block_of_another_kind_is_refused():
    """A subclass whose experts are not given their choices."""
    model, (ids, _) = build("Mixtral"), batch()
    block = model.model.layers[1].mlp

    def without_choices(x):
        return block.experts(x)

    block.forward = without_choices
    watcher = watch(Engine("balance"), model)
    with refused("unknown-decision", name(1), "MixtralSparseMoeBlock", "close the watcher"):
        model(ids)
    watcher.close()


# -- strategies ------------------------------------------------------------------------------------------

GROUPED = {"n_group": 4, "topk_group": 2}
LIKE = [
    ("Mixtral", {}),
    ("Mixtral", {"num_experts_per_tok": 1}),
    *(("Olmoe", {"norm_topk_prob": renorm}) for renorm in (False, True)),
    *(("Qwen2Moe", {"norm_topk_prob": renorm}) for renorm in (False, True)),
    *(("Qwen3Moe", {"norm_topk_prob": renorm, "num_experts_per_tok": 3}) for renorm in (False, True)),
    ("DeepseekV2", {"topk_method": "greedy", "routed_scaling_factor": 2.5}),
    ("DeepseekV2", {**GROUPED, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5}),
    ("DeepseekV2", {**GROUPED, "num_experts_per_tok": 4}),
    ("DeepseekV2", {"n_group": 2, "topk_group": 2}),
    ("DeepseekV3", {**GROUPED, "num_experts_per_tok": 4, "routed_scaling_factor": 1.5}),
    ("DeepseekV3", {**GROUPED, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    ("DeepseekV3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
    ("DeepseekV3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("family", "settings"), LIKE)
def test_a_trace_is_replayed_as_it_was_recorded(family, settings, tmp_path, capsys):
    """Without a word about the router: every token chooses as it did."""
    model, (ids, mask) = build(family, **settings), batch(rows=6, length=20)
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    watcher.write_routing(tmp_path / "x")
    assert main(["replay", str(tmp_path / "x")]) == 0
    assert "recorded" in capsys.readouterr().out
    trace = read_trace(tmp_path / "x")
    (variant,) = variants(trace, [], [], [], [], {})
    rows = replay(trace, variant)
    assert [row["layer"] for row in rows] == [name(0), name(1), "mean"]
    assert [(row["agreement"], row["first"]) for row in rows] == [(1, 1)] * 3


@pytest.mark.parametrize(("family", "settings"), LIKE)
def test_the_strategy_has_the_same_gates(family, settings):
    """But with one expert, where a renormalised gate is the constant 1 and ours is not."""
    model, (ids, mask) = build(family, **settings), batch(rows=6, length=20)
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=mask)
    recorded = watcher.trace.layers[0]
    spec, (forward,) = recorded.spec, recorded.forwards
    engine = Engine(f"{recorded.router},loss_free", {recorded.router: recorded.options})
    layer = engine.moe(spec.dim, 4, experts=spec.experts, top_k=spec.top_k)
    for bias in recorded.biases:
        layer.biases[0]["loss_free"].b.copy_(bias["value"])
    routing = layer.eval().decide(forward.tokens, [forward.logits["expert"]])
    then = forward.routing(spec)
    assert torch.equal(routing.chosen(), then.chosen())
    if spec.top_k > 1:
        assert torch.allclose(routing.gates(), then.gates(), atol=1e-6)


def test_a_block_without_a_strategy_is_named_by_its_class(tmp_path, capsys):
    """replay then shows what was recorded."""
    model, (ids, _) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True, family="generic")
    model(ids)
    watcher.write_routing(tmp_path / "x")
    assert main(["replay", str(tmp_path / "x")]) == 0
    assert "MixtralSparseMoeBlock" in capsys.readouterr().out
    assert replay(read_trace(tmp_path / "x"), ReplayVariant("topk"))[-1]["agreement"] == 1


def test_a_method_that_is_unknown_has_no_strategy():
    model = build("DeepseekV2", topk_method="greedy")
    model.model.layers[0].mlp.gate.topk_method = "another"
    first, second = blocks_of(model)
    assert first.family.recipe(first) is None
    assert second.family.recipe(second)[0] == "topk"
