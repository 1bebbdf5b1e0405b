"""Experts merged into one: rows, optimizer state, copies, and what is refused."""

import copy

import attrs
import pytest
import torch

import moe_engine
from moe_engine import Engine, Grown, Growth, UsageError, merging
from moe_engine.cli.progress import event
from moe_engine.contract.growth import HiddenUnits, Order
from moe_engine.contract.stats import plain
from moe_engine.growth.merging import _greedy
from moe_engine.growth.plans import plans_of
from rig import Rig, same
from support import refused

PAIR = {"parents": ((0, 2),), "drop": (0, 2)}


def merge(rig, growth=None, **more):
    growth = growth or Growth("moe", **PAIR)
    return rig.engine.grow(growth, **{"optimizers": rig.optimizer, **more})


# -- rows and state ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "drop", "origins", "added", "merged", "heirs"),
    [
        (((1, 3),), (1, 3), (0, 1, 2), (1,), {1: {1: 0.5, 3: 0.5}}, {1: 1, 3: 1}),  # it fills the first free place
        (((1, 3),), (), (0, 1, 2, 3, 1), (4,), {4: {1: 0.5, 3: 0.5}}, {}),
        (((3, 0, 1), None), (0,), (3, 1, 2, 3, None), (0, 4), {0: dict.fromkeys((3, 0, 1), 1 / 3)}, {0: 0}),
    ],
)
def test_the_plan_says_what_is_merged_where(parents, drop, origins, added, merged, heirs):
    (plan,) = plans_of(Engine("topk", experts=4).moe(6, 5), Growth("moe0", parents, drop=drop)).values()
    assert (plan.origins, plan.added, plan.merged, plan.heirs) == (origins, added, merged, heirs)


def test_merging_twins_takes_one_twins_part_out_of_the_output():
    """Gates of relu are independent: two twins add 2 g f(x), the merged expert g f(x)."""
    rig = Rig("relu")
    layer, x = rig.layer, torch.randn(9, 6)
    with torch.no_grad():
        for tensor in (layer.router.weight, *layer.experts.parameters()):
            tensor[2] = tensor[0]
    layer.eval()
    before, tokens = layer(x), layer.tokens(x)
    part = layer.route(tokens).gates()[:, :1] * layer.experts.outputs(tokens.x)[0]
    record = merge(rig)
    torch.testing.assert_close(layer(x), before - part)
    assert (record.before, record.after, record.rows) == (4, 3, (None, 1, 3))
    assert (record.parents, record.drop, record.initializer) == (((0, 2),), (0, 2), None)
    layer.train()
    rig.train(1)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.SGD])
