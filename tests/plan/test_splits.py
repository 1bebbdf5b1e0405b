"""Times by hand, the best split by brute force, and where scaling stops."""

import itertools

import attrs
import numpy as np
import pytest

from moe_engine.plan.loads import load_of
from moe_engine.plan.sizes import Cluster, Model, Split, Training, splits_of
from moe_engine.plan.splits import (
    LADDER,
    best_of,
    gain,
    ladder_of,
    plan_of,
    planned,
    require_fit,
    stop_of,
    where_it_stops,
)
from moe_engine.plan.times import exchange_seconds, gradient_seconds, neighbours
from moe_engine.plan.traffic import rows_between
from support import refused

MODEL = Model(layers=3, dim=64, hidden=128, experts=16, top_k=2, sequence=32)
CLUSTER = Cluster(16, 1e12, 2e10, 5e7, 1e-5)


def step_by_hand(model, training, split, cluster, load):
    """Seconds of a step, in loops over ranks and rows of bytes."""
    data, ranks = split.data, split.experts
    each = -(-model.experts // ranks)
    owned = [sum(load[rank * each : (rank + 1) * each]) for rank in range(ranks)]
    tokens = training.batch * model.sequence
    expert = 2 * model.dim * model.hidden
    attention = 4 * model.dim**2
    router = model.experts * model.dim
    products = (
        6
        * model.layers
        * (tokens * (attention + router + 2 * model.sequence * model.dim) + max(owned) * ranks * expert)
    )
    exchange = 0.0
    if ranks > 1:
        most = max(max((ranks - 1) * own, sum(load) - own) for own in owned)
        exchange = 4 * most * model.dim * 4 / cluster.bandwidth + (ranks - 1) * each * 8 / cluster.bandwidth
        exchange = model.layers * (exchange + 5 * (ranks - 1) * cluster.latency)
    outside, inside = model.layers * (attention + router) * 4, model.layers * each * expert * 4
    gradients = 2 * (data * ranks - 1) * (outside / (data * ranks) / cluster.bandwidth + cluster.latency)
    lots = 1 if ranks == 1 else 2 * model.layers
    gradients += 2 * (data - 1) * (inside / data / cluster.bandwidth + lots * cluster.latency)
    return products / cluster.rate + exchange + gradients


RATES, BANDWIDTHS, LATENCIES, SKEWS = (2e9, 2e11), (1e7, 1e10), (0.0, 1e-3), (0.0, 3.0)


@pytest.mark.parametrize(
    ("rate", "bandwidth", "latency", "skew"), list(itertools.product(RATES, BANDWIDTHS, LATENCIES, SKEWS))
)
def test_the_best_split_is_the_quickest_of_all(rate, bandwidth, latency, skew):
    """Every divisor of 16, its step computed in loops."""
    training, cluster = Training(batch=2, skew=skew), Cluster(16, 1e12, rate, bandwidth, latency)
    load = load_of(16, 128, 2, skew).tolist()
    by_hand = {
        count: step_by_hand(MODEL, training, Split(16 // count, count), cluster, load)
        for count in range(1, 17)
        if 16 % count == 0
    }
    fitting, _ = plan_of(MODEL, training, cluster)
    assert {one.split.experts: one.times.step for one in fitting} == pytest.approx(by_hand, rel=1e-6)
    assert best_of(fitting).split.experts == min(by_hand, key=by_hand.get)


def test_the_best_split_depends_on_the_cluster():
    """Gradients of all experts cost a slow connection more than rows do; a latency is paid per expert rank."""
    choices = {
        best_of(plan_of(MODEL, Training(batch=2, skew=skew), Cluster(16, 1e12, rate, width, wait))[0]).split.experts
        for rate, width, wait, skew in itertools.product(RATES, BANDWIDTHS, LATENCIES, SKEWS)
    }
    assert len(choices) > 2


def test_all_divisors_are_tried_up_to_one_expert_a_rank():
    """Also those that leave the last rank without an expert."""
    assert [str(split) for split in splits_of(MODEL, 12)] == ["12 x 1", "6 x 2", "4 x 3", "3 x 4", "2 x 6", "1 x 12"]
    assert [split.experts for split in splits_of(attrs.evolve(MODEL, experts=5), 12)] == [1, 2, 3, 4]


def test_efficiency_is_one_where_nothing_is_sent():
    """On one rank, and with an even load; a skew makes ranks wait, not one rank alone."""
    one = planned(MODEL, Training(skew=1.0), Split(1, 1), CLUSTER)
    assert one.times.efficiency == 1 and one.exchanged == one.reduced == 0
    even, skewed = (planned(MODEL, Training(skew=skew), Split(1, 16), CLUSTER) for skew in (0.0, 2.0))
    assert skewed.times.products > even.times.products == pytest.approx(even.times.ideal)
    assert skewed.times.ideal == even.times.ideal
    assert sum(skewed.times.losses.values()) + skewed.times.efficiency == pytest.approx(1)


def test_nodes_have_a_bandwidth_of_their_own():
    """Of 4 ranks in nodes of 2, one peer is near and two are far; a ring that leaves a node is slow."""
    cluster = Cluster(4, 1e12, 1e12, 10.0, 0.0, 2, 1000.0)
    training = Training()
    rows_PP = rows_between(np.full(16, 10), 4)  # 40 rows from each rank to each
    width = 4 * MODEL.dim * 4
    expected = width * (80 / 10 + 40 / 1000) + 3 * 4 * 8 / 10
    assert exchange_seconds(rows_PP, MODEL, training, cluster) == pytest.approx(expected)
    inside = exchange_seconds(rows_between(np.full(16, 10), 2), MODEL, training, cluster)
    assert inside == pytest.approx(width * 80 / 1000 + 8 * 8 / 1000)
    assert not neighbours(3, cluster).any()
    outside, own = (MODEL.layers * size * 4 for size in (16 * 64 + 4 * 64**2, 16 * 2 * 64 * 128))
    slow = gradient_seconds(MODEL, training, Split(4, 1), cluster)
    assert slow == pytest.approx(2 * 3 / 4 * (outside + own) / 10, rel=1e-6)
    fast = gradient_seconds(MODEL, training, Split(2, 1), cluster)
    assert fast == pytest.approx((outside + own) / 1000, rel=1e-6)
    mixed = gradient_seconds(MODEL, training, Split(2, 2), cluster)  # experts are reduced between nodes
    assert mixed == pytest.approx((2 * 3 / 4 * outside + own / 2) / 10, rel=1e-6)


def test_sequences_are_of_a_rank_or_shared_by_all():
    """With 10 sequences on 4 ranks the busiest has 3, and a step has 10."""
    shared = Training(total_batch=10)
    assert (shared.sequences(4), shared.sequences_of_all(4)) == (3, 10)
    assert (Training(batch=3).sequences(4), Training(batch=3).sequences_of_all(4)) == (3, 12)
    with refused("more-ranks-than-sequences", "16 ranks", "10 sequences", "--total-batch"):
        plan_of(MODEL, shared, CLUSTER)
    assert [one.split.ranks for one in ladder_of(MODEL, shared, CLUSTER)] == [1, 2, 4, 8]


def test_what_does_not_fit_is_set_aside():
    """On little memory few experts per rank are the only choice."""
    needs = {one.split.experts: one.memory.total for one in plan_of(MODEL, Training(), CLUSTER)[0]}
    limit = needs[4]
    fitting, others = plan_of(MODEL, Training(), attrs.evolve(CLUSTER, memory=limit))
    assert [one.split.experts for one in fitting] == [count for count, need in needs.items() if need <= limit]
    assert {one.split.experts for one in others} == {1, 2}
    cluster = attrs.evolve(CLUSTER, memory=1e3)
    fitting, others = plan_of(MODEL, Training(), cluster)
    least = min(others, key=lambda one: one.memory.total)
    with refused("does-not-fit", "16 ranks", str(least.split), f"{least.memory.total / 1e9:.3g} GB"):
        require_fit(fitting, others, cluster)
    assert "no number of ranks" in where_it_stops(ladder_of(MODEL, Training(), cluster))


def rungs(*speeds):
    """A ladder of 1, 2, 4, ... ranks that are so fast, relative to one."""
    one = planned(MODEL, Training(), Split(1, 1), CLUSTER)
    tokens = [round(1e6 * speed) for speed in speeds]
    return [attrs.evolve(one, split=Split(2**at, 1), tokens=count) for at, count in enumerate(tokens)]


@pytest.mark.parametrize(
    ("speeds", "stop"),
    [
        ((1, 2, 4, 8), None),
        ((1, 2, 2.9, 3), 1),
        ((1, 2, 3.1, 4), 2),
        ((1, 1.1, 2, 4), None),  # what the first exchange costs is paid once
        ((1, 0.5, 0.4), 0),
        ((1,), None),
    ],
)
def test_scaling_stops_where_no_more_ranks_bring_half(speeds, stop):
    steps = rungs(*speeds)
    assert stop_of(steps) == stop
    sentence = where_it_stops(steps)
    if stop is None:
        assert sentence.startswith(f"it scales to {steps[-1].split.ranks} ranks")
    else:
        assert sentence.startswith(f"it stops scaling at {steps[stop].split.ranks} ranks")
        assert f": {steps[stop + 1].split.ranks} bring" in sentence


def test_a_gain_is_relative_to_the_ranks_that_are_added():
    """Half as many again that make a quarter more bring half of what they could."""
    before, _, after = rungs(2, 0, 2.5)
    after = attrs.evolve(after, split=Split(6, 1))
    assert gain(attrs.evolve(before, split=Split(4, 1)), after) == pytest.approx(0.5)


def test_a_large_plan_asks_for_one_load():
    """1,000 ranks and 10^5 experts: a load takes most of the time, and all splits share it."""
    model = Model(layers=48, dim=4096, hidden=2048, experts=100_000, top_k=8, sequence=4096)
    cluster, training = Cluster(1000, 1e17, 4e14, 5e10, 1e-5), Training(skew=3.0)
    load_of.cache_clear()
    fitting, _ = plan_of(model, training, cluster)
    steps = ladder_of(model, training, cluster)
    assert [one.split.ranks for one in steps] == list(LADDER)
    assert len(fitting) == 16 and load_of.cache_info().misses == 1
