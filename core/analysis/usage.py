"""Who uses which expert: loads of labels against each other, and the tokens that go to an expert.

Suffixes: C labels, T tokens, K chosen per token, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LEAST = 5  # times that an expert is chosen by a token before its lift is worth telling


def divergences(count_CE: Array) -> Array:
    """[C, C]: the Jensen-Shannon divergence between the loads of two labels, in bits: 0 alike, 1 disjoint.

    count_CE: assignments; nan for a label without any. JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2.

    Source: Lin, 1991 (Divergence Measures Based on the Shannon Entropy).
    """
    share_CE = _shares(count_CE)
    each_C = _entropy(share_CE)
    mixed_CC = _entropy((share_CE[:, None] + share_CE[None]) / 2)
    return np.maximum(mixed_CC - (each_C[:, None] + each_C[None]) / 2, 0)


def by_chance(count_CE: Array) -> Array:
    """[C, C]: what `divergences` would be on average if all labels had one load, and assignments were independent.

    (E' - 1) (1 / n + 1 / m) / (8 ln 2) for n and m assignments to the E' experts in use, from JS to second order. In
    text neighbours choose alike, and so it is rather more.
    """
    used = max(int((count_CE.sum(0) > 0).sum()), 1)
    with np.errstate(divide="ignore"):
        inverse_C = 1 / count_CE.sum(1)
    chance_CC: Array = np.minimum((used - 1) * (inverse_C[:, None] + inverse_C[None]) / (8 * np.log(2)), 1)
    np.fill_diagonal(chance_CC, 0)
    return chance_CC


def lifts(count_CE: Array) -> Array:
    """[C, E]: P(expert | label) / P(expert) over all assignments; nan for an expert or a label without any.

    1: the label uses the expert as often as all tokens do.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return _shares(count_CE) / _shares(count_CE.sum(0))


def characteristic_tokens(id_T: Array, expert_TK: Array, experts: int, most: int) -> list[list[dict[str, Any]]]:
    """For each expert the token ids that it gets more often than others do, at most `most`, largest lift first.

    id_T [T]: token ids. expert_TK [T, K]: the experts that each token chose, -1 where it chose fewer than K. Returns
    records with the keys id; lift, P(expert | token) / P(expert) over all choices; count, how often the expert was
    chosen by this token, at least 5 times; of, how often the token occurs.
    """
    known, place_T = np.unique(id_T, return_inverse=True)
    chosen_TK = expert_TK >= 0
    place_N, expert_N = np.broadcast_to(place_T[:, None], expert_TK.shape)[chosen_TK], expert_TK[chosen_TK]
    pair, count_P = np.unique(place_N * experts + expert_N, return_counts=True)
    token_P, expert_P = pair // experts, pair % experts
    load_E = np.bincount(expert_N, minlength=experts) / max(len(expert_N), 1)
    lift_P = count_P / np.bincount(place_N, minlength=len(known))[token_P] / load_E[expert_P]
    of_P = np.bincount(place_T)[token_P]
    out = []
    for expert in range(experts):
        at = np.flatnonzero((expert_P == expert) & (count_P >= LEAST) & (lift_P > 1))
        at = at[np.lexsort((-count_P[at], -lift_P[at]))][:most]
        out.append(
            [
                {
                    "id": int(known[token_P[p]]),
                    "count": int(count_P[p]),
                    "of": int(of_P[p]),
                    "lift": float(lift_P[p]),
                }
                for p in at
            ]
        )
    return out


def _shares(count: Array) -> Array:
    with np.errstate(invalid="ignore"):
        shares: Array = count / count.sum(-1, keepdims=True)
    return shares


def _entropy(share: Array) -> Array:
    """In bits, over the last axis."""
    entropy: Array = -np.where(share > 0, share * np.log2(np.where(share > 0, share, 1)), share).sum(-1)
    return entropy
