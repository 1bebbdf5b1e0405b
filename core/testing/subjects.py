"""The plugin under test: an installed one by its name, or a class, or an instance, that nobody has installed."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import attrs

from ..contract.hookspecs import HOOKS
from ..contract.options import Settings, build, parse_settings, values_of
from ..contract.traits import provided_by, traits_of
from ..errors import PluginError, UsageError, listed
from ..registry import discovery
from ..registry.discovery import KINDS, PREFIX, Found

# the hook by which a plugin is of a kind
HOOK_OF = {
    "router": "moe_router",
    "bias": "moe_bias",
    "loss": "moe_aux_loss",
    "growth": "moe_growth",
    "initializer": "moe_new_expert",
    "metric": "moe_metrics",
    "report": "moe_report",
    "task": "moe_task",
    "experts": "moe_experts",
}


@attrs.frozen
class Guest:
    """Stands where an installed plugin has its entry point."""

    name: str
    group: str
    cls: type

    @property
    def value(self) -> str:
        """As an entry point says where its plugin is."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    def load(self) -> type:
        """The class."""
        return self.cls


@attrs.define(eq=False, slots=False)
class Subject:
    """A plugin under test, with settings, among all that are installed.

    data_dir: where a task's files are. first_life: what claims about a trigger share, because it takes long.
    """

    found: Found
    cls: type
    settings: Settings
    installed: dict[str, list[Found]]
    data_dir: str = "data"
    first_life: Any = None

    @property
    def name(self) -> str:
        """The name by which it is chosen."""
        return self.found.name

    @property
    def title(self) -> str:
        """How errors name it."""
        return self.found.title

    @cached_property
    def hooks(self) -> set[str]:
        """The hooks that it implements."""
        return {name for name in HOOKS if hasattr(self.cls, name)}

    def present(self) -> AbstractContextManager[None]:
        """Inside, it counts as installed."""
        return discovery.pretend(self.installed)

    @cached_property
    def costly(self) -> list[str]:
        """Default plugins that would only cost time: metrics and reports."""
        usual = discovery.defaults()
        return [name for name in (*usual["metrics"], *usual["reports"]) if name in self.installed]

    @cached_property
    def routers(self) -> list[str]:
        """Routers that provide what it requires, the default one first; itself, if it is one."""
        if "moe_router" in self.hooks:
            return [self.name]
        usual = discovery.defaults()["router"]
        names = [name for name, (one, *_) in self.installed.items() if one.kind == "router" and name != usual]
        fitting = [name for name in (usual, *names) if self._fits(name)]
        if not fitting:
            needs = listed(traits_of(self.cls).requires)
            raise UsageError(
                f"no installed router provides what {self.title} requires ({needs}); install one that does"
            )
        return fitting

    def _fits(self, router: str) -> bool:
        try:
            provided = provided_by(discovery.load(discovery.pick(router, self.installed)))
        except UsageError:  # a broken one, which is nobody's partner
            return False
        return set(traits_of(self.cls).requires) <= set(provided)


def subject(plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data") -> Subject:
    """The plugin to test: an installed one's name, a plugin class, or an instance, whose options count too.

    settings: as those of an `Engine`. Raises UsageError for a name that nobody has, PluginError for no plugin.
    """
    installed = discovery.find()
    given: Settings = dict(settings) if isinstance(settings, dict) else parse_settings(settings)
    if isinstance(plugin, str):
        found = discovery.pick(plugin, installed)
    else:
        kind = plugin if isinstance(plugin, type) else type(plugin)
        found = _known(kind, installed) or _guest(kind)
    if not isinstance(plugin, str | type):
        given = {**given, found.name: {**values_of(plugin), **given.get(found.name, {})}}
    cls = discovery.load(found)
    build(cls, found.title, given.get(found.name, {}))  # a wrong setting is said before anything is tested
    return Subject(found, cls, given, {**installed, found.name: [found]}, data_dir)


def _known(cls: type, installed: dict[str, list[Found]]) -> Found | None:
    """The entry point of a class that is installed after all."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    return next((one for several in installed.values() for one in several if one.entry_point.value == value), None)


def _guest(cls: type) -> Found:
    kinds = [kind for kind, hook in HOOK_OF.items() if hasattr(cls, hook)]
    if not kinds:
        raise PluginError(f"{cls.__name__} is no plugin: it implements none of {listed(HOOK_OF.values())}")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    group = next(group for group, kind in KINDS.items() if kind == kinds[0])
    point: Any = Guest(name, PREFIX + group, cls)
    return Found(name, kinds[0], "not installed", "0", point)
