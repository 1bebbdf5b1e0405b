"""The running forwards of a foreign model: which of their tokens are padding, and hooks that are never copied along.

Suffixes: S tokens of a sequence, T tokens.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASKED = -1e3  # in a mask that is added to scores, a visible place has 0 and a masked one at most this
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _nothing(*_: Any) -> None:
    """What a copied hook does."""


class Hook:
    """A hook that a copy or a pickle of its module does not carry along: it has one there that does nothing.

    Dynamo does not trace it.
    """

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        self._act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_nothing,)


@attrs.define(eq=False)
class Call:
    """One running forward.

    module: whose. parts: the id() of every module inside. whole: it is a model of transformers, not a part of one.
    mask: the attention mask as given, or None. ids: of the tokens, or None. start: the number of tokens in the cache
    that a model was given, or None. shape: the leading shape of its first argument.
    """

    module: nn.Module
    parts: set[int]
    whole: bool
    mask: Any = None
    ids: Tensor | None = None
    start: int | Tensor | None = None
    shape: tuple[int, ...] = ()


class Calls:
    """The running forwards of the modules around a model's blocks, and of the blocks, outermost first.

    A block is not given the mask, but the modules around it are.
    """

    def __init__(self) -> None:
        self._running: list[Call] = []
        self._warned: set[str] = set()

    def follow(self, module: nn.Module) -> list[RemovableHandle]:
        """Keep track of a module's forwards."""
        parameters = inspect.signature(module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in POSITIONAL]
        parts = {id(part) for part in module.modules() if part is not module}
        return [
            module.register_forward_pre_hook(Hook(partial(self._begin, names, parts)), with_kwargs=True),
            module.register_forward_hook(Hook(self._end), always_call=True),
        ]

    def _begin(
        self, names: list[str], parts: set[int], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        while self._running and id(module) not in self._running[-1].parts:
            self._running.pop()  # ctrl-C interrupted it, so `_end` was not called
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        first, ids = next(iter(given.values()), None), given.get("input_ids")
        whole = hasattr(module, "main_input_name")
        # a layer's cache already holds this forward's tokens, those of the layers before
        caches = [given[name] for name in ("past_key_values", "cache") if whole and given.get(name) is not None]
        self._running.append(
            Call(
                module,
                parts,
                whole,
                mask=_present(given.get("attention_mask")),
                ids=ids if isinstance(ids, Tensor) else None,
                start=_tokens_in(caches[0]) if caches else None,
                shape=tuple(first.shape[:-1]) if isinstance(first, Tensor) else (),
            )
        )

    def _end(self, module: nn.Module, *_: Any) -> None:
        while self._running and self._running.pop().module is not module:
            pass

    # -- of the block that is running -------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading shape of its input, [B, S]."""
        return self._running[-1].shape if self._running else ()

    def ids(self, count: int) -> Tensor | None:
        """The ids [T] of its tokens, if they were given to a module around it."""
        found = [call.ids for call in reversed(self._running) if call.ids is not None]
        return next((ids.reshape(-1) for ids in found if ids.numel() == count), None)

    def mask(self, shape: tuple[int, ...]) -> Tensor | None:
        """Which of its tokens [T] are real, by the mask of the innermost module that was given one.

        A mask of tokens [B, S] is preferred to one of pairs of tokens, which a model makes of it. None: all are real;
        a warning says so once, if it may be wrong.
        """
        given = [call for call in reversed(self._running) if call.mask is not None]
        start = next((call.start for call in self._running if call.start is not None), None)
        for call in sorted(given, key=lambda call: getattr(call.mask, "ndim", 0) != 2):
            real = real_tokens(call.mask, shape, start)
            if real is not None:
                return real
        if given:
            names = " and ".join(dict.fromkeys(type(call.module).__name__ for call in given))
            self.warn(
                f"watch() can't follow the attention mask given to {names}, so all tokens count, padding too; "
                "pass an attention_mask of [batch, tokens] to the model"
            )
        elif not any(call.whole for call in self._running):  # a whole model without a mask has no padding
            self.warn(
                "watch() saw no attention mask, because only inner layers of the model are watched or were called; "
                "all tokens count, padding too: watch the whole model and call it, or pass the layers a mask"
            )
        return None

    def warn(self, message: str) -> None:
        """Warn once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _present(mask: Any) -> Any:
    """The mask, or None. Models with several kinds of attention are given a mask of each by name."""
    return None if isinstance(mask, Mapping) and all(one is None for one in mask.values()) else mask


def _tokens_in(cache: Any) -> int | Tensor | None:
    """The number of tokens in a cache now, or None. A tensor is copied, as the cache changes it in place."""
    if not hasattr(cache, "get_seq_length"):
        return None
    held: int | Tensor = cache.get_seq_length()
    return held.clone() if isinstance(held, Tensor) else held


def real_tokens(mask: Any, shape: tuple[int, ...], start: int | Tensor | None) -> Tensor | None:
    """[T] bool: which tokens of a forward of [B, S] are real; None if the mask does not fit.

    mask: [B, L], or [B, heads, S, L] as attention sees it: bool, or added to the scores. L is the length of the text,
    or of a static cache. start: the column of the first token; None: the tokens are the last columns.
    """
    rows, length = shape if len(shape) == 2 else (1, *shape) if shape else (0, 0)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[0] not in (1, rows):
        return None
    room = mask.shape[-1] - length
    if room < 0 or (mask.dim() == 4 and mask.shape[2] != length):
        return None
    first = room if start is None else torch.as_tensor(start, device=mask.device).clamp(max=room)
    token_S = torch.arange(length, device=mask.device)
    # a token of padding does not even see itself
    seen_BS = mask[:, first + token_S] if mask.dim() == 2 else mask[:, 0, token_S, first + token_S]
    additive = mask.dim() == 4 and mask.is_floating_point()
    return (seen_BS > MASKED if additive else seen_BS.bool()).expand(rows, length).reshape(-1)
