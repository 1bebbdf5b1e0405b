"""upcycle(engine, model): dense blocks become layers of their copies, and nothing else changes."""

import copy

import pytest
import torch

from moe_engine import Engine, Growth, load, save, upcycle
from moe_engine.testing import tiny_model
from support import refused

from .tiny import batch

pytest.importorskip("transformers")

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
