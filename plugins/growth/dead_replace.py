import attrs

from moe_engine import Growth, RunningLoad, Traits, consecutive, hookimpl, option


@attrs.define(eq=False)
class DeadReplace:
    """Replace an expert that stays almost unused.

    l <- decay l + (1 - decay) load / mean(load). If min_i l_i < threshold for `patience` steps in a row, expert i is
    replaced by a child of the busiest expert of its group, one per layer at a time. After any growth, `cooldown`
    steps pass first.

    Source: this project.
    """

    traits = Traits(requires=("load",))
    threshold: float = option(0.01, help="relative load below which an expert is dead; the mean is 1", min=0, max=1)
    patience: int = option(20, help="steps in a row before a replacement", min=1)
    cooldown: int = option(50, help="steps without a check after a growth, and at the start", min=0)
    decay: float = option(0.9, help="decay of the running load", min=0, max=0.9999)

    @hookimpl
    def moe_state(self, spec):
        return RunningLoad(spec.experts, self.decay)

    @hookimpl
    def moe_growth(self, history, memory):
        wanted = []
        for layer in history.layers:
            load_E = history.state(layer).value
            dead, within = int(load_E.argmin()), layer.router.competes_in("expert")
            busiest = int((load_E if within is None else load_E.where(within == within[dead], -1)).argmax())
            holds = history.cooled_down(self.cooldown) and float(load_E[dead]) < self.threshold and dead != busiest
            if consecutive(memory, layer, holds) >= self.patience:
                why = f"expert {dead} has {float(load_E[dead]):.2g} of the mean load"
                wanted.append(Growth(layer.name, parents=(busiest,), drop=(dead,), why=why))
        return wanted
