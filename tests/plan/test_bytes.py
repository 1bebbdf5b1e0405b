"""What ranks send each other: by hand, and counted assignment by assignment."""

import numpy as np
import pytest

from moe_engine.plan.loads import load_of, maxvio
from moe_engine.plan.sizes import Cluster, Model, Split, Training
from moe_engine.plan.splits import planned
from moe_engine.plan.traffic import exchanged_bytes, gradient_bytes, received, ring_bytes, rows_between, sent
from support import refused

COUNTS = np.array([[1, 2, 3], [4, 5, 6]])


def model(**sizes):
    return Model(**{"layers": 1, "dim": 4, "hidden": 3, "experts": 3, "top_k": 1, **sizes})


def test_rows_go_to_the_owner_of_their_expert():
    """Of 3 experts rank 0 has two and rank 1 one."""
    rows_PP = rows_between(COUNTS, 2)
    assert rows_PP.tolist() == [[3, 3], [9, 6]]
    assert (sent(rows_PP).tolist(), received(rows_PP).tolist()) == ([3, 9], [9, 3])


def test_bytes_by_hand():
    """Rank 0 sends 3 rows of 4 and 9 outputs of 5, in backward 3 gradients of 5 and 9 of 4, and 2 counts."""
    rows_PP = rows_between(COUNTS, 2)
    expected = (3 * 4 + 9 * 5 + 3 * 5 + 9 * 4) * 4 + 2 * 8
    assert exchanged_bytes(rows_PP, model(out=5), "fp32").tolist() == [
        expected,
        (9 * 4 + 3 * 5 + 9 * 5 + 3 * 4) * 4 + 16,
    ]
    assert exchanged_bytes(rows_PP, model(out=5), "bf16").tolist() == [(expected - 16) // 2 + 16] * 2


@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (7, 3), (9, 4), (5, 4), (4, 8), (6, 1)])
def test_bytes_of_a_random_load_assignment_by_assignment(experts, ranks):
    """Each assignment of each rank is a message of its own, to the rank that torch.chunk gives its expert to."""
    torch = pytest.importorskip("torch")
    chunks = torch.arange(experts).chunk(ranks)
    owner = {int(expert): rank for rank, chunk in enumerate(chunks) for expert in chunk}
    chosen = [np.random.default_rng(rank).integers(0, experts, 50) ** 2 % experts for rank in range(ranks)]
    leaving = [(ranks - 1) * len(chunks[0]) * 8 for _ in range(ranks)]
    for source, experts_of_rows in enumerate(chosen):
        for expert in experts_of_rows:
            if (target := owner[int(expert)]) != source:
                leaving[source] += 4 * 4 + 4 * 7  # the row, and later the gradient of its output
                leaving[target] += 4 * 7 + 4 * 4  # its output, and later the gradient of the row
    counts_RE = np.stack([np.bincount(rows, minlength=experts) for rows in chosen])
    sizes = model(experts=experts, out=7)
    assert exchanged_bytes(rows_between(counts_RE, ranks), sizes, "fp32").tolist() == leaving


def test_a_balanced_load_leaves_by_all_but_one_of_p_parts():
    """4 N D values, of which (P - 1) / P leave."""
    one = planned(model(experts=8, top_k=2, sequence=16, layers=3), Training(batch=4), Split(1, 8), CLUSTER)
    rows = 4 * 16 * 2
    assert one.exchanged == 3 * (4 * rows * 4 * 4 * 7 // 8 + 7 * 8)
    assert one.exchanged_all == 8 * one.exchanged


CLUSTER = Cluster(8, 1e9, 1e9, 1e9)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_a_ring_sends_what_it_sends_step_by_step(ranks):
    """Of 20 numbers a rank passes on one chunk at each of n - 1 steps, twice; sharded weights go round three times."""
    chunk, steps = 20 // ranks, ranks - 1
    assert ring_bytes(20, ranks, 2) == 2 * steps * chunk
    assert ring_bytes(20, ranks, 3) == 3 * steps * chunk


def test_gradients_by_hand():
    """Router and attention over all 8 ranks; the two experts of a rank over the four that have the same."""
    sizes = model(experts=4, layers=2, other=100)  # an expert: 4 * 3 + 3 * 4 = 24 weights
    outside = (2 * (4 * 4 + 4 * 16) + 100) * 4
    inside = 2 * 2 * 24 * 4
    split = Split(4, 2)
    assert gradient_bytes(sizes, Training(), split) == 2 * 7 * outside // 8 + 2 * 3 * inside // 4
    assert gradient_bytes(sizes, Training(parallel="shard"), split) == 3 * 7 * outside // 8 + 2 * 3 * inside // 4
    whole = Split(8, 1)
    assert gradient_bytes(sizes, Training(parallel="shard"), whole) == 3 * 7 * outside // 8 + 3 * 7 * 2 * inside // 8


@pytest.mark.parametrize("skew", [0.0, 0.3, 2.0, 7.0])
@pytest.mark.parametrize("experts", [16, 1000])
def test_the_assumed_load_has_the_skew_and_all_rows(experts, skew):
    load_E = load_of(experts, 200_000, 2, skew)
    assert load_E.sum() == 200_000 and load_E.min() >= 0 and load_E.max() <= 100_000
    assert abs(maxvio(load_E) - skew) <= experts / 200_000


def test_the_most_skewed_load_is_possible():
    """The busiest of 8 experts is chosen by every token; no expert twice by one."""
    load_E = load_of(8, 1000, 2, 3.0)
    assert load_E.max() == 500 and load_E.sum() == 1000


@pytest.mark.parametrize("skew", [-0.1, 3.1, float("nan"), float("inf")])
def test_a_skew_that_cannot_be_is_refused(skew):
    with refused("impossible-skew", "8 experts", "top 2", "0 to 3"):
        load_of(8, 1000, 2, skew)
