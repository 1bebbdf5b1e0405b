"""The bench on which a plugin is tried: small layers with it and partners that fit, and all that one step shows.

D = 16, H = 8, E = 6, K = 2, 24 tokens in 3 sequences, unless a claim says otherwise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.routing import Routing
from ..contract.traits import trial_options_of
from ..engine.engine import Engine
from ..errors import PluginError, UsageError
from ..layer.moe import MoE
from ..layer.sums import unflat
from ..run.training import adam
from .claims import demand
from .comparing import distance
from .subjects import Subject

DIM, HIDDEN, EXPERTS, TOP_K, VOCAB, CLASSES = 16, 8, 6, 2, 16, 3  # 16: also a picture of 4 x 4
SHAPE = (3, 8)

Seen = dict[str, Tensor]  # what there is to see of a step, by name
Wrap = Callable[..., Tensor]  # how a layer is called: (layer, *arguments)


@attrs.frozen(eq=False)
class Data:
    """Tokens with all that a layer may be given, and what its output is to be."""

    x: Tensor
    ids: Tensor
    labels: Tensor
    target: Tensor
    mask: Tensor | None = None
    bare: bool = False  # a layer is given neither ids nor labels

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As a layer takes them."""
        return (self.x, self.mask, None, None) if self.bare else (self.x, self.mask, self.ids, self.labels)

    def loss(self, y: Tensor) -> Tensor:
        """The mean over real tokens of |y - target|^2; 0 if there is none."""
        error = (y.to(self.target.dtype) - self.target).square().sum(-1)
        if self.mask is None:
            return error.sum() / max(error.numel(), 1)
        return torch.where(self.mask, error, 0).sum() / self.mask.sum().clamp(min=1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Data":
        """The same change of every column, as a choice of rows."""
        mask = None if self.mask is None else change(self.mask)
        x, ids, labels, target = map(change, (self.x, self.ids, self.labels, self.target))
        return Data(x, ids, labels, target, mask, self.bare)

    def to(self, dtype: torch.dtype) -> "Data":
        """In another precision."""
        return attrs.evolve(self, x=self.x.to(dtype), target=self.target.to(dtype))


def data(*shape: int, seed: int = 1, dim: int = DIM) -> Data:
    """Drawn tokens of a leading shape, (3, 8) if none is given."""
    shape = shape or SHAPE
    random = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(*shape, dim, generator=random) for _ in range(2))
    ids, labels = (torch.randint(n, shape, generator=random) for n in (VOCAB, CLASSES))
    return Data(x, ids, labels, target)


def plain(layer: MoE, *arguments: Any) -> Tensor:
    """Call a layer as anybody does."""
    y: Tensor = layer(*arguments)
    return y


