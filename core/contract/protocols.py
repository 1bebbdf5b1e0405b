"""Protocols for objects that plugins receive: a layer, and the builder of layers.

`moe_engine.MoE` is a `Layer`, and so is the stand-in for a layer of which only the counts are known;
`moe_engine.Engine` is a `LayerBuilder`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .options import Settings
from .parts import Experts, Part, Router
from .routing import Routing, Spec


class Layer(Protocol):
    """What a hook may read of a layer.

    name: the name that growths, metrics and settings use. training: whether it is in training mode. spec: its sizes.
    router, experts: the parts.
    load_since_growth [E]: assignments to each expert since the layer last grew, or None.
    """

    name: str
    training: bool

    @property
    def spec(self) -> Spec: ...

    @property
    def router(self) -> Router: ...

    @property
    def experts(self) -> Experts: ...

    @property
    def load_since_growth(self) -> Tensor | None: ...

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part by its path: "router", "experts", "biases.0.NAME", "states.NAME"."""

    def state_of(self, plugin: str) -> Any:
        """The plugin's state in this layer, or None."""

    def step_load(self, routing: Routing) -> Tensor:
        """[E]: a forward's load plus the load that this step's backward passes have counted so far, over all ranks."""


class LayerBuilder(Protocol):
    """What a task needs from the engine to build its model. dense: each layer is replaced by one MLP."""

    dense: bool

    def implementing(self, hook: str) -> list[str]:
        """The chosen plugins that implement a hook, in the order typed."""

    def moe(
        self,
        dim: int,
        hidden: int = 0,
        *,
        modules: Sequence[nn.Module] | None = None,
        settings: Iterable[str] | Settings = (),
        name: str | None = None,
        **spec: Any,
    ) -> nn.Module:
        """Build a layer: [..., dim] -> [..., dim or out]."""
