"""A training step of a small model: 784 pixels, batches of 64, 8 experts of 128 hidden units.

First, relative to the usual hand-written loop over modules, with the same fused Adam and no plugin but the router.
Second, `moe-engine run` relative to a hand-written loop with the same layer, plugins and optimizer: everything that a
step does, and a log point (metrics, probe and a line of metrics.jsonl) every 50 steps, without evaluation and reports.
The latter two train separate models from the same weights on the same batches; they must end with equal weights.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_engine import Engine, adam
from moe_engine.run.config import RunConfig
from moe_engine.run.records import RecordFile
from moe_engine.run.training import Training
from moe_engine.seeds import generator
from paired import Call, Criterion, arguments, ratio, report, steady, timed
from peers import loop_over_experts

STEPS, ROUNDS, BATCH = 50, 8, 64
PIXELS, HIDDEN, CLASSES, EXPERTS = 784, 128, 10, 8
TASK = {"size": 28, "images": STEPS * BATCH, "test_images": 512, "dim": 128, "hidden": HIDDEN}
LOOP_LIMITS = {1: 0.92, 2: 0.85}  # K: the engine's step over that of the loop over modules, at most
RUN_LIMIT = 1.08
FEW = 8  # steps in a call


class ModuleLoop(nn.Module):
    """The usual hand-written layer."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(PIXELS, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            gate = gate / gate.sum(-1, keepdim=True)
        return loop_over_experts(self.experts, x, chosen, gate, x.new_zeros(len(x), CLASSES))


def small_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> Call:
    """A few steps on one batch."""
    x, y = torch.randn(BATCH, PIXELS), torch.randint(CLASSES, (BATCH,))

    def call() -> None:
        for _ in range(FEW):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return call


def both(top_k: int) -> dict[str, Call]:
    """The loop over modules and the engine's layer, both near balance, which a learning rate of 0 keeps."""
    torch.manual_seed(0)
    loop = ModuleLoop(top_k)
    layer = Engine("topk", experts=EXPERTS, top_k=top_k).moe(PIXELS, HIDDEN, out=CLASSES, bias=True)
    nn.init.orthogonal_(loop.router.weight)
    nn.init.orthogonal_(layer.router.weight)
    by_hand = torch.optim.Adam(loop.parameters(), 0.0, fused=True)
    return {"loop": small_steps(loop, by_hand), "engine": small_steps(layer, adam(layer, 0.0))}


def training() -> Training:
    """One epoch of a run; data and weights are drawn from the seed."""
    shape = {"experts": EXPERTS, "top_k": 2, "epochs": 1, "batch_size": BATCH}
    config = RunConfig(task="blobs", plugins=("saturation", "switch_aux"), device="cpu", **shape)
    return Training(config, {"blobs": TASK})


def run_loop(run: Training) -> Call:
    """The run's own training loop."""

    def steps() -> None:
        run._begin()
        run._train()

    return steps


def hand_loop(run: Training) -> Call:
    """The hand-written training loop, without counting, logging or checks."""
    model, engine, (images, labels) = run.model, run.engine, run.task.train

    def steps() -> None:
        optimizer = adam(model, run.config.lr)
        order = torch.randperm(len(images), generator=generator(run.config.seed, "data order"))
        model.train()
        for rows in order.split(BATCH):
            x, y = images[rows], labels[rows]
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x, y), y)
            (loss + engine.aux_loss()).backward()
            engine.after_backward()
            optimizer.step()
            engine.after_step()

    return steps


def check_equal(run: Training, by_hand: Training) -> None:
    """Exit unless both loops did the same work."""
    for (name, a), b in zip(run.model.state_dict().items(), by_hand.model.state_dict().values(), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"the loops differ at {name}: they do not train the same model")


def main() -> int:
    options = arguments("A training step relative to hand-written loops.", repetitions=15)
    steady()
    rounds = 1 if options.smoke else ROUNDS
    criteria = []
    for top_k, at_most in LOOP_LIMITS.items():
        times = timed(both(top_k), options.repetitions, rounds, FEW)
        measured = ratio(times, "engine", "loop")
        criteria.append(Criterion(f"K {top_k}: step over a loop over modules", measured, at_most))
    by_run, by_hand = training(), training()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "metrics.jsonl"), "wb") as file:
        by_run._records = RecordFile(file, by_run.listener)
        calls = {"run": run_loop(by_run), "hand": hand_loop(by_hand)}
        times = timed(calls, options.repetitions, rounds, STEPS)
    check_equal(by_run, by_hand)
    measured = ratio(times, "run", "hand")
    criteria.append(Criterion("`run`'s step over a hand-written one with the same plugins", measured, RUN_LIMIT))
    return report("step", criteria, options.smoke)


if __name__ == "__main__":
    sys.exit(main())
