"""Parts of a layer over the tensors of a foreign block, which registers, moves, saves and loads them.

Suffixes: T tokens, N assignments, E experts, K chosen per token, D model.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.families import COUNTS, Block, Routed, Stored, part_of
from ..contract.growth import HiddenUnits
from ..contract.parts import Axis, Bias, Experts, LinearRouter, Part, uniform, zeros
from ..contract.routing import Assignments, Tokens
from ..errors import UsageError
from ..layer.probing import evaluating

LINEAR = "weight"  # the name of a linear router's rows


class Borrowing(Part):
    """A part whose tensors are those of a block. Its adapters take part in a forward, but can't grow."""

    block: Block
    paths: dict[str, str]  # of the borrowed tensors in the block, by their names here

    def borrow(self, block: Block, tensors: Mapping[str, Stored], names: Mapping[str, str] | None = None) -> None:
        """Declare a block's tensors. names: what some of them are called here, by their path."""
        self.block, self.paths = block, {}
        for path, stored in tensors.items():
            name = (names or {}).get(path, path.replace(".", "_"))
            tensor = block.tensor(path)
            fresh = zeros if stored.fan_in is None else uniform(tensor.shape[stored.fan_in])
            self.paths[name] = path
            self.axes[name] = Axis(stored.axis, "expert", stored.role, None if stored.role == "state" else fresh)

    @property
    def home(self) -> nn.Module:
        return self.block.module

    def __getattr__(self, name: str) -> Any:
        paths = self.__dict__.get("paths", ())
        return self.block.tensor(paths[name]) if name in paths else super().__getattr__(name)

    def holder(self, name: str) -> tuple[nn.Module, str]:
        return self.block.holder(self.paths[name]) if name in self.paths else (self, name)

    def put(self, name: str, value: Tensor) -> None:
        if name in self.paths:
            where = self.paths[name].rpartition(".")[0]
            if part_of(self.block.module, where) is not self.block.holder(self.paths[name])[0]:
                message = f"{self.block.name}.{where} has an adapter, which can't grow; merge it first"
                raise UsageError(message, code="adapter-cannot-grow")
        super().put(name, value)
        if name in self.paths:
            recount(self.block, self.holder(name)[0], value.shape[self.axes[name].axis])


def recount(block: Block, holder: nn.Module, experts: int) -> None:
    """Let modules of transformers know their number of experts, which they keep next to their tensors."""
    for module in (holder, block.router, block.experts):
        for name in (*COUNTS, "out_features"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, experts)


class BorrowedRouter(Borrowing, LinearRouter):
    """Mixed into a plugin's linear router: its logits are those that the block's own router returned.

    routed: what that was, in the forward that is running. calling: this one calls it now, outside a forward.
    """

    routed: Routed | None = None
    calling: bool = False

    def linear(self, tokens: Tokens) -> Tensor:
        returned = self._called(tokens) if self.routed is None else self.routed.returned
        logits_TE = self.block.family.logits_from(returned)
        return tokens.real(logits_TE.reshape(-1, logits_TE.shape[-1]).float())

    def _called(self, tokens: Tokens) -> Any:
        """What the block's router returns for these tokens, outside a forward of the block."""
        router = part_of(self.block.module, self.block.family.router)
        self.calling = True
        try:
            with evaluating(router) if not self.training else nullcontext():
                return router(tokens.x.to(self.weight.dtype))
        finally:
            self.calling = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made at run time, so a copy or a pickle makes it again."""
        return remade, (type(self).__bases__[1],), self.__dict__


_made: dict[type, type] = {}


def remade(kind: type) -> BorrowedRouter:
    """A router of a plugin's class with the block's logits, still without state."""
    if kind not in _made:
        _made[kind] = type(kind.__name__, (BorrowedRouter, kind), {})
    router: BorrowedRouter = object.__new__(_made[kind])
    return router


def borrowed_router(router: Any, block: Block) -> Any:
    """A plugin's router over a block's own; unchanged if it is not a linear one, which brings its own weights."""
    if not isinstance(router, LinearRouter):
        return router
    rows = {path: one for path, one in block.family.tensors.items() if one.role in ("logit_row", "logit_bias")}
    borrowed = remade(type(router))
    borrowed.__dict__.update(router.__dict__)
    del borrowed._parameters[LINEAR], borrowed.axes[LINEAR]
    names = {path: LINEAR for path, stored in rows.items() if stored.role == "logit_row"}
    borrowed.borrow(block, rows, names)
    return borrowed


class BorrowedBias(Borrowing, Bias):
    """The bias of a block that only selection sees."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.borrow(block, {path: one for path, one in block.family.tensors.items() if one.role == "state"})

    def forward(self) -> Tensor:
        (path,) = self.paths.values()
        return self.block.tensor(path).detach().reshape(-1)


class BorrowedExperts(Borrowing, Experts):
    """A block's own experts, called as the block calls them: with K experts and gates for each token.

    resized: called after the number of experts changed. gate_dtype: of the gates that the block gave its experts.
    inside: a forward of the entry is running, so adapters around it take part already. passing: the entry is called
    by this bank, so it must compute and not ask the layer.
    """

    def __init__(self, block: Block, resized: Callable[[], None]) -> None:
        super().__init__()
        self.borrow(block, {path: one for path, one in block.family.tensors.items() if one.role in ("in", "output")})
        self.resized = resized
        self.inside = self.passing = False
        self.gate_dtype: torch.dtype | None = None

    @property
    def count(self) -> int:
        """E."""
        name = next(iter(self.paths))
        size: int = getattr(self, name).shape[self.axes[name].axis]
        return size

    @property
    def hidden_units(self) -> dict[str, HiddenUnits]:
        """Where the family says that the hidden units are, by tensor."""
        stored = {name: self.block.family.tensors[path] for name, path in self.paths.items()}
        return {name: HiddenUnits(at.hidden, at.interleaved) for name, at in stored.items() if at.hidden is not None}

    def put(self, name: str, value: Tensor) -> None:
        super().put(name, value)
        self.resized()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        row_N = torch.arange(len(x_ND), device=x_ND.device)
        expert_N = torch.searchsorted(counts_E.cumsum(0), row_N, right=True).clamp(max=len(counts_E) - 1)
        enters_N = row_N < counts_E.sum()
        y_ND = self._compute(x_ND, expert_N[:, None], enters_N[:, None].to(x_ND.dtype))
        return torch.where(enters_N[:, None], y_ND, 0)

    def routed(self, x_TD: Tensor, plan: Assignments, experts: int) -> Tensor:
        if not plan.each:
            return super().routed(x_TD, plan, experts)
        gate_TK = torch.where(plan.kept, plan.weight, 0).view(-1, plan.each)
        return self._compute(x_TD, plan.expert.view(-1, plan.each), gate_TK.to(self.gate_dtype or x_TD.dtype))

    def output_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def _compute(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        block, entry = self.block, self.block.entry
        around = part_of(block.module, block.family.entry)
        if self.inside or around is entry:
            return block.family.compute(block, plain_forward(entry), x_TD, expert_TK, gate_TK)
        self.passing = True
        try:
            return block.family.compute(block, around, x_TD, expert_TK, gate_TK)
        finally:
            self.passing = False


def plain_forward(entry: nn.Module) -> Any:
    """The forward of a module's class, which `adopt` puts another one before."""
    return type(entry).forward.__get__(entry)
