"""Experts spread over ranks: rows travel to the rank that owns their expert, and their outputs travel back."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.functional import pad

from ..contract.parts import Experts, Part
from ..errors import UsageError
from ..processes import cut_like, full_tensor, world_size


class Exchange:
    """Expert parallelism of one bank (Lepikhin et al., 2020, GShard): each of P ranks owns ceil(E / P) experts.

    mesh: a DeviceMesh with the dimension "experts", over whose P ranks the experts are cut as torch.chunk does, so
    that the last ranks may own fewer, or none; over its other dimensions they are replicated. A forward exchanges the
    counts once, every kept assignment's row, and its output [out]; a backward the gradients of both.
    """

    def __init__(self, mesh: Any, out: int) -> None:
        self.mesh, self.out = mesh, out
        self.group = mesh["experts"].get_group()
        self.size: int = mesh["experts"].size()
        others = [name for name in mesh.mesh_dim_names if name != "experts" and mesh[name].size() > 1]
        self.replicas = [mesh[name].get_group() for name in others]

    def __call__(self, bank: Experts, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """[N, out]: what the bank's forward returns, whoever owns the experts. All ranks of the mesh must call it."""
        each = -(-counts_E.shape[0] // self.size)
        mine_Pe = pad(counts_E, (0, each * self.size - counts_E.shape[0])).view(self.size, each)
        theirs_Pe = torch.empty_like(mine_Pe)
        torch.distributed.all_to_all_single(theirs_Pe, mine_Pe.contiguous(), group=self.group)
        send, receive = torch.stack([mine_Pe.sum(1), theirs_Pe.sum(1)]).tolist()
        dtype = _sent_dtype(x_ND)
        x_RD = self._exchanged(x_ND[: sum(send)].to(dtype), receive, send)
        expert_R = torch.arange(each, device=x_ND.device).repeat(self.size).repeat_interleave(theirs_Pe.flatten())
        order_R = expert_R.argsort(stable=True)  # from the ranks' order to that of experts
        with self.own(bank) as held:
            y_RO = self._outputs(bank, x_RD, order_R, theirs_Pe.sum(0)[:held])
        y_NO = self._exchanged(y_RO.to(dtype), send, receive)
        return pad(y_NO, (0, 0, 0, x_ND.shape[0] - y_NO.shape[0]))

    def _exchanged(self, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        """The rows that this rank receives, `receive[r]` from rank r, for `send[r]` that it sends."""
        exchanged: Tensor = _AllToAll.apply(rows, receive, send, self.group)
        return exchanged

    @contextmanager
    def own(self, bank: Experts) -> Iterator[int]:
        """Inside, the bank's declared tensors are plain ones of this rank's experts; gives their number."""
        rank, held = self.mesh["experts"].get_local_rank(), 0
        with _replaced(bank) as put:
            for part, name, tensor, axis in declared(bank):
                own = self._held(tensor) if isinstance(tensor, DTensor) else _chunk(tensor, self.size, rank, axis)
                put(part, name, own)
                held = own.shape[axis]
            yield held

    @contextmanager
    def whole(self, bank: Experts) -> Iterator[None]:
        """Inside, the bank's declared tensors are plain ones of all experts, with gradients to every owner."""
        with _replaced(bank) as put:
            for part, name, tensor, _ in declared(bank):
                if isinstance(tensor, DTensor):
                    put(part, name, cut_like(tensor, self._held(tensor)).full_tensor(grad_placements=[Partial()]))
            yield

    def cut(self, bank: Experts) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Cut the bank's declared parameters; returns (what a parameter was, what it is now) of each."""
        swaps = []
        for part, name, tensor, axis in declared(bank):
            if isinstance(tensor, nn.Parameter):
                cut = distribute_tensor(tensor.detach(), self.mesh["experts"], [Shard(axis)])
                parameter = nn.Parameter(cut, tensor.requires_grad)
                part._parameters[name] = parameter
                swaps.append((tensor, parameter))
        bank.exchange = self
        bank.outputs = partial(self._all_outputs, bank)  # type: ignore[method-assign]
        return swaps

    def uncut(self, bank: Experts) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Make the bank's parameters whole again; returns (what a parameter was, what it is now) of each."""
        swaps = []
        for part, name, tensor, _ in declared(bank):
            if isinstance(tensor, DTensor):
                parameter = nn.Parameter(full_tensor(tensor.detach()), tensor.requires_grad)
                part._parameters[name] = parameter
                swaps.append((tensor, parameter))
        bank.exchange = None
        del bank.outputs
        return swaps  # type: ignore[return-value]  # a DTensor parameter is both

    def _all_outputs(self, bank: Experts, x_SD: Tensor) -> Tensor:
        """[E, S, out]: the bank's `outputs`, for which its weights are gathered."""
        with self.whole(bank):
            result: Tensor = type(bank).outputs(bank, x_SD)
        return result

    def _outputs(self, bank: Experts, x_RD: Tensor, order_R: Tensor, counts_e: Tensor) -> Tensor:
        """[R, out]: the outputs of rows [R, D] in their order; order_R sorts them by expert."""
        if counts_e.shape[0] == 0:  # a rank without experts: no row came; its empty weights stay part of the graph
            none = sum((tensor.sum() for _, _, tensor, _ in declared(bank)), x_RD.sum())
            return x_RD.new_zeros(0, self.out) + none
        weight_R = torch.ones(x_RD.shape[0], dtype=torch.promote_types(x_RD.dtype, torch.float32), device=x_RD.device)
        return bank.combined(x_RD, order_R, weight_R, counts_e)

    def __deepcopy__(self, memo: Any) -> "Exchange":
        return self  # a copy of a layer exchanges with the same ranks

    def _held(self, tensor: DTensor) -> Tensor:
        """This rank's part of a parameter, whose gradient becomes the mean over all ranks that others get.

        Not a hook of the parameter: `Module.to` replaces a DTensor, and would lose it.
        """
        held: Tensor = _MeanGradient.apply(tensor.to_local(), self.replicas)
        return held


class _MeanGradient(Function):
    """A part of a parameter, whose gradient, which its owner has summed over the group, becomes a mean over ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, replicas: list[Any]) -> Tensor:
        ctx.replicas = replicas
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mean = grad / world_size()
        for group in ctx.replicas:
            torch.distributed.all_reduce(mean, group=group)
        return mean, None


class _AllToAll(Function):
    """Exchange rows between the ranks of a group; in backward their gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        got = rows.new_empty(sum(receive), rows.shape[1])
        torch.distributed.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllToAll.apply(grad, *ctx.splits, ctx.group), None, None, None


def refuse_exchange(bank: Experts, layer: str) -> None:
    """Raise UsageError for a bank whose experts can't be spread over ranks."""
    found = [(part, name) for part, name, tensor, _ in declared(bank) if isinstance(tensor, nn.Parameter)]
    if not found:
        why = f"its {type(bank).__name__} declares no expert axis"
    elif any(part.holder(name)[0] is not part for part, name in found):
        why = f"its {type(bank).__name__} borrows the weights of another module, which computes with all of them"
    else:
        return
    message = f"the experts of layer '{layer}' can't be spread over ranks: {why}; use data or sharded parallelism"
    raise UsageError(message, code="bank-cannot-spread")


def declared(bank: Experts) -> Iterator[tuple[Part, str, Tensor, int]]:
    """(part, name, tensor, axis) of every tensor with an expert axis."""
    for part in bank.modules():
        if isinstance(part, Part):
            for name, axis in part.axes.items():
                if isinstance(tensor := getattr(part, name), Tensor):
                    yield part, name, tensor, axis.axis


@contextmanager
def _replaced(bank: Experts) -> Iterator[Any]:
    """Inside, the function put(part, name, tensor) replaces a bank's tensors, and the bank knows of no exchange."""
    exchange, before = bank.exchange, []

    def put(part: Part, name: str, tensor: Tensor) -> None:
        table: dict[str, Any] = part._parameters if name in part._parameters else part._buffers
        before.append((table, name, table[name]))
        table[name] = tensor

    bank.exchange = None
    try:
        yield put
    finally:
        bank.exchange = exchange
        for table, name, tensor in before:
            table[name] = tensor


def _sent_dtype(x: Tensor) -> torch.dtype:
    """That of the rows that travel: autocast's, in which the experts compute, or their own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunk(tensor: Tensor, size: int, rank: int, axis: int) -> Tensor:
    """One of `size` chunks along an axis, of which the last may be smaller or empty."""
    each = -(-tensor.shape[axis] // size)
    start = min(rank * each, tensor.shape[axis])
    return tensor.narrow(axis, start, min(each, tensor.shape[axis] - start))
