"""Sums, precisions and statistics, in numbers that can be checked on paper."""

import math

import pytest
import torch

from moe_engine.contract.numerics import at_least_fp32, centred_log, count_by, cv2, entropy_of, rows_of


def test_counts_by_index():
    index = torch.tensor([2, 0, 2])
    assert rows_of(index, 4).tolist() == [1, 0, 2, 0]
    sums = count_by(index, torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16), 4)
    assert (sums.tolist(), sums.dtype) == ([2, 0, 5, 0], torch.float32)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_no_precision_is_lost(given, expected):
    assert at_least_fp32(torch.ones(1, dtype=given)).dtype == expected


@pytest.mark.parametrize(("values", "expected"), [([3, 3, 3], 0), ([1, 1, 0, 0], 1), ([1, 0, 0, 0], 3), ([0, 0], 0)])
def test_cv2_of_equal_loads_is_0_and_of_k_of_e_is_e_over_k_minus_1(values, expected):
    assert float(cv2(torch.tensor(values, dtype=torch.float64))) == pytest.approx(expected)


def test_entropy_is_in_nats_and_has_a_gradient_at_0():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    entropy = entropy_of(probs)
    assert entropy.tolist() == pytest.approx([math.log(2), 0])
    entropy.sum().backward()
    assert probs.grad.isfinite().all()


def test_the_centred_log_is_0_for_equal_values_and_knows_no_scale():
    assert centred_log(torch.tensor([4.0, 4.0]), 0.1).tolist() == [0, 0]
    values = torch.tensor([1.0, 3.0])
    half = math.log(1.6 / 0.6) / 2
    assert centred_log(values, 0.1).tolist() == pytest.approx([-half, half])
    torch.testing.assert_close(centred_log(values, 0.1), centred_log(values * 7, 0.1))
