"""The fast path of stacked experts on a CPU: gathering, products, gates and the sum over choices in one Function.

Assignments are sorted by expert, so that an expert's rows are a segment. FusedMLP are worked on in blocks that stay in
a cache: tokens are gathered, multiplied into memory that is there already and entered into the output; gradients are
written where they belong in the stacked ones. Of what is computed only the hidden rows are kept for the way back, on
which tokens are gathered again.

With y_t = sum_n w_n h_n W_out over a token's assignments n, h_n = act(x_t W_in), and g_t the gradient of y_t:
dL/dh_n = w_n g_t W_out^T, dL/dw_n = <h_n, dL/dh_n> / w_n, so that no expert's output is kept. A bias is a weight of an
input that is 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..contract.numerics import at_least_fp32, rows_of, without_autocast
from .activations import MANUAL_ACTIVATIONS, ManualActivation

ROWS = 1024  # most rows that are worked on at a time: buffers stay in a cache, whatever the load

Readable = Callable[..., Tensor]


MATMUL_DTYPES: dict[torch.dtype, torch.dtype] = {}  # what `matmul_dtype` found, or is told


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which this CPU multiplies numbers of that one: of bf16 what is faster, of fp16 fp32.

    Measured once in a process, in milliseconds: a processor without products of bf16 takes 5 to 50 times as long for
    them as for fp32, one with them a quarter. fp16 would lose gradients that a small gate makes smaller.
    """
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and dtype not in MATMUL_DTYPES:
        MATMUL_DTYPES[dtype] = min((dtype, torch.float32), key=_seconds)
    return MATMUL_DTYPES.get(dtype, dtype)


@contextmanager
def matmul_in(work: torch.dtype) -> Iterator[None]:
    """Forwards inside multiply bf16 in this precision, and so do their backwards, wherever those are."""
    found = MATMUL_DTYPES.get(torch.bfloat16)
    MATMUL_DTYPES[torch.bfloat16] = work
    try:
        yield
    finally:
        if found is None:
            del MATMUL_DTYPES[torch.bfloat16]
        else:
            MATMUL_DTYPES[torch.bfloat16] = found


def _seconds(dtype: torch.dtype) -> float:
    some, taken = torch.zeros(256, 256, dtype=dtype), []
    with without_autocast(some.device):  # which would multiply both in halves
        for _ in range(5):
            start = perf_counter()
            torch.mm(some, some)
            taken.append(perf_counter() - start)
    return min(taken)


def fused_mlp(
    x_TD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    counts: Sequence[int],
    activation: str,
    weights: Sequence[Tensor | None],
    readable: Readable,
) -> Tensor:
    """y [T, out] in the precision of weight_N. token_N, weight_N are sorted by expert, counts[e] of each.

    weights: stacked w_in [E, D, W], b_in [E, W] or None, w_out [E, H, out], b_out [E, out] or None. readable: what
    answers y of x_TD, weight_N and the weights by operations that autograd knows; second derivatives are its own.
    Neither forward-mode derivatives nor a backward under vmap can pass; a hook on the bank leads around this path.
    """
    kind = x_TD.device.type
    halves = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtype, keep = halves or x_TD.dtype, torch.is_grad_enabled()
    idle = [expert for expert, count in enumerate(counts) if not count]
    work = matmul_dtype(dtype)
    by_token = token_order(token_N, len(x_TD)) if work.itemsize == 2 else None
    plan = KernelPlan(
        token_N, by_token, blocks(counts), idle, MANUAL_ACTIVATIONS[activation], dtype, work, keep, halves, readable
    )
    with without_autocast(x_TD.device):
        y_TO: Tensor = FusedMLP.apply(plan, x_TD, at_least_fp32(weight_N), *weights)
    return y_TO


class Block(NamedTuple):
    """Rows that are worked on at a time: those of several experts, or some of one's.

    experts: which, in order. sizes: how many rows each has here. first: none of its rows came before.
    """

    rows: slice
    experts: list[int]
    sizes: list[int]
    first: list[bool]


def blocks(counts: Sequence[int]) -> list[Block]:
    """All rows in blocks of ROWS at most; experts without rows are in none."""
    found: list[Block] = []
    pieces: list[tuple[int, int, bool]] = []
    at = start = 0

    def close() -> None:
        found.append(Block(slice(start, at), *map(list, zip(*pieces, strict=True))))

    for expert, count in enumerate(counts):
        end, first = at + count, True
        while at < end:
            size = min(end, start + ROWS) - at
            pieces.append((expert, size, first))
            at, first = at + size, False
            if at == start + ROWS:
                close()
                start, pieces = at, []
    if pieces:
        close()
    return found


