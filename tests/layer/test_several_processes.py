"""Every strategy on two and four ranks, in float64, next to one process.

Those that see the batch of all ranks equal one process with the whole batch; the others one process with as many
micro-batches.
"""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_engine import Engine, load, save
from support import on_ranks

WHOLE = {
    "topk": {},
    "sigmoid_topk": {},
    "sqrtsoftplus_topk": {},
    "hierarchical": {},
    "top_p": {},
    "threshold": {},
    "hash": {"vocab": 16},
    "soft": {},
    **{name: {} for name in ("loss_free", "log_load", "saturation", "absolute_saturation")},
    "saturation signal=weights": {},
    **{name: {} for name in ("z_loss", "entropy", "importance_cv2", "mutual_information", "gate_variance")},
    **{name: {} for name in ("global_aux", "sequence_aux", "router_diversity", "switch_aux", "gshard", "relu")},
}
OWN = {
    **{name: {} for name in ("quantile", "expert_choice", "sinkhorn")},
    "output_similarity": {},
    "topk capacity": {"capacity": 1.0},
}
CASES = {**WHOLE, **OWN}
STEPS, ROWS = 3, 8


def build(name):
    torch.manual_seed(0)
    plugin, _, option = name.partition(" ")
    settings = [f"{plugin}.{option}"] if "=" in option else []
    losses = {"z_loss", "entropy", "mutual_information", "sequence_aux", "output_similarity"}
    settings += [f"{plugin}.weight=0.5"] if plugin in losses else []
    engine = Engine(plugin, settings, experts=5, top_k=2, **CASES[name])
    model = nn.Sequential(nn.Linear(6, 6), engine.moe(6, 7, name="moe")).double()
    return engine, model


def batch(step, rank):
    random = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2, ROWS // 2, 6, dtype=torch.float64, generator=random)


def run(model, x):
    ids = (1000 * x[..., 0].abs()).long() % 16
    h = model[0](x)
    return model[1](h, ids=ids if model[1].spec.vocab else None)


