"""Routers of other people, written for one process: on two ranks without a line changed, in every layout."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_engine import Engine, adam
from moe_engine.parallel.parallelize import expert_mesh, parallelize
from moe_engine.processes import all_reduce_sum, full_tensor
from moe_engine.registry import discovery
from moe_engine.testing.plugin_under_test import plugin_under_test
from support import on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
STRANGERS = {  # file, class, its name and the plugins that it runs with
    "recurrent": ("recurrent_router.py", "Recurrent", "recurrent,saturation,switch_aux"),
    "cosine": ("moe-engine-demo/moe_engine_demo.py", "Cosine", "cosine,loss_free,z_loss,importance_cv2"),
}
LAYOUTS = {"data": (False, 1), "shard": (True, 1), "experts": (False, 2)}
STEPS = 4


def plugin_of(name):
    file, cls, _ = STRANGERS[name]
    spec = importlib.util.spec_from_file_location(f"stranger_{name}", EXAMPLES / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, cls)


class Blocks(nn.Module):
    """Two layers, the second of which gets what the first one's router passes on, if it does."""

    def __init__(self, engine):
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.moe = nn.ModuleList(engine.moe(6, 7) for _ in range(2))

    def forward(self, x):
        x, carried = self.enter(x), None
        for layer in self.moe:
            if layer.carries:
                y, carried = layer(x, carried=carried)
            else:
                y = layer(x)
            x = x + y
        return x


def trained(name, rank=0, ranks=1, spread=None):
    """(losses, weights and states, loads) of a few steps on this rank's part of each batch."""
    torch.manual_seed(rank)  # rank 0's weights are everyone's
    with discovery.pretend(plugin_under_test(plugin_of(name)).installed):
        engine = Engine(STRANGERS[name][2], experts=5, top_k=2)
        model = Blocks(engine).double()
        engine.attach(model)
    called = model if spread is None else parallelize(engine, model, expert_mesh(spread[1]), spread[0])
    optimizer, losses = adam(model, 0.01), []
    for step in range(STEPS):
        x = torch.randn(6, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x = x.split([4, 2])[rank] if ranks == 2 else x
        loss = (called(x) - x.roll(1, -1)).square().sum() / 108
        (loss * ranks + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        losses.append(all_reduce_sum(loss.detach()))
    weights = {key: full_tensor(value.detach()).clone() for key, value in model.state_dict().items()}
    return torch.stack(losses), weights, [layer.sums.take_since_log()["load"] for layer in engine.layers]


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    make = partial(trained, rank=rank, ranks=2)
    torch.save({(name, at): make(name, spread=LAYOUTS[at]) for name in STRANGERS for at in LAYOUTS}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by stranger and layout."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, str(folder))
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_router_written_for_one_process_runs_on_two_ranks(found, name):
    expected = trained(name)
    for rank in range(2):
        for layout in LAYOUTS:
            where = f"{name} | {layout} | rank {rank}: {{}}".format
            torch.testing.assert_close(found[rank][name, layout], expected, rtol=0, atol=1e-10, msg=where)
