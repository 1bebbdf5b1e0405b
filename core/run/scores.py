"""Scores of batches: computed in the run's precision, summed on the device, averaged over samples."""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor, nn

from ..contract.tasks import Batch, Task
from ..errors import RunError, listed
from ..layer.probing import evaluating
from .config import RunConfig
from .device import precision

PROBE_SIZE = 128  # samples of the held-out batch on which effects are measured
EVAL_BATCH = 512


@attrs.define(eq=False)
class ScoreSums:
    """The scores of some batches, and the loss terms if they were training steps.

    sums: each batch's sums by name; "loss" is the mean loss times "count", the number of samples. terms: each step's
    loss terms by name.
    """

    sums: list[Mapping[str, Tensor]] = attrs.field(factory=list)
    terms: list[Mapping[str, Tensor]] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self.sums)

    def add(self, score: Mapping[str, Tensor], batch: Batch, terms: Mapping[str, Tensor] | None = None) -> None:
        """Add one batch's score; with `terms`, that of a training step. Does not wait for the device."""
        count = batch[0].shape[0]
        sums = {name: value.detach() for name, value in score.items()}
        self.sums.append({**sums, "loss": sums["loss"] * count, "count": torch.tensor(float(count))})
        if terms is not None:
            self.terms.append(terms)

    def means(self) -> dict[str, float]:
        """Means over samples, or over "count.NAME" samples if there is such a sum. "correct" becomes "accuracy"."""
        totals = {
            name: float(torch.stack([sums[name] for sums in self.sums]).cpu().double().sum()) for name in self.sums[0]
        }
        counts = {name: totals.pop(f"count.{name}") for name in [*totals] if f"count.{name}" in totals}
        count = totals.pop("count")
        names = {"correct": "accuracy"}
        return {
            names.get(name, name): total / counts.get(name, count)
            for name, total in totals.items()
            if counts.get(name, 1)
        }

    def check_finite(self, step: int) -> None:
        """Raise RunError for the first step whose loss, or a term of it, was not finite; step: the last one added."""
        values = {"the task loss": torch.stack([sums["loss"] for sums in self.sums])}
        values |= {f"the loss term {name}": torch.cat([terms[name] for terms in self.terms]) for name in self.terms[0]}
        bad = {name: (~value.isfinite()).nonzero().flatten().tolist() for name, value in values.items()}
        first = min((steps[0] for steps in bad.values() if steps), default=None)
        if first is not None:
            names = listed(name for name, steps in bad.items() if first in steps)
            raise RunError(
                f"{names} stopped being finite at step {step - len(self) + first + 1}; lower --lr, or a loss's weight",
                code="loss-not-finite",
            )


@attrs.frozen(eq=False)
class Scorer:
    """A task's model on its device, and its training and test batches."""

    config: RunConfig
    task: Task
    model: nn.Module
    device: torch.device

    def score(self, batch: Batch) -> Mapping[str, Tensor]:
        """The task's score of a batch, by a forward in the run's precision."""
        with precision(self.config, self.device):
            return self.task.score(self.model, batch)

    def score_first(self, count: int) -> Mapping[str, Tensor]:
        """The task's score of the first test samples, in eval mode."""
        batch = tuple(column[:count].to(self.device) for column in self.task.test)
        with evaluating(self.model):
            return self.score(batch)

    def probe(self) -> Tensor:
        """The task loss on a fixed held-out batch, in eval mode."""
        return self.score_first(PROBE_SIZE)["loss"]

    def train_batches(self, order: torch.Generator, done: int, most: int) -> Iterator[Batch]:
        """The batches of an epoch after the first `done`, at most `most` of them, in an order drawn from `order`."""
        count = self.task.train[0].shape[0]
        rows = torch.arange(count) if self.task.ordered else torch.randperm(count, generator=order)
        for chosen in rows.split(min(self.config.batch_size, count))[done : done + most]:
            batch = tuple(column.index_select(0, chosen).to(self.device) for column in self.task.train)
            yield self.task.augment(batch) if self.task.augment else batch

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        for rows in torch.arange(self.task.test[0].shape[0]).split(EVAL_BATCH):
            yield tuple(column.index_select(0, rows).to(self.device) for column in self.task.test)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the test set, and the task's measures. Leaves the model in eval mode."""
        self.model.eval()
        measures = self.task.measures().to(self.device) if self.task.measures else None
        scores = ScoreSums()
        for batch in self.test_batches():
            score = dict(self.score(batch))
            predicted, true = score.pop("predicted", None), score.pop("true", None)
            if measures is not None:
                measures.update(predicted, true)
            scores.add(score, batch)
        measured = {} if measures is None else {name: float(value) for name, value in measures.compute().items()}
        return scores.means() | measured
