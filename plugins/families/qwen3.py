import attrs

from moe_engine import Family, hookimpl


@attrs.define(eq=False)
class Qwen3:
    """Qwen3: dense, to be upcycled.

    An upcycled model is exported as a Qwen3-MoE, which may keep dense layers.

    Source: Qwen Team, 2025 (Qwen3).
    """

    @hookimpl
    def moe_family(self):
        return Family(native=native)


def native(config, spec, dense):
    if config.use_sliding_window:
        return "Qwen3-MoE has no place for a sliding window of some layers"
    return (
        "qwen3_moe",
        {
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.top_k,
            "norm_topk_prob": True,
            "moe_intermediate_size": spec.hidden,
            "head_dim": config.head_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(dense),
        },
        (),
    )
