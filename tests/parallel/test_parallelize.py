"""A model spread over ranks, in every layout, next to one process with the whole batch; all in float64."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_engine import Engine, Growth, UsageError, adam
from moe_engine.parallel.parallelize import expert_mesh, parallelize
from moe_engine.processes import all_reduce_sum, full_tensor, is_cut
from support import on_ranks

LAYOUTS = {
    2: {"data": (False, 1), "shard": (True, 1), "experts": (False, 2), "shard experts": (True, 2)},
    4: {"data": (False, 1), "shard": (True, 1), "experts": (False, 4), "2 x 2": (False, 2), "shard 2 x 2": (True, 2)},
}
CASES = {
    "topk,saturation,switch_aux": {},
    "sigmoid_topk,loss_free,z_loss": {"experts": 6, "shared": 1},  # of four ranks, the last owns none
    "hierarchical,global_aux,sequence_aux": {"activation": "swiglu", "bias": True},
    "top_p,entropy,importance_cv2": {},
    "relu": {},
    "topk,gshard,output_similarity,lora": {},
    "zero_computation,log_load": {"activation": "gelu"},
    "soft": {},
}
QUICK = [*CASES][:3:2]  # a bias and losses over the batch; two levels and losses over sequences
STEPS = 5


class Blocks(nn.Module):
    """Two blocks with a layer each, and a head."""

    def __init__(self, engine):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(6, 6), "moe": engine.moe(6, 7)}) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["moe"](block["mix"](x))
        return self.head(x)


def build(plugins, seed=0):
    torch.manual_seed(seed)
    engine = Engine(plugins, **{"experts": 8, "top_k": 2, **CASES[plugins]})
    model = Blocks(engine).double()
    engine.attach(model)
    return engine, model


def batch(step, rank, ranks):
    """This rank's part of a batch of 10 sequences, which four ranks share unevenly, with none for the last."""
    x = torch.randn(10, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    if ranks == 4 and step % 2:
        return x.split([5, 2, 3, 0])[rank]
    return x.tensor_split(ranks)[rank]


def trained(engine, model, called, rank=0, ranks=1):
    """(losses, weights, sums, health's) of a few steps, with a growth and a removal."""
    optimizer, losses = adam(model, 0.01), []
    for step in range(STEPS):
        x = batch(step, rank, ranks)
        loss = (called(x) - x.roll(1, -1)).square().sum() / 180
        (loss * ranks + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        losses.append(all_reduce_sum(loss.detach()))
        called = changed(engine, model, called, optimizer, step)
    weights = {name: full_tensor(value.detach()).clone() for name, value in model.state_dict().items()}
    sums = [layer.sums.take_since_log() for layer in engine.layers]
    cvs = [[of_layer.pop(f"health.{name}") for name in ("cv", "forwards")] for of_layer in sums]  # in fp32
    return torch.stack(losses), weights, [statistics(of_layer) for of_layer in sums], cvs


def changed(engine, model, called, optimizer, step):
    """Grow a layer after step 1, by two experts that start as the first, and remove one after step 2."""
    layer = engine.layers[0]
    growths = {1: Growth(layer.name, parents=(0, 0)), 2: Growth(layer.name, drop=(3,))}
    if step not in growths:
        return called
    wrapped = isinstance(called, DistributedDataParallel)
    probe = lambda: model(batch(9, 0, 1)).square().mean()  # noqa: E731
    engine.grow(growths[step], optimizer, [called] if wrapped else [], probe)
    mesh = next((bank.experts.exchange.mesh for bank in engine.layers if bank.experts.exchange), None)
    return parallelize(engine, model, mesh, shard=False) if wrapped else called


def statistics(sums):
    """A layer's sums, and the mean of each loss term; every rank counts its forward and adds the whole loss."""
    forwards = sums.pop("forwards")
    return {name: value / forwards if name.startswith("loss.") else value for name, value in sums.items()}


def spread(engine, model, shard, experts):
    called = parallelize(engine, model, expert_mesh(experts), shard)
    model.to("cpu")  # as trainers do; it replaces parameters that are cut
    return called


def _rank(rank, folder, ranks, cases):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for plugins in cases:
        for layout, (shard, experts) in LAYOUTS[ranks].items():
            engine, model = build(plugins, seed=rank)  # rank 0's weights are everyone's
            found[plugins, layout] = trained(engine, model, spread(engine, model, shard, experts), rank, ranks)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, QUICK), *(pytest.param(ranks, [*CASES], marks=pytest.mark.long) for ranks in LAYOUTS)],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} cases",
)
def test_a_layout_computes_what_one_process_does(tmp_path, ranks, cases):
    on_ranks(_rank, str(tmp_path), ranks, cases, count=ranks)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(ranks)]
    for plugins in cases:
        engine, model = build(plugins)
        losses, weights, sums, cvs = trained(engine, model, model)
        for rank in range(ranks):
            for layout in LAYOUTS[ranks]:
                where = f"{plugins} | {layout} | rank {rank}: {{}}".format
                there = found[rank][plugins, layout]
                torch.testing.assert_close(there[0], losses, rtol=0, atol=1e-12, msg=where)
                torch.testing.assert_close(there[1], weights, rtol=0, atol=1e-10, msg=where)
                torch.testing.assert_close(there[2], sums, rtol=1e-12, atol=1e-12, msg=where)
                torch.testing.assert_close(there[3], cvs, rtol=1e-5, atol=1e-6, msg=where)


def _refused(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    codes = []

    def refusal(call, *arguments):
        with pytest.raises(UsageError) as error:
            call(*arguments)
        codes.append(error.value.code)

    refusal(expert_mesh, 3)
    for shard in (True, False):
        engine, model = build("topk,saturation,switch_aux")
        refusal(parallelize, engine, parallelize(engine, model, shard=shard))
    engine, model = build("topk,saturation,switch_aux")
    model.blocks[0].moe.experts.axes = {}
    refusal(parallelize, engine, model, expert_mesh(2))
    assert not any(map(is_cut, model.parameters()))
    assert codes == ["bad-mesh", "already-parallel", "already-parallel", "bank-cannot-spread"], codes
    torch.distributed.destroy_process_group()


def test_what_can_not_be_spread_is_refused(tmp_path):
    on_ranks(_refused, str(tmp_path))


def test_one_process_is_told_to_start_several():
    engine, model = build("soft")
    with pytest.raises(UsageError, match="torchrun"):
        parallelize(engine, model)