@attrs.define(eq=False)
class Rig:
    """One engine with one layer and an optimizer."""

    engine: Engine
    layer: MoE
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Data, seed: int = 0, wrap: Wrap = plain) -> Tensor:
        """A forward whose random draws begin at a seed."""
        torch.manual_seed(seed)
        return wrap(self.layer, *batch.arguments)

    def evaluate(self, batch: Data, seed: int = 0) -> Tensor:
        """A forward in eval mode."""
        training = self.layer.training
        self.layer.eval()
        y = self.forward(batch, seed)
        self.layer.train(training)
        return y

    def route(self, batch: Data, seed: int = 0) -> Routing:
        """The layer's decision on a batch, uncounted."""
        torch.manual_seed(seed)
        return self.layer.route(self.layer.tokens(*batch.arguments))

    def backward(self, *batches: Data, seed: int = 0, wrap: Wrap = plain) -> Seen:
        """Forward and backward of a step in micro-batches: outputs, loss terms, gradients and sums."""
        self.layer.train()
        self.optimizer.zero_grad()
        seen: Seen = {}
        for number, batch in enumerate(batches):
            y = self.forward(batch, seed + number, wrap)
            demand(
                y.shape == (*batch.x.shape[:-1], self.layer.spec.out_dim),
                f"the output is of shape {list(y.shape)} for tokens of {list(batch.x.shape)}",
            )
            ((batch.loss(y) + self.engine.aux_loss()) / len(batches)).backward()
            self.engine.after_backward()
            seen[f"output {number}"] = y.detach()
        seen |= self.gradients()
        book = self.layer.sums.step.grad
        flat = torch.zeros_like(self.layer.sums.step) if book is None else book.detach().clone()
        counted = unflat(flat, self.layer.sums.step_layout)
        seen |= {f"sum '{name}'": value for name, value in counted.items()}
        seen["sum of signals"] = flat[sum(value.numel() for value in counted.values()) :]
        return seen

    def step(self, *batches: Data, seed: int = 0, wrap: Wrap = plain) -> Seen:
        """A whole training step; what `backward` answers, and every saved tensor after it."""
        seen = self.backward(*(batches or (data(),)), seed=seed, wrap=wrap)
        self.optimizer.step()
        self.engine.after_step()
        return {**seen, **self.state()}

    def gradients(self) -> Seen:
        """The gradient of each parameter that has one."""
        named = self.layer.named_parameters()
        return {f"gradient of {name}": p.grad.detach().clone() for name, p in named if p.grad is not None}

    def state(self) -> Seen:
        """Every parameter and every buffer that a step may move, saved or not."""
        own = ("sums.step", "sums.aux_value", "sums.aux_scale")
        named = [*self.layer.named_parameters(), *self.layer.named_buffers()]
        return {f"state {name}": value.detach().clone() for name, value in named if name not in own}

    def controllers(self) -> Seen:
        """The state without the parameters, which optimizers move."""
        weights = {f"state {name}" for name, _ in self.layer.named_parameters()}
        return {name: value for name, value in self.state().items() if name not in weights}

    def demand_still(self, before: Seen, when: str, tolerance: float = 0.0) -> None:
        """Demand that what was seen of the state has not moved."""
        now = self.state()
        for name, old in before.items():
            demand(distance(old, now[name]) <= tolerance, f"{name} moved {when}")

    def give_logits(self, *logits: Tensor) -> None:
        """From now on the router's raw scores are these, one [T, n] a level, cut to the tokens there are."""
        self.layer.router.score = lambda tokens: tuple(one[: tokens.x.shape[0]] for one in logits)  # type: ignore[method-assign]

    def own_logits(self) -> None:
        """Let the router score again."""
        self.layer.router.__dict__.pop("score", None)

    def logits(self, make: Callable[[int, int], Tensor], tokens: int = 24) -> list[Tensor]:
        """For each level make(tokens, units), as leaves."""
        return [make(tokens, level.size).requires_grad_() for level in self.layer.router.levels]


@attrs.define(eq=False)
class Bench:
    """Where one claim about one plugin is tested; folder: an empty one, for files."""

    subject: Subject
    folder: Path

    def usual(self, **spec: Any) -> Rig:
        """The same small layer with the default plugins."""
        return self._layer(Engine(without=self.subject.costly), 0, _sizes(spec))

    def rig(self, seed: int = 0, options: Mapping[str, Any] | None = None, **spec: Any) -> Rig:
        """A small layer with the plugin and the first router that goes with it; options: more of the plugin's own.

        Raises UsageError where no router goes with it.
        """
        refusals, sizes = list[UsageError](), _sizes(spec)
        for router in self.subject.routers:
            try:
                return self._layer(self._engine(router, sizes, options or {}), seed, sizes)
            except UsageError as error:
                refusals.append(error)
        raise refusals[0]

    def second(self, rig: Rig, **spec: Any) -> MoE:
        """Another layer of a rig's engine."""
        return rig.engine.moe(**_sizes(spec))

    def _layer(self, engine: Engine, seed: int, sizes: dict[str, Any]) -> Rig:
        torch.manual_seed(seed)
        layer = engine.moe(**sizes)
        with torch.no_grad():
            for parameter in layer.router.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.3)  # a router that starts at 0 ties everywhere, and ties hide much
        return Rig(engine, layer, adam(layer, 0.01))

    def _engine(self, router: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> Engine:
        """An engine with the plugin, without what would only cost time."""
        subject = self.subject
        trial = trial_options_of(subject.cls)
        own = dict(trial(self.folder, sizes["dim"], sizes["hidden"])) if trial else {}
        own |= {**subject.settings.get(subject.name, {}), **options}
        names = list(dict.fromkeys((router, subject.name)))
        without = [name for name in subject.costly if name != subject.name]
        return Engine(names, {**subject.settings, **({subject.name: own} if own else {})}, without)

    def accepted(self, **spec: Any) -> Rig | str:
        """A layer of this spec, or the sentence with which it is refused."""
        try:
            return self.rig(**spec)
        except PluginError:
            raise
        except UsageError as error:
            return f"refused: {error}"


def _sizes(spec: Mapping[str, Any]) -> dict[str, Any]:
    usual = {"experts": EXPERTS, "top_k": TOP_K, "vocab": VOCAB, "classes": CLASSES, "dim": DIM, "hidden": HIDDEN}
    return {**usual, **spec}
