"""Tensors that are cut over ranks, written by torch.distributed.checkpoint: every rank writes what it holds.

They are stored as safetensors: torch's default format unpickles its metadata when it is read.
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..processes import agreed, cut_like, rank


def write_shards(folder: Path, cut: Sequence[Tensor]) -> dict[str, str]:
    """Write cut tensors, named by their index, into a folder; returns the SHA-256 of each file by its name to rank 0.

    All ranks must call it, with one file system; the others get nothing.
    """
    from torch.distributed.checkpoint import (  # type: ignore[attr-defined]  # public all the same
        CheckpointException,
        HuggingFaceStorageWriter,
        save,
    )

    with agreed(f"making {folder}", torch.device("cpu")):
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a save that was interrupted
            folder.mkdir(parents=True)
    try:
        save(_storable(cut), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, OSError) else error from None
    return _digests(folder) if rank() == 0 else {}


def read_shards(folder: Path, digests: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `write_shards` wrote, whole. Raises UsageError unless the files have these digests."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load  # type: ignore[attr-defined]

    if _digests(folder) != digests:
        raise UsageError(f"{folder} is damaged: a checksum is wrong, or a file is missing", code="damaged-file")
    reader = HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in known.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it says so despite no_dist
        load(state, storage_reader=reader, no_dist=True)
    return state


def _storable(cut: Sequence[Any]) -> dict[str, Tensor]:
    """Cut tensors by their index, as safetensors takes them: parts on this rank are contiguous and share no memory."""
    storable, seen = {}, set()
    for index, tensor in enumerate(cut):
        part = tensor.detach().to_local().contiguous()
        part = part.clone() if part.data_ptr() in seen else part
        seen.add(part.data_ptr())
        storable[str(index)] = cut_like(tensor, part)
    return storable


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = file_digest(file, "sha256").hexdigest()
    return digests
