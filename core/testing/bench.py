"""The test bench: builds small layers with the plugin under test, and records what a step computes.

D = 16, H = 8, E = 6, K = 2, 24 tokens in 3 sequences, unless a claim sets other sizes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.routing import Routing, Tokens
from ..contract.traits import trial_options_of
from ..engine.engine import Engine
from ..errors import PluginError, UsageError
from ..layer.moe import MoE
from ..layer.probing import output
from ..layer.sums import unflat
from ..run.training import adam
from .claims import demand
from .comparing import distance
from .plugin_under_test import PluginUnderTest

DIM, HIDDEN, EXPERTS, TOP_K, VOCAB, CLASSES = 16, 8, 6, 2, 16, 3  # 16 inputs are also an image of 4 x 4 pixels
SHAPE = (3, 8)
MANY = 256  # experts of a layer in which scores are close

Tensors = dict[str, Tensor]  # outputs, losses, gradients, sums and state by name
Call = Callable[..., Tensor]  # calls a layer: (layer, *arguments) -> output


@attrs.frozen(eq=False)
class Data:
    """A batch of tokens, with everything that a layer may take and a target for its output.

    x, target [..., D]; ids, labels, mask [...]. bare: the layer gets neither ids nor labels.
    """

    x: Tensor
    ids: Tensor
    labels: Tensor
    target: Tensor
    mask: Tensor | None = None
    bare: bool = False

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The arguments of a layer: x, mask, ids, labels."""
        return (self.x, self.mask, None, None) if self.bare else (self.x, self.mask, self.ids, self.labels)

    def loss(self, y: Tensor) -> Tensor:
        """The mean of |y - target|^2 over real tokens; 0 if there are none."""
        error = (y.to(self.target.dtype) - self.target).square().sum(-1)
        if self.mask is None:
            return error.sum() / max(error.numel(), 1)
        return torch.where(self.mask, error, 0).sum() / self.mask.sum().clamp(min=1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Data":
        """Apply the same change to every tensor, for example an indexing of tokens."""
        mask = None if self.mask is None else change(self.mask)
        x, ids, labels, target = map(change, (self.x, self.ids, self.labels, self.target))
        return Data(x, ids, labels, target, mask, self.bare)

    def to(self, dtype: torch.dtype) -> "Data":
        """The batch with x and target in another precision."""
        return attrs.evolve(self, x=self.x.to(dtype), target=self.target.to(dtype))


def data(*shape: int, seed: int = 1, dim: int = DIM) -> Data:
    """Random tokens of a leading shape, by default (3, 8)."""
    shape = shape or SHAPE
    random = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(*shape, dim, generator=random) for _ in range(2))
    ids, labels = (torch.randint(n, shape, generator=random) for n in (VOCAB, CLASSES))
    return Data(x, ids, labels, target)


def call_layer(layer: MoE, *arguments: Any) -> Tensor:
    """Call a layer directly."""
    return output(layer(*arguments))


