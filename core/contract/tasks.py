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
    """What a task gets. data_dir: where its files are, or are downloaded to. seed: of the run."""

    data_dir: str = "data"
    seed: int = 0


@attrs.define(eq=False)
class Task:
    """The data, model and measures of one run.

    train, test: columns of equal length; a batch is some of their rows. model: builds the model, whose layers come
    from the engine. score: of a batch, "loss", the mean loss attached to the graph, and sums over the batch by
    name: "correct" if there is an accuracy; NAME with "count.NAME" if NAME is a sum over some rows only. Everything
    is measured on `test`. perplexity: report exp(loss). ordered: train on the rows in their order, as a stream,
    instead of shuffled. augment: changes a batch for training, on its device; it draws from torch's global
    generator, which the run seeds. measures: builds torchmetrics for the test set; they get score's "predicted"
    and "true", which it adds when the model is in eval mode.
    """

    train: Batch
    test: Batch
    model: Callable[["LayerBuilder"], nn.Module]
    score: Callable[[nn.Module, Batch], Mapping[str, Tensor]]
    perplexity: bool = False
    ordered: bool = False
    augment: Callable[[Batch], Batch] | None = None
    measures: Callable[[], "MetricCollection"] | None = None
