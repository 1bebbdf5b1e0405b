"""Which tokens a watcher counts: padding never, whatever module is given the mask, in whatever form."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from moe_engine import Engine, watch

from .tiny import SIZES, batch, build, chosen_by_gates, counted, name, transformers

PAD, LEFT, RIGHT = 0, [0, 0, 0, 0, 3, 5], [3, 5, 0, 0, 0, 0]
WITHOUT_PADDING = [3 / 16, 5 / 16, 5 / 16, 3 / 16]
WITH_PADDING = [7 / 24, 5 / 24, 5 / 24, 7 / 24]


@pytest.fixture
def model():
    """Four experts, of which token 3 chooses the first two, 4 the middle two, 5 the last two; padding the outer two."""
    config = {**SIZES, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config)).eval()
    weight = torch.zeros(4, SIZES["hidden_size"])
    for token, (first, second) in {3: (0, 1), 4: (1, 2), 5: (2, 3), PAD: (3, 0)}.items():
        weight[first, token], weight[second, token] = 3.0, 2.0
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.copy_(weight)
        layer.post_attention_layernorm.register_forward_hook(lambda *_: F.one_hot(model.tokens, 16).float())
    return model


def padded(model, row=LEFT):
    """(ids, mask) of 2 x 6 tokens, four of which are padding: real are three of token 3, two of 4, three of 5."""
    model.tokens = ids = torch.tensor([[3, 3, 4, 4, 5, 5], row])
    return ids, (ids != PAD).long()


def pairs(mask, additive=False):
    """The causal mask [B, 1, S, S] of a mask [B, S]."""
    seen = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask[:, None, None, :].bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen


class Wrapped(torch.nn.Module):
    """It takes anything."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs, **kwargs):
        return self.inner(*inputs, **kwargs)


class Renamed(Wrapped):
    """It has a mask of another kind, and gives the model its own."""

    def forward(self, ids, attention_mask, padding):
        return self.inner(ids, attention_mask=padding)


CALLS = {
    "by keyword": lambda model, ids, mask: model(input_ids=ids, attention_mask=mask),
    "by position": lambda model, ids, mask: model(ids, mask),
    "bool": lambda model, ids, mask: model(ids, mask.bool()),
    "without the head": lambda model, ids, mask: model.model(input_ids=ids, attention_mask=mask),
    "without the head, by position": lambda model, ids, mask: model.model(ids, mask),
    "embedded": lambda model, ids, mask: model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask),
    "pairs": lambda model, ids, mask: model(ids, attention_mask=pairs(mask)),
    "pairs, added": lambda model, ids, mask: model(ids, attention_mask=pairs(mask, additive=True)),
    "pairs, of every head": lambda model, ids, mask: model(ids, attention_mask=pairs(mask).expand(-1, 2, -1, -1)),
}


@pytest.mark.parametrize("row", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_padding_counts_nowhere(model, call, row):
    ids, mask = padded(model, row)
    watcher = watch(Engine("balance"), model)
    for given, load in ((mask, WITHOUT_PADDING), (torch.ones_like(mask), WITH_PADDING)):
        call(model, ids, given)
        told = watcher.metrics()
        assert [one["load"].tolist() for one in told.values()] == [pytest.approx(load)] * 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("row", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_is_found_where_only_layers_are_watched(model, row, implementation):
    """They are given the mask of pairs that the model makes."""
    ids, mask = padded(model, row)
    model.set_attn_implementation(implementation)
    watcher = watch(Engine("balance"), model.model.layers)
    model(ids, attention_mask=mask)
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITHOUT_PADDING)] * 2


@pytest.mark.parametrize("wrapper", [Wrapped, torch.optim.swa_utils.AveragedModel])
def test_padding_is_found_inside_a_wrapper(model, wrapper):
    ids, mask = padded(model)
    wrapped = wrapper(model)
    watcher = watch(Engine("balance"), wrapped)
    wrapped(ids, attention_mask=mask)
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITHOUT_PADDING)] * 2


def test_the_innermost_mask_is_the_one(model):
    ids, mask = padded(model)
    renamed = Renamed(model)
    watcher = watch(Engine("balance"), renamed)
    renamed(ids, torch.zeros(2, 6), mask)
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITHOUT_PADDING)] * 2


