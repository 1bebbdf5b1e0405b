"""Experts removed by load, gate mass or output norm: by a trigger, and in one call."""

import pytest
import torch
from torch import nn

import moe_engine
from moe_engine import Engine, UsageError, evaluating, least_experts, prune
from rig import Rig
from support import refused

BY = ("load", "gate_mass", "output_norm")


# -- which go ----------------------------------------------------------------------------------------


def test_the_least_go_first_and_a_token_can_still_choose():
    layer = Engine("topk", experts=5, top_k=2).moe(6, 5)
    value_E = torch.tensor([3.0, 1.0, 2.0, 9.0, 1.0])
    assert least_experts(layer, value_E, 3) == [1, 4]
    assert least_experts(layer, value_E, 1) == [1, 4, 2]  # two remain
    assert least_experts(layer, value_E, 5) == []
    layer = Engine("hierarchical", ["hierarchical.groups=2"], experts=6, top_k=2).moe(6, 5)
    assert layer.router.group_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert least_experts(layer, torch.tensor([1.0, 2.0, 3.0, 9.0, 8.0, 7.0]), 1) == [0, 5]  # two of each group remain


# -- the call ----------------------------------------------------------------------------------------


def expected(layer, routing, by):
    """Expert by expert, as a reader would compute it."""
    gates_TE, x_TD = routing.gates().detach(), routing.tokens.x.detach()
    if by == "load":
        return torch.stack([(gates_TE[:, e] > 0).sum() for e in range(layer.spec.experts)]).float()
    if by == "gate_mass":
        return gates_TE.sum(0)
    bank = layer.experts
    outputs = [
        torch.relu(x_TD @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]
        for e in range(layer.spec.experts)
    ]
    return torch.stack([(gates_TE[:, e] * y.norm(dim=1)).sum() for e, y in enumerate(outputs)]).detach()


@pytest.mark.parametrize("by", BY)
def test_the_experts_that_remain_are_the_best_by_the_measure(by, monkeypatch):
    monkeypatch.setattr(moe_engine.engine.pruning, "CHUNK", 10)
    rig = Rig("topk", experts=6).train(3)
    average = torch.optim.swa_utils.AveragedModel(rig.model)
    routing, _ = rig.engine.probe(rig.probe)[rig.layer]
    best = sorted(expected(rig.layer, routing, by).argsort(descending=True)[:3].tolist())
    rows = rig.layer.router.weight.detach()[best].clone()
    calls = []
    (record,) = prune(rig.engine, lambda: calls.append(1) or rig.probe(), 3, by, rig.optimizer, followers=average)
    assert (list(record.rows), len(calls), record.after) == (best, 1, 3)
    assert record.why.startswith(f"pruned by {by}, ")
    assert torch.equal(rig.layer.router.weight, rows)
    assert average.module[1].spec.experts == 3
    assert rig.engine.growths == [record]
    rig.train(2)


@pytest.mark.parametrize(("by", "kept"), [("load", (0, 1)), ("gate_mass", (1, 2)), ("output_norm", (0, 2))])
def test_the_measures_are_those_of_the_docstring(by, kept):
    """9, 5 and 2 tokens with gates 0.1, 1 and 2, and outputs of the norms 10, 0.1 and 1: each measure drops another.

    load: 9, 5, 2; gate mass: 0.9, 5, 4; output norm: 9, 0.5, 4.
    """
    engine = Engine("relu", experts=3, top_k=1)
    layer = engine.moe(3, 4, bias=True, name="moe").eval()
    with torch.no_grad():
        layer.router.weight[:] = torch.diag(torch.tensor([0.1, 1.0, 2.0]))
        layer.experts.w_out.zero_()
        layer.experts.b_out[:] = torch.tensor([[0.0, 6.0, 8.0], [0.1, 0.0, 0.0], [0.0, 0.6, -0.8]])
    x = torch.eye(3)[torch.tensor([0] * 9 + [1] * 5 + [2] * 2)]
    (record,) = prune(engine, lambda: layer(x).square().mean(), 2, by)
    assert record.rows == kept


def test_only_layers_with_more_experts_are_pruned():
    torch.manual_seed(0)
    engine = Engine("topk", top_k=2)
    model = nn.Sequential(*[engine.moe(6, 5, experts=size, name=f"m{size}") for size in (3, 6, 5)])
    x = torch.randn(50, 6)

    def probe():
        with evaluating(model):
            return model(x).square().mean()

    records = prune(engine, probe, 3, "gate_mass")
    assert [(one.layer, one.before, one.after) for one in records] == [("m6", 6, 3), ("m5", 5, 3)]
    assert prune(engine, probe, 3, "gate_mass") == []


