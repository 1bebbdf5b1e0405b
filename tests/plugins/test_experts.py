"""Banks of experts: each held against a plain loop over its experts, grown, saved, loaded and run."""

import json
from math import isqrt

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moe_engine import ACTIVATIONS, Engine, Experts, Growth, UsageError, adam, load, save
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from support import refused

DIM, HIDDEN = 18, 6  # two channels of 3 x 3 pixels
SETTINGS = {
    "lora": ["lora.rank=2", "lora.alpha=3"],
    "conv": ["conv.channels=2", "conv.hidden=4"],
    "convnet": ["convnet.channels=2", "convnet.hidden=4"],
    "upcycle": ["upcycle.file=dense.safetensors"],
    "deep_mlp": ["deep_mlp.hidden=7,5", "deep_mlp.norm=yes"],
}
BANKS = list(SETTINGS)
KINDS = [(name, act, bias) for name in BANKS for act in ACTIVATIONS for bias in (False, True)]
KINDS.remove(("upcycle", "swiglu", True))
kinds = pytest.mark.parametrize(("name", "act", "bias"), KINDS)
banks = pytest.mark.parametrize("name", BANKS)
few_banks = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if at > 1 else ()) for at, name in enumerate(BANKS)]
)


@pytest.fixture(autouse=True)
def dense(tmp_path, monkeypatch):
    """The tensors of a dense network, in dense.safetensors of the folder in which each test runs."""
    monkeypatch.chdir(tmp_path)
    matrices = {"w_in": (HIDDEN, DIM), "w_gate": (HIDDEN, DIM), "w_out": (DIM, HIDDEN)}
    shapes = {**matrices, "b_in": (HIDDEN,), "b_out": (DIM,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, "dense.safetensors")
    return tensors


def build(name, plugins="topk,clone", settings=(), experts=4, **spec):
    """(engine, layer) with a bank of that name."""
    engine = Engine(f"{plugins},{name}", [*SETTINGS[name], *settings], experts=experts, **{"top_k": 2, **spec})
    return engine, engine.moe(DIM, HIDDEN, name="moe")


def shaken(bank):
    """The bank in float64, all of its weights drawn: what is 0 at birth hides mistakes."""
    bank.double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


# -- the formulas ------------------------------------------------------------------------------------


def mlp(x, act, w_in, b_in, w_out, b_out):
    b_in, b_out = 0 if b_in is None else b_in, 0 if b_out is None else b_out
    return ACTIVATIONS[act](x @ w_in + b_in) @ w_out + b_out


def lora_expert(bank, e, x, act):
    """With W_e built: W + 3/2 A_e B_e."""
    w_in = bank.base_in.weight.t() + 1.5 * bank.a_in[e] @ bank.b_in[e]
    w_out = bank.base_out.weight.t() + 1.5 * bank.a_out[e] @ bank.b_out[e]
    return mlp(x, act, w_in, bank.base_in.bias, w_out, bank.base_out.bias)


def conv(x, w, b):
    """PyTorch's own convolution, whose weights are [after, before, k, k]."""
    k = isqrt(w.shape[0] // x.shape[1])
    return F.conv2d(x, w.t().unflatten(1, (-1, k, k)), b, padding=k // 2)


def by_channel(act, hidden):
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate) * up if act == "swiglu" else ACTIVATIONS[act](hidden)


def conv_expert(bank, e, x, act):
    b_in, b_out = (None if b is None else b[e] for b in (bank.b_in, bank.b_out))
    return conv(by_channel(act, conv(x.view(-1, 2, 3, 3), bank.k_in[e], b_in)), bank.k_out[e], b_out).flatten(1)


def convnet_expert(bank, e, x, act):
    """3 x 3 pixels are pooled to one."""
    b_0, b_out = (bank.get_parameter(name)[e] if hasattr(bank, name) else None for name in ("b_0", "b_out"))
    pooled = F.max_pool2d(by_channel(act, conv(x.view(-1, 2, 3, 3), bank.k_0[e], b_0)), 2)
    return F.linear(pooled.flatten(1), bank.out[e].t(), b_out)


def stacked_expert(bank, e, x, act):
    b_in, b_out = (None if b is None else b[e] for b in (bank.b_in, bank.b_out))
    return mlp(x, act, bank.w_in[e], b_in, bank.w_out[e], b_out)


def deep_expert(bank, e, x, act):
    """Two hidden layers, with PyTorch's own layer_norm."""
    for i in range(2):
        x = x @ bank.get_parameter(f"w_{i}")[e] + (bank.get_parameter(f"b_{i}")[e] if hasattr(bank, f"b_{i}") else 0)
        gain, shift = (bank.get_parameter(f"{name}_{i}")[e] for name in ("gain", "shift"))
        x = ACTIVATIONS[act](F.layer_norm(x, x.shape[-1:], gain, shift))
    return x @ bank.w_2[e] + (bank.b_2[e] if hasattr(bank, "b_2") else 0)


ONE = {
    "lora": lora_expert,
    "conv": conv_expert,
    "convnet": convnet_expert,
    "upcycle": stacked_expert,
    "deep_mlp": deep_expert,
}


@kinds
def test_outputs_and_gradients_are_those_of_a_plain_loop(name, act, bias):
    """Of 5, 0, 1 and 3 rows, and two that belong to no expert and come back as exactly 0."""
    bank = shaken(build(name, activation=act, bias=bias)[1].experts)
    x = torch.randn(11, DIM, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(11, DIM, dtype=torch.float64)
    parts = [ONE[name](bank, e, rows, act) for e, rows in enumerate(x.split([5, 0, 1, 3, 2])[:4])]
    expected = torch.cat([*parts, torch.zeros(2, DIM)])
    found = bank(x, torch.tensor([5, 0, 1, 3]))
    torch.testing.assert_close(found, expected)
    assert not found[9:].any()
    leaves = [x, *bank.parameters()]
    grads = [torch.autograd.grad((y * towards).sum(), leaves, retain_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_windows_of_every_size(kernel):
    """Also of those that are wider than the picture."""
    bank = shaken(build("conv", settings=[f"conv.kernel={kernel}"])[1].experts)
    x = torch.randn(6, DIM, dtype=torch.float64)
    expected = torch.stack([conv_expert(bank, e, x, "relu") for e in range(4)])
    torch.testing.assert_close(bank.outputs(x), expected)


@kinds
def test_outputs_are_those_of_every_expert_on_the_same_tokens(name, act, bias):
    bank = shaken(build(name, activation=act, bias=bias)[1].experts)
    x = torch.randn(5, DIM, dtype=torch.float64)
    expected = torch.stack([ONE[name](bank, e, x, act) for e in range(4)])
    torch.testing.assert_close(bank.outputs(x), expected)
    assert bank.outputs(x[:0]).shape == (4, 0, DIM)


@banks
def test_expert_grad_is_the_mean_over_an_experts_own_tensors(name):
    """What is shared belongs to no expert; an expert without tokens has 0."""
    bank = shaken(build(name, bias=True)[1].experts)
    assert bank.expert_grad().tolist() == [0, 0, 0, 0]
    bank(torch.randn(6, DIM, dtype=torch.float64), torch.tensor([3, 0, 2, 1])).square().sum().backward()
    own = {
        "lora": ("a_in", "a_out", "b_in", "b_out"),
        "conv": ("k_in", "k_out", "b_in", "b_out"),
        "convnet": ("k_0", "b_0", "out", "b_out"),
        "upcycle": ("w_in", "w_out", "b_in", "b_out"),
        "deep_mlp": ("w_0", "w_1", "w_2", "b_0", "b_1", "b_2", "gain_0", "gain_1", "shift_0", "shift_1"),
    }[name]
    grads = [getattr(bank, tensor).grad for tensor in own]
    expected = [sum(float(grad[e].abs().mean()) for grad in grads) / len(own) for e in range(4)]
    assert bank.expert_grad().tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[1] == 0 < expected[0]


def test_expert_grad_of_one_number_an_expert_and_of_another_axis():
    class Scales(Experts):
        def __init__(self):
            super().__init__()
            self.expert_param("scale", (3,), fresh=lambda shape, generator=None: torch.ones(shape), role="output")
            self.expert_param("w", (2, 3), fresh=lambda shape, generator=None: torch.ones(shape), role="in", axis=1)

    bank = Scales()
    bank.scale.grad = torch.tensor([1.0, -2.0, 0.0])
    bank.w.grad = torch.tensor([[2.0, 0.0, 4.0], [-4.0, 0.0, 4.0]])
    assert bank.expert_grad().tolist() == [2.0, 1.0, 2.0]


def test_a_shared_mlp_that_is_not_trained_gets_no_gradient():
    _, layer = build("lora", settings=["lora.train_base=false"], bias=True)
    layer(torch.randn(9, DIM)).square().sum().backward()
    trained = {name for name, parameter in layer.experts.named_parameters() if parameter.requires_grad}
    assert trained == {"a_in", "b_in", "a_out", "b_out"}
    assert layer.experts.base_in.weight.grad is None


# -- growth, states, precision ---------------------------------------------------------------------


def trained(name, initializer="clone", steps=3, **spec):
    engine, layer = build(name, f"topk,switch_aux,{initializer}", **spec)
    optimizer = adam(layer, 1e-2)
    for _ in range(steps):
        step(engine, layer, optimizer)
    return engine, layer, optimizer


def step(engine, layer, optimizer):
    (layer(torch.randn(32, DIM)).square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "initializer", ["clone", *(pytest.param(name, marks=pytest.mark.long) for name in ("random", "split"))]
)
@kinds
def test_a_bank_grows_and_learns_on(name, act, bias, initializer):
    """Old experts stay bit for bit (except a parent that `split` moves); the new expert is the initializer's."""
    engine, layer, optimizer = trained(name, initializer, activation=act, bias=bias)
    x = torch.randn(7, DIM)
    before = layer.experts.outputs(x).detach()
    engine.grow(Growth("moe", (1,)), optimizer)
    after = layer.experts.outputs(x).detach()
    kept = [0, 2, 3] if initializer == "split" else [0, 1, 2, 3]
    assert (len(after), torch.equal(after[kept], before[kept])) == (5, True)
    far = float((after[4] - before[1]).norm() / before[1].norm())
    assert far > 0.2 if initializer == "random" and name != "lora" else 0 < far < 0.5
    for _ in range(2):
        step(engine, layer, optimizer)
    engine.grow(Growth("moe", drop=(0, 4)), optimizer)
    step(engine, layer, optimizer)
    assert layer.experts.outputs(x).shape == (3, 7, DIM)


@pytest.mark.parametrize("initializer", ["exclusive_split", "partial_reinit"])
@pytest.mark.parametrize("name", ["lora", "conv", "convnet", "deep_mlp"])
def test_initializers_that_split_hidden_units_are_refused_where_these_are_not_rows(name, initializer):
    engine, _, optimizer = trained(name, initializer)
    with refused("unsupported-experts", initializer):
        engine.grow(Growth("moe", (1,)), optimizer)


def test_a_new_expert_of_lora_that_is_drawn_is_the_shared_mlp():
    engine, layer, optimizer = trained("lora", "random")
    engine.grow(Growth("moe", (1,)), optimizer)
    bank, x = layer.experts, torch.randn(7, DIM)
    torch.testing.assert_close(bank.outputs(x)[4], bank.base_out(bank.base_in(x).relu()))
    assert bank.a_in[4].any()
    assert not bank.b_in[4].any()


@banks
def test_a_state_comes_back_at_another_number_of_experts(name, tmp_path):
    engine, layer, optimizer = trained(name, bias=True)
    engine.grow(Growth("moe", (1, 2)), optimizer)
    step(engine, layer, optimizer)
    save(tmp_path / "state.safetensors", model=layer, optimizer=optimizer, engine=engine)
    other, twin, optimizer_too = trained(name, bias=True, steps=0)
    load(tmp_path / "state.safetensors", model=twin, optimizer=optimizer_too, engine=other)
    x = torch.randn(9, DIM)
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    assert twin.experts.state_dict().keys() == layer.experts.state_dict().keys()
    for one, opt, run in ((layer, optimizer, engine), (twin, optimizer_too, other)):
        torch.manual_seed(1)
        step(run, one.train(), opt)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@kinds
def test_any_precision(name, act, bias, dtype):
    """Near what float64 answers; gradients are finite and of the layer's own precision."""
    layer = build(name, activation=act, bias=bias)[1].double()
    x = torch.randn(3, 5, DIM).to(dtype).double()
    expected = layer.eval()(x)
    found = layer.to(dtype)(x.to(dtype))
    found.float().square().mean().backward()
    close = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    assert found.dtype == dtype
    if dtype != torch.bfloat16:  # whose rounded weights may choose other experts
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in layer.experts.parameters())


@banks
def test_autocast(name):
    layer = build(name, bias=True)[1]
    x = torch.randn(15, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.1, atol=0.1)


@banks
def test_no_token_and_experts_without_tokens_are_safe(name):
    layer = build(name, bias=True)[1]
    assert layer(torch.zeros(0, DIM)).shape == (0, DIM)
    layer(torch.randn(1, DIM)).sum().backward()  # two of four experts have none
    assert all(parameter.grad.isfinite().all() for parameter in layer.experts.parameters())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
@few_banks
def test_the_forward_compiles_whole(name, backend):
    """Values and gradients are those of the eager forward."""
    layer = build(name, bias=True)[1].double()
    x, parameters = torch.randn(16, DIM, dtype=torch.float64), list(layer.experts.parameters())
    eager, compiled = layer(x), torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(compiled, eager)
    expected, found = (torch.autograd.grad(y.square().sum(), parameters) for y in (eager, compiled))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["lora", "conv", "convnet", "deep_mlp"])
def test_another_output_width(name):
    engine = Engine(f"topk,{name}", SETTINGS[name], experts=4, top_k=2)
    assert engine.moe(DIM, HIDDEN, out=27)(torch.randn(5, DIM)).shape == (5, 27)


# -- deep experts ------------------------------------------------------------------------------------


def test_a_published_perceptron_has_its_weights():
    """784-128-64-10 with biases: 784*128 + 128 + 128*64 + 64 + 64*10 + 10 = 109,386 for each of three."""
    bank = Engine("topk,deep_mlp", experts=3).moe(784, 1, out=10, bias=True).experts
    assert sum(p.numel() for p in bank.parameters()) == 3 * 109_386


def test_dropout_drops_a_share_in_training_alone():
    """1000 hidden units of 1: 700 of 1/0.7 are left, give or take four deviations of 14.5; all of 1 in evaluation."""
    settings = ["deep_mlp.hidden=1000", "deep_mlp.dropout=0.3", "deep_mlp.norm=no"]
    bank = build("deep_mlp", settings=settings)[1].experts
    with torch.no_grad():
        bank.w_0.fill_(1 / DIM)
        bank.w_1.fill_(1)
    x, counts = torch.ones(4, DIM), torch.tensor([1, 1, 1, 1])
    torch.testing.assert_close(bank.eval()(x, counts), torch.full((4, DIM), 1000.0))
    left = 0.7 * bank.train()(x, counts)[:, 0]
    torch.testing.assert_close(left, left.round(), atol=0.01, rtol=0)
    assert 642 < left.min() < left.max() < 758


def test_its_own_activation_comes_before_the_layers():
    bank = build("deep_mlp", settings=["deep_mlp.activation=swiglu"], activation="relu")[1].experts
    assert (bank.w_0.shape, bank.w_1.shape, bank.w_2.shape) == ((4, DIM, 14), (4, 7, 10), (4, 5, DIM))


def test_a_convnet_of_colour_pictures_is_pytorchs():
    """8 x 8 in three colours, 4 and 6 channels, 2 x 2 pixels left: 24 -> 10 classes."""
    layer = Engine("topk,convnet", ["convnet.channels=3", "convnet.hidden=4,6"], experts=2).moe(
        192, 1, out=10, bias=True
    )
    bank, x = layer.experts, torch.randn(5, 192)
    hidden = x.view(5, 3, 8, 8)
    for i in range(2):
        weight, bias = bank.get_parameter(f"k_{i}")[1], bank.get_parameter(f"b_{i}")[1]
        hidden = F.max_pool2d(conv(hidden, weight, bias).relu(), 2)
    expected = hidden.permute(0, 2, 3, 1).flatten(1) @ bank.out[1] + bank.b_out[1]
    torch.testing.assert_close(bank.outputs(x)[1], expected)


# -- upcycling ---------------------------------------------------------------------------------------


def dense_answer(dense, x, act, bias):
    if act == "swiglu":
        return F.linear(F.silu(F.linear(x, dense["w_gate"])) * F.linear(x, dense["w_in"]), dense["w_out"])
    b_in, b_out = (dense["b_in"], dense["b_out"]) if bias else (None, None)
    return F.linear(ACTIVATIONS[act](F.linear(x, dense["w_in"], b_in)), dense["w_out"], b_out)


@pytest.mark.parametrize(("act", "bias"), [("relu", False), ("relu", True), ("gelu", True), ("swiglu", False)])
@pytest.mark.parametrize("top_k", [2, 4])
def test_a_layer_at_birth_is_the_dense_network(dense, act, bias, top_k):
    """topk with two or more choices has gates that sum to 1."""
    names = ["upcycle.b_in=b_in", "upcycle.b_out=b_out"] if bias else []
    _, layer = build("upcycle", settings=names, activation=act, bias=bias, top_k=top_k)
    x = torch.randn(40, DIM)
    expected = dense_answer(dense, x, act, bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_layer_whose_gates_do_not_sum_to_1_is_the_dense_network_times_their_sum(dense):
    _, layer = build("upcycle", top_k=1)
    x = torch.randn(40, DIM)
    gate = layer.router.score(layer.tokens(x))[0].softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(layer(x), gate * dense_answer(dense, x, "relu", bias=False))


def test_biases_that_the_file_does_not_give_begin_at_zero():
    bank = build("upcycle", settings=["upcycle.b_out=b_out"], bias=True)[1].experts
    assert not bank.b_in.any()
    assert bank.b_out.any()


def test_half_precision_is_read_and_tensors_of_other_names_are_left_alone(dense):
    tensors = {f"mlp.{name}_proj": dense[f"w_{name}"].bfloat16() for name in ("in", "out")}
    save_file({**tensors, "huge": torch.zeros(3, dtype=torch.int8)}, "half.safetensors")
    settings = ["upcycle.file=half.safetensors", "upcycle.w_in=mlp.in_proj", "upcycle.w_out=mlp.out_proj"]
    bank = build("upcycle", settings=settings)[1].experts
    assert torch.equal(bank.w_in[3], tensors["mlp.in_proj"].float().t())
    assert bank.w_in.dtype == torch.float32


def of(*files):
    """An index that names these shards."""
    return {"weight_map": {f"tensor{at}": file for at, file in enumerate(files)}}


def in_shards(tensors, folder):
    """A folder with one tensor per file, and an index that names them, as large checkpoints have."""
    folder.mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


@pytest.mark.parametrize("file", ["folder", "folder/model.safetensors.index.json", "single"])
def test_a_checkpoint_may_be_a_folder_or_an_index_of_shards(dense, tmp_path, file):
    in_shards(dense, tmp_path / "folder")
    (tmp_path / "single").mkdir()
    save_file(dense, tmp_path / "single" / "model.safetensors")
    names = ["upcycle.b_in=b_in", "upcycle.b_out=b_out"]
    bank = build("upcycle", settings=[f"upcycle.file={file}", *names], bias=True)[1].experts
    assert torch.equal(bank.w_in[1], dense["w_in"].t())
    assert torch.equal(bank.b_out[2], dense["b_out"])


@pytest.mark.parametrize("name", ["upcycle", "lora"])
def test_equal_experts_are_no_router_that_cannot_learn(name):
    """Their gates move with the logits; only the gradients cancel, until the experts have parted."""
    engine, layer = build(name)
    engine.check_learning(lambda: layer(torch.ones(9, DIM).cumsum(0)).square().mean())


FILES = {
    "absent": (["file=a.safetensors"], "unreadable-file", "a.safetensors", "No such file"),
    "empty folder": (["file=empty"], "unreadable-file", "empty", "no *.safetensors"),
    "lost shard": (["file=lost.json"], "unreadable-file", "gone.safetensors"),
    "no index": (["file=text.json"], "unreadable-file", "text.json", "index"),
    "index without a map": (["file=other.json"], "unreadable-file", "other.json", "weight_map"),
    "index that leads elsewhere": (["file=away.json"], "unreadable-file", "away.json", "'../dense.safetensors'"),
    "no tensor in any shard": (["file=folder", "w_in=w_im"], "unknown-tensor", "folder", "'w_im'", "'w_in'"),
    "no safetensors": (["file=text"], "unreadable-file", "text", "header"),
    "cut short": (["file=cut"], "unreadable-file", "cut"),
    "no tensor": (["w_in=w_im"], "unknown-tensor", "dense.safetensors", "'w_im'", "'w_in'"),
    "shape": (["w_in=w_out"], "wrong-tensor", "'w_out'", "dense.safetensors", [18, 6], "torch.float32", [6, 18]),
    "whole numbers": (["file=whole"], "wrong-tensor", "'w_in'", "whole", [6, 18], "torch.int64"),
}


@pytest.mark.parametrize(("settings", "code", "words"), [(s, code, w) for s, code, *w in FILES.values()], ids=FILES)
def test_a_file_without_the_networks_tensors_is_refused(tmp_path, settings, code, words):
    (tmp_path / "text").write_text("no tensors", "utf-8")
    (tmp_path / "cut").write_bytes((tmp_path / "dense.safetensors").read_bytes()[:-9])
    save_file({"w_in": torch.zeros(HIDDEN, DIM, dtype=torch.int64)}, "whole")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("[", "utf-8")
    for name, value in {
        "other": {"map": 1},
        "lost": of("gone.safetensors"),
        "away": of("../dense.safetensors"),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    in_shards(load_file("dense.safetensors"), tmp_path / "folder")
    with refused(code, "upcycle", *words) as caught:
        build("upcycle", settings=[f"upcycle.{setting}" for setting in settings])
    assert "\n" not in str(caught.value)


MIXES = {
    "conv": (
        "conv",
        {},
        ["conv.channels=4"],
        "conv.channels=4: .* 18 ",
    ),
    "conv's output": ("conv", {"out": 20}, [], "conv: out=20 .* 9 pixels"),
    "conv's window": ("conv", {}, ["conv.kernel=2"], r"experts 'conv': 'kernel' must be in \(1, 3, 5, 7\)"),
    "convnet's picture": ("convnet", {}, ["convnet.channels=4"], "convnet.channels=4: .* 18 "),
    "convnet's poolings": ("convnet", {}, ["convnet.hidden=4,4"], "convnet.hidden: 2 .* 3 pixels"),
    "convnet's widths": ("convnet", {}, ["convnet.hidden=0"], r"convnet.hidden is \[0\]"),
    "deep_mlp's widths": ("deep_mlp", {}, ["deep_mlp.hidden=4,0"], r"deep_mlp.hidden is \[4, 0\]"),
    "deep_mlp's depth": ("deep_mlp", {}, ["deep_mlp.hidden="], r"deep_mlp.hidden is \[\]"),
    "deep_mlp's noise": ("deep_mlp", {"causal": True}, ["deep_mlp.dropout=0.1"], "deep_mlp.dropout .* causal"),
    "lora's strength": ("lora", {}, ["lora.alpha=0"], "experts 'lora': 'alpha' must be >= 1e-06: 0"),
    "swiglu's biases": ("upcycle", {"activation": "swiglu", "bias": True}, [], "upcycle .* swiglu.* bias=False"),
    "upcycle's file": ("upcycle", {}, ["upcycle.file=none"], "set upcycle.file"),
    "upcycle's biases": ("upcycle", {}, ["upcycle.b_in=b_in"], "upcycle.b_in .*bias=True"),
}


@pytest.mark.parametrize(("name", "spec", "settings", "expected"), MIXES.values(), ids=MIXES)
def test_what_makes_no_sense_is_refused_in_one_sentence(name, spec, settings, expected):
    with pytest.raises(UsageError, match=expected):
        build(name, settings=settings, **spec)


def test_an_initializer_of_silent_experts_is_refused_with_lora():
    with pytest.raises(UsageError, match="zero_output .* lora"):
        build("lora", "topk,zero_output")


def test_two_banks_for_one_layer_are_refused():
    with pytest.raises(UsageError, match="a layer has one bank of experts, but 'conv' and 'lora' provide one; choose"):
        build("lora", "topk,conv", ["conv.channels=2"])


# -- a run -------------------------------------------------------------------------------------------


@few_banks
def test_a_run_learns_the_digits_and_grows(tmp_path, name):
    """Three epochs, an expert more at steps 20, 40 and 60."""
    save_file({"w_in": torch.randn(64, 64) / 8, "w_out": torch.randn(64, 64) / 8}, "dense.safetensors")
    settings = {"schedule": {"every": 20}} | ({"upcycle": {"file": "dense.safetensors"}} if name == "upcycle" else {})
    plugins = (name, "switch_aux", "schedule", "clone")
    config = RunConfig(plugins=plugins, epochs=3, experts=4, no_plugin=("plots", "html"))
    summary = Training(config, settings, tmp_path / "run").run().summary
    assert summary["accuracy"] >= 0.85
    assert summary["layers"][0]["experts"] == 4 + len(summary["growths"]) > 4
