"""adopt(engine, model): the engine decides in a transformers model's blocks, and nothing else changes."""

import copy
import io
import pickle

import pytest
import torch

from moe_engine import Engine, Family, Growth, UsageError, adopt, hookimpl, release, watch
from moe_engine.pretrained.families import blocks_of
from moe_engine.testing import tiny_model
from support import refused

from .tiny import batch

pytest.importorskip("transformers")

GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def build(kind="mixtral", **settings):
    """A tiny model whose weights are wide enough to choose."""
    model = tiny_model(kind, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def adopted(plugins="balance", kind="mixtral", settings=(), spec=None, **more):
    """(engine, model, its logits before)."""
    model = build(kind, **more)
    before = logits(model)
    engine = Engine(plugins, settings)
    assert adopt(engine, model, **(spec or {})) is model
    return engine, model, before


@torch.no_grad()
def logits(model):
    """Of the real tokens; the first row is padded on the left."""
    ids, mask = batch()
    return model(ids, attention_mask=mask).logits[mask.bool()]


def loss_of(model):
    """Nothing of it depends on padding."""
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 4] = -100  # its logits are those of the last padding token
    return model(ids, attention_mask=mask, labels=labels).loss


def gradients(model, engine=None):
    model.train()
    model.zero_grad()
    (loss_of(model) + (0 if engine is None else engine.aux_loss())).backward()
    if engine is not None:
        engine.after_backward()
        engine.after_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(first, second):
    """The largest difference of two sets of tensors, each relative to its tensor's largest value."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)


# -- nothing changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_logits_stay_with_every_kernel(kernel):
    model = build()
    model.set_experts_implementation(kernel)
    before = logits(model)
    adopt(Engine(), model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_stay(checkpointing):
    """Under activation checkpointing the repeated forward finds the padding again, and counts once."""
    model = build()
    before = gradients(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    engine = Engine()
    adopt(engine, model)
    assert apart(before, gradients(model, engine)) < 1e-5
    counts = [layer.sums.take_since_log() for layer in engine.layers]
    assert [(float(one["tokens"]), float(one["load"].sum())) for one in counts] == [(26, 52)] * 4


def test_two_forwards_before_their_backwards_find_their_own_padding():
    """The first one's mask differs from the second one's."""
    model = build()
    model.activation_checkpointing_enable()
    engine = Engine()
    adopt(engine, model)
    model.train()
    ids, mask = batch()
    whole = torch.ones_like(mask)
    first = model(ids, attention_mask=mask).logits.square().mean()
    second = model(ids, attention_mask=whole).logits.square().mean()
    first.backward()  # raises CheckpointError if what is repeated has another mask
    second.backward()
    engine.after_backward()
    engine.after_step()
    assert float(engine.layers[0].sums.take_since_log()["tokens"]) == 26 + 30


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bf16_keeps_the_blocks_own_precision(kind):
    """Choices are those of the block's own bf16 router; equal scores may be parted otherwise."""
    model = build(kind).bfloat16()
    before = logits(model)
    adopt(Engine(), model)
    same = (logits(model) - before).abs().amax(-1) <= 0.02 * before.abs().max()
    assert same.float().mean() > 0.9


