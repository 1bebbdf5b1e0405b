"""What `moe-engine run` costs over a hand-written loop with the same layer, plugins and optimizer: bar 1.10.

An image task of MNIST's size: 784 pixels, batches of 64, 8 experts, top 2, a bias and a loss. The
run's time is that of its training loop: everything that a step does, and a log point (metrics, probe
and a line of metrics.jsonl) every 50 steps; evaluation and reports are left out. Both loops train a
model of their own from the same weights on the same batches, so that they end with equal weights,
which is checked.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from moe_engine import adam
from moe_engine.runs import RunConfig
from moe_engine.seeds import generator
from moe_engine.training import Training
from paired import arguments, ratios, steady, tell

BAR = 1.10
STEPS, ROUNDS, BATCH = 50, 8, 64
TASK = {"size": 28, "images": STEPS * BATCH, "test_images": 512, "dim": 128, "hidden": 128}


def training() -> Training:
    """One epoch of the run; building it draws the data and the weights from the seed."""
    shape = {"experts": 8, "top_k": 2, "epochs": 1, "batch_size": BATCH}
    config = RunConfig(task="blobs", plugins=("saturation", "switch_aux"), device="cpu", **shape)
    return Training(config, {"blobs": TASK})


def run_loop(run: Training) -> Callable[[], None]:
    """The run's own training loop."""

    def steps() -> None:
        run._begin()
        run._train()

    return steps


def hand_loop(run: Training) -> Callable[[], None]:
    """What one would write without the command line: nothing is counted, logged or checked."""
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


def check_equal(one: Training, other: Training) -> None:
    """Both loops have done the same work."""
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"the loops differ at {name}: they do not train the same model")


def main() -> int:
    options = arguments("A training step of `moe-engine run` against a hand-written loop.", repetitions=21)
    steady()
    by_run, by_hand = training(), training()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "metrics.jsonl"), "wb") as by_run._log:
        found = ratios({"run": run_loop(by_run), "hand": hand_loop(by_hand)}, "hand", options.repetitions, ROUNDS)
    check_equal(by_run, by_hand)
    return tell(found, BAR, options.json, steps=ROUNDS * STEPS)


if __name__ == "__main__":
    sys.exit(main())
