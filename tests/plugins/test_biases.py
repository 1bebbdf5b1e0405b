"""Biases: their laws on paper, and that they balance what they should."""

import pytest
import torch

from moe_engine import Engine
from moe_engine.contract.stats import Step


def one_step(engine, layer, x, loss=lambda y: y.square().sum()):
    layer.zero_grad()
    (loss(layer(x)) + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()


def bias_of(layer, name):
    return layer.biases[0][name]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_saturation_sums_a_power_of_gate_times_gradient_norm(power):
    engine = Engine("topk,saturation", ["saturation.decay=0", f"saturation.power={power}"], experts=4, top_k=2)
    layer = engine.moe(6, 8)
    x = torch.randn(9, 6)
    y = layer(x)
    routing = layer.route(layer.tokens(x))
    y.retain_grad()
    (y.square().sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    mass = (routing.gates() * (2 * y).norm(dim=-1)[:, None]).pow(power).sum(0)
    torch.testing.assert_close(bias_of(layer, "saturation").s, mass.detach())


def test_saturation_settles_where_load_and_gradient_say_it_should():
    """If log n = (x + b) / tau and m = n q^power, then n ~ exp((x - beta power log q) / (tau + beta))."""
    tau, beta, power = 0.5, 1.5, 0.5
    layer = Engine("topk,saturation", [f"saturation.beta={beta}"], experts=3).moe(6, 8)
    bias = bias_of(layer, "saturation")
    x, q = torch.tensor([1.0, 0.0, -0.5]), torch.tensor([1.0, 1.0, 4.0])
    for _ in range(400):
        n = ((x + bias()) / tau).softmax(0)
        bias.after_step(Step(load=n, own={}, signal=n * q.pow(power)))
    expected = ((x - beta * power * q.log()) / (tau + beta)).softmax(0)
    torch.testing.assert_close(n, expected, atol=1e-4, rtol=1e-4)


def test_saturation_is_the_centred_log_of_the_share():
    layer = Engine("topk,saturation", ["saturation.beta=2"], experts=3).moe(6, 8)
    bias = bias_of(layer, "saturation")
    bias.s[:] = torch.tensor([1.0, 1.0, 1.0])
    assert bias().tolist() == [0.0, 0.0, 0.0]
    bias.s[:] = torch.tensor([1.0, 2.0, 4.0])
    log2 = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(bias(), 2 * torch.stack([log2, 0 * log2, -log2]), atol=1e-5, rtol=1e-5)
    before = bias()
    bias.s *= 1e-9
    torch.testing.assert_close(bias(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plugin", ["saturation", "log_load"])
def test_an_idle_experts_bias_rises_by_beta_times_log_decay_a_step(plugin):
    layer = Engine(f"topk,{plugin}", [f"{plugin}.decay=0.9", f"{plugin}.beta=1"], experts=2, top_k=1).moe(2, 4)
    bias = bias_of(layer, plugin)
    bias.s[:] = torch.tensor([1.0, 1e-3])
    before = bias()
    bias.s *= torch.tensor([1.0, 0.9])
    gained = (bias() - before)[1] - (bias() - before)[0]
    torch.testing.assert_close(gained, -torch.log(torch.tensor(0.9)), atol=2e-3, rtol=0.02)


def test_saturation_does_not_see_the_scale_of_the_loss():
    def trial(scale):
        torch.manual_seed(0)
        engine = Engine("topk,saturation", experts=4)
        layer = engine.moe(6, 8)
        for _ in range(3):
            one_step(engine, layer, torch.randn(9, 6), lambda y: scale * y.square().sum())
        return bias_of(layer, "saturation")()

    torch.testing.assert_close(trial(1e4), trial(1.0), atol=1e-4, rtol=1e-4)


def test_saturation_on_weight_gradients_reads_the_mean_of_each_tensors_mean():
    engine = Engine("topk,saturation", ["saturation.signal=weights", "saturation.decay=0"], experts=4, bias=True)
    layer = engine.moe(6, 8)
    one_step(engine, layer, torch.randn(9, 6))
    tensors = [layer.experts.w_in, layer.experts.b_in, layer.experts.w_out, layer.experts.b_out]
    expected = [torch.stack([t.grad[e].abs().mean() for t in tensors]).mean() for e in range(4)]
    torch.testing.assert_close(bias_of(layer, "saturation").s, torch.stack(expected))


def test_the_published_form_follows_its_formula_and_does_nothing():
    """s <- .9 s + .1 |g|, z = logits + .5 (1 - s) in gates too; with small gradients no choice differs."""
    engine = Engine("topk,absolute_saturation", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(64, 6)
    one_step(engine, layer, x, lambda y: y.square().mean())
    grad = layer.experts.expert_grad()
    bias = bias_of(layer, "absolute_saturation")
    torch.testing.assert_close(bias.s, 0.9 * 0.5 + 0.1 * grad)
    torch.testing.assert_close(bias(), 0.5 * (1 - bias.s))
    routing = layer.route(layer.tokens(x))
    torch.testing.assert_close(routing.probs, (routing.levels[0].logits + bias()).softmax(-1))
    assert routing.levels[0].bias is None
    (_, effects), *_ = engine.probe(lambda: layer.eval()(x).square().mean()).values()
    assert effects.biases["absolute_saturation"] == 0.0


def test_weight_gradients_that_are_gone_are_an_error():
    engine = Engine("topk,saturation", ["saturation.signal=weights"], experts=4)
    layer = engine.moe(6, 8)
    (layer(torch.randn(9, 6)).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    layer.zero_grad()
    with pytest.raises(RuntimeError, match="before optimizer.zero_grad"):
        engine.after_step()


def test_log_load_follows_the_counts():
    engine = Engine("topk,log_load", ["log_load.decay=0.5"], experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(9, 6)
    load = layer.route(layer.tokens(x)).load
    one_step(engine, layer, x)
    torch.testing.assert_close(bias_of(layer, "log_load").s, 0.5 * load)


def test_loss_free_moves_by_its_rate_against_the_load():
    engine = Engine("topk,loss_free", ["loss_free.rate=0.5"], experts=4, top_k=1)
    layer = engine.moe(4, 8)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(4)
    # loads 2, 1, 1, 0: mean 1; only the first is over and only the last is under it
    one_step(engine, layer, torch.eye(4)[[0, 0, 1, 2]] * 5)
    assert bias_of(layer, "loss_free").b.tolist() == [-0.5, 0.0, 0.0, 0.5]
    one_step(engine, layer, torch.eye(4) * 50)  # even loads move nothing
    assert bias_of(layer, "loss_free").b.tolist() == [-0.5, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("plugin", "setting"),
    [("saturation", "beta=1"), ("saturation", "signal=weights"), ("log_load", "beta=1"), ("loss_free", "rate=0.05")],
)
@pytest.mark.parametrize("router", ["topk", pytest.param("hierarchical", marks=pytest.mark.long)])
def test_a_bias_balances_a_router_that_would_collapse(router, plugin, setting):
    """A common direction in the data draws all tokens to few experts; only the bias can undo that."""

    def cv(names, settings):
        torch.manual_seed(0)
        engine = Engine(names, settings, experts=8, top_k=1)
        layer = engine.moe(6, 8)
        loads = []
        for _ in range(150):
            x = torch.randn(128, 6) + 2.0
            loads.append(layer.route(layer.tokens(x)).load)
            one_step(engine, layer, x, lambda y: (y - 1).square().mean())
        load = torch.stack(loads[-20:]).sum(0)
        return float(load.std(correction=0) / load.mean())

    assert cv([router, plugin], [f"{plugin}.{setting}"]) < 0.6 * cv([router], [])


@pytest.mark.parametrize(
    ("plugin", "settings"),
    [
        ("absolute_saturation", []),
        ("saturation", ["saturation.signal=weights"]),
        ("saturation", []),
        ("log_load", []),
    ],
)
def test_a_running_mean_stays_where_it_is_in_a_step_without_data(plugin, settings):
    """It would fall for want of gradients."""
    engine = Engine(f"topk,{plugin}", settings, experts=4)
    layer = engine.moe(6, 8)
    one_step(engine, layer, torch.randn(9, 6))
    before = bias_of(layer, plugin).s.clone()
    one_step(engine, layer, torch.randn(0, 6))
    assert before.tolist() == bias_of(layer, plugin).s.tolist()


def test_biases_add_up_in_any_number():
    engine = Engine("topk,loss_free,log_load,saturation", experts=4)
    layer = engine.moe(6, 8)
    for _ in range(3):
        one_step(engine, layer, torch.randn(9, 6))
    level = layer.route(layer.tokens(torch.randn(2, 6))).levels[0]
    torch.testing.assert_close(level.bias, sum(bias() for bias in layer.biases[0].values()))


def test_quantile_is_where_each_expert_would_have_got_its_share():
    """By hand: K = 1, four tokens, two experts: beta_i is the third largest of s_ti - a_t."""
    layer = Engine("topk,quantile", experts=2, top_k=1).moe(2, 4)
    layer.router.weight.data[:] = torch.eye(2)
    scores = torch.tensor([[3.0, 0.0], [2.0, 0.0], [5.0, 1.0], [1.0, 0.0]])
    routing = layer.route(layer.tokens(scores))
    own = bias_of(layer, "quantile").measure(routing.levels[0], routing.tokens)
    # a_t, the second largest, is 0, 0, 1, 0: s - a is 3, 2, 4, 1 for the one and 0 for the other
    assert own["beta"].tolist() == [2.0, 0.0]
    one_step(Engine("topk", experts=2, top_k=1), layer, scores)  # another engine does not move it
    assert not bias_of(layer, "quantile").beta.any()


def test_quantile_balances_a_fixed_batch_in_a_few_steps_and_centres():
    torch.manual_seed(0)
    engine = Engine("topk,quantile", experts=8, top_k=2)
    layer = engine.moe(8, 4)
    layer.router.weight.data[:] = torch.eye(8)
    x, worst = torch.randn(1024, 8) + torch.linspace(0, 3, 8), []
    for _ in range(6):
        load = layer.route(layer.tokens(x)).load
        worst.append(float(load.max() / load.mean() - 1))
        one_step(engine, layer, x)
    assert worst[0] > 1 and worst[-1] < 0.05
    assert abs(float(bias_of(layer, "quantile").beta.mean())) < 1e-6


def test_quantile_leaves_padding_out_and_averages_micro_batches():
    torch.manual_seed(0)
    engine = Engine("topk,quantile", experts=4, top_k=2)
    layer = engine.moe(4, 4)
    x = torch.randn(40, 4)
    padded = torch.cat([x, torch.full((9, 4), 99.0)])
    routing = layer.route(layer.tokens(padded, torch.arange(49) < 40))
    alone = layer.route(layer.tokens(x))
    bias = bias_of(layer, "quantile")
    own, same = (bias.measure(one.levels[0], one.tokens) for one in (routing, alone))
    torch.testing.assert_close(own["beta"], same["beta"])
    for half in x.split(20):
        ((layer(half).square().sum() + engine.aux_loss()) / 2).backward()
        engine.after_backward()
    halves = [layer.route(layer.tokens(half)) for half in x.split(20)]
    mean = sum(bias.measure(one.levels[0], one.tokens)["beta"] for one in halves) / 2
    engine.after_step()
    torch.testing.assert_close(bias.beta, mean - mean.mean())


def test_quantile_of_very_few_tokens_does_not_see_padding():
    layer = Engine("topk,quantile", experts=4, top_k=3).moe(4, 4)
    bias, x = bias_of(layer, "quantile"), torch.randn(1, 4)
    alone = layer.route(layer.tokens(x))
    padded = layer.route(layer.tokens(torch.cat([x, torch.zeros(6, 4)]), torch.arange(7) < 1))
    own, same = (bias.measure(one.levels[0], one.tokens)["beta"] for one in (alone, padded))
    assert own.any()
    torch.testing.assert_close(own, same)
