"""Claims about banks of experts."""

from typing import Any

import torch
from torch import Tensor

from .bench import EXPERTS, Bench, data
from .claims import claim, demand
from .comparing import distance

COUNTS = ([4, 0, 7, 1, 0, 3], [0, 0, 0, 0, 0, 15], [0, 0, 0, 0, 0, 0])  # rows of each expert, of 20 in all


def _expected(experts: torch.nn.Module, x_ND: Tensor, counts: list[int]) -> Tensor:
    """[N, O]: for each row, what `outputs` returns for its expert; 0 for rows past the counts' sum."""
    outputs_ENO = experts.outputs(x_ND)  # type: ignore[operator]
    expert_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = torch.arange(len(expert_N))
    out: Tensor = torch.zeros_like(outputs_ENO[0])
    out[: len(expert_N)] = outputs_ENO[expert_N, rows]
    return out


@claim("moe_experts")
def forward_agrees_with_outputs(bench: Bench) -> None:
    """forward and outputs agree for each row, even if some experts have no rows; rows past the last are 0."""
    experts = bench.trial().layer.experts.eval()
    x_ND = data(20).x
    with torch.no_grad():
        for counts in COUNTS:
            found, expected = experts(x_ND, torch.tensor(counts)), _expected(experts, x_ND, counts)
            demand(found.shape == expected.shape, f"forward returns {list(found.shape)}, not {list(expected.shape)}")
            used = sum(counts)
            gap = distance(expected[:used], found[:used])
            demand(
                gap < 1e-4,
                f"for counts {counts}, forward and outputs differ by {gap:.2g}; forward's rows are sorted by expert",
            )
            demand(not found[used:].any(), f"for counts {counts}, rows past the last are not 0; no expert owns them")


@claim("moe_experts")
def rows_are_independent(bench: Bench) -> None:
    """A row's output does not depend on other rows."""
    experts, counts = bench.trial().layer.experts.eval(), torch.tensor(COUNTS[0])
    x_ND, changed_ND = data(20).x, data(20).x.clone()
    changed_ND[5] += 1
    with torch.no_grad():
        rest = torch.arange(20) != 5
        gap = distance(experts(x_ND, counts)[rest], experts(changed_ND, counts)[rest])
    demand(gap < 1e-5, f"changing one row changes the output of another by {gap:.2g}; compute each row alone")


def _learning(experts: Any) -> Tensor:
    """[E] bool: whether an expert's output depends on any parameter; that of a zero or copy expert does not."""
    outputs_ESO, weights = experts.outputs(data(20).x), [p for p in experts.parameters() if p.requires_grad]
    learning = []
    for y_SO in outputs_ESO if outputs_ESO.requires_grad else []:
        grads = torch.autograd.grad((y_SO - 1).square().sum(), weights, retain_graph=True, allow_unused=True)
        learning.append(any(grad is not None and bool(grad.any()) for grad in grads))
    return torch.tensor(learning or [False] * len(outputs_ESO))


@claim("moe_experts")
def expert_grad_is_per_expert(bench: Bench) -> None:
    """expert_grad returns a number per expert: 0 for one without tokens or parameters, above 0 for one that learns."""
    experts = bench.trial().layer.experts.train()
    before = experts.expert_grad()
    demand(before.shape == (EXPERTS,), f"it returns shape {list(before.shape)}, not [{EXPERTS}]")
    demand(not before.any(), "it is not 0 before any backward; a missing gradient counts as 0")
    counts = torch.tensor(COUNTS[0])
    # |y - 1|^2 and not |y|^2: a bank whose output starts at 0 also learns
    (experts(data(20).x, counts)[: int(counts.sum())] - 1).square().sum().backward()
    found = experts.expert_grad()
    demand(
        bool(found.isfinite().all()) and bool((found >= 0).all()),
        f"it returns {found.tolist()}; take the mean of |gradient|",
    )
    advice = "average the gradient of each expert separately"
    demand(not found[counts == 0].any(), f"it is not 0 for an expert without tokens; {advice}")
    expected = (counts > 0) & _learning(experts)
    demand(bool((found[expected] > 0).all()), f"it is 0 for an expert with tokens and parameters; {advice}")
