"""Bars, held against rows whose values can be checked in the head."""

import pytest

from moe_engine.study.criteria import judge
from moe_engine.study.spec import Bar


def row(method, values, k="1", part="main", quantity="loss"):
    numbers = {quantity: {"values": values}}
    return {
        "part": part,
        "variant": f"{k}, {method}",
        "at": {"k": k, "method": method},
        "seeds": list(range(len(values))),
        "numbers": numbers,
    }


ROWS = [
    row("ours", [1.0, 2.0, 3.0]),
    row("weak", [4.0, 4.0, 4.0]),
    row("strong", [2.0, 1.0, 3.0]),
    row("ours", [5.0, 5.0, 5.0], k="2"),
    row("weak", [4.0, 4.0, 4.0], k="2"),
    row("strong", [6.0, 6.0, 6.0], k="2"),
]
OURS = {"method": ("ours",)}


def judged(rows=ROWS, **more):
    return judge(Bar("said", "loss", **{"where": OURS, **more}), rows)


@pytest.mark.parametrize(
    ("over", "limit", "verdict", "value"),
    [
        ("each", {"at_most": 5.0}, "held", 5.0),
        ("each", {"at_most": 4.9}, "missed", 5.0),
        ("each", {"at_least": 1.0}, "held", 1.0),
        ("each", {"above": 1.0}, "missed", 1.0),
        ("some", {"above": 2.9}, "held", 3.0),
        ("some", {"below": 1.0}, "missed", 5.0),
        ("mean", {"at_least": 2.0}, "held", 2.0),
        ("mean", {"below": 5.0}, "missed", 5.0),
    ],
)
def test_values_of_all_variants_that_are_named(over, limit, verdict, value):
    got = judged(over=over, **limit)
    assert (verdict, value) == (got.verdict, got.value)


def test_the_worst_variant_is_named():
    assert judged(over="mean", at_most=4.0).variant == "2, ours"
    assert judged(over="mean", at_least=3.0).variant == "1, ours"


def test_an_interval_must_lie_within_the_limit_or_reach_it():
    """1, 2, 3: mean 2, half 4.3027 * 1 / sqrt(3) = 2.484 (Student's t with two degrees of freedom)."""
    one = {**OURS, "k": ("1",)}
    assert judged(where=one, over="interval", at_most=4.49).verdict == "held"
    assert judged(where=one, over="interval", at_most=4.48).verdict == "missed"
    assert judged(where=one, over="within", at_least=4.48).verdict == "held"
    assert judged(where=one, over="within", at_least=4.49).verdict == "missed"


def test_one_seed_has_no_interval_to_hold():
    assert judge(Bar("said", "loss", OURS, over="interval", at_most=9), [row("ours", [1.0])]).verdict == "missed"


def test_a_ratio_is_to_the_best_of_the_variants_that_differ_only_there():
    """At k 1 the best mean is 2 (strong), at k 2 it is 4 (weak): ratios 1 and 1.25."""
    against = {"method": ("weak", "strong")}
    assert judged(against=against, over="mean", at_most=1.25).verdict == "held"
    got = judged(against=against, over="mean", at_most=1.2)
    assert (got.verdict, got.value, got.variant) == ("missed", 1.25, "2, ours")


def test_differences_are_taken_seed_by_seed():
    """1, 2, 3 less 2, 1, 3 is -1, 1, 0."""
    one = {**OURS, "k": ("1",)}
    got = judged(where=one, against={"method": ("strong",)}, compare="difference", over="each", at_most=1.0)
    assert (got.verdict, got.value) == ("held", 1.0)
    assert (
        judged(where=one, against={"method": ("strong",)}, compare="difference", over="each", below=1.0).verdict
        == "missed"
    )


def test_seeds_that_only_one_of_two_has_are_left_out():
    rows = [row("ours", [1.0, None, 3.0]), row("weak", [1.0, 9.0, 2.0])]
    got = judged(rows, against={"method": ("weak",)}, compare="difference", over="each", at_most=1.0)
    assert (got.verdict, got.value) == ("held", 1.0)


def test_another_part_may_be_the_reference():
    rows = [row("ours", [3.0]), {**row("dense", [2.0], part="dense"), "at": {"width": "dense"}}]
    against = {"part": ("dense",), "width": ("dense",)}
    got = judged(rows, where={"part": ("main",)}, against=against, over="mean", at_most=1.5)
    assert (got.verdict, got.value) == ("held", 1.5)


def test_what_was_not_measured_is_no_bar_that_is_held():
    rows = [*ROWS[:3], {**ROWS[3], "numbers": {}}]
    assert judged(rows, over="each", at_most=99).verdict == "not measured"
    assert judged(rows, over="each", at_most=99).variant == "2, ours"
    assert judged(where={"method": ("nobody",)}, at_most=99).verdict == "not measured"
    assert judged(against={"method": ("nobody",)}, at_most=99).verdict == "not measured"
