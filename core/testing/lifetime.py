"""Claims about a layer's life: saved and loaded, copied, grown, compiled; and what a step of it costs."""

import copy
import time
from typing import Any

import torch

from ..contract.growth import Growth
from ..errors import PluginError, UsageError
from ..processes import one_thread
from ..run.checkpoints import load, save
from .bench import Bench, data
from .claims import claim, demand
from .comparing import agree, distance, finite
from .layers import ACTING

DEAREST = 30.0  # times a step with the default plugins


@claim(*ACTING)
def state_survives_save_and_load(bench: Bench) -> None:
    """What was saved and loaded goes on bit for bit as if nothing had happened."""
    old, new = bench.rig(), bench.rig(seed=1)
    for number in range(2):
        old.step(seed=number)
    path = bench.folder / "state.safetensors"
    save(path, model=old.layer, optimizer=old.optimizer, engine=old.engine)
    load(path, model=new.layer, optimizer=new.optimizer, engine=new.engine)
    advice = "keep what matters in buffers and parameters of a Part, which are saved, not in attributes"
    agree(old.step(seed=5), new.step(seed=5), advice, 0)


@claim(*ACTING)
def copies_are_independent(bench: Bench) -> None:
    """A deep copy of a layer computes the same, and training one leaves the other alone."""
    rig, advice = bench.rig(), "share no tensor between layers"
    rig.step()
    twin = copy.deepcopy(rig)
    expected = rig.evaluate(data())
    same = not distance(expected, twin.evaluate(data()))
    demand(same, "a copy computes something else; copy all that it needs")
    before = twin.state()
    rig.step()
    twin.demand_still(before, f"with the original; {advice}")
    same = not distance(expected, twin.evaluate(data()))
    demand(same, f"a copy's output moved with the original; {advice}")


@claim(*ACTING, "moe_new_expert")
def experts_come_and_go(bench: Bench) -> str | None:
    """Experts are added, replaced and removed, and the layer trains on; or it is refused by a sentence."""
    rig, refused = bench.rig(), None
    router = rig.layer.router
    groups = [level.name for level in router.levels if router.unit_of_expert(level.name) is not None]
    changes: list[dict[str, Any]] = [
        {"parents": (0,)},
        {"parents": (1,), "drop": (2,)},
        {"parents": (None,)},
        {"drop": (0,)},
        *({"parents": (0,), "of": group} for group in groups),
    ]
    for change in changes:
        rig.step()
        rig.optimizer.zero_grad()
        size, what = rig.layer.spec.experts, ", ".join(f"{key}={value}" for key, value in change.items())
        probe = lambda: data().loss(rig.evaluate(data()))  # noqa: E731
        try:
            rig.engine.grow(Growth(rig.layer.name, **change), rig.optimizer, probe=probe)
        except PluginError:
            raise
        except UsageError as error:
            refused = f"refused: {error}"
            continue
        grown = len(change.get("parents", ())) - len(change.get("drop", ()))
        demand("of" in change or rig.layer.spec.experts == size + grown, f"growth of {what} left {size} experts")
        seen = rig.step()
        finite(seen, f"after growth of {what}", "read sizes off the tensors, never keep them")
        wide = seen["sum 'load'"].numel()
        demand(wide == rig.layer.spec.experts, f"after growth of {what} the load is of {wide} experts")
    return refused


@claim("moe_router", "moe_bias", "moe_aux_loss")
def compiles(bench: Bench) -> None:
    """torch.compile(fullgraph=True) takes a forward and a backward with it, and nothing changes."""
    rig, expected = bench.rig(), bench.rig().backward(data())
    torch._dynamo.reset()
    rig.layer.compile(fullgraph=True, backend="aot_eager")
    try:
        found = rig.backward(data())
    except torch._dynamo.exc.TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())
        demand(False, f"it can't be traced ({why}); read no number from a tensor, as int(x) and x.tolist() do")
    finally:
        torch._dynamo.reset()
    agree(expected, found, "between eager and compiled")


@claim(*ACTING)
def cost_is_bounded(bench: Bench) -> None:
    """A step costs at most thirty times the processor time of one of the same layer with the default plugins."""
    size: dict[str, Any] = {"dim": 64, "hidden": 64, "experts": 8}
    rigs, best = (bench.usual(**size), bench.rig(**size)), [float("inf")] * 2
    with one_thread():
        for _ in range(8):  # by turns; the shortest is what it takes
            for index, rig in enumerate(rigs):
                start = time.process_time()  # a clock on the wall counts what else the machine does
                rig.step(data(4, 64, dim=64))
                best[index] = min(best[index], time.process_time() - start)
            if best[1] < DEAREST / 2 * best[0]:
                return
    ratio = best[1] / best[0]
    demand(
        ratio <= DEAREST, f"it costs {ratio:.0f} times as much; work on all tokens at once, without a loop over them"
    )