def test_rows_and_optimizer_state_are_the_mean_of_the_parents(optimizer):
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    rig = Rig(optimizer=lambda model, lr: optimizer(model.parameters(), lr, **more)).train(4)
    named = dict(rig.layer.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    states = {name: copy.deepcopy(rig.optimizer.state[parameter]) for name, parameter in named.items()}
    bias = rig.layer.biases[0]["loss_free"].b.clone()
    saturation = rig.layer.biases[0]["saturation"].s.clone()
    merge(rig, Growth("moe", ((0, 2),), drop=(0, 2), shares={0: 3.0}))
    checked = 0
    for name, parameter in named.items():
        old = values[name]
        torch.testing.assert_close(parameter.detach(), torch.stack([0.75 * old[0] + 0.25 * old[2], old[1], old[3]]))
        for key, state in states[name].items():
            if state is not None and state.dim() and state.shape[0] == 4:
                expected = torch.stack([0.75 * state[0] + 0.25 * state[2], state[1], state[3]])
                torch.testing.assert_close(rig.optimizer.state[parameter][key], expected, msg=f"{name} {key}")
                checked += 1
    assert checked >= len(named) - 1
    mixed = torch.stack([0.75 * bias[0] + 0.25 * bias[2], bias[1], bias[3]])
    torch.testing.assert_close(rig.layer.biases[0]["loss_free"].b, mixed - mixed.mean())
    assert rig.layer.biases[0]["saturation"].s[0] == saturation.mean()  # as declared
    rig.train(2)


def test_a_weight_average_averages_its_own_rows():
    rig = Rig()
    average = torch.optim.swa_utils.AveragedModel(rig.model)
    rig.train(4)
    twin = average.module[1].experts.w_in
    old, live = twin.detach().clone(), rig.layer.experts.w_in.detach().clone()
    assert not torch.equal(old, live)
    merge(rig, Growth("moe", ((0, 2),), drop=(0, 2), shares={0: 3.0}), followers=average)
    torch.testing.assert_close(twin.detach()[0], 0.75 * old[0] + 0.25 * old[2])
    torch.testing.assert_close(rig.layer.experts.w_in.detach()[0], 0.75 * live[0] + 0.25 * live[2])


def test_given_rows_override_the_mean():
    rig = Rig("topk,random").train(1)
    row_D, old = torch.randn(6), rig.layer.experts.w_out.detach().clone()
    record = merge(rig, Growth("moe", ((0, 2), 1), drop=(0, 2), rows={"router.weight": torch.stack([row_D, -row_D])}))
    assert torch.equal(rig.layer.router.weight[[0, 2]], torch.stack([row_D, -row_D]))
    torch.testing.assert_close(rig.layer.experts.w_out[0], (old[0] + old[2]) / 2)
    assert (record.parents, record.initializer) == (((0, 2), 1), "random")  # the other new one is asked for
    with refused("bad-growth", "router.weight", "not finite"):
        merge(rig, Growth("moe", ((0, 2),), rows={"router.weight": row_D * torch.nan}))


def test_a_hash_table_names_the_merged_expert():
    engine = Engine("hash", experts=4, top_k=2, vocab=40)
    layer = engine.moe(6, 5, name="moe")
    old = layer.router.table.clone()
    engine.grow(Growth("moe", ((1, 2),), drop=(1, 2)))
    new = layer.router.table
    assert new.shape == old.shape and bool((new[:, 0] != new[:, 1]).all()) and {*new.flatten().tolist()} == {0, 1, 2}
    named = torch.tensor([0, 1, 1, 2])[old]  # 1 and 2 are now 1, and 3 is 2
    apart = named[:, 0] != named[:, 1]
    assert apart.any() and not apart.all()
    assert torch.equal(new[apart], named[apart])
    assert bool((new[~apart] == 1).any(1).all())


# -- the helper --------------------------------------------------------------------------------------


def test_merging_weighs_by_load():
    rig = Rig()
    old = rig.layer.experts.w_in.detach().clone()
    assert merging(rig.layer, (0, 2)).shares == {}  # no load yet
    rig.layer.sums.load_since_growth = torch.tensor([6.0, 9.0, 2.0, 9.0])
    growth = merging(rig.layer, [0, 2])
    assert (growth.parents, growth.drop, growth.shares) == (((0, 2),), (0, 2), {0: 6.0, 2: 2.0})
    merge(rig, growth)
    torch.testing.assert_close(rig.layer.experts.w_in.detach()[0], 0.75 * old[0] + 0.25 * old[2])
    assert merging(rig.layer, (0, 1), load=[0, 0, 5]).shares == {}  # neither was used
    assert merging(rig.layer, (0, 1), load=[1, 0, 5]).shares == {0: 1.0, 1: 0.0}
    with refused("bad-growth", "[3]", "[2]"):
        merging(rig.layer, (0, 1), load=[1, 2])
    with refused("bad-growth", "no expert 7"):
        merging(rig.layer, (0, 7), align=True)
    with refused("bad-growth", "numbers from 0"):
        merging(rig.layer, (0, 1), load=[-1, 2, 3])


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_aligned_experts_that_differ_by_the_order_of_their_units_merge_into_the_first(activation):
    """Weights, moments and those of a weight average; the same merge without align gives something else."""
    found = {}
    for align in (True, False):
        rig = Rig("topk", activation=activation).train(3)
        bank, order_H = rig.layer.experts, torch.tensor([3, 0, 4, 2, 1])
        average = torch.optim.swa_utils.AveragedModel(rig.model)
        orders = {"w_out": (0, order_H), "b_out": (0, torch.arange(6))}
        wide = torch.cat([order_H, order_H + 5]) if activation == "swiglu" else order_H
        orders |= {"w_in": (1, wide), "b_in": (0, wide)}
        held = [getattr(bank, name) for name in orders]
        held += [getattr(average.module[1].experts, name) for name in orders]
        held += [rig.optimizer.state[getattr(bank, name)]["exp_avg_sq"] for name in orders]
        with torch.no_grad():
            for tensor, (dim, index) in zip(held, [*orders.values()] * 3, strict=True):
                tensor[2] = tensor[0].index_select(dim, index)
        firsts = [tensor.detach()[0].clone() for tensor in held]
        y = bank.outputs(rig.x @ torch.ones(3, 6))
        torch.testing.assert_close(y[0], y[2])  # the order of the units does not matter
        merge(rig, merging(rig.layer, (0, 2), align=align), followers=average)
        held[8:] = [rig.optimizer.state[getattr(bank, name)]["exp_avg_sq"] for name in orders]
        found[align] = [torch.allclose(one.detach()[0], first) for one, first in zip(held, firsts, strict=True)]
    assert found[True] == [True] * 12
    assert found[False] == [False, True, False, False] * 3  # w_out, b_out, w_in, b_in


def test_units_are_matched_by_distance_closest_first():
    """By length alone the first unit would be matched to [0, 2.9]."""
    first, other = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.9], [1.0, 0.0]])
    assert _greedy(first, other).tolist() == [1, 0]
    assert _greedy(torch.ones(3, 2), torch.ones(3, 2)).tolist() == [0, 1, 2]  # ties end


