"""A sample of the test set: what people see of it, and where each layer sent its tokens. One file with a checksum.

Suffixes: B samples, S tokens of each, T tokens, K choices of a token, E experts, N assignments.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from ..contract.numerics import linear_cka
from ..contract.routing import Routing, Tokens
from ..contract.tasks import Task
from ..engine.engine import Engine
from ..errors import UsageError
from ..layer.moe import MoE
from ..layer.probing import evaluating, uncounted
from ..layer.sharded import gathered
from .scores import EVAL_BATCH, Scorer
from .trees import read_tree, write_tree

FILE = "sample.safetensors"  # in a run's folder
BYTES = 200_000  # of a sample; images get at most half of them
IMAGES, SIDE = 256, 48  # the number of images, and the largest side of one in pixels
TOKENS, LONGEST = 2048, 32  # of texts, and the characters that are kept of a token
OTHERS = 64  # samples of a task that does not say what people see of them
CHOICES = 16  # of a token that are kept
COMPARED, OUTPUTS, FEWEST = 128, 8192, 16  # tokens on which experts are compared, outputs for that, and fewest tokens


@attrs.define(eq=False)
class SampledLayer:
    """Where one layer sent the tokens of a sample, at the end of a run.

    expert [B, S, K]: each token's experts, its first choice first, and at most 16; -1 where it has fewer. gate [B, S,
    K]: their gates in half precision, 0 for a choice that capacity dropped. A router that mixes tokens has the weights
    with which a token's output is combined. labels [B, S]: class or domain of each token, or None. nearest, cka [E]:
    the expert whose outputs are most like an expert's, and the linear CKA of both on up to 128 tokens of the sample
    (see `linear_cka`); None for fewer than two experts or 16 tokens, -1 and nan for an expert without a CKA.
    """

    name: str
    experts: int
    expert: Tensor
    gate: Tensor
    labels: Tensor | None = None
    nearest: Tensor | None = None
    cka: Tensor | None = None

    def gates(self) -> Tensor:
        """[B, E]: the mean over a sample's tokens of each expert's gate, 0 for a token that did not choose it."""
        index_BN = self.expert.flatten(1).long()
        gate_BN = torch.where(index_BN >= 0, self.gate.flatten(1).float(), 0)
        sums_BE = torch.zeros(len(index_BN), self.experts).scatter_add(1, index_BN.clamp(min=0), gate_BN)
        return sums_BE / max(self.expert.shape[1], 1)

    def counts(self, group_BS: Tensor, groups: int) -> Tensor:
        """[groups, E]: the choices of tokens by the group of each [B, S]; -1: no group."""
        index_BSK = group_BS[..., None] * self.experts + self.expert.long()
        index_N = index_BSK[(self.expert >= 0) & (group_BS[..., None] >= 0)]
        return torch.bincount(index_N, minlength=groups * self.experts).view(groups, self.experts)

    def check(self, samples: int) -> None:
        """Raise ValueError or TypeError for a layer that does not fit together."""
        shape = self.expert.shape
        if len(shape) != 3 or shape[0] != samples or self.gate.shape != shape:
            raise ValueError(f"layer {self.name!r} has choices {[*shape]} of {samples} samples")
        if self.expert.is_floating_point() or not ((self.expert >= -1) & (self.expert < self.experts)).all():
            raise ValueError(f"layer {self.name!r} chose an expert that it does not have")
        if self.labels is not None and self.labels.shape != shape[:2]:
            raise ValueError(f"layer {self.name!r} has labels {[*self.labels.shape]}")
        for of_expert in (self.nearest, self.cka):
            if of_expert is not None and of_expert.shape != (self.experts,):
                raise ValueError(f"layer {self.name!r} compares {[*of_expert.shape]} experts")

    def part(self, row_b: Tensor, tokens: int | None) -> "SampledLayer":
        """Some samples, and the first tokens of each, or all."""
        labels = None if self.labels is None else self.labels[row_b, :tokens]
        return attrs.evolve(self, expert=self.expert[row_b, :tokens], gate=self.gate[row_b, :tokens], labels=labels)


@attrs.define(eq=False)
class Sample:
    """Samples of a run's test set, evenly spread over it: what people see of them, and where their tokens went.

    rows [B]: their places in the test set. images: uint8 [B, H, W] or [B, 3, H, W], or None. texts: of each sample the
    texts of its tokens, or None. layers: those whose tokens are the same number of every sample.
    """

    rows: Tensor
    images: Tensor | None = None
    texts: list[list[str]] | None = None
    layers: list[SampledLayer] = attrs.field(factory=list)

    @property
    def bytes(self) -> int:
        """About the size of its file."""
        tensors = [self.images, *(one for layer in self.layers for one in (layer.expert, layer.gate, layer.labels))]
        texts = 0 if self.texts is None else len(json.dumps(self.texts))
        return texts + sum(one.nbytes for one in tensors if one is not None)

    def part(self, count: int, tokens: int | None = None) -> "Sample":
        """Some of the samples, evenly spread, and the first tokens of each, or all."""
        row_b = spread(count, len(self.rows))
        return Sample(
            self.rows[row_b],
            None if self.images is None else self.images[row_b],
            None if self.texts is None else [self.texts[row][:tokens] for row in row_b.tolist()],
            [layer.part(row_b, tokens) for layer in self.layers],
        )

    def fitted(self) -> "Sample":
        """As many of the samples as `BYTES` hold, or the first tokens of one."""
        sample, tokens = self, max((layer.expert.shape[1] for layer in self.layers), default=1)
        while sample.bytes > BYTES and len(sample.rows) > 1:
            count = len(sample.rows)
            sample = sample.part(max(1, min(count - 1, count * BYTES // sample.bytes)))
        while sample.bytes > BYTES and tokens > 1:
            tokens = max(1, min(tokens - 1, tokens * BYTES // sample.bytes))
            sample = sample.part(1, tokens)
        return sample

    def write(self, path: Path) -> None:
        """Write it as one file, atomically."""
        write_tree(path, {"sample": 1, **attrs.asdict(self)})


def read_sample(path: Path) -> Sample:
    """The sample in a file, or in a run's folder. Raises UsageError if it is missing, damaged or not a sample."""
    path = path / FILE if path.is_dir() else path
    tree = read_tree(path, "sample")
    if not isinstance(tree, dict) or tree.pop("sample", None) != 1:
        raise UsageError(f"{path} holds no sample of a run's test set; name a run's {FILE}", code="foreign-file")
    try:
        sample = Sample(**{**tree, "layers": [SampledLayer(**layer) for layer in tree["layers"]]})
        _check_shown(sample.images, sample.texts, len(sample.rows))
        for layer in sample.layers:
            layer.check(len(sample.rows))
        return sample
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        message = f"{path} is damaged: its sample is invalid ({type(error).__name__}: {error})"
        raise UsageError(message, code="damaged-file") from error


