"""Sums by name, which metrics and controllers read; findings, and the effects of losses and biases."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import RunError, listed
from .numerics import count_by
from .routing import Spec


@attrs.frozen
class Finding:
    """A metric in words. severity: 0 fine, 1 worth a look, 2 broken.

    The finding called `verdict` is a layer's verdict; a run's is that of its worst layer.
    """

    name: str
    severity: int
    why: str
    advice: str = ""


class Unmeasured(KeyError):
    """A metric asked for a sum that was not counted."""


class Stats:
    """Sums over forwards of one layer, in float64 on the CPU.

    tokens [1]: real tokens. load [E]: their assignments. dropped [E]: assignments over capacity. slots [2]: slots
    that experts processed, and pairs of a token and a slot that it was mixed into. prob [E]: summed probabilities.
    load.LEVEL [n]: the load of a router level. loss.TERM [1]: the sum of a loss term over `forwards` [1].
    PLUGIN.NAME: what a plugin's `moe_measure` returned.
    """

    def __init__(self, spec: Spec, sums: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.sums = {name: value.detach().cpu().to(torch.float64, copy=True) for name, value in sums.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            raise Unmeasured(name)
        return self.sums[name]

    @property
    def tokens(self) -> float:
        """Number of real tokens; 0 means there is no data."""
        return float(self.sums["tokens"].sum())

    @property
    def load(self) -> Tensor:
        """[E]: assignments of real tokens to each expert, before capacity drops any."""
        return self.sums["load"]

    @property
    def dropped(self) -> Tensor:
        """[E]: assignments that capacity dropped."""
        return self.sums["dropped"]

    def work(self) -> dict[str, float]:
        """rows: tokens or slots that experts process, per token. slots: how many each token is mixed into, if any."""
        if "slots" not in self.sums:
            return {"rows": float((self.load - self.dropped).sum()) / self.tokens}
        rows, pairs = (self.sums["slots"] / self.tokens).tolist()
        return {"rows": rows, "slots": pairs}

    def of(self, plugin: str) -> dict[str, Tensor]:
        """What one plugin measured, by the names it gave."""
        return {name.removeprefix(f"{plugin}."): v for name, v in self.sums.items() if name.startswith(f"{plugin}.")}

    def terms(self) -> dict[str, float]:
        """The mean value of each loss term over the forwards, unweighted."""
        forwards = float(self.sums["forwards"].sum()) if "forwards" in self.sums else 0.0
        return {name: float(value.sum()) / forwards for name, value in self.of("loss").items()} if forwards else {}


@attrs.define(eq=False)
class Step:
    """One optimizer step as a bias or a state sees it: sums over micro-batches and processes.

    load [n]: the load of the bias's level. own: the sums of what its `measure` returned (for a state: its plugin's
    `moe_measure`). signal [n]: the sum of what its `signal` returned, or None. expert_grad [n]: mean |gradient| of
    each unit's experts, unscaled, or None if the part does not ask for it. competes_in [n]: the group within which
    each unit competes, or None.
    """

    load: Tensor
    own: Mapping[str, Tensor]
    signal: Tensor | None = None
    expert_grad: Tensor | None = None
    competes_in: Tensor | None = None

    def relative(self, values: Tensor) -> Tensor:
        """values [n], each divided by the mean of the values that it competes with."""
        if self.competes_in is None:
            return values / values.mean().clamp(min=1e-30)
        groups = int(self.competes_in.max()) + 1
        sizes = count_by(self.competes_in, torch.ones_like(values), groups)
        means = count_by(self.competes_in, values, groups) / sizes.clamp(min=1)
        return values / means.clamp(min=1e-30)[self.competes_in]


def mean_of_pairs(values_EE: Tensor) -> Tensor:
    """The mean over pairs i < j, ignoring nan; nan if all are."""
    return values_EE[torch.ones_like(values_EE).triu(1).bool()].nanmean()


def plain(value: Any) -> Any:
    """A metric's value for JSON: a number that is not finite becomes None."""
    if isinstance(value, Finding):
        return attrs.asdict(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):  # numpy's too
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


@attrs.frozen
class Effects:
    """How strongly each term moves one layer's router, on the probe batch.

    task: norm of the task loss's gradient at the raw logits. losses: the same for each weighted loss
    term, except those that act on weights alone. biases: by plugin, the share of choices that differ without it.
    spreads: by plugin, the largest bias minus the smallest, at the level where they differ most.
    """

    task: float
    losses: Mapping[str, float]
    biases: Mapping[str, float]
    spreads: Mapping[str, float]


Metrics = dict[str, float | Tensor | Finding]


def merge_metrics(answers: Iterable[tuple[str, Metrics]]) -> Metrics:
    """The metrics of several plugins as one mapping. Raises RunError for a name that two of them return."""
    together: Metrics = {}
    owner: dict[str, str] = {}
    for plugin, answer in answers:
        if not isinstance(answer, Mapping):
            raise RunError(f"metric '{plugin}' returned {answer!r}, not metrics by name", code="bad-metric")
        for name, value in answer.items():
            if not isinstance(value, float | int | list | str | Tensor | Finding | None) and not hasattr(
                value, "tolist"
            ):
                message = f"metric '{plugin}' returned {value!r} as '{name}', which is not a number"
                raise RunError(message, code="bad-metric")
            if name in owner:
                message = f"metric '{name}' is returned by {listed([owner[name], plugin])}; rename one"
                raise RunError(message, code="duplicate-metric")
            owner[name] = plugin
            together[name] = value
    return together
