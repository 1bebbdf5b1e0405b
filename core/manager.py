"""Plugins: find them by metadata, load the chosen ones one by one, check, order and bind them.

Nothing here imports torch, and nothing is imported of a plugin that was not asked for.
"""

import copy
import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import pluggy

from . import hookspecs
from .errors import PluginError, UsageError, listed, nearest
from .hookspecs import HOOKS
from .options import Settings, build, changed, values_of

if TYPE_CHECKING:
    from .routing import Spec
    from .stats import Finding
    from .tasks import TaskSpec

PREFIX = "moe_engine."
KINDS = {  # entry-point group -> what one of its plugins is called
    "routers": "router",
    "biases": "bias",
    "losses": "loss",
    "growth": "growth",
    "sources": "source",
    "metrics": "metric",
    "reports": "report",
    "tasks": "task",
    "experts": "experts",
}
WATCHING = ("metric", "report")  # the kinds that look on while a model learns


# What a router may give (its class attribute `gives`), and any plugin may need (`needs`).
TRAITS = {
    "logits": "raw logits",
    "probs": "a distribution over experts for each token",
    "load": "a load that training can shift between experts",
    "picks": "the same number of choices for every token",
    "choices": "experts that each token chose, or was chosen by",
    "smooth_load": "an estimate of the load that has a gradient",
}
USUAL = ("logits", "probs", "load", "picks", "choices")  # given by a router that does not say
DISABLED = "MOE_ENGINE_DISABLE_PLUGINS"


@attrs.frozen
class Found:
    """A plugin as its distribution's metadata tells of it; nothing of it is imported."""

    name: str
    kind: str
    distribution: str
    version: str
    entry_point: metadata.EntryPoint = attrs.field(repr=False)

    @property
    def title(self) -> str:
        """How errors name it."""
        return f"{self.kind} '{self.name}'"


def disabled() -> set[str]:
    """The plugins that the environment variable MOE_ENGINE_DISABLE_PLUGINS hides, as in "html,plots"."""
    return {name.strip() for name in os.environ.get(DISABLED, "").split(",") if name.strip()}


_pretended: ContextVar[dict[str, list[Found]] | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(found: dict[str, list[Found]]) -> Iterator[None]:
    """Inside, `find` answers this: how a plugin is tried that no distribution offers."""
    before = _pretended.set(found)
    try:
        yield
    finally:
        _pretended.reset(before)


def find() -> dict[str, list[Found]]:
    """Every installed plugin by name, sorted, but for disabled ones; a name with two entries is a clash."""
    if (pretended := _pretended.get()) is not None:
        return pretended
    found: dict[str, list[Found]] = {}
    homes: set[str] = set()
    hidden = disabled()
    for home in metadata.distributions():
        name = home.name or "unknown"
        if (key := name.lower().replace("-", "_").replace(".", "_")) in homes:
            continue  # an older copy further down the path
        homes.add(key)
        for point in home.entry_points:
            if point.group.startswith(PREFIX) and point.name not in hidden:
                group = point.group.removeprefix(PREFIX)
                found.setdefault(point.name, []).append(
                    Found(point.name, KINDS.get(group, group), name, home.version, point)
                )
    return {name: sorted(found[name], key=lambda one: (one.distribution, one.kind)) for name in sorted(found)}


def pick(name: str, found: Mapping[str, list[Found]]) -> Found:
    """The one installed plugin of that name; an unknown name or a clash is an error."""
    if name in disabled():
        raise UsageError(f"plugin '{name}' is disabled by the environment variable {DISABLED}; take it out there")
    if name not in found:
        raise UsageError(f"there is no plugin '{name}'; {nearest(name, found)}")
    first, *others = found[name]
    if others:
        homes = listed(f"{one.distribution} ({one.entry_point.value})" for one in found[name])
        raise PluginError(f"plugin '{name}' is offered by {homes}; uninstall one of them")
    return first


def load(found: Found) -> type:
    """Import one plugin and hold it against the contract."""
    origin = f"{found.title} ({found.distribution} {found.version})"
    group = found.entry_point.group
    if group.removeprefix(PREFIX) not in KINDS:
        known = [PREFIX + one for one in KINDS]
        raise PluginError(
            f"plugin '{found.name}' is in the unknown entry-point group '{group}'; {nearest(group, known)}"
        )
    try:
        cls = found.entry_point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{origin} does not load: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(cls) and attrs.has(cls)) or cls.__eq__ is not object.__eq__:
        raise PluginError(f"{origin} is not a class under @attrs.define(eq=False)")
    for name in dir(cls):
        if name.startswith("moe_") or _marks(cls, name) is not None:
            _check_hook(origin, cls, name)
    if not any(_marks(cls, name) is not None for name in HOOKS):
        raise PluginError(f"{origin} implements no hook")
    for trait in (*getattr(cls, "gives", ()), *getattr(cls, "needs", ())):
        if trait not in TRAITS:
            raise PluginError(f"{origin} gives or needs '{trait}', which is no trait; {nearest(trait, TRAITS)}")
    return cls


