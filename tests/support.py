"""Helpers of the tests that are not fixtures."""

import gc
import json
import multiprocessing
from contextlib import contextmanager

import pytest
import torch

from moe_engine import UsageError
from moe_engine.files import digest, unsealed
from moe_engine.run.folder import write_summary
from moe_engine.run.trees import packed, read_tree
from moe_engine.testing.rank_processes import PRELOADED


def ends(folder):
    """What of a run must be the same, bit for bit, whatever happened to it on the way."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"], summary["speed"], summary["sha256"]
    del summary["files"]["config.toml"]  # which names its options
    files = [(folder / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")]
    best = read_tree(folder / "checkpoints" / "best.safetensors")
    sample = folder / "sample.safetensors"
    return summary, files, best["loop"]["step"], packed(read_tree(sample)).sum() if sample.exists() else None


@contextmanager
def refused(code, *words, kind=UsageError):
    """Inside, an error of that kind and code is raised, whose sentence names the words; how it is put is free."""
    with pytest.raises(kind) as caught:
        yield caught
    sentence = str(caught.value)
    assert caught.value.code == code, f"{caught.value.code!r}: {sentence}"
    assert [word for word in words if str(word) not in sentence] == [], sentence


def forge(folder, summary=None):
    """Give a run's folder the checksums of what it holds now, as a program could; summary: another one."""
    if summary is None:
        summary = unsealed((folder / "summary.json").read_text("utf-8"))
        del summary["files"]
    content = (folder / "metrics.jsonl").read_bytes()
    write_summary(folder, summary, digest(content))


def on_ranks(function, *args, count=2):
    """Call function(rank, *args) in that many processes, forked from one that has imported torch already."""
    multiprocessing.set_forkserver_preload([*PRELOADED])
    torch.multiprocessing.start_processes(_on_rank, (function, *args), count, start_method="forkserver")


def _on_rank(rank, function, *args):
    gc.collect()
    gc.freeze()  # growths, which look for optimizers among all objects, need not look among what is imported
    function(rank, *args)