@attrs.define(eq=False)
class Trial:
    """One layer under test, with the engine that built it and an optimizer."""

    engine: Engine
    layer: MoE
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Data, seed: int = 0, call: Call = call_layer) -> Tensor:
        """The layer's output, with torch's generator seeded."""
        torch.default_generator.manual_seed(seed)
        return call(self.layer, *batch.arguments)

    def evaluate(self, batch: Data, seed: int = 0) -> Tensor:
        """The layer's output in eval mode."""
        training = self.layer.training
        self.layer.eval()
        y = self.forward(batch, seed)
        self.layer.train(training)
        return y

    def route(self, batch: Data, seed: int = 0) -> Routing:
        """The layer's routing of a batch, uncounted."""
        torch.default_generator.manual_seed(seed)
        return self.layer.route(self.layer.tokens(*batch.arguments))

    def backward(self, *batches: Data, seed: int = 0, call: Call = call_layer) -> Tensors:
        """Forward and backward of one step in micro-batches. Returns outputs, gradients and the step's sums."""
        self.layer.train()
        self.optimizer.zero_grad()
        tensors: Tensors = {}
        for number, batch in enumerate(batches):
            y = self.forward(batch, seed + number, call)
            demand(
                y.shape == (*batch.x.shape[:-1], self.layer.spec.out_dim),
                f"the output has shape {list(y.shape)} for tokens of shape {list(batch.x.shape)}",
            )
            ((batch.loss(y) + self.engine.aux_loss()) / len(batches)).backward()
            self.engine.after_backward()
            tensors[f"output {number}"] = y.detach()
        tensors |= self.gradients()
        sums = self.layer.sums.step.grad
        flat = torch.zeros_like(self.layer.sums.step) if sums is None else sums.detach().clone()
        named = unflat(flat, self.layer.sums.step_layout)
        tensors |= {f"sum '{name}'": value for name, value in named.items()}
        tensors["sum of signals"] = flat[sum(value.numel() for value in named.values()) :]
        return tensors

    def step(self, *batches: Data, seed: int = 0, call: Call = call_layer) -> Tensors:
        """A whole training step. Returns what `backward` returns, and the state after it."""
        tensors = self.backward(*(batches or (data(),)), seed=seed, call=call)
        self.optimizer.step()
        self.engine.after_step()
        return {**tensors, **self.state()}

    def gradients(self) -> Tensors:
        """The gradient of each parameter that has one."""
        named = self.layer.named_parameters()
        return {f"gradient of {name}": p.grad.detach().clone() for name, p in named if p.grad is not None}

    def state(self) -> Tensors:
        """Every parameter and buffer that a step may change, saved or not."""
        bookkeeping = ("sums.step", "sums.aux_value", "sums.aux_scale")
        named = [*self.layer.named_parameters(), *self.layer.named_buffers()]
        return {f"state {name}": value.detach().clone() for name, value in named if name not in bookkeeping}

    def controllers(self) -> Tensors:
        """The state without parameters, which the optimizer changes."""
        weights = {f"state {name}" for name, _ in self.layer.named_parameters()}
        return {name: value for name, value in self.state().items() if name not in weights}

    def demand_unchanged(self, before: Tensors, when: str, tolerance: float = 0.0) -> None:
        """Demand that the state has not changed; `before` is an earlier `state()` or a part of one."""
        now = self.state()
        for name, old in before.items():
            demand(distance(old, now[name]) <= tolerance, f"{name} changed {when}")

    def set_logits(self, *logits: Tensor) -> None:
        """Make the router score tokens with these logits, [T, n] for each level, cut to the number of tokens."""

        def score(tokens: Tokens) -> Any:
            cut = tuple(level[: tokens.x.shape[0]] for level in logits)
            return (cut, tokens.carried) if self.layer.carries else cut

        self.layer.router.score = score  # type: ignore[method-assign]

    def reset_logits(self) -> None:
        """Undo `set_logits`."""
        self.layer.router.__dict__.pop("score", None)

    def logits(self, make: Callable[[int, int], Tensor], tokens: int = 24) -> list[Tensor]:
        """make(tokens, units) for each level, as leaves that require a gradient."""
        return [make(tokens, level.size).requires_grad_() for level in self.layer.router.levels]


@attrs.define(eq=False)
class Bench:
    """Builds layers with the plugin under test, for one claim. folder: an empty folder for files."""

    plugin: PluginUnderTest
    folder: Path

    def default_trial(self, **spec: Any) -> Trial:
        """The same small layer with only the default plugins."""
        return self._layer(Engine(without=self.plugin.observers), 0, _sizes(spec))

    def trial(self, seed: int = 0, options: Mapping[str, Any] | None = None, **spec: Any) -> Trial:
        """A small layer with the plugin and the first router that works with it.

        options: the plugin's, by name. spec: sizes that differ from the usual ones. Raises UsageError if the plugin
        works with no router.
        """
        refusals, sizes = list[UsageError](), _sizes(spec)
        for router in self.plugin.routers:
            try:
                return self._layer(self._engine(router, sizes, options or {}), seed, sizes)
            except UsageError as error:
                refusals.append(error)
        raise refusals[0]

    def trial_or_refusal(self, **spec: Any) -> Trial | str:
        """A layer with this spec, or the sentence that refuses it."""
        try:
            return self.trial(**spec)
        except PluginError:
            raise
        except UsageError as error:
            return f"refused: {error}"

    def second_layer(self, trial: Trial, **spec: Any) -> MoE:
        """Another layer of the same engine."""
        return trial.engine.moe(**_sizes(spec))

    def _layer(self, engine: Engine, seed: int, sizes: dict[str, Any]) -> Trial:
        torch.default_generator.manual_seed(seed)
        layer = engine.moe(**sizes)
        with torch.no_grad():
            for parameter in layer.router.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.3)  # a router that starts at 0 ties everywhere, which hides faults
        return Trial(engine, layer, adam(layer, 0.01))

    def _engine(self, router: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> Engine:
        """An engine with the plugin, without default plugins that only cost time."""
        plugin = self.plugin
        trial_options = trial_options_of(plugin.cls)
        given = dict(trial_options(self.folder, sizes["dim"], sizes["hidden"])) if trial_options else {}
        given |= {**plugin.settings.get(plugin.name, {}), **options}
        names = list(dict.fromkeys((router, plugin.name)))
        without = [name for name in plugin.observers if name != plugin.name]
        return Engine(names, {**plugin.settings, **({plugin.name: given} if given else {})}, without)


def _sizes(spec: Mapping[str, Any]) -> dict[str, Any]:
    usual = {"experts": EXPERTS, "top_k": TOP_K, "vocab": VOCAB, "classes": CLASSES, "dim": DIM, "hidden": HIDDEN}
    return {**usual, **spec}
