"""Files that look like something else than counts: ids, probabilities, averages.

Suffixes: R rows, S series, E experts, V values.
"""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .count_files import CountFile
from .count_points import CELLS
from .count_series import Series

ROUNDED = 0.015  # how far shares may be from 1 or 100 % in total
SURE = 10  # expected repeats in rows: if there is none, the rows hold different experts' ids (chance e^-10)
MOST_CHOICES = 64  # of a token

Array = NDArray[Any]


def look_like_ids(count_ER: Array, of_tokens: bool) -> set[bool]:
    """Whether rows hold ids of the experts that a token chose: True for sure, False for sure, or nothing.

    Ids differ within a row; counts need not. of_tokens: a column numbers tokens. Without one it takes rows enough to
    expect repeats of the same numbers, and totals that vary as those of unrelated numbers do: counts of equal batches
    have equal totals, and those of different batches grow together.
    """
    size, rows = count_ER.shape
    if size > MOST_CHOICES:
        return {False}
    if (count_ER != np.floor(count_ER)).any() or (np.diff(np.sort(count_ER, axis=0), axis=0) == 0).any():
        return {False}
    if of_tokens:
        return {True} if (count_ER > 1).any() else set()
    values, code_N = np.unique(count_ER, return_inverse=True)
    if size < 2 or len(values) * size > CELLS:
        return set()
    often_EV = np.zeros((size, len(values)))
    np.add.at(often_EV, (np.repeat(np.arange(size), rows), code_N.reshape(-1)), 1 / rows)
    repeats = rows / 2 * float((often_EV.sum(0) ** 2 - (often_EV**2).sum(0)).sum())
    total_R = count_ER.sum(0)
    unrelated = 0.05 * total_R.mean() < total_R.std() < 1.1 * math.sqrt(count_ER.var(1).sum())
    return {True} if repeats >= SURE and unrelated else set()


@attrs.frozen(eq=False)
class Evidence:
    """What the rows of a file show about it.

    row_SE: the number of rows of each series that give an expert's count. ids: what `look_like_ids` returned, over all
    rows. of_tokens: a column numbers tokens. has_times: a column gives the step. experts: their number, if given.
    """

    row_SE: Array
    ids: set[bool]
    of_tokens: bool
    has_times: bool
    experts: int | None


def refuse_unlikely(file: CountFile, seen: Evidence, series: Sequence[Series], summed: bool) -> None:
    """Raise UsageError for numbers that look like something else than counts or shares of a layer.

    summed: the user asked to sum over columns of this file.
    """
    if seen.ids == {True}:
        raise UsageError(
            f"{file.name} looks like the ids of the experts that each token chose, not counts: they all differ within "
            "a row; count how often each id occurs in a layer",
            code="expert-ids",
        )
    row_S = seen.row_SE.max(axis=1)
    shares = [(one, one.total / row_S[at]) for at, one in enumerate(series) if not one.whole]
    near = [_is_share(one, total) for one, total in shares]
    if shares and 2 * sum(near) < len(near):
        one, total = shares[near.index(False)]
        raise UsageError(
            f"{file.name} holds fractions that add up to {total:.6g} in {one.title()}, not to 1 or 100 %; they look "
            "like averages or scores, so give whole counts or shares of a layer",
            code="not-counts",
        )
    repeated = any(row_S[at] > 1 for at, one in enumerate(series) if not one.whole)
    if shares and (seen.of_tokens or (repeated and not seen.has_times and not summed)):
        raise UsageError(
            f"{file.name} looks like router probabilities of tokens, not counts: it has several rows of fractions for "
            "a layer, and no step; count the experts that each token chose, or add a column step to shares",
            code="router-probabilities",
        )
    seen_E = (seen.row_SE > 0).sum(axis=0)
    if seen.experts is None and len(seen_E) > 2 and not seen_E[0] and (seen_E[1:] == len(series)).all():
        raise UsageError(
            f"{file.name} seems to number its experts from 1 to {len(seen_E) - 1}; number them from 0 on, or give "
            f"--experts {len(seen_E)} if expert 0 is never chosen",
            code="experts-from-1",
        )


def _is_share(series: Series, total: float) -> bool:
    """Whether the rows of a series, of this total on average, are shares of assignments or of its tokens."""
    near = [one for one in (1.0, 100.0) if abs(total - one) <= ROUNDED * one]
    top_k = round(total)
    of_tokens = series.count_E.max() <= series.total / total and abs(total - top_k) <= ROUNDED
    return bool(near) or (1 <= top_k < len(series.count_E) and bool(of_tokens))
