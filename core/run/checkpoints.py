"""Checkpoints: anything with a state_dict, in one safetensors file with a checksum, without pickle.

A state is a tree of dicts, lists and plain values with tensors as leaves. The tensors are stored as the file's
tensors; the rest of the tree, with the tensors' names as placeholders, is JSON in the file's metadata.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import UsageError, listed
from ..files import write_atomically
from ..optimizer_state import restore, wrong_shape
from ..processes import agreed, full_tensor, rank, shard_like, world_size

SPECIAL = "$"  # the key of a JSON object that represents a value JSON can't express


class Stateful(Protocol):
    """Anything with a state: a model, an optimizer, a scheduler, a GradScaler, an engine."""

    def state_dict(self) -> Any:
        """The state, as a tree."""

    def load_state_dict(self, state: Any) -> Any:
        """Restore a state."""


def save(path: str | Path, **objects: Stateful) -> None:
    """Write the states of several objects, each under its keyword, into one file, atomically.

        save("state.safetensors", model=model, optimizer=optimizer, engine=engine)

    Sharded tensors are gathered: then all ranks must call it, and the first one writes. Raises TypeError for a state
    that holds anything but tensors and plain values, and UsageError if the file can't be written.
    """
    tree = {name: stateful.state_dict() for name, stateful in objects.items()}
    sharded = next(_sharded(tree), None)
    with nullcontext() if sharded is None else agreed(f"saving {path}", sharded.device):
        packed = _pack_on_first(tree)
        if packed is not None:
            try:
                _write(Path(path), *packed)
            except OSError as error:
                raise UsageError(f"{path} can't be written: {error.strerror}", code="unwritable-path") from error


def _sharded(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree that are sharded over ranks."""
    if hasattr(tree, "full_tensor"):
        yield tree
    for child in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ():
        yield from _sharded(child)


def load(path: str | Path, **objects: Stateful) -> None:
    """Restore the states that `save` wrote under these keywords; layers may have any number of experts.

    The model is loaded first, so the optimizers have the right shapes. Raises UsageError, before anything
    changes, for a file that is missing or damaged, and for a keyword that is not in it.
    """
    tree = read_tree(Path(path))
    if missing := objects.keys() - tree.keys():
        message = f"{path} holds {listed(sorted(tree))}, but not {listed(sorted(missing))}"
        raise UsageError(message, code="missing-state")
    for name, stateful in sorted(objects.items(), key=lambda pair: not isinstance(pair[1], torch.nn.Module)):
        try:
            if isinstance(stateful, torch.optim.Optimizer):
                _check_shapes(path, name, stateful, tree[name])
                restore(stateful, tree[name])
            elif isinstance(stateful, torch.nn.Module):
                held = stateful.state_dict()
                stateful.load_state_dict(
                    {key: shard_like(value, held.get(key, value)) for key, value in tree[name].items()}
                )
            else:
                stateful.load_state_dict(tree[name])
        except (KeyError, TypeError, AttributeError) as error:  # from a tree of the wrong shape, deep in someone's code
            message = f"{path}: '{name}' is not the state of a {type(stateful).__name__} ({error})"
            raise UsageError(message, code="foreign-state") from error