def _marks(cls: type, name: str) -> Any:
    """What @hookimpl left on a method, or None."""
    return getattr(inspect.getattr_static(cls, name, None), "moe_engine_impl", None)


def _check_hook(origin: str, cls: type, name: str) -> None:
    marks = _marks(cls, name)
    if name not in HOOKS:
        raise PluginError(f"{origin} implements {name}, which is no hook; {nearest(name, HOOKS)}")
    if marks is None:
        raise PluginError(f"{origin}: {name} lacks the mark @hookimpl")
    if any(marks[one] for one in ("wrapper", "hookwrapper", "tryfirst", "trylast")):
        raise PluginError(f"{origin}: {name} asks for a place in the order; plugins act in the order typed")
    offered = inspect.signature(HOOKS[name]).parameters
    own, *asked = [*inspect.signature(getattr(cls, name)).parameters, None]
    if own != "self":
        raise PluginError(f"{origin}: the first argument of {name} must be self")
    for argument in asked[:-1]:
        if argument not in offered:
            raise PluginError(f"{origin}: {name} asks for '{argument}', but the hook offers {listed(offered)}")


def defaults() -> dict[str, Any]:
    """core/defaults.toml."""
    return tomllib.loads(resources.files(__package__).joinpath("defaults.toml").read_text("utf-8"))


class Bound(NamedTuple):
    """One plugin's implementation of one hook, with the arguments it names."""

    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, offer: Mapping[str, Any]) -> Any:
        return self.function(**{name: offer[name] for name in self.arguments})


@attrs.frozen
class Setup:
    """What `moe_check` sees: the plugins by name in the order typed, the layer's spec, the task's spec.

    sizes: of a layer that is to grow, the size of each population afterwards, as "expert" and "group".
    """

    plugins: Mapping[str, Any]
    spec: "Spec"
    task: "TaskSpec | None" = None
    sizes: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def balance_losses(self) -> list[str]:
        """The losses, of a weight above 0, that pull at the load."""
        return [
            name
            for name, one in self.plugins.items()
            if hasattr(one, "moe_aux_loss") and "load" in getattr(one, "needs", ()) and getattr(one, "weight", 1) > 0
        ]


