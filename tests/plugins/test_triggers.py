"""When the built-in triggers let a layer grow."""

import pytest
import torch

from moe_engine import Engine, Step, UsageError


def engine_of(plugins, settings=(), sizes=(2,)):
    torch.manual_seed(0)
    engine = Engine(plugins, settings, top_k=2)
    return engine, [engine.moe(4, 4, experts=size, name=f"m{index}") for index, size in enumerate(sizes)]


def fires(engine, losses, evaluations=None):
    """The steps at which a trigger wants something, when what it wants is done at once."""
    found = []
    for loss in losses:
        engine.step += 1
        wanted = engine.due(loss, (evaluations or {}).get(engine.step))
        if wanted:
            found.append((engine.step, [len(one.parents) for one in wanted]))
        for growth in wanted:
            engine.grow(growth)
    return found


def test_schedule_fires_exactly_at_its_steps():
    engine, (layer,) = engine_of("schedule", ["schedule.every=7", "schedule.max_experts=5"])
    assert fires(engine, [1.0] * 40) == [(7, [1]), (14, [1]), (21, [1])]
    assert layer.spec.experts == 5
    engine, (layer,) = engine_of("schedule", ["schedule.at=3,11", "schedule.count=4", "schedule.max_experts=8"])
    assert fires(engine, [1.0] * 40) == [(3, [4]), (11, [2])]
    assert layer.spec.experts == 8


def test_every_layer_grows_until_it_is_full():
    engine, layers = engine_of("schedule", ["schedule.every=5", "schedule.max_experts=4"], sizes=(2, 3))
    assert fires(engine, [1.0] * 12) == [(5, [1, 1]), (10, [1])]
    assert [layer.spec.experts for layer in layers] == [4, 4]


def test_new_experts_descend_from_the_busiest_expert():
    engine, (layer,) = engine_of("schedule", ["schedule.every=1"], sizes=(4,))
    layer.sums.load_since_growth = torch.tensor([1.0, 2.0, 9.0, 3.0])
    engine.step = 1
    (growth,) = engine.due(1.0)
    assert growth.parents == (2,)
    engine.grow(growth)
    assert layer.load_since_growth is None  # it counts anew


PLATEAU = ["loss_plateau.cooldown=10", "loss_plateau.patience=4"]


def test_a_falling_loss_lets_nothing_grow():
    engine, _ = engine_of("loss_plateau")
    assert fires(engine, [0.99**step for step in range(300)]) == []


def test_a_flat_loss_lets_a_layer_grow_after_cooldown_and_patience():
    """Of a constant loss both corrected means are that constant: every step after the cooldown is a check."""
    engine, _ = engine_of("loss_plateau", [*PLATEAU, "loss_plateau.max_experts=4"])
    assert fires(engine, [0.7] * 60) == [(14, [1]), (28, [1])]


def test_the_relative_improvement_is_that_of_the_two_means():
    """A loss that falls from 1 to 0.5 at once: slow - fast decays from then on."""
    engine, _ = engine_of("loss_plateau", ["loss_plateau.patience=4", "loss_plateau.epsilon=0.1"])
    losses = [1.0] * 50 + [0.5] * 400
    ((step, _), *_) = fires(engine, losses)
    fast = slow = 0.0
    flat, expected = 0, None
    for number, loss in enumerate(losses, 1):
        fast, slow = 0.9 * fast + 0.1 * loss, 0.99 * slow + 0.01 * loss
        a, b = fast / (1 - 0.9**number), slow / (1 - 0.99**number)
        flat = flat + 1 if number > 50 and (b - a) / b <= 0.1 else 0
        if flat == 4:
            expected = number
            break
    assert step == expected > 100


def test_the_means_begin_anew_after_a_growth():
    """Else the old, lower losses would make the bump of a growth look like a plateau."""
    engine, _ = engine_of("loss_plateau", PLATEAU)
    found = fires(engine, [0.1] * 14 + [1.0 * 0.95**step for step in range(100)])
    assert found[0] == (14, [1])
    assert all(step > 60 for step, _ in found[1:])


