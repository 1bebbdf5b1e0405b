"""Cost of one growth relative to 50 training steps with as many experts: at most 0.10.

D 256, H 512, T 512, K 2, fused Adam; a router, a bias and a loss, all engine calls. A growth includes everything:
the search for other holders of the weights, the new expert, copies of all weights and moments, the rehearsal, and
the change measured on a probe batch. Each new expert is then removed again, which is not timed.
"""

import sys
from typing import Any

import torch

from moe_engine import Engine, Growth, adam
from paired import Call, Criterion, Seconds, arguments, ratio, report, seconds, steady

LIMIT = 0.10
SIZES = (16, 64, 255)
DIM, HIDDEN, TOKENS, STEPS, MEASURED = 256, 512, 512, 50, 5


def layer_calls(experts: int) -> tuple[Call, Call, Call]:
    """(five steps, one growth, undoing it) of a layer."""
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
    steps, grow, shrink = layer_calls(experts)
    steps(), grow(), shrink(), steps()
    times: dict[str, list[Seconds]] = {"growth": [], "steps": []}
    for _ in range(repetitions):
        times["steps"].append(Seconds(*(STEPS / MEASURED * time for time in seconds(steps))))
        times["growth"].append(seconds(grow))
        shrink()
    return ratio(times, "growth", "steps")


def main() -> int:
    options = arguments("One growth relative to 50 training steps.", repetitions=9)
    steady()
    sizes = SIZES[:1] if options.smoke else SIZES
    criteria = [
        Criterion(f"E {experts}: a growth over {STEPS} steps", measured(experts, options.repetitions), LIMIT)
        for experts in sizes
    ]
    return report("growth", criteria, options.smoke)


if __name__ == "__main__":
    sys.exit(main())
