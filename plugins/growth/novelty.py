import attrs
import torch

from moe_engine import Growth, Part, Traits, consecutive, hookimpl, option


@attrs.define(eq=False)
class Novelty:
    """Grow when too many tokens fit no expert.

    A token is novel if no expert received it or, if the router has probabilities, if the largest is below `confidence`
    / E. n and d are running means of the share of novel tokens and of their sum. If n > share for `patience` steps
    in a row, the layer grows by an expert without a parent, whose router row is d / |d| times the mean length of the
    other rows (1 if they are 0). Without novel tokens nothing grows.

    Source: Guo et al., 2024 (Dynamic Mixture of Experts), without its removal of experts.
    """

    traits = Traits(requires=("choices",), orphans=True)
    share: float = option(0.1, help="share of novel tokens above which the layer grows", min=0, max=1)
    confidence: float = option(1.5, help="largest probability, times E, below which a token is novel", min=0)
    patience: int = option(20, help="steps in a row before a growth", min=1)
    cooldown: int = option(50, help="steps without a check after a growth, and at the start", min=0)
    decay: float = option(0.9, help="decay of the running means", min=0, max=0.9999)
    max_experts: int = option(16, help="a layer stops growing at this many experts", min=1)

    @hookimpl
    def moe_state(self, spec):
        return Novel(spec.dim, self.decay)

    @hookimpl
    def moe_measure(self, routing):
        novel_T = routing.chosen().sum(-1) == 0
        if routing.probs is not None:
            novel_T = novel_T | (routing.probs.amax(-1) * routing.experts < self.confidence)
        novel_T1 = routing.tokens.real(novel_T.float()[:, None])
        direction_D = (novel_T1 * routing.tokens.x).sum(0)
        return {"novel": novel_T1.sum().view(1), "tokens": routing.tokens.count.view(1), "direction": direction_D}

    @hookimpl
    def moe_growth(self, history, memory):
        wanted = []
        for layer in history.layers:
            state = history.state(layer)
            ready = history.cooled_down(self.cooldown) and layer.spec.experts < self.max_experts
            if consecutive(memory, layer, ready and float(state.share) > self.share) >= self.patience:
                why = f"{float(state.share):.0%} of the tokens fit no expert"
                rows = _towards(state.direction, layer.router)
                wanted.append(Growth(layer.name, parents=(None,), rows=rows, why=why))
        return wanted


def _towards(direction_D, router):
    """A row along the direction for each router tensor that has one row of the input's width per expert."""
    axes = {name: axis for name, axis in router.axes.items() if (axis.role, axis.of) == ("logit_row", "expert")}
    rows = {name: getattr(router, name).detach().movedim(axis.axis, 0) for name, axis in axes.items()}
    unit_D = torch.nn.functional.normalize(direction_D, dim=0)
    lengths = {name: row.float().norm(dim=-1).mean() for name, row in rows.items() if row.shape[1:] == unit_D.shape}
    return {f"router.{name}": unit_D * (length if length > 0 else 1) for name, length in lengths.items()}


class Novel(Part):
    def __init__(self, dim, decay):
        super().__init__()
        self.decay = decay
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("direction", torch.zeros(dim))

    def after_step(self, step):
        tokens, novel = step.own["tokens"].sum(), step.own["novel"].sum()
        rate = (1 - self.decay) * (tokens > 0).to(self.share.dtype)
        self.share.lerp_((novel / tokens.clamp(min=1)).to(self.share), rate)
        self.direction.lerp_((step.own["direction"] / tokens.clamp(min=1)).to(self.direction), rate)
