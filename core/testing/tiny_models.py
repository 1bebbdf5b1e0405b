"""Tiny random models of transformers' architectures, on which families are tried. Nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..pretrained.loading import quietly

EXPERTS, TOP_K, LAYERS, VOCAB = 8, 2, 4, 64
# whatever a config calls its sizes; a name that it does not have is left out
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "d_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    "shared_intermediate_size": 32,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_attention_groups", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "global_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), TOP_K),
    **dict.fromkeys(("top_k_experts", "top_k", "num_experts_for_top"), TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "expert_capacity": 8,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **{"moe_layer_start_index": 0, "moe_layer_end_index": LAYERS - 1, "mlp_only_layers": []},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
    **{"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "conv_L_cache": 3},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
    **{"num_nextn_predict_layers": 0, "mtp_num_layers": 0, "num_global_key_value_heads": 2},
    **{"hidden_size_per_layer_input": 8, "enable_moe_block": True, "zero_expert_num": 2, "moe_latent_size": None},
    **{"attention_chunk_size": 64, "sliding_window": 64, "chunk_size": 16, "block_size": 16},
}
OPTIONAL = ("q_lora_rank", "moe_latent_size")  # switches a part of the model on, so None stays None


def tiny_model(name: str, **settings: Any) -> nn.Module:
    """A tiny model with random weights, in eval mode, of a model type of transformers or of a class there.

    name: "mixtral", or "MixtralForCausalLM". settings: values of its config, such as "num_experts" or
    "attn_config.rope_theta". It has 8 experts, two per token.
    """
    import transformers

    kind = getattr(transformers, name, None) or _causal(transformers, name)
    config = shrunk(kind.config_class(), settings)
    torch.default_generator.manual_seed(0)
    model: nn.Module = kind(config)
    return model.eval()


def tiny_checkpoint(folder: str | Path, name: str, **settings: Any) -> Path:
    """A folder with a `tiny_model` as safetensors and a tokenizer that reads text byte by byte; returns it."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level)
    model: Any = tiny_model(name, vocab_size=len(alphabet), **settings)
    with quietly(transformers):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(folder)


def _causal(transformers: Any, model_type: str) -> Any:
    """The class of a model type that has a language model's head, or the bare model."""
    names = transformers.models.auto.modeling_auto
    tables = (
        names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        names.MODEL_MAPPING_NAMES,
    )
    found = [table[kind] for table in tables for kind in (model_type, model_type.replace("_", "-")) if kind in table]
    return getattr(transformers, found[0])


def shrunk(config: Any, settings: dict[str, Any]) -> Any:
    """A config with tiny sizes, configs in it too; returns it."""
    for inner in [value for value in vars(config).values() if hasattr(value, "model_type")]:
        shrunk(inner, {})
    for name, value in {**SIZES, **settings}.items():
        where, _, last = name.rpartition(".")
        holder = getattr(config, where) if where else config
        given = name in settings
        if not given and (not hasattr(holder, last) or (last in OPTIONAL and getattr(holder, last) is None)):
            continue
        several = isinstance(getattr(holder, last, None), list | tuple) and not isinstance(value, list | tuple)
        try:
            setattr(holder, last, [value] * LAYERS if several else value)
        except (AttributeError, TypeError, ValueError):  # a value that a config derives from others
            continue
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) > LAYERS:
            varied = [*dict.fromkeys(kinds)] * LAYERS
            setattr(config, name, list(kinds[-LAYERS:]) if name == "mlp_layer_types" else varied[:LAYERS])
    if getattr(config, "kv_lora_rank", None):  # latent attention has as many heads for keys as for queries
        config.num_key_value_heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("yarn", "llama3", "longrope"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return config
