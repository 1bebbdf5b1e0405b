"""Expert choice: experts choose tokens."""

import attrs
import torch

from moe_engine import Assignments, LinearRouter, Traits, causal_problem, hookimpl, option


@attrs.define(eq=False)
class ExpertChoice:
    """Each expert takes the C = round(T K / E), at least 1, tokens of a group with the highest probability for it.

    p = softmax(x W) over experts; the gate is p_ti. So the load is equal by force, top_k = K is the mean
    number of experts of a token, and a token may get none or all. A group is the whole batch, or each sequence.
    Padding is never taken; C counts real tokens. What a token gets depends on the others: not causal,
    and one token alone is routed otherwise than in a batch.

    Source: Zhou et al., 2022.
    """

    traits = Traits(provides=("logits", "probs", "choices"))
    group: str = option("batch", help="tokens among which experts choose", choices=("batch", "sequence"))
    allow_noncausal: bool = option(False, help="allow it in a causal layer, where it sees later tokens")

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.capacity is not None:
            return "expert_choice fills every expert alike, so a capacity has nothing to limit; leave --capacity away"
        return causal_problem(setup.spec, "expert_choice", self.allow_noncausal)

    @hookimpl
    def moe_router(self, spec):
        return ExpertChoiceRouter(spec, self.group)


class ExpertChoiceRouter(LinearRouter):
    def __init__(self, spec, group):
        super().__init__(spec)
        self.group = group

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        count, experts = probs_TE.shape
        size = max(tokens.shape[-1], 1) if self.group == "sequence" else max(count, 1)
        real_GS = torch.ones(count, device=probs_TE.device).view(-1, size)
        if tokens.mask is not None:
            real_GS = tokens.mask.to(real_GS.dtype).view(-1, size)
        scores_GSE = level.select_by(probs_TE).view(-1, size, experts)
        scores_GSE = scores_GSE.masked_fill(real_GS[..., None] == 0, -torch.inf)
        most = min(size, max(1, round(size * self.top_k / experts)))
        best_GCE = scores_GSE.topk(most, dim=1).indices
        taken_G = (real_GS.sum(1) * self.top_k / experts).round().clamp(min=1)  # C of the real tokens
        rank_GCE = torch.arange(most, device=best_GCE.device)[None, :, None].expand_as(best_GCE)
        first_G = torch.arange(best_GCE.shape[0], device=best_GCE.device) * size
        token_N = (best_GCE + first_G[:, None, None]).flatten()
        expert_N = torch.arange(experts, device=best_GCE.device).expand_as(best_GCE).flatten()
        selected_N = (rank_GCE < taken_G[:, None, None]).flatten() & (real_GS.flatten()[token_N] > 0)
        weight_N = probs_TE[token_N, expert_N]
        return probs_TE, Assignments(token_N, expert_N, weight_N, rank_GCE.flatten(), selected_N, selected_N)