class Plugins:
    """The plugins of one engine: chosen, loaded, configured, in the order typed.

    names: as typed. without: names to leave out, of the chosen and of the defaults. settings: option
    values by plugin and option. task: the task plugin's name, where there is a task. Raises
    UsageError for whatever is wrong with any of them.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        without: Iterable[str] = (),
        settings: Settings | None = None,
        task: str | None = None,
    ) -> None:
        installed = find()
        self.found: dict[str, Found] = {}
        self._classes: dict[str, type] = {}
        self.remarks: dict[str, Finding] = {}  # by the plugin that made it
        self.manager = pluggy.PluginManager("moe_engine")
        self.manager.add_hookspecs(hookspecs)
        for name in set(without) - disabled():
            self.manager.set_blocked(pick(name, installed).name)
        for name in disabled():
            self.manager.set_blocked(name)
        for name in _chosen(names, installed):
            self._add(pick(name, installed))
        self.chosen = set(self._classes) - set(without)
        if task is not None:
            self._add(_task(task, installed))
        self._add_defaults(installed)
        self.active = self._configured(settings or {}, installed)
        self._register()

    def _register(self) -> None:
        # pluggy answers last-in first-out: registered backwards, its order is the order typed too
        for name in reversed(self.active):
            self.manager.register(self.active[name], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plugins":
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.active = copy.deepcopy(self.active, memo)
        twin.manager = pluggy.PluginManager("moe_engine")  # it holds modules, which can't be copied
        twin.manager.add_hookspecs(hookspecs)
        twin._register()
        return twin

    def _add(self, found: Found) -> None:
        if found.name not in self._classes and not self.manager.is_blocked(found.name):
            self._classes[found.name] = load(found)
            self.found[found.name] = found

    def _add_defaults(self, installed: Mapping[str, list[Found]]) -> None:
        usual = defaults()
        routers = [name for name, cls in self._classes.items() if _marks(cls, "moe_router") is not None]
        if len(routers) > 1:
            raise UsageError(f"a layer has one router, but {listed(map(repr, routers))} are all routers; choose one")
        if not routers:
            self._add_default(usual["router"], installed)
        if not routers and usual["router"] not in self._classes:
            raise UsageError("no router is left; name one with --plugins")
        if not any(_marks(cls, "moe_new_expert") is not None for cls in self._classes.values()):
            self._add_default(usual["source"], installed)
        for name in (*usual["metrics"], *usual["reports"]):
            self._add_default(name, installed)

    def _add_default(self, name: str, installed: Mapping[str, list[Found]]) -> None:
        if not self.manager.is_blocked(name):
            self._add(pick(name, installed))

    def _configured(self, settings: Settings, installed: Mapping[str, list[Found]]) -> dict[str, Any]:
        for name in settings:
            if name not in self._classes:
                if name in installed:
                    raise UsageError(f"options are set for plugin '{name}', which is not chosen; add it to --plugins")
                raise UsageError(
                    f"options are set for plugin '{name}', which does not exist; {nearest(name, self._classes)}"
                )
        return {name: build(cls, self.found[name].title, settings.get(name, {})) for name, cls in self._classes.items()}

    def override(self, settings: Settings) -> dict[str, Any]:
        """The plugins with some options changed, for one layer."""
        plugins = dict(self.active)
        for name, given in settings.items():
            if name not in plugins:
                raise UsageError(f"options are set for plugin '{name}', which is not chosen; {nearest(name, plugins)}")
            plugins[name] = changed(plugins[name], self.found[name].title, given)
        return plugins

    def bind(self, hook: str, plugins: Mapping[str, Any] | None = None) -> tuple[Bound, ...]:
        """The implementations of a hook in the order typed, as plain bound methods."""
        return tuple(
            Bound(name, getattr(plugin, hook), tuple(inspect.signature(getattr(plugin, hook)).parameters))
            for name, plugin in (plugins or self.active).items()
            if _marks(type(plugin), hook) is not None
        )

    def check(self, setup: Setup) -> None:
        """Ask every plugin whether this mix makes sense; all objections are one UsageError. Remarks are kept."""
        from .stats import Finding

        objections = self._unmet(setup.plugins)
        for bound in self.bind("moe_check", setup.plugins):
            said = self.ask(bound, str | Finding | None, {"setup": setup})
            if isinstance(said, Finding):
                self.remarks[bound.plugin] = said
            elif said:
                objections.append(said)
        if objections:
            raise UsageError("; ".join(objections))

    def _unmet(self, plugins: Mapping[str, Any]) -> list[str]:
        """What chosen plugins need and the router does not give, as sentences."""
        (router,) = (bound.plugin for bound in self.bind("moe_router", plugins))
        given = getattr(plugins[router], "gives", USUAL)
        return [
            f"{self.found[name].title} needs {TRAITS[trait]}, which router '{router}' does not give; "
            f"choose another router, or leave {name} away"
            for name in plugins
            if name in self.chosen and getattr(plugins[name], "weight", True)
            for trait in getattr(plugins[name], "needs", ())
            if trait not in given
        ]

    def ask(self, bound: Bound, kind: Any, offer: Mapping[str, Any]) -> Any:
        """A plugin's answer, which must be an instance of `kind`. Raises PluginError, naming plugin and hook."""
        one, hook = self.found[bound.plugin], bound.function.__name__
        origin = f"{one.title} ({one.distribution} {one.version})"
        try:
            answer = bound(offer)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{origin} fails in {hook}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, kind):
            name = getattr(kind, "__name__", str(kind).replace("moe_engine.parts.", ""))
            raise PluginError(f"{origin}: {hook} answers {answer!r}, which is no {name}")
        return answer

    def options(self) -> Settings:
        """Every option of every active plugin, as set."""
        return {name: values_of(plugin) for name, plugin in self.active.items()}

    def records(self) -> list[dict[str, str]]:
        """Name, distribution and version of every active plugin, for a run's record."""
        return [
            {"name": one.name, "distribution": one.distribution, "version": one.version} for one in self.found.values()
        ]

    def culprit(self, error: BaseException) -> str | None:
        """Which plugin an exception came out of ("loss 'x' (dist 1.0) in moe_aux_loss"), or None."""
        names = {type(plugin): name for name, plugin in self.active.items()}
        files = {inspect.getfile(cls): name for cls, name in names.items()}
        blamed, sure, trace = None, False, error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            own = names.get(type(trace.tb_frame.f_locals.get("self")))  # one file may hold several plugins
            name = own or (None if sure else files.get(code.co_filename))
            if name is not None:
                where = code.co_name if blamed is None or not blamed[1].startswith("moe_") else blamed[1]
                blamed, sure = (self.found[name], where), sure or own is not None
            trace = trace.tb_next
        return f"{blamed[0].title} ({blamed[0].distribution} {blamed[0].version}) in {blamed[1]}" if blamed else None


def _chosen(names: Iterable[str], installed: Mapping[str, list[Found]]) -> list[str]:
    chosen: list[str] = []
    for name in names:
        if name in chosen:
            raise UsageError(f"plugin '{name}' is named twice")
        if pick(name, installed).kind == "task":
            raise UsageError(f"'{name}' is a task; name it with --task {name}")
        chosen.append(name)
    return chosen


def _task(name: str, installed: Mapping[str, list[Found]]) -> Found:
    tasks = {one: all_found for one, all_found in installed.items() if any(f.kind == "task" for f in all_found)}
    if name not in tasks and name not in disabled():
        raise UsageError(f"there is no task '{name}'; {nearest(name, tasks)}")
    return pick(name, installed)


def broken() -> dict[str, str | None]:
    """Every installed plugin, imported and built with its defaults: None, or what is wrong with it."""
    verdicts: dict[str, str | None] = {}
    installed = find()
    for name in installed:
        try:
            found = pick(name, installed)
            build(load(found), found.title, {})
            verdicts[name] = None
        except UsageError as error:
            verdicts[name] = str(error)
    return verdicts
