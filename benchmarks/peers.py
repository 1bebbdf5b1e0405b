"""The experts of other libraries on the same problem: same weights, same routing, checked against float64.

st-moe-pytorch and mixture-of-experts contain their router and drop tokens over capacity, so their whole layers are
timed on the same tokens, unchecked. Libraries that are not installed are left out.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cells import Cell, Forward, Problem
from paired import Call


def loop_over_experts(experts: Iterable[nn.Module], x: Tensor, chosen: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The usual hand-written loop: y [T, out] plus each token's outputs times gate; chosen and gate are [T, K]."""
    for index, expert in enumerate(experts):
        token, rank = torch.where(chosen == index)
        if len(token):
            y = y.index_add(0, token, expert(x[token]) * gate[token, rank, None])
    return y


def module_loop(cell: Cell, given: Problem) -> Forward:
    """A loop over one module for each expert."""
    experts = nn.ModuleList()
    for w_in, w_out in zip(given.w_in.detach(), given.w_out.detach(), strict=True):
        expert = nn.Sequential(nn.Linear(*w_in.shape, bias=False), nn.ReLU(), nn.Linear(*w_out.shape, bias=False))
        expert[0].weight.data, expert[2].weight.data = w_in.t().contiguous(), w_out.t().contiguous()
        experts.append(expert)

    def forward() -> Tensor:
        experts.zero_grad()
        return loop_over_experts(
            experts, given.x, given.expert, given.gate, torch.zeros_like(given.x, dtype=given.gate.dtype)
        )

    return forward


def grouped(cell: Cell, given: Problem) -> Forward:
    """torch's grouped matmul, with autograd."""

    def forward() -> Tensor:
        flat = given.expert.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=cell.experts).cumsum(0).to(torch.int32)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        h = torch.relu(F.grouped_mm(given.x.index_select(0, order // cell.top_k), given.w_in, offs=ends))
        y = F.grouped_mm(h, given.w_out, offs=ends).index_select(0, back).view(cell.tokens, cell.top_k, cell.dim)
        return (y * given.gate[..., None]).sum(1)

    return forward


def einsum(cell: Cell, given: Problem) -> Forward:
    """GShard's dispatch and combine by one-hot tensors, with room for the busiest expert: nothing is dropped."""

    def forward() -> Tensor:
        chosen = F.one_hot(given.expert, cell.experts).flatten(0, 1)  # [T K, E]
        room = int(chosen.sum(0).max())
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        slot = (chosen[:, :, None] * F.one_hot(place, room)[:, None]).view(cell.tokens, cell.top_k, cell.experts, room)
        combine = (slot * given.gate[..., None, None]).sum(1)
        x = torch.einsum("tec,td->ecd", (combine.detach() > 0).to(given.x.dtype), given.x)
        y = torch.einsum("ech,ehd->ecd", torch.relu(torch.einsum("ecd,edh->ech", x, given.w_in)), given.w_out)
        return torch.einsum("tec,ecd->td", combine, y)

    return forward


def transformers(implementation: str) -> Callable[[Cell, Problem], Forward]:
    """transformers' experts without a gate projection (Nemotron-H), with ReLU."""

    def build(cell: Cell, given: Problem) -> Forward:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        shape = {"hidden_size": cell.dim, "moe_intermediate_size": cell.hidden, "moe_latent_size": None}
        config = SimpleNamespace(n_routed_experts=cell.experts, mlp_hidden_act="relu", **shape)
        config._experts_implementation = implementation
        bank = NemotronHExperts(config)
        bank.up_proj.data, bank.down_proj.data = (
            w.detach().transpose(1, 2).contiguous() for w in (given.w_in, given.w_out)
        )

        def forward() -> Tensor:
            bank.zero_grad()
            return bank(given.x, given.expert, given.gate)

        return forward

    return build


def st_moe(cell: Cell, given: Problem) -> Call:
    """st-moe-pytorch's MoE with plain experts, router included."""
    from st_moe_pytorch import MoE
    from st_moe_pytorch.st_moe_pytorch import Experts

    layer = MoE(cell.dim, num_experts=cell.experts, gating_top_n=cell.top_k, threshold_train=0.0)
    layer.experts = Experts([_mlp(cell) for _ in range(cell.experts)])
    return _whole(layer, given, lambda result: result.outputs)


def mixture_of_experts(cell: Cell, given: Problem) -> Call:
    """mixture-of-experts' MoE, router included; K is 2."""
    from mixture_of_experts import MoE

    layer = MoE(
        cell.dim, num_experts=cell.experts, hidden_dim=cell.hidden, activation=nn.ReLU, second_policy_train="all"
    )
    return _whole(layer, given, lambda result: result[0])


def _mlp(cell: Cell) -> nn.Module:
    return nn.Sequential(
        nn.Linear(cell.dim, cell.hidden, bias=False), nn.ReLU(), nn.Linear(cell.hidden, cell.dim, bias=False)
    )


def _whole(layer: nn.Module, given: Problem, output: Callable[..., Tensor]) -> Call:
    x = given.x.detach()[None].clone().requires_grad_()

    def call() -> None:
        layer.zero_grad()
        x.grad = None
        output(layer(x)).backward(given.grad[None])

    return call


FORWARDS: dict[str, Callable[[Cell, Problem], Forward]] = {
    "ModuleList loop": module_loop,
    "torch grouped_mm": grouped,
    "transformers eager": transformers("eager"),
    "transformers grouped_mm": transformers("grouped_mm"),
    "GShard einsum": einsum,
}
WHOLE: dict[str, Callable[[Cell, Problem], Call]] = {
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
}
ONLY_SMALL = {  # memory or time grows with E^2, or with E T
    "transformers eager",
    "GShard einsum",
    *WHOLE,
}
MODULE = {
    "transformers": "transformers",
    "st-moe-pytorch": "st_moe_pytorch",
    "mixture-of-experts": "mixture_of_experts",
}


def installed(name: str) -> bool:
    """Whether the peer can be imported."""
    module = next((module for peer, module in MODULE.items() if name.startswith(peer)), "torch")
    try:
        import_module(module)
    except ImportError:
        return False
    return True
