import attrs

from moe_engine import Family, hookimpl


@attrs.define(eq=False)
class Llama:
    """Llama and Mistral: dense, to be upcycled.

    A model whose layers are all upcycled is exported as a Mixtral, which has the same attention and norms.

    Sources: Touvron et al., 2023 (LLaMA); Jiang et al., 2023 (Mistral 7B).
    """

    @hookimpl
    def moe_family(self):
        return Family(native=native)


def native(config, spec, dense):
    if dense:
        return f"every layer of a Mixtral is a mixture, but {len(dense)} are still dense; upcycle with layers='all'"
    return "mixtral", {"num_local_experts": spec.experts, "num_experts_per_tok": spec.top_k}
