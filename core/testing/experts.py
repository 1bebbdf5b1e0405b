"""Claims about banks of experts."""

import torch
from torch import Tensor

from .bench import EXPERTS, Bench, data
from .claims import claim, demand
from .comparing import distance

COUNTS = ([4, 0, 7, 1, 0, 3], [0, 0, 0, 0, 0, 15], [0, 0, 0, 0, 0, 0])


def _expected(experts: torch.nn.Module, x_ND: Tensor, counts: list[int]) -> Tensor:
    """Each row's own expert, taken from what all experts answer to all rows; 0 for the rows past the last."""
    outputs_ENO = experts.outputs(x_ND)  # type: ignore[operator]
    expert_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = torch.arange(len(expert_N))
    out: Tensor = torch.zeros_like(outputs_ENO[0])
    out[: len(expert_N)] = outputs_ENO[expert_N, rows]
    return out


@claim("moe_experts")
def forward_agrees_with_outputs(bench: Bench) -> None:
    """forward gives each row what outputs says of its own expert, also where some have no row, and 0 past the last."""
    experts = bench.rig().layer.experts.eval()
    x_ND = data(20).x
    with torch.no_grad():
        for counts in COUNTS:
            found, expected = experts(x_ND, torch.tensor(counts)), _expected(experts, x_ND, counts)
            demand(found.shape == expected.shape, f"forward answers {list(found.shape)}, not {list(expected.shape)}")
            used = sum(counts)
            gap = distance(expected[:used], found[:used])
            demand(
                gap < 1e-4,
                f"with {counts} rows each, forward and outputs differ by {gap:.2g}; rows are sorted by expert",
            )
            demand(not found[used:].any(), f"with {counts} rows each, rows past the last are not 0; no expert has them")


@claim("moe_experts")
def rows_are_alone(bench: Bench) -> None:
    """What one row is answered does not depend on another row."""
    experts, counts = bench.rig().layer.experts.eval(), torch.tensor(COUNTS[0])
    one, other = data(20).x, data(20).x.clone()
    other[5] += 1
    with torch.no_grad():
        rest = torch.arange(20) != 5
        gap = distance(experts(one, counts)[rest], experts(other, counts)[rest])
    demand(gap < 1e-5, f"another row changes an answer by {gap:.2g}; mix no rows")


@claim("moe_experts")
def gradients_are_told(bench: Bench) -> None:
    """expert_grad answers one number for each expert, 0 for one without a token, above 0 for one that learns."""
    experts = bench.rig().layer.experts.train()
    before = experts.expert_grad()
    demand(before.shape == (EXPERTS,), f"it answers {list(before.shape)}, not [{EXPERTS}]")
    demand(not before.any(), "before any backward it is not 0; no gradient counts as 0")
    counts = torch.tensor(COUNTS[0])
    # |y - 1|^2 and not |y|^2: a bank that answers 0 at first learns too
    (experts(data(20).x, counts)[: int(counts.sum())] - 1).square().sum().backward()
    found = experts.expert_grad()
    demand(
        bool(found.isfinite().all()) and bool((found >= 0).all()),
        f"it answers {found.tolist()}; take means of |gradient|",
    )
    demand(not found[counts == 0].any(), "it is not 0 for an expert without a token; count each expert's own gradient")
    demand(
        bool((found[counts > 0] > 0).all()), "it is 0 for an expert that has tokens; count each expert's own gradient"
    )