def take_sample(engine: Engine, scorer: Scorer) -> Sample | None:
    """A sample of the test set, in eval mode and uncounted; None for a model without layers. All ranks must call it."""
    row_B = spread(_wanted(scorer.task), len(scorer.task.test[0]))
    decided: dict[MoE, list[_Decided]] = {layer: [] for layer in engine.layers}
    with torch.no_grad(), evaluating(scorer.model), uncounted(engine.layers):
        for some_B in row_B.split(min(EVAL_BATCH, scorer.task.most_rows or EVAL_BATCH)):
            scorer.score(scorer.test_rows(some_B))
            for layer, found in decided.items():
                found += [_Decided.of(routing, len(some_B)) for routing in (layer.watched or [])[-1:]]
                layer.watched = []
        layers = [_sampled(layer, found, len(row_B)) for layer, found in decided.items()]
    images, texts = shown(scorer.task, row_B)
    sample = Sample(row_B, images, texts, [layer for layer in layers if layer is not None])
    return sample.fitted() if sample.layers else None


def spread(count: int, of: int) -> Tensor:
    """[min(count, of)]: places that are evenly spread over `of`."""
    count = min(count, of)
    return torch.arange(count) * of // max(count, 1)


def shown(task: Task, row_B: Tensor) -> tuple[Tensor | None, list[list[str]] | None]:
    """(images, texts): what people see of some rows of the test set; one of them is None, or both.

    Images are made small, and texts of tokens cut. Raises UsageError for anything else.
    """
    if task.show is None:
        return None, None
    seen = task.show(tuple(column[row_B] for column in task.test))
    images = seen if isinstance(seen, Tensor) else None
    texts: Any = None if images is not None else seen
    try:
        _check_shown(images, texts, len(row_B))
    except (TypeError, ValueError) as error:
        message = f"Task.show is wrong: {error}; return uint8 images [B, H, W] or [B, 3, H, W], or a list of the texts"
        raise UsageError(f"{message} of its tokens for each of B rows", code="bad-show") from error
    if images is None:
        return None, [[text[:LONGEST] for text in tokens] for tokens in texts]
    return _small(images.cpu()), None


def _check_shown(images: Any, texts: Any, samples: int) -> None:
    if images is not None:
        coloured = images.dim() == 4 and images.shape[1] == 3
        if images.dtype != torch.uint8 or not (coloured or images.dim() == 3) or len(images) != samples:
            raise ValueError(f"it has images {images.dtype} {[*images.shape]} of {samples} samples")
    elif texts is not None:
        if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) != samples:
            raise ValueError(f"it has no list for each of {samples} samples")
        if not all(isinstance(text, str) for tokens in texts for text in tokens):
            raise TypeError("it has tokens that are not texts")


