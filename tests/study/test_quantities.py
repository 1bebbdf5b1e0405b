"""Quantities of a cell by name, from a record made by hand."""

import pytest

from moe_engine.study.quantities import quantity


def point(split, step, load=None, layers=("one",), **more):
    numbers = {"load": load, **more} if load else more
    return {"split": split, "step": step, "epoch": 1, "loss": float(step), "layers": dict.fromkeys(layers, numbers)}


def record(records, layers=None, **more):
    summary = {
        "loss": 0.5,
        "accuracy": 0.9,
        "measures": {"f1": 0.8, "loss.mnist": 0.25},
        "findings": [{"metric": "inert.saturation", "name": "no effect"}],
        "layers": layers or [{"name": "one", "experts": 2, "top_k": 1, "cv": 0.1, "load": [0.5, 0.5]}],
    }
    return {"status": "finished", "summary": summary, "records": records, "flops": {"active": 7.0}, **more}


PLAIN = record([point("train", 10), point("eval", 10)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", 0.5),
        ("accuracy", 0.9),
        ("f1", 0.8),
        ("loss.mnist", 0.25),
        ("cv", 0.1),
        ("top_share", 0.5),
        ("active_1pct", 2),
        ("flops.active", 7.0),
        ("found.inert.saturation", 1),
        ("found.no effect", 1),
        ("found.collapsed", 0),
        ("nothing", None),
        ("step10.loss", 10),
        ("eval10.loss", 10),
        ("step11.loss", None),
    ],
)
def test_numbers_of_the_test_set_and_of_single_steps(name, expected):
    assert expected == quantity(PLAIN, name)


def test_layers_are_averaged_unless_the_extreme_is_asked_for():
    layers = [
        {"name": "one", "experts": 4, "top_k": 1, "cv": 0.1, "load": [0.25, 0.25, 0.495, 0.005]},
        {"name": "two", "experts": 4, "top_k": 1, "cv": 0.4, "load": [0.25] * 4},
    ]
    got = record([point("train", 10)], layers)
    assert [quantity(got, name) for name in ("cv", "cv:max", "cv:min")] == [pytest.approx(0.25), 0.4, 0.1]
    assert quantity(got, "active_1pct:min") == 3


def test_the_tail_sums_loads_before_judging_their_balance():
    """Of 100 steps those after 90: loads 1, 0 and 0, 1 together are even, although each is not."""
    points = [point("train", 80, [1.0, 0.0]), point("train", 95, [1.0, 0.0]), point("train", 100, [0.0, 1.0])]
    got = record(points)
    assert [quantity(got, f"tail.{name}") for name in ("cv", "active", "top_share", "loss")] == [0, 2, 0.5, 97.5]


def test_the_tail_leaves_out_log_points_with_fewer_experts():
    points = [point("train", 95, [1.0]), point("train", 100, [0.75, 0.25])]
    assert quantity(record(points), "tail.cv") == pytest.approx(0.5)


def test_after_growth_is_the_largest_value_from_sixty_steps_after_the_last_growth():
    growth = {"split": "growth", "step": 20, "layers": {}, "growth": {}}
    values = {20: 9.0, 79: 8.0, 80: 1.0, 90: 2.0}
    points = [point("train", step, **{"spread.bias": value}) for step, value in values.items()]
    assert quantity(record([points[0], growth, *points[1:]]), "after_growth.spread.bias") == 2.0
    assert quantity(record(points[:2]), "after_growth.spread.bias") == 8.0
    assert quantity(record([points[0], growth, points[1]]), "after_growth.spread.bias") is None


def test_a_run_that_failed_has_no_numbers():
    assert quantity({"status": "failed", "reason": "no"}, "loss") is None
