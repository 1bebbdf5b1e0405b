"""The fused CPU kernel of stacked MLP experts.

One autograd Function gathers tokens, multiplies them, applies gates and sums over choices. Assignments are sorted by
expert, so each expert's rows are contiguous. The kernel processes rows in blocks that fit a cache: it gathers a block's
tokens, multiplies them into preallocated memory and adds the result to the output; backward writes gradients directly
into the stacked ones. Of all intermediate results only the hidden rows are saved; backward gathers the tokens again.

With y_t = sum_n w_n h_n W_out over a token's assignments n, h_n = act(x_t W_in), and g_t the gradient of y_t:
dL/dh_n = w_n g_t W_out^T, dL/dw_n = <h_n, dL/dh_n> / w_n, so no expert's output has to be saved. A bias is a weight of
an input that is 1.

Suffixes: T tokens, N assignments, n rows of a block, E experts, D and O width of input and output, H hidden width,
W width before the activation (H, or 2H for swiglu).
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

ROWS = 1024  # most rows in a block: its buffers stay in a cache, whatever the load
MATMUL_DTYPES: dict[torch.dtype, torch.dtype] = {}  # dtype -> the dtype in which it is multiplied: measured, or set

Reference = Callable[..., Tensor]  # (x_TD, weight_N, w_in, b_in, w_out, b_out) -> y_TO, by operations of autograd


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies values of `dtype`: for bf16 the faster one, for fp16 fp32.

    bf16 is measured once per process, which takes milliseconds: on a processor without bf16 instructions a bf16 matmul
    takes 5 to 50 times as long as one in fp32, with them a quarter. In fp16, gradients times a small gate underflow.
    """
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and dtype not in MATMUL_DTYPES:
        MATMUL_DTYPES[dtype] = min((dtype, torch.float32), key=_matmul_seconds)
    return MATMUL_DTYPES.get(dtype, dtype)


@contextmanager
def matmul_in(dtype: torch.dtype) -> Iterator[None]:
    """Multiply bf16 in this dtype in forwards inside, and in their backwards wherever those run."""
    previous = MATMUL_DTYPES.get(torch.bfloat16)
    MATMUL_DTYPES[torch.bfloat16] = dtype
    try:
        yield
    finally:
        if previous is None:
            del MATMUL_DTYPES[torch.bfloat16]
        else:
            MATMUL_DTYPES[torch.bfloat16] = previous


def _matmul_seconds(dtype: torch.dtype) -> float:
    matrix, seconds = torch.zeros(256, 256, dtype=dtype), []
    with without_autocast(matrix.device):  # it would multiply both in low precision
        for _ in range(5):
            start = perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(perf_counter() - start)
    return min(seconds)


def fused_mlp(
    x_TD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    counts: Sequence[int],
    activation: str,
    weights: Sequence[Tensor | None],
    reference: Reference,
) -> Tensor:
    """y [T, O] in the dtype of weight_N, at least fp32; token_N and weight_N are sorted by expert, counts[e] of each.

    weights: stacked w_in [E, D, W], b_in [E, W] or None, w_out [E, H, O], b_out [E, O] or None. reference: computes
    y from x_TD, weight_N and the weights by operations that autograd knows; second derivatives go through it.
    Forward-mode derivatives and a backward under vmap are not supported.
    """
    device = x_TD.device.type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = autocast_dtype or x_TD.dtype
    work_dtype = matmul_dtype(dtype)
    low_precision = work_dtype.itemsize == 2
    kernel = KernelPlan(
        token_N=token_N,
        token_order=token_order(token_N, len(x_TD)) if low_precision else None,
        blocks=blocks(counts),
        idle=[expert for expert, count in enumerate(counts) if not count],
        activation=MANUAL_ACTIVATIONS[activation],
        saved_dtype=dtype,
        matmul_dtype=work_dtype,
        save=torch.is_grad_enabled(),
        autocast_dtype=autocast_dtype,
        reference=reference,
    )
    with without_autocast(x_TD.device):
        y_TO: Tensor = FusedMLP.apply(kernel, x_TD, at_least_fp32(weight_N), *weights)
    return y_TO


class Block(NamedTuple):
    """Rows processed together: those of several experts, or a part of one expert's.

    experts: which, in order. sizes: the number of rows of each in this block. first: whether these are its first rows.
    """

    rows: slice
    experts: list[int]
    sizes: list[int]
    first: list[bool]


def blocks(counts: Sequence[int]) -> list[Block]:
    """All rows, in blocks of at most ROWS; an expert without rows is in none."""
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
    """Rows ordered by token: order_N the rows, starts_T where in order_N each token's rows begin."""

    order_N: Tensor
    starts_T: Tensor