def _check_shapes(path: str | Path, name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raise UsageError for a state of other shapes, with which a fused optimizer would kill the process."""
    if not isinstance(state, Mapping) or not {"param_groups", "state"} <= state.keys():
        raise UsageError(f"{path}: '{name}' is not the state of an optimizer", code="foreign-state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in state["param_groups"]):
        message = f"{path}: '{name}' is the state of an optimizer with another number of parameters"
        raise UsageError(message, code="state-mismatch")
    for index, held in state["state"].items():
        if key := wrong_shape(parameters[index], held):
            found, wanted = list(held[key].shape), list(parameters[index].shape)
            raise UsageError(
                f"{path}: '{name}' keeps '{key}' of shape {found} for a parameter of {wanted}; load its model with it",
                code="state-mismatch",
            )


# -- trees and files -------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree into a file, atomically."""
    _write(path, *_pack(tree))


def _pack(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """(the tree as JSON with tensors as names, the tensors by name)."""
    tensors: dict[str, Tensor] = {}
    return json.dumps(_packed(tree, "", tensors), allow_nan=False), tensors


def _pack_on_first(tree: Any) -> tuple[str, dict[str, Tensor]] | None:
    """`_pack` on the first rank; the others only help to gather what is cut, and hold no copy of the rest."""
    if rank() == 0:
        return _pack(tree)
    for cut in _sharded(tree):
        full_tensor(cut.detach())
    return None


def _write(path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    write_atomically(path, to_bytes(dict(tensors), {"tree": text, "sha256": _checksum(text, tensors)}))


def read_tree(path: Path, kind: str = "checkpoint") -> Any:
    """The tree that `write_tree` wrote. kind: the kind of file, for error messages.

    Raises UsageError for a file that is missing, damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
        if "tree" not in meta:
            raise UsageError(f"{path} holds tensors, but is not a moe_engine {kind}", code="foreign-file")
        if meta.get("sha256") != _checksum(meta["tree"], tensors):
            raise UsageError(f"{path} is damaged: its checksum is wrong", code="damaged-file")
        return _unpacked(json.loads(meta["tree"]), tensors)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {kind} {path}", code="missing-file") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {error}", code="damaged-file") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while where in tensors:  # {"a.b": x, "a": {"b": y}}
            where += "'"
        tensors[where] = full_tensor(value.detach()).cpu().contiguous().clone()
        return {SPECIAL: "tensor", "name": where}
    if isinstance(value, Mapping):
        return _packed_dict(value, where, tensors)
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {SPECIAL: "tuple", "values": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {SPECIAL: "float", "value": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    raise TypeError(f"a checkpoint holds tensors, numbers, strings, lists and dicts; {where} is a {kind}")


def _packed_dict(value: Mapping[Any, Any], where: str, tensors: dict[str, Tensor]) -> Any:
    pairs = [(key, _packed(item, f"{where}.{key}" if where else str(key), tensors)) for key, item in value.items()]
    kind = "counter" if isinstance(value, Counter) else "dict"  # MultiStepLR keeps its milestones in a Counter
    if kind == "dict" and all(isinstance(key, str) and key != SPECIAL for key in value):
        return dict(pairs)
    return {SPECIAL: kind, "pairs": [[_packed(key, "", {}), item] for key, item in pairs]}


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    def unpacked(values: list[Any]) -> list[Any]:
        return [_unpacked(item, tensors) for item in values]

    if isinstance(value, list):
        return unpacked(value)
    if not isinstance(value, dict):
        return value
    if SPECIAL not in value:
        return dict(zip(value, unpacked(list(value.values())), strict=True))
    special: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[value["name"]],
        "tuple": lambda: tuple(unpacked(value["values"])),
        "dict": lambda: dict(map(unpacked, value["pairs"])),
        "counter": lambda: Counter(dict(value["pairs"])),
        "float": lambda: float(value["value"]),
    }
    return special[value[SPECIAL]]()


# -- a run's checkpoints -----------------------------------------------------------------------------


class Checkpoints:
    """A run's checkpoints folder: the last two, and best.safetensors, the one with the lowest test loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, tree: Any) -> None:
        """Write the checkpoint of a step, then remove all but the last two. All ranks must call it.

        The first rank writes all that is the same everywhere, with what is cut made whole; every other one writes its
        random draws, next to it and before.
        """
        self._write(f"step-{step:08}", tree)
        for old in self._files()[:-2] if rank() == 0 else ():
            old.unlink()
            for beside in self.folder.glob(f"{old.stem}.rank-*"):
                beside.unlink()

    def write_best(self, tree: Any) -> None:
        """Write best.safetensors. All ranks must call it."""
        self._write("best", tree)

    def _write(self, name: str, tree: Any) -> None:
        packed = _pack_on_first(tree)
        with agreed(f"writing checkpoint {name}", torch.device("cpu")):
            if rank() and name != "best":
                self.folder.mkdir(exist_ok=True)
                write_tree(self.folder / f"{name}.rank-{rank()}", {"draws": tree["draws"]})
        with agreed(f"writing checkpoint {name}", torch.device("cpu")):
            if packed is not None:
                self.folder.mkdir(exist_ok=True)
                _write(self.folder / f"{name}.safetensors", *packed)

    def draws(self, tree: Any) -> Any:
        """The random draws of this rank in a checkpoint; None if it was made by another number of ranks.

        Then every rank but the first begins its draws anew.
        """
        if rank() == 0:
            return tree["draws"]
        if tree["ranks"] != world_size():
            return None
        return read_tree(self.folder / f"step-{tree['loop']['step']:08}.rank-{rank()}")["draws"]

    def newest(self, say: Callable[[str], None]) -> Any:
        """The tree of the newest intact checkpoint, or None; `say` receives a remark on each damaged one.

        Damaged checkpoints are renamed, so they do not count among the last two.
        """
        for path in reversed(self._files()):
            try:
                return read_tree(path)
            except UsageError as error:
                if rank() == 0:
                    path.rename(path.with_suffix(".damaged"))
                say(f"{error}; trying the one before")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
