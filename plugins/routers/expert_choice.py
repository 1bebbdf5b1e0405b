import attrs
import torch

from moe_engine import Assignments, LinearRouter, Traits, UsageError, causal_problem, hookimpl, option


@attrs.define(eq=False)
class ExpertChoice:
    """Each expert chooses its tokens.

    p = softmax(x W) over experts. Expert i takes the C = max(1, round(T K / E)) tokens of a group with the largest
    p_ti; the gate is p_ti. Every expert gets the same load, K = top_k is the mean number of experts per token, and a
    token may get none or all. A group is the whole batch or one sequence. Padding is never taken, and C counts real
    tokens only. A larger fp32 p_ti is always taken before a smaller one; equal ones are parted by a hash of the tokens,
    and of identical tokens an expert may take some. A token's experts depend on the other tokens, so the router is not
    causal, and a token alone is routed differently than in a batch.

    Source: Zhou et al., 2022 (Mixture-of-Experts with Expert Choice Routing).
    """

    traits = Traits(provides=("logits", "probs", "choices"), per_rank=True)
    group: str = option("batch", help="the tokens an expert chooses among", choices=("batch", "sequence"))
    allow_noncausal: bool = option(False, help="allow use in a causal layer, where it sees later tokens")

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.limited:
            return "expert_choice already gives every expert the same load; set neither capacity nor eval_capacity"
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
        if not isinstance(count, int):  # it is a symbol of torch.export
            why = "expert_choice takes T K / E tokens, a number that torch.export can't keep open"
            raise UsageError(f"{why}; export it with a fixed number of tokens", code="dynamic-tokens")
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