def token_order(token_N: Tensor, tokens: int) -> TokenOrder:
    """The order by token of rows in any order."""
    counts_T = rows_of(token_N, tokens)
    return TokenOrder(torch.argsort(token_N, stable=True), counts_T.cumsum(0) - counts_T)


@attrs.frozen
class KernelPlan:
    """Everything that `FusedMLP` needs besides tensors with gradients.

    token_order: only for matmuls in low precision, see `TokenSum`. idle: experts without rows. save: whether backward
    may follow. saved_dtype, matmul_dtype: of the saved hidden rows, of matmuls. autocast_dtype: None if it was off.
    """

    token_N: Tensor
    token_order: TokenOrder | None
    blocks: list[Block]
    idle: list[int]
    activation: ManualActivation
    saved_dtype: torch.dtype
    matmul_dtype: torch.dtype
    save: bool
    autocast_dtype: torch.dtype | None
    reference: Reference


class FusedMLP(Function):
    """Forward and backward of `fused_mlp`."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: KernelPlan,
        x_TD: Tensor,
        weight_N: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
    ) -> Tensor:
        y = TokenSum(kernel, len(x_TD), w_out.shape[2], weight_N.dtype)
        saved_NW = x_TD.new_empty(len(weight_N) if kernel.save else 0, w_in.shape[2], dtype=kernel.saved_dtype)
        in_place = kernel.save and kernel.saved_dtype == kernel.matmul_dtype
        up_proj, down_proj = ExpertMatmul(w_in, b_in), ExpertMatmul(w_out, b_out)
        for block in kernel.blocks:
            token_n = kernel.token_N[block.rows]
            x_nD = x_TD.index_select(0, token_n).to(kernel.matmul_dtype)
            a_nW = up_proj.multiply(block, x_nD, saved_NW[block.rows] if in_place else None)
            h_nH = kernel.activation.forward(a_nW)
            if kernel.save and not in_place:
                saved_NW[block.rows] = a_nW
            y.add(block, down_proj.multiply(block, h_nH), weight_N)
        # Also save the weights' present memory: growth may give a parameter new memory before backward.
        present = (None if weight is None else weight.detach() for weight in (w_in, b_in, w_out, b_out))
        ctx.save_for_backward(x_TD, weight_N, w_in, b_in, w_out, b_out, *present, saved_NW)
        ctx.kernel = kernel
        return y.total(weight_N)

    @staticmethod
    def backward(ctx: Any, g_TO: Tensor) -> Any:
        kernel, (*inputs, saved_NW) = ctx.kernel, ctx.saved_tensors
        needs_x, _, *needs_weights = needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # second derivatives are wanted
            return None, *_reference_gradients(kernel, inputs[:6], needed, g_TO)
        x_TD, weight_N = inputs[:2]
        w_in, _, w_out, b_out = weights = inputs[6:]
        dx = TokenSum(kernel, len(x_TD), x_TD.shape[1], x_TD.dtype) if needs_x else None
        dweight_N = torch.empty_like(weight_N)
        divisor_N = _nonzero(weight_N)
        dw_in, db_in, dw_out, db_out = grads = [
            ExpertGradient(weight, kernel.idle) if need else None
            for weight, need in zip(weights, needs_weights, strict=True)
        ]
        up_proj_t, down_proj_t = ExpertMatmul(w_in.mT) if needs_x else None, ExpertMatmul(w_out.mT)
        bias_dot = None if b_out is None else ExpertMatmul(b_out[..., None])
        for block in kernel.blocks:
            rows, token_n = block.rows, kernel.token_N[block.rows]
            g_nO = g_TO.index_select(0, token_n).mul_(divisor_N[rows, None]).to(kernel.matmul_dtype)
            saved_nW = saved_NW[rows].to(kernel.matmul_dtype)
            h_nH, dh_nH = kernel.activation.recompute(saved_nW), down_proj_t.multiply(block, g_nO)
            dweight_N[rows] = (h_nH * dh_nH).sum(1, dtype=weight_N.dtype)
            if bias_dot is not None:
                dweight_N[rows] += bias_dot.multiply(block, g_nO).squeeze(1)
            da_nW = kernel.activation.backward(saved_nW, dh_nH)
            if dw_out is not None:
                dw_out.accumulate(block, h_nH, g_nO)
            for db, g in ((db_out, g_nO), (db_in, da_nW)):
                if db is not None:
                    db.accumulate(block, g.new_ones(len(g), 1), g)
            if dw_in is not None:
                dw_in.accumulate(block, x_TD.index_select(0, token_n).to(kernel.matmul_dtype), da_nW)
            if up_proj_t is not None and dx is not None:
                dx.add(block, up_proj_t.multiply(block, da_nW))
        dx_TD = None if dx is None else dx.total()
        return None, dx_TD, dweight_N.div_(divisor_N), *(None if grad is None else grad.stacked for grad in grads)


class TokenSum:
    """[T, O]: the sum of each token's rows, times their weights if given; rows arrive block by block.

    Sums are in fp32 or better. In fp32, a block's rows are added while they are in a cache, and no row is kept. After
    low-precision matmuls, which take a quarter of the time, keeping all rows and adding them at the end takes 3 to 7 %
    less time.
    """

    def __init__(self, kernel: KernelPlan, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.kernel = kernel
        if kernel.token_order is None:
            self.sums = kernel.token_N.new_zeros(tokens, width, dtype=torch.promote_types(dtype, torch.float32))
        else:
            self.rows = kernel.token_N.new_empty(len(kernel.token_N), width, dtype=dtype)

    def add(self, block: Block, x_nO: Tensor, weight_N: Tensor | None = None) -> None:
        """Add a block's rows, which may be overwritten."""
        if self.kernel.token_order is not None:
            self.rows[block.rows] = x_nO
            return
        x_nO = x_nO.to(self.sums.dtype)
        x_nO = x_nO if weight_N is None else x_nO.mul_(weight_N[block.rows, None])
        self.sums.index_add_(0, self.kernel.token_N[block.rows], x_nO)

    def total(self, weight_N: Tensor | None = None) -> Tensor:
        """The sums, once every block was added. weight_N: the same as in `add`."""
        if self.kernel.token_order is None:
            return self.sums
        order_N, starts_T = self.kernel.token_order
        weight_N = None if weight_N is None else weight_N.index_select(0, order_N)
        return F.embedding_bag(order_N, self.rows, starts_T, mode="sum", per_sample_weights=weight_N)


