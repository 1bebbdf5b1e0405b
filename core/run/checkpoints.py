"""Checkpoints: anything with a state_dict, in one safetensors file with a checksum. Nothing is pickled.

A state is a tree of dicts, lists and plain values with tensors as leaves. The tensors are the file's
tensors; the rest of the tree, with their names in their places, is JSON in the file's metadata.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
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

SPECIAL = "$"  # the key of a JSON object that stands for what JSON has not


class Stateful(Protocol):
    """A model, an optimizer, a scheduler, a GradScaler, an engine: what has a state."""

    def state_dict(self) -> Any:
        """The state, as a tree."""

    def load_state_dict(self, state: Any) -> Any:
        """Take a state over."""


def save(path: str | Path, **objects: Stateful) -> None:
    """Write the states of objects, each under its keyword, into one file, atomically.

        save("state.safetensors", model=model, optimizer=optimizer, engine=engine)

    Raises TypeError for a state that holds anything but tensors and plain values, UsageError if the file
    can't be written.
    """
    try:
        write_tree(Path(path), {name: one.state_dict() for name, one in objects.items()})
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error


def load(path: str | Path, **objects: Stateful) -> None:
    """Give objects the states that `save` wrote under these keywords, whatever number of experts they are of.

    The model is loaded before the rest, so that optimizers find the right shapes. Raises UsageError,
    before anything is changed, for a file that is absent or damaged, and for a keyword that it lacks.
    """
    tree = read_tree(Path(path))
    if missing := objects.keys() - tree.keys():
        raise UsageError(f"{path} holds {listed(sorted(tree))}, but no {listed(sorted(missing))}")
    for name, one in sorted(objects.items(), key=lambda pair: not isinstance(pair[1], torch.nn.Module)):
        if isinstance(one, torch.optim.Optimizer):
            _check_shapes(path, name, one, tree[name])
        try:
            if isinstance(one, torch.optim.Optimizer):
                restore(one, tree[name])
            else:
                one.load_state_dict(tree[name])
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: '{name}' is no state of a {type(one).__name__} ({error})") from error


def _check_shapes(path: str | Path, name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """A fused optimizer with a state of another shape does not raise: it kills the process at its next step."""
    if not isinstance(state, Mapping) or not {"param_groups", "state"} <= state.keys():
        raise UsageError(f"{path}: '{name}' is no state of an optimizer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in state["param_groups"]):
        raise UsageError(f"{path}: '{name}' is the state of an optimizer of another number of parameters")
    for index, own in state["state"].items():
        if key := wrong_shape(parameters[index], own):
            found, wanted = list(own[key].shape), list(parameters[index].shape)
            raise UsageError(
                f"{path}: '{name}' keeps '{key}' of shape {found} for a parameter of {wanted}; load its model with it"
            )


# -- trees and files -------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree into a file, atomically."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(tree, "", tensors), allow_nan=False)
    write_atomically(path, to_bytes(tensors, {"tree": text, "sha256": _checksum(text, tensors)}))


def read_tree(path: Path, kind: str = "checkpoint") -> Any:
    """The tree that `write_tree` wrote; kind: what an error calls it.

    Raises UsageError for a file that is absent or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
        if "tree" not in meta:
            raise UsageError(f"{path} holds tensors, but is no {kind} of moe_engine")
        if meta.get("sha256") != _checksum(meta["tree"], tensors):
            raise UsageError(f"{path} is damaged: its checksum is wrong")
        return _unpacked(json.loads(meta["tree"]), tensors)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {kind} {path}") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error


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
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {SPECIAL: "tensor", "name": where}
    if isinstance(value, Mapping):
        return _packed_dict(value, where, tensors)
    if isinstance(value, list | tuple):
        several = [_packed(one, f"{where}.{index}", tensors) for index, one in enumerate(value)]
        return several if isinstance(value, list) else {SPECIAL: "tuple", "values": several}
    if isinstance(value, float) and not math.isfinite(value):
        return {SPECIAL: "float", "value": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers, texts, lists and dicts; {where} is a {type(value).__name__}")


def _packed_dict(value: Mapping[Any, Any], where: str, tensors: dict[str, Tensor]) -> Any:
    pairs = [(key, _packed(one, f"{where}.{key}" if where else str(key), tensors)) for key, one in value.items()]
    kind = "counter" if isinstance(value, Counter) else "dict"  # one of milestones of a learning-rate schedule
    if kind == "dict" and all(isinstance(key, str) and key != SPECIAL for key in value):
        return dict(pairs)
    return {SPECIAL: kind, "pairs": [[_packed(key, "", {}), one] for key, one in pairs]}


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    def several(values: list[Any]) -> list[Any]:
        return [_unpacked(one, tensors) for one in values]

    if isinstance(value, list):
        return several(value)
    if not isinstance(value, dict):
        return value
    if SPECIAL not in value:
        return dict(zip(value, several(list(value.values())), strict=True))
    special: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[value["name"]],
        "tuple": lambda: tuple(several(value["values"])),
        "dict": lambda: dict(map(several, value["pairs"])),
        "counter": lambda: Counter(dict(value["pairs"])),
        "float": lambda: float(value["value"]),
    }
    return special[value[SPECIAL]]()


# -- a run's checkpoints -----------------------------------------------------------------------------


class Checkpoints:
    """The folder of a run's checkpoints: the last two, and best.safetensors, that of the lowest test loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, tree: Any) -> None:
        """Write the checkpoint of a step, then remove all but the last two."""
        self.folder.mkdir(exist_ok=True)
        write_tree(self.folder / f"step-{step:08}.safetensors", tree)
        for old in self._files()[:-2]:
            old.unlink()

    def write_best(self, tree: Any) -> None:
        """Write best.safetensors."""
        self.folder.mkdir(exist_ok=True)
        write_tree(self.folder / "best.safetensors", tree)

    def newest(self, say: Callable[[str], None]) -> Any:
        """The tree of the newest checkpoint that is whole, or None; `say` is told of each that is damaged.

        A damaged one is put aside under another name, so that it does not count as one of the last two.
        """
        for path in reversed(self._files()):
            try:
                return read_tree(path)
            except UsageError as error:
                path.rename(path.with_suffix(".damaged"))
                say(f"{error}; looking for the one before")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
