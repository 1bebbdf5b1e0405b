"""Where the cells of a grid run: processes of this machine, or the workers of a dask or ray cluster, through joblib."""

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ..errors import RunError, UsageError

BACKENDS = ("loky", "dask", "ray")
ADDRESSES = {"dask": "DASK_SCHEDULER_ADDRESS", "ray": "RAY_ADDRESS"}  # read where no address is given
ANSWER_SECONDS = 5  # how long a scheduler may take to answer
WORKER_SECONDS = 60  # how long to wait for the first worker
RETRIES = 3  # how often ray runs the cells of a killed worker again; dask's default


@attrs.frozen
class Backend:
    """A backend of joblib. options: of joblib.parallel_config. workers: those of a cluster, which may see another
    machine's files and versions; None: as many processes of this machine as there are jobs. dispatch: how many cells
    wait at the workers.
    """

    options: Mapping[str, Any]
    workers: int | None = None
    dispatch: str = "2 * n_jobs"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the body with this backend; a killed worker or a lost scheduler is a RunError."""
        with joblib.parallel_config(**self.options):
            try:
                yield
            except Exception as error:
                if not (message := self._loss(error)):
                    raise
                code = "worker-killed" if self.workers is None else "cluster-gave-up"
                raise RunError(message, code=code) from error

    def _loss(self, error: Exception) -> str | None:
        """A sentence for a worker or a scheduler that is gone; None for any other error."""
        again = "the same command continues from the finished runs"
        if self.workers is None:
            advice = f"perhaps for lack of memory; {again}, and --jobs 1 needs the least memory"
            return f"a worker process was killed, {advice}" if isinstance(error, TerminatedWorkerError) else None
        if isinstance(error, ImportError):
            return f"a worker could not load a run: {_first_line(error)}; install the same there"
        where = type(error).__module__.partition(".")[0]
        if where not in ("distributed", "ray"):  # which may not be installed
            return None
        return f"the cluster gave a run up: {_first_line(error)}; {again}"


# Ctrl-C reaches all processes of a terminal; this one ends the others
LOKY = Backend({"backend": "loky", "initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)})


@contextmanager
def connected(name: str, address: str | None = None, jobs: int | None = None) -> Iterator[Backend]:
    """The backend of that name, connected in the body. Raises UsageError.

    address: the scheduler's; by default that of the environment; without either, a cluster of `jobs` processes is
    started on this machine, one per core if that is None.
    """
    if name == "loky":
        if address:
            message = "--address is that of a cluster; add --backend dask or --backend ray"
            raise UsageError(message, code="address-without-cluster")
        yield LOKY
        return
    address = address or os.environ.get(ADDRESSES[name])
    with (_dask if name == "dask" else _ray)(address, jobs) as backend:
        yield backend


# -- dask ----------------------------------------------------------------------------------------------


@contextmanager
def _dask(address: str | None, jobs: int | None) -> Iterator[Backend]:
    try:
        from distributed import Client, LocalCluster
        from joblib._dask import DaskDistributedBackend
    except ImportError as error:
        raise _missing("dask") from error

    class Dask(DaskDistributedBackend):  # type: ignore[misc]
        """joblib's, which waits forever for a task that dask gave up: it passes results on, but not dask's errors."""

        def effective_n_jobs(self, n_jobs: int) -> int:
            workers: int = super().effective_n_jobs(n_jobs)
            return max(2, workers)  # joblib keeps the cells of a single worker to itself

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: callback(done.exception()) if done.exception() else None)
            return future

    def backend(client: Any) -> Backend:
        # all cells at once, for workers that join later
        return Backend({"backend": Dask(client=client)}, sum(client.ncores().values()), "all")

    if address is None:
        processes = {"n_workers": jobs or joblib.cpu_count(), "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**processes) as cluster, Client(cluster) as client:  # type: ignore[no-untyped-call]
            yield backend(client)
        return
    if "://" not in address or address.startswith("tcp://"):
        _probe(address, "dask", lambda first: int.from_bytes(first[:8], "little") < 1 << 20)  # a number of frames
    try:
        client = Client(address, timeout=ANSWER_SECONDS)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError) as error:
        raise _no_cluster("dask", address, _first_line(error)) from error
    with client:
        _workers_of(client, address)
        yield backend(client)


def _workers_of(client: Any, address: str) -> None:
    """Wait for a worker. Raises UsageError if none comes, or if one runs several cells in a process."""
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as error:
        message = f"no worker has joined the dask scheduler at {address} in {WORKER_SECONDS} s; start `dask worker`"
        raise UsageError(message, code="no-workers") from error
    for worker, threads in client.nthreads().items():
        if threads > 1:
            message = (
                f"the dask worker {worker} has {threads} threads, but a run needs a process of its own; start it with "
                f"--nworkers {threads} --nthreads 1"
            )
            raise UsageError(message, code="threaded-worker")


# -- ray -----------------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None, jobs: int | None) -> Iterator[Backend]:
    try:
        import ray
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError as error:
        raise _missing("ray") from error

    class Ray(RayBackend):  # type: ignore[misc]
        """ray's, which inherits from joblib's pool of processes that it has no generator; its actors have one."""

        supports_return_generator = True

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "num_cpus": jobs or joblib.cpu_count(), "include_dashboard": False}
    else:
        if address.startswith("ray://"):
            message = f"{address} is ray's client, which joblib can't use; run this on a node of the cluster"
            raise UsageError(f"{message}, with --address auto", code="no-cluster")
        if address != "auto":
            _probe(address, "ray", lambda first: first[3:4] == b"\4")  # HTTP/2's settings
        options |= {"address": address}
    try:
        ray.init(**options)
    except (Exception, SystemExit) as error:  # ray raises SystemExit if its own processes end
        raise _no_cluster("ray", address or "this machine", _first_line(error)) from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        # a CPU for each: actors without one may all be put on one node
        actors = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": RETRIES}
        workers = min(jobs or cpus, cpus)
        yield Backend({"backend": Ray(ray_remote_args=actors)}, workers)
    finally:
        ray.shutdown()


# -- what can be wrong ---------------------------------------------------------------------------------


def _probe(address: str, name: str, known: Any) -> None:
    """Ask an address for the first bytes of a connection, which both schedulers send unasked. Raises UsageError.

    Their own clients wait for minutes where nothing, or another program, answers.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            first = connection.recv(9)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(name, address, _first_line(error)) from error
    if not first or not known(first):
        raise _no_cluster(name, address, "another program answers there")


def _no_cluster(name: str, address: str, why: str) -> UsageError:
    message = f"no {name} cluster at {address} ({why}); give --address as HOST:PORT of its scheduler"
    return UsageError(message.replace("scheduler", "head node") if name == "ray" else message, code="no-cluster")


def _missing(name: str) -> UsageError:
    return UsageError(f"--backend {name} needs {name}: pip install 'moe-engine[{name}]'", code="missing-dependency")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
