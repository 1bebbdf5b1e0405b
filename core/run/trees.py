"""Trees of plain values and tensors, in one safetensors file with a checksum, without pickle.

A tree is made of dicts, lists and plain values, with tensors as leaves. The tensors are stored as the file's tensors;
the rest of the tree, with the tensors' names as placeholders, is JSON in the file's metadata. Tensors that are cut
over ranks are gathered into it, or stay in shards next to it.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import UsageError
from ..files import check_file, refused, write_atomically
from ..processes import full_tensor, is_cut, rank
from .shards import read_shards

SPECIAL = "$"  # the key of a JSON object that represents a value JSON can't express
Put = Callable[[str, Tensor], dict[str, Any]]  # stores a tensor by its place in the tree; returns its placeholder


def cut_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree that are cut over ranks, in its order."""
    if is_cut(tree):
        yield tree
    for child in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ():
        yield from cut_in(child)


@attrs.frozen
class Packed:
    """A tree, ready to be written: as JSON that names tensors, the tensors, and the digests of its shards as JSON."""

    tree: str
    tensors: dict[str, Tensor]
    shards: str

    def write(self, path: Path) -> None:
        """Write it into a file, atomically."""
        write_atomically(path, to_bytes(self.tensors, {"tree": self.tree, "shards": self.shards, "sha256": self.sum()}))

    def sum(self) -> str:
        """The checksum."""
        digest = sha256((self.tree + self.shards).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree into a file, atomically, from one process."""
    packed(tree).write(path)


def packed(tree: Any, shards: Mapping[str, str] | None = None) -> Packed:
    """A tree, packed. Raises TypeError for one that holds anything but tensors and plain values.

    shards: the digests of the files in which `write_shards` has stored what is cut; None: that is gathered, for which
    the other ranks must call `packed_on_first`.
    """
    tensors: dict[str, Tensor] = {}
    elsewhere = map(str, count())

    def put(where: str, tensor: Tensor) -> dict[str, Any]:
        if is_cut(tensor) and shards is not None:
            return {SPECIAL: "cut", "name": next(elsewhere)}
        while where in tensors:  # {"a.b": x, "a": {"b": y}}
            where += "'"
        tensors[where] = full_tensor(tensor).cpu().contiguous().clone()
        return {SPECIAL: "tensor", "name": where}

    text = json.dumps(_plain(tree, "", put), allow_nan=False)
    return Packed(text, tensors, json.dumps(shards or {}))


def packed_on_first(tree: Any) -> Packed | None:
    """A tree, packed, on the first rank; the others only help to gather what is cut, and hold no copy of the rest."""
    if rank() == 0:
        return packed(tree)
    for tensor in cut_in(tree):
        full_tensor(tensor.detach())
    return None


def read_tree(path: Path, kind: str = "checkpoint") -> Any:
    """The tree that a file holds. kind: the kind of file, for error messages.

    Raises UsageError for a file that is missing, damaged or of another kind.
    """
    try:
        check_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
        if "tree" not in meta:
            raise UsageError(f"{path} holds tensors, but is not a moe_engine {kind}", code="foreign-file")
        found = Packed(meta["tree"], tensors, meta.get("shards", "{}"))
        if meta.get("sha256") != found.sum():
            raise UsageError(f"{path} is damaged: its checksum is wrong", code="damaged-file")
        digests = json.loads(found.shards)
        cut = read_shards(shards_of(path), digests) if digests else {}
        return _unpacked(json.loads(found.tree), tensors, cut)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {kind} {path}", code="missing-file") from error
    except OSError as error:  # a file that can't be read now may be intact
        raise UsageError(
            refused(error) if error.filename else f"{path}: {refused(error)}", code="unreadable-file"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {error}", code="damaged-file") from error


def shards_of(path: Path) -> Path:
    """The folder of a file's shards."""
    return path.with_suffix(".shards")


def _plain(value: Any, where: str, put: Put) -> Any:
    if isinstance(value, Tensor):
        return put(where, value.detach())
    if isinstance(value, Mapping):
        return _plain_dict(value, where, put)
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}.{index}", put) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {SPECIAL: "tuple", "values": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {SPECIAL: "float", "value": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    raise TypeError(f"a checkpoint holds tensors, numbers, strings, lists and dicts; {where} is a {kind}")


def _plain_dict(value: Mapping[Any, Any], where: str, put: Put) -> Any:
    pairs = [(key, _plain(item, f"{where}.{key}" if where else str(key), put)) for key, item in value.items()]
    kind = "counter" if isinstance(value, Counter) else "dict"  # MultiStepLR keeps its milestones in a Counter
    if kind == "dict" and all(isinstance(key, str) and key != SPECIAL for key in value):
        return dict(pairs)
    return {SPECIAL: kind, "pairs": [[_plain(key, "", put), item] for key, item in pairs]}


def _unpacked(value: Any, tensors: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> Any:
    def unpacked(values: list[Any]) -> list[Any]:
        return [_unpacked(item, tensors, cut) for item in values]

    if isinstance(value, list):
        return unpacked(value)
    if not isinstance(value, dict):
        return value
    if SPECIAL not in value:
        return dict(zip(value, unpacked(list(value.values())), strict=True))
    special: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[value["name"]],
        "cut": lambda: cut[value["name"]],
        "tuple": lambda: tuple(unpacked(value["values"])),
        "dict": lambda: dict(map(unpacked, value["pairs"])),
        "counter": lambda: Counter(dict(value["pairs"])),
        "float": lambda: float(value["value"]),
    }
    return special[value[SPECIAL]]()
