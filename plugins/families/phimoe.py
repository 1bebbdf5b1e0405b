import attrs

from moe_engine import STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class PhiMoe:
    """Phi-3.5-MoE: two experts by SparseMixer.

    The second is chosen, and its gate computed, without the first; the config's router_jitter_noise says how far below
    the best a score still competes.

    Source: Abdin et al., 2024 (Phi-3 Technical Report).
    """

    @hookimpl
    def moe_family(self):
        tensors = {"router.weight": Stored("logit_row", fan_in=1), **STACKED}
        return Family(router="router", tensors=tensors, recipe=recipe)


def recipe(block):
    return "sparsemixer", {"jitter": float(block.setting("router_jitter_noise"))}
