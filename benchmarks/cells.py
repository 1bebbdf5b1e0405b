"""The timed problems, the floors below them, and the engine's experts on them.

Experts only: gathering, matmuls, activation, gates and the weighted sum, forward and backward, with the gradients of
tokens, gates and weights. The routing is given, so every candidate does the same work.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import attrs
import torch
from torch import Tensor, nn

from moe_engine import Engine, StackedMLP
from moe_engine.contract.routing import Routing, Spec, Tokens, assign
from moe_engine.layer.activations import ACTIVATIONS
from moe_engine.layer.dispatch import dispatch
from moe_engine.layer.fused_cpu import matmul_dtype
from paired import Call


@attrs.frozen
class Cell:
    """tokens T, dim D, hidden H, experts E, top_k K. load: even, zipf or one (all tokens to the same K experts)."""

    tokens: int = 4096
    dim: int = 256
    hidden: int = 512
    experts: int = 8
    top_k: int = 2
    load: str = "even"
    activation: str = "relu"
    bias: bool = False
    precision: str = "fp32"  # fp32, bf16 (weights too), autocast
    threads: int = 1
    forward_only: bool = False
    adam: bool = False  # includes a step of the fused optimizer

    @property
    def name(self) -> str:
        sizes = f"T {self.tokens}, {self.dim}/{self.hidden}, E {self.experts}, K {self.top_k}"
        values = [getattr(self, field.name) for field in attrs.fields(Cell)[5:]]
        defaults = [field.default for field in attrs.fields(Cell)[5:]]
        words = (self.load, self.activation, "bias", self.precision, f"{self.threads} threads", "forward alone", "Adam")
        return ", ".join([sizes, *(word for word, a, b in zip(words, values, defaults, strict=True) if a != b)])

    def small(self) -> "Cell":
        """The same cell at a size that takes milliseconds."""
        return attrs.evolve(self, tokens=64, dim=32, hidden=32)


class Problem(NamedTuple):
    """x [T, D]; expert, gate [T, K]; w_in [E, D, W]; w_out [E, H, D]; b_in, b_out or None; grad [T, D] of y."""

    x: Tensor
    expert: Tensor
    gate: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    grad: Tensor

    @property
    def weights(self) -> dict[str, Tensor]:
        """The experts' weights by name."""
        names = ("w_in", "w_out", "b_in", "b_out")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        return {"x": self.x, "gate": self.gate, **self.weights}

    def cast(self, dtype: torch.dtype) -> "Problem":
        """Tokens and weights in that precision; gates and gradients as they are."""
        return self._replace(x=self.x.to(dtype), **{name: weight.to(dtype) for name, weight in self.weights.items()})


def problem_of(cell: Cell, checked: bool = True) -> Problem:
    """Random tensors with the cell's load. checked: no gradient where ReLU's kink would spoil the check."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made) / shape[-2] ** 0.5

    wide = cell.hidden * (2 if cell.activation == "swiglu" else 1)
    gate = torch.rand(cell.tokens, cell.top_k, generator=made) + 0.1
    dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
    tensors = (
        torch.randn(cell.tokens, cell.dim, generator=made),
        chosen(cell, made),
        gate / gate.sum(-1, keepdim=True),
        normal(cell.experts, cell.dim, wide),
        normal(cell.experts, cell.hidden, cell.dim),
        normal(1, cell.experts, wide)[0] if cell.bias else None,
        normal(1, cell.experts, cell.dim)[0] if cell.bias else None,
        torch.randn(cell.tokens, cell.dim, generator=made),
    )
    problem = Problem(*tensors).cast(dtype)
    if checked and cell.activation == "relu":
        problem.grad[at_kink(problem)] = 0
    for tensor in problem.trained.values():
        tensor.requires_grad_()
    return problem


def at_kink(given: Problem) -> Tensor:
    """[T] bool: tokens with a hidden unit so close to ReLU's kink that rounding decides on which side it is."""
    found = torch.zeros(len(given.x), dtype=torch.bool)
    for e, w_in in enumerate(given.w_in.double()):
        token, _ = torch.where(given.expert == e)
        a = given.x[token].double() @ w_in
        a = a if given.b_in is None else a + given.b_in[e]
        found[token] |= (a.abs() < 1e-5).any(1)
    return found


