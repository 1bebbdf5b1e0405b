"""Faults of routers, biases, losses and experts."""

import torch
from faults import Plain, Sign, Top, fault

from moe_engine import Router, Traits, assign, assign_where, hookimpl, option
from moe_engine.contract.traits import USUAL
from moe_engine.plugins.routers.soft import Soft


@fault(
    "learns_from_the_task",
    message="at top_k=1: layer 'moe0': the task gives the router's level",
    bugs=(1,),
    hook="moe_router",
)
class NormalisesOne(Top):
    """At K = 1 the gate is always 1."""

    def gates(self, probs_TK):
        return probs_TK / probs_TK.sum(-1, keepdim=True)


@fault("learns_from_the_task", message="no gradient", bugs=(27,), hook="moe_router")
class GathersDeadGates(Top):
    """Gates copied into zeros without their graph."""

    def gates(self, probs_TK):
        return torch.zeros_like(probs_TK).copy_(probs_TK.detach())


@fault("learns_from_the_task", message="have no graph; score(tokens) must not detach them", hook="moe_router")
class DetachesLogits(Top):
    """A router under no_grad."""

    def score(self, tokens):
        return (super().score(tokens)[0].detach(),)


@fault(
    "choices_are_valid",
    "capacity_is_respected",
    message="a token chooses the same expert twice",
    bugs=(11,),
    hook="moe_router",
)
class ChoosesTwice(Top):
    """The best expert K times."""

    def select(self, tokens, levels):
        probs_TE = self.probs(levels[0])
        best_TK = self.ranked(levels[0], probs_TE).argmax(-1, keepdim=True).expand(-1, self.top_k)
        return probs_TE, assign(probs_TE.gather(-1, best_TK), best_TK, tokens)


@fault(
    *("choices_are_valid", "padding_changes_nothing", "capacity_is_respected"),
    message="padding is routed",
    bugs=(12, 13),
    hook="moe_router",
)
class RoutesPadding(Top):
    """Padding is routed like tokens and counts for capacity."""

    def select(self, tokens, levels):
        probs_TE, plan = super().select(tokens, levels)
        plan.selected = plan.kept = torch.ones_like(plan.selected)
        return probs_TE, plan


@fault("top_k_is_kept", message="declare what the router provides", hook="moe_router")
class PicksAnyNumber(Top):
    """All experts above the mean, with the default traits."""

    def select(self, tokens, levels):
        probs_TE = self.probs(levels[0])
        ranked_TE = self.ranked(levels[0], probs_TE)
        chosen_TE = ranked_TE >= ranked_TE.mean(-1, keepdim=True)
        return probs_TE, assign_where(probs_TE, chosen_TE, tokens)


@fault("probabilities_are_a_distribution", message="sum to 1 only within", bugs=(18, 22), hook="moe_router")
class SigmoidsForProbabilities(Top):
    """Sigmoids, which do not sum to 1."""

    def probs(self, level):
        return level.biased.sigmoid()


@fault("probabilities_are_a_distribution", message="for logits of -50", bugs=(18,), hook="moe_router")
class AddsAnEpsilon(Top):
    """Sigmoids over their sum plus an epsilon, which dominates if all are small."""

    def probs(self, level):
        a_TE = level.biased.sigmoid()
        return a_TE / (a_TE.sum(-1, keepdim=True) + 1e-20)


@fault(
    "layers_start_different",
    message="is equal in two layers",
    bugs=(28,),
    hook="moe_router",
)
class SeedsItself(Top):
    """The same draw for every layer."""

    def __init__(self, spec):
        super().__init__(spec)
        self.weight.data = 0.3 * torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(42))


@fault("causal_layer_sees_no_future", message="a later token changes an output", bugs=(2,), hook="moe_router")
class NormalisesOverTokens(Top):
    """Divides by the largest gate of the batch instead of each token's: keepdim is missing."""

    def gates(self, probs_TK):
        return probs_TK / probs_TK.max() if len(probs_TK) else probs_TK


