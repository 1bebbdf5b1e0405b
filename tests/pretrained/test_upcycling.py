"""upcycle(engine, model): dense blocks become layers of their copies, and nothing else changes."""

import copy

import attrs
import pytest
import torch

from moe_engine import Dense, Engine, Family, Growth, Upcycled, adopt, export, hookimpl, load, save, upcycle
from moe_engine.testing import tiny_model
from support import refused

from .tiny import batch

transformers = pytest.importorskip("transformers")

EVERY = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "gpt2"]
FEW = pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])  # silu, gated gelu, biases


def build(kind="llama", **settings):
    """A tiny dense model with weights wide enough to matter, biases and norms too."""
    model = tiny_model(kind, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def upcycled(kind="llama", plugins="balance", model=None, **more):
    """(engine, model, what was done)."""
    model, engine = model or build(kind), Engine(plugins)
    return engine, model, upcycle(engine, model, **{"experts": 4, **more})


@torch.no_grad()
def logits(model):
    """Of the real tokens; the first row is padded on the left."""
    ids, mask = batch()
    return model(ids, attention_mask=mask).logits[mask.bool()]


def step(engine, model, optimizer=None):
    """One backward with its loss, and a step of an optimizer."""
    ids, mask = batch()
    model.train()
    answer = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    (answer.loss + engine.aux_loss()).backward()
    engine.after_backward()
    if optimizer is not None:
        optimizer.step()
    engine.after_step()


def router_gradients(engine):
    return [float(layer.router.weight.grad.abs().max()) for layer in engine.layers]


# -- at birth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_logits_stay_and_the_router_learns_once_experts_differ(kind):
    """While experts are equal, the task gives gates that sum to 1 no gradient; after one step it does."""
    model = build(kind)
    before = logits(model)
    engine, _, done = upcycled(model=model)
    assert len(done.layers) == 2 == len(engine.layers) and done.experts == 4
    assert [name.split(".")[-2] for name in done.layers] == ["1", "3"]
    assert done.change < 1e-5
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(engine, model, optimizer)
    optimizer.zero_grad()
    step(engine, model)
    assert min(router_gradients(engine)) > 1e-6
    assert float(engine.layers[0].sums.take_since_log()["tokens"]) == 2 * 26  # without padding


@pytest.mark.parametrize("top_k", [2, 3, 4])
@FEW
def test_shared_experts_are_copies_too(kind, top_k):
    """All copies together give what one gave."""
    model = build(kind)
    before = logits(model)
    _, _, done = upcycled(kind, model=model, layers="all", top_k=top_k, shared=2)
    assert done.change < 1e-5
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@FEW
def test_other_precisions(kind, dtype):
    engine, _, done = upcycled(kind, model=build(kind).to(dtype))
    assert done.change < (1e-12 if dtype == torch.float64 else 0.03)
    assert {one.dtype for layer in engine.layers for one in layer.parameters()} == {dtype}


def test_biases_of_a_gated_block():
    _, _, done = upcycled("llama", model=build("llama", mlp_bias=True))
    assert done.change < 1e-5


def test_generated_text_stays():
    """With left padding and a cache; real tokens alone are counted."""
    model, (ids, mask) = build(), batch()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, attention_mask=mask, **settings)
    engine, _, _ = upcycled(model=model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), before)
    assert float(engine.layers[0].sums.take_evaluated()["tokens"]) == 26 + 3 * 4


def test_a_router_whose_gates_do_not_sum_to_1_changes_the_function_and_it_is_said():
    assert upcycled(top_k=1)[2].change > 1e-3


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2, 3]), ("every 3", [2]), ("every 1", [0, 1, 2, 3]), ([3, 0], [0, 3])]
)
def test_the_layers_that_are_meant(layers, expected):
    engine, model, done = upcycled(layers=layers)
    assert done.layers == tuple(f"model.layers.{index}.mlp" for index in expected)
    assert [layer.name for layer in engine.layers] == [*done.layers]
    engine.attach(model)
    assert [layer.name for layer in engine.layers] == [*done.layers]


