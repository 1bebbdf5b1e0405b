"""Checkpoints: anything with a state_dict, in one file with a checksum, without pickle; and those of a run."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import UsageError, listed
from ..optimizer_state import restore, wrong_shape
from ..processes import agreed, rank, shard_like, world_size
from .shards import write_shards
from .trees import cut_in, packed, packed_on_first, read_tree, shards_of, write_tree

DAMAGED = ("damaged-file", "foreign-file")  # codes of errors that mean another checkpoint is needed


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
    cut = next(cut_in(tree), None)
    with nullcontext() if cut is None else agreed(f"saving {path}", cut.device):
        ready = packed(tree) if cut is None else packed_on_first(tree)
        if ready is not None:
            try:
                ready.write(Path(path))
            except OSError as error:
                raise UsageError(f"{path} can't be written: {error.strerror}", code="unwritable-path") from error


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


class Checkpoints:
    """A run's checkpoints folder: the last two, and best.safetensors, the one with the lowest test loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, tree: Any) -> None:
        """Write the checkpoint of a step, then remove all but the last two. All ranks must call it.

        On several ranks, each writes what it holds of cut tensors, and every one but the first its random draws; then
        the first writes all that is the same everywhere, which makes the checkpoint count.
        """
        path = self.folder / f"step-{step:08}.safetensors"
        cut = list(cut_in(tree))
        shards = write_shards(shards_of(path), cut) if cut else None
        with agreed(f"writing {path.name}", torch.device("cpu")):
            if rank():
                self.folder.mkdir(exist_ok=True)
                write_tree(path.with_suffix(f".rank-{rank()}"), {"draws": tree["draws"]})
        with agreed(f"writing {path.name}", torch.device("cpu")):
            if rank() == 0:
                self.folder.mkdir(exist_ok=True)
                packed(tree, shards).write(path)
                self._keep(self._files()[-2:])

    def write_best(self, tree: Any) -> None:
        """Write best.safetensors, with what is cut made whole. All ranks must call it."""
        ready = packed_on_first(tree)
        with agreed("writing best.safetensors", torch.device("cpu")):
            if ready is not None:
                self.folder.mkdir(exist_ok=True)
                ready.write(self.folder / "best.safetensors")

    def _keep(self, last: list[Path]) -> None:
        """Remove all other steps' files, and what interrupted saves have left."""
        steps = {path.stem for path in last}
        for path in self.folder.glob("step-*"):
            if path.stem in steps or path.suffix == ".damaged":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def draws(self, tree: Any) -> Any:
        """The random draws of this rank in a checkpoint; None if it was made by another number of ranks.

        Then every rank but the first begins its draws anew.
        """
        if rank() == 0:
            return tree["draws"]
        if tree["ranks"] != world_size():
            return None
        return read_tree(self.folder / f"step-{tree['loop']['step']:08}.rank-{rank()}")["draws"]

    def newest(self, say: Callable[[str], None], rename: bool = True) -> Any:
        """The tree of the newest intact checkpoint, or None; `say` receives a remark on each damaged one.

        rename: rename damaged ones, so they do not count among the last two; only the run itself may.
        """
        for path in reversed(self._files()):
            try:
                return read_tree(path)
            except UsageError as error:
                if error.code not in DAMAGED:
                    raise
                if rename and rank() == 0:
                    path.rename(path.with_suffix(".damaged"))
                say(f"{error}; trying the one before")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
