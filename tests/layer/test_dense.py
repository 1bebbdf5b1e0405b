"""What replaces an MoE layer in a dense model."""

import pytest
import torch

from moe_engine.contract.routing import Spec
from moe_engine.layer.dense import DenseMLP, dense_twin, shared_expert
from support import refused


def spec_of(**more):
    return Spec(**{"dim": 4, "hidden": 6, "experts": 8, "top_k": 2, **more})


@pytest.mark.parametrize(("shared", "width"), [(0, 12), (1, 18)])
def test_the_twin_is_as_wide_as_the_experts_that_a_token_is_sent_to(shared, width):
    assert dense_twin(spec_of(shared=shared)).enter.out_features == width


def test_shared_experts_are_one_mlp_or_none():
    assert shared_expert(spec_of()) is None
    assert shared_expert(spec_of(shared=3)).enter.out_features == 18
    assert shared_expert(spec_of(shared=3, activation="swiglu")).enter.out_features == 36


def test_padding_of_any_content_reaches_no_output_and_no_gradient():
    mlp = DenseMLP(spec_of(bias=True))
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    y = mlp(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert not y[~mask].any()
    assert torch.equal(y[mask], mlp(x)[mask])
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mlp.parameters())


def test_a_bank_without_a_width_has_a_twin_for_one_expert_alone():
    with refused("no-dense-twin", "top_k=2 and shared=0"):
        dense_twin(spec_of(), bank=lambda spec: torch.nn.Identity())
    assert dense_twin(spec_of(top_k=1), bank=lambda spec: torch.nn.Identity()).dim == 4
