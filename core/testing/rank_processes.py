"""Processes of the kit that are the ranks of a group, kept from one check to the next: starting them takes seconds."""

import gc
import multiprocessing
import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import UsageError
from .claims import Broken

# imported once for all of them, with what training and spreading a model import only then
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "moe_engine.testing")
PATIENCE = 60.0  # seconds without an answer after which ranks count as waiting for each other for ever
_kept: dict[int, "RankProcesses"] = {}


class RankProcesses:
    """`count` processes in one gloo group, each of which has imported the kit."""

    def __init__(self, count: int) -> None:
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            multiprocessing.set_forkserver_preload([*PRELOADED])
        self.folder = TemporaryDirectory(prefix="ranks")
        self.ends: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            given = (theirs, f"file://{self.folder.name}/store", rank, count)
            process = context.Process(target=_serve, args=given, daemon=True)  # it ends with this process
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(*arguments) on every rank: what each returns. Raises Broken if one of them fails."""
        words = _pickled(function, arguments)
        answers: dict[int, Any] = {}
        for end in self.ends:
            end.send_bytes(words)
        while waiting := [end for rank, end in enumerate(self.ends) if rank not in answers]:
            ready = wait(waiting, PATIENCE)
            if not ready:
                self.stop()
                raise Broken(
                    f"ranks wait for each other for {PATIENCE:.0f} seconds; "
                    "call what sums over ranks on all of them, in the same order"
                )
            for rank, end in enumerate(self.ends):
                if end not in ready:
                    continue
                try:
                    failure, answers[rank] = pickle.loads(end.recv_bytes())
                except EOFError:
                    failure = "the process ended"
                if failure is not None:
                    self.stop()  # the others may wait for this one
                    raise Broken(f"{failure}, on rank {rank} of {len(self.ends)}")
        return [answers[rank] for rank in sorted(answers)]

    def stop(self) -> None:
        """End the processes; `rank_processes` starts new ones."""
        for count in [count for count, kept in _kept.items() if kept is self]:
            del _kept[count]
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def rank_processes(count: int) -> RankProcesses:
    """The processes of `count` ranks, which stay until this process ends."""
    if count not in _kept or not all(process.is_alive() for process in _kept[count].processes):
        _kept[count] = RankProcesses(count)
    return _kept[count]


def _pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((function, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        message = f"the processes of the ranks can't import it ({error}); define the plugin at the top of a module"
        raise UsageError(message, code="plugin-not-importable") from error


def _serve(end: Connection, store: str, rank: int, count: int) -> None:
    """Call what arrives, and send back what it returns or raises, until the other end closes."""
    torch.set_num_threads(1)  # many small steps: threads would wait for each other
    gc.collect()
    gc.freeze()  # growths, which look for optimizers among all objects, need not look among what is imported
    timeout = timedelta(seconds=2 * PATIENCE)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timeout)
    while True:
        answer: Any = None
        failure: str | None = None
        try:
            words = end.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(words)
            answer = function(*arguments)
        except (Exception, SystemExit) as error:
            failure = f"it raises {type(error).__name__}: {error}"
        end.send_bytes(pickle.dumps((failure, answer)))
