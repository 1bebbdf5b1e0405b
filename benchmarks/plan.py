"""A plan's bytes and times, next to runs on 1, 2, 4 and 8 local processes (gloo).

Bytes are counted where they leave: a dispatch mode sees every collective, forward and backward. They must equal what
the plan counts from the load that was routed. Times are predicted from the rate, bandwidth and latency that
`plan --measure` finds with as many processes, which share the machine's cores, and from the same load; the ratio of
the measured step to the predicted one is reported, not judged. So is that to the floor of a step whose experts are
spread: the matrix products of each rank's experts and the all-to-alls alone, measured with the very rows of the step.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine import Engine, Spec, StackedMLP
from moe_engine.parallel.parallelize import expert_mesh, parallelize
from moe_engine.plan.measuring import measure
from moe_engine.plan.sizes import Cluster, Model, Split, Training
from moe_engine.plan.times import Times, exchange_seconds, gradient_seconds, step_flops
from moe_engine.plan.traffic import exchanged_bytes, rings_of, rows_between
from paired import Criterion, arguments, report

MODEL = Model(layers=2, dim=256, hidden=512, experts=8, top_k=2, sequence=256, attention=False)
TRAINING = Training(batch=8, optimizer="sgd")
SMALL = attrs.evolve(MODEL, dim=32, hidden=48, experts=6, sequence=16)
WARM_UPS = 2


class Blocks(nn.Module):
    """Residual MoE layers; the loss needs no head."""

    def __init__(self, engine: Engine, model: Model) -> None:
        super().__init__()
        self.layers = nn.ModuleList(engine.moe(model.dim, model.hidden) for _ in range(model.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Counted(TorchDispatchMode):
    """Bytes that this rank sends to others in all-to-alls, and bytes of the tensors that it all-reduces.

    In backward these are gradients (`reduced`); outside of it, sums of what the layers count (`sums`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.kind = "sums"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if "alltoall_base" in name or "all_to_all_single" in name:
            self._exchange(name, args)
        elif "allreduce_" in name:
            self.sent[self.kind] += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        return function(*args, **(kwargs or {}))

    def _exchange(self, name: str, args: Any) -> None:
        if name.startswith("c10d::"):  # output, input, group, output sizes, input sizes
            rows, group, sizes = args[1], dist.ProcessGroup.unbox(args[2]), args[4]
        else:  # input, output sizes, input sizes, group
            rows, group, sizes = args[0], dist.distributed_c10d._resolve_process_group(args[3]), args[2]
        ranks, own = group.size(), group.rank()
        sizes = sizes or [rows.shape[0] // ranks] * ranks
        leaving = sum(sizes) - sizes[own]
        self.sent["exchanged"] += leaving * rows[:1].numel() * rows.element_size()


def gathered(value: Any) -> list[Any]:
    """The value of each rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def trained(model: Model, split: Split, repetitions: int) -> dict[str, Any]:
    """Seconds of a step, and of one step the bytes that were sent and each layer's load [R, E], of all ranks."""
    torch.manual_seed(0)
    engine = Engine("switch_aux", experts=model.experts, top_k=model.top_k)
    blocks = Blocks(engine, model)
    layers = list(blocks.layers)
    called = blocks if split.ranks == 1 else parallelize(engine, blocks, expert_mesh(split.experts), shard=False)
    optimizer = torch.optim.SGD(blocks.parameters(), 1e-3)
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(TRAINING.batch, model.sequence, model.dim, requires_grad=True)
    counted = Counted()

    def step() -> None:
        loss = called(x).square().mean() + engine.aux_loss()
        counted.kind = "reduced"
        loss.backward()
        counted.kind = "sums"
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()

    seconds = statistics.median(gathered(timed(step, repetitions)))
    loads: list[np.ndarray] = []
    for layer in layers:
        _record(layer, loads)
    with counted:
        step()
    sent = gathered(dict(counted.sent))
    load_LRE = np.stack([np.array(of_rank) for of_rank in gathered([load.tolist() for load in loads])], axis=1)
    return {"seconds": seconds, "sent": sent, "load": load_LRE}


def _record(layer: Any, loads: list[np.ndarray]) -> None:
    """Append the assignments of each expert, at the layer's next forward."""
    bank = layer.experts
    routed = bank.routed

    def recorded(x_TD: torch.Tensor, plan: Any, experts: int) -> torch.Tensor:
        loads.append(torch.bincount(plan.expert[plan.kept], minlength=experts).numpy())
        del bank.routed
        return routed(x_TD, plan, experts)

    bank.routed = recorded


def predicted(model: Model, split: Split, cluster: Cluster, load_LRE: np.ndarray) -> tuple[list[int], Times]:
    """(bytes of all-to-all that leave each rank, times of a step), from the load of each layer and rank."""
    leaving_W = np.zeros(split.ranks, np.int64)
    exchange, busiest = 0.0, 0.0
    for load_RE in load_LRE:
        slowest = most = 0.0
        for group in range(split.data):  # P consecutive ranks exchange
            ranks = slice(group * split.experts, (group + 1) * split.experts)
            rows_PP = rows_between(load_RE[ranks], split.experts)
            leaving_W[ranks] += exchanged_bytes(rows_PP, model, TRAINING.precision) if split.experts > 1 else 0
            slowest = max(slowest, exchange_seconds(rows_PP, model, TRAINING, cluster))
            most = max(most, float(rows_PP.sum(0).max()))
        exchange += slowest
        busiest += most / model.layers
    tokens = TRAINING.batch * model.sequence
    products = step_flops(model, tokens, busiest) / cluster.rate
    even = step_flops(model, tokens, tokens * model.top_k) / cluster.rate
    gradients = gradient_seconds(model, TRAINING, split, cluster)
    return leaving_W.tolist(), Times(products, exchange if split.experts > 1 else 0.0, gradients, even)


def floor(model: Model, split: Split, load_LRE: np.ndarray, repetitions: int) -> float:
    """Seconds of the products and all-to-alls alone of a step whose experts are spread, on the slowest rank."""
    group, place = divmod(dist.get_rank(), split.experts)
    ranks = slice(group * split.experts, (group + 1) * split.experts)
    mesh = expert_mesh(split.experts)["experts"].get_group()
    each = -(-model.experts // split.experts)
    steps = []
    for load_RE in load_LRE:
        rows_PP = rows_between(load_RE[ranks], split.experts)
        counts_e = torch.from_numpy(load_RE[ranks].sum(0))[place * each : (place + 1) * each]
        bank = StackedMLP(Spec(model.dim, model.hidden, model.out, len(counts_e), 1, model.activation))
        for weight in bank.parameters():
            torch.nn.init.normal_(weight, std=model.dim**-0.5)
        send, receive = rows_PP[place].tolist(), rows_PP[:, place].tolist()
        steps.append((bank, counts_e, send, receive))

    def exchange(send: list[int], receive: list[int]) -> torch.Tensor:
        rows = torch.empty(sum(receive), model.dim)
        dist.all_to_all_single(rows, torch.ones(sum(send), model.dim), receive, send, group=mesh)
        return rows

    def step() -> None:
        for bank, counts_e, send, receive in steps:
            counts = torch.ones(split.experts, each, dtype=torch.int64)
            dist.all_to_all_single(torch.empty_like(counts), counts, group=mesh)
            rows = exchange(send, receive).requires_grad_()
            bank(rows, counts_e).sum().backward()
            for back in (True, False, True):
                exchange(receive if back else send, send if back else receive)

    return statistics.median(gathered(timed(step, repetitions)))


def timed(step: Callable[[], None], repetitions: int) -> float:
    """The median seconds of a step, which all ranks begin together."""
    seconds = []
    for repetition in range(-WARM_UPS, repetitions):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        if repetition >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compared(model: Model, split: Split, measured: Any, repetitions: int) -> dict[str, Any]:
    """One split: bytes and seconds, predicted and measured."""
    cluster = Cluster(
        split.ranks,
        1e12,
        measured.rate,
        measured.bandwidth or 1e9,
        measured.latency or 0.0,  # one rank sends nothing
    )
    ran = trained(model, split, repetitions)
    leaving, times = predicted(model, split, cluster, ran["load"])
    rings = rings_of(model, TRAINING, split)
    reduced = sum(ring.size for ring in rings if ring.ranks > 1)
    least = floor(model, split, ran["load"], repetitions) if split.experts > 1 else None
    return {
        "split": str(split),
        "exchanged": {"predicted": leaving, "measured": [sent.get("exchanged", 0) for sent in ran["sent"]]},
        "reduced": {"predicted": reduced, "measured": max(sent.get("reduced", 0) for sent in ran["sent"])},
        "bytes_of_sums": max(sent.get("sums", 0) for sent in ran["sent"]),
        "ms": {name: round(1000 * value, 2) for name, value in attrs.asdict(times).items()},
        "predicted_ms": round(1000 * times.step, 2),
        "measured_ms": round(1000 * ran["seconds"], 2),
        "measured_over_predicted": round(ran["seconds"] / times.step, 3),
        "floor_ms": least and round(1000 * least, 2),
        "measured_over_floor": least and round(ran["seconds"] / least, 3),
    }


def rank_of(rank: int, folder: str, ranks: int, model: Model, repetitions: int) -> None:
    """One process: measure, then train with every split."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    splits = [Split(ranks // experts, experts) for experts in (1, 2, 4, 8) if not ranks % experts]
    measured = measure(model, TRAINING, torch.device("cpu"))
    rows = [compared(model, split, measured, repetitions) for split in splits]
    if rank == 0:
        found = {"ranks": ranks, **measured._asdict(), "splits": rows}
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def on_ranks(ranks: int, model: Model, repetitions: int) -> dict[str, Any]:
    """What that many processes found."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["torch", "moe_engine.engine.engine"])
        arguments = (folder, ranks, model, repetitions)
        torch.multiprocessing.start_processes(rank_of, arguments, ranks, start_method="forkserver")
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
        return found


def main() -> int:
    options = arguments("A plan's bytes and times, next to runs on local processes.", 15)
    model, counts = (SMALL, (1, 2)) if options.smoke else (MODEL, (1, 2, 4, 8))
    found = [on_ranks(ranks, model, options.repetitions) for ranks in counts]
    unequal = 0
    for run in found:
        for row in run["splits"]:
            unequal += sum(row[kind]["predicted"] != row[kind]["measured"] for kind in ("exchanged", "reduced"))
            times = f"{row['measured_ms']:8.1f} ms, predicted {row['predicted_ms']:8.1f}"
            sent = f"{sum(row['exchanged']['measured']):10d} bytes exchanged, {row['reduced']['measured']:9d} reduced"
            least = f"; {row['measured_over_floor']:.2f} of the floor" if row["floor_ms"] else ""
            print(f"{row['split']:6} {sent}; {times}; {row['measured_over_predicted']:.2f}{least}")
    claim = Criterion("splits whose bytes differ from the plan's", {"median": unequal, "quartiles": [unequal] * 2}, 0)
    report("plan", [claim], options.smoke, model=attrs.asdict(model), training=attrs.asdict(TRAINING), runs=found)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
