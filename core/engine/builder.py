"""Building a layer: ask the plugins for its parts, check them and assemble the layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
from torch import nn

from ..contract.options import Settings
from ..contract.parts import Bias, Experts, Part, Router
from ..contract.routing import Spec
from ..contract.setup import Setup
from ..contract.traits import EFFECTS, weight_of
from ..errors import PluginError, UsageError, listed, nearest
from ..layer.dense import dense_twin
from ..layer.experts import ModuleBank, StackedMLP
from ..layer.moe import MoE
from ..registry.manager import Plugins

Built = TypeVar("Built")

# the hooks that act on one layer, whose options can therefore be set per layer
LAYER_HOOKS = ("router", "bias", "experts", "state", "aux_loss", "measure", "new_expert", "metrics")


def spec_of(sizes: Mapping[str, Any]) -> Spec:
    """The spec with these sizes. Raises UsageError."""
    try:
        return Spec(**sizes)
    except TypeError as error:
        raise UsageError(f"a layer can't be built: {error}", code="bad-layer-spec") from error


@attrs.define(eq=False)
class LayerBuild:
    """Builds one layer: `layer()`, or `twin()`, the MLP that replaces it in a dense model.

    chosen: the engine's plugins. settings: plugin options for this layer alone. modules: one module per expert, or
    None for a plugin's bank or stacked MLPs. The rest is for a layer over the tensors of a foreign block: bank: instead
    of all those. borrow: what becomes of the router. extra: biases of the first level by name, next to the plugins'.
    Raises UsageError for a combination that makes no sense.
    """

    chosen: Plugins
    spec: Spec
    name: str
    settings: Settings
    modules: Sequence[nn.Module] | None = None
    bank: Experts | None = None
    borrow: Callable[[Router], Router] | None = None
    extra: Mapping[str, Bias] = attrs.field(factory=dict)
    plugins: Mapping[str, Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        spec = self.spec
        if spec.dim < 1 or (spec.hidden < 1 and (not (self.modules or self.bank) or spec.shared)):
            message = f"a layer of dim={spec.dim} and hidden={spec.hidden} is empty; both must be at least 1"
            raise UsageError(message, code="empty-layer")
        self.plugins = self.chosen.override(self.settings)
        for plugin in self.settings:
            if not any(hasattr(self.plugins[plugin], f"moe_{hook}") for hook in LAYER_HOOKS):
                message = f"'{plugin}' acts on the whole engine, so it can't be set for one layer"
                raise UsageError(message, code="not-a-layer-plugin")
        self.chosen.check(Setup(self.plugins, spec))

    def layer(self) -> MoE:
        """The layer. Raises PluginError if a plugin fails."""
        return self._blaming(self._layer)

    def twin(self) -> nn.Module:
        """One MLP as wide as the experts that a token is sent to; one expert if a plugin provides the bank."""
        return self._blaming(lambda: dense_twin(self.spec, self._bank))

    def _blaming(self, build: Callable[[], Built]) -> Built:
        """build(); an exception is re-raised with the name of the plugin that it came from."""
        try:
            return build()
        except (UsageError, KeyboardInterrupt):
            raise
        except BaseException as error:
            (router,) = (bound.plugin for bound in self.chosen.bind("moe_router", self.plugins))
            blamed = self.chosen.culprit(error) or f"layer '{self.name}' with router '{router}'"
            message = f"{blamed} can't be built: {type(error).__name__}: {error}"
            raise PluginError(message, code="layer-not-built") from error

    def _layer(self) -> MoE:
        ((plugin, router),) = self._ask("moe_router", Router, spec=self.spec)
        _check_keeps_function(plugin, router)
        router = router if self.borrow is None else self.borrow(router)
        biases: list[dict[str, Bias]] = [
            dict(self._ask("moe_bias", Bias | None, spec=self.spec, level=level)) for level in router.levels
        ]
        bank = self.bank or self._bank(self.spec)
        self._check_biases(router, biases)
        if biases:
            biases[0] = {**self.extra, **biases[0]}
        weights = {name: weight_of(plugin) for name, plugin in self.plugins.items()}
        return MoE(
            self.spec,
            router,
            biases,
            StackedMLP(self.spec) if bank is None else bank,
            states=dict(self._ask("moe_state", Part | None, spec=self.spec)),
            losses=[bound for bound in self.chosen.bind("moe_aux_loss", self.plugins) if weights[bound.plugin]],
            measures=self.chosen.bind("moe_measure", self.plugins),
            weights=weights,
            settings=self.settings,
            name=self.name,
        )

    def _ask(self, hook: str, kind: Any, **offer: Any) -> list[tuple[str, Any]]:
        """(plugin, part) for each implementation of a hook that returns one."""
        bounds = self.chosen.bind(hook, self.plugins)
        answers = [(bound.plugin, self.chosen.ask(bound, kind, offer)) for bound in bounds]
        return [(plugin, part) for plugin, part in answers if part is not None]

    def _bank(self, spec: Spec) -> Experts | None:
        """The bank of the given modules or from a plugin; None for stacked MLPs."""
        if self.modules is not None:
            return ModuleBank(self.modules[: spec.experts], spec.out_dim)
        banks: dict[str, Experts] = dict(self._ask("moe_experts", Experts | None, spec=spec))
        if len(banks) > 1:
            message = f"a layer has one bank of experts, but {listed(map(repr, banks))} provide one; choose one"
            raise UsageError(message, code="several-banks")
        return next(iter(banks.values()), None)

    def _check_biases(self, router: Router, biases: Sequence[Mapping[str, Bias]]) -> None:
        for level, by_plugin in zip(router.levels, biases, strict=True):
            for plugin, bias in by_plugin.items():
                if (shape := list(bias().shape)) != [level.size]:
                    why = f"its forward returns {shape}, but level '{level.name}' has {level.size} units"
                    raise PluginError(f"bias '{plugin}' can't be used: {why}", code="bias-wrong-shape")
        acting = {plugin for by_plugin in biases for plugin in by_plugin}
        for bound in self.chosen.bind("moe_bias", self.plugins):
            if bound.plugin not in acting:
                message = f"bias '{bound.plugin}' has no effect: it does not act on any level of the router"
                raise UsageError(message, code="acts-on-nothing")


def _check_keeps_function(plugin: str, router: Router) -> None:
    for effect in router.keeps_function:
        if effect not in EFFECTS:
            message = f"router '{plugin}': keeps_function has unknown effect '{effect}'; {nearest(effect, EFFECTS)}"
            raise PluginError(message, code="unknown-trait")


def layer_name(wanted: str | None, layers: Iterable[MoE], count: int) -> str:
    """A unique name for a new layer, "moeN" unless one is given. Raises UsageError."""
    name = wanted or f"moe{count}"
    if any(layer.name == name for layer in layers):
        message = f"there is a layer '{name}' already; give this one another name"
        raise UsageError(message, code="duplicate-layer")
    return name


def owned_parts(layer: MoE) -> Iterator[tuple[Part, str]]:
    """A layer's parts that plugins made, with the names of their plugins; the router and the bank with their hooks."""
    yield layer.router, "moe_router"
    yield layer.experts, "moe_experts"
    for biases in layer.bias_levels():
        yield from ((bias, name) for name, bias in biases.items())
    yield from ((state, name) for name, state in layer.parts_of_plugins().items())
