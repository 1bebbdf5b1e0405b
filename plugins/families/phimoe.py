import attrs

from moe_engine import STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class PhiMoe:
    """Phi-3.5-MoE: two experts by SparseMixer.

    Source: Abdin et al., 2024 (Phi-3 Technical Report).
    """

    @hookimpl
    def moe_family(self):
        tensors = {"router.weight": Stored("logit_row", fan_in=1), **STACKED}
        return Family(router="router", tensors=tensors, count="num_local_experts", recipe=recipe)


def recipe(block):
    return "sparsemixer", {"jitter": float(block.setting("router_jitter_noise"))}