@fault(
    "first_choice_has_the_largest_gate",
    message="the first choice does not have the largest gate",
    bugs=(23,),
    hook="moe_router",
)
class LeavesChoicesUnsorted(Top):
    """topk(sorted=False), whose first is not the best."""

    def select(self, tokens, levels):
        probs_TE = self.probs(levels[0])
        expert_TK = self.ranked(levels[0], probs_TE).topk(self.top_k, dim=-1).indices.flip(-1)
        return probs_TE, assign(self.gates(probs_TE.gather(-1, expert_TK)), expert_TK, tokens)


@fault("logits_are_raw", message="are normalised; normalise in select()", bugs=(22,), hook="moe_router")
class ScoresProbabilities(Top):
    """Probabilities instead of logits."""

    def score(self, tokens):
        return (super().score(tokens)[0].softmax(-1),)


@fault("logits_are_raw", message="it has no level, and so no logits", hook="moe_router")
class HasNoLogits(Router):
    """The first K experts for every token, without a score; the default traits promise logits."""

    levels = ()

    def __init__(self, spec):
        super().__init__()
        self.top_k = spec.top_k

    def score(self, tokens):
        return ()

    def select(self, tokens, levels):
        expert_TK = torch.arange(self.top_k).expand(len(tokens.x), -1)
        weight_TK = torch.full(expert_TK.shape, 1 / self.top_k, dtype=torch.promote_types(tokens.x.dtype, torch.float))
        probs_TE = torch.full((len(tokens.x), 6), 1 / 6)
        return probs_TE, assign(weight_TK, expert_TK, tokens)


@fault("choices_are_made", message="nothing is selected for 24 tokens")
class MixesAndDeclaresChoices(Soft):
    """Mixtures of tokens, declared as choices."""

    traits = Traits(provides=("probs", "choices"))


@fault(
    "smooth_load_matches_the_load",
    message="compare noisy logits with noisy logits",
    bugs=(7,),
    hook="moe_router",
    traits=Traits(provides=(*USUAL, "smooth_load")),
)
class MixesScales(Top):
    """Raw logits compared with thresholds on probabilities."""

    def select(self, tokens, levels):
        (level,) = levels
        noise_TE = 0.3 * torch.randn_like(level.biased) if self.training else 0
        probs_TE = (level.biased + noise_TE).softmax(-1)
        best_TK = level.select_by(level.biased + noise_TE).topk(self.top_k, dim=-1).indices
        threshold_T1 = probs_TE.gather(-1, best_TK)[:, -1:]

        def chances():
            return torch.special.ndtr((level.biased - threshold_T1) / 0.3)

        return probs_TE, assign(self.gates(probs_TE.gather(-1, best_TK)), best_TK, tokens, chances)


@fault("ties_are_spread", message="experts get no token", bugs=(28,), hook="moe_router")
class TakesTheFirst(Top):
    """Ties go to the first experts."""

    def ranked(self, level, probs_TE):
        scores_TE = level.biased if level.bias is None else level.biased + level.bias
        return scores_TE.detach() - 1e-5 * torch.arange(scores_TE.shape[1])


@fault("bias_changes_choices_but_no_gate", message="a selection bias changes gates by", bugs=(16,), hook="moe_router")
class GatesSeeTheBias(Top):
    """Gates of the biased scores."""

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        scores_TE = level.biased if level.bias is None else level.biased + level.bias
        expert_TK = self.ranked(level, probs_TE).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(self.gates(scores_TE.softmax(-1).gather(-1, expert_TK)), expert_TK, tokens)


@fault(
    "bias_changes_choices_but_no_gate",
    message="a selection bias of up to 1 changes no choice",
    bugs=(17,),
    hook="moe_router",
)
class IgnoresTheBias(Top):
    """Choices of the raw scores."""

    def ranked(self, level, probs_TE):
        return level.part_ties(level.biased)


@fault("causal_layer_sees_no_future", message="a later token changes an output", bugs=(26,), hook="moe_router")
class ComparesTokens(Top):
    """Scores relative to the batch's mean, which depends on later tokens."""

    def select(self, tokens, levels):
        mean_E = tokens.mean(levels[0].biased)
        levels[0].biased = levels[0].biased - mean_E
        return super().select(tokens, levels)


