"""Sums, signals and auxiliary gradients arrive exactly once, even if a forward runs twice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_engine import Engine
from support import on_ranks

PLUGINS = ["topk", "saturation", "loss_free", "switch_aux", "z_loss"]


class TwoLayers(nn.Module):
    """Two MoE layers, each called through `wrap`: directly, or under activation checkpointing."""

    def __init__(self, engine, wrap):
        super().__init__()
        self.first, self.second, self.wrap = engine.moe(6, 8), engine.moe(6, 8), wrap

    def forward(self, x):
        return self.wrap(self.second, self.wrap(self.first, x))


def plain(layer, x):
    return layer(x)


def reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def non_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def build(wrap, router="topk"):
    torch.manual_seed(0)
    engine = Engine([router, *PLUGINS[1:]], experts=4, top_k=2)
    return engine, TwoLayers(engine, wrap)


def batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(9, 6, generator=random).requires_grad_() for _ in range(3)]


def one_step(engine, model, micro_batches, scale=1.0):
    """(gradients, the step's sums, the biases' states after it) of one optimizer step."""
    model.zero_grad()
    for x in micro_batches:
        loss = (model(x).square().mean() + engine.aux_loss()) / len(micro_batches)
        (loss * scale).backward()
        engine.after_backward()
    sums = [layer.sums.step.grad.clone() for layer in engine.layers]
    grads = [p.grad / scale for p in model.parameters()]
    engine.after_step()
    return grads, sums, [b for layer in engine.layers for b in layer.biases.buffers()]


@pytest.mark.parametrize("wrap", [reentrant, non_reentrant])
@pytest.mark.parametrize("router", ["topk", "sigmoid_topk", "hierarchical"])
def test_checkpointing_counts_once(wrap, router):
    expected = one_step(*build(plain, router), batches())
    assert sum(expected[1][0][1:5]) == 3 * 9 * 2
    torch.testing.assert_close(one_step(*build(wrap, router), batches()), expected)


@pytest.fixture
def autocast_left():
    """Leave autocast afterwards: checkpointing's early stop skips the plain call by which Dynamo's eager backend does.

    Otherwise later tests would use the weights that autocast has cast and cached.
    """
    yield
    depth = torch.autocast_increment_nesting()
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


@pytest.mark.usefixtures("autocast_left")
@pytest.mark.parametrize(
    ("router", "wrap", "backend"),
    [
        pytest.param(router, wrap, backend, marks=[] if quick else pytest.mark.long)
        for router in ("topk", "sigmoid_topk", "hierarchical")
        for wrap in (plain, non_reentrant)
        for backend in ("eager", "aot_eager")
        for quick in [(router, wrap, backend) == ("topk", non_reentrant, "eager")]
    ],
)
def test_a_compiled_layer_counts_once_also_under_checkpointing(router, wrap, backend):
    expected = one_step(*build(plain, router), batches())
    torch._dynamo.reset()
    engine, model = build(wrap, router)
    model.first.compile(fullgraph=True, backend=backend)
    model.second.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(one_step(engine, model, batches()), expected)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "spec",
    [
        {"activation": "swiglu", "bias": True, "shared": 1, "capacity": 1.0},
        *(pytest.param({"top_k": top_k}, marks=pytest.mark.long) for top_k in (1, 2, 4)),
    ],
)
def test_a_compiled_layer_agrees_for_every_kind_of_layer(spec, backend):
    def trial(compiled):
        torch.manual_seed(0)
        engine = Engine(PLUGINS, **{"experts": 4, "top_k": 2, **spec})
        layer = engine.moe(6, 8)
        if compiled:
            torch._dynamo.reset()
            layer.compile(fullgraph=True, backend=backend)
        x = torch.randn(2, 7, 6)
        mask = torch.arange(7).expand(2, 7) < 5
        y = layer(x, mask)
        (y.square().mean() + engine.aux_loss()).backward()
        return y, [p.grad for p in layer.parameters()], layer.sums.step.grad

    torch.testing.assert_close(trial(True), trial(False))


def test_checkpointing_inside_a_compiled_model_counts_once():
    expected = one_step(*build(plain), batches())
    torch._dynamo.reset()
    engine, model = build(non_reentrant)
    torch.testing.assert_close(one_step(engine, torch.compile(model, backend="aot_eager"), batches()), expected)


def test_accumulated_micro_batches_are_one_step():
    """Three micro-batches with loss / 3 give the gradients of the mean, and one controller step on all counts."""
    engine, model = build(plain)
    grads, sums, _ = one_step(engine, model, batches())
    alone = [one_step(*build(plain), [x]) for x in batches()]
    torch.testing.assert_close(grads, [sum(parts) / 3 for parts in zip(*(step[0] for step in alone), strict=True)])
    assert sums[0][:5].tolist() == sum(step[1][0][:5] for step in alone).tolist()
    rate = engine.plugins.active["loss_free"].rate
    assert (model.first.biases[0]["loss_free"].b.abs() <= 2 * rate).all()


def test_the_scale_of_the_loss_reaches_the_auxiliary_gradient():
    expected = one_step(*build(plain), batches())[0]
    torch.testing.assert_close(one_step(*build(plain), batches(), scale=1024.0)[0], expected)


def test_aux_gradient_is_the_weighted_mean_over_layers():
    engine, model = build(plain)
    x = torch.randn(9, 6)
    (0 * model(x).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    found = [p.grad.clone() for p in model.first.router.parameters()]
    model.zero_grad()
    routing = model.first.route(model.first.tokens(x))
    terms = model.first.aux_terms(routing)
    # the first layer's terms, and the second layer's, whose gradient reaches the first through its output
    hidden = model.first(x)
    second = model.second.aux_terms(model.second.route(model.second.tokens(hidden)))
    total = sum(model.first.weight_of(n) * v for n, v in terms.items()) + sum(
        model.second.weight_of(n) * v for n, v in second.items()
    )
    (total / 2).backward()
    torch.testing.assert_close(found, [p.grad for p in model.first.router.parameters()])


def test_grad_scaler_and_clipping():
    """Scaling, unscaling and clipping give the step of plain training."""

    def trial(scaled):
        engine, model = build(plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        for x in batches():
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean() + engine.aux_loss()).backward()
            engine.after_backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            engine.after_step()
        return [p.detach() for p in model.parameters()], [b for layer in engine.layers for b in layer.biases.buffers()]

    plain_weights, plain_states = trial(False)
    weights, states = trial(True)
    torch.testing.assert_close(weights, plain_weights)
    ratio = states[0] / plain_states[0]  # the signal's scale, to which saturation is invariant
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    torch.testing.assert_close(states[1], plain_states[1])


def test_a_skipped_step_moves_no_state_and_counts_nothing():
    engine, model = build(plain)
    before = [b.clone() for layer in engine.layers for b in layer.biases.buffers()]
    (model(batches()[0]).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step(skipped=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.first.biases.buffers(), strict=False))
    assert model.first.sums.step.grad is None
    assert engine.metrics() == {}


def test_an_infinite_loss_reaches_no_state():
    engine, model = build(plain)
    (model(batches()[0]).sum() * torch.inf + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert all(torch.isfinite(b).all() for layer in engine.layers for b in layer.biases.buffers())


def test_a_forgotten_aux_loss_is_an_error():
    engine, model = build(plain)
    model(batches()[0]).sum().backward()
    engine.after_backward()
    with pytest.raises(RuntimeError, match="aux_loss"):
        engine.after_step()


def test_a_forgotten_after_backward_is_an_error():
    engine, model = build(plain)
    (model(batches()[0]).sum() + engine.aux_loss()).backward()
    with pytest.raises(RuntimeError, match="after_backward"):
        engine.after_step()


def test_two_engines_are_independent():
    (engine, model), (idle_engine, idle_model) = build(plain), build(plain)
    (model(batches()[0]).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    idle_engine.after_step()
    assert idle_engine.metrics() == {}
    assert list(engine.metrics()) == ["moe0", "moe1"]
    assert idle_model.first.router.weight.grad is None


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_a_compiled_layer_counts_in_evaluation(backend):
    torch._dynamo.reset()
    _, model = build(plain)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for x in batches():
            compiled(x)
    assert model.first.sums.take_evaluated()["tokens"] == 27


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo itself reads it when it resumes
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_a_layer_that_breaks_the_graph_counts_once(backend):
    """The graph after the break begins with the Ledger."""

    def trial(compiled):
        torch.manual_seed(0)
        torch._dynamo.reset()
        engine = Engine(PLUGINS, top_k=2)
        layer = engine.moe(6, modules=[nn.Linear(6, 6) for _ in range(3)])
        run = torch.compile(layer, backend=backend) if compiled else layer
        (run(torch.randn(9, 6)).square().sum() + engine.aux_loss()).backward()
        engine.after_backward()
        return layer.router.weight.grad, layer.sums.step.grad

    torch.testing.assert_close(trial(True), trial(False))


def test_the_output_may_be_changed_in_place():
    engine, model = build(plain)
    y = model(torch.randn(5, 6))
    y += 1
    (torch.relu_(y).sum() + engine.aux_loss()).backward()
    assert model.second.sums.step.grad is not None


def test_two_forwards_may_come_before_two_backwards():
    engine, model = build(plain)
    two_batches = batches()[:2]
    losses = [model(x).square().mean() + engine.aux_loss() for x in two_batches]
    for loss in losses:
        loss.backward()
        engine.after_backward()
    found = [p.grad.clone() for p in model.parameters()], [layer.sums.step.grad.clone() for layer in engine.layers]
    engine, model = build(plain)
    for x in two_batches:
        (model(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
    torch.testing.assert_close(
        found, ([p.grad for p in model.parameters()], [layer.sums.step.grad for layer in engine.layers])
    )


@pytest.mark.parametrize(
    ("plugin", "settings"), [("absolute_saturation", []), ("saturation", ["saturation.signal=weights"])]
)
def test_a_gradient_that_is_not_finite_reaches_no_state(plugin, settings):
    engine = Engine(f"topk,{plugin}", settings, experts=4)
    layer = engine.moe(4, 8)
    (layer(torch.randn(9, 4)).sum() * torch.nan + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert layer.biases[0][plugin].s.isfinite().all()


def test_counts_and_states_are_exact_whatever_the_default_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        engine = Engine("topk,saturation,loss_free,switch_aux", experts=4, top_k=1)
        layer = engine.moe(6, 8)
        (layer(torch.randn(1001, 6)).sum() + engine.aux_loss()).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.sums.step.grad[0] == 1001
    assert {b.dtype for b in layer.biases.buffers()} == {torch.float32}


def test_a_copy_that_was_not_attached_is_an_error():
    engine, model = build(plain)
    other = copy.deepcopy(model)
    (other(batches()[0]).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    with pytest.raises(RuntimeError, match="engine.attach"):
        engine.after_step()
    engine.attach(other)
    (other(batches()[0]).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert list(engine.metrics()) == ["first", "second"]


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine, model = build(plain)
    parallel = nn.parallel.DistributedDataParallel(model)
    random = torch.Generator().manual_seed(rank)
    for step in range(3):
        x = torch.randn(4 + rank + step, 6, generator=random)
        (parallel(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
    tokens = model.first.sums.take_since_log()["tokens"].item()
    model.eval()(torch.randn(3 + rank, 6))
    evaluated = model.first.sums.take_evaluated()["tokens"].item()
    torch.save([tokens, evaluated, *model.first.biases.buffers()], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_sum_their_counts_and_keep_equal_states(tmp_path):
    on_ranks(_process, str(tmp_path))
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert first[:2] == second[:2] == [(4 + 5 + 6) + (5 + 6 + 7), 3 + 4]
    torch.testing.assert_close(first[2:], second[2:], rtol=0, atol=0)
