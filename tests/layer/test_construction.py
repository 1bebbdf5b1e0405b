"""Layers where they are built, copied, stored and exported by others."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from moe_engine import Engine
from support import refused

PLUGINS = "saturation,switch_aux,schedule"


def built(plugins=PLUGINS, **spec):
    torch.manual_seed(0)
    engine = Engine(plugins, experts=4, **spec)
    return engine, nn.Sequential(nn.Linear(6, 6), engine.moe(6, 8, name="moe"))


def step(engine, model, x):
    y = model.train()(x)
    (y.square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    return y


@pytest.mark.parametrize("plugins", [PLUGINS, "hierarchical,loss_free", "relu", "hash"])
def test_a_layer_of_the_meta_device_is_materialised_by_a_state(plugins):
    spec = {"vocab": 10} if plugins == "hash" else {}
    engine, model = built(plugins, **spec)
    with torch.device("meta"):
        other, empty = built(plugins, **spec)
    assert {value.device.type for value in empty.state_dict().values()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    if plugins == "hash":
        ids = torch.randint(10, (5,))
        assert torch.equal(empty[1](x := torch.randn(5, 6), ids=ids), model[1](x, ids=ids))
        return
    x = torch.randn(5, 6)
    assert torch.equal(step(other, empty, x), step(engine, model, x))
    assert other.metrics()["moe"]["load"].tolist() == engine.metrics()["moe"]["load"].tolist()


def test_a_pretrained_model_that_holds_layers_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "holds_layers"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.engine, net = built()
            self.linear, self.moe = net
            self.post_init()

        def forward(self, x):
            return self.moe(self.linear(x))

    model = Model(Config())
    step(model.engine, model, torch.randn(9, 6))
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    x = torch.randn(7, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))
    before = again.engine.layers[0].biases[0]["saturation"].s.clone()
    step(again.engine, again, x)
    assert again.engine.step == 1
    assert not torch.equal(before, again.engine.layers[0].biases[0]["saturation"].s)


def test_engine_and_model_are_pickled_together_or_alone():
    engine, model = built()
    step(engine, model, torch.randn(9, 6))
    twin, copied = pickle.loads(pickle.dumps((engine, model)))
    assert twin.layers == [copied[1]] and twin.step == 1
    x = torch.randn(9, 6)
    torch.testing.assert_close(step(twin, copied, x), step(engine, model, x), rtol=0, atol=0)
    assert copied[1].copy_id != model[1].copy_id
    alone = pickle.loads(pickle.dumps(engine))
    assert alone.layers == [] and list(alone.plugins.active) == list(engine.plugins.active)


def test_a_copy_in_the_middle_of_a_step_can_end_it():
    engine, model = built()
    (model(torch.randn(9, 6)).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    twin, copied = copy.deepcopy((engine, model))
    twin.after_step()
    assert (twin.step, engine.step) == (1, 0) and twin.layers == [copied[1]]


def test_torch_save_holds_a_model_in_the_middle_of_a_step():
    engine, model = built()
    (model(torch.randn(9, 6)).sum() + engine.aux_loss()).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(9, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_copy_of_a_copied_engine_has_its_own_plugins():
    engine, _ = built()
    twin = copy.deepcopy(engine)
    assert twin.plugins.active["saturation"] is not engine.plugins.active["saturation"]
    assert twin.plugins.manager.get_plugin("saturation") is twin.plugins.active["saturation"]


@pytest.mark.parametrize(
    "router",
    ["topk", "soft", *(pytest.param(name, marks=pytest.mark.long) for name in ("hierarchical", "top_p", "relu"))],
)
def test_a_layer_is_exported_with_any_number_of_tokens(router):
    _, model = built(f"{router},switch_aux" if router in ("topk", "hierarchical") else router)
    size = {"input": {0: torch.export.Dim("T", min=2, max=512)}}
    exported = torch.export.export(model.eval(), (torch.randn(8, 6),), dynamic_shapes=size).module()
    for count in (2, 17, 300):
        x = torch.randn(count, 6)
        torch.testing.assert_close(exported(x), model(x))


def test_expert_choice_is_exported_with_one_number_of_tokens():
    _, model = built("expert_choice")
    x = torch.randn(8, 6)
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), model(x))
    size = {"input": {0: torch.export.Dim("T", min=2, max=512)}}
    with refused("dynamic-tokens", "fixed number of tokens"):
        torch.export.export(model, (x,), dynamic_shapes=size)


def test_a_layer_called_several_times_adds_its_loss_each_time():
    """Value and gradient are the sums over the calls."""
    found = []
    for calls in (1, 3):
        torch.manual_seed(0)
        engine = Engine("switch_aux", ["switch_aux.weight=1"], experts=4)
        layer = engine.moe(6, 8)
        x = torch.randn(9, 6)
        y = sum(0 * layer(x) for _ in range(calls))
        aux = engine.aux_loss()
        (y.sum() + aux).backward()
        found.append((aux.item(), layer.router.weight.grad))
    assert found[1][0] == pytest.approx(3 * found[0][0])
    torch.testing.assert_close(found[1][1], 3 * found[0][1])
