import attrs
import torch

from moe_engine import LevelSpec, Router, UsageError, assign, groups_problem, hookimpl, linear_logits, option, uniform


@attrs.define(eq=False)
class Hierarchical:
    """Best groups first, then the best experts in each.

    p_i = G_g(x) G_i|g(x): a softmax over groups times a softmax within the group of expert i. A token picks
    `groups_kept` groups and K / groups_kept experts in each. The gate is p_i, with each factor divided by its sum
    over the units picked at that level; where only one is picked the raw probability stays, because a normalised
    single gate has no gradient. Groups may differ in size. Biases act on each level; losses see p over all experts.

    Source: Shazeer et al., 2017 (Outrageously Large Neural Networks), appendix B.
    """

    groups: int = option(2, help="number of groups", min=1)
    groups_kept: int = option(1, help="number of groups a token picks", min=1)

    @hookimpl
    def moe_check(self, setup):
        groups = setup.sizes.get("group", self.groups)
        return groups_problem(setup.spec, groups, self.groups_kept, equal=False)

    @hookimpl
    def moe_router(self, spec):
        return TwoLevelRouter(spec, self.groups, self.groups_kept)


class TwoLevelRouter(Router):
    def __init__(self, spec, groups, groups_kept):
        super().__init__()
        self.top_k, self.groups_kept, fresh = spec.top_k // groups_kept, groups_kept, uniform(spec.dim)
        self.expert_param("group_weight", (groups, spec.dim), fresh=fresh, role="logit_row", of="group")
        self.expert_param("weight", (spec.experts, spec.dim), fresh=fresh, role="logit_row")
        self.expert_buffer("group_of", torch.arange(spec.experts) * groups // spec.experts, values="group")

    def adjust_rows(self, staged, plans):
        group_of = staged.get("group_of", self.group_of)
        sizes = group_of[group_of >= 0].bincount(minlength=len(staged.get("group_weight", self.group_weight)))
        if len(sizes) < self.groups_kept or sizes.min() < self.top_k:
            why = f"hierarchical needs at least {self.groups_kept} groups of {self.top_k} experts each to remain"
            raise UsageError(why, code="too-few-experts")

    @property
    def levels(self):
        group = LevelSpec("group", len(self.group_weight), self.groups_kept)
        return group, LevelSpec("expert", len(self.weight), self.top_k, limited=True)

    def unit_of_expert(self, level):
        return self.group_of if level == "group" else None

    def competes_in(self, level):
        return self.group_of if level == "expert" else None

    def score(self, tokens):
        return linear_logits(tokens.x, self.group_weight), linear_logits(tokens.x, self.weight)

    def select(self, tokens, levels):
        group, leaf = levels
        group_TG = group.biased.softmax(-1)
        inside_GE = torch.arange(group_TG.shape[1], device=self.group_of.device)[:, None] == self.group_of
        inside_TE = leaf.biased[:, None].masked_fill(~inside_GE, -torch.inf).softmax(-1).sum(1)  # G_i|g
        best_TM = group.select_by(group.biased).topk(self.groups_kept, dim=-1).indices
        leaf_TE = leaf.select_by(leaf.biased)
        expert_TMP = leaf_TE[:, None].masked_fill(~inside_GE[best_TM], -torch.inf).topk(self.top_k, dim=-1).indices
        outer_TM = _normalised(group_TG.gather(-1, best_TM))
        inner_TMP = _normalised(inside_TE.gather(-1, expert_TMP.flatten(1)).view_as(expert_TMP))
        probs_TE = group_TG[:, self.group_of] * inside_TE
        return probs_TE, assign((outer_TM[..., None] * inner_TMP).flatten(1), expert_TMP.flatten(1), tokens)


def _normalised(gates):
    return gates / gates.sum(-1, keepdim=True) if gates.shape[-1] > 1 else gates
