"""Does a family's recipe decide as its block does? Both are asked on the same random tokens.

Suffixes: T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.families import Block, Decision, Routed
from ..contract.numerics import without_autocast
from ..errors import UsageError
from ..layer.probing import evaluating
from .adopted import Adopted
from .tapping import Tap

PROBE = 32  # tokens on which a recipe is compared with its block
LEAST_SAME = 0.9  # of them that choose the same; in bf16 scores may be equal
TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2  # of the gates, relative to the largest, in fp32 and below


@attrs.frozen(eq=False)
class Own:
    """A block's own decision: tokens x [T, D], gates [T, E], and K."""

    x: Tensor
    gates: Tensor
    top_k: int


def sizes_of(block: Block) -> dict[str, int]:
    """A block's sizes, as those of a layer."""
    rows, at = block.family.first("logit_row")
    out, of = block.family.first("output")
    row, weight = block.tensor(rows), block.tensor(out)
    return {
        "dim": row.shape[1 if at.fan_in is None else at.fan_in],
        "hidden": weight.shape[1 if of.fan_in is None else of.fan_in],
        "experts": row.shape[at.axis],
    }


@torch.no_grad()
def own_decision(block: Block) -> Own:
    """A block's own decision on random tokens. Raises UsageError if its family can't read it."""
    seen: list[Decision] = []
    routed: list[Routed] = []

    def given(arguments: list[Any]) -> None:
        decision = block.family.decision(block, arguments, routed[-1] if routed else None)
        seen.extend([] if decision is None else [decision])

    by_router = block.family.decides == "router"
    tap = Tap(block, routed.append, None if by_router else given, _same)
    sizes, weight = sizes_of(block), block.tensor(block.family.first("output")[0])
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE, sizes["dim"], generator=random).to(weight.device, weight.dtype)
    try:
        with evaluating(block.module), without_autocast(x.device):
            block.module(x)
        if by_router:
            given([])
    finally:
        tap.close()
    if not seen:
        kind = type(block.module).__name__
        message = f"family '{block.family.name}' finds no decision in {kind}; check its `entry` and `decides`"
        raise UsageError(message, code="unknown-decision")
    _, expert_TK, gate_TK = seen[-1]
    gates = torch.zeros(PROBE, sizes["experts"], device=x.device).scatter(1, expert_TK.long(), gate_TK.float())
    return Own(x[0], gates, expert_TK.shape[1])


def _same(act: Callable[..., None]) -> Callable[..., None]:
    return act


@torch.no_grad()
def check_alike(adopted: Adopted, own: Own) -> None:
    """Raise UsageError unless the layer decides as its block did, wherever scores are not within rounding."""
    layer, block, x_TD, own_TE = adopted.layer, adopted.block, own.x, own.gates
    with evaluating(layer):
        gate_TE = layer.route(layer.tokens(x_TD)).gates().float()
    same_T = ((gate_TE > 0) == (own_TE > 0)).all(-1)
    tolerance = TOLERANCE if x_TD.dtype == torch.float32 else HALF_TOLERANCE
    worst = float((gate_TE - own_TE)[same_T].abs().max()) if bool(same_T.any()) else 0.0
    if same_T.float().mean() < LEAST_SAME or not worst <= tolerance * max(1.0, float(own_TE.max())):
        router, _ = block.family.recipe(block) or ("", {})
        message = (
            f"family '{block.family.name}' says that {type(block.module).__name__} decides as router '{router}' does, "
            f"but of {PROBE} tokens {int(same_T.sum())} choose the same experts, with gates up to {worst:.3g} apart; "
            "correct its recipe, or build the engine with a router"
        )
        raise UsageError(message, code="recipe-disagrees")
