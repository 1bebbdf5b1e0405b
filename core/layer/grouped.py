"""Grouped matmuls and convolutions: each row with its own expert's weights.

Rows [N, D] are sorted by expert, counts_E[e] rows each. In eager mode on a CPU, the rows are split once and each expert
is one matmul, by plain operations in any precision. On a GPU, where reading the counts waits for the device, and under
torch.compile, where they can't be read, two custom operators take the counts as a tensor: `grouped_mm` (rows times
matrices) and `grouped_outer` (x^T g per expert, the gradient of a matrix). Their gradients are made of each other.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused_cpu import matmul_dtype


def row_counts(counts_E: Tensor) -> list[int] | Tensor:
    """counts_E in the form for `grouped_linear`: a list, or the tensor under torch.compile and on a GPU.

    Reading values from a GPU waits for it; only matmuls that torch's grouped matmul does not support do that.
    """
    return counts_E if torch.compiler.is_compiling() or counts_E.is_cuda else counts_E.tolist()


def grouped_linear(x_ND: Tensor, w_EDH: Tensor, b_EH: Tensor | None, counts: list[int] | Tensor) -> Tensor:
    """[N, H]: x W + b with each row's own expert; rows past the counts' sum give 0.

    x [N, D] sorted by expert, W [E, D, H], b [E, H] or None, counts from `row_counts`. Autocast's dtype applies.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, w_EDH, b_EH = x_ND.to(dtype), w_EDH.to(dtype), None if b_EH is None else b_EH.to(dtype)
    if isinstance(counts, Tensor):
        out_NH: Tensor = _grouped_mm(x_ND, w_EDH, counts)
        return out_NH if b_EH is None else out_NH + own_values(b_EH, counts, x_ND.shape[0])
    rest = x_ND.shape[0] - sum(counts)
    rows = x_ND.split([*counts, rest])
    weights = w_EDH.unbind(0)  # not w[e] in a loop: its backward would write E gradients of E experts each
    if b_EH is None:
        parts = [rows_nD @ w_DH for rows_nD, w_DH in zip(rows, weights, strict=False)]
    else:
        parts = [torch.addmm(b_H, r_nD, w_DH) for r_nD, w_DH, b_H in zip(rows, weights, b_EH.unbind(0), strict=False)]
    if rest:
        parts.append(x_ND.new_zeros(rest, w_EDH.shape[2]))
    return torch.cat(parts)


def grouped_conv(x_NSSC: Tensor, k_EWH: Tensor, b_EH: Tensor | None, counts_E: Tensor) -> Tensor:
    """[N, S, S, H]: a convolution of each image with its own expert's kernel and bias, zero-padded to the same size.

    x [N, S, S, C] sorted by expert; k_EWH [E, W, H] with W = C k^2: a window of side k, flattened as F.unfold does it.
    """
    size, side, _, channels = x_NSSC.shape
    kernel = isqrt(k_EWH.shape[1] // channels)
    windows_NWP = F.unfold(x_NSSC.permute(0, 3, 1, 2), kernel, padding=kernel // 2)
    rows, counts = windows_NWP.transpose(1, 2).flatten(0, 1), row_counts(counts_E * side**2)
    return grouped_linear(rows, k_EWH, b_EH, counts).view(size, side, side, k_EWH.shape[2])


def own_values(values_EH: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """[N, H]: for each of `rows` rows sorted by expert, its expert's values; 0 for rows past the counts' sum."""
    row_N = torch.arange(rows, device=values_EH.device)
    expert_N = torch.searchsorted(counts_E.cumsum(0), row_N, right=True)
    return torch.cat([values_EH, values_EH.new_zeros(1, values_EH.shape[1])]).index_select(0, expert_N)


@torch.library.custom_op("moe_engine::grouped_mm", mutates_args=())
def _grouped_mm(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    """[N, H]: each row times its expert's matrix; rows past the counts' sum give 0."""
    if _torch_supports(x_ND, w_EDH):
        return _torch_grouped_mm(x_ND, w_EDH, counts_E)
    out_NH = x_ND.new_zeros(x_ND.shape[0], w_EDH.shape[2])
    start = 0
    for expert, rows in enumerate(counts_E.tolist()):
        _multiply(x_ND[start : start + rows], w_EDH[expert], out_NH[start : start + rows])
        start += rows
    return out_NH


@torch.library.custom_op("moe_engine::grouped_outer", mutates_args=())
def _grouped_outer(x_ND: Tensor, g_NH: Tensor, counts_E: Tensor) -> Tensor:
    """[E, D, H]: x^T g over each expert's rows; 0 for an expert without rows."""
    if _torch_supports(x_ND, g_NH):
        return F.grouped_mm(x_ND.t(), g_NH, offs=_ends(counts_E))
    out_EDH = x_ND.new_zeros(counts_E.shape[0], x_ND.shape[1], g_NH.shape[1])
    start = 0
    for expert, rows in enumerate(counts_E.tolist()):
        _multiply(x_ND[start : start + rows].t(), g_NH[start : start + rows], out_EDH[expert])
        start += rows
    return out_EDH


def _torch_supports(*operands: Tensor) -> bool:
    """Whether torch's F.grouped_mm supports them: on a GPU, in bf16, with rows aligned to 16 bytes."""
    return all(each.is_cuda and each.dtype == torch.bfloat16 and not each.shape[-1] % 8 for each in operands)


def _ends(counts_E: Tensor) -> Tensor:
    """[E] int32: the row after each expert's last one."""
    return counts_E.cumsum(0).to(torch.int32)


def _torch_grouped_mm(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    """F.grouped_mm, with 0 in the rows past the counts' sum, which it leaves undefined; does not wait for the GPU."""
    ends_E = _ends(counts_E)
    inside_N = torch.arange(x_ND.shape[0], device=x_ND.device) < ends_E[-1]
    return torch.where(inside_N[:, None], F.grouped_mm(x_ND, w_EDH, offs=ends_E), 0)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    dtype = matmul_dtype(out.dtype) if out.device.type == "cpu" else out.dtype
    if dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.to(dtype) @ b.to(dtype))


@_grouped_mm.register_fake
def _(x_ND: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_EDH.shape[2])


@_grouped_outer.register_fake
def _(x_ND: Tensor, g_NH: Tensor, counts_E: Tensor) -> Tensor:
    return x_ND.new_empty(counts_E.shape[0], x_ND.shape[1], g_NH.shape[1])


def _save_inputs(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]


def _mm_backward(ctx: object, g_NH: Tensor) -> tuple[Tensor, Tensor, None]:
    x_ND, w_EDH, counts_E = ctx.saved_tensors  # type: ignore[attr-defined]
    g_NH = g_NH.contiguous()
    return _grouped_mm(g_NH, w_EDH.transpose(1, 2).contiguous(), counts_E), _grouped_outer(x_ND, g_NH, counts_E), None


def _outer_backward(ctx: object, g_EDH: Tensor) -> tuple[Tensor, Tensor, None]:
    x_ND, g_NH, counts_E = ctx.saved_tensors  # type: ignore[attr-defined]
    dx_ND = _grouped_mm(g_NH, g_EDH.transpose(1, 2).contiguous(), counts_E)
    return dx_ND, _grouped_mm(x_ND, g_EDH.contiguous(), counts_E), None


_grouped_mm.register_autograd(_mm_backward, setup_context=_save_inputs)
_grouped_outer.register_autograd(_outer_backward, setup_context=_save_inputs)
