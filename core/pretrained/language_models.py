"""Causal language models to train: a folder's config and tokenizer first, then the weights.

Suffixes: T tokens.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.parts import Router
from ..engine.engine import Engine
from ..errors import UsageError
from ..files import check_file
from .families import blocks_of
from .loading import LOCAL, gguf_of, load_model, load_tokenizer, reading
from .words import Words

LENGTH = 512  # tokens of a window
TRAINED = ("all", "moe", "router")


@attrs.frozen(eq=False, slots=False)
class PretrainedLM:
    """A causal language model of transformers in a folder: what is known before its weights are read.

        language = PretrainedLM.open("Qwen3-30B-A3B")
        ids = language.encode("To be, or not to be")
        model = language.load()

    folder: with config.json, tokenizer and weights, as safetensors or as one GGUF file. config: the model's.
    tokenizer: the folder's.
    """

    folder: Path
    config: Any
    tokenizer: Any

    @classmethod
    def open(cls, folder: str | Path) -> "PretrainedLM":
        """Read the config and the tokenizer. Raises UsageError for a folder that can't be trained from."""
        folder = Path(folder)
        config = _config(folder)
        tokenizer = load_tokenizer(folder)
        vocab, known = config.get_text_config().vocab_size, len(tokenizer)
        if known > vocab:
            message = (
                f"the tokenizer of {folder} has {known} tokens, but its model an embedding of {vocab}; "
                "it is another model's, so copy the right one"
            )
            raise UsageError(message, code="wrong-tokenizer")
        return cls(folder, config, tokenizer)

    def encode(self, text: str) -> Tensor:
        """[T]: the ids of a text, without special tokens around it."""
        found = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return torch.tensor(found["input_ids"], dtype=torch.long)

    def words(self, id_T: Tensor) -> list[str]:
        """The text of each token, or its name if it is a part of a character."""
        return [self._words.of(token) for token in id_T.tolist()]

    def read(self, path: Path) -> Tensor:
        """[T]: the ids of a UTF-8 text file, without a byte order mark. Raises UsageError."""
        try:
            check_file(path)
            text = path.read_text("utf-8-sig")
        except OSError as error:
            raise UsageError(f"the text {path} can't be read: {error.strerror}", code="unreadable-file") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: byte {error.start} is invalid", code="not-a-text") from error
        return self.encode(text)

    def load(self) -> Any:
        """The model in float32, in training mode. Raises UsageError."""
        model = load_model(self.folder, "float32").train()
        model.config.use_cache = False
        if getattr(model.config, "quantization_config", None) is not None:  # of a GGUF file, which was dequantised
            del model.config.quantization_config
        return model

    @cached_property
    def _words(self) -> Words:
        return Words(self.tokenizer)

    @cached_property
    def outline(self) -> nn.Module:
        """The model on the meta device, without weights."""
        from transformers import AutoModelForCausalLM

        with reading(self.folder, "the model"), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        return model

    def window(self, wanted: int | None = None) -> int:
        """Tokens in a window: as many as wanted, or 512, or what the model takes. Raises UsageError for more."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if wanted is not None and most is not None and wanted > most:
            message = f"a window of {wanted} tokens is more than {self.folder} takes, {most}; lower the length"
            raise UsageError(message, code="window-too-long")
        return wanted or min(LENGTH, most or LENGTH)

    @cached_property
    def is_mixture(self) -> bool:
        """Whether the model has MoE blocks that a family knows."""
        try:
            return bool(blocks_of(self.outline))
        except UsageError:
            return False


def _config(folder: Path) -> Any:
    gguf = gguf_of(folder)
    with reading(folder, "the config") as transformers:
        named = {} if gguf is None else {"gguf_file": gguf.name}
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL, **named)
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        message = f"{folder} holds a {config.model_type}, which is not a causal language model of transformers"
        raise UsageError(message, code="not-a-language-model")
    method = (getattr(config, "quantization_config", None) or {}) if gguf is None else {}
    if method:
        kind = method.get("quant_method", "quantised") if isinstance(method, dict) else type(method).__name__
        message = f"{folder} holds quantised weights ({kind}), which can't be trained; name the unquantised checkpoint"
        raise UsageError(message, code="quantised-checkpoint")
    return config


def train_only(engine: Engine, model: nn.Module, what: str) -> int:
    """Freeze all of a model's weights but some; returns how many are trained.

    what: "all" freezes none, "moe" leaves the routers and experts of the engine's layers, "router" the routers. The
    layers' shared experts are frozen with the rest. Call it after `adopt` or `upcycle`.
    """
    if what not in TRAINED:
        raise ValueError(f"what is one of {TRAINED}, not {what!r}")
    if what != "all":
        chosen = {
            id(getattr(part, name))
            for layer in engine.layers
            for _, part in layer.parts()
            if what == "moe" or isinstance(part, Router)
            for name in part.axes
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
