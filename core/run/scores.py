"""Scores of batches: computed in the run's precision, summed on the device, averaged over samples."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.tasks import Batch, Task
from ..layer.probing import evaluating
from ..processes import all_reduce_sum, distributed, rank, world_size
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

    def add(self, score: Mapping[str, Tensor], batch: Batch, terms: Mapping[str, Tensor] | None = None) -> Tensor:
        """Add one batch's score, of all ranks; with `terms`, that of a training step. Returns its mean loss.

        Does not wait for the device. batch: this rank's part, which may be empty.
        """
        count = batch[0].shape[0]
        sums = {name: value.detach() for name, value in score.items()}
        loss = sums["loss"] * count if count else torch.zeros_like(sums["loss"])  # a mean over nothing is nan
        self.sums.append(_over_ranks({**sums, "loss": loss, "count": torch.tensor(float(count))}))
        if terms is not None:
            self.terms.append(terms)
        return self.sums[-1]["loss"] / self.sums[-1]["count"].to(loss.device)

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

    def not_finite(self) -> Iterator[tuple[int, str]]:
        """(a step, what was not finite): the task's loss, or a term of it; -1 is the last step that was added."""
        if not self.sums:
            return
        values = {"the task loss": torch.stack([sums["loss"] for sums in self.sums])}
        values |= {f"the loss term {name}": torch.cat([terms[name] for terms in self.terms]) for name in self.terms[0]}
        for name, value in values.items():
            for index in (~value.isfinite()).nonzero().flatten().tolist():
                yield index - len(self), name


def _over_ranks(sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Sums of one batch over all ranks, in one message."""
    if not distributed():
        return sums
    device = sums["loss"].device
    total = all_reduce_sum(torch.stack([value.to(device, torch.float64) for value in sums.values()]))
    return dict(zip(sums, total, strict=True))


@attrs.frozen(eq=False)
class Scorer:
    """A task's model on its device, and its training and test batches.

    Of a batch that is drawn, each rank gets an equal part of the rows, the first ones one more where that is not even.
    """

    config: RunConfig
    task: Task
    model: nn.Module
    device: torch.device

    def score(self, batch: Batch, model: nn.Module | None = None) -> Mapping[str, Tensor]:
        """The task's score of a batch, by a forward in the run's precision. model: what wraps the model, to train."""
        with precision(self.config, self.device):
            return self.task.score(model or self.model, batch)

    def score_first(self, count: int) -> Mapping[str, Tensor]:
        """The task's score of the first test samples, in eval mode."""
        batch = self._batch(self.task.test, torch.arange(min(count, self.task.test[0].shape[0])))
        with evaluating(self.model):
            return self.score(batch)

    def probe(self) -> Tensor:
        """The task loss on a fixed held-out batch, in eval mode."""
        return self.score_first(min(PROBE_SIZE, self.task.most_rows or PROBE_SIZE))["loss"]

    def train_batches(self, order: torch.Generator, done: int, most: int) -> Iterator[tuple[Batch, float]]:
        """(this rank's part, its weight) of the batches of an epoch after the first `done`, at most `most` of them.

        They are in an order drawn from `order`. With the weight, W n / N for n of N rows on one of W ranks, the mean
        over ranks of mean losses is the mean over the batch.
        """
        count = self.task.train[0].shape[0]
        rows = torch.arange(count) if self.task.ordered else torch.randperm(count, generator=order)
        for chosen in rows.split(min(self.config.batch_size, count))[done : done + most]:
            own = chosen.tensor_split(world_size())[rank()]
            batch = self._batch(self.task.train, own)
            yield self.task.augment(batch) if self.task.augment else batch, world_size() * len(own) / len(chosen)

    def test_batches(self, whole: bool = False) -> Iterator[Batch]:
        """The test set; whole: all of it on every rank, otherwise this rank's part of each batch."""
        for rows in torch.arange(self.task.test[0].shape[0]).split(min(EVAL_BATCH, self.task.most_rows or EVAL_BATCH)):
            yield self._batch(self.task.test, rows if whole else rows.tensor_split(world_size())[rank()])

    def _batch(self, columns: Batch, rows: Tensor) -> Batch:
        """Some rows of the columns, on the device and in the run's precision."""
        found = (column.index_select(0, rows).to(self.device) for column in columns)
        wide = self.config.precision == "fp64"
        return tuple(column.double() if wide and column.is_floating_point() else column for column in found)

    def test_rows(self, rows: Tensor) -> Batch:
        """Some rows of the test set, on every rank."""
        return self._batch(self.task.test, rows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the test set, and the task's measures. Leaves the model in eval mode."""
        self.model.eval()
        measures = self.task.measures().to(self.device) if self.task.measures else None
        scores = ScoreSums()
        for batch in self.test_batches():
            score: dict[str, Any] = dict(self.score(batch))
            predicted, true = score.pop("predicted", None), score.pop("true", None)
            if measures is not None:
                measures.update(predicted, true)
            scores.add(score, batch)
        measured = {} if measures is None else {name: float(value) for name, value in measures.compute().items()}
        return scores.means() | measured
