"""The plugins of one engine: load, check, configure, order and bind them; refuse mixes that make no sense.

Nothing here imports torch, and only the chosen plugins are imported.
"""

import inspect
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from ..contract import hookspecs
from ..contract.hookspecs import HOOKS
from ..contract.options import Settings, build, changed, values_of
from ..contract.setup import Bound, Setup
from ..contract.traits import ROUTER_TRAITS, provided_by, traits_of, weight_of
from ..errors import PluginError, UsageError, listed, nearest
from .discovery import Found, defaults, disabled, find, implements, load, pick

if TYPE_CHECKING:
    from ..contract.stats import Finding


class Manager(pluggy.PluginManager):
    """Looks for our hooks alone among a plugin's attributes, not at each of them."""

    def __init__(self) -> None:
        super().__init__("moe_engine")
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None


class Plugins:
    """The plugins of one engine: chosen, loaded, configured, in the order typed.

    names: as typed. without: chosen or default plugins to leave out. settings: option values by plugin and option.
    task: the task plugin's name, if there is a task. Raises UsageError if anything is wrong with one of them.
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
        self.of_model: str | None = None  # the router that decides as a model's own blocks do
        self.manager = Manager()
        for name in set(without) - disabled():
            self.manager.set_blocked(pick(name, installed).name)
        for name in disabled():
            self.manager.set_blocked(name)
        for name in _chosen(names, installed):
            self._add(pick(name, installed))
        self.chosen = set(self._classes) - set(without)
        self.given = settings or {}
        if task is not None:
            self._add(_task(task, installed))
        self._add_defaults(installed)
        self.active = self._configured(settings or {}, installed)
        self._register()

    def _register(self) -> None:
        # pluggy calls last-in first-out: registered backwards, its order is the order typed
        for name in reversed(self.active):
            self.manager.register(self.active[name], name)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, without the manager, which holds modules."""
        return {name: value for name, value in vars(self).items() if name != "manager"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.manager = Manager()
        self._register()

    def _add(self, found: Found) -> None:
        if found.name not in self._classes and not self.manager.is_blocked(found.name):
            self._classes[found.name] = load(found)
            self.found[found.name] = found

    def _add_defaults(self, installed: Mapping[str, list[Found]]) -> None:
        usual = defaults()
        routers = [name for name, cls in self._classes.items() if implements(cls, "moe_router")]
        if len(routers) > 1:
            message = f"a layer has one router, but {listed(map(repr, routers))} are all routers; choose one"
            raise UsageError(message, code="several-routers")
        if not routers:
            self._add_default(usual["router"], installed)
        if not routers and usual["router"] not in self._classes:
            raise UsageError("no router is left; name one with --plugins", code="no-router")
        if not any(implements(cls, "moe_new_expert") for cls in self._classes.values()):
            self._add_default(usual["initializer"], installed)
        for name in (*usual["metrics"], *usual["reports"]):
            self._add_default(name, installed)

    def _add_default(self, name: str, installed: Mapping[str, list[Found]]) -> None:
        if not self.manager.is_blocked(name):
            self._add(pick(name, installed))

    @property
    def default_router(self) -> str | None:
        """The router, if neither it nor an option of it was chosen."""
        name = next(name for name, cls in self._classes.items() if implements(cls, "moe_router"))
        return None if name in self.chosen or name in self.given else name

    def replace_router(self, name: str) -> None:
        """Use another router instead of the default one, for the blocks of a model, which set its options."""
        default = self.default_router
        if default is not None:
            self.of_model = name
        if default in (None, name):
            return
        found = pick(name, find())
        self._classes = {name if old == default else old: cls for old, cls in self._classes.items()}
        self._classes[name] = load(found)
        self.found = {name if old == default else old: one for old, one in self.found.items()} | {name: found}
        made = self._made(name, self._classes[name], {})
        self.active = {name if old == default else old: one for old, one in self.active.items()} | {name: made}
        self.manager = Manager()
        self._register()

    def _configured(self, settings: Settings, installed: Mapping[str, list[Found]]) -> dict[str, Any]:
        for name in settings:
            if name not in self._classes:
                if name in installed:
                    message = f"options are set for plugin '{name}', which is not chosen; add it to --plugins"
                    raise UsageError(message, code="plugin-not-chosen")
                message = f"options are set for plugin '{name}', which does not exist; {nearest(name, self._classes)}"
                raise UsageError(message, code="unknown-plugin")
        return {name: self._made(name, cls, settings.get(name, {})) for name, cls in self._classes.items()}

    def _made(self, name: str, cls: type, given: Mapping[str, Any]) -> Any:
        """A plugin with these options. Raises PluginError if its constructor fails."""
        try:
            return build(cls, self.found[name].title, given)
        except UsageError as error:
            cause = error.__cause__
            trace = cause.__traceback__ if cause else None
            while trace is not None and trace.tb_frame.f_code.co_filename != file_of(cls):
                trace = trace.tb_next
            if trace is None:  # an option out of its bounds
                raise
            message = f"{self.origin(name)} fails in its constructor: {type(cause).__name__}: {cause}"
            raise PluginError(message, code="plugin-failed") from cause

    def override(self, settings: Settings) -> dict[str, Any]:
        """The plugins with some options changed, for one layer."""
        plugins = dict(self.active)
        for name, given in settings.items():
            if name not in plugins:
                message = f"options are set for plugin '{name}', which is not chosen; {nearest(name, plugins)}"
                raise UsageError(message, code="plugin-not-chosen")
            plugins[name] = changed(plugins[name], self.found[name].title, given)
        return plugins

    def bind(self, hook: str, plugins: Mapping[str, Any] | None = None) -> tuple[Bound, ...]:
        """The implementations of a hook in the order typed, as plain bound methods."""
        return tuple(
            Bound(name, getattr(plugin, hook), tuple(inspect.signature(getattr(plugin, hook)).parameters))
            for name, plugin in (plugins or self.active).items()
            if implements(type(plugin), hook)
        )

    def check(self, setup: Setup) -> None:
        """Ask every plugin whether this combination makes sense. Raises one UsageError for all objections."""
        from ..contract.stats import Finding

        objections = self._unmet(setup.plugins)
        for bound in self.bind("moe_check", setup.plugins):
            answer = self.ask(bound, str | Finding | None, {"setup": setup})
            if isinstance(answer, Finding):
                self.remarks[bound.plugin] = answer
            elif answer:
                objections.append(answer)
        if objections:
            raise UsageError("; ".join(objections), code="mix-refused")

    def _unmet(self, plugins: Mapping[str, Any]) -> list[str]:
        """A sentence for each trait that a chosen plugin requires and the router does not provide."""
        (router,) = (bound.plugin for bound in self.bind("moe_router", plugins))
        provided = provided_by(plugins[router])
        return [
            f"{self.found[name].title} needs {ROUTER_TRAITS[trait]}, which router '{router}' does not provide; "
            f"choose another router or remove {name}"
            for name in plugins
            if name in self.chosen and weight_of(plugins[name])
            for trait in traits_of(plugins[name]).requires
            if trait not in provided
        ]

    def ask(self, bound: Bound, kind: Any, offer: Mapping[str, Any]) -> Any:
        """Call a plugin's hook, which must return a `kind`. Raises PluginError, naming plugin and hook."""
        origin, hook = self.origin(bound.plugin), bound.function.__name__
        try:
            answer = bound(offer)
        except (UsageError, KeyboardInterrupt):
            raise
        except BaseException as error:
            message = f"{origin} fails in {hook}: {type(error).__name__}: {error}"
            raise PluginError(message, code="plugin-failed") from error
        if not isinstance(answer, kind):
            name = getattr(kind, "__name__", str(kind).replace("moe_engine.contract.parts.", ""))
            raise PluginError(f"{origin}: {hook} returned {answer!r}, not a {name}", code="hook-wrong-type")
        return answer

    def options(self) -> Settings:
        """Every option of every active plugin, as set, but those of a router that a model brings along."""
        return {name: values_of(plugin) for name, plugin in self.active.items() if name != self.of_model}

    def records(self) -> list[dict[str, str]]:
        """Name, distribution and version of every active plugin, for a run's record."""
        return [
            {"name": found.name, "distribution": found.distribution, "version": found.version}
            for found in self.found.values()
        ]

    def described(self) -> list[dict[str, str]]:
        """The `records` with each plugin's kind, and its docstring under "about"."""
        return [
            {
                **record,
                "kind": self.found[record["name"]].kind,
                "about": inspect.getdoc(type(self.active[record["name"]])) or "",
            }
            for record in self.records()
        ]

    def fingerprints(self) -> dict[str, str]:
        """A digest of each active plugin's source file, which tells when an editable one was edited."""
        files = {name: Path(file_of(type(plugin))) for name, plugin in self.active.items()}
        return {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}

    def origin(self, name: str) -> str:
        """A plugin in error messages: "loss 'x' (dist 1.0)"."""
        found = self.found[name]
        return f"{found.title} ({found.distribution} {found.version})"

    def culprit(self, error: BaseException, parts: Iterable[tuple[Any, str]] = ()) -> str | None:
        """The plugin that raised an exception, as "loss 'x' (dist 1.0) in moe_aux_loss", or None.

        parts: objects that plugins made, each with its plugin's name, or with the hook that only one implements. The
        frames tell: a method of a plugin or of a part names its plugin; otherwise the file does, if it holds only one.
        """
        implementing = {hook: self.bind(hook) for hook in ("moe_router", "moe_experts")}
        owners = {id(part): name for part, name in parts if name in self.active}
        for part, hook in parts:
            owners |= {id(part): bound.plugin for bound in implementing.get(hook, ())}
        owners |= {id(plugin): name for name, plugin in self.active.items()}
        hooks = {bound.function.__code__: hook for hook in HOOKS for bound in self.bind(hook)}
        files = [file_of(type(plugin)) for plugin in self.active.values()]
        alone = {file: name for file, name in zip(files, self.active, strict=True) if files.count(file) == 1}
        blamed: tuple[str, str] | None = None
        trace = error.__traceback__
        while trace is not None:
            frame, code = trace.tb_frame, trace.tb_frame.f_code
            owner = owners.get(id(frame.f_locals.get("self"))) or alone.get(code.co_filename)
            if owner is not None and (blamed is None or blamed[0] != owner or blamed[1].startswith("_")):
                blamed = owner, hooks.get(code, code.co_name)  # first comes torch's _call_impl of a part
            trace = trace.tb_next
        return f"{self.origin(blamed[0])} in {blamed[1]}" if blamed else None


def file_of(cls: type) -> str:
    """The source file of a class; empty for one that no file defines, as in an interactive session."""
    try:
        return inspect.getfile(cls)
    except (OSError, TypeError):
        return ""


def _chosen(names: Iterable[str], installed: Mapping[str, list[Found]]) -> list[str]:
    chosen: list[str] = []
    for name in names:
        if name in chosen:
            raise UsageError(f"plugin '{name}' is named twice", code="duplicate-plugin")
        kind = pick(name, installed).kind
        if kind == "task":
            raise UsageError(f"'{name}' is a task; name it with --task {name}", code="task-among-plugins")
        if kind == "family":
            message = f"'{name}' is a family; watch() and adopt() find it by the model's type"
            raise UsageError(message, code="family-among-plugins")
        chosen.append(name)
    return chosen


def _task(name: str, installed: Mapping[str, list[Found]]) -> Found:
    tasks = [known for known, offers in installed.items() if any(offer.kind == "task" for offer in offers)]
    if name not in tasks and name not in disabled():
        raise UsageError(f"there is no task '{name}'; {nearest(name, tasks)}", code="unknown-task")
    return pick(name, installed)


def broken() -> dict[str, str | None]:
    """Every installed plugin, imported and built with its defaults: None, or the problem."""
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
