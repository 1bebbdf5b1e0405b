"""Families: how the MoE blocks of a foreign architecture decide, and where their tensors are.

A block has a router, which scores tokens, and experts, which are called with a choice for each token. Nothing here
imports transformers.

Suffixes: T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import attrs
from torch import Tensor, nn

from .parts import Role
from .routing import Spec

Recipe = tuple[str, Mapping[str, Any]]  # a router plugin and its options
Native = tuple[str, Mapping[str, Any], Sequence[str]]  # a model type, values of its config, and a block's zeros
Decision = tuple[Tensor, Tensor, Tensor]  # hidden states [T, D], chosen experts [T, K] and their gates [T, K]
Compute = Callable[..., Any]  # what a block's experts did before the block was adopted


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@attrs.frozen
class Stored:
    """A tensor of a block with an expert axis.

    role: its function, as in `Axis`; "state" is a bias that only selection sees. axis: the dimension of the experts.
    fan_in: the dimension whose size scales a new expert's random draw; None for zeros. flat: on disk that dimension is
    E times as long, the experts' rows one after the other. hidden: the dimension of the experts' hidden units, or None;
    twice as long as there are units, it holds those of the gate and then those of the up projection. interleaved: they
    alternate there instead.
    """

    role: Role
    axis: int = 0
    fan_in: int | None = None
    flat: bool = False
    hidden: int | None = None
    interleaved: bool = False


# what most blocks of transformers have: a router with one row per expert, and stacked, gated MLPs
GATE = {"gate.weight": Stored("logit_row", fan_in=1)}
STACKED = {
    "experts.gate_up_proj": Stored("in", fan_in=2, hidden=1),
    "experts.down_proj": Stored("output", fan_in=2, hidden=2),
}


@attrs.frozen
class Dense:
    """Where a dense feed-forward block has its parts, by their names in it: F(x) = down(act(gate(x)) * up(x)).

    up, down, gate: linear maps, nn.Linear or GPT-2's Conv1D. gate: "" for F(x) = down(act(up(x))). act: the activation.
    """

    up: str
    down: str
    gate: str = ""
    act: str = "act_fn"

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of the linear maps: gate, if there is one, up and down."""
        return tuple(name for name in (self.gate, self.up, self.down) if name)


# what most dense models of transformers have: a gated MLP, and GPT-2's
DENSE = (Dense("up_proj", "down_proj", "gate_proj"), Dense("c_fc", "c_proj", act="act"))


def softmax(logits_TE: Tensor) -> Tensor:
    """[T, E]: softmax scores."""
    return logits_TE.softmax(-1)


def no_recipe(block: "Block") -> None:
    """No router plugin is known to decide alike."""


def no_native(config: Any, spec: Spec, dense: Sequence[int]) -> str:
    """No architecture of transformers is known that holds such a mixture."""
    return "no architecture of transformers is known that holds it"