def test_autocast_changes_nothing():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        adopt(Engine(), model)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generated_text_stays(cache):
    """With a dynamic and a static cache; real tokens alone are counted."""
    model, (ids, mask) = build(), batch()
    before = model.generate(ids, attention_mask=mask, **GENERATE, **cache)
    engine = Engine()
    adopt(engine, model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE, **cache), before)
    tokens = engine.layers[0].sums.take_evaluated()["tokens"]
    assert float(tokens) == 26 + 3 * 4


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
def test_a_copy_decides_by_itself(copied):
    engine, model, before = adopted("loss_free")
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(other), before, atol=1e-5, rtol=0)
    owner = Engine("loss_free").attach(other)
    logits(other)
    assert [len(one) for one in (owner.layers, engine.layers)] == [4, 4]
    assert owner.layers[0].experts.block.module is other.model.layers[0].mlp
    assert float(owner.layers[0].sums.take_evaluated()["tokens"]) > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_compiled_model_computes_the_same(backend, whole):
    engine, model, before = adopted(num_hidden_layers=1)
    ids, mask = batch()
    if not whole:
        model.model.layers[0].mlp.compile(backend=backend)
    compiled = torch.compile(model, backend=backend) if whole else model
    with torch.no_grad():
        after = compiled(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert float(engine.metrics("eval")["model.layers.0.mlp.moe"]["rows"]) == 2


def test_weights_exist_once():
    """The layer has no parameter of its own, and its parts' tensors are the block's."""
    engine, model, _ = adopted("saturation,switch_aux")
    layer, block = engine.layers[0], model.model.layers[0].mlp
    assert not list(layer.parameters())
    assert layer.experts.experts_gate_up_proj is block.experts.gate_up_proj
    assert layer.router.weight is block.gate.weight
    assert {id(one) for one in layer.all_parameters()} == {id(one) for one in block.parameters()}


def test_a_jittered_input_is_seen_by_router_and_experts_alike():
    """Logits are those that the block's router returned, not computed again from another input."""
    model = build(router_jitter_noise=0.3)
    model.train()
    torch.manual_seed(1)
    before = loss_of(model)
    adopt(Engine(), model)
    torch.manual_seed(1)
    torch.testing.assert_close(loss_of(model), before, atol=1e-5, rtol=0)


# -- what the engine can do --------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["hierarchical", "expert_choice", "hash", "soft", "top_p", "sinkhorn", "noisy_topk"])
def test_any_router_takes_part(router):
    """A router of another shape brings its own weights, which learn."""
    settings = ["hierarchical.groups=2"] if router == "hierarchical" else []
    settings += ["expert_choice.allow_noncausal=true"] if router == "expert_choice" else []
    settings += ["soft.allow_noncausal=true"] if router == "soft" else []
    settings += ["sinkhorn.allow_noncausal=true"] if router == "sinkhorn" else []
    more = {"spec": {"vocab": 64}} if router == "hash" else {}
    engine, model, before = adopted(f"{router},balance", settings=settings, **more)
    found = gradients(model, engine)
    assert all(bool(grad.isfinite().all()) for grad in found.values())
    own = [name for name, _ in model.named_parameters() if ".moe." in name]
    assert bool(own) == (router in ("hierarchical", "soft", "noisy_topk"))
    assert all(name in found for name in own)
    if router != "noisy_topk":  # which chooses as the block does, without its noise
        assert not torch.allclose(logits(model), before, atol=1e-3)


def test_a_bias_and_a_loss_balance_an_adopted_model():
    """In a few steps the busiest expert gets less."""
    engine, model, _ = adopted("saturation,switch_aux", settings=["switch_aux.weight=0.1"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    shares = []
    for _ in range(40):
        optimizer.zero_grad()
        (loss_of(model) + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        shares.append(sum(float(m["maxvio"]) for m in engine.metrics().values()))
    assert sum(shares[-5:]) < 0.8 * sum(shares[:5])


def test_layers_and_settings_can_be_chosen():
    engine, model, _ = adopted(
        "switch_aux", spec={"layers": ["model.layers.1.mlp"], "settings": ["switch_aux.weight=3"]}
    )
    (layer,) = engine.layers
    assert layer.name == "model.layers.1.mlp.moe"
    assert layer.weight_of("switch_aux") == 3
    with refused("unknown-block", "model.layers.9.mlp"):
        adopt(Engine(), build(), layers=["model.layers.9.mlp"])
    assert not hasattr(model.model.layers[0].mlp, "moe")


def test_a_capacity_drops():
    engine, model, before = adopted(spec={"capacity": 0.5})
    model.train()
    loss_of(model).backward()
    engine.after_backward()
    engine.after_step()
    assert float(engine.layers[0].sums.take_since_log()["dropped"].sum()) > 0
    torch.testing.assert_close(logits(model.eval()), before, atol=1e-5, rtol=0)  # none in evaluation


@pytest.mark.parametrize("kept", [False, True])
def test_the_models_own_loss_is_replaced_or_kept(kept):
    """Never doubled."""
    model = build(output_router_logits=True, router_aux_loss_coef=0.5)
    model.train()
    with_own = float(loss_of(model).detach())
    model.router_aux_loss_coef, model.config.output_router_logits = 0.0, False
    without = float(loss_of(model).detach())
    model.router_aux_loss_coef, model.config.output_router_logits = 0.5, True
    engine = Engine("switch_aux")
    adopt(engine, model, keep_own_loss=kept)
    assert float(loss_of(model).detach()) == pytest.approx(with_own if kept else without, abs=1e-4)
    release(engine, model)
    assert float(loss_of(model).detach()) == pytest.approx(with_own, abs=1e-4)


# -- growth ------------------------------------------------------------------------------------------------


def test_growth_follows_into_config_moments_and_averages():
    engine, model, _ = adopted("clone")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    model.train()
    (loss_of(model) + engine.aux_loss()).backward()
    engine.after_backward()
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (2,)), optimizer, average)
        last = layer is engine.layers[-1]
        assert model.config.num_local_experts == model.num_experts == (9 if last else 8)
    block = model.model.layers[0].mlp
    assert block.experts.num_experts == block.gate.num_experts == 9
    assert optimizer.state[block.experts.down_proj]["exp_avg"].shape[0] == 9
    assert average.module.model.layers[0].mlp.experts.down_proj.shape[0] == 9
    assert logits(average.module.eval()).isfinite().all()


def test_a_growth_that_fails_leaves_everything(monkeypatch):
    engine, model, before = adopted("clone")
    layer = engine.layers[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(layer, "refit", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.grow(Growth(layer.name, (0,)))
    monkeypatch.undo()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.experts.num_experts == 8 == model.config.num_local_experts
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_a_forgotten_optimizer_is_found():
    """Although the layer registers none of the parameters."""
    engine, model, _ = adopted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("forgotten-optimizer", "SGD"):
        engine.grow(Growth(engine.layers[0].name, (0,)))
    del optimizer


def test_a_state_of_more_experts_loads():
    engine, model, _ = adopted("loss_free,clone")
    engine.grow(Growth(engine.layers[0].name, (1,)))
    _, other, _ = adopted("loss_free,clone")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert other.model.layers[0].mlp.gate.num_experts == 9


# -- back, and refusals --------------------------------------------------------------------------------------


def test_release_leaves_nothing_behind():
    model = build()
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    engine = Engine()
    adopt(engine, model)
    assert release(engine, model) is model
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()] == hooks
    assert not any("forward" in vars(one) for one in model.modules())
    assert engine.layers == []


def test_release_folds_a_bias_where_the_block_has_a_place_for_it():
    engine, model, _ = adopted("loss_free", "deepseek_v3")
    for layer in engine.layers:
        layer.biases[0]["loss_free"].b.uniform_(-0.2, 0.2)
    changed = logits(model)
    release(engine, model)
    torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=0)


def test_what_plain_blocks_cannot_hold_is_named():
    engine, model, _ = adopted("loss_free")
    engine.layers[0].biases[0]["loss_free"].b.uniform_(-0.2, 0.2)
    with refused("not-plain", "the bias 'loss_free' in model.layers.0.mlp"):
        release(engine, model)
    engine, model, _ = adopted("top_p")
    with refused("not-plain", "a router that decides otherwise"):
        release(engine, model)
    with refused("not-adopted"):
        release(engine, build())


def test_what_cannot_be_adopted_is_refused():
    engine, model, _ = adopted()
    with refused("adopted-already", "model.layers.0.mlp", "release()"):
        adopt(engine, model)
    with refused("layers-of-an-engine", "engine.metrics()"):
        watch(Engine(), model)
    with refused("family-only-reads", "generic", "moe-engine new-plugin family"):
        adopt(Engine(), build("AfmoeForCausalLM"))
    with refused("unknown-family", "mixtrall", "mixtral"):
        adopt(Engine(), build(), family="mixtrall")
    with refused("family-among-plugins", "'mixtral' is a family"):
        Engine("mixtral")
    with torch.device("meta"):
        empty = tiny_model("mixtral")
    with refused("meta-model"):
        adopt(Engine(), empty)


def wrong(block):
    return "topk", {"renorm": False}


def test_a_recipe_that_disagrees_is_refused_and_nothing_changes(monkeypatch):
    """Unless the user chose a router, which promises nothing."""
    model = build()
    before = logits(model)
    (block, *_) = blocks_of(model)
    family = type("Wrong", (Family,), {})(tensors=block.family.tensors, recipe=wrong)

    class Plugin:
        @hookimpl
        def moe_family(self):
            return family

    monkeypatch.setattr("moe_engine.pretrained.families.build", lambda *_: Plugin())
    with refused("recipe-disagrees", "family 'mixtral'", "router 'topk'"):
        adopt(Engine(), model)
    assert torch.equal(logits(model), before)
    assert not any("moe" in vars(one)["_modules"] for one in model.modules())
    adopt(Engine("topk", ["topk.renorm=true"]), model)


def test_the_router_of_the_recipe_is_used_unless_one_is_typed():
    engine, _, _ = adopted(kind="deepseek_v3")
    assert "sigmoid_topk" in engine.plugins.active and "topk" not in engine.plugins.active
    engine, _, _ = adopted("topk", "deepseek_v3")
    assert "topk" in engine.plugins.active
    with pytest.raises(UsageError, match="not chosen"):
        Engine(settings=["sigmoid_topk.scale=2"])
