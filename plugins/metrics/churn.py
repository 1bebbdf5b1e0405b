import math

import attrs

from moe_engine import Traits, hookimpl


@attrs.define(eq=False)
class Churn:
    """Share of choices that changed since the last log point.

    1 - mean_t |S_t now and S_t before| / K, S_t the experts that token t chooses, on the fixed held-out batch in
    eval mode. 0: nothing changed; 1 - K / E: chance. Null at the first log point, and at the first one after a
    growth.

    Source: Dai et al., 2022 (StableMoE), who count the tokens whose expert still changes.
    """

    traits = Traits(requires=("choices",))

    @hookimpl
    def moe_metrics(self, probe, memory):
        if probe is None or not probe.chosen().any():
            return {}
        now_TE = probe.chosen().bool().cpu()
        before_TE = memory.get("chosen")
        memory["chosen"] = now_TE
        if before_TE is None or before_TE.shape != now_TE.shape:
            return {"churn": math.nan}
        return {"churn": 1 - float((now_TE & before_TE).sum() / now_TE.sum())}
