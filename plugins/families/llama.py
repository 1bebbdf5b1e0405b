import attrs

from moe_engine import Family, hookimpl

SHARED = ("shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")


@attrs.define(eq=False)
class Llama:
    """Llama, Mistral and Qwen2: dense, to be upcycled.

    A Llama or Mistral whose layers are all upcycled is exported as a Mixtral, which has the same attention and norms;
    one with dense layers, and a Qwen2, as a Qwen2-MoE, whose shared expert is then one unit with weights of 0.

    Sources: Touvron et al., 2023 (LLaMA); Jiang et al., 2023 (Mistral 7B); Yang et al., 2024 (Qwen2).
    """

    @hookimpl
    def moe_family(self):
        return Family(native=native)


def native(config, spec, dense):
    qwen2 = config.model_type == "qwen2"
    if not dense and not qwen2:
        return "mixtral", {"num_local_experts": spec.experts, "num_experts_per_tok": spec.top_k}, ()
    if getattr(config, "use_sliding_window", getattr(config, "sliding_window", None)):
        return "Qwen2-MoE, which may keep dense layers, has no place for its sliding window; upcycle all layers"
    values = {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": spec.hidden,
        "shared_expert_intermediate_size": 1,
        "head_dim": config.hidden_size // config.num_attention_heads if qwen2 else config.head_dim,
        "qkv_bias": qwen2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense),
    }
    return "qwen2_moe", values, [f"{name}.weight" for name in SHARED]