def chosen(cell: Cell, made: torch.Generator) -> Tensor:
    """[T, K]: different experts for each token."""
    count, top_k = cell.experts, cell.top_k
    if cell.load == "one":
        return torch.arange(top_k).expand(cell.tokens, top_k).contiguous()
    if cell.load == "even":
        turns = torch.arange(cell.tokens * top_k) % count
        named = torch.randperm(count, generator=made)
        return named[turns.view(-1, top_k)[torch.randperm(cell.tokens, generator=made)]]
    popularity = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    popularity = popularity[torch.randperm(count, generator=made)]
    return torch.multinomial(popularity.expand(cell.tokens, count), top_k, generator=made)


def reference(cell: Cell, given: Problem) -> dict[str, Tensor]:
    """In float64: y, and the gradients of `trained` by name; for autocast, of the tensors cast to bf16."""
    shared = given.cast(matmul_dtype(torch.bfloat16)) if cell.precision == "autocast" else given
    exact = given._replace(**{name: _leaf(value) for name, value in shared._asdict().items()})
    act = ACTIVATIONS[cell.activation]
    y = torch.zeros_like(exact.x)
    each = [
        None if weight is None else weight.unbind(0) for weight in (exact.w_in, exact.b_in, exact.w_out, exact.b_out)
    ]
    for e in range(cell.experts):  # unbound once: each w[e] would have a gradient of all experts' size
        w_in, b_in, w_out, b_out = (None if weights is None else weights[e] for weights in each)
        token, rank = torch.where(exact.expert == e)
        h = exact.x[token] @ w_in
        h = act(h if b_in is None else h + b_in) @ w_out
        h = h if b_out is None else h + b_out
        y = y.index_add(0, token, h * exact.gate[token, rank, None])
    grads = torch.autograd.grad(y, list(exact.trained.values()), exact.grad, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(exact.trained, grads, strict=True))}


def _leaf(value: Tensor | None) -> Tensor | None:
    if value is None or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_()


def updating(cell: Cell, weights: Iterable[Tensor]) -> Call:
    """An optimizer step on these weights that changes nothing; a no-op in a cell without Adam."""
    return torch.optim.Adam(list(weights), 0.0, fused=True).step if cell.adam else lambda: None


def dense(cell: Cell, given: Problem) -> Call:
    """The floor of computation: one MLP on T K rows, in fp32 whatever the cell's precision."""
    wide = given.w_in.shape[2]
    up, down = nn.Linear(cell.dim, wide, bias=cell.bias), nn.Linear(cell.hidden, cell.dim, bias=cell.bias)
    act = ACTIVATIONS[cell.activation]
    update = updating(cell, [*up.parameters(), *down.parameters()])
    x = torch.randn(cell.tokens * cell.top_k, cell.dim, requires_grad=True)
    grad = torch.randn(cell.tokens * cell.top_k, cell.dim)

    def call() -> None:
        if cell.forward_only:
            with torch.no_grad():
                down(act(up(x)))
            return
        for tensor in (x, *up.parameters(), *down.parameters()):
            tensor.grad = None
        down(act(up(x))).backward(grad)
        update()

    return call


