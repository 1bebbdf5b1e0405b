"""Claims about saving, copying, growing and compiling a layer, and the cost of a step."""

import copy
import time
from typing import Any

import torch

from ..contract.growth import Growth
from ..errors import PluginError, UsageError
from ..processes import threads
from ..run.checkpoints import load, save
from .bench import Bench, Trial, data
from .claims import claim, demand
from .comparing import demand_close, demand_finite, distance
from .layers import LAYER_HOOKS

MAX_SLOWDOWN = 30.0  # over a step with the default plugins


@claim(*LAYER_HOOKS)
def state_survives_save_and_load(bench: Bench) -> None:
    """After saving and loading, training continues with bit-identical results."""
    saved, loaded = bench.trial(), bench.trial(seed=1)
    for number in range(2):
        saved.step(seed=number)
    path = bench.folder / "state.safetensors"
    save(path, model=saved.layer, optimizer=saved.optimizer, engine=saved.engine)
    load(path, model=loaded.layer, optimizer=loaded.optimizer, engine=loaded.engine)
    advice = "keep state in buffers and parameters of a Part, which are saved, not in attributes"
    demand_close(saved.step(seed=5), loaded.step(seed=5), f"after saving and loading; {advice}", 0)


@claim(*LAYER_HOOKS)
def copies_are_independent(bench: Bench) -> None:
    """A deep copy of a layer computes the same, and training the original does not change the copy."""
    trial, advice = bench.trial(), "share no tensor between layers"
    trial.step()
    twin = copy.deepcopy(trial)
    expected = trial.evaluate(data())
    same = not distance(expected, twin.evaluate(data()))
    demand(same, "a copy computes something else; keep everything that it needs in tensors of the layer")
    before = twin.state()
    trial.step()
    twin.demand_unchanged(before, f"in the copy when the original was trained; {advice}")
    same = not distance(expected, twin.evaluate(data()))
    demand(same, f"a copy's output changed when the original was trained; {advice}")


@claim(*LAYER_HOOKS, "moe_new_expert")
def experts_can_be_added_and_removed(bench: Bench) -> str | None:
    """Experts can be added, replaced and removed, and training continues; or the growth is refused with a sentence."""
    trial, refused = bench.trial(), None
    router = trial.layer.router
    groups = [level.name for level in router.levels if router.unit_of_expert(level.name) is not None]
    changes: list[dict[str, Any]] = [
        {"parents": (0,)},
        {"parents": (1,), "drop": (2,)},
        {"parents": (None,)},
        {"drop": (0,)},
        *({"parents": (0,), "of": group} for group in groups),
    ]
    for change in changes:
        trial.step()
        trial.optimizer.zero_grad()
        size = trial.layer.spec.experts
        probe = lambda: data().loss(trial.evaluate(data()))  # noqa: E731
        try:
            trial.engine.grow(Growth(trial.layer.name, **change), trial.optimizer, probe=probe)
        except PluginError:
            raise
        except UsageError as error:
            refused = f"refused: {error}"
        else:
            _demand_grown(trial, change, size)
    return refused


def _demand_grown(trial: Trial, change: dict[str, Any], size: int) -> None:
    """Demand the right number of experts, given `size` before, and a finite step with them."""
    growth = ", ".join(f"{key}={value}" for key, value in change.items())
    expected = size + len(change.get("parents", ())) - len(change.get("drop", ()))
    now = trial.layer.spec.experts
    demand("of" in change or now == expected, f"growth with {growth} left {now} experts, not {expected}")
    tensors = trial.step()
    demand_finite(tensors, f"after growth with {growth}", "read sizes from the tensors, never store them")
    width = tensors["sum 'load'"].numel()
    demand(width == now, f"after growth with {growth} the load has {width} entries for {now} experts")


@claim("moe_router", "moe_bias", "moe_aux_loss")
def compiles(bench: Bench) -> None:
    """torch.compile(fullgraph=True) compiles forward and backward without changing results."""
    trial, expected = bench.trial(), bench.trial().backward(data())
    torch._dynamo.reset()
    trial.layer.compile(fullgraph=True, backend="aot_eager")
    try:
        found = trial.backward(data())
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        demand(False, f"it can't be traced ({reason}); read no number from a tensor, as int(x) and x.tolist() do")
    finally:
        torch._dynamo.reset()
    demand_close(expected, found, "between eager and compiled")


@claim(*LAYER_HOOKS)
def cost_is_bounded(bench: Bench) -> None:
    """A step takes at most thirty times the CPU time of the same step with the default plugins."""
    size: dict[str, Any] = {"dim": 64, "hidden": 64, "experts": 8}
    trials, best = (bench.default_trial(**size), bench.trial(**size)), [float("inf")] * 2
    with threads(1):
        for _ in range(8):  # alternate; the shortest time counts
            for index, trial in enumerate(trials):
                start = time.process_time()  # unlike wall time, it excludes other work on the machine
                trial.step(data(4, 64, dim=64))
                best[index] = min(best[index], time.process_time() - start)
            if best[1] < MAX_SLOWDOWN / 2 * best[0]:
                return
    ratio = best[1] / best[0]
    demand(ratio <= MAX_SLOWDOWN, f"a step takes {ratio:.0f} times as long; process all tokens at once, without a loop")
