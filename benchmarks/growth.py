"""What one growth costs over 50 training steps at that number of experts: bar 0.10.

D 256, H 512, T 512, K 2, Adam fused; a router, a bias and a loss, all engine calls. A growth is all of
it: the search for other holders of the weights, the newcomer, copies of all weights and moments, the
rehearsal, and the change measured on a probe batch. After each the newcomer is removed again, which is
not counted.
"""

import sys
from typing import Any

import torch

from moe_engine import Engine, Growth, adam
from paired import Bar, Call, Seconds, arguments, over, seconds, steady, tell

BAR = 0.10
SIZES = (16, 64, 255)
DIM, HIDDEN, TOKENS, STEPS, MEASURED = 256, 512, 512, 50, 5


def rig(experts: int) -> tuple[Call, Call, Call]:
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


def measured(experts: int, repetitions: int) -> dict[str, Any]:
    steps, grow, shrink = rig(experts)
    steps(), grow(), shrink(), steps()
    times: dict[str, list[Seconds]] = {"growth": [], "steps": []}
    for _ in range(repetitions):
        times["steps"].append(Seconds(*(STEPS / MEASURED * one for one in seconds(steps))))
        times["growth"].append(seconds(grow))
        shrink()
    return over(times, "growth", "steps")


def main() -> int:
    options = arguments("One growth against 50 training steps.", repetitions=9)
    steady()
    sizes = SIZES[:1] if options.smoke else SIZES
    found = {experts: measured(experts, options.repetitions) for experts in sizes}
    bars = [Bar(f"E {experts}: a growth over {STEPS} steps", one, BAR) for experts, one in found.items()]
    return tell("growth", bars, options.smoke)


if __name__ == "__main__":
    sys.exit(main())