class TokenOrder(NamedTuple):
    """order_N: rows by token. starts_T: where in it each token's rows begin."""

    order_N: Tensor
    starts_T: Tensor


def token_order(token_N: Tensor, tokens: int) -> TokenOrder:
    """Of rows in any order."""
    counts_T = rows_of(token_N, tokens)
    return TokenOrder(torch.argsort(token_N, stable=True), counts_T.cumsum(0) - counts_T)


@attrs.frozen
class KernelPlan:
    """What `FusedMLP` does with its tensors. kept: the precision of what is kept; work: that of products.

    token_order: each token's rows, where products are of halves. idle: experts without rows. keep: the way back may be
    asked for. halves: what autocast was on for, or None.
    """

    token_N: Tensor
    token_order: TokenOrder | None
    blocks: list[Block]
    idle: list[int]
    act: ManualActivation
    kept: torch.dtype
    work: torch.dtype
    keep: bool
    halves: torch.dtype | None
    readable: Readable


class FusedMLP(Function):
    """`fused_mlp`, forth and back."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: KernelPlan,
        x_TD: Tensor,
        weight_N: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
    ) -> Tensor:
        y = ByToken(plan, len(x_TD), w_out.shape[2], weight_N.dtype)
        kept_NW = x_TD.new_empty(len(weight_N) if plan.keep else 0, w_in.shape[2], dtype=plan.kept)
        direct = plan.keep and plan.kept == plan.work
        into, out_of = Products(w_in, b_in), Products(w_out, b_out)
        for block in plan.blocks:
            token_n = plan.token_N[block.rows]
            x_nD = x_TD.index_select(0, token_n).to(plan.work)
            a_nW = into.multiply(block, x_nD, kept_NW[block.rows] if direct else None)
            h_nH = plan.act.of(a_nW)
            if plan.keep and not direct:
                kept_NW[block.rows] = a_nW
            y.enter(block, out_of.multiply(block, h_nH), weight_N)
        # weights as they are now, too: growth gives a parameter other memory, perhaps before the way back
        now = (None if one is None else one.detach() for one in (w_in, b_in, w_out, b_out))
        ctx.save_for_backward(x_TD, weight_N, w_in, b_in, w_out, b_out, *now, kept_NW)
        ctx.plan = plan
        return y.whole(weight_N)

    @staticmethod
    def backward(ctx: Any, g_TO: Tensor) -> Any:
        plan, (*inputs, kept_NW) = ctx.plan, ctx.saved_tensors
        needs_x, _, *needs = needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # somebody wants second derivatives
            return None, *_derived(plan, inputs[:6], needed, g_TO)
        x_TD, weight_N = inputs[:2]
        w_in, _, w_out, b_out = weights = inputs[6:]
        dx = ByToken(plan, len(x_TD), x_TD.shape[1], x_TD.dtype) if needs_x else None
        dweight_N = torch.empty_like(weight_N)
        safe_N = _not_zero(weight_N)
        of_in, of_b_in, of_out, of_b_out = grads = [
            Gradient(of, plan.idle) if need else None for of, need in zip(weights, needs, strict=True)
        ]
        into, out_of = Products(w_in.mT) if needs_x else None, Products(w_out.mT)
        shift = None if b_out is None else Products(b_out[..., None])
        for block in plan.blocks:
            rows, token_n = block.rows, plan.token_N[block.rows]
            weight_n1 = safe_N[rows, None]
            g_nO = g_TO.index_select(0, token_n).mul_(weight_n1).to(plan.work)
            kept_nW = kept_NW[rows].to(plan.work)
            h_nH, d_nH = plan.act.again(kept_nW), out_of.multiply(block, g_nO)
            dweight_N[rows] = (h_nH * d_nH).sum(1, dtype=weight_N.dtype)
            if shift is not None:
                dweight_N[rows] += shift.multiply(block, g_nO).squeeze(1)
            d_nW = plan.act.back(kept_nW, d_nH)
            if of_out is not None:
                of_out.enter(block, h_nH, g_nO)
            for of_bias, g in ((of_b_out, g_nO), (of_b_in, d_nW)):
                if of_bias is not None:
                    of_bias.enter(block, g.new_ones(len(g), 1), g)
            if of_in is not None:
                of_in.enter(block, x_TD.index_select(0, token_n).to(plan.work), d_nW)
            if into is not None and dx is not None:
                dx.enter(block, into.multiply(block, d_nW))
        dx_TD = None if dx is None else dx.whole()
        return None, dx_TD, dweight_N.div_(safe_N), *(None if grad is None else grad.whole for grad in grads)


class ByToken:
    """[T, O]: the sum of each token's rows, which come block by block, times their weights if they are given.

    Rows are summed in fp32 or better: as they come, while they are in a cache, which keeps no rows. Those of products
    of halves are kept and summed in the end: beside products of a quarter of the time, that takes 3 to 7 % off.
    """

    def __init__(self, plan: KernelPlan, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.plan = plan
        if plan.token_order is None:
            self.sums = plan.token_N.new_zeros(tokens, width, dtype=torch.promote_types(dtype, torch.float32))
        else:
            self.rows = plan.token_N.new_empty(len(plan.token_N), width, dtype=dtype)

    def enter(self, block: Block, x_nO: Tensor, weight_N: Tensor | None = None) -> None:
        """A block's rows, which may be overwritten."""
        if self.plan.token_order is not None:
            self.rows[block.rows] = x_nO
            return
        x_nO = x_nO.to(self.sums.dtype)
        x_nO = x_nO if weight_N is None else x_nO.mul_(weight_N[block.rows, None])
        self.sums.index_add_(0, self.plan.token_N[block.rows], x_nO)

    def whole(self, weight_N: Tensor | None = None) -> Tensor:
        """The sums, when all blocks are in."""
        if self.plan.token_order is None:
            return self.sums
        order_N, starts_T = self.plan.token_order
        weight_N = None if weight_N is None else weight_N.index_select(0, order_N)
        return F.embedding_bag(order_N, self.rows, starts_T, mode="sum", per_sample_weights=weight_N)


