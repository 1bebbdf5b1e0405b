"""The engine: builds layers from plugins and controls what happens around a training step.

Sequence: for each micro-batch forward, (task_loss + engine.aux_loss()).backward() and engine.after_backward(); then
unscale, clip, optimizer.step(), and engine.after_step(skipped=False) once. Growth follows: optimizer.zero_grad(),
then engine.grow() for each growth that engine.due() returns.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract.growth import Grown, Growth
from ..contract.history import History
from ..contract.options import Settings, parse_settings
from ..contract.routing import Routing
from ..contract.setup import Setup
from ..contract.stats import Effects, Metrics
from ..contract.tasks import TaskSpec
from ..errors import UsageError, listed
from ..growth.triggers import Triggers
from ..layer.ledger import Anchor
from ..layer.moe import MoE, new_copy_id
from ..processes import all_reduce_sum, distributed, mean_scalar_over_ranks
from ..registry.discovery import WATCHING
from ..registry.manager import Plugins
from . import measuring
from .builder import LayerBuild, layer_name, owned_parts, spec_of
from .controllers import apply_controllers
from .growing import Growing, check_growable, grow
from .step_calls import StepCalls

IN_DENSE = (*WATCHING, "experts")  # the kinds of plugins that act in a dense model


class Engine:
    """The chosen plugins, and the layers built from them.

    plugins: names in order, comma-separated or as a list. settings: "plugin.option=value" texts, or nested dicts.
    without: default plugins to leave out. task: name of a task plugin. seed: of the random draws for new experts.
    dense: replace each layer by one MLP as wide as the experts that a token is sent to; if a plugin provides the
    bank, by one of its experts, and only for top_k=1. spec: defaults of every layer (experts, top_k, capacity, ...).
    Raises UsageError. step: optimizer steps so far. growths: all growths so far, oldest first.
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
        names = _names(plugins)
        self.plugins = Plugins(names, without, parse_settings(settings), task)
        self.defaults, self.seed, self.dense = spec, seed, dense
        if dense:
            _refuse_idle(self.plugins, names)
        self.step = 0
        self.growths: list[Grown] = []
        self.remembered: measuring.Memory = {}  # what metrics keep
        self.triggers = Triggers(self.plugins.bind("moe_growth"))
        self._layers: list[weakref.ref[MoE]] = []
        self._calls = StepCalls()

    def implementing(self, hook: str) -> list[str]:
        """The chosen plugins that implement a hook, in the order typed."""
        return [bound.plugin for bound in self.plugins.bind(hook)]

    def check(self, task: TaskSpec) -> None:
        """Ask every plugin whether this combination makes sense, before anything is built. Raises UsageError."""
        self.plugins.check(Setup(self.plugins.active, spec_of({**self.defaults, "dim": 0, "hidden": 0}), task))

    def culprit(self, error: BaseException) -> str | None:
        """The plugin whose code raised an exception, as "loss 'x' (dist 1.0) in moe_aux_loss", or None."""
        return self.plugins.culprit(error, [owned for layer in self.layers for owned in owned_parts(layer)])

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
        """Build a layer: [..., dim] -> [..., dim or out]. Raises UsageError if the plugins don't go together.

        hidden: H of the stacked experts. modules: use these modules as experts instead, one each. settings: plugin
        options for this layer alone. spec: see `Spec`.
        """
        if modules is not None:
            spec["experts"] = len(modules)
        name = layer_name(name, self.layers, len(self._layers))
        sizes = spec_of({**self.defaults, "dim": dim, "hidden": hidden, **spec})
        return self.built(LayerBuild(self.plugins, sizes, name, parse_settings(settings), modules))

    def built(self, build: LayerBuild) -> MoE:
        """Build a layer and take it over."""
        if self.dense:
            return build.twin()  # type: ignore[return-value]  # a model calls both alike
        on_meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if on_meta else nullcontext():  # tried with real values, then moved
            layer = build.layer()
            check_growable(self.plugins, self.triggers, layer, self.seed)
        if on_meta:
            layer.to("meta")
        self._layers.append(weakref.ref(layer))
        return layer

    def attach(self, model: nn.Module) -> "Engine":
        """Take over every MoE layer in `model`, deep-copied ones too, and drop all others; name each by its path."""
        found, mine = [(name, one) for name, one in model.named_modules() if isinstance(one, MoE)], self.layers
        for name, layer in found:
            layer.name = name or layer.name
            if layer not in mine:
                layer.copy_id = new_copy_id()  # it is a layer by itself now, not a copy
        self._layers = [weakref.ref(layer) for _, layer in found]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: the copy owns the copies of layers that are copied together with it."""
        calls = attrs.evolve(self._calls, parallels=None)
        return {**vars(self), "_layers": self.layers, "triggers": self.triggers.memory, "_calls": calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.triggers = Triggers(self.plugins.bind("moe_growth"), state["triggers"])
        for layer in state["_layers"]:
            layer.copy_id = new_copy_id()
        self._layers = [weakref.ref(layer) for layer in state["_layers"]]

    @property
    def layers(self) -> list[MoE]:
        """The layers that are still alive, in the order in which they were built or attached."""
        return [layer for layer in (ref() for ref in self._layers) if layer is not None]

    # -- around a step ---------------------------------------------------------------------------

    def aux_loss(self) -> Tensor:
        """The weighted auxiliary loss of the forwards since the last call, averaged over layers.

        A layer that is called several times, as one with shared weights is, adds its loss each time: it is their sum.
        Add it to the task loss. In its backward the layers inject their gradients, scaled like the whole loss.
        """
        layers = self.layers
        value = torch.stack([layer.sums.aux_value for layer in layers]).mean() if layers else torch.zeros(())
        leaf = torch.zeros((), device=value.device, requires_grad=True)
        for layer in layers:
            layer.sums.aux_value.zero_()
        scales = [layer.sums.aux_scale for layer in layers]
        loss: Tensor = Anchor.apply(leaf, value, self._calls.begin_backward, *scales)
        return loss

    def after_backward(self) -> None:
        """Call after each micro-batch's backward."""
        for layer in self.layers:
            layer.sums.aux_scale.data.zero_()  # .data: another forward's backward may still be to come
            layer.sums.aux_value.zero_()
        self._calls.end_backward()

    @torch.no_grad()
    def after_step(self, skipped: bool = False) -> None:
        """Call once after optimizer.step(). All biases and states are updated here, and nowhere else.

        skipped: the optimizer did not step (GradScaler found inf), so the step's sums are discarded.
        Raises RuntimeError if `aux_loss()` was not part of a backward, or `after_backward()` was not called.
        """
        counted = [layer for layer in self.layers if layer.sums.of_step() is not None]
        if distributed():
            self._calls.refuse_join(self.layers)
        self._calls.end_step(self.layers, counted)
        self.triggers.count_step()
        # all processes must reduce the same layers, including those that one of them did not use
        for layer in self.layers if distributed() else counted:
            sums = all_reduce_sum(layer.sums.take_step())
            if not skipped:
                apply_controllers(layer, sums, with_load=bool(self.triggers.bounds))
        self.step += not skipped

    def last_terms(self) -> dict[str, Tensor]:
        """The loss terms of the last step by name and layer, [1] each, whether finite or not."""
        return {
            f"'{term}' of layer '{layer.name}'": v for layer in self.layers for term, v in layer.sums.last_terms.items()
        }

    # -- growth ----------------------------------------------------------------------------------

    def due(self, loss: Tensor | float, eval_loss: Tensor | float | None = None) -> list[Growth]:
        """The growths that the triggers want now, for `grow`; call once after each `after_step`.

        loss: the task loss of this step. eval_loss: the loss of an evaluation since the last call, if any. Both are
        averaged over processes, so all make the same decision.
        """
        if not self.triggers.bounds or not self.layers:
            return []
        device = self.layers[0].sums.step.device
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
        """Add, remove or replace experts of a layer and their optimizer state: all of it or nothing.

        Parameters stay the same objects, so optimizers, schedulers and lists of parameters remain valid.
        optimizers: every optimizer that holds the layer's parameters. followers: models with a copy of the layer,
        such as a weight average, which grow too; and a DistributedDataParallel, which must be rebuilt afterwards.
        probe: as in `metrics`; the change of the layer's output and of the loss is measured on it. All processes
        must call it. Raises UsageError if the growth makes no sense, or if a live holder of the parameters was not
        passed.
        """
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        followers = [followers] if isinstance(followers, nn.Module) else list(followers)
        growing = Growing(self.plugins, self.layers, self.growths, self.step, self.seed, self._calls.anchored)
        record = grow(growing, growth, optimizers, followers, probe)
        self.remembered.pop(record.layer, None)  # of other experts
        self._calls.forget_models()
        return record

    # -- measuring -------------------------------------------------------------------------------

    def metrics(self, split: str = "train", probe: Callable[[], Tensor] | None = None) -> dict[str, Metrics]:
        """The metrics of each layer since the last call for this split.

        split: "train" (steps) or "eval" (forwards in eval mode). probe: runs the model on a fixed held-out batch in
        eval mode and returns the task loss; without it, `effects` and `probe` are None. A layer without data is left
        out. All processes must call it.
        """
        if split not in ("train", "eval"):
            raise ValueError(f"split is 'train' or 'eval', not {split!r}")
        bounds = self.plugins.bind("moe_metrics")
        wanted = {name for bound in bounds for name in bound.arguments} & {"effects", "probe"}
        probed = self.probe(probe) if probe is not None and wanted else {}
        return measuring.measure(self.layers, bounds, self.remembered, split, probed)

    def probe(self, run: Callable[[], Tensor]) -> dict[MoE, tuple[Routing, Effects]]:
        """Routing and effects of each layer on one batch; counts and gradients are left alone.

        run: the model's forward on that batch in eval mode; returns the task loss.
        """
        return measuring.probed(self.layers, self.plugins, run)

    def check_learning(self, run: Callable[[], Tensor]) -> None:
        """Raise UsageError if a level of some router gets no gradient from the task, so it could never learn.

        run: as for `probe`. The usual cause is a gate that is renormalised to a constant. Layers with
        `Spec.allow_no_gradient` are named in the remarks instead.
        """
        measuring.check_learning(self.layers, self.plugins, run)

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the weights: steps, growths, triggers' memories, sums so far."""
        sums = {layer.name: layer.sums.held() for layer in self.layers}
        growths = [attrs.asdict(grown) for grown in self.growths]
        memories = {"memory": self.triggers.memory, "remembered": self.remembered}
        return {"step": self.step, "growths": growths, "layers": sums, **copy.deepcopy(memories)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; load the model first, which sets the number of experts. Raises UsageError."""
        layers = {layer.name: layer for layer in self.layers}
        if layers.keys() != state["layers"].keys():
            message = f"the state is for layers {listed(state['layers'])}, but the engine has {listed(layers)}"
            raise UsageError(message, code="state-of-other-layers")
        for name, sums in state["layers"].items():
            layers[name].sums.check_held(sums, name, layers[name].spec.experts)
        for name, sums in state["layers"].items():
            layers[name].sums.load_held(sums)
        self.step, self.triggers.memory = state["step"], copy.deepcopy(dict(state["memory"]))
        self.remembered = copy.deepcopy(dict(state["remembered"]))
        self.growths = [Grown(**grown) for grown in state["growths"]]


def _names(plugins: str | Iterable[str]) -> list[str]:
    return [name.strip() for name in plugins.split(",") if name.strip()] if isinstance(plugins, str) else list(plugins)


def _refuse_idle(plugins: Plugins, names: Sequence[str]) -> None:
    """A dense model has no router: refuse plugins that would have no effect."""
    idle = [name for name, found in plugins.found.items() if name in names and found.kind not in IN_DENSE]
    if idle:
        message = f"a dense model has no router: {listed(map(repr, idle))} would have no effect"
        raise UsageError(message, code="acts-on-nothing")