def _small(images: Tensor) -> Tensor:
    """Images of at most `SIDE` pixels a side; each pixel is the mean of a square."""
    factor = -(-max(images.shape[-2:]) // SIDE)
    if factor <= 1:
        return images
    coloured = images if images.dim() == 4 else images[:, None]
    means = F.avg_pool2d(coloured.float(), factor, ceil_mode=True).round().to(torch.uint8)
    return means if images.dim() == 4 else means[:, 0]


def _wanted(task: Task) -> int:
    """How many samples to take, by what people see of one."""
    images, texts = shown(task, torch.zeros(1, dtype=torch.long))
    if images is not None:
        return max(1, min(IMAGES, BYTES // 2 // max(images.numel(), 1)))
    return OTHERS if texts is None else max(1, TOKENS // max(len(texts[0]), 1))


@attrs.frozen(eq=False)
class _Decided:
    """One forward of a layer: choices [b, s, k], labels [b, s], and its input [T, D]; choices are None if T is odd."""

    expert: Tensor | None
    gate: Tensor | None
    labels: Tensor | None
    tokens: Tokens

    @classmethod
    def of(cls, routing: Routing, samples: int) -> "_Decided":
        tokens = routing.tokens
        if not len(tokens.x) or len(tokens.x) % samples:
            return cls(None, None, None, tokens)
        expert_TK, gate_TK = chosen(routing)
        labels = None if tokens.labels is None else tokens.labels.view(samples, -1).to("cpu", torch.int32)
        return cls(expert_TK.unflatten(0, (samples, -1)), gate_TK.unflatten(0, (samples, -1)), labels, tokens)


def chosen(routing: Routing) -> tuple[Tensor, Tensor]:
    """(experts int16 [T, K], gates float16 [T, K]) of each token, its first choice first, -1 and 0 where it has fewer.

    K: the most choices of a token, at least 1 and at most `CHOICES`. Choices without ranks are ordered by their gates.
    """
    plan, count = routing.plan, len(routing.tokens.x)
    if routing.slots is not None:
        mass_TE = routing.slots.combine.sum(-1).flatten(0, 1)
        mass_TK, expert_TK = mass_TE.topk(min(CHOICES, routing.experts), dim=-1)
        return expert_TK.to("cpu", torch.int16), mass_TK.to("cpu", torch.float16)
    on_N = plan.selected
    token_N, expert_N, rank_N = (column[on_N].cpu() for column in (plan.token, plan.expert, plan.rank))
    gate_N = torch.where(plan.kept, plan.weight, 0)[on_N].cpu()
    order_N = (rank_N if plan.each else -gate_N).argsort(stable=True)
    order_N = order_N[token_N[order_N].argsort(stable=True)]
    token_N = token_N[order_N]
    starts_T = torch.bincount(token_N, minlength=count).cumsum(0).roll(1)
    starts_T[:1] = 0
    place_N = torch.arange(len(token_N)) - starts_T[token_N]
    width = min(CHOICES, int(place_N.max()) + 1 if len(place_N) else 1)
    kept_N = place_N < width
    where = token_N[kept_N], place_N[kept_N]
    expert_TK = torch.full((count, width), -1, dtype=torch.int16)
    gate_TK = torch.zeros(count, width, dtype=torch.float16)
    expert_TK[where] = expert_N[order_N][kept_N].to(torch.int16)
    gate_TK[where] = gate_N[order_N][kept_N].to(torch.float16)
    return expert_TK, gate_TK


def _sampled(layer: MoE, found: Sequence[_Decided], samples: int) -> SampledLayer | None:
    """The choices of all forwards of a layer; None if its tokens can't be told apart by sample."""
    experts = [one.expert for one in found if one.expert is not None]
    gates = [one.gate for one in found if one.gate is not None]
    if sum(map(len, experts)) != samples or len({one.shape[1] for one in experts}) != 1:
        return None
    labels = [one.labels for one in found if one.labels is not None]
    nearest, cka = _nearest(layer, found[0].tokens)
    return SampledLayer(
        layer.name,
        layer.spec.experts,
        _joined(experts, -1),
        _joined(gates, 0),
        torch.cat(labels) if len(labels) == len(found) else None,
        nearest,
        cka,
    )


def _joined(chosen_BSK: Iterable[Tensor], filling: int) -> Tensor:
    """Choices of several forwards, all as wide as the widest."""
    parts = [*chosen_BSK]
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=filling) for part in parts])


def _nearest(layer: MoE, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """(nearest, cka) of `SampledLayer`."""
    x_TD = tokens.x if tokens.mask is None else tokens.x[tokens.mask]
    x_SD = x_TD[spread(min(COMPARED, OUTPUTS // layer.spec.experts), len(x_TD)).to(x_TD.device)]
    if layer.spec.experts < 2 or len(x_SD) < FEWEST:
        return None, None
    with gathered(layer), evaluating(layer.experts):
        y_ESO = layer.experts.outputs(x_SD.to(next(layer.experts.parameters(), x_SD).dtype)).double().cpu()
    cka_EE = linear_cka(y_ESO).fill_diagonal_(torch.nan)
    cka_E, nearest_E = cka_EE.nan_to_num(-torch.inf).max(1)
    known_E = cka_E > -torch.inf
    return torch.where(known_E, nearest_E, -1).to(torch.int16), torch.where(known_E, cka_E, torch.nan).float()
