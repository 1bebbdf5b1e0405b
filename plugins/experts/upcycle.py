from contextlib import contextmanager

import attrs
import safetensors
import torch
from safetensors.torch import save_file

from moe_engine import StackedMLP, UsageError, hookimpl, nearest, option


@attrs.define(eq=False)
class Upcycle:
    """Every expert starts as a copy of a trained dense network.

    W_e = W for each expert e (sparse upcycling); the router is random. Where gates sum to 1 and nothing is dropped,
    the new layer computes what the dense network does. Tensors are read from a safetensors file in nn.Linear's
    layout [out, in]; nothing is unpickled. For swiglu (Llama's gate_proj, up_proj, down_proj) name w_gate, w_in,
    w_out. To read other tensors in each layer of a model, set them per layer: engine.moe(...,
    settings=["upcycle.w_in=..."]).

    Source: Komatsuzaki et al., 2022 (Sparse Upcycling).
    """

    file: str | None = option(None, help="safetensors file of the dense network; required")
    w_in: str = option("w_in", help="name of the first matrix, for swiglu the one without activation")
    w_out: str = option("w_out", help="name of the last matrix")
    w_gate: str = option("w_gate", help="name of the gate's matrix, for swiglu only")
    b_in: str | None = option(None, help="name of the first bias; unset: zeros, if the layer has biases")
    b_out: str | None = option(None, help="name of the last bias; unset: zeros, if the layer has biases")

    @staticmethod
    def trial_options(folder, dim, hidden):
        """Write a small dense network for the conformance tests."""
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
            return "upcycle can't fill the two input biases of swiglu; build the layer with bias=False"
        return None

    @hookimpl
    def moe_experts(self, spec):
        shape_in, shape_out = (spec.hidden, spec.dim), (spec.out_dim, spec.hidden)
        first = (self.w_gate, self.w_in) if spec.activation == "swiglu" else (self.w_in,)
        bank = StackedMLP(spec)
        with _opened(self.file) as file, torch.no_grad():
            bank.w_in.copy_(torch.cat([_tensor(file, self.file, name, shape_in) for name in first]).t())
            bank.w_out.copy_(_tensor(file, self.file, self.w_out, shape_out).t())
            for bias, name in ((bank.b_in, self.b_in), (bank.b_out, self.b_out)) if spec.bias else ():
                bias.copy_(_tensor(file, self.file, name, (bias.shape[1],)) if name else torch.zeros(()))
        return bank


@contextmanager
def _opened(path):
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"upcycle: {path} can't be read as safetensors: {error}", code="unreadable-file") from error


def _tensor(file, path, name, shape):
    if name not in file.keys():  # noqa: SIM118 (not a Mapping)
        raise UsageError(f"upcycle: {path} has no tensor '{name}'; {nearest(name, file.keys())}", code="unknown-tensor")
    tensor = file.get_tensor(name)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        found, wanted = f"{list(tensor.shape)} of {tensor.dtype}", f"{list(shape)} of floats, [out, in]"
        raise UsageError(f"upcycle: '{name}' of {path} is {found}; the layer needs {wanted}", code="wrong-tensor")
    return tensor
