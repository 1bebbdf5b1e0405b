import attrs

from moe_engine import Growth, hookimpl, option


@attrs.define(eq=False)
class LossPlateau:
    """Grow every layer when the loss stops falling.

    on=train: fast and slow are running means of the task loss, updated every step (decays `fast` and `slow`,
    corrected for their start); a step with slow - fast <= epsilon |slow| counts as flat. on=eval: fast is the newest
    evaluation's loss, slow the lowest before it, and each evaluation is a check. After `patience` flat checks in a
    row every layer grows by a child of its busiest expert since its last growth.

    After any growth, and at the start, `cooldown` steps pass first and both means start anew, because growth itself
    changes the loss. New means are close together, so with a short cooldown a falling loss looks flat. A decaying
    learning rate looks like a plateau too; then use on=eval.

    Source: this project.
    """

    on: str = option("train", help="which loss must stop falling", choices=("train", "eval"))
    epsilon: float = option(0.02, help="relative improvement up to which the loss counts as flat", min=0)
    patience: int = option(10, help="flat checks in a row before a growth", min=1)
    cooldown: int = option(50, help="steps without a check after a growth, and at the start", min=0)
    fast: float = option(0.9, help="decay of the fast running mean", min=0, max=1)
    slow: float = option(0.99, help="decay of the slow running mean", min=0, max=1)
    max_experts: int = option(16, help="a layer stops growing at this many experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        if self.on == "train" and not self.fast < self.slow < 1:
            return f"loss_plateau.fast={self.fast} must be below slow={self.slow}, and slow below 1"
        return None

    @hookimpl
    def moe_growth(self, history, memory):
        if memory.get("grown") != (grown := history.step - history.since_growth):
            memory.clear()
            memory["grown"] = grown
        fast, slow = self._means(history, memory) if self.on == "train" else self._evaluations(history, memory)
        if fast is None or slow is None or history.since_growth <= self.cooldown:
            return None
        memory["flat"] = memory.get("flat", 0) + 1 if slow - fast <= self.epsilon * abs(slow) else 0
        if memory["flat"] < self.patience:
            return None
        why = f"loss {fast:.3g}, before {slow:.3g}"
        return [
            Growth(layer.name, parents=(history.busiest(layer),), why=why)
            for layer in history.layers
            if layer.spec.experts < self.max_experts
        ]

    def _means(self, history, memory):
        """Both running means, corrected for starting at 0."""
        memory["steps"] = memory.get("steps", 0) + 1
        for name, decay in (("fast", self.fast), ("slow", self.slow)):
            memory[name] = decay * memory.get(name, 0.0) + (1 - decay) * history.loss
        return tuple(
            memory[name] / (1 - decay ** memory["steps"]) for name, decay in (("fast", self.fast), ("slow", self.slow))
        )

    def _evaluations(self, history, memory):
        """The newest evaluation's loss and the lowest before it."""
        fast, slow = history.eval_loss, memory.get("best")
        if fast is not None:
            memory["best"] = fast if slow is None else min(fast, slow)
        return fast, slow
