"""The running forwards of a foreign model: which of their tokens are padding, and hooks that are never copied along.

Suffixes: S tokens of a sequence, T tokens.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASKED = -1e3  # in a mask that is added to scores, a visible place has 0 and a masked one at most this
RECENT = 64  # forwards of a module whose backward may be still to come
SAMPLE = 16  # values of its input by which a repeated forward is recognised
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

    module: whose. whole: it is a model of transformers, not a part of one.
    mask: the attention mask as given, or None. ids: of the tokens, or None. start: the number of tokens in the cache
    that a model was given, or None. shape: the leading shape of its first argument.
    """

    module: nn.Module
    whole: bool
    mask: Any = None
    ids: Tensor | None = None
    start: int | Tensor | None = None
    shape: tuple[int, ...] = ()


@attrs.frozen(eq=False)
class Past:
    """A call in training: the calls around it, the shape of its input and some values of it."""

    around: tuple[Call, ...]
    shape: torch.Size
    sample: Tensor


class Calls:
    """The running forwards of the modules around a model's blocks, and of the blocks, outermost first.

    A block is not given the mask, but the modules around it are. When activation checkpointing repeats the forward of
    an inner module in the backward, the calls that were around it are found again.
    """

    def __init__(self) -> None:
        self._running: list[Call] = []
        self._past: dict[int, deque[Past]] = {}  # recent calls in training, by the id() of their module
        self._lent = 0  # of the running calls, those that are around a repeated forward
        self._warned: set[str] = set()
        self._parts: dict[int, set[int]] = {}  # the id() of every module inside one, by its own

    def follow(self, module: nn.Module, hook: Callable[[Callable[..., None]], Any]) -> list[RemovableHandle]:
        """Keep track of a module's forwards. hook: wraps each hook."""
        parameters = inspect.signature(module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in POSITIONAL]
        return [
            module.register_forward_pre_hook(hook(partial(self._begin, names)), with_kwargs=True),
            module.register_forward_hook(hook(self._end), always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no forward running."""
        fresh = Calls()
        fresh._warned = set(self._warned)
        return vars(fresh)

    def _inside(self, module: nn.Module, outer: nn.Module) -> bool:
        """Whether a module is a part of another one, and not that one itself."""
        if id(outer) not in self._parts:
            self._parts[id(outer)] = {id(part) for part in outer.modules() if part is not outer}
        return id(module) in self._parts[id(outer)]

    def _begin(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        while self._running and not self._inside(module, self._running[-1].module):
            self._running.pop()  # ctrl-C interrupted it, so `_end` was not called
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        first, ids = next(iter(given.values()), None), given.get("input_ids")
        if module.training and isinstance(first, Tensor):
            self._remember_or_repeat(module, first.detach())
        whole = hasattr(module, "main_input_name")
        # a layer's cache already holds this forward's tokens, those of the layers before
        caches = [given[name] for name in ("past_key_values", "cache") if whole and given.get(name) is not None]
        self._running.append(
            Call(
                module,
                whole,
                mask=_present(given.get("attention_mask")),
                ids=ids if isinstance(ids, Tensor) else None,
                start=_tokens_in(caches[0]) if caches else None,
                shape=tuple(first.shape[:-1]) if isinstance(first, Tensor) else (),
            )
        )

    def _remember_or_repeat(self, module: nn.Module, x: Tensor) -> None:
        """Keep the calls around the one that begins now; or find them, if a backward repeats its forward."""
        sample = x.reshape(-1)[:: max(x.numel() // SAMPLE, 1)][:SAMPLE].clone()
        past = self._past.setdefault(id(module), deque(maxlen=RECENT))
        if torch._C._current_graph_task_id() == -1:  # not in a backward
            past.append(Past(tuple(self._running), x.shape, sample))
        elif not self._running:
            same = (one for one in reversed(past) if one.shape == x.shape and torch.equal(one.sample, sample))
            self._running = list(next((one.around for one in same), ()))
            self._lent = len(self._running)

    def _end(self, module: nn.Module, *_: Any) -> None:
        while self._running and self._running.pop().module is not module:
            pass
        if len(self._running) <= self._lent:  # the repeated forward is over
            self._running, self._lent = self._running[: -self._lent or None], 0

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, x: Tensor) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
        """(leading shape, mask, token ids) of hidden states x [..., D]; mask is None if all are real."""
        count = x.shape[:-1].numel()
        shape = self.shape if torch.Size(self.shape).numel() == count else tuple(x.shape[:-1])
        mask, ids = self.mask(shape), self.ids(count)
        return (
            shape,
            None if mask is None or bool(mask.all()) else mask.view(shape).to(x.device),
            None if ids is None else ids.view(shape).to(x.device),
        )

    def warn(self, message: str) -> None:
        """Warn once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def follow(
    calls: Calls,
    model: nn.Module,
    blocks: list[nn.Module],
    hook: Callable[[Callable[..., None]], Any] = Hook,
) -> list[RemovableHandle]:
    """Follow the forwards of the blocks and of the modules around them."""
    around = [module for module in model.modules() if any(part in blocks for part in module.modules())]
    return [handle for module in around for handle in calls.follow(module, hook)]


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
