import math

import attrs
import torch

from moe_engine import hookimpl


@attrs.define(eq=False)
class Balance:
    """How evenly the experts are used.

    With x_i = assignments of real tokens to expert i: load x / sum; cv = std / mean (population); cv2 = cv^2; gini;
    entropy H / ln E; max_min = max / min; maxvio = max / mean - 1; active = experts with at least a tenth of the
    mean load; dropped = share of assignments over capacity. At balance 1/E, 0, 0, 0, 1, 1, 0, E and 0. cv.LEVEL: of
    a router's groups. A router that assigns nothing but mixes all tokens has only mass, each expert's share of the
    summed probabilities.

    Source: Wang et al., 2024 (Auxiliary-Loss-Free Load Balancing), eq. 4, for maxvio.
    """

    @hookimpl
    def moe_metrics(self, stats):
        x = stats.load
        total, mean, size = x.sum(), x.mean(), x.numel()
        if not total and "prob" in stats.sums and stats["prob"].any():
            return {"mass": stats["prob"] / stats["prob"].sum()}
        f = x / total
        cv = x.std(correction=0) / mean
        rank = torch.arange(1, size + 1, dtype=x.dtype)
        gini = ((2 * rank - size - 1) * x.sort().values).sum() / (size * total)
        entropy = -torch.special.xlogy(f, f).sum() / math.log(size) if size > 1 else torch.tensor(math.nan)
        active = int((x >= 0.1 * mean).sum()) if total else None
        spread = {"cv": cv, "cv2": cv.square(), "gini": gini, "entropy": entropy}
        ends = {"max_min": x.max() / x.min(), "maxvio": x.max() / mean - 1}
        upper = {name: n for name, n in stats.of("load").items() if n.numel() != size}
        levels = {f"cv.{name}": n.std(correction=0) / n.mean() for name, n in upper.items()}
        return {"load": f, "active": active, **spread, **ends, **levels, "dropped": stats.dropped.sum() / total}
