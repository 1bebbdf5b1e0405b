"""Criteria, applied to rows whose values can be checked by hand."""

import pytest

from moe_engine.study.criteria import judge
from moe_engine.study.spec import Criterion


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
    return judge(Criterion("claim", "loss", **{"where": OURS, **more}), rows)


@pytest.mark.parametrize(
    ("over", "limit", "verdict", "value"),
    [
        ("each", {"at_most": 5.0}, "passed", 5.0),
        ("each", {"at_most": 4.9}, "failed", 5.0),
        ("each", {"at_least": 1.0}, "passed", 1.0),
        ("each", {"above": 1.0}, "failed", 1.0),
        ("some", {"above": 2.9}, "passed", 3.0),
        ("some", {"below": 1.0}, "failed", 5.0),
        ("mean", {"at_least": 2.0}, "passed", 2.0),
        ("mean", {"below": 5.0}, "failed", 5.0),
    ],
)
def test_every_named_variant_must_meet_the_limit(over, limit, verdict, value):
    got = judged(over=over, **limit)
    assert (verdict, value) == (got.verdict, got.value)


def test_the_worst_variant_is_named():
    assert judged(over="mean", at_most=4.0).variant == "2, ours"
    assert judged(over="mean", at_least=3.0).variant == "1, ours"


def test_an_interval_must_lie_within_the_limit_or_reach_it():
    """1, 2, 3: mean 2, half 4.3027 * 1 / sqrt(3) = 2.484 (Student's t with two degrees of freedom)."""
    where = {**OURS, "k": ("1",)}
    assert judged(where=where, over="interval", at_most=4.49).verdict == "passed"
    assert judged(where=where, over="interval", at_most=4.48).verdict == "failed"
    assert judged(where=where, over="within", at_least=4.48).verdict == "passed"
    assert judged(where=where, over="within", at_least=4.49).verdict == "failed"


def test_one_seed_has_no_interval_and_fails():
    assert judge(Criterion("claim", "loss", OURS, over="interval", at_most=9), [row("ours", [1.0])]).verdict == "failed"


def test_a_ratio_is_to_the_best_of_the_variants_that_differ_only_there():
    """At k 1 the best mean is 2 (strong), at k 2 it is 4 (weak): ratios 1 and 1.25."""
    against = {"method": ("weak", "strong")}
    assert judged(against=against, over="mean", at_most=1.25).verdict == "passed"
    got = judged(against=against, over="mean", at_most=1.2)
    assert (got.verdict, got.value, got.variant) == ("failed", 1.25, "2, ours")


def test_differences_are_taken_seed_by_seed():
    """1, 2, 3 less 2, 1, 3 is -1, 1, 0."""
    where = {**OURS, "k": ("1",)}
    got = judged(where=where, against={"method": ("strong",)}, compare="difference", over="each", at_most=1.0)
    assert (got.verdict, got.value) == ("passed", 1.0)
    assert (
        judged(where=where, against={"method": ("strong",)}, compare="difference", over="each", below=1.0).verdict
        == "failed"
    )


def test_seeds_that_only_one_of_two_has_are_left_out():
    rows = [row("ours", [1.0, None, 3.0]), row("weak", [1.0, 9.0, 2.0])]
    got = judged(rows, against={"method": ("weak",)}, compare="difference", over="each", at_most=1.0)
    assert (got.verdict, got.value) == ("passed", 1.0)


def test_another_part_may_be_the_reference():
    rows = [row("ours", [3.0]), {**row("dense", [2.0], part="dense"), "at": {"width": "dense"}}]
    against = {"part": ("dense",), "width": ("dense",)}
    got = judged(rows, where={"part": ("main",)}, against=against, over="mean", at_most=1.5)
    assert (got.verdict, got.value) == ("passed", 1.5)


def test_what_was_not_measured_does_not_pass():
    rows = [*ROWS[:3], {**ROWS[3], "numbers": {}}]
    assert judged(rows, over="each", at_most=99).verdict == "not measured"
    assert judged(rows, over="each", at_most=99).variant == "2, ours"
    assert judged(where={"method": ("unknown",)}, at_most=99).verdict == "not measured"
    assert judged(against={"method": ("unknown",)}, at_most=99).verdict == "not measured"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "loss: each seed <= 9"),
        ({"over": "interval"}, "loss: the whole interval <= 9"),
        ({"over": "within", "against": {"method": ("weak",)}}, "loss, ratio to weak: an end of the interval <= 9"),
        (
            {"over": "mean", "against": {"method": ("weak", "strong")}},
            "loss, ratio to the best of weak, strong: the mean <= 9",
        ),
    ],
)
def test_the_limit_is_put_in_words(more, text):
    assert text == judged(at_most=9.0, **more).limit
