"""A task: the data, model and measure of a run."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from .protocols import LayerBuilder


Batch = tuple[Tensor, ...]


@attrs.frozen
class TaskSpec:
    """What a task is told. data_dir: where its files are, or go. seed: of the run."""

    data_dir: str = "data"
    seed: int = 0


@attrs.define(eq=False)
class Task:
    """Data, model and measure of one run.

    train, test: columns of equal length, which batches are rows of. model: builds the model, its
    layers by the engine. score: what a batch gives: "loss", the mean loss with its graph, and sums over the
    batch by name: "correct" where there is an accuracy; NAME beside "count.NAME" where NAME is of some rows
    only. Everything is measured on `test`. perplexity: report exp(loss). ordered: show the rows for training
    as they stand, as a stream, instead of shuffled. augment: changes a batch for training, on its device;
    it draws from torch's global generator, which is the run's own. measures: builds the torchmetrics that the
    test set is judged by beside; they get score's "predicted" and "true", which it adds where the model is
    in evaluation.
    """

    train: Batch
    test: Batch
    model: Callable[["LayerBuilder"], nn.Module]
    score: Callable[[nn.Module, Batch], Mapping[str, Tensor]]
    perplexity: bool = False
    ordered: bool = False
    augment: Callable[[Batch], Batch] | None = None
    measures: Callable[[], "MetricCollection"] | None = None
