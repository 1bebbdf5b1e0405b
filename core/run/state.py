"""A run's complete state, from which it continues with identical results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..engine.engine import Engine
from ..errors import listed
from ..optimizer_state import restore
from ..processes import agreed, rank, world_size
from ..seeds import random_state, set_random_state
from .checkpoints import Checkpoints
from .loop_state import LoopState
from .records import RecordFile
from .resuming import changes, check_resumable
from .summary import versions


class Running(Protocol):
    """What of a run its state is made of."""

    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    folder: Path
    loop: LoopState
    records: RecordFile
    started: float
    dropped: tuple[str, ...]
    say: Callable[[str], None]
    warn: Callable[[str], None]

    @property
    def checkpoints(self) -> Checkpoints: ...

    @property
    def step(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    def config_text(self) -> str: ...

    def seconds(self) -> float: ...


def state_of(run: Running) -> dict[str, Any]:
    """The state, as a tree for a checkpoint."""
    return {
        **_made_with(run),
        "config": run.config_text(),
        "seconds": run.seconds(),
        "records": run.records.sync(),
        "draws": random_state(),
        "ranks": world_size(),
        "loop": run.loop.state_dict(),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "engine": run.engine.state_dict(),
    }


def newest_state(run: Running) -> Any:
    """That of the newest intact checkpoint; None if there is none. Raises UsageError if the run can't continue."""
    with agreed("reading the checkpoint", run.device):
        tree = run.checkpoints.newest(run.warn)
        if tree is not None and rank() == 0:
            check_resumable(run.folder, tree, run.config_text(), run.records, run.dropped)
    if tree is None:
        run.warn("there is no checkpoint to continue from; starting over")
        run.records.truncate(0)
        return None
    if changed := changes(tree, _made_with(run)):
        run.warn(f"since the run began {listed(changed)} changed, so its metrics may differ from here on")
    return tree


def continue_from(run: Running, tree: Any) -> None:
    """Restore all but the model, which must have its state already."""
    restore(run.optimizer, tree["optimizer"])
    run.engine.load_state_dict(tree["engine"])
    run.records.truncate(tree["records"]["bytes"])
    run.loop.load_state_dict(tree["loop"])
    run.started -= tree["seconds"]
    if (draws := run.checkpoints.draws(tree)) is not None:
        set_random_state(draws)
    run.say(f"continuing from step {run.step} of {run.total_steps}")


def _made_with(run: Running) -> dict[str, Any]:
    """The versions of libraries, and the distribution, version and source of each plugin."""
    plugins = run.engine.plugins
    return {"versions": versions(), "plugins": plugins.records(), "code": plugins.fingerprints()}
