"""The engine: builds layers from plugins, and owns the order of events around a training step.

Sequence: forward; (task_loss + engine.aux_loss()).backward(); engine.after_backward() for each
micro-batch; then unscale, clip, optimizer.step(); engine.after_step(skipped=False) once. Growth comes
after that: optimizer.zero_grad(), then engine.grow() for what engine.due() answers.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract.growth import Grown, Growth
from ..contract.history import History
from ..contract.numerics import count_by
from ..contract.options import Settings, parse_settings
from ..contract.parts import Bias, Experts, Part, Router
from ..contract.routing import Routing, Spec
from ..contract.setup import Bound, Setup
from ..contract.stats import Effects, Finding, Metrics, Stats, Step, merged
from ..contract.tasks import TaskSpec
from ..contract.traits import traits_of, weight_of
from ..errors import PluginError, UsageError, listed
from ..growth.transaction import stage
from ..growth.triggers import Triggers
from ..layer.dense import dense_twin
from ..layer.effects import effects_of, without_gradient
from ..layer.experts import ModuleBank, StackedMLP
from ..layer.ledger import Anchor
from ..layer.moe import MoE, numel, unflat
from ..layer.probing import observe
from ..processes import all_reduce_sum, distributed, mean_scalar_over_ranks
from ..registry.discovery import WATCHING
from ..registry.manager import Plugins
from ..seeds import generator
from .growing import grow, initializers

IN_DENSE = (*WATCHING, "experts")  # the kinds of plugins that act in a dense model
# the hooks that act on one layer, so that its settings can change them
OF_LAYERS = ("router", "bias", "experts", "state", "aux_loss", "measure", "new_expert", "metrics")


class Engine:
    """Chosen plugins, and the layers built from them.

    plugins: names in the order typed, comma-separated or as a list. settings: "plugin.option=value"
    texts, or nested dicts. without: names of default plugins to leave out. task: name of a task
    plugin. seed: fixes what new experts draw. dense: build in the place of each layer one MLP of the width that is
    active for a token; of experts that a plugin brings, one, for top_k=1 alone. spec: defaults of every layer
    (experts, top_k, capacity, ...). Raises UsageError.

    step: optimizer steps so far. growths: what has grown, oldest first.
    """

    def __init__(
        self,
        plugins: str | Iterable[str] = (),
        settings: Iterable[str] | Settings = (),
        without: Iterable[str] = (),
        task: str | None = None,
        seed: int = 0,
        dense: bool = False,
        **spec: Any,
    ) -> None:
        names = [name.strip() for name in plugins.split(",") if name.strip()] if isinstance(plugins, str) else plugins
        names = list(names)
        self.plugins = Plugins(names, without, _settings(settings), task)
        self.defaults, self.seed, self.dense = spec, seed, dense
        acting = [name for name, found in self.plugins.found.items() if name in names and found.kind not in IN_DENSE]
        if dense and acting:
            raise UsageError(f"a dense model has no router: {listed(map(repr, acting))} acts on nothing")
        self.step = 0
        self.growths: list[Grown] = []
        self.remembered: dict[str, dict[str, dict[str, Any]]] = {}  # by layer, metric plugin and split
        self.triggers = Triggers(self.plugins.bind("moe_growth"))
        self._layers: list[weakref.ref[MoE]] = []
        self._anchored = False  # aux_loss() took part in a backward of this step
        self._closed = True  # after_backward() followed the last backward

    def implementing(self, hook: str) -> list[str]:
        """The chosen plugins that implement a hook, in the order typed."""
        return [bound.plugin for bound in self.plugins.bind(hook)]

    def check(self, task: TaskSpec) -> None:
        """Ask every plugin whether this mix makes sense, before anything is built. Raises UsageError."""
        self.plugins.check(Setup(self.plugins.active, self._spec(dim=0, hidden=0), task))

    # -- layers ----------------------------------------------------------------------------------

    def moe(
        self,
        dim: int,
        hidden: int = 0,
        *,
        modules: Sequence[nn.Module] | None = None,
        settings: Iterable[str] | Settings = (),
        name: str | None = None,
        **spec: Any,
    ) -> MoE:
        """Build a layer: [..., dim] -> [..., dim or out]. Raises UsageError for a mix that makes no sense.

        hidden: H of the stacked experts. modules: any modules as experts instead, one each. settings:
        plugin options of this layer alone. spec: see `Spec`.
        """
        if modules is not None:
            spec["experts"] = len(modules)
        name = name or f"moe{len(self._layers)}"
        if any(layer.name == name for layer in self.layers):
            raise UsageError(f"there is a layer '{name}' already; give this one another name")
        settings = _settings(settings)
        layer_spec = self._spec(dim=dim, hidden=hidden, **spec)
        if dim < 1 or (hidden < 1 and (modules is None or layer_spec.shared)):
            raise UsageError(f"a layer of dim={dim} and hidden={hidden} is empty; both must be at least 1")
        plugins = self.plugins.override(settings)
        for plugin in settings:
            if not any(hasattr(plugins[plugin], f"moe_{hook}") for hook in OF_LAYERS):
                raise UsageError(f"'{plugin}' acts on the whole engine, so it can't be set for one layer")
        self.plugins.check(Setup(plugins, layer_spec))
        try:
            if self.dense:
                twin = dense_twin(layer_spec, lambda one: self._bank(one, plugins, modules))
                return twin  # type: ignore[return-value]  # a model calls both alike
            layer = self._build(layer_spec, plugins, modules, settings, name)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            (router,) = (bound.plugin for bound in self.plugins.bind("moe_router", plugins))
            who = self.plugins.culprit(error) or f"layer '{name}' with router '{router}'"
            raise PluginError(f"{who} can't be built: {type(error).__name__}: {error}") from error
        self._rehearse_growth(layer)
        self._layers.append(weakref.ref(layer))
        return layer

    def _rehearse_growth(self, layer: MoE) -> None:
        """Where a trigger is chosen, what can't grow is to fail when the layer is built."""
        triggers = [self.plugins.active[bound.plugin] for bound in self.triggers.bounds]
        for parent in {None if traits_of(trigger).orphans else 0 for trigger in triggers}:
            growth, random = Growth(layer.name, (parent,)), generator(self.seed, "rehearsal")
            stage(layer, (), growth, initializers(self.plugins, layer), random)

    def _spec(self, **own: Any) -> Spec:
        try:
            return Spec(**{**self.defaults, **own})
        except TypeError as error:
            raise UsageError(f"a layer can't be built: {error}") from error

    def _build(
        self,
        spec: Spec,
        plugins: Mapping[str, Any],
        modules: Sequence[nn.Module] | None,
        settings: Settings,
        name: str,
    ) -> MoE:
        def ask(hook: str, kind: Any, **offer: Any) -> list[tuple[str, Any]]:
            bounds = self.plugins.bind(hook, plugins)
            answers = [(bound.plugin, self.plugins.ask(bound, kind, offer)) for bound in bounds]
            return [(plugin, answer) for plugin, answer in answers if answer is not None]

        ((_, router),) = ask("moe_router", Router, spec=spec)
        biases: list[dict[str, Bias]] = [
            dict(ask("moe_bias", Bias | None, spec=spec, level=level)) for level in router.levels
        ]
        bank = self._bank(spec, plugins, modules)
        experts = StackedMLP(spec) if bank is None else bank
        for level, answers in zip(router.levels, biases, strict=True):
            for plugin, bias in answers.items():
                if (shape := list(bias().shape)) != [level.size]:
                    why = f"its forward answers {shape}, but level '{level.name}' has {level.size} units"
                    raise PluginError(f"bias '{plugin}' can't be used: {why}")
        weights = {plugin: weight_of(instance) for plugin, instance in plugins.items()}
        used = {plugin for level in biases for plugin in level}
        for bound in self.plugins.bind("moe_bias", plugins):
            if bound.plugin not in used:
                raise UsageError(f"bias '{bound.plugin}' acts on nothing: the router has no level that it can shift")
        layer = MoE(
            spec,
            router,
            biases,
            experts,
            states=dict(ask("moe_state", Part | None, spec=spec)),
            losses=[bound for bound in self.plugins.bind("moe_aux_loss", plugins) if weights[bound.plugin]],
            measures=self.plugins.bind("moe_measure", plugins),
            weights=weights,
            settings=settings,
            name=name,
        )
        return layer

    def _bank(self, spec: Spec, plugins: Mapping[str, Any], modules: Sequence[nn.Module] | None) -> Experts | None:
        """The bank of the modules given, or that a plugin answers; None for a stacked MLP."""
        if modules is not None:
            return ModuleBank(modules[: spec.experts], spec.out_dim)
        bounds = self.plugins.bind("moe_experts", plugins)
        banks = {bound.plugin: self.plugins.ask(bound, Experts | None, {"spec": spec}) for bound in bounds}
        brought: dict[str, Experts] = {plugin: bank for plugin, bank in banks.items() if bank is not None}
        if len(brought) > 1:
            raise UsageError(f"a layer has one bank of experts, but {listed(map(repr, brought))} bring one; choose one")
        return next(iter(brought.values()), None)

    def attach(self, model: nn.Module) -> "Engine":
        """Own every MoE layer in `model`, also a deep-copied one, and no other; name each by its place."""
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
        mine = self.layers
        for name, layer in found:
            layer.name = name or layer.name
            if layer not in mine:
                layer.new_copy_id()  # it is no mere copy of a layer any more
        self._layers = [weakref.ref(layer) for _, layer in found]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        """A copy with the same plugins; it owns the copies of the layers that are made along with it, or none."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.plugins = copy.deepcopy(self.plugins, memo)
        twin.triggers = Triggers(twin.plugins.bind("moe_growth"), copy.deepcopy(self.triggers.memory))
        twin.growths, twin.remembered = list(self.growths), copy.deepcopy(self.remembered)
        twins = [copy.deepcopy(layer, memo) for layer in self.layers]
        for layer in twins:
            layer.new_copy_id()
        twin._layers = [weakref.ref(layer) for layer in twins]
        return twin

    @property
    def layers(self) -> list[MoE]:
        """The layers that are still alive, in the order in which they were built or attached."""
        return [layer for layer in (ref() for ref in self._layers) if layer is not None]

    # -- around a step ---------------------------------------------------------------------------

    def aux_loss(self) -> Tensor:
        """The weighted auxiliary loss of the forwards since the last call, averaged over layers.

        Add it to the task loss. Its backward lets the layers inject their gradients, scaled as the whole loss is.
        """
        layers = self.layers
        value = torch.stack([layer.aux_value for layer in layers]).mean() if layers else torch.zeros(())
        leaf = torch.zeros((), device=value.device, requires_grad=True)
        for layer in layers:
            layer.aux_value.zero_()
        answer: Tensor = Anchor.apply(leaf, value, self._enter, *[layer.aux_scale for layer in layers])
        return answer

    def _enter(self) -> None:
        self._anchored, self._closed = True, False

    def after_backward(self) -> None:
        """Call after each micro-batch's backward."""
        for layer in self.layers:
            layer.aux_scale.data.zero_()  # .data: another forward's backward may still be to come
            layer.aux_value.zero_()
        self._closed = True

    @torch.no_grad()
    def after_step(self, skipped: bool = False) -> None:
        """Call once after optimizer.step(): every controller acts here, and nowhere else.

        skipped: the optimizer did not step (GradScaler found inf): the step's sums are thrown away.
        Raises RuntimeError if `aux_loss()` took part in no backward, or `after_backward()` was not called.
        """
        booked = [layer for layer in self.layers if layer.step_sums.grad is not None]
        if any(layer.losses for layer in booked) and not self._anchored:
            raise RuntimeError("engine.aux_loss() entered no loss: use (loss + engine.aux_loss()).backward()")
        if self._anchored and self.layers and not booked:
            raise RuntimeError(
                "engine.aux_loss() entered a loss, but no layer did: engine.attach(model) finds the layers"
            )
        if not self._closed:
            raise RuntimeError("call engine.after_backward() after each backward, before engine.after_step()")
        self._anchored = False
        # all processes must reduce the same layers, also those that one of them did not use
        for layer in self.layers if distributed() else booked:
            sums = torch.zeros_like(layer.step_sums) if layer.step_sums.grad is None else layer.step_sums.grad.detach()
            layer.step_sums.grad = None
            all_reduce_sum(sums)
            if not skipped:
                self.apply_controllers(layer, sums)
        self.step += not skipped

    def apply_controllers(self, layer: MoE, flat: Tensor) -> None:
        """Let one layer's controllers act on the sums of a step, `layer.training_sums` and signals."""
        named = unflat(flat, layer.training_layout)
        layer.last_terms = {name.removeprefix("loss."): v for name, v in named.items() if name.startswith("loss.")}
        flat = torch.where(flat.isfinite().all(), flat, 0)  # nothing that is not finite reaches a state
        size = numel(layer.training_layout)
        if layer.train_sums is None:
            layer.train_sums = torch.zeros(size, dtype=layer.eval_sums.dtype, device=flat.device)
        layer.train_sums += flat[:size]
        if self.triggers.bounds:
            load_E = unflat(flat, layer.training_layout)["load"].to(layer.eval_sums.dtype)
            layer.load_since_growth = load_E if layer.load_since_growth is None else layer.load_since_growth + load_E
        named, signals = unflat(flat, layer.training_layout), _signals(layer, flat[size:])
        states = layer.parts_of_plugins()
        own_parts = [*(bias for level in layer.bias_levels() for bias in level.values()), *states.values()]
        grad_E = _expert_grad(layer) if any(part.wants_expert_grad for part in own_parts) else None
        for index, level in enumerate(layer.router.levels):
            for name, bias in layer.bias_levels()[index].items():
                prefix = f"{level.name}/{name}/"
                own = {key.removeprefix(prefix): v for key, v in named.items() if key.startswith(prefix)}
                bias.after_step(_step(layer, level.name, named["load"], own, signals.get((index, name)), grad_E))
        for name, state in states.items():
            own = {key.removeprefix(f"{name}."): v for key, v in named.items() if key.startswith(f"{name}.")}
            state.after_step(Step(named["load"], own, expert_grad=grad_E))

    def last_terms(self) -> dict[str, Tensor]:
        """The loss terms of the last step by name and layer, [1] each, as they were, finite or not."""
        return {f"'{term}' of layer '{layer.name}'": v for layer in self.layers for term, v in layer.last_terms.items()}

    # -- growth ----------------------------------------------------------------------------------

    def due(self, loss: Tensor | float, eval_loss: Tensor | float | None = None) -> list[Growth]:
        """What the triggers want to grow now, for `grow`; ask once after each `after_step`.

        loss: the task's of this step. eval_loss: of an evaluation, where there was one since the last
        call. Both are averaged over processes, so that all decide alike.
        """
        if not self.triggers.bounds or not self.layers:
            return []
        device = self.layers[0].step_sums.device
        losses = (
            mean_scalar_over_ranks(loss, device),
            None if eval_loss is None else mean_scalar_over_ranks(eval_loss, device),
        )
        return self.triggers.ask(History(self.step, *losses, self.layers, self.growths))

    def grow(
        self,
        growth: Growth,
        optimizers: Optimizer | Iterable[Optimizer] = (),
        followers: nn.Module | Iterable[nn.Module] = (),
        probe: Callable[[], Tensor] | None = None,
    ) -> Grown:
        """Grow, remove or replace experts of a layer, its optimizers' state with them: all of it or nothing.

        Parameters stay the same objects, so that optimizers, schedulers and lists of them stay true.
        optimizers: every one that holds the layer's parameters. followers: models with a copy of the
        layer, as an average of the weights, which grow alike; and a DistributedDataParallel, which is
        to be built anew afterwards. probe: as in `metrics`; on it the change of the layer and of the loss
        are measured. Where there are several processes, all must call it. Raises UsageError if it
        makes no sense, or would leave a living holder of the parameters behind.
        """
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        followers = [followers] if isinstance(followers, nn.Module) else list(followers)
        return grow(self, growth, optimizers, followers, probe)

    @property
    def in_step(self) -> bool:
        """Whether a backward has been and `after_step` has not."""
        return self._anchored

    # -- measuring -------------------------------------------------------------------------------

    def metrics(self, split: str = "train", probe: Callable[[], Tensor] | None = None) -> dict[str, Metrics]:
        """What every metric plugin says of each layer, since the last call for this split.

        split: "train" (steps) or "eval" (forwards in eval mode). probe: runs the model on a fixed
        held-out batch in eval mode and answers the task loss; without it `effects` and `probe` are
        None. A layer without data is left out. Where there are several processes, all must call it.
        """
        if split not in ("train", "eval"):
            raise ValueError(f"split is 'train' or 'eval', not {split!r}")
        bounds = self.plugins.bind("moe_metrics")
        asked = {name for bound in bounds for name in bound.arguments}
        probed = self.probe(probe) if probe is not None and asked & {"effects", "probe"} else {}
        answers: dict[str, Metrics] = {}
        for layer in self.layers:
            stats = self._take(layer, split)
            if stats is not None and stats.tokens:
                routing, effects = probed.get(layer, (None, None))
                offer = {"stats": stats, "layer": layer, "effects": effects, "probe": routing}
                own: Metrics = {f"loss.{term}": value for term, value in stats.terms().items()}
                own |= stats.work()
                said = [(one.plugin, one({**offer, "memory": self._memory(layer, one, split)})) for one in bounds]
                answers[layer.name] = merged([("the core", own), *said])
        return answers

    def _memory(self, layer: MoE, bound: Bound, split: str) -> dict[str, Any]:
        """What a metric keeps of a layer from one log point to the next; nothing for one that does not ask."""
        if "memory" not in bound.arguments:
            return {}
        own = self.remembered.setdefault(layer.name, {}).setdefault(bound.plugin, {})
        memory: dict[str, Any] = own.setdefault(split, {})
        return memory

    def _take(self, layer: MoE, split: str) -> Stats | None:
        """The sums of one split so far, which begin again at zero; None where there are none."""
        if split == "eval":
            stats = Stats(layer.spec, unflat(all_reduce_sum(layer.eval_sums.clone()), layer.layout))
            layer.eval_sums.zero_()
        elif layer.train_sums is not None:
            stats = Stats(layer.spec, unflat(layer.train_sums, layer.training_layout))
            layer.train_sums = None
        else:
            return None
        for level in layer.router.levels:
            if not level.top_k:
                continue
            unit_of = layer.router.unit_of_expert(level.name)
            load = stats.load if unit_of is None else count_by(unit_of.cpu(), stats.load, level.size)
            stats.sums[f"load.{level.name}"] = load
        return stats

    def probe(self, run: Callable[[], Tensor]) -> dict[MoE, tuple[Routing, Effects]]:
        """Routing and effects of each layer on one batch; nothing is counted and no gradient is kept.

        run: the model's forward on that batch in eval mode; answers the task loss.
        """
        loss, routings = self.observe(run)
        count = len(self.layers)
        return {layer: (routing, effects_of(layer, routing, loss, count)) for layer, routing in routings.items()}

    def check_learning(self, run: Callable[[], Tensor]) -> None:
        """Raise UsageError if the task gives some level of a router no gradient: it would never learn.

        run: as for `probe`. A gate that is renormalised to a constant is the common reason. Layers that are
        allowed it (`Spec.allow_no_gradient`) are named in the remarks instead.
        """
        found = list(without_gradient(*self.observe(run)))
        for layer, why in found:
            if not layer.spec.allow_no_gradient:
                raise UsageError(why)
        if found:
            advice = "nothing but losses and biases moves it; let gates be the raw probabilities, or raise top_k"
            self.plugins.remarks["learning"] = Finding("no gradient", 2, "; ".join(why for _, why in found), advice)

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What goes on where it stopped beside the weights: steps, growths, triggers' memories, sums so far."""
        sums = {layer.name: layer.sums() for layer in self.layers}
        growths = [attrs.asdict(one) for one in self.growths]
        memories = {"memory": self.triggers.memory, "remembered": self.remembered}
        return {"step": self.step, "growths": growths, "layers": sums, **copy.deepcopy(memories)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; load the model before, which brings the number of experts. Raises UsageError."""
        layers = {layer.name: layer for layer in self.layers}
        if layers.keys() != state["layers"].keys():
            raise UsageError(f"the state is of layers {listed(state['layers'])}, but there are {listed(layers)}")
        for name, sums in state["layers"].items():
            layers[name].check_sums(sums)
        for name, sums in state["layers"].items():
            layers[name].take_sums(sums)
        self.step, self.triggers.memory = state["step"], copy.deepcopy(dict(state["memory"]))
        self.remembered = copy.deepcopy(dict(state["remembered"]))
        self.growths = [Grown(**one) for one in state["growths"]]

    def observe(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[MoE, Routing]]:
        """(task loss, routing of each layer) of a forward that is not counted; `run` as for `probe`."""
        try:
            return observe(self.layers, run)
        except (Exception, SystemExit) as error:
            if (culprit := self.plugins.culprit(error)) is None:
                raise
            raise PluginError(f"{culprit} failed on a held-out batch: {type(error).__name__}: {error}") from error


def _settings(given: Iterable[str] | Settings) -> Settings:
    return dict(given) if isinstance(given, Mapping) else parse_settings(given)


def _signals(layer: MoE, flat: Tensor) -> dict[tuple[int, str], Tensor]:
    parts = flat.split(list(layer.signal_sizes.values())) if layer.signal_sizes else ()
    return dict(zip(layer.signal_sizes, parts, strict=True))


def _expert_grad(layer: MoE) -> Tensor:
    learning = [parameter for parameter in layer.experts.parameters() if parameter.requires_grad]
    if learning and all(parameter.grad is None for parameter in learning):
        raise RuntimeError("a bias needs the experts' gradients: call engine.after_step() before optimizer.zero_grad()")
    grad_E = layer.experts.expert_grad()
    return torch.where(grad_E.isfinite().all(), grad_E, 0)


def _step(
    layer: MoE, level: str, load_E: Tensor, own: Mapping[str, Tensor], signal: Tensor | None, grad_E: Tensor | None
) -> Step:
    unit_of, within = layer.router.unit_of_expert(level), layer.router.competes_in(level)
    if unit_of is None:
        return Step(load_E, own, signal, grad_E, within)
    size = next(one.size for one in layer.router.levels if one.name == level)
    sizes = count_by(unit_of, torch.ones_like(load_E), size).clamp(min=1)
    grad = None if grad_E is None else count_by(unit_of, grad_E, size) / sizes
    return Step(count_by(unit_of, load_E, size), own, signal, grad, within)