def matmuls(cell: Cell, given: Problem) -> Call:
    """The floor of the fused MLP: six matmuls an expert into existing memory, weight gradients freshly allocated."""
    counts = torch.bincount(given.expert.flatten(), minlength=cell.experts).tolist()
    rows, wide = sum(counts), given.w_in.shape[2]
    dtype = matmul_dtype(given.w_in.dtype if cell.precision == "fp32" else torch.bfloat16)
    x, y, g, dx = (torch.randn(rows, cell.dim, dtype=dtype) for _ in range(4))
    a, da = (torch.randn(rows, wide, dtype=dtype) for _ in range(2))
    h, dh = (torch.randn(rows, cell.hidden, dtype=dtype) for _ in range(2))
    w_in, w_out = (weight.detach().to(dtype) for weight in (given.w_in, given.w_out))
    update = updating(cell, (w_in, w_out))

    def call() -> None:
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
        start = 0
        for e, count in enumerate(counts):
            rows_e = slice(start, start + count)
            start += count
            torch.mm(x[rows_e], w_in[e], out=a[rows_e])
            torch.mm(h[rows_e], w_out[e], out=y[rows_e])
            if cell.forward_only:
                continue
            torch.mm(g[rows_e], w_out[e].t(), out=dh[rows_e])
            torch.mm(h[rows_e].t(), g[rows_e], out=dw_out[e])
            torch.mm(x[rows_e].t(), da[rows_e], out=dw_in[e])
            torch.mm(da[rows_e], w_in[e].t(), out=dx[rows_e])
        w_in.grad, w_out.grad = dw_in, dw_out
        update()
        w_in.grad = w_out.grad = None

    return call


def weight_gradients(given: Problem) -> Call:
    """The floor of memory: writing as many freshly allocated bytes as the gradients of all experts' weights."""

    def call() -> None:
        for weight in (given.w_in, given.w_out):
            torch.empty_like(weight).fill_(1)

    return call


def whole_layer(cell: Cell) -> Call:
    """Router, bias, loss, ledger and all calls of a training step, on random tokens, near balance."""
    engine = Engine("saturation,switch_aux", experts=cell.experts, top_k=cell.top_k)
    layer = engine.moe(cell.dim, cell.hidden)
    nn.init.orthogonal_(layer.router.weight)  # equal, independent scores
    x, grad = torch.randn(cell.tokens, cell.dim, requires_grad=True), torch.randn(cell.tokens, cell.dim)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y = layer(x)
        torch.autograd.backward((y, engine.aux_loss()), (grad, None))
        engine.after_backward()
        engine.after_step()

    return call


Forward = Callable[[], Tensor]


def engine_experts(cell: Cell, given: Problem) -> Forward:
    """The engine's experts, with the given routing."""
    spec = Spec(cell.dim, cell.hidden, 0, cell.experts, cell.top_k, cell.activation, cell.bias)
    bank = StackedMLP(spec)
    bank._parameters.update(given.weights)

    def forward() -> Tensor:
        tokens = Tokens(given.x, (cell.tokens,))
        plan = assign(given.gate, given.expert, tokens)
        return dispatch(bank, Routing(tokens, (), given.gate, plan, cell.experts, cell.top_k), cell.dim)

    return forward


def step(cell: Cell, given: Problem, forward: Forward) -> Call:
    """Forward and backward; gradients are allocated anew, as after zero_grad(set_to_none=True)."""
    autocast = cell.precision == "autocast"
    update = updating(cell, given.weights.values())

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if cell.forward_only:
                with torch.no_grad():
                    forward()
                return
            for tensor in given.trained.values():
                tensor.grad = None
            y = forward()
        y.backward(given.grad.to(y.dtype))
        update()

    return call


def errors(cell: Cell, given: Problem, forward: Forward, weights: bool = True) -> dict[str, float]:
    """Relative errors of the output and each gradient against float64, in the Frobenius norm.

    weights: include those of weights, which some candidates hold in another layout.
    """
    expected = reference(cell, given)
    for tensor in given.trained.values():
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=cell.precision == "autocast"):
        y = forward()
    y.backward(given.grad.to(y.dtype))
    found = {"y": y.detach(), **{name: tensor.grad for name, tensor in given.trained.items()}}
    names = found if weights else ("y", "x", "gate")
    return {name: float((found[name].double() - expected[name]).norm() / expected[name].norm()) for name in names}