def test_a_bank_that_says_where_its_hidden_units_are_is_aligned():
    """A stranger's bank, transposed; conv says nothing, and a subclass with one more tensor does not say enough."""
    layer = Engine("topk,conv", experts=4, top_k=2).moe(16, 5, name="moe")
    with refused("cannot-align", "'moe'", "hidden units"):
        merging(layer, (0, 1), align=True)
    rig = Rig("topk")
    bank, order_H = rig.layer.experts, torch.tensor([3, 0, 4, 2, 1])
    bank.expert_param("gain", (5, 4), fresh=torch.ones, role="in", axis=1)
    with refused("cannot-align", "'moe'", "StackedMLP"):
        merging(rig.layer, (0, 2), align=True)
    bank.hidden_units = {"w_in": HiddenUnits(2), "b_in": HiddenUnits(1), "w_out": HiddenUnits(1)}
    with refused("cannot-align"):
        merging(rig.layer, (0, 2), align=True)
    bank.hidden_units["gain"] = HiddenUnits(0)
    with torch.no_grad():
        bank.gain.normal_()
        for tensor in (bank.w_in, bank.b_in):
            tensor[2] = tensor[0].index_select(-1, order_H)
        bank.w_out[2], bank.gain[:, 2] = bank.w_out[0, order_H], bank.gain[order_H, 0]
    orders = merging(rig.layer, (0, 2), align=True).orders
    assert {name: order.dim for name, order in orders.items()} == {
        "experts.w_in": 1, "experts.b_in": 0, "experts.w_out": 0, "experts.gain": 0
    }  # fmt: skip
    assert all(torch.equal(order.of[2], order_H.argsort()) for order in orders.values())


