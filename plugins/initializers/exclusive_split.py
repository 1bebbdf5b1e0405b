import attrs
import torch

from moe_engine import NewExpert, Traits, UsageError, hookimpl


@attrs.define(eq=False)
class ExclusiveSplit:
    """Split the parent's hidden units between parent and child.

    F = F' + F'' at first: a random half of the hidden units keeps its output weights in the new expert, the other
    half in the parent. Where a unit is not kept its output weights are 0, so shapes stay and the unit can be
    relearned. An output bias is halved; router row and moments are copied. A token that chooses both, with gates
    that sum to twice the parent's, gets the parent's old output; a token that chooses one gets half the network.

    Source: Zhu et al., 2024 (LLaMA-MoE), where a dense network is split into experts.
    """

    traits = Traits(effects=("copies_router_row",))

    @hookimpl
    def moe_new_expert(self, parent, fresh, generator):
        if parent is None:
            return NewExpert(fresh)
        if not any(name.startswith("experts.") for name in parent):
            return NewExpert(parent, moments="copy")  # the row of a group
        if "experts.w_out" not in parent:
            why = "exclusive_split splits the hidden units of stacked MLPs, which these experts are not"
            raise UsageError(f"{why}; choose another initializer", code="unsupported-experts")
        hidden = parent["experts.w_out"].shape[0]
        child_H = torch.randperm(hidden, generator=generator) < hidden // 2
        halves = []
        for keep_H in (child_H, ~child_H):
            half = {"experts.w_out": parent["experts.w_out"] * keep_H[:, None]}
            if "experts.b_out" in parent:
                half["experts.b_out"] = parent["experts.b_out"] / 2
            halves.append(half)
        return NewExpert({**parent, **halves[0]}, parent_values=halves[1], moments="copy")
