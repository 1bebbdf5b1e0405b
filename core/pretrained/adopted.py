"""An adopted block: its entry asks the engine's layer, and what the blocks of one model share.

Suffixes: T tokens, E experts, D model.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.families import Block, Routed, Stored, config_value
from ..contract.parts import Part
from ..layer.moe import MoE
from .borrowed import BorrowedExperts, BorrowedRouter, Borrowing, plain_forward
from .calls import Calls
from .tapping import Tap

LAYER = "moe"  # the name of a block's layer in the block


class CopiedHook:
    """A hook that is copied with its module, as the layers of an adopted model are. Dynamo does not trace it."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        self._act(*args)


class Entry:
    """The forward of an adopted block's entry: asks the block's layer."""

    def __init__(self, adopted: "Adopted") -> None:
        self.adopted = adopted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adopted = self.adopted
        if adopted.bank.passing:
            return plain_forward(adopted.block.entry)(*args, **kwargs)
        given = [*args, *kwargs.values()]
        return adopted.block.family.answer(adopted.block, adopted.layer_output(given), given)


def set_count(config: Any, names: tuple[str, ...], experts: int) -> None:
    """Set a config's number of experts, by whichever of these names it has."""
    for path in names:
        where, _, name = path.rpartition(".")
        holder = config_value(config, where) if where else config
        if isinstance(getattr(holder, name, None), int):
            setattr(holder, name, experts)


class Shared:
    """What the adopted blocks of one model share: the running forwards, and what was switched off in the model.

    own_loss: (module or config, name, value) of the model's own auxiliary loss. count: names of the config's
    number of experts.
    """

    def __init__(self, model: nn.Module, count: tuple[str, ...]) -> None:
        self.calls = Calls()
        self.model, self.count = [model], count  # in a list: a module must not be registered here
        self.own_loss: list[tuple[Any, str, Any]] = []
        self.layers: list[MoE] = []

    def silence(self) -> None:
        """Switch the model's own auxiliary loss off; the engine's losses take its place."""
        for module in self.model[0].modules():
            for owner, name, off in (
                (module, "router_aux_loss_coef", 0.0),
                (module, "aux_loss_coef", 0.0),
                (getattr(module, "config", None), "output_router_logits", False),
            ):
                if getattr(owner, name, None):
                    self.own_loss.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, off)

    def restore_loss(self) -> None:
        """Put the model's own auxiliary loss back."""
        while self.own_loss:
            setattr(*self.own_loss.pop())

    def resized(self) -> None:
        """Let the config, and the model's own loss, follow the number of experts once all layers have the same."""
        sizes = {int(layer.experts.count) for layer in self.layers}  # type: ignore[arg-type]
        if len(sizes) != 1:
            return
        (experts,) = sizes
        for module in self.model[0].modules():
            set_count(getattr(module, "config", None), self.count, experts)
            if hasattr(module, "lm_head") and isinstance(getattr(module, "num_experts", None), int):
                module.num_experts = experts  # type: ignore[assignment]


@attrs.define(eq=False, slots=False)
class Adopted:
    """One adopted block with its layer. shared: with the other blocks. routed: what its router just returned.

    tap: the hooks that see it. recipe: the layer's router and options decide as the block does. born: its number of
    experts when it was adopted.
    """

    block: Block
    layer: MoE
    shared: Shared
    recipe: bool
    born: int
    routed: Routed | None = None
    tap: Tap | None = None

    @property
    def bank(self) -> BorrowedExperts:
        """The layer's bank."""
        bank: BorrowedExperts = self.layer.experts  # type: ignore[assignment]
        return bank

    def declaring(self, path: str) -> tuple[Part, str]:
        """(the part that declares a tensor of the block, its name there)."""
        parts = [part for _, part in self.layer.parts() if isinstance(part, Borrowing)]
        return next((part, name) for part in parts for name, one in part.paths.items() if one == path)

    def selection_bias(self) -> Tensor:
        """[E]: the block's own bias that only selection sees, and the engine's."""
        biases = [bias() for bias in self.layer.bias_levels()[0].values() if bias.selection_only]
        return torch.stack([bias.float() for bias in biases]).sum(0)

    def see(self, routed: Routed) -> None:
        """Keep what the block's router returned, for the forward that is running."""
        if not getattr(self.layer.router, "calling", False):
            self.routed = routed

    def layer_output(self, given: list[Any]) -> Tensor:
        """[T, D]: the layer's output for what the entry is given."""
        routed, self.routed = self.routed, None
        x = self.block.family.states(given, routed)
        shape, mask, ids = self.shared.calls.around(x)
        self.bank.gate_dtype = next((one.dtype for one in given[1:] if _floating(one)), x.dtype)
        router, self.bank.inside = self.layer.router, True
        if isinstance(router, BorrowedRouter):
            router.routed = routed
        try:
            y: Tensor = self.layer(x.reshape(*shape, x.shape[-1]), mask, ids)
        finally:
            self.bank.inside = False
            if isinstance(router, BorrowedRouter):
                router.routed = None
        return y.reshape(-1, y.shape[-1])


class Resizing:
    """Before a state is loaded into a block: take on its number of experts, and its own layout of flat tensors."""

    def __init__(self, adopted: Adopted) -> None:
        self.adopted = adopted

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        block = self.adopted.block
        rows, at = block.family.first("logit_row")
        if prefix + rows not in state:
            return
        experts = state[prefix + rows].shape[at.axis]
        for path, stored in block.family.tensors.items():
            given, live = state.get(prefix + path), block.tensor(path)
            if given is None:
                continue
            if stored.flat and given.dim() < live.dim():
                given = state[prefix + path] = given.unflatten(stored.axis, (experts, -1))
            shape = [*live.shape]
            shape[stored.axis] = experts
            if given.shape != live.shape and list(given.shape) == shape:
                part, name = self.adopted.declaring(path)
                part.put(name, live.new_zeros(shape))


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def adopted_blocks(model: nn.Module) -> list[Adopted]:
    """The adopted blocks of a model, in order."""
    entries = (module.__dict__.get("forward") for module in model.modules())
    return [entry.adopted for entry in entries if isinstance(entry, Entry)]


def folded(tensor: Tensor, stored: Stored) -> Tensor:
    """A flat tensor as it is on disk."""
    return tensor.flatten(stored.axis, stored.axis + 1)