# -- initializers ----------------------------------------------------------------------------------------


def copies(made, name="w_in"):
    """A tensor of the first layer's experts, of what `upcycled` returns."""
    return getattr(made[0].layers[0].experts, name).detach()


@FEW
def test_without_an_initializer_experts_are_equal(kind):
    w_EDW = copies(upcycled(kind))
    assert torch.equal(w_EDW, w_EDW[:1].expand_as(w_EDW))


def test_clone_adds_noise():
    """As large as its option says, relative to the weights; router rows stay random."""
    plain = copies(upcycled())
    engine, _, done = made = upcycled(initializer="clone", settings=["clone.noise=0.05"])
    noise = copies(made) - plain
    assert (noise.std((1, 2)) / plain[0].std()).tolist() == pytest.approx([0.05] * 4, rel=0.1)
    assert not torch.allclose(noise[0], noise[1])
    assert len(engine.layers[0].router.weight.unique(dim=0)) == 4
    assert 1e-4 < done.change < 0.5


@FEW
def test_partial_reinit_draws_a_share_of_the_hidden_units_of_every_expert(kind):
    plain = copies(upcycled(kind), "w_out")
    made = upcycled(kind, initializer="partial_reinit", settings=["partial_reinit.share=0.25"])
    drawn_EH = (copies(made, "w_out") != plain).any(-1)
    assert drawn_EH.sum(-1).tolist() == [drawn_EH.shape[1] // 4] * 4
    assert not torch.equal(drawn_EH[0], drawn_EH[1])


def test_an_engines_own_options_of_the_initializer_apply():
    engine, model = Engine("partial_reinit", ["partial_reinit.share=1"]), build()
    upcycle(engine, model, experts=4, initializer="partial_reinit")
    assert (copies((engine, model), "w_out") != copies(upcycled(), "w_out")).all()


# -- afterwards ------------------------------------------------------------------------------------------


@FEW
def test_it_trains_grows_and_is_copied(kind):
    engine, model, _ = upcycled(kind, "saturation,switch_aux,clone")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(engine, model, optimizer)
    optimizer.zero_grad()
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (0, 1)), optimizer)
    step(engine, model, optimizer)
    assert [layer.spec.experts for layer in engine.layers] == [6, 6]
    model.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))


@FEW
def test_saved_and_loaded_with_another_number_of_experts(kind, tmp_path):
    engine, model, _ = upcycled(kind, "saturation,clone")
    engine.grow(Growth(engine.layers[0].name, (0,)))
    save(tmp_path / "state", model=model, engine=engine)
    other, again, _ = upcycled(kind, "saturation,clone")
    load(tmp_path / "state", model=again, engine=other)
    assert [layer.spec.experts for layer in other.layers] == [5, 4]
    assert torch.equal(logits(again), logits(model))


def test_a_second_call_upcycles_other_layers():
    """Each layer knows the padding, and counts its tokens once."""
    engine, model, _ = upcycled(layers=[0])
    assert upcycle(engine, model, experts=4, layers=[2]).layers == ("model.layers.2.mlp",)
    logits(model)
    assert [float(layer.sums.take_evaluated()["tokens"]) for layer in engine.layers] == [26, 26]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_activation_checkpointing(checkpointing):
    engine, model, _ = upcycled()
    if checkpointing:
        model.activation_checkpointing_enable()
    step(engine, model)
    assert float(engine.layers[1].sums.take_since_log()["tokens"]) == 26


# -- export ----------------------------------------------------------------------------------------------


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


NATIVE = {
    "a Llama": ("llama", "all", "MixtralForCausalLM", {}),
    "tied embeddings": ("llama", "all", "MixtralForCausalLM", {"tie_word_embeddings": True}),
    "a Mistral": ("mistral", "all", "MixtralForCausalLM", {"sliding_window": 4}),
    "a Llama with dense layers": ("llama", "every 2", "Qwen2MoeForCausalLM", {}),
    "a Mistral with dense layers": ("mistral", [0], "Qwen2MoeForCausalLM", {"sliding_window": None}),
    "a Qwen2": ("qwen2", "all", "Qwen2MoeForCausalLM", {}),
    "a Qwen3 with dense layers": ("qwen3", "every 2", "Qwen3MoeForCausalLM", {}),
    "a Qwen3": ("qwen3", "all", "Qwen3MoeForCausalLM", {}),
}


