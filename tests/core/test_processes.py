"""What several processes agree on; alone, each of them is what it was given."""

import pytest
import torch

from moe_engine import RunError
from moe_engine.processes import agreed, all_reduce_sum, sum_over_ranks, threads
from support import on_ranks


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.tensor([1.0 + rank], requires_grad=True)
    total = sum_over_ranks(x)
    total.square().sum().backward()
    outcomes = []
    for what, fails in (("same", False), ("same", rank == 0), (f"of {rank}", False)):
        try:
            with agreed(what, torch.device("cpu")):
                if fails:
                    raise LookupError("alone")
            outcomes.append("done")
        except (RunError, LookupError) as error:
            outcomes.append(type(error).__name__)
    torch.save([total.detach(), x.grad, all_reduce_sum(torch.tensor([1.0 + rank])), outcomes], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_share_sums_means_and_failures(tmp_path):
    on_ranks(_process, str(tmp_path))
    for rank, failed in enumerate(("LookupError", "RunError")):
        total, grad, plain, outcomes = torch.load(tmp_path / str(rank), weights_only=True)
        assert (float(total), float(grad), float(plain)) == (3.0, 12.0, 3.0)  # 2 d total^2 / d own part
        assert outcomes == ["done", failed, "RunError"]


def test_one_process_keeps_its_values_and_errors():
    x = torch.tensor([2.0])
    assert sum_over_ranks(x) is x and float(all_reduce_sum(x)) == 2
    with pytest.raises(LookupError, match="mine"), agreed("this", torch.device("cpu")):
        raise LookupError("mine")


def test_the_number_of_threads_is_restored_also_after_an_error():
    torch.set_num_threads(2)
    with pytest.raises(LookupError), threads(1):
        assert torch.get_num_threads() == 1
        raise LookupError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
