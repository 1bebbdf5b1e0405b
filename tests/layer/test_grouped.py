"""Grouped matmuls: each row with its own expert's matrix, in one call."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from moe_engine.layer import grouped


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 0], [10, 0, 0, 0], [0, 1, 2, 9]])
def test_grouped_matmuls_are_those_of_a_loop(counts):
    torch.manual_seed(0)
    counts_E = torch.tensor(counts)
    x_ND, w_EDH, g_NH = torch.randn(12, 16), torch.randn(4, 16, 24), torch.randn(12, 24)
    expert_N = torch.arange(4).repeat_interleave(counts_E)
    wanted = torch.zeros(12, 24)
    wanted[: len(expert_N)] = torch.einsum("nd,ndh->nh", x_ND[: len(expert_N)], w_EDH[expert_N])
    for grouped_mm in (grouped._torch_grouped_mm, grouped._grouped_mm):
        torch.testing.assert_close(grouped_mm(x_ND, w_EDH, counts_E), wanted)
    outer = F.grouped_mm(x_ND.t(), g_NH, offs=grouped._ends(counts_E))
    torch.testing.assert_close(grouped._grouped_outer(x_ND, g_NH, counts_E), outer)


def test_grouped_matmuls_have_first_and_second_derivatives():
    torch.manual_seed(0)
    x_ND = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    w_EDH = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    counts_E = torch.tensor([2, 0, 3])

    def grouped_mm(x_ND, w_EDH):
        return grouped._grouped_mm(x_ND, w_EDH, counts_E)

    assert gradcheck(grouped_mm, (x_ND, w_EDH))
    assert gradgradcheck(grouped_mm, (x_ND, w_EDH))
