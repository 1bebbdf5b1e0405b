import attrs
import torch

from moe_engine import LinearRouter, Traits, assign_where, hookimpl, option


@attrs.define(eq=False)
class TopP:
    """Most probable experts up to a share of the mass.

    p = softmax(x W), sorted; expert i is chosen if the mass before it is at most `p` (within 2^-20), so the expert that
    crosses `p` is included. Gates are the raw probabilities. A flat softmax takes many experts (floor(p E) + 1 equal
    ones) and is expensive; a loss on each token's entropy prevents that. top_k only scales the layer's capacity.

    Source: Huang et al., 2024 (Harder Tasks Need More Experts).
    """

    traits = Traits(provides=("logits", "probs", "load", "choices"))
    p: float = option(0.4, help="choose experts until their probabilities exceed this sum", min=0)

    @hookimpl
    def moe_router(self, spec):
        return TopPRouter(spec, self.p)


class TopPRouter(LinearRouter):
    def __init__(self, spec, p):
        super().__init__(spec)
        self.p = p

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        by_TE = level.select_by(probs_TE)
        order_TE = by_TE.argsort(dim=-1, descending=True)
        sorted_TE = probs_TE.detach().gather(-1, order_TE)
        before_TE = sorted_TE.cumsum(-1, dtype=by_TE.dtype) - sorted_TE
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, order_TE, before_TE <= self.p + 2**-20)
        return probs_TE, assign_where(probs_TE, chosen_TE, tokens)
