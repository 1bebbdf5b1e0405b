"""What a part may declare."""

import pytest
import torch

from moe_engine import Part


def test_a_role_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="role is one of in, output, logit_row, logit_bias, state, not 'row'"):
        Part().expert_param("weight", (3,), fresh=torch.zeros, role="row")
