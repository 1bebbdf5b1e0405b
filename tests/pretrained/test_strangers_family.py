"""A family from elsewhere, of an architecture that is made up here: read, adopted, grown, exported; a broken one."""

import attrs
import pytest
import torch
from torch import nn

from moe_engine import Engine, Family, Growth, Stored, adopt, export, hookimpl, watch
from moe_engine.testing import check_family
from support import refused

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402


class LoomConfig(transformers.PreTrainedConfig):
    model_type = "loom"

    def __init__(self, width=16, threads=6, chosen=2, vocab_size=64, **rest):
        super().__init__(**rest)
        self.width, self.threads, self.chosen, self.vocab_size = width, threads, chosen, vocab_size
        self.initializer_range, self.num_hidden_layers = 0.3, 2


class Picker(nn.Module):
    """Sigmoid scores in a dict, rows in columns."""

    def __init__(self, config):
        super().__init__()
        self.chosen = config.chosen
        self.columns = nn.Parameter(torch.randn(config.width, config.threads))

    def forward(self, x):
        scores = x @ self.columns
        gates, threads = scores.sigmoid().topk(self.chosen, dim=-1)
        return {"scores": scores, "gates": 1.7 * gates, "threads": threads}


class Threads(nn.Module):
    """One matrix each, all in one tensor [D, E, D]."""

    def __init__(self, config):
        super().__init__()
        self.fabric = nn.Parameter(torch.randn(config.width, config.threads, config.width) * 0.2)

    def forward(self, x, threads, gates):
        out = torch.einsum("td,deo->teo", x, self.fabric)
        return (out.gather(1, threads[..., None].expand(-1, -1, x.shape[1])) * gates[..., None]).sum(1)


class Weave(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.picker, self.threads = Picker(config), Threads(config)

    def forward(self, x):
        flat = x.flatten(0, -2)
        picked = self.picker(flat)
        return x + self.threads(flat, picked["threads"], picked["gates"]).view_as(x)


class LoomForCausalLM(transformers.PreTrainedModel):
    config_class = LoomConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.weaves = nn.ModuleList(Weave(config) for _ in range(2))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """As they are."""

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for weave in self.weaves:
            x = weave(x)
        return CausalLMOutput(logits=self.head(x))


# -- what the stranger writes ------------------------------------------------------------------------------


@attrs.define(eq=False)
class Loom:
    """Loom: sigmoid scores, not renormalised, scaled by 1.7.

    Source: made up.
    """

    @hookimpl
    def moe_family(self):
        tensors = {
            "picker.columns": Stored("logit_row", axis=1, fan_in=0),
            "threads.fabric": Stored("output", axis=1, fan_in=0),
        }
        return LoomFamily(
            router="picker", experts="threads", entry="threads", tensors=tensors, count=("threads",), recipe=recipe
        )

    def trial_model(self):
        return LoomForCausalLM(LoomConfig())


class LoomFamily(Family):
    def logits_from(self, returned):
        return returned["scores"]


def recipe(block):
    return "sigmoid_topk", {"renorm": False, "scale": 1.7}


# -- and what becomes of it --------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LoomForCausalLM(LoomConfig()).eval()


@pytest.fixture
def stranger(install):
    install("family", "loom", Loom)


@pytest.mark.usefixtures("stranger")
def test_it_keeps_every_promise():
    check_family(Loom)


@pytest.mark.usefixtures("stranger")
def test_it_is_found_by_the_models_type(model, tmp_path):
    ids = torch.randint(64, (2, 9))
    before = model(ids).logits
    with watch(Engine(), model) as watcher:
        model(ids)
        assert [metrics["load"].numel() for metrics in watcher.metrics().values()] == [6, 6]
    engine = Engine("saturation")
    adopt(engine, model)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=0)
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (None,)))
    assert model.weaves[0].threads.fabric.shape == (16, 7, 16)
    assert export(engine, model, tmp_path / "out").experts == 7
    assert LoomForCausalLM.from_pretrained(tmp_path / "out").config.threads == 7


def test_without_the_plugin_it_is_told_what_was_looked_for(model):
    with refused("no-known-block", "LoomForCausalLM (model_type 'loom')", "new-plugin family"):
        watch(Engine(), model)


@attrs.define(eq=False)
class Broken:
    """Fails."""

    @hookimpl
    def moe_family(self):
        return 1 / 0


def test_a_broken_family_disturbs_nobody_else(install, model):
    install("family", "loom", Broken)
    from .test_adopting import build

    adopt(Engine(), build())
    with refused("plugin-failed", "family 'loom'", "ZeroDivisionError"):
        watch(Engine(), model)
