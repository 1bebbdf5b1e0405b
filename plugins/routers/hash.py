import attrs
import torch

from moe_engine import Router, Traits, UsageError, assign, generator, hookimpl, option


@attrs.define(eq=False)
class Hash:
    """A fixed random table maps token ids to experts.

    table[id] in [V, K] gives a token's K different experts; every gate is 1 / K. Each column of the table distributes
    the ids evenly. Nothing is learned, so losses and biases cannot act. A new expert takes every second id of its
    parent, or, without a parent, an equal share from all experts; a removed expert's ids go to the one it is merged
    into, or else to the others in turn.

    Source: Roller et al., 2021 (Hash Layers), where the gate is 1; 1 / K keeps the output's scale independent of K.
    """

    traits = Traits(provides=("top_k", "choices"), effects=("parts_copies",))
    seed: int = option(0, help="seed of the table", min=0)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.dim and not setup.spec.vocab:
            return "hash routes by token ids, which this layer does not get; choose another router or a text task"
        return None

    @hookimpl
    def moe_router(self, spec):
        return HashRouter(spec, self.seed)


class HashRouter(Router):
    keeps_function = ("copies_expert",)
    levels = ()

    def __init__(self, spec, seed):
        super().__init__()
        order_V = torch.randperm(spec.vocab, generator=generator(seed, "hash"))
        first_V = torch.empty_like(order_V).scatter(0, order_V, torch.arange(spec.vocab)) % spec.experts
        table_VK = (first_V[:, None] + torch.arange(spec.top_k)) % spec.experts
        self.expert_buffer("table", table_VK, of="id", values="expert")

    def score(self, tokens):
        return ()

    def select(self, tokens, levels):
        if tokens.ids is None:
            raise UsageError("hash routes by token ids; call the layer with ids=", code="missing-token-ids")
        expert_TK = self.table[tokens.ids]
        kind = torch.promote_types(tokens.x.dtype, torch.float32)
        weight_TK = torch.full(expert_TK.shape, 1 / expert_TK.shape[1], dtype=kind, device=expert_TK.device)
        return None, assign(weight_TK, expert_TK, tokens)

    def adjust_rows(self, staged, plans):
        if "expert" not in plans:
            return
        plan, table_VK = plans["expert"], staged["table"]
        if len(plan.origins) < table_VK.shape[1]:
            why = f"hash gives each token {table_VK.shape[1]} different experts, so at least as many must remain"
            raise UsageError(why, code="too-few-experts")
        for position in plan.merged:  # it has its removed parents' ids, each token's entries once
            again_VK = (table_VK == position) & ((table_VK == position).cumsum(1) > 1)
            table_VK[again_VK] = -1
        for position in (one for one in plan.added if one not in plan.heirs.values()):
            parent = plan.kept.get(plan.origins[position])
            taken_VK = table_VK >= 0 if parent is None else table_VK == parent
            step = len(plan.origins) if parent is None else 2  # no fewer than K: two entries of a row stay two experts
            table_VK[tuple(taken_VK.nonzero()[step - 1 :: step].t())] = position
        experts = set(range(len(plan.origins)))
        for row, column in (table_VK < 0).nonzero().tolist():  # ids of removed experts
            free = sorted(experts - set(table_VK[row].tolist()))
            table_VK[row, column] = free[row % len(free)]
