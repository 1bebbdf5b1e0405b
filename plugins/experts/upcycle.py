from contextlib import ExitStack

import attrs
import safetensors
import torch
from safetensors.torch import save_file

from moe_engine import StackedMLP, UsageError, hookimpl, nearest, option, safetensors_of


@attrs.define(eq=False)
class Upcycle:
    """Every expert starts as a copy of a trained dense network.

    W_e = W for each expert e (sparse upcycling); the router is random. Where gates sum to 1 and nothing is dropped,
    the new layer computes what the dense network does. Tensors are read from a safetensors file, or from the shards
    of a folder or an index, in nn.Linear's layout [out, in]. For swiglu (Llama's gate_proj, up_proj, down_proj) name
    w_gate, w_in, w_out. Name other tensors for each layer: engine.moe(..., settings=["upcycle.w_in=..."]).

    Source: Komatsuzaki et al., 2022 (Sparse Upcycling).
    """

    file: str | None = option(None, help="safetensors file, index or folder of the dense network; required")
    w_in: str = option("w_in", help="name of the first matrix, for swiglu the one without activation")
    w_out: str = option("w_out", help="name of the last matrix")
    w_gate: str = option("w_gate", help="name of the gate's matrix, for swiglu only")
    b_in: str | None = option(None, help="name of the first bias; unset: zeros, if the layer has biases")
    b_out: str | None = option(None, help="name of the last bias; unset: zeros, if the layer has biases")

    @staticmethod
    def trial_options(folder, dim, hidden):
        """For the conformance tests."""
        save_file({"w_in": torch.eye(hidden, dim), "w_out": torch.eye(dim, hidden)}, folder / "dense.safetensors")
        return {"file": str(folder / "dense.safetensors")}

    @hookimpl
    def moe_check(self, setup):
        if self.file is None:
            return "upcycle needs the file of a dense network; set upcycle.file"
        spec = setup.spec
        if spec.dim and not spec.bias and (self.b_in or self.b_out):
            return "upcycle.b_in and upcycle.b_out name biases, but the layer has none; build it with bias=True"
        if spec.bias and spec.activation == "swiglu":
            return "upcycle can't fill the two input biases of swiglu; build the layer with bias=False"
        return None

    @hookimpl
    def moe_experts(self, spec):
        shape_in, shape_out = (spec.hidden, spec.dim), (spec.out_dim, spec.hidden)
        first = (self.w_gate, self.w_in) if spec.activation == "swiglu" else (self.w_in,)
        bank = StackedMLP(spec)
        with ExitStack() as stack, torch.no_grad():
            held = _opened(self.file, stack)
            bank.w_in.copy_(torch.cat([_tensor(held, self.file, name, shape_in) for name in first]).t())
            bank.w_out.copy_(_tensor(held, self.file, self.w_out, shape_out).t())
            for bias, name in ((bank.b_in, self.b_in), (bank.b_out, self.b_out)) if spec.bias else ():
                bias.copy_(_tensor(held, self.file, name, (bias.shape[1],)) if name else torch.zeros(()))
        return bank


def _opened(path, stack):
    """The open files of a checkpoint by the tensors in them."""
    held, file = {}, path
    try:
        for file in safetensors_of(path):
            opened = stack.enter_context(safetensors.safe_open(file, "pt"))
            held |= dict.fromkeys(opened.keys(), opened)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"upcycle: {file} can't be read as safetensors: {error}", code="unreadable-file") from error
    return held


def _tensor(held, path, name, shape):
    if name not in held:
        raise UsageError(f"upcycle: {path} has no tensor '{name}'; {nearest(name, held)}", code="unknown-tensor")
    tensor = held[name].get_tensor(name)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        found, wanted = f"{list(tensor.shape)} of {tensor.dtype}", f"{list(shape)} of floats, [out, in]"
        raise UsageError(f"upcycle: '{name}' of {path} is {found}; the layer needs {wanted}", code="wrong-tensor")
    return tensor