def test_a_mask_of_tokens_is_believed_before_one_of_pairs(model):
    """Some versions let padding see all tokens, so that no row of the mask of pairs is empty."""
    ids, mask = padded(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, given: (args, {**given, "attention_mask": torch.ones(2, 1, 6, 6).bool()}), with_kwargs=True
        )
    watcher = watch(Engine("balance"), model)
    model(ids, attention_mask=mask)
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITHOUT_PADDING)] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_mask(model, reentrant):
    ids, mask = padded(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    watcher = watch(Engine("balance"), model)
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITHOUT_PADDING)] * 2


# -- with a cache --------------------------------------------------------------------------------------


def real_tokens(watcher):
    """The number of real tokens of each forward, of every layer alike."""
    (first, *rest) = ([forward.mask.tolist() for forward in layer.forwards] for layer in watcher.trace.layers)
    assert all(masks == first for masks in rest)
    return [sum(mask) for mask in first]


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("Mixtral", {}), ("Mixtral", {"sliding_window": 4}), ("Qwen3Moe", {}), ("DeepseekV3", {})],
    ids=["Mixtral", "Mixtral, sliding", "Qwen3Moe", "DeepseekV3"],
)
def test_generation_counts_each_token_once(family, settings, implementation):
    """26 real tokens of the prompt, then three rows of one new token; the last one is not fed back."""
    model, (ids, mask) = build(family, **settings), batch()
    watcher = watch(Engine("balance"), model, record=True)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": implementation}
    model.generate(ids, attention_mask=mask, **settings)
    assert real_tokens(watcher) == [26, 3, 3, 3]


@pytest.mark.parametrize("length", ["of the cache", "so far"])
@torch.no_grad()
def test_a_static_cache_is_longer_than_the_text(length):
    """The second forward is of one token a row, of which the middle one is padding; the rest of the cache is empty."""
    model, (ids, mask) = build("Mixtral"), batch()
    caches = [name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters]
    given = {caches[0]: transformers.StaticCache(config=model.config, max_cache_len=16)}
    masks = F.pad(mask, (0, 6))
    watcher = watch(Engine("balance"), model, record=True)
    model(ids, attention_mask=masks if length == "of the cache" else mask, **given)
    masks[:, 10] = torch.tensor([1, 0, 1])
    model(ids[:, :1], attention_mask=masks if length == "of the cache" else masks[:, :11], **given)
    assert real_tokens(watcher) == [26, 2]
    assert watcher.trace.layers[0].forwards[1].mask.tolist() == [True, False, True]


# -- what is said --------------------------------------------------------------------------------------


def test_inner_layers_without_a_mask_are_a_warning(model, recwarn):
    """Once: all tokens counted, and some may have been padding. A whole model without a mask has no padding."""
    ids, _ = padded(model)
    watcher = watch(Engine("balance"), model)
    model(ids)
    model.model(ids)
    assert not recwarn.list
    watcher.metrics()
    with pytest.warns(UserWarning, match="watch the whole model and call it, or pass the layers a mask"):
        model.model.layers[0](torch.randn(2, 6, 16), model.model.rotary_emb(torch.randn(2, 6, 16), ids))
    model.model.layers[1](torch.randn(2, 6, 16), model.model.rotary_emb(torch.randn(2, 6, 16), ids))
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITH_PADDING)] * 2


def test_a_mask_that_can_not_be_followed_is_a_warning(model, recwarn):
    """It is given to a wrapper, which gives the model none."""
    ids, _ = padded(model)
    renamed = Renamed(model)
    watcher = watch(Engine("balance"), renamed)
    with pytest.warns(UserWarning, match="can't follow the attention mask given to Renamed, so all tokens count"):
        renamed(ids, torch.ones(2, 7, 6), None)
    renamed(ids, torch.ones(2, 7, 6), None)
    assert not recwarn.list
    assert [one["load"].tolist() for one in watcher.metrics().values()] == [pytest.approx(WITH_PADDING)] * 2


def test_an_interrupted_forward_leaves_no_mask_behind(model):
    """Ctrl-C in a layer; what is called next has no mask."""
    ids, mask = padded(model)
    watcher = watch(Engine("balance"), model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.experts.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, attention_mask=mask)
    handle.remove()
    watcher.metrics()
    model(ids)
    assert watcher.metrics()[name(0)]["load"].tolist() == pytest.approx(WITH_PADDING)


def test_the_mask_of_one_forward_is_not_that_of_the_next():
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model)
    model(ids, attention_mask=mask)
    watcher.metrics()
    caught = chosen_by_gates(model)
    model(ids)
    assert torch.equal(watcher.metrics()[name(1)]["load"], counted(caught[1][0][1]))
