"""Who uses which expert."""

import numpy as np

from moe_engine import characteristic_tokens


def test_lift_counts_the_choices_that_were_made():
    """Token 7 chose expert 1 in 6 of 12 choices; expert 1 has 6 of 16. Token 9 chose expert 0 alone, 4 times."""
    ids = np.array([7] * 6 + [9] * 4)
    experts = np.array([[0, 1]] * 6 + [[0, -1]] * 4)
    of_0, of_1 = characteristic_tokens(ids, experts, 2, 8)
    assert of_1 == [{"id": 7, "count": 6, "of": 6, "lift": 0.5 / (6 / 16)}]
    assert of_0 == []  # 9 has the lift 1.6, but fewer than 5 choices; 7 chose it less often than all did
    of_0, _ = characteristic_tokens(np.append(ids, 9), np.append(experts, [[0, -1]], 0), 2, 8)
    assert of_0 == [{"id": 9, "count": 5, "of": 5, "lift": 1 / (11 / 17)}]
