"""The plugin under test: an installed one, or a class or instance."""

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

# the hook that makes a plugin one of a kind
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
    "family": "moe_family",
}


@attrs.frozen
class ClassEntryPoint:
    """The entry point of a class that is not installed."""

    name: str
    group: str
    cls: type

    @property
    def value(self) -> str:
        """Where the class is, as "module:name"."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    def load(self) -> type:
        """The class."""
        return self.cls


@attrs.define(eq=False, slots=False)
class PluginUnderTest:
    """A plugin with settings, and the installed plugins that it may be combined with.

    data_dir: the folder with a task's files. ranks: in how many processes claims about ranks train. reference_run: a
    simulated run, shared by the claims about a trigger because it takes long; trainings: the same of those on ranks.
    """

    found: Found
    cls: type
    settings: Settings
    installed: dict[str, list[Found]]
    data_dir: str = "data"
    ranks: int = 1
    reference_run: Any = None
    trainings: Any = None

    @property
    def name(self) -> str:
        """The name by which it is chosen."""
        return self.found.name

    @property
    def title(self) -> str:
        """Its kind and name, as in errors."""
        return self.found.title

    def __reduce__(self) -> Any:
        """For another process: what is installed is found there anew, and the class imported."""
        return _again, (self.found.name, self.found.kind, self.cls, self.settings, self.data_dir)

    @cached_property
    def hooks(self) -> set[str]:
        """The hooks that it implements."""
        return {name for name in HOOKS if hasattr(self.cls, name)}

    def present(self) -> AbstractContextManager[None]:
        """A context in which the plugin counts as installed."""
        return discovery.pretend(self.installed)

    @cached_property
    def observers(self) -> list[str]:
        """The default metrics and reports, which only cost time."""
        usual = discovery.defaults()
        return [name for name in (*usual["metrics"], *usual["reports"]) if name in self.installed]

    @cached_property
    def routers(self) -> list[str]:
        """The installed routers that provide what it requires, the default first; for a router, only itself."""
        if "moe_router" in self.hooks:
            return [self.name]
        usual = discovery.defaults()["router"]
        names = [name for name, (first, *_) in self.installed.items() if first.kind == "router" and name != usual]
        fitting = [name for name in (usual, *names) if self._fits(name)]
        if not fitting:
            required = listed(traits_of(self.cls).requires)
            raise UsageError(
                f"no installed router provides what {self.title} requires ({required}); install one that does",
                code="no-fitting-router",
            )
        return fitting

    def _fits(self, router: str) -> bool:
        try:
            provided = provided_by(discovery.load(discovery.pick(router, self.installed)))
        except UsageError:  # a broken router fits no plugin
            return False
        return set(traits_of(self.cls).requires) <= set(provided)


def plugin_under_test(
    plugin: Any, settings: Iterable[str] | Settings = (), data_dir: str = "data", ranks: int = 1
) -> PluginUnderTest:
    """Find the plugin to test: an installed one by name, a plugin class, or an instance with options set.

    settings: as for an `Engine`. Raises UsageError for an unknown name or a wrong setting, PluginError for a class
    that is not a plugin.
    """
    installed = discovery.find()
    given = parse_settings(settings)
    if isinstance(plugin, str):
        found = discovery.pick(plugin, installed)
    else:
        cls = plugin if isinstance(plugin, type) else type(plugin)
        found = _installed_entry(cls, installed) or _entry_of(cls)
    if not isinstance(plugin, str | type):
        given = {**given, found.name: {**values_of(plugin), **given.get(found.name, {})}}
    cls = discovery.load(found)
    build(cls, found.title, given.get(found.name, {}))  # refuse a wrong setting before any test runs
    return PluginUnderTest(found, cls, given, {**installed, found.name: [found]}, data_dir, ranks)


def _again(name: str, kind: str, cls: type, settings: Settings, data_dir: str) -> PluginUnderTest:
    found = _not_installed(name, kind, cls)
    return PluginUnderTest(found, cls, settings, {**discovery.find(), name: [found]}, data_dir)


def _installed_entry(cls: type, installed: dict[str, list[Found]]) -> Found | None:
    """The entry of a class that is installed."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    entries = (found for same_name in installed.values() for found in same_name)
    return next((found for found in entries if found.entry_point.value == value), None)


def _entry_of(cls: type) -> Found:
    """An entry for a class that is not installed; its name is the class's in snake_case."""
    kinds = [kind for kind, hook in HOOK_OF.items() if hasattr(cls, hook)]
    if not kinds:
        raise PluginError(
            f"{cls.__name__} is not a plugin: it implements none of {listed(HOOK_OF.values())}", code="not-a-plugin"
        )
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    return _not_installed(name, kinds[0], cls)


def _not_installed(name: str, kind: str, cls: type) -> Found:
    group = next(group for group, word in KINDS.items() if word == kind)
    point: Any = ClassEntryPoint(name, PREFIX + group, cls)
    return Found(name, kind, "not installed", "0", point)
