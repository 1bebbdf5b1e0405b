"""The kit on two ranks: every strategy in one pair of processes, and what becomes of processes that fail."""

import attrs
import pytest
import torch
from test_builtins import BUILTIN

from moe_engine import Traits, hookimpl
from moe_engine.cli import main
from moe_engine.contract.traits import traits_of
from moe_engine.plugins.routers.sinkhorn import Sinkhorn
from moe_engine.processes import all_reduce_sum, rank
from moe_engine.registry import discovery
from moe_engine.testing import Broken, checks, rank_processes, results
from moe_engine.testing.rank_processes import rank_processes as processes_of

ACTING = ("router", "bias", "loss", "metric", "experts", "initializer", "growth")
NAMES = [name for kind in ACTING for name in sorted(BUILTIN) if BUILTIN[name] == kind]
QUICK = {"topk", "hierarchical", "top_p", "soft", "saturation", "loss_free", "switch_aux", "global_aux", "sequence_aux"}
PER_RANK = {"expert_choice", "sinkhorn", "quantile", "output_similarity"}
LONG = {name for name in NAMES if BUILTIN[name] in ("metric", "experts", "initializer", "growth")}
LONG -= {"health", "zero_computation", "clone", "dead_replace"}  # one of each kind
LONG |= {name for name in NAMES if BUILTIN[name] in ("router", "bias", "loss")} - PER_RANK - QUICK


def on_two(plugin, settings=()):
    """The outcome of each claim about ranks."""
    found = results(check for check in checks(plugin, settings, ranks=2) if check.claim.on_ranks)
    return {one.claim.name: one for one in found}


@pytest.mark.parametrize(
    "names", [[name for name in NAMES if name not in LONG], pytest.param(sorted(LONG), marks=pytest.mark.long)], ids=len
)
def test_ranks_compute_what_one_process_does(names):
    failed = [one.why for name in names for one in on_two(name).values() if one.outcome == "FAILED"]
    assert failed == []


def test_the_strategies_that_are_per_rank_say_so():
    assert {name for name in NAMES if traits_of(discovery.load(discovery.find()[name][0])).per_rank} == PER_RANK


@attrs.define(eq=False)
class Undeclared(Sinkhorn):
    """Ranks tokens against each other."""

    traits = Traits(provides=("logits", "probs", "top_k", "choices"))


def test_a_router_that_hides_that_it_is_per_rank_is_caught():
    found = on_two(Undeclared)
    assert found["ranks_agree"].outcome == "ok"
    assert "or declare Traits(per_rank=True)" in found["ranks_equal_one_process"].why
    assert "2 ranks and one process with the whole batch" in found["ranks_equal_one_process"].why


def test_one_rank_starts_no_process(monkeypatch):
    monkeypatch.setattr("moe_engine.testing.ranks.rank_processes", None)
    assert not any(check.claim.on_ranks for check in checks("topk"))
    assert sum(check.claim.on_ranks for check in checks("topk", ranks=2)) == 2


def test_a_class_that_no_process_can_import_is_named():
    @attrs.define(eq=False)
    class Hidden:
        @hookimpl
        def moe_measure(self, routing):
            return {"tokens": routing.tokens.count.view(1)}

        @hookimpl
        def moe_metrics(self, stats):
            return {"seen": stats["hidden.tokens"]}

    assert "define the plugin at the top of a module" in on_two(Hidden)["ranks_agree"].why


def test_the_command_checks_ranks(monkeypatch, capsys):
    wanted = [check.claim for check in checks("topk", ranks=2) if check.claim.on_ranks or check.claim.name == "builds"]
    monkeypatch.setattr("moe_engine.testing.checking.CLAIMS", wanted)
    assert main(["check", "sinkhorn", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "(compared with micro-batches, because it declares per_rank)" in out
    assert out.splitlines()[-1] == "3 claims: 3 ok, 0 failed, 0 skipped"


@pytest.mark.parametrize(
    ("name", "words"), [("sinkhorn", "per rank: works on"), ("topk", "global: with several ranks")]
)
def test_a_plugin_shows_what_it_sees_of_several_ranks(name, words, capsys):
    assert main(["plugins", name]) == 0
    assert words in capsys.readouterr().out


def raises():
    if rank() == 1:
        raise ValueError("no")
    all_reduce_sum(torch.ones(1))


def waits():
    if rank() == 0:
        all_reduce_sum(torch.ones(1))


def test_a_rank_that_fails_or_waits_ends_all(monkeypatch):
    """Others would wait for it; the next call has new processes."""
    with pytest.raises(Broken, match="it raises ValueError: no, on rank 1 of 2"):
        processes_of(2).call(raises)
    assert processes_of(2).call(rank) == [0, 1]
    monkeypatch.setattr(rank_processes, "PATIENCE", 1.0)
    with pytest.raises(Broken, match="ranks wait for each other"):
        processes_of(2).call(waits)
