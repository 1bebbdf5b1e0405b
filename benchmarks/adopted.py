"""Forward and backward of an adopted block relative to the plain one, with each kernel: at most 1.10.

A Mixtral block of D 512, T 512, with 8 experts (H 1024, K 2) and 64 (H 256, K 8); the engine's default plugins and all
its calls. Needs transformers.
"""

import copy
import sys
from typing import Any

import torch

from moe_engine import Engine, adopt
from moe_engine.testing import tiny_model
from paired import Call, Criterion, Seconds, arguments, ratio, report, seconds, steady

LIMIT = 1.10
SIZES = ((8, 2, 1024), (64, 8, 256))
DIM, TOKENS = 512, 512


def calls(experts: int, top_k: int, hidden: int, kernel: str) -> tuple[Call, Call]:
    """(a step of the plain block, of the adopted one)."""
    sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": hidden}
    model: Any = tiny_model("mixtral", hidden_size=DIM, num_hidden_layers=1, head_dim=DIM // 4, **sizes)
    model.set_experts_implementation(kernel)
    plain, engine = copy.deepcopy(model).model.layers[0].mlp.train(), Engine()
    adopted = adopt(engine, model).model.layers[0].mlp.train()
    x = torch.randn(4, TOKENS // 4, DIM, requires_grad=True)

    def step() -> None:
        plain(x).square().mean().backward()

    def adopted_step() -> None:
        (adopted(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()

    return step, adopted_step


def measured(sizes: tuple[int, int, int], kernel: str, repetitions: int) -> dict[str, Any]:
    plain, adopted = calls(*sizes, kernel)
    plain(), adopted()
    times: dict[str, list[Seconds]] = {"adopted": [], "plain": []}
    for _ in range(repetitions):
        times["plain"].append(seconds(plain))
        times["adopted"].append(seconds(adopted))
    return ratio(times, "adopted", "plain")


def main() -> int:
    options = arguments("An adopted block relative to the plain one.", repetitions=15)
    steady()
    criteria = [
        Criterion(f"E {sizes[0]}, {kernel}: adopted over plain", measured(sizes, kernel, options.repetitions), LIMIT)
        for sizes in (SIZES[:1] if options.smoke else SIZES)
        for kernel in ("grouped_mm", "eager")
    ]
    return report("adopted", criteria, options.smoke)


if __name__ == "__main__":
    sys.exit(main())
