import attrs

from moe_engine import Finding, hookimpl, option


@attrs.define(eq=False)
class Attribution:
    """How much each loss and bias moves the router.

    Measured on a fixed held-out batch. effect.LOSS: norm of the weighted term's gradient at the raw logits, over the
    task loss's, which is router_gradient; experts and earlier layers are not in it. effect.BIAS: share of choices that
    differ without the bias; spread.BIAS: its range. Effects below `threshold` are reported, unless K = E.

    Source: this project.
    """

    threshold: float = option(1e-4, help="a relative gradient or share of choices below this is no effect", min=0)

    @hookimpl
    def moe_metrics(self, effects, layer, probe):
        if effects is None:
            return {}
        relative = {name: norm / (effects.task or 1.0) for name, norm in effects.losses.items()}
        metrics = {"router_gradient": effects.task} | {f"spread.{name}": v for name, v in effects.spreads.items()}
        moved = relative | dict(effects.biases)
        metrics |= {f"effect.{name}": value for name, value in moved.items()}
        for name in [n for n, v in moved.items() if v < self.threshold and layer.spec.top_k < layer.spec.experts]:
            metrics[f"inert.{name}"] = self._inert(name, moved[name], name in effects.biases, probe)
        return metrics

    def _inert(self, name, value, is_bias, probe):
        why = f"loss {name} had no effect on this layer's router: its gradient there is {value:.1e} of the task's"
        advice = f"remove {name} or raise {name.partition('.')[0]}.weight, unless it is meant for other weights"
        if is_bias:
            why = f"bias {name} had no effect: {1 - value:.2%} of choices are the same without it"
            advice = f"remove {name} or raise its strength until effect.{name} is above {self.threshold:g}"
            if all(level.scores is None for level in probe.levels):
                advice = "the router never calls level.select_by(scores); remove it or the bias"
        return Finding("no effect", 1, why, advice)
