"""What one growth costs over 50 training steps at that number of experts: bar 0.10.

D 256, H 512, T 512, K 2, Adam fused; a router, a bias and a loss, all engine calls. A growth is all of
it: the search for other holders of the weights, the newcomer, copies of all weights and moments, the
rehearsal, and the change measured on a probe batch. After each the newcomer is removed again, which is
not counted.
"""

import statistics
import sys
from collections.abc import Callable

import torch

from moe_engine import Engine, Growth, adam
from paired import arguments, seconds, steady, tell

BAR = 0.10
SIZES = (16, 64, 255)
DIM, HIDDEN, TOKENS, STEPS, MEASURED = 256, 512, 512, 50, 5


def rig(experts: int) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """(five steps, one growth, its undoing) of a layer."""
    torch.manual_seed(0)
    engine = Engine("saturation,switch_aux", experts=experts, top_k=2)
    layer = engine.moe(DIM, HIDDEN, name="moe")
    optimizer = adam(layer, 1e-3)
    x = torch.randn(TOKENS, DIM)

    def steps() -> None:
        for _ in range(MEASURED):
            ((layer(x) - x).square().mean() + engine.aux_loss()).backward()
            engine.after_backward()
            optimizer.step()
            engine.after_step()
            optimizer.zero_grad()

    def probe() -> torch.Tensor:
        layer.eval()
        loss = (layer(x[:128]) - x[:128]).square().mean()
        layer.train()
        return loss

    def grow() -> None:
        engine.grow(Growth("moe", (0,)), optimizer, probe=probe)

    def shrink() -> None:
        engine.grow(Growth("moe", drop=(experts,)), optimizer)

    return steps, grow, shrink


def measured(experts: int, repetitions: int) -> dict[str, object]:
    steps, grow, shrink = rig(experts)
    steps(), grow(), shrink(), steps()
    each, times, bases = [], [], []
    for _ in range(repetitions):
        base = seconds(steps) * STEPS / MEASURED
        taken = seconds(grow)
        shrink()
        each.append(taken / base)
        times.append(1000 * taken)
        bases.append(1000 * base)
    first, median, third = statistics.quantiles(each, n=4, method="inclusive")
    ms, base_ms = statistics.median(times), statistics.median(bases)
    return {"ratio": median, "quartiles": [first, third], "ms": ms, "base_ms": base_ms, "repetitions": repetitions}


def main() -> int:
    options = arguments("One growth against 50 training steps.", repetitions=9)
    steady()
    found = {f"E {experts}": measured(experts, options.repetitions) for experts in SIZES}
    return tell(found, BAR, options.json)


if __name__ == "__main__":
    sys.exit(main())
