"""Processes that torchrun has started: join them, agree on who speaks, and end together.

Nothing here imports torch before it must: the command line asks `started()` on every start.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import RunError, UsageError

USAGE, FAILED = 2, 1  # exit codes
CODE = "moe_engine/failed"  # key in the launcher's store: rank and exit code of the first that failed
LOST = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe", "Socket")


def started() -> int:
    """The number of processes that torchrun has started; 1 without it, as where only some of its variables are set."""
    found = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")]
    if not all(word.isdecimal() for word in found) or not os.environ.get("MASTER_ADDR"):
        return 1
    return int(found[0])


def rank() -> int:
    """This process among those that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if started() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started, if any; gives this rank's device.

    device: "auto", "cpu" or "cuda". Ranks communicate through NCCL on GPUs, one each, and through gloo on CPUs. The
    first rank on which the body fails tells of it; the others end with its exit code, without a word.
    """
    if started() == 1:
        yield device
        return
    import torch

    local = int(os.environ.get("LOCAL_RANK") or 0)
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.device_count() > local)
    if on_gpu:
        torch.cuda.set_device(local)
    store = _store()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank(), world_size=started())
    try:
        yield f"cuda:{local}" if on_gpu else "cpu"
    except Exception as error:
        code = USAGE if isinstance(error, UsageError) else FAILED
        if (first := _first_code(store, error, code)) is not None:
            raise click.exceptions.Exit(first) from error
        if lost(error):
            message = "the connection to another rank broke: it was killed, or its machine is gone"
            raise RunError(
                f"{message}; with torchrun --max-restarts the run goes on by itself", code="rank-lost"
            ) from error
        raise
    torch.distributed.destroy_process_group()  # after a failure this might wait for a rank that is gone


def _first_code(store: Any, error: BaseException, code: int) -> int | None:
    """The exit code of the rank that failed first; None if this one did."""
    if getattr(error, "code", None) in ("other-process-failed", "processes-disagree") or lost(error):
        _wait_for(store, CODE)
    mine = f"{rank()} {code}"
    first = store.compare_set(CODE, "", mine).decode()
    return None if first == mine else int(first.split()[1])


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    import torch

    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in LOST))


def _wait_for(store: Any, key: str) -> None:
    """Wait a moment for the rank that failed first to say so; one that was killed never does."""
    from datetime import timedelta

    try:
        store.wait([key], timedelta(seconds=3))
    except Exception:
        return


def _store() -> Any:
    """The key-value store that all ranks share; torchrun keeps one for all its restarts, so each gets a part of it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public all the same

    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, started(), is_master=rank() == 0 and not kept)
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
