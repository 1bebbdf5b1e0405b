import attrs
import torch

from moe_engine import LinearRouter, Traits, assign, causal_problem, hookimpl, option


@attrs.define(eq=False)
class Sinkhorn:
    """Top-k of a balanced transport plan (S-BASE).

    pi = diag(u) exp(s) diag(v) with row sums 1/T and column sums 1/E, from `iterations` rounds of normalisation in
    the log domain, without gradient, in training only; S = top-K of pi_t. Evaluation takes the top-K of s. Gates
    come from the raw logits: sigmoid(s_i) at K = 1, else softmax(s)_i. Every expert gets the same load; adding a
    constant to one expert's logits changes no choice. Eight rounds bring column sums within 1e-6 for logits of
    standard deviation 1, within 1 % for 3. Choices depend on the whole batch, so the router is not causal.
    In evaluation a token chooses by its own logits alone.

    Source: Clark et al., 2022 (Unified Scaling Laws for Routed Language Models).
    """

    traits = Traits(provides=("logits", "probs", "top_k", "choices"), per_rank=True)
    iterations: int = option(8, help="rounds of normalisation; sharp logits need more", min=1)
    allow_noncausal: bool = option(False, help="allow use in a causal layer, where it sees later tokens")

    @hookimpl
    def moe_check(self, setup):
        return causal_problem(setup.spec, "sinkhorn", self.allow_noncausal)

    @hookimpl
    def moe_router(self, spec):
        return SinkhornRouter(spec, self.iterations)


class SinkhornRouter(LinearRouter):
    def __init__(self, spec, iterations):
        super().__init__(spec)
        self.iterations = iterations

    def select(self, tokens, levels):
        (level,) = levels
        scores_TE = level.biased.detach()
        if self.training:
            scores_TE = log_transport(scores_TE, tokens, self.iterations)
        expert_TK = level.select_by(scores_TE).topk(self.top_k, dim=-1).indices
        probs_TE = level.biased.softmax(-1)
        gates_TE = level.biased.sigmoid() if self.top_k == 1 else probs_TE
        return probs_TE, assign(gates_TE.gather(-1, expert_TK), expert_TK, tokens)


def log_transport(scores_TE, tokens, iterations):
    """log(T pi) [T, E]: exp of it sums to 1 for each token, and to T / E for each expert over all real tokens."""
    target = (tokens.count / scores_TE.shape[1]).log()
    price_E = torch.zeros_like(scores_TE[:1]).sum(0)
    for _ in range(iterations):
        plan_TE = (scores_TE - price_E).log_softmax(-1)
        if tokens.mask is not None:
            plan_TE = plan_TE.masked_fill(~tokens.mask[:, None], -torch.inf)
        price_E = price_E + (plan_TE.logsumexp(0) - target).nan_to_num(0, 0, 0)  # without tokens: no change
    return (scores_TE - price_E).log_softmax(-1)
