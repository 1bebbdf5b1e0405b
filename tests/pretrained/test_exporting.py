"""export(engine, model, folder): what from_pretrained loads again, or a refusal that leaves nothing."""

import json

import pytest
import torch

from moe_engine import Engine, Growth, adopt, export
from moe_engine.pretrained import exporting
from support import refused

from .test_adopting import adopted, build, logits

transformers = pytest.importorskip("transformers")


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_grown_model_loads_with_equal_logits(tmp_path):
    """In the architecture's own names; the adopted model stays adopted, and its config what it was."""
    engine, model, _ = adopted(output_router_logits=True)
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (None,)))
    exported = export(engine, model, tmp_path / "out", max_shard_size="40KB")
    assert exported.experts == 9 and exported.change < 1e-5
    again = loaded(tmp_path / "out")
    assert type(again) is type(model)
    assert again.config.num_local_experts == 9
    assert again.config.output_router_logits and not model.config.output_router_logits
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.block_sparse_moe.experts.8.w1.weight" in index["weight_map"]
    assert len(set(index["weight_map"].values())) > 1  # in shards
    assert not any(".moe." in name for name in index["weight_map"])
    assert len(engine.layers) == 4


def test_a_selection_bias_goes_where_the_architecture_has_a_place(tmp_path):
    engine, model, _ = adopted("loss_free", "deepseek_v3")
    for layer in engine.layers:
        layer.biases[0]["loss_free"].b.uniform_(-0.3, 0.3)
    own = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    export(engine, model, tmp_path / "out")
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, own)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_tensors_that_are_flat_on_disk(tmp_path):
    engine, model, _ = adopted(kind="dbrx", **{"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0})
    assert model.transformer.blocks[0].ffn.experts.mlp.w1.dim() == 3
    export(engine, model, tmp_path / "out")
    state = loaded(tmp_path / "out").state_dict()
    assert state["transformer.blocks.0.ffn.experts.mlp.w1"].dim() == 2


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_tokenizer_and_generation_config_come_along(tmp_path):
    engine, model, _ = adopted()
    model.generation_config.max_new_tokens = 7
    export(engine, model, tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert loaded(tmp_path / "out").generation_config.max_new_tokens == 7


def one_layer_grown():
    engine, model, _ = adopted()
    engine.grow(Growth(engine.layers[1].name, (None,)))
    return engine, model


def biased():
    engine, model, _ = adopted("loss_free")
    engine.layers[0].biases[0]["loss_free"].b.uniform_(-0.2, 0.2)
    return engine, model


def grown_jetmoe():
    engine, model, _ = adopted(kind="jetmoe")
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (None,)))
    return engine, model


REFUSED = {
    "layers of unequal E": (one_layer_grown, "not-one-size", ["8 experts in model.layers.0.mlp", "9 experts in"]),
    "a bias without a place": (biased, "not-exportable", ["the bias 'loss_free' in model.layers.0.mlp"]),
    "another router": (lambda: adopted("top_p")[:2], "not-exportable", ["a router that decides otherwise"]),
    "a capacity": (lambda: adopted(spec={"capacity": 1.5})[:2], "not-exportable", ["capacity=1.5"]),
    "a number that means more": (grown_jetmoe, "not-exportable", ["the config has no number of experts"]),
    "a plain model": (lambda: (Engine(), build()), "not-adopted", ["save_pretrained()"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_hold_is_named_and_nothing_is_left(case, tmp_path):
    make, code, words = REFUSED[case]
    engine, model = make()
    with refused(code, *words):
        export(engine, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path):
    engine, model, _ = adopted()
    with refused("folder-exists", str(tmp_path)):
        export(engine, model, tmp_path)


def test_what_loads_otherwise_is_refused(tmp_path, monkeypatch):
    """Here the weights of one expert are not written as they are."""
    engine, model, _ = adopted()
    plain = exporting.plain_state

    def damaged(*given):
        state = plain(*given)
        return {
            name: value * 1.5 if name.endswith("layers.1.mlp.experts.down_proj") else value
            for name, value in state.items()
        }

    monkeypatch.setattr(exporting, "plain_state", damaged)
    with refused("not-reloaded", "answers differently"):
        export(engine, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_copies_of_an_expert_are_parted_by_index_in_transformers(tmp_path):
    """So their logits may differ by more than rounding, which is no fault of what was written."""
    engine, model, _ = adopted("clone")
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (0,)))
    export(engine, model, tmp_path / "out")
    again, ids = loaded(tmp_path / "out"), torch.arange(3, 63).view(1, -1)
    with torch.no_grad():
        expected = model(ids).logits
        assert (again(ids).logits - expected).abs().max() > 1e-4
        adopt(Engine(), again)
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
