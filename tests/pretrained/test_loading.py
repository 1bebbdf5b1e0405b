"""A checkpoint's folder is read without code, pickles or guesses; what is wrong with one is said in a sentence."""

import json

import pytest
import torch

from moe_engine.pretrained.loading import load_model, load_tokenizer
from support import refused

from .tiny import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build("Mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a checkpoint, to break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_is_loaded_as_it_was_saved(folder):
    model, ids = load_model(folder), torch.arange(3, 20)[None]
    assert not model.training
    assert torch.equal(model(ids).logits, build("Mixtral")(ids).logits)


def test_weights_that_are_missing_or_of_another_size_are_refused(folder):
    set_config(folder, num_hidden_layers=3)
    with refused("incomplete-checkpoint", "lacks", "MixtralForCausalLM", "model.layers.2.", "more"):
        load_model(folder)
    set_config(folder, num_hidden_layers=2, intermediate_size=20)
    with refused("incomplete-checkpoint", "other sizes", "down_proj"):
        load_model(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load_model(folder)  # safetensors are there, too
    set_config(folder, transformers_weights="pytorch_model.bin")
    with refused("pickled-checkpoint", "pytorch_model.bin"):
        load_model(folder)
    set_config(folder, transformers_weights=None)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    with refused("pickled-checkpoint", "pytorch_model.bin"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with refused("pickled-checkpoint", "pickled weights alone"):
        load_model(folder)


def test_code_of_the_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    set_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    with refused("unreadable-checkpoint", "custom code"):
        load_model(folder)
    set_config(folder, model_type="mixtral", auto_map=None, attn_implementation="someone/kernel")
    with refused("code-in-checkpoint", "someone/kernel"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"{"], ids=["empty", "zeros", "short"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_refused_in_one_sentence(folder, name, content):
    (folder / name).write_bytes(content)
    with refused("damaged-file" if name == "config.json" else "unreadable-checkpoint", str(folder)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_folders_without_a_checkpoint(folder, tmp_path):
    with refused("no-checkpoint", "absent"):
        load_model(tmp_path / "absent")
    (folder / "config.json").unlink()
    with refused("no-checkpoint", "config.json"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with refused("not-a-checkpoint", "adapter"):
        load_model(folder)
    (tmp_path / "ggufs").mkdir()
    for name in "ab":
        (tmp_path / "ggufs" / f"{name}.gguf").write_bytes(b"GGUF")
    with refused("several-checkpoints", "a.gguf and b.gguf"):
        load_model(tmp_path / "ggufs")


def test_a_folder_without_a_tokenizer(folder):
    with refused("unreadable-checkpoint", "the tokenizer", str(folder)):
        load_tokenizer(folder)
