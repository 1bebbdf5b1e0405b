"""Logits of a model on a fixed probe of random tokens, by which what was done to the model is measured."""

from typing import Any

import torch
from torch import Tensor

from ..contract.families import config_value

TOKENS = 16  # of the probe
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of logits, relative to the largest; 2e-2 for halves


def probe_of(model: Any) -> Tensor | None:
    """[1, S]: the probe's token ids; None for a model that takes none."""
    config: Any = getattr(model, "config", None)
    vocab = config_value(config.get_text_config(), "vocab_size") if hasattr(config, "get_text_config") else None
    if not isinstance(vocab, int):
        return None
    return torch.randint(vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)


@torch.no_grad()
def logits_on(model: Any, ids: Tensor) -> Tensor:
    """The logits for these token ids; the hidden states of a model without a head."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    answer = model(input_ids=ids, **extra)
    logits: Tensor = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
    return logits.float()


def moved(before: Tensor, after: Tensor) -> float:
    """The largest |difference|, relative to the largest |logit| before."""
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative change of logits that is rounding, for a model in this precision."""
    return TOLERANCE.get(dtype, 2e-2)
