"""New experts that take half of their parent's hidden units."""

import attrs
import torch

from moe_engine import NewExpert, Traits, UsageError, hookimpl


@attrs.define(eq=False)
class ExclusiveSplit:
    """Parent and newcomer part the hidden units between them: F = F' + F'' at birth.

    A random half of the hidden units keeps its output weights in the newcomer, the other half in the parent;
    where a unit is not kept, its output weights are zero, so that shapes stay and the unit can be learned
    anew. An output bias is halved. Router row and moments are copied. A token that chooses both, with equal
    gates of twice the parent's together, gets what it got; one that chooses one of them gets half a network.

    Source: Zhu et al., 2024 (LLaMA-MoE), there for a dense network cut into experts.
    """

    traits = Traits(effects=("copies_router_row",))

    @hookimpl
    def moe_new_expert(self, parent, fresh, generator):
        if parent is None:
            return NewExpert(fresh)
        if not any(name.startswith("experts.") for name in parent):
            return NewExpert(parent, moments="copy")  # a group's own row
        if "experts.w_out" not in parent:
            raise UsageError("exclusive_split parts the hidden units of stacked MLPs, and these experts are others")
        hidden = parent["experts.w_out"].shape[0]
        mine_H = torch.randperm(hidden, generator=generator) < hidden // 2
        halves = []
        for keep_H in (mine_H, ~mine_H):
            half = {"experts.w_out": parent["experts.w_out"] * keep_H[:, None]}
            if "experts.b_out" in parent:
                half["experts.b_out"] = parent["experts.b_out"] / 2
            halves.append(half)
        return NewExpert({**parent, **halves[0]}, parent_values=halves[1], moments="copy")
