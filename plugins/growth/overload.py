import attrs

from moe_engine import RunningLoad, Traits, grow_at_peaks, hookimpl, option


@attrs.define(eq=False)
class Overload:
    """Grow when one expert is overloaded.

    l <- decay l + (1 - decay) load / mean(load). If max_i l_i > threshold for `patience` steps in a row, the layer
    grows by a child of expert i. At balance l = 1 and nothing grows; a bias that forces equal loads leaves nothing
    to detect. After any growth, `cooldown` steps pass first.

    Source: this project.
    """

    traits = Traits(requires=("load",))
    threshold: float = option(2.0, help="relative load above which an expert is overloaded; the mean is 1", min=1)
    patience: int = option(20, help="steps in a row before a growth", min=1)
    cooldown: int = option(50, help="steps without a check after a growth, and at the start", min=0)
    decay: float = option(0.9, help="decay of the running load", min=0, max=0.9999)
    max_experts: int = option(16, help="a layer stops growing at this many experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        if rivals := setup.others(self, effect="equal_load"):
            return f"overload never fires while {rivals[0]} makes all loads equal; remove one of them"
        return None

    @hookimpl
    def moe_state(self, spec):
        return RunningLoad(spec.experts, self.decay)

    @hookimpl
    def moe_growth(self, history, memory):
        return grow_at_peaks(self, history, memory, "load")
