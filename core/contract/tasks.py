"""A task: the data, model and measure of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from torch import Tensor, nn

if TYPE_CHECKING:
    from .protocols import LayerBuilder


Batch = tuple[Tensor, ...]


class Measures(Protocol):
    """What judges predictions: a metric of torchmetrics, or whatever is used like one."""

    def to(self, device: Any) -> "Measures":
        """Compute on a device."""
        ...

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Take in a batch."""
        ...

    def compute(self) -> Mapping[str, Tensor]:
        """The numbers by name, of all batches and ranks."""
        ...


@attrs.frozen
class TaskSpec:
    """The settings a task receives.

    data_dir: the folder of its files and downloads. seed: the run's. batch_size: samples of an optimizer step on all
    ranks. device: where the model is trained, such as "cpu" or "cuda:1".
    """

    data_dir: str = "data"
    seed: int = 0
    batch_size: int = 64
    device: str = "cpu"


@attrs.define(eq=False)
class Task:
    """The data, model and measures of one run.

    train, test: columns of equal length; a batch is a selection of rows. model: builds the model with layers from
    the engine. score: scores a batch; returns the mean "loss", attached to the graph, and sums over the batch by
    name: "correct" if there is an accuracy; NAME and "count.NAME" if NAME is a sum over only some rows. Evaluation
    uses `test`. perplexity: report exp(loss). tokens: in a sample, for tokens per second. ordered: train on the rows
    in order, as a stream, instead of shuffled. augment: transforms a training batch on its device; it draws from
    torch's global generator, which the run seeds. measures: builds what judges the test set, such as a MetricCollection
    of torchmetrics; it receives "predicted" and "true", which score adds in eval mode. most_rows: samples of one
    forward outside of training at most, where a larger one would not fit into memory. note: a sentence shown when the
    run starts. show: what people see of some rows: images as uint8 [B, H, W] or [B, 3, H, W], or for each row a list of
    the texts of its tokens, as many as its layers see. Without it a run's sample holds no inputs.
    """

    train: Batch
    test: Batch
    model: Callable[["LayerBuilder"], nn.Module]
    score: Callable[[nn.Module, Batch], Mapping[str, Tensor]]
    perplexity: bool = False
    tokens: int = 1
    ordered: bool = False
    augment: Callable[[Batch], Batch] | None = None
    measures: Callable[[], Measures] | None = None
    most_rows: int | None = None
    note: str = ""
    show: Callable[[Batch], "Tensor | Sequence[Sequence[str]]"] | None = None