@pytest.mark.parametrize("case", NATIVE)
def test_a_trained_and_grown_model_loads_as_a_native_mixture(case, tmp_path):
    kind, layers, expected, settings = NATIVE[case]
    engine, model, _ = upcycled(kind, "switch_aux", model=build(kind, **settings), layers=layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(engine, model, optimizer)
    optimizer.zero_grad()
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (None,)), optimizer)
    exported = export(engine, model.eval(), tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert (type(again).__name__, exported.experts, exported.change < 1e-5) == (expected, 5, True)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    assert again.config.num_experts_per_tok == 2
    adopted = Engine()
    adopt(adopted, again)  # and back under the engine
    assert [layer.spec.experts for layer in adopted.layers] == [5] * len(engine.layers)


def trained_with_a_bias():
    engine, model, _ = upcycled("llama", "saturation", layers="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(engine, model, optimizer)
    return engine, model


def grown_in_one_layer():
    engine, model, _ = upcycled(layers="all")
    engine.grow(Growth(engine.layers[1].name, (None,)))
    return engine, model


def adopted_too():
    engine, model, _ = upcycled("qwen3_moe", model=build("qwen3_moe", mlp_only_layers=[1]), layers=[1])
    adopt(engine, model)
    return engine, model


UNABLE = {
    "dense layers in a Mistral with a window": (
        lambda: upcycled("mistral", model=build("mistral", sliding_window=4))[:2],
        "not-exportable",
        ["sliding window", "moe_engine.save()"],
    ),
    "Gemma": (lambda: upcycled("gemma", layers="all")[:2], "not-exportable", ["GemmaForCausalLM", "no architecture"]),
    "GPT-2": (lambda: upcycled("gpt2", layers="all")[:2], "not-exportable", ["no architecture", "moe_engine.save()"]),
    "shared experts": (lambda: upcycled(layers="all", shared=1)[:2], "not-exportable", ["shared experts in"]),
    "biases of experts": (
        lambda: upcycled(model=build(mlp_bias=True), layers="all")[:2],
        "not-exportable",
        ["biases of experts in"],
    ),
    "biases of attention": (
        lambda: upcycled(model=build(attention_bias=True), layers="all")[:2],
        "not-exportable",
        ["other tensors", "q_proj.bias"],
    ),
    "another router": (lambda: upcycled(plugins="top_p", layers="all")[:2], "not-exportable", ["(TopPRouter)"]),
    "a capacity": (lambda: upcycled(layers="all", capacity=1.5)[:2], "not-exportable", ["capacity=1.5"]),
    "a bias that moved": (trained_with_a_bias, "not-exportable", ["the bias 'saturation' in model.layers.0.mlp"]),
    "layers of unequal E": (grown_in_one_layer, "not-one-size", ["5 experts in model.layers.1.mlp"]),
    "gates of another size": (
        lambda: upcycled(layers="all", settings=["topk.scale=2"])[:2],
        "not-reloaded",
        ["answers differently"],
    ),
    "adopted blocks too": (adopted_too, "not-exportable", ["adopted and upcycled"]),
}


@pytest.mark.parametrize("case", UNABLE)
def test_what_no_format_can_hold_is_named_and_nothing_is_left(case, tmp_path):
    make, code, words = UNABLE[case]
    engine, model = make()
    with refused(code, *words):
        export(engine, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- refusals --------------------------------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))


def quantised():
    model = build()
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    return model


class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base


def with_adapter():
    model = build()
    model.model.layers[1].mlp.up_proj = Adapted(model.model.layers[1].mlp.up_proj)
    return model


class Doubling(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def another_function():
    model = build()
    model.model.layers[3].mlp = Doubling(model.model.layers[3].mlp)
    return model


REFUSED = {
    "one expert": ({"experts": 1}, "too-few-experts", ["experts=1"]),
    "no number": ({"experts": 2.5}, "too-few-experts", ["2.5"]),
    "more choices than experts": ({"top_k": 5}, "bad-layer-spec", ["top_k=5"]),
    "no such layer": ({"layers": [1, 4]}, "unknown-block", ["layer 4", "0 to 3"]),
    "a negative one": ({"layers": [-1]}, "unknown-block", ["layer -1"]),
    "too large a step": ({"layers": "every 9"}, "bad-layers", ["'every 9'", "4 layers"]),
    "a word": ({"layers": "some"}, "bad-layers", ["'all', 'every N'", "'some'"]),
    "a number": ({"layers": 3}, "bad-layers", ["list of indices", "3"]),
    "no layers": ({"layers": []}, "bad-layers", ["[]"]),
    "a layer's name": ({"layers": ["model.layers.1.mlp"]}, "bad-layers", ["list of indices"]),
    "sizes of the model": ({"hidden": 7}, "bad-layer-spec", ["hidden"]),
    "a bank": ({"plugins": "lora"}, "several-banks", ["'lora'"]),
    "no initializer": ({"initializer": "switch_aux"}, "no-initializer", ["'switch_aux'", "partial_reinit"]),
    "no plugin": ({"initializer": "clon"}, "unknown-plugin", ["'clon'", "'clone'"]),
    "no family": ({"family": "lama"}, "unknown-family", ["'lama'"]),
    "a meta model": ({"model": on_meta}, "meta-model", ["meta device"]),
    "quantised weights": ({"model": quantised}, "quantised-weights", ["layers.1.mlp.up_proj", "int8"]),
    "an adapter": ({"model": with_adapter}, "adapter-in-the-way", ["layers.1.mlp.up_proj", "merge"]),
    "another function": ({"model": another_function}, "not-an-mlp", ["layers.3.mlp (Doubling)", "differs by"]),
    "a mixture": ({"model": lambda: tiny_model("mixtral")}, "no-known-block", ["MixtralForCausalLM", "gate_proj"]),
    "no model of transformers": ({"model": lambda: torch.nn.Linear(2, 2)}, "no-known-block", ["Linear"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_changes_nothing(case):
    more, code, words = REFUSED[case]
    given = {**more, "model": more["model"]() if "model" in more else build()}
    blocks = [type(module) for module in given["model"].modules()]
    with refused(code, *words) as caught:
        upcycled(**given)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in given["model"].modules()] == blocks


def test_upcycled_already():
    engine, model, _ = upcycled()
    with refused("upcycled-already", "layers 1 and 3"):
        upcycle(engine, model, experts=4)


def test_a_dense_engine_has_nothing_to_upcycle_with():
    with refused("dense-engine", "dense=True"):
        upcycle(Engine(dense=True), build())


# -- a stranger's architecture ---------------------------------------------------------------------------


class Ffn(torch.nn.Module):
    """Squared ReLU, with a gate."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12, bias=False)
        self.w2 = torch.nn.Linear(12, 8)

    def act(self, a):
        return a.relu().square()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Stranger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"ffn": Ffn()}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["ffn"](x)
        return x


@attrs.define(eq=False)
class Strange:
    """A dense architecture from elsewhere.

    Source: made up.
    """

    @hookimpl
    def moe_family(self):
        return Family(dense=(Dense("w3", "w2", gate="w1", act="act"),))


def test_a_stranger_declares_another_form(install):
    install("family", "strange", Strange)
    torch.manual_seed(0)
    model, x = Stranger(), torch.randn(2, 5, 8)
    before = model(x)
    engine = Engine()
    done = upcycle(engine, model, experts=3, layers="all", family="strange")
    assert done == Upcycled(("blocks.0.ffn", "blocks.1.ffn"), 3, None)
    with pytest.warns(UserWarning, match="no attention mask"):
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)