# -- biases ---------------------------------------------------------------------------------------


@fault("equal_load_leaves_the_bias_alone", message="equal loads move biases apart", bugs=(15,), hook="moe_bias")
class RanksLoads(Sign):
    """By rank, which differs between equal loads too."""

    def excess(self, step):
        return step.load.argsort(stable=True).argsort() / len(step.load)


@fault("overload_lowers_the_bias", message="its bias rises above that of an idle unit", bugs=(15,), hook="moe_bias")
class PushesUp(Sign):
    """The wrong sign."""

    rate = -0.01


@fault("overload_lowers_the_bias", message="its bias stays equal to that of an idle unit", bugs=(15,), hook="moe_bias")
class NeverMoves(Sign):
    """torchtitan's hook that returned too early."""

    def after_step(self, step):
        return


@fault("bias_has_no_gradient", message="b is a parameter; make it a buffer", hook="moe_bias")
class LearnsItsBias(Sign):
    """A parameter, which the optimizer updates too."""

    def __init__(self, size):
        super().__init__(size)
        del self.b
        self.expert_param("b", (size,), fresh=lambda shape, generator=None: torch.zeros(shape), role="logit_bias")


# -- losses ---------------------------------------------------------------------------------------


@fault(
    "value_at_balance_is_as_declared",
    message="is 2 at balance with top_k=2, not 1",
    bugs=(5,),
    hook="moe_aux_loss",
    traits=Traits(balanced=1.0),
)
def forgets_k(self, routing):
    """f summed over choices and divided by tokens: K at balance."""
    f_E = routing.load / routing.tokens.count.clamp(min=1)
    return routing.experts * (f_E * routing.mean(routing.probs)).sum()


@fault("loss_is_a_mean_over_tokens", message="divide by the number of tokens", bugs=(20,), hook="moe_aux_loss")
def sums_tokens(self, routing):
    """A sum over tokens, which grows with the batch."""
    return routing.tokens.real(routing.probs.square()).sum()


@fault("loss_is_unweighted", message="return it unweighted", bugs=(20,))
class WeightsItself:
    """Multiplied here, and again by the core."""

    weight: float = option(0.5, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        return self.weight * routing.mean(routing.probs).square().sum()


@fault(
    "gradient_matches_finite_differences",
    message="detach nothing that the value depends on",
    bugs=(23,),
    hook="moe_aux_loss",
)
def half_detached(self, routing):
    """Half of its gradient is missing."""
    mean_E = routing.mean(routing.probs)
    return (mean_E * mean_E.detach()).sum()


# -- experts --------------------------------------------------------------------------------------


@fault("forward_agrees_with_outputs", message="rows past the last are not 0", hook="moe_experts")
class FillsUnusedRows(Plain):
    """Ones for the rows that no expert owns."""

    def forward(self, x_ND, counts_E):
        out_NO = super().forward(x_ND, counts_E)
        return torch.where(torch.arange(len(out_NO))[:, None] < counts_E.sum(), out_NO, 1.0)


@fault("forward_agrees_with_outputs", message="forward and outputs differ by", hook="moe_experts")
class ShufflesOutputs(Plain):
    """Outputs in a different order from the experts."""

    def outputs(self, x_SD):
        return super().outputs(x_SD).roll(1, 0)


@fault(
    *("rows_are_independent", "causal_layer_sees_no_future", "forward_agrees_with_outputs"),
    message="changing one row changes the output of another",
    bugs=(26,),
    hook="moe_experts",
)
class NormalisesRows(Plain):
    """Subtracts the mean over all rows."""

    def forward(self, x_ND, counts_E):
        used = (torch.arange(len(x_ND)) < counts_E.sum())[:, None]
        mean_D = torch.where(used, x_ND, 0).sum(0) / counts_E.sum().clamp(min=1)
        return super().forward(x_ND - mean_D, counts_E)


@fault("expert_grad_is_per_expert", message="it is not 0 for an expert without tokens", hook="moe_experts")
class SpreadsGradients(Plain):
    """One mean for all experts."""

    def expert_grad(self):
        own_E = super().expert_grad()
        return own_E.mean().expand_as(own_E)
