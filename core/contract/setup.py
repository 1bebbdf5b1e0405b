"""What `moe_check` sees, and one plugin's implementation of one hook."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

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

    sizes: of a layer that is to grow, the size of each population afterwards, as "expert" and "group".
    """

    plugins: Mapping[str, Any]
    spec: "Spec"
    task: "TaskSpec | None" = None
    sizes: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def balance_losses(self) -> list[str]:
        """The losses, of a weight above 0, that pull at the load."""
        return [
            name
            for name, one in self.plugins.items()
            if hasattr(one, "moe_aux_loss") and "load" in getattr(one, "needs", ()) and getattr(one, "weight", 1) > 0
        ]
