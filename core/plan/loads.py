"""The load that a plan assumes: how many of its assignments each rank sends to each expert."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

HALVINGS = 60  # of the interval that holds the power law's exponent
STEEPEST = 100.0  # an exponent with which one expert has all
PLACING = 0  # seed of the order in which loads are given to experts


@lru_cache(64)  # a plan of many splits asks for few loads
def load_of(experts: int, rows: int, top_k: int, skew: float) -> NDArray[np.int64]:
    """[E]: `rows` assignments of one rank, spread over experts by a power law whose maxvio is `skew`.

    The e-th busiest expert has a share proportional to e^-s, and s is such that the first has (1 + skew) / E. Shares
    become whole numbers by largest remainders. Which expert is how busy is drawn once, with a fixed seed. Raises
    UsageError for a skew that no load can have.
    """
    check_skew(experts, top_k, skew)
    share_E = _power_law(experts, _exponent(experts, skew))
    load_E = _whole(share_E, rows)
    load_E = load_E[np.random.default_rng(PLACING).permutation(experts)]
    load_E.flags.writeable = False
    return load_E


def check_skew(experts: int, top_k: int, skew: float) -> None:
    """Raise UsageError unless 0 <= skew <= E/K - 1: a token is sent to an expert once, so no expert has over 1/K."""
    most = experts / top_k - 1
    if not (0 <= skew <= most * (1 + 1e-9) + 1e-12):
        sentence = f"a skew of {skew:g} can't be: with {experts} experts and top {top_k}, maxvio is 0 to {most:g}"
        raise UsageError(sentence, code="impossible-skew")


def _power_law(experts: int, exponent: float) -> NDArray[np.float64]:
    share_E = np.exp(-exponent * np.log(np.arange(1, experts + 1)))
    return np.asarray(share_E / share_E.sum())


@lru_cache(64)
def _exponent(experts: int, skew: float) -> float:
    """The exponent with which the largest share is (1 + skew) / E."""
    low, high = 0.0, STEEPEST
    if skew == 0 or experts == 1:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _power_law(experts, middle)[0] * experts - 1 < skew else (low, middle)
    return high


def _whole(share_E: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """Whole numbers of sum `rows`, each within 1 of its share: the largest remainders round up."""
    exact_E = share_E * rows
    load_E = np.floor(exact_E).astype(np.int64)
    up = np.argsort(load_E - exact_E, kind="stable")[: rows - int(load_E.sum())]
    load_E[up] += 1
    return load_E


def maxvio(load_E: NDArray[np.int64]) -> float:
    """The largest load over the mean, minus 1: the unit of `skew`, as routing-stats reports it."""
    mean = float(load_E.mean())
    return float(load_E.max()) / mean - 1 if mean and math.isfinite(mean) else 0.0
