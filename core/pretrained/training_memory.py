"""Estimate the memory that training a language model needs, before its weights are read; does the device have it?"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import UsageError
from .families import blocks_of, dense_blocks_of
from .language_models import PretrainedLM
from .upcycling import wanted_layers

FLOAT = 4  # bytes of a weight, a gradient, a moment or a kept value in float32
MOMENTS = 2  # of Adam, for each trained weight
# values that backward keeps of a token, as measured on a Mixtral: per layer in widths of the model, for each chosen
# expert in its hidden units and in widths, and at the head in sizes of the vocabulary
KEPT_BY_LAYER, KEPT_BY_UNIT, KEPT_BY_EXPERT, KEPT_BY_HEAD = 24, 6, 2, 3
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
COPIES = 3  # of what a checkpoint holds, in main memory while it is written
GIGA = 1e9


@attrs.frozen
class TrainingMemory:
    """Bytes that training needs.

    weights, gradients, moments: exact, in float32; the latter two of trained weights alone. activations: roughly what
    backward keeps of a batch. checkpoint: copies of weights and moments while a checkpoint is written, where they are
    in main memory.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    checkpoint: int = 0

    @property
    def total(self) -> int:
        """The larger of both peaks: in a step, and while a checkpoint is written."""
        return self.weights + self.gradients + self.moments + max(self.activations, self.checkpoint)

    def __str__(self) -> str:
        parts = {name: size for name, size in attrs.asdict(self).items() if size}
        told = ", ".join(f"{name} {size / GIGA:.3g}" for name, size in parts.items())
        return f"about {self.total / GIGA:.3g} GB at most ({told})"

    def check(self, device: str, advice: Sequence[str]) -> None:
        """Raise UsageError, with advice, if a device has less memory free."""
        free = free_memory(device)
        if free is not None and self.total > free:
            where = "main memory" if device == "cpu" else device
            message = f"training needs {self}, but {where} has {free / GIGA:.3g} GB free; {', or '.join(advice)}"
            raise UsageError(message, code="not-enough-memory")


def training_memory(
    language: PretrainedLM,
    *,
    train: str,
    tokens: int,
    probed: int = 0,
    device: str = "cpu",
    recompute: bool = False,
    experts: int = 0,
    layers: str | Sequence[int] = "all",
    top_k: int = 1,
) -> TrainingMemory:
    """What training a language model needs, by its config alone.

    train: as for `train_only`. tokens: of a batch. probed: of a forward whose effects are measured, which is never
    recomputed. recompute: gradient checkpointing, which keeps the input of each layer, and the rest of one. experts,
    layers, top_k: of a dense model that is upcycled. Raises UsageError for a model without MoE blocks, or, if it is
    upcycled, without dense ones.
    """
    text, model = language.config.get_text_config(), language.outline
    weights = _count(model)
    if experts:
        found = {block.index: _count(block.module) for block in dense_blocks_of(model)}
        of_experts = experts * sum(found[index] for index in wanted_layers(layers, sorted(found)) if index in found)
        weights += of_experts - of_experts // experts
        chosen = top_k
    else:
        of_experts = _of_experts(model)
        chosen = next((k for name in CHOSEN if isinstance(k := getattr(text, name, None), int)), 1)
    trained = {"all": weights, "moe": of_experts, "router": 0}[train]
    hidden = next(size for name in HIDDEN if (size := getattr(text, name, None)))
    layer = (KEPT_BY_LAYER + KEPT_BY_EXPERT * chosen) * text.hidden_size + KEPT_BY_UNIT * chosen * hidden
    kept = text.num_hidden_layers * text.hidden_size + layer if recompute else text.num_hidden_layers * layer
    head, held = KEPT_BY_HEAD * text.vocab_size, weights + MOMENTS * trained
    probe = probed * (text.num_hidden_layers * layer + head)
    return TrainingMemory(
        weights=FLOAT * weights,
        gradients=FLOAT * trained,
        moments=FLOAT * MOMENTS * trained,
        activations=FLOAT * max(tokens * (kept + head), probe),
        checkpoint=FLOAT * COPIES * held if device == "cpu" else 0,
    )


HIDDEN = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "n_inner", "ffn_dim", "hidden_size")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _of_experts(model: nn.Module) -> int:
    """Weights of routers and experts."""
    blocks: list[Any] = blocks_of(model)
    return sum(block.tensor(path).numel() for block in blocks for path in block.family.tensors)


def free_memory(device: str) -> int | None:
    """Bytes free on a device: of a GPU, or of main memory and this process's control group; None if it isn't known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if device != "cpu":
        return None
    found = [_available(), _of_group()]
    return min((size for size in found if size is not None), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _of_group() -> int | None:
    """What a container's limit leaves (cgroup 2)."""
    try:
        folder = Path("/sys/fs/cgroup")
        most, used = ((folder / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        return None if most == "max" else int(most) - int(used)
    except (OSError, ValueError):
        return None
