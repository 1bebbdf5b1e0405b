"""What the layer costs over the products that it has to do: bar 1.25.

The whole layer, router included, forward and backward, against a dense MLP on as many rows as the
experts get (T K), which has no router, no sorting and no weighted sum. The first candidate is the
router alone in training mode; the second has a bias that reads gradients and a loss, with every call
to the engine that a training step makes.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_engine import Engine, MoE
from paired import arguments, ratios, steady, tell

BAR = 1.25
TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 4096, 256, 512, 8, 2


def dense() -> Callable[[], None]:
    """Linear-ReLU-Linear on T K rows; the gradient of the input too."""
    mlp = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, DIM, bias=False))
    x, grad = torch.randn(TOKENS * TOP_K, DIM, requires_grad=True), torch.randn(TOKENS * TOP_K, DIM)

    def step() -> None:
        forget(mlp, x)
        mlp(x).backward(grad)

    return step


def engine_layer(plugins: str) -> tuple[MoE, Callable[[], None]]:
    engine = Engine(plugins, experts=EXPERTS, top_k=TOP_K)
    layer = engine.moe(DIM, HIDDEN)
    nn.init.orthogonal_(layer.router.rows)  # equal, independent scores for random tokens: near balance
    x, grad = torch.randn(TOKENS, DIM, requires_grad=True), torch.randn(TOKENS, DIM)

    def step() -> None:
        forget(layer, x)
        y = layer(x)
        torch.autograd.backward((y, engine.aux_loss()), (grad, None))
        engine.after_backward()
        engine.after_step()

    return layer, step


def forget(module: nn.Module, x: Tensor) -> None:
    """Gradients are allocated anew in every repetition, as after zero_grad(set_to_none=True)."""
    module.zero_grad(set_to_none=True)
    x.grad = None


def cv(layer: MoE) -> float:
    """Of the load on fresh random tokens."""
    load = layer.route(layer.tokens(torch.randn(TOKENS, DIM))).load
    return round(float(load.std(correction=0) / load.mean()), 3)


def main() -> int:
    options = arguments("The layer against a dense MLP of equal active rows.", repetitions=25)
    steady()
    torch.manual_seed(0)
    layers = {plugins: engine_layer(plugins) for plugins in ("topk", "topk,saturation,switch_aux")}
    calls = {"dense": dense(), **{plugins: step for plugins, (_, step) in layers.items()}}
    found = ratios(calls, "dense", options.repetitions)
    return tell(found, BAR, options.json, load_cv=max(cv(layer) for layer, _ in layers.values()))


if __name__ == "__main__":
    sys.exit(main())
