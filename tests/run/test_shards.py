"""Checkpoints of several ranks: each writes what it holds of cut tensors, and any number of ranks reads them whole."""

import shutil

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe_engine import UsageError
from moe_engine.processes import full_tensor
from moe_engine.run.checkpoints import Checkpoints
from moe_engine.run.trees import cut_in, read_tree
from support import on_ranks

WHOLE = {
    "rows": torch.arange(21.0, dtype=torch.float64).view(7, 3),  # 4 and 3 of them
    "columns": torch.arange(10.0).view(2, 5),
    "one": torch.ones(1, 4),  # the second rank holds none
    "copies": torch.arange(3).to(torch.int32),
}
PLACES = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0), "copies": Replicate()}
PLAIN = torch.tensor([1.0, 2.0])


def _write(rank, folder, steps):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    kept = Checkpoints(folder)
    for step in steps:
        cut = {name: distribute_tensor(whole + step, mesh, [PLACES[name]]) for name, whole in WHOLE.items()}
        tree = {"loop": {"step": step}, "cut": cut, "list": [cut["rows"], PLAIN], "draws": torch.tensor(rank)}
        kept.write(step, tree)
        kept.write_best(tree)
    assert list(map(id, cut_in(tree))) == [*map(id, cut.values()), id(cut["rows"])]
    assert all(torch.equal(full_tensor(tensor), WHOLE[name] + step) for name, tensor in cut.items())
    torch.distributed.destroy_process_group()


def assert_holds(tree, step):
    for name, whole in WHOLE.items():
        assert torch.equal(tree["cut"][name], whole + step) and tree["cut"][name].dtype == whole.dtype
    assert torch.equal(tree["list"][0], WHOLE["rows"] + step) and torch.equal(tree["list"][1], PLAIN)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "step-00000007.shards").mkdir()  # of a save that was interrupted
    (folder / "step-00000007.shards" / "shard-00009-model-00001-of-00001.safetensors").write_text("half")
    on_ranks(_write, folder, [5, 6, 7])
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_one_process_reads_whole_tensors(folder):
    remarks = []
    assert_holds(Checkpoints(folder).newest(remarks.append), 7)
    assert_holds(read_tree(folder / "best.safetensors"), 7)
    assert not remarks


def test_each_rank_writes_its_part_and_the_last_two_steps_are_kept(folder):
    names = sorted(path.name for path in folder.glob("step-*"))
    assert names == [f"step-0000000{step}.{what}" for step in (6, 7) for what in ("rank-1", "safetensors", "shards")]
    parts = sorted((folder / "step-00000007.shards").iterdir())
    assert len(parts) == 2 and all(path.stat().st_size > 200 for path in parts)
    assert not any((folder / "best.shards").glob("*"))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("part", [0, 1])
def test_a_damaged_part_is_noticed_and_the_checkpoint_before_continues(folder, damage, part):
    damage(sorted((folder / "step-00000007.shards").iterdir())[part])
    with pytest.raises(UsageError, match="damaged") as error:
        read_tree(folder / "step-00000007.safetensors")
    assert error.value.code == "damaged-file"
    remarks = []
    assert_holds(Checkpoints(folder).newest(remarks.append), 6)
    assert "trying the one before" in remarks[0]


def test_a_folder_of_parts_that_is_gone_is_noticed(folder):
    shutil.rmtree(folder / "step-00000007.shards")
    with pytest.raises(UsageError, match="damaged"):
        read_tree(folder / "step-00000007.safetensors")
