"""From which amount of work on a second CPU thread makes a step quicker: the threshold of `run --threads`.

    python benchmarks/threads.py   (--smoke: once, small)

A layer of 8 experts (D 64, H 128, K 2) computes forward and backward for more and more tokens, on one thread and on
all cores in turn. Prints the FLOPs of the forward, the time on one thread, and the ratio of the medians.
"""

import os
import statistics
import sys
from time import perf_counter

import torch

from moe_engine import Engine
from moe_engine.layer.flops import layer_flops
from moe_engine.processes import threads

ROUNDS = 15
TOKENS = (256, 1024, 4096, 8192, 16384, 32768, 65536)


def seconds(layer, x, count):
    with threads(count):
        begun = perf_counter()
        layer(x).square().mean().backward()
        return perf_counter() - begun


def main():
    cores = os.cpu_count() or 1
    layer = Engine("topk,switch_aux", experts=8, top_k=2).moe(64, hidden=128, name="moe")
    print(f"{'tokens':>8} {'GFLOP':>8} {'ms on 1':>8} {f'{cores} threads / 1':>15}")
    for tokens in (64,) if "--smoke" in sys.argv else TOKENS:
        x = torch.randn(tokens, 64)
        pairs = [(seconds(layer, x, 1), seconds(layer, x, cores)) for _ in range(ROUNDS)][2:]
        one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
        work = tokens * layer_flops(layer).active
        print(f"{tokens:8} {work / 1e9:8.3f} {1000 * one:8.2f} {several / one:15.2f}", flush=True)


if __name__ == "__main__":
    main()
