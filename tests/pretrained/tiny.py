"""Tiny transformers models with MoE blocks, and what their gates chose."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

EXPERTS, TOP_K, LAYERS, VOCAB = 8, 2, 2, 50
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"num_experts_per_tok": TOP_K, "bos_token_id": 1, "eos_token_id": 2}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
DEEPSEEK = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 0}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK |= {"n_group": 4, "topk_group": 2}
FAMILIES = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Olmoe": {"num_experts": EXPERTS},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 12},
    "Qwen3Moe": {**QWEN, "head_dim": 8},
    "DeepseekV2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "DeepseekV3": DEEPSEEK,
}
ALL = pytest.mark.parametrize("family", FAMILIES)


def build(family, seed=0, **settings):
    """A tiny model with random weights, its gates wide enough to choose."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0)
            if family == "DeepseekV3":
                layer.mlp.gate.e_score_correction_bias.uniform_(0, 0.5)
    return model


def batch(rows=3, length=10):
    """(ids, mask): the first row is padded on the left by four."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def chosen_by_gates(model):
    """The gates' outputs, caught by hooks of this test: {layer: [(logits, indices)]}."""
    caught = {index: [] for index in range(LAYERS)}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, __, out, index=index: caught[index].append((out[0], out[2])))
    return caught


def counted(indices_TK, mask=None):
    real = slice(None) if mask is None else mask.flatten().bool()
    load = indices_TK[real].flatten().bincount(minlength=EXPERTS).double()
    return load / load.sum()


def name(index):
    return f"model.layers.{index}.mlp"
