"""Find plugins in the metadata of distributions, and load one. Nothing here imports torch."""

import inspect
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata, resources
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import attrs

from ..contract.hookspecs import HOOKS
from ..contract.traits import problem_of
from ..errors import PluginError, UsageError, listed, nearest

PREFIX = "moe_engine."
KINDS = {  # entry-point group -> what one of its plugins is called
    "routers": "router",
    "biases": "bias",
    "losses": "loss",
    "growth": "growth",
    "initializers": "initializer",
    "metrics": "metric",
    "reports": "report",
    "tasks": "task",
    "experts": "experts",
    "families": "family",
}
RENAMED_GROUPS = {"sources": "initializers"}  # entry-point groups of earlier versions
WATCHING = ("metric", "report")  # the kinds that only observe a model
DISABLED = "MOE_ENGINE_DISABLE_PLUGINS"
_sound: WeakSet[type] = WeakSet()  # classes that were checked against the contract
_known: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()  # the marks of their methods


@attrs.frozen
class Found:
    """A plugin as its distribution's metadata describes it; nothing is imported."""

    name: str
    kind: str
    distribution: str
    version: str
    entry_point: metadata.EntryPoint = attrs.field(repr=False)

    @property
    def title(self) -> str:
        """Its name in error messages."""
        return f"{self.kind} '{self.name}'"


def disabled() -> set[str]:
    """The plugins that the environment variable MOE_ENGINE_DISABLE_PLUGINS hides, as in "html,plots"."""
    return {name.strip() for name in os.environ.get(DISABLED, "").split(",") if name.strip()}


_pretended: ContextVar[dict[str, list[Found]] | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(found: dict[str, list[Found]]) -> Iterator[None]:
    """Make `find` return these plugins in the body, to try a plugin that no distribution offers."""
    before = _pretended.set(found)
    try:
        yield
    finally:
        _pretended.reset(before)


def find() -> dict[str, list[Found]]:
    """Every installed plugin by name, sorted, except disabled ones; a name with two entries is a clash."""
    if (pretended := _pretended.get()) is not None:
        return pretended
    found: dict[str, list[Found]] = {}
    hidden = disabled()
    homes: dict[int, tuple[str, str]] = {}  # reading name and version parses a file, so it is done once
    for point in _entry_points():
        if point.group.startswith(PREFIX) and point.name not in hidden:
            group, home = point.group.removeprefix(PREFIX), point.dist
            if id(home) not in homes:
                homes[id(home)] = (home.name, home.version) if home else ("unknown", "0")
            offer = Found(point.name, KINDS.get(group, group), *homes[id(home)], point)
            found.setdefault(point.name, []).append(offer)
    return {name: sorted(found[name], key=lambda offer: (offer.distribution, offer.kind)) for name in sorted(found)}


def _entry_points() -> Iterable[metadata.EntryPoint]:
    """All of them, of each distribution the first copy on the path; `select` would go through all for each group."""
    installed: Any = metadata.entry_points()
    if isinstance(installed, dict):  # before Python 3.12, and its own methods warn
        return chain.from_iterable(dict.values(installed))
    points: Iterable[metadata.EntryPoint] = installed
    return points


def pick(name: str, found: Mapping[str, list[Found]]) -> Found:
    """The one installed plugin of that name; an unknown name or a clash is an error."""
    if name in disabled():
        message = f"plugin '{name}' is disabled by the environment variable {DISABLED}; remove it there"
        raise UsageError(message, code="disabled-plugin")
    if name not in found:
        raise UsageError(f"there is no plugin '{name}'; {nearest(name, found)}", code="unknown-plugin")
    first, *others = found[name]
    if others:
        homes = listed(f"{offer.distribution} ({offer.entry_point.value})" for offer in found[name])
        raise PluginError(f"plugin '{name}' is offered by {homes}; uninstall one of them", code="plugin-clash")
    return first


def load(found: Found) -> type:
    """Import one plugin and check it against the contract. Raises PluginError."""
    origin = f"{found.title} ({found.distribution} {found.version})"
    group = found.entry_point.group
    if group.removeprefix(PREFIX) not in KINDS:
        renamed = RENAMED_GROUPS.get(group.removeprefix(PREFIX))
        hint = f"it is now '{PREFIX}{renamed}'" if renamed else nearest(group, [PREFIX + known for known in KINDS])
        message = f"plugin '{found.name}' is in the unknown entry-point group '{group}'; {hint}"
        raise PluginError(message, code="unknown-group")
    try:
        cls: type = found.entry_point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = f"{origin} does not load: {type(error).__name__}: {error}"
        raise PluginError(message, code="plugin-not-loaded") from error
    if cls in _sound:
        return cls
    if not (inspect.isclass(cls) and attrs.has(cls)) or cls.__eq__ is not object.__eq__:
        raise PluginError(f"{origin} is not a class under @attrs.define(eq=False)", code="not-a-plugin-class")
    for name in dir(cls):
        if name.startswith("moe_") or _marks(cls, name) is not None:
            _check_hook(origin, cls, name)
    hooks = [name for name in HOOKS if implements(cls, name)]
    if not hooks:
        raise PluginError(f"{origin} implements no hook", code="no-hook")
    if problem := problem_of(cls, hooks):
        raise PluginError(f"{origin}: {problem}", code="bad-trait")
    _sound.add(cls)
    return cls


def implements(cls: type, hook: str) -> bool:
    """Whether a plugin class implements a hook."""
    return _marks(cls, hook) is not None


def _marks(cls: type, name: str) -> Any:
    """The marks that @hookimpl set on a method, or None."""
    known = _known.setdefault(cls, {})
    if name not in known:
        known[name] = getattr(inspect.getattr_static(cls, name, None), "moe_engine_impl", None)
    return known[name]


def _check_hook(origin: str, cls: type, name: str) -> None:
    marks = _marks(cls, name)
    if name not in HOOKS:
        raise PluginError(
            f"{origin} implements '{name}', which is not a hook; {nearest(name, HOOKS)}", code="unknown-hook"
        )
    if marks is None:
        raise PluginError(f"{origin}: {name} lacks the decorator @hookimpl", code="hook-not-marked")
    if any(marks[mark] for mark in ("wrapper", "hookwrapper", "tryfirst", "trylast")):
        message = f"{origin}: {name} asks for a place in the order; plugins act in the order typed"
        raise PluginError(message, code="hook-order")
    offered = inspect.signature(HOOKS[name]).parameters
    first, *asked = [*inspect.signature(getattr(cls, name)).parameters, None]
    if first != "self":
        raise PluginError(f"{origin}: the first argument of {name} must be self", code="hook-arguments")
    for argument in asked[:-1]:
        if argument not in offered:
            message = f"{origin}: {name} asks for '{argument}', but the hook offers {listed(offered)}"
            raise PluginError(message, code="hook-arguments")


def defaults() -> dict[str, Any]:
    """The plugins and the task of a run unless it names others: default_plugins.toml."""
    return tomllib.loads(resources.files(__package__).joinpath("default_plugins.toml").read_text("utf-8"))
