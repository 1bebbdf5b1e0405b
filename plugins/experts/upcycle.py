"""Experts that all begin as one trained dense network."""

from contextlib import contextmanager

import attrs
import safetensors
import torch
from safetensors.torch import save_file

from moe_engine import StackedMLP, UsageError, hookimpl, option
from moe_engine.errors import nearest


@attrs.define(eq=False)
class Upcycle:
    """Sparse upcycling: each expert is a copy of a dense feed-forward network, W_e = W; the router is drawn.

    Where gates sum to 1 and nothing is dropped, the layer at birth answers what the dense network does. The
    tensors are read from a safetensors file, in the layout [out, in] of nn.Linear; nothing is unpickled. For
    swiglu (Llama's gate_proj, up_proj, down_proj) name w_gate, w_in, w_out. Layers of one model are told apart
    by settings of their own: engine.moe(..., settings=["upcycle.w_in=..."]).

    Source: Komatsuzaki et al., 2022 (sparse upcycling).
    """

    file: str | None = option(None, help="safetensors file of the dense network; must be set")
    w_in: str = option("w_in", help="name of the first matrix there, for swiglu of the one without the activation")
    w_out: str = option("w_out", help="name of the last matrix there")
    w_gate: str = option("w_gate", help="name of the matrix of the gate there, for swiglu alone")
    b_in: str | None = option(None, help="name of the first bias there; unset: zeros, if the layer has biases")
    b_out: str | None = option(None, help="name of the last bias there; unset: zeros, if the layer has biases")

    @staticmethod
    def trial_options(folder, dim, hidden):
        """A small dense network, to try this with."""
        w_in = torch.eye(hidden, dim)
        save_file({"w_in": w_in, "w_out": w_in.t().contiguous()}, folder / "dense.safetensors")
        return {"file": str(folder / "dense.safetensors")}

    @hookimpl
    def moe_check(self, setup):
        if self.file is None:
            return "upcycle needs the file of a dense network; set upcycle.file"
        spec = setup.spec
        if spec.dim and not spec.bias and (self.b_in or self.b_out):
            return "upcycle.b_in and upcycle.b_out name biases, but the layer has none; build it with bias=True"
        if spec.bias and spec.activation == "swiglu":
            return "upcycle can't give biases to a swiglu, which needs two at its entrance; build it with bias=False"
        return None

    @hookimpl
    def moe_experts(self, spec):
        enter, leave = (spec.hidden, spec.dim), (spec.out_dim, spec.hidden)
        first = (self.w_gate, self.w_in) if spec.activation == "swiglu" else (self.w_in,)
        bank = StackedMLP(spec)
        with _opened(self.file) as file, torch.no_grad():
            bank.w_in.copy_(torch.cat([_tensor(file, self.file, name, enter) for name in first]).t())
            bank.w_out.copy_(_tensor(file, self.file, self.w_out, leave).t())
            for bias, name in ((bank.b_in, self.b_in), (bank.b_out, self.b_out)) if spec.bias else ():
                bias.copy_(_tensor(file, self.file, name, (bias.shape[1],)) if name else torch.zeros(()))
        return bank


@contextmanager
def _opened(path):
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"upcycle: {path} can't be read as a safetensors file: {error}") from error


def _tensor(file, path, name, shape):
    if name not in file.keys():  # noqa: SIM118 (no Mapping)
        raise UsageError(f"upcycle: {path} holds no tensor '{name}'; {nearest(name, file.keys())}")
    tensor = file.get_tensor(name)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        found, wanted = f"{list(tensor.shape)} of {tensor.dtype}", f"{list(shape)} of real numbers, [out, in]"
        raise UsageError(f"upcycle: tensor '{name}' of {path} is {found}; the layer needs {wanted}")
    return tensor