def test_evaluations_are_the_checks_where_that_is_asked_for():
    engine, _ = engine_of(
        "loss_plateau", ["loss_plateau.on=eval", "loss_plateau.patience=2", "loss_plateau.cooldown=0"]
    )
    evaluations = {5: 1.0, 10: 0.8, 15: 0.6, 20: 0.6, 25: 0.7, 30: 0.7, 35: 0.7, 40: 0.7}
    assert fires(engine, [0.5] * 42, evaluations) == [(25, [1]), (40, [1])]


@pytest.mark.parametrize("on", ["train", "eval"])
def test_a_loss_of_zero_is_flat(on):
    engine, _ = engine_of("loss_plateau", [*PLATEAU, f"loss_plateau.on={on}"])
    assert fires(engine, [0.0] * 15, dict.fromkeys(range(1, 16), 0.0)) == [(14, [1])]


def test_a_loss_that_is_not_finite_is_no_check_and_spoils_no_mean():
    engine, _ = engine_of("loss_plateau", PLATEAU)
    assert fires(engine, [0.7] * 14 + [float("nan")] * 3 + [0.7] * 11) == [(14, [1]), (28, [1])]


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        ("loss_plateau", ["loss_plateau.fast=0.99"], "fast=0.99 must be below slow=0.99"),
        ("schedule,loss_plateau", [], "schedule .* loss_plateau"),
        ("schedule", ["schedule.at=1,x"], "option 'at' is a list of whole numbers; '1,x' is not"),
    ],
)
def test_what_makes_no_sense_is_refused(plugins, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        engine_of(plugins, settings)


def loaded(plugins, settings, loads, sizes=(4,)):
    """The growths that a trigger wants, step by step, where the layer has the loads given."""
    engine, layers = engine_of(plugins, settings, sizes)
    found = []
    for load in loads:
        engine.step += 1
        for layer in layers:
            for state in layer.parts_of_plugins().values():
                state.after_step(Step(torch.tensor(load), {}, expert_grad=torch.tensor(load)))
        found.append([(one.parents, one.drop) for one in engine.due(1.0)])
    return found


QUICK = ["cooldown=5", "patience=3", "decay=0"]


@pytest.mark.parametrize("name", ["overload", "gradient"])
def test_the_expert_that_stays_above_the_others_gets_a_child(name):
    settings = [f"{name}.{one}" for one in QUICK]
    assert not any(loaded(name, settings, [[5.0, 5.0, 5.0, 5.0]] * 50))  # balance
    peak = loaded(name, settings, [[1.0, 1.0, 9.0, 1.0]] * 9)  # three times the mean; steps 6, 7, 8 count
    assert peak == [[]] * 7 + [[((2,), ())]] * 2
    swing = loaded(name, settings, [[1.0, 1.0, 9.0, 1.0], [1.0, 1.0, 1.0, 1.0]] * 25)
    assert not any(swing)


def test_a_dead_expert_is_replaced_by_a_child_of_the_busiest():
    settings = [f"dead_replace.{one}" for one in QUICK]
    assert not any(loaded("dead_replace", settings, [[2.0, 1.0, 1.0, 0.5]] * 50))
    assert loaded("dead_replace", settings, [[2.0, 1.0, 1.0, 0.0]] * 8)[-1] == [((0,), (3,))]
    assert not any(loaded("dead_replace", settings, [[0.0, 0.0, 0.0, 0.0]] * 50))  # no data


def test_dead_replace_revives_the_dead_expert_of_a_live_layer():
    torch.manual_seed(0)
    engine = Engine("topk,dead_replace,clone", ["dead_replace.cooldown=5", "dead_replace.patience=3"], top_k=1)
    layer = engine.moe(6, 8, experts=3, name="m")
    layer.router.weight.data[2] = -99.0 * layer.router.weight.data[:2].sum(0).sign()
    x = torch.rand(200, 6)
    layer.router.weight.data[2] = -99.0
    optimizer, loads = torch.optim.Adam(layer.parameters(), lr=0.001), []
    for _ in range(60):
        (layer(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        for growth in engine.due(1.0):
            engine.grow(growth, optimizer)
            loads.append(layer.route(layer.tokens(x)).load)
    assert [(one.before, one.after, one.drop) for one in engine.growths][:1] == [(3, 3, (2,))]
    assert loads[0][2] > 50  # about half of its parent's tokens


@pytest.mark.parametrize("forced", ["loss_free", "quantile"])
def test_overload_is_refused_with_a_bias_that_forces_equal_loads(forced):
    with pytest.raises(UsageError, match=f"overload .* {forced}"):
        Engine(f"topk,overload,{forced}", experts=4, top_k=2).moe(4, 4)


def test_novelty_gives_the_new_expert_a_row_where_no_expert_looks():
    """A threshold router whose experts look along axes 0 and 1; tokens come along axis 2 too."""
    torch.manual_seed(0)
    settings = ["novelty.cooldown=5", "novelty.patience=3", "novelty.share=0.3"]
    engine = Engine("threshold,novelty", settings, top_k=1)
    layer = engine.moe(4, 8, experts=2, name="m")
    layer.router.weight.data[:] = torch.eye(4)[:2]
    x = torch.eye(4)[torch.tensor([0, 1, 2, 2]).repeat(10)] - 0.1
    fired = []
    for _ in range(30):
        (layer(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
        layer.zero_grad()
        for growth in engine.due(1.0):
            fired.append((engine.step, growth.parents))
            engine.grow(growth)
    assert fired[0][1] == (None,) and len(fired) == 1
    row = layer.router.weight[2].detach()
    torch.testing.assert_close(row / row.norm(), (x[2] / x[2].norm()), atol=1e-4, rtol=0)
    assert layer.route(layer.tokens(x)).load[2] == 20


def test_novelty_is_quiet_where_every_token_suits_some_expert():
    settings = ["novelty.cooldown=0", "novelty.patience=1"]
    engine = Engine("topk,novelty", settings, top_k=1)
    layer = engine.moe(4, 8, experts=2)
    layer.router.weight.data *= 99  # sure of every token
    for _ in range(20):
        (layer(torch.randn(9, 4)).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
        layer.zero_grad()
        assert not engine.due(1.0)


def test_a_new_expert_gets_the_triggers_router_row_from_any_initializer():
    """The initializer gives all its other rows; where the router starts at zero, the row has length 1."""
    for router, length in (("topk", None), ("noisy_topk", 1.0)):
        torch.manual_seed(0)
        engine = Engine(f"{router},clone,novelty", ["novelty.cooldown=1", "novelty.patience=1"], top_k=1)
        layer = engine.moe(4, 8, experts=2, name="m")
        old = layer.router.weight.detach().norm(dim=-1).mean()
        layer.states["novelty"].share.fill_(0.5)
        layer.states["novelty"].direction[:] = torch.tensor([0.0, 3.0, 0.0, 4.0])
        engine.step = 5
        (growth,) = engine.due(1.0)
        assert engine.grow(growth).initializer == "clone"
        expected = torch.tensor([0.0, 0.6, 0.0, 0.8]) * (length or old)
        torch.testing.assert_close(layer.router.weight[2].detach(), expected)


def test_a_trigger_of_orphans_is_refused_where_new_experts_need_a_parent():
    with pytest.raises(UsageError, match="needs a parent"):
        Engine("hierarchical,novelty", experts=4, top_k=2).moe(4, 4)


def test_patience_begins_anew_after_a_growth():
    engine, (layer,) = engine_of("overload", ["overload.cooldown=0", "overload.patience=5"], (4,))
    layer.states["overload"].value[:] = torch.tensor([9.0, 1.0, 1.0, 1.0])
    assert fires(engine, [1.0] * 20) == [(6, [1]), (12, [1]), (18, [1])]


def test_a_dead_expert_of_a_group_is_replaced_by_a_child_of_that_group():
    settings = ["dead_replace.cooldown=0", "dead_replace.patience=1", "hierarchical.groups=2"]
    engine = Engine("hierarchical,dead_replace", settings, top_k=2)
    layer = engine.moe(4, 8, experts=4, name="m")
    layer.states["dead_replace"].value[:] = torch.tensor([9.0, 8.0, 0.0, 1.0])
    engine.step = 5
    (growth,) = engine.due(1.0)
    assert (growth.parents, growth.drop) == ((3,), (2,))
    engine.grow(growth)
    assert layer.router.group_of.tolist() == [0, 0, 1, 1]
