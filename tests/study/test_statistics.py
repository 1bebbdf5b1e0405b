"""Intervals of a few values, compared with closed forms and numbers worked out by hand."""

import math

import pytest

from moe_engine.study.statistics import interval, student_t


def test_one_degree_of_freedom_is_cauchys_quantile():
    assert math.tan(0.475 * math.pi) == pytest.approx(student_t(1), abs=1e-9)


def test_two_degrees_of_freedom_have_a_closed_form():
    """P(|T| < t) = t / sqrt(2 + t^2) = p, so t = p sqrt(2 / (1 - p^2))."""
    assert 0.95 * math.sqrt(2 / (1 - 0.95**2)) == pytest.approx(student_t(2), abs=1e-9)


@pytest.mark.parametrize(
    ("degrees", "printed"), [(3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)]
)
def test_it_is_the_column_of_a_printed_table(degrees, printed):
    assert printed == round(student_t(degrees), 3)


def test_two_values():
    """mean 2, s = sqrt 2, half = 12.7062 sqrt 2 / sqrt 2."""
    got = interval([1.0, 3.0])
    assert (2, pytest.approx(12.7062, abs=1e-4), (1, 3)) == (got.mean, got.half, got.values)


def test_three_values():
    """mean 2, s = 1, half = 4.30265 / sqrt 3 = 2.48414."""
    got = interval([1.0, 2.0, 3.0])
    assert (2, pytest.approx(2.48414, abs=1e-5)) == (got.mean, got.half)


def test_one_value_has_no_interval():
    got = interval([0.5])
    assert (got.mean, got.half) == (0.5, None)
