import attrs

from moe_engine import RunningLoad, ema_update_, grow_at_peaks, hookimpl, option


@attrs.define(eq=False)
class Gradient:
    """Grow when one expert's gradients stay large.

    m_i = mean |gradient| of expert i's weights after clipping; r <- decay r + (1 - decay) m / mean(m). A layer grows
    by a child of expert i if max_i r_i > threshold for `patience` steps in a row. Experts with equal gradients have
    r = 1; the scale of the loss does not matter. After any growth, `cooldown` steps pass first.

    Source: this project; Liu et al., 2019 (splitting steepest descent) use criteria of this kind.
    """

    threshold: float = option(1.5, help="relative gradient above which a layer grows; the mean is 1", min=1)
    patience: int = option(20, help="steps in a row before a growth", min=1)
    cooldown: int = option(50, help="steps without a check after a growth, and at the start", min=0)
    decay: float = option(0.9, help="decay of the running gradient", min=0, max=0.9999)
    max_experts: int = option(16, help="a layer stops growing at this many experts", min=1)

    @hookimpl
    def moe_state(self, spec):
        return RunningGradient(spec.experts, self.decay)

    @hookimpl
    def moe_growth(self, history, memory):
        return grow_at_peaks(self, history, memory, "gradient")


class RunningGradient(RunningLoad):
    wants_expert_grad = True

    def after_step(self, step):
        ema_update_(self.value, step.relative(step.expert_grad), self.decay)
