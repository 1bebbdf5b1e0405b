"""Generators by purpose, and the state of the process-wide ones."""

import random

import numpy as np
import torch

from moe_engine.seeds import generator, own_random_state, random_state, set_random_state


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_generator_depends_on_seed_and_purpose():
    first = torch.rand(3, generator=generator(0, "weights"))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "weights")))
    assert not torch.equal(first, torch.rand(3, generator=generator(1, "weights")))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "data order")))


def test_a_seed_is_forgotten_at_the_end_also_after_an_error():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    inside = []
    for _ in range(2):
        try:
            with own_random_state(7):
                inside.append(draws())
                raise LookupError
        except LookupError:
            pass
    assert inside[0] == inside[1] != expected
    assert draws() == expected


def test_a_state_can_be_put_back():
    state = random_state()
    expected = draws()
    draws()
    set_random_state(state)
    assert draws() == expected
