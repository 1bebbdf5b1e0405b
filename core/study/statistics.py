"""The mean of a few measurements, and its confidence interval."""

import math
import statistics
from collections.abc import Sequence

import attrs


@attrs.frozen
class Interval:
    """A mean and half the width of its 95 % interval; None for a single value, which shows no spread."""

    mean: float
    half: float | None
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> Interval:
    """mean +- t s / sqrt(n): s is the standard deviation over n - 1, t Student's quantile with n - 1 degrees (1908)."""
    count = len(values)
    half = None
    if count > 1:
        half = student_t(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), half, tuple(values))


def student_t(degrees: int) -> float:
    """The t for which 95 % of Student's distribution lies in [-t, t], by bisection of `_inside`."""
    low, high = 0.0, 13.0  # 12.706 with one degree of freedom is the largest
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < 0.95 else (low, middle)
    return high


def _inside(t: float, degrees: int) -> float:
    """P(|T| < t) as a finite sum: Abramowitz and Stegun, 1964, 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1)
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + total) if odd else total
