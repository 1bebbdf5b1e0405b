"""Top-p routing."""

import attrs
import torch

from moe_engine import LinearRouter, Traits, assign_where, hookimpl, option


@attrs.define(eq=False)
class TopP:
    """A token goes to its most probable experts until they hold the share `p` of its probability.

    p = softmax(x W), sorted; expert i is chosen while the mass before it is at most p, so that the one which
    crosses it is in. Gates are the raw probabilities. A flat softmax takes many experts (floor(p E) + 1 of equal
    ones), which costs; the loss `entropy` keeps the model from flattening it. top_k only scales the capacity.

    Source: Huang et al., 2024.
    """

    traits = Traits(provides=("logits", "probs", "load", "choices"))
    p: float = option(0.4, help="mass before an expert up to which it is chosen", min=0)

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
        order_TE = level.select_by(probs_TE).argsort(dim=-1, descending=True)
        before_TE = (sorted_TE := probs_TE.detach().gather(-1, order_TE)).cumsum(-1) - sorted_TE
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, order_TE, before_TE <= self.p + 2**-20)
        return probs_TE, assign_where(probs_TE, chosen_TE, tokens)
