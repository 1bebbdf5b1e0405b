"""Measuring a machine: on one process, and between several."""

import json

import torch

from moe_engine.plan.measuring import _slowest, measure
from moe_engine.plan.sizes import Model, Training
from support import on_ranks

MODEL = Model(layers=1, dim=16, hidden=16, experts=4, sequence=16)


def test_one_process_has_a_rate_and_no_connection():
    measured = measure(MODEL, Training(batch=1), torch.device("cpu"))
    assert measured.rate > 0 and measured[0] == 1 and measured[2:] == (None, None)


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    measured = measure(MODEL, Training(batch=1), torch.device("cpu"))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({**measured._asdict(), "slowest": _slowest(1.0 + rank, torch.device("cpu"))}, file)
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_same(tmp_path):
    """That of the slower one, and the connection; the group that there was is left."""
    on_ranks(_rank, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["ranks"] == 2
    assert first["slowest"] == 2.0
    assert min(first["rate"], first["bandwidth"], first["latency"]) > 0
