"""What `moe_check` sees, and one plugin's implementation of one hook."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from .traits import traits_of, weight_of

if TYPE_CHECKING:
    from .routing import Spec
    from .tasks import TaskSpec


class Bound(NamedTuple):
    """One plugin's implementation of one hook, with the arguments it names."""

    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, offer: Mapping[str, Any]) -> Any:
        return self.function(**{name: offer[name] for name in self.arguments})


@attrs.frozen
class Setup:
    """What `moe_check` sees: the plugins by name in the order typed, the layer's spec, the task's spec.

    sizes: for a layer that is about to grow, the size of each population afterwards ("expert", "group").
    """

    plugins: Mapping[str, Any]
    spec: "Spec"
    task: "TaskSpec | None" = None
    sizes: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def balance_losses(self) -> dict[str, float]:
        """The weight of each loss that acts on the load, by name, without losses of weight 0."""
        losses = {name: one for name, one in self.plugins.items() if hasattr(one, "moe_aux_loss")}
        weights = {name: weight_of(one) for name, one in losses.items() if "load" in traits_of(one).requires}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def others(self, asking: Any, *, hook: str = "", effect: str = "") -> list[str]:
        """The names of other plugins that implement a hook, or whose traits have an effect."""
        return [
            name
            for name, one in self.plugins.items()
            if one is not asking and (hasattr(one, hook) if hook else effect in traits_of(one).effects)
        ]