# -- what is refused, and what is kept ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "code", "words"),
    [
        ({"parents": ((0, 9),)}, "bad-growth", "no expert 9"),
        ({"parents": ((0, True),)}, "bad-growth", "no expert True"),
        ({"parents": ((0,),)}, "bad-growth", "two different experts"),
        ({"parents": ((1, 1),)}, "bad-growth", "two different experts"),
        ({"parents": ((),)}, "bad-growth", "two different experts"),
        ({"parents": (0, (0, 1)), "drop": (0,)}, "bad-growth", "expert 0"),
        ({**PAIR, "shares": {0: -1.0}}, "bad-growth", "numbers from 0"),
        ({**PAIR, "shares": {0: 0.0, 2: 0.0}}, "bad-growth", "share 0"),
        ({**PAIR, "shares": {7: 1.0}}, "bad-growth", "no expert 7"),
        ({**PAIR, "orders": {"experts.x": Order(0, {})}}, "bad-growth", "experts.x"),
        ({**PAIR, "orders": {"experts.w_out": Order(0, {2: torch.zeros(5, dtype=int)})}}, "bad-growth", "permutation"),
        ({"parents": ((0, 1, 2, 3),), "drop": (0, 1, 2, 3)}, "bad-layer-spec", "top_k=2"),
        ({**PAIR, "require_exact": True}, "growth-not-exact", "merging or removal"),
    ],
)
def test_a_refused_merge_leaves_everything_as_it_was(growth, code, words):
    rig = Rig().train(2)
    average = torch.optim.swa_utils.AveragedModel(rig.model)
    before, copied = rig.everything(), copy.deepcopy(average.state_dict())
    with refused(code, words):
        merge(rig, Growth("moe", **growth), probe=rig.probe, followers=average)
    same(before, rig.everything())
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in copied.items())


def test_a_failure_while_committing_rolls_a_merge_back(monkeypatch):
    rig = Rig().train(2)
    before = rig.everything()
    monkeypatch.setattr(type(rig.layer), "refit", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(rig)
    same(before, rig.everything())


def test_experts_of_two_groups_or_kinds_are_not_merged():
    engine = Engine("hierarchical", ["hierarchical.groups=2"], experts=6, top_k=2)
    layer = engine.moe(6, 5, name="moe")
    with refused("bad-growth", "router.group_of", "0 and 5"):
        engine.grow(Growth("moe", ((0, 5),), drop=(0, 5)))
    engine.grow(Growth("moe", ((0, 2),), drop=(0, 2)))
    assert layer.router.group_of.tolist() == [0, 0, 1, 1, 1]
    with refused("bad-growth", "only experts"):
        engine.grow(Growth("moe", ((0, 1),), drop=(0, 1), of="group"))
    engine = Engine("topk,zero_computation", experts=6, top_k=2)
    layer = engine.moe(6, 5, name="moe")  # three MLPs, then the others
    with refused("bad-growth", "kind of expert", "0 and 4"):
        engine.grow(Growth("moe", ((0, 4),), drop=(0, 4)))
    engine.grow(Growth("moe", ((0, 1),), drop=(0, 1)))
    assert layer.experts.kind.tolist() == [0, 0, 1, 2, 3]


def test_lineage_is_kept_in_files_and_told_in_words(tmp_path):
    rig = Rig().train(1)
    record = merge(rig)
    moe_engine.save(tmp_path / "state.safetensors", model=rig.model, optimizer=rig.optimizer, engine=rig.engine)
    fresh = Rig()
    moe_engine.load(tmp_path / "state.safetensors", model=fresh.model, optimizer=fresh.optimizer, engine=fresh.engine)
    assert fresh.engine.growths == [record] and record.parents == ((0, 2),)
    same_again = Rig()
    same_again.model.load_state_dict(rig.model.state_dict())
    same_again.engine.load_state_dict(rig.engine.state_dict())
    assert same_again.engine.growths == [record]
    as_json = plain(attrs.asdict(record))  # lists for tuples
    assert Grown(**as_json) == record
    words = event(as_json)
    assert words.startswith("moe has 3 experts, 1 merged and 2 removed")


def test_a_growth_with_shares_can_be_compared_and_hashed():
    first, second = (Growth("moe", ((0, 2),), shares={0: share}) for share in (1.0, 2.0))
    assert first != second and len({first, second}) == 2 and isinstance(hash(first), int)
    with pytest.raises(UsageError):
        Growth("moe", parents=3)