class Both(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return run(self.model, x)


def trained(name, micro_batches, wrap=nn.Sequential):
    """(task loss of each step, weights, states) of three steps. micro_batches(step): a list of batches."""
    engine, model = build(name)
    whole, optimizer, losses = wrap(Both(model)), torch.optim.SGD(model.parameters(), 0.1), []
    for step in range(STEPS):
        batches, total = micro_batches(step), 0.0
        for x in batches:
            loss = (whole(x) - x).square().mean()
            ((loss + engine.aux_loss()) / len(batches)).backward()
            engine.after_backward()
            total += loss.detach() / len(batches)
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        losses.append(total)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    states = {name: value for name, value in model.state_dict().items() if name not in weights}
    sums = model[1].sums.take_since_log()
    states |= {name: sums[name] for name in ("tokens", "load", "dropped")}
    return torch.stack(losses), weights, states


def _rank(rank, folder, ranks):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for name in CASES:
        losses, weights, states = trained(name, lambda step: [batch(step, rank)], DistributedDataParallel)
        torch.distributed.all_reduce(losses)
        found[name] = (losses / ranks, weights, states)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def on_several(request, tmp_path_factory):
    """What each of two or four ranks found."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, str(folder), ranks, count=ranks)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_a_strategy_on_several_ranks_is_what_it_is_on_one(on_several, name):
    ranks = len(on_several)

    def micro_batches(step):
        batches = [batch(step, rank) for rank in range(ranks)]
        return [torch.cat(batches)] if name in WHOLE else batches

    losses, weights, states = trained(name, micro_batches)
    for found in on_several:
        torch.testing.assert_close(found[name][0], losses, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[name][1], weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(found[name][2], states, rtol=1e-5, atol=1e-7)  # sums are fp32


# -- FSDP2, idle experts, Join, checkpoints ----------------------------------------------------------------

METRICS = "saturation,weight_similarity,output_similarity_cka,router_diversity,output_similarity"
SHARDED = [METRICS, ["saturation.signal=weights", "output_similarity.weight=0.5"]]


def build_sharded(which):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    engine = Engine(*SHARDED, experts=5, top_k=2)
    model = nn.Sequential(nn.Linear(6, 6), engine.moe(6, 7, name="moe"))
    for module in {"root": [], "layer": [model[1]], "experts": [model[1].experts], "whole": None}[which] or []:
        fully_shard(module)
    if which != "whole":
        fully_shard(model)
    return engine, model, torch.optim.Adam(model.parameters(), 0.01)


def steps_of(engine, model, optimizer, rank, count=3):
    losses = []
    for step in range(count):
        x = batch(step, rank).float()
        loss = (model(x) - x).square().mean()
        (loss + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        model(batch(9, rank).float())
    probe = lambda: (model(batch(9, 0).float()) - batch(9, 0).float()).square().mean()  # noqa: E731
    metrics = engine.metrics("train", probe)["moe"]
    model.train()
    return torch.stack(losses), {name: float(value) for name, value in metrics.items() if is_number(value)}


def is_number(value):
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _sharded_rank(rank, folder, sharded):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for which in sharded:
        rig = build_sharded(which)
        found[which] = steps_of(*rig, rank)
        save(f"{folder}/{which}.safetensors", engine=rig[0], model=rig[1], optimizer=rig[2])
        again = build_sharded(which)
        load(f"{folder}/{which}.safetensors", engine=again[0], model=again[1], optimizer=again[2])
        more, same = steps_of(*rig, rank)[0], steps_of(*again, rank)[0]
        torch.testing.assert_close(more, same)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "sharded", [("root", "experts"), pytest.param(("root", "layer", "experts"), marks=pytest.mark.long)], ids=len
)
def test_sharded_weights_are_measured_saved_and_loaded(tmp_path, sharded):
    """As DistributedDataParallel's are: the same metrics, and a file that one process can read."""
    on_ranks(_sharded_rank, str(tmp_path), sharded)
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    for which in sharded:
        assert ranks[0][which][1] == pytest.approx(ranks[1][which][1], rel=1e-5, nan_ok=True)
        assert {"weight_similarity", "output_similarity_cka"} < ranks[0][which][1].keys()
        engine, model, optimizer = build_sharded("whole")
        load(tmp_path / f"{which}.safetensors", engine=engine, model=model, optimizer=optimizer)
        assert engine.step == 3 and engine.layers[0].biases[0]["saturation"].s.sum() > 0
        torch.testing.assert_close(ranks[0]["root"][0], ranks[0][which][0])


def _idle_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    engine = Engine("topk", top_k=1)
    layer = engine.moe(6, modules=[nn.Linear(6, 6) for _ in range(2)])
    layer.router.weight.data.copy_(torch.eye(2, 6))
    parallel, grads = DistributedDataParallel(layer), []
    x = torch.zeros(4, 6)
    x[:, rank] = 1.0  # each rank needs one expert
    for _ in range(2):
        (parallel(x).square().sum() + engine.aux_loss()).backward()
        engine.after_backward()
        grads.append([expert.weight.grad.abs().sum().item() for expert in layer.experts.bank])
        engine.after_step()
        layer.zero_grad()
    said = ""
    from torch.distributed.algorithms.join import Join

    engine = Engine("topk,loss_free", experts=3)
    layer = engine.moe(6, 6, name="moe")
    parallel = DistributedDataParallel(layer)
    try:
        with Join([parallel]):
            for _ in range(2 + rank):
                (parallel(torch.randn(5, 6)).sum() + engine.aux_loss()).backward()
                engine.after_backward()
                engine.after_step()
    except RuntimeError as error:
        said = str(error)
    layer.eval()(torch.randn(7, 6))
    held = float(engine.state_dict()["layers"]["moe"]["evaluated"].sum())
    torch.save({"grads": grads, "said": said, "held": held}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_idle_experts_join_and_one_ranks_evaluation(tmp_path):
    """Modules without a token on a rank hold nobody up; Join is refused before anybody waits.

    A checkpoint holds nothing that only one rank has counted.
    """
    on_ranks(_idle_rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert all(size > 0 for step in found["grads"] for size in step)
        assert "can't train under torch.distributed.algorithms.Join" in found["said"]
        assert found["held"] == 0
