"""Hash routing."""

import attrs
import torch

from moe_engine import Router, Traits, UsageError, assign, hookimpl, option
from moe_engine.seeds import generator


@attrs.define(eq=False)
class Hash:
    """A token's experts follow from its id by a fixed random table [V, K]; every gate is 1 / K.

    Each column of the table is dealt out evenly over the ids; a token's K experts differ. Nothing is
    learned, so no loss or bias can act. A newcomer takes over every second id of its parent,
    without a parent of everybody evenly; a removed expert's ids go to the others in turn.

    Source: Roller et al., 2021 (there the weight is 1; here 1 / K, so that the output's scale does not depend on K).
    """

    traits = Traits(provides=("top_k", "choices"), effects=("parts_copies",))
    seed: int = option(0, help="which table", min=0)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.dim and not setup.spec.vocab:
            return "hash routes by token ids, which this layer is not given; choose another router, or a task of text"
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
            raise UsageError("hash routes by token ids; call the layer with ids=")
        expert_TK = self.table[tokens.ids]
        kind = torch.promote_types(tokens.x.dtype, torch.float32)
        weight_TK = torch.full(expert_TK.shape, 1 / expert_TK.shape[1], dtype=kind, device=expert_TK.device)
        return None, assign(weight_TK, expert_TK, tokens)

    def adjust_rows(self, staged, plans):
        if "expert" not in plans:
            return
        plan, table_VK = plans["expert"], staged["table"]
        if len(plan.origins) < table_VK.shape[1]:
            raise UsageError(f"hash gives each token {table_VK.shape[1]} different experts; as many must remain")
        for position in plan.newcomers:
            parent = plan.kept.get(plan.origins[position])
            mine_VK = table_VK >= 0 if parent is None else table_VK == parent
            step = len(plan.origins) if parent is None else 2  # no fewer than K: two entries of a row stay two experts
            table_VK[tuple(mine_VK.nonzero()[step - 1 :: step].t())] = position
        everybody = set(range(len(plan.origins)))
        for row, column in (table_VK < 0).nonzero().tolist():  # those of the removed
            free = sorted(everybody - set(table_VK[row].tolist()))
            table_VK[row, column] = free[row % len(free)]
