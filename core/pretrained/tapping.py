"""Hooks on a block's router and entry, which follow adapters that are put around either later."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..contract.families import Block, Routed, part_of


class Tap:
    """Tells what a block's router returns, and what its entry is given.

    routed(Routed): after each forward of the router. given(arguments): before each forward of the entry; may be None.
    hook: wraps each hook.
    """

    def __init__(
        self,
        block: Block,
        routed: Callable[[Routed], None],
        given: Callable[[list[Any]], None] | None,
        hook: Callable[[Callable[..., None]], Any],
    ) -> None:
        self.block, self._routed, self._given, self._hook = block, routed, given, hook
        self._on: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        self._enter = block.module.register_forward_pre_hook(hook(self.renew))
        self.renew()

    def renew(self, *_: Any) -> None:
        """Before a block's forward: hook its router and entry, unless they are the same as before."""
        family = self.block.family
        self._put(family.router, "register_forward_hook", self._after_router)
        if self._given is not None:
            self._put(family.entry, "register_forward_pre_hook", self._before_entry, with_kwargs=True)

    def _put(self, path: str, register: str, act: Callable[..., None], **options: bool) -> None:
        module = part_of(self.block.module, path)
        hooked, handle = self._on.get(path, (None, None))
        if hooked is not module:
            if handle is not None:
                handle.remove()
            self._on[path] = module, getattr(module, register)(self._hook(act), **options)

    def _after_router(self, _: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        self._routed(Routed(args[0], returned))

    def _before_entry(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._given is not None
        self._given([*args, *kwargs.values()])

    def close(self) -> None:
        """Remove every hook."""
        self._enter.remove()
        for _, handle in self._on.values():
            handle.remove()