class Products:
    """Each row times its expert's own of a stacked weight [E, I, O], plus its expert's bias."""

    def __init__(self, w_EIO: Tensor, b_EO: Tensor | None = None) -> None:
        self.w = w_EIO.unbind(0)
        self.b = None if b_EO is None else b_EO.unbind(0)

    def multiply(self, block: Block, x_nI: Tensor, out_nO: Tensor | None = None) -> Tensor:
        """[n, O], in the precision of x."""
        if out_nO is None:
            out_nO = x_nI.new_empty(len(x_nI), self.w[0].shape[1])
        xs, outs = x_nI.split_with_sizes(block.sizes), out_nO.split_with_sizes(block.sizes)
        cast = self.w[0].dtype != x_nI.dtype
        for e, x, out in zip(block.experts, xs, outs, strict=True):
            w = self.w[e].to(x.dtype) if cast else self.w[e]
            if self.b is None:
                torch.mm(x, w, out=out)
            else:
                torch.addmm(self.b[e].to(x.dtype) if cast else self.b[e], x, w, out=out)
        return out_nO


class Gradient:
    """Of a stacked weight [E, I, O] or bias [E, O]: x^T g over each expert's rows, 0 for experts without.

    FusedMLP of an expert follow each other, and are summed in fp32 or better.
    """

    def __init__(self, of: Tensor, idle: Sequence[int]) -> None:
        self.whole = torch.empty_like(of)
        self.own = (self.whole if of.dim() == 3 else self.whole[:, None]).unbind(0)
        self.sum = self.own[0]
        for expert in idle:
            self.own[expert].zero_()

    def enter(self, block: Block, x_nI: Tensor, g_nO: Tensor) -> None:
        """Add what a block's rows give."""
        columns, rows = x_nI.t().split_with_sizes(block.sizes, dim=1), g_nO.split_with_sizes(block.sizes)
        for e, first, x, g in zip(block.experts, block.first, columns, rows, strict=True):
            own = self.own[e]
            if own.dtype == g.dtype and (first or g.dtype.itemsize > 2):
                self.sum = torch.addmm(own, x, g, beta=int(not first), out=own)
            else:
                self.sum = x @ g if first else at_least_fp32(self.sum) + x @ g
                own.copy_(self.sum)


def _not_zero(weight_N: Tensor) -> Tensor:
    """Gates to divide by: in the place of 0, or nearly, what rounding would take away from any sum."""
    tiny = torch.finfo(weight_N.dtype).eps ** 2
    return torch.where(weight_N.abs() < tiny, tiny, weight_N)


def _derived(
    plan: KernelPlan, inputs: Sequence[Tensor | None], needed: Sequence[bool], g_TO: Tensor
) -> Iterable[Tensor | None]:
    """The gradients, with a graph of their own.

    Of views, as one input may hang on another: a gate depends on x, but that way is not this Function's.
    """
    views = [None if one is None else one.view_as(one) for one in inputs]
    wanted = [one for one, need in zip(views, needed, strict=True) if need and one is not None]
    with torch.autocast(g_TO.device.type, plan.halves, enabled=plan.halves is not None):
        y_TO = plan.readable(*views)
    grads = iter(torch.autograd.grad(y_TO, wanted, g_TO, create_graph=True))
    return [next(grads) if need else None for need in needed]