@attrs.define(eq=False, slots=False)
class Family:
    """How the blocks of an architecture are found, read and changed. A subclass overrides what it does otherwise.

    router, experts: paths of the two modules in a block; a block is a module that has both. logits: the place of the
    logits [T, E] in what the router returns. entry: the module that the layer of an adopted block replaces: the
    experts, or "" for the block itself. decides: where a decision can be read: in the call of the entry, or of the
    router alone. tensors: those with an expert axis, by their path
    in the block; empty if the family only reads. count: names by which the config may hold the number of experts, such
    as "ffn_config.moe_num_experts"; none if that number means more than these experts. recipe: from a block, the router
    plugin that makes the same choices and gates of the same logits; None if there is none. score: from logits to the
    scores that losses and metrics see as probabilities.

    Of a dense architecture: dense: how its feed-forward blocks may look. native: from its config, the spec of the
    layers that such blocks became, and the indices of the layers that are still dense, the architecture that holds
    the mixture, with values of its config and paths of those tensors of a block that are all 0, such as a shared
    expert's; or a sentence that says why none does.
    """

    name: str = attrs.field(default="", init=False)
    router: str = "gate"
    experts: str = "experts"
    logits: int = 0
    entry: str = "experts"
    decides: Literal["entry", "router"] = "entry"
    tensors: Mapping[str, Stored] = attrs.field(factory=dict)
    count: tuple[str, ...] = COUNTS
    recipe: Callable[["Block"], Recipe | None] = no_recipe
    score: Callable[[Tensor], Tensor] = softmax
    dense: tuple[Dense, ...] = DENSE
    native: Callable[[Any, Spec, Sequence[int]], Native | str] = no_native

    def blocks(self, model: nn.Module) -> Iterator["Block"]:
        """The model's blocks of this family, in order."""
        for name, module in model.named_modules():
            if has(module, self.router) and has(module, self.experts):
                yield Block(name or type(module).__name__, module, self)

    def dense_blocks(self, model: nn.Module) -> Iterator["DenseBlock"]:
        """The dense feed-forward blocks of a model's decoder, in order: one of `dense` in an element of a list."""
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        inside = {id(module) for module in decoder.modules()}
        for name, layers in model.named_modules():
            for index, layer in enumerate(layers if isinstance(layers, nn.ModuleList) and id(layers) in inside else ()):
                for path, module in layer.named_children():
                    at = next((one for one in self.dense if all(has(module, part) for part in one.maps)), None)
                    if at is not None:
                        yield DenseBlock(f"{name}.{index}.{path}", index, module, at)

    def first(self, role: Role) -> tuple[str, Stored]:
        """The first tensor of a role: its path in the block, and how it is stored."""
        return next((path, stored) for path, stored in self.tensors.items() if stored.role == role)

    def logits_from(self, returned: Any) -> Tensor:
        """The logits [..., E] in what a router returned."""
        logits: Tensor = returned[self.logits] if isinstance(returned, tuple | list) else returned
        return logits

    def decision(self, block: "Block", given: Sequence[Any], routed: "Routed | None") -> Decision | None:
        """A block's own decision, by what its entry is given and its router returned in the same forward.

        By default the one tensor of whole numbers among what experts are given, and the one of the same shape next to
        it: the names of arguments differ between families. None if it is not there.
        """
        tensors = [value for value in given if isinstance(value, Tensor)]
        choices = [value for value in tensors if not value.is_floating_point() and value.dim() == 2]
        floating = [value for value in tensors if value.is_floating_point()]
        if len(choices) != 1 or len(floating) != 2 or choices[0].shape != floating[1].shape:
            return None
        return floating[0].flatten(0, -2), choices[0], floating[1]

    def compute(self, block: "Block", plain: Compute, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """[T, D]: the sum over a token's K experts of gate times output. plain: the entry's own forward."""
        y_TD: Tensor = plain(x_TD, expert_TK, gate_TK)
        return y_TD.reshape(len(x_TD), -1)  # DBRX's experts take T for a number of sequences

    def states(self, given: Sequence[Any], routed: "Routed | None") -> Tensor:
        """The tokens' hidden states [..., D] that the experts work on; by default the entry's first argument."""
        states: Tensor = given[0]
        return states

    def answer(self, block: "Block", y_TD: Tensor, given: Sequence[Any]) -> Any:
        """What the entry returns to its caller, made of the layer's output. given: the entry's arguments."""
        return y_TD.view_as(given[0])


@attrs.frozen(eq=False)
class Routed:
    """One call of a router: the hidden states that it was given, and what it returned."""

    states: Tensor
    returned: Any


@attrs.frozen(eq=False)
class Block:
    """A MoE block of a model, by its name there."""

    name: str
    module: nn.Module
    family: Family

    @property
    def router(self) -> Any:
        """The router, without adapters around it."""
        return unwrapped(part_of(self.module, self.family.router))

    @property
    def experts(self) -> Any:
        """The experts, without adapters around them."""
        return unwrapped(part_of(self.module, self.family.experts))

    @property
    def entry(self) -> Any:
        """The module whose call carries the decision, without adapters around it."""
        return unwrapped(part_of(self.module, self.family.entry))

    def setting(self, *names: str, default: Any = None) -> Any:
        """A setting by any of its names, which transformers keeps in the router, in the block or in a config."""
        owners = (self.router, self.module, self.experts, getattr(self.experts, "config", None))
        found = (getattr(owner, name) for owner in owners for name in names if getattr(owner, name, None) is not None)
        return next(found, default)

    def holder(self, path: str) -> tuple[Any, str]:
        """(the module that holds a tensor of this block, the tensor's name there), adapters aside."""
        where, _, name = path.rpartition(".")
        return unwrapped(part_of(self.module, where)), name

    def tensor(self, path: str) -> Tensor:
        """A tensor of this block by its path."""
        holder, name = self.holder(path)
        found: Tensor = getattr(holder, name)
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias [E] that only selection sees, or None."""
        paths = (path for path, stored in self.family.tensors.items() if stored.role == "state")
        found = [self.tensor(path).reshape(-1) for path in paths]
        return found[0] if found else None


@attrs.frozen(eq=False)
class DenseBlock:
    """A dense feed-forward block of a model: its name there, the index of its layer, and where its parts are."""

    name: str
    index: int
    module: nn.Module
    at: Dense


def unwrapped(module: Any) -> Any:
    """The module inside adapters, which keep what they adapt as `base_layer` (PEFT)."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def part_of(module: nn.Module, path: str) -> Any:
    """A submodule by its path, through adapters; "" is the module itself."""
    for name in path.split(".") if path else ():
        module = getattr(unwrapped(module), name)
    return module


def has(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule of that path."""
    try:
        return isinstance(part_of(module, path), nn.Module)
    except AttributeError:
        return False


def config_value(config: Any, path: str) -> Any:
    """A value of a config by its path, such as "ffn_config.moe_num_experts"; None if it is not there."""
    try:
        return attrgetter(path)(config)
    except AttributeError:
        return None