class ExpertMatmul:
    """Multiply each row by its expert's matrix of a stacked weight [E, I, O], and add its expert's bias [O]."""

    def __init__(self, w_EIO: Tensor, b_EO: Tensor | None = None) -> None:
        self.w = w_EIO.unbind(0)
        self.b = None if b_EO is None else b_EO.unbind(0)

    def multiply(self, block: Block, x_nI: Tensor, out_nO: Tensor | None = None) -> Tensor:
        """[n, O] in the dtype of x, written to out_nO if given."""
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


class ExpertGradient:
    """The gradient of a stacked weight [E, I, O] or bias [E, O]: x^T g over each expert's rows, 0 for an idle expert.

    An expert's rows may span several blocks, which follow each other; they are summed in fp32 or better.
    """

    def __init__(self, weight: Tensor, idle: Sequence[int]) -> None:
        self.stacked = torch.empty_like(weight)
        self.by_expert = (self.stacked if weight.dim() == 3 else self.stacked[:, None]).unbind(0)
        self.sum = self.by_expert[0]  # of the expert whose rows came last
        for expert in idle:
            self.by_expert[expert].zero_()

    def accumulate(self, block: Block, x_nI: Tensor, g_nO: Tensor) -> None:
        """Add x^T g of a block's rows."""
        columns, rows = x_nI.t().split_with_sizes(block.sizes, dim=1), g_nO.split_with_sizes(block.sizes)
        for e, first, x, g in zip(block.experts, block.first, columns, rows, strict=True):
            grad = self.by_expert[e]
            if grad.dtype == g.dtype and (first or g.dtype.itemsize > 2):
                self.sum = torch.addmm(grad, x, g, beta=int(not first), out=grad)
            else:
                self.sum = x @ g if first else at_least_fp32(self.sum) + x @ g
                grad.copy_(self.sum)


def _nonzero(weight_N: Tensor) -> Tensor:
    """Gates to divide by: replace those near 0 by a value so small that rounding removes it from any sum."""
    tiny = torch.finfo(weight_N.dtype).eps ** 2
    return torch.where(weight_N.abs() < tiny, tiny, weight_N)


def _reference_gradients(
    kernel: KernelPlan, inputs: Sequence[Tensor | None], needed: Sequence[bool], g_TO: Tensor
) -> Iterable[Tensor | None]:
    """The gradients of the reference path, which can be differentiated again.

    They are taken at views of the inputs: one input may depend on another (a gate on x), and a gradient along that
    path is not this Function's.
    """
    views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [view for view, need in zip(views, needed, strict=True) if need and view is not None]
    with torch.autocast(g_TO.device.type, kernel.autocast_dtype, enabled=kernel.autocast_dtype is not None):
        y_TO = kernel.reference(*views)
    grads = iter(torch.autograd.grad(y_TO, wanted, g_TO, create_graph=True))
    return [next(grads) if need else None for need in needed]
