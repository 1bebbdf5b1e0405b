"""Growth where one expert has too much to do."""

import attrs

from moe_engine import RunningLoad, Traits, grow_at_peaks, hookimpl, option


@attrs.define(eq=False)
class Overload:
    """A layer grows by a child of its busiest expert when that stays overloaded.

    l <- decay l + (1 - decay) load / mean(load); if max_i l_i > threshold for `patience` steps in a row, expert i is
    the newcomer's parent. At balance l = 1, and nothing grows. After any growth `cooldown` steps pass
    first. A controller that forces equal loads leaves it nothing to see.

    Source: this project.
    """

    traits = Traits(requires=("load",))
    threshold: float = option(2.0, help="load over the mean load from which an expert is overloaded", min=1)
    patience: int = option(20, help="steps in a row before a growth", min=1)
    cooldown: int = option(50, help="steps after a growth, and at the start, without a check", min=0)
    decay: float = option(0.9, help="memory of the running load", min=0, max=0.9999)
    max_experts: int = option(16, help="a layer stops at this many experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        if rivals := setup.others(self, effect="equal_load"):
            return f"overload never fires while {rivals[0]} makes all loads equal; choose one of them"
        return None

    @hookimpl
    def moe_state(self, spec):
        return RunningLoad(spec.experts, self.decay)

    @hookimpl
    def moe_growth(self, history, memory):
        return grow_at_peaks(self, history, memory, "load")