def test_padding_counts_for_nothing():
    rig = Rig("topk", experts=4)
    mask, x = torch.arange(40) < 30, torch.randn(40, 6)
    found = []
    for tokens in (x, torch.where(mask[:, None], x, 9.0)):
        again = Rig("topk", experts=4)
        again.layer.load_state_dict(rig.layer.state_dict())

        def probe(layer=again.layer, tokens=tokens):
            with evaluating(layer):
                return layer(tokens, mask=mask).square().mean()

        (record,) = prune(again.engine, probe, 2, "output_norm", again.optimizer)
        found.append((record.rows, record.why))
    assert found[0] == found[1]


def test_what_can_not_be_pruned_is_refused_before_anything_changes():
    rig = Rig("topk", experts=4)
    calls = []

    def probe():
        calls.append(1)
        return rig.probe()

    with refused("unknown-ranking", "'size'", "output_norm"):
        prune(rig.engine, probe, 2, "size", rig.optimizer)
    for keep in (1, 0, True, 2.0):
        with refused("too-few-experts", f"keep={keep}", "from 2"):
            prune(rig.engine, probe, keep, optimizers=rig.optimizer)
    assert not calls
    with refused("nothing-to-rank", "'moe'"):  # the batch does not reach the layer
        prune(rig.engine, lambda: rig.model[0](rig.x).mean(), 2, optimizers=rig.optimizer)
    with pytest.raises(UsageError, match="AdamW"):
        prune(rig.engine, probe, 2)
    assert (rig.layer.spec.experts, rig.engine.growths) == (4, [])


# -- the trigger -------------------------------------------------------------------------------------


def dropped(by, steps, settings=(), plugins="topk,prune", **spec):
    """(step, experts removed) of a run with the trigger."""
    settings = [f"prune.by={by}", "prune.every=4", *settings]
    torch.manual_seed(0)
    engine = Engine(plugins, settings, **{"experts": 5, "top_k": 2, **spec})
    layer = engine.moe(6, 5, name="moe")
    x, found = torch.randn(64, 6), []
    with torch.no_grad():
        layer.router.weight[3] -= 2 * torch.sign(x.mean(0)) * x.mean(0).abs().sum()
    for _ in range(steps):
        (layer(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
        layer.zero_grad()
        values = {"load": layer.load_since_growth, "gate_mass": getattr(layer.state_of("prune"), "value", None)}
        for growth in engine.due(1.0):
            found.append((engine.step, growth.drop, growth.why, values))
            engine.grow(growth)
    return found, layer


@pytest.mark.parametrize("by", ["load", "gate_mass"])
def test_every_so_many_steps_the_least_expert_goes(by):
    found, layer = dropped(by, 20, ["prune.keep=3"])
    assert [step for step, *_ in found] == [4, 8]
    assert all(drop == (int(values[by].argmin()),) for _, drop, _, values in found)
    assert found[0][2] == f"prune: expert {found[0][1][0]} has the least {by}"
    assert layer.spec.experts == 3
    routing = layer.route(layer.tokens(torch.randn(7, 6)))
    assert routing.load.shape == (3,)


def test_a_layer_keeps_as_many_as_a_token_chooses():
    _, layer = dropped("load", 40, ["prune.keep=1"])
    assert layer.spec.experts == 2


def test_gate_mass_is_that_since_the_last_growth():
    """The sum over four steps of one batch is four times that of one."""
    found, layer = dropped("gate_mass", 5, ["prune.keep=2"])
    ((_, _, _, values),) = found
    torch.testing.assert_close(values["gate_mass"].sum(), torch.tensor(4.0 * 64))  # gates sum to 1
    assert layer.state_of("prune").value.shape == (4,)
    torch.testing.assert_close(layer.state_of("prune").value.sum(), torch.tensor(64.0))  # one step after the growth


def test_by_output_norm_an_expert_with_small_outgoing_weights_goes():
    engine = Engine("topk,prune", ["prune.by=output_norm", "prune.keep=2"], experts=4, top_k=2)
    layer = engine.moe(6, 5, name="moe")
    layer.state_of("prune").value[:] = torch.tensor([4.0, 4.0, 3.0, 4.0])
    with torch.no_grad():
        layer.experts.w_out[:] = 1.0
        layer.experts.w_out[1] = 0.5
    engine.step = 100
    (growth,) = engine.due(1.0)
    assert growth.drop == (1,)  # 4 x 0.5 < 3 x 1


def test_equal_values_rank_nobody_and_equalised_loads_are_refused():
    engine = Engine("topk,prune", experts=6, top_k=2)
    layer = engine.moe(6, 5, name="moe")
    engine.step = 100
    assert engine.due(1.0) == []  # no load yet
    layer.sums.load_since_growth = torch.full((6,), 3.0)
    engine.step = 200
    assert engine.due(1.0) == []
    with refused("mix-refused", "prune.by=load", "loss_free"):
        Engine("topk,prune,loss_free", experts=4, top_k=2).moe(6, 5)
    Engine("topk,prune,loss_free", ["prune.by=gate_mass"], experts=4, top_k=2).moe(6, 5)
