"""Claims about every plugin in a layer: what may change its results, and when its state may change."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..layer.moe import MoE
from ..layer.probing import output
from .bench import EXPERTS, MANY, Bench, Data, Tensors, Trial, data
from .claims import claim, demand
from .comparing import demand_close, demand_finite, distance, same_bits

LAYER_HOOKS = ("moe_router", "moe_bias", "moe_experts", "moe_state", "moe_aux_loss", "moe_measure")


@claim(*LAYER_HOOKS, "moe_metrics", "moe_growth", "moe_new_expert")
def builds(bench: Bench) -> None:
    """A layer with the plugin can be built, and every tensor is finite after a training step."""
    demand_finite(bench.trial().step(), "in an ordinary step", "look for divisions, logs and roots of 0")


@claim(*LAYER_HOOKS)
def inputs_are_not_modified(bench: Bench) -> None:
    """The plugin does not modify tokens, ids, labels or logits in place."""
    trial, batch = bench.trial(), data()
    with torch.no_grad():
        for training in (True, False):
            trial.layer.train(training)
            trial.forward(batch)
    for name, before, after in zip(("x", "ids", "labels"), _columns(data()), _columns(batch), strict=True):
        demand(same_bits(before, after), f"{name} was modified in place; write x * 2, not x *= 2")
    if not trial.layer.router.levels:
        return
    trial.layer.train()
    logits = [level.detach() for level in trial.logits(torch.randn)]
    originals = [level.clone() for level in logits]
    trial.set_logits(*logits)
    trial.forward(batch)
    unchanged = all(map(same_bits, originals, logits))
    demand(unchanged, "the raw logits were modified in place; write logits + b, not logits += b")


def _columns(batch: Data) -> tuple[Tensor, ...]:
    return batch.x, batch.ids, batch.labels


@claim(*LAYER_HOOKS)
def padding_changes_nothing(bench: Bench) -> None:
    """Neither the contents nor the amount of padding changes any result."""
    advice = "leave padding out of every sum over tokens: routing.mean(values), tokens.real(values), plan.selected"
    batch = data()
    mask = torch.arange(8).expand(3, 8) < torch.tensor([[8], [5], [0]])
    clean = attrs.evolve(batch, mask=mask)
    dirty = attrs.evolve(clean, x=batch.x.masked_fill(~mask[..., None], torch.nan), ids=batch.ids.masked_fill(~mask, 3))
    contents = f"between two batches that differ only in what padding contains; {advice}"
    demand_close(bench.trial().step(clean), bench.trial().step(dirty), contents, 1e-6)
    short, padded = data(1, 8).map(lambda v: v[:, :5]), attrs.evolve(data(1, 8), mask=mask[1:2])
    for when, build in _sizes_of_scores(bench):
        expected, found = eval_step(build(), short), eval_step(build(), padded)
        found["output"] = found["output"][:, :5]
        demand_close(expected, found, f"if three tokens of padding are added{when}; {advice}", 1e-4)


@claim(*LAYER_HOOKS)
def sequence_order_changes_nothing(bench: Bench) -> None:
    """Reordering the sequences of a batch reorders the outputs and changes nothing else."""
    batch, order = data(), torch.tensor([2, 0, 1])
    for when, build in _sizes_of_scores(bench):
        expected = eval_step(build(), batch)
        expected["output"] = expected["output"][order]
        message = f"if the sequences are reordered{when}; let nothing depend on a token's position in the batch"
        demand_close(expected, eval_step(build(), batch.map(lambda v: v[order])), message, 1e-4)


def _sizes_of_scores(bench: Bench) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Builders of the usual layer and, for a router, of layers whose scores are so close that it must be exact."""
    yield "", bench.trial
    if "moe_router" not in bench.plugin.hooks:
        return
    for experts in (EXPERTS, MANY):
        if not isinstance(bench.trial_or_refusal(experts=experts), str):
            yield f" with {experts} experts and tiny scores", partial(_with_tiny_scores, bench, experts)


def _with_tiny_scores(bench: Bench, experts: int) -> Trial:
    trial = bench.trial(experts=experts)
    with torch.no_grad():
        for parameter in trial.layer.router.parameters():
            parameter.mul_(1e-4)
    return trial


def eval_step(trial: Trial, batch: Data) -> Tensors:
    """The output, loss terms, sums and gradients of a step in eval mode, which has no noise."""
    layer = trial.layer.eval()
    y, routing = trial.forward(batch), trial.route(batch)
    terms = layer.aux_terms(routing)
    (batch.loss(y) + sum(terms.values(), torch.zeros(()))).backward()
    measured = layer.measure(routing)
    sums = {f"sum '{name}'": value.detach() for name, value in measured.items()}
    values = {f"loss '{name}'": value.detach() for name, value in terms.items()}
    return {"output": y.detach(), **values, **sums, **trial.gradients()}


@claim(*LAYER_HOOKS)
def layers_are_independent(bench: Bench) -> None:
    """A second layer of the same engine does not affect the first."""
    expected = _first_layer(bench.trial(), None)
    trial = bench.trial()
    found = _first_layer(trial, bench.second_layer(trial, experts=EXPERTS + 2))
    advice = "keep state in a Part of the layer (moe_state), not on the plugin or in a module"
    demand_close(expected, found, f"if the engine has a second layer; {advice}", 1e-4)


def _first_layer(trial: Trial, second: MoE | None) -> Tensors:
    """Two steps of the first layer next to a second one.

    Gradients and parameters are left out: they do change, because the auxiliary loss is a mean over layers.
    """
    recorded: Tensors = {}
    for number in range(2):
        if second is not None:
            second(*data(seed=9).arguments)
        tensors = trial.backward(data(), seed=number)
        trial.engine.after_step()
        tensors |= trial.controllers()
        recorded |= {
            f"{name} in step {number}": value for name, value in tensors.items() if not name.startswith("gradient of ")
        }
    return recorded


@claim("moe_router")
def layers_start_different(bench: Bench) -> None:
    """The routers of two layers start with different weights."""
    trial = bench.trial()
    second = bench.second_layer(trial).router
    for (name, first), other in zip(trial.layer.router.named_parameters(), second.parameters(), strict=True):
        constant = bool((other == other.flatten()[0]).all())  # such as zeros
        differ = constant or not same_bits(first, other)
        demand(differ, f"{name} is equal in two layers; draw it without seeding a generator yourself")


@claim(*LAYER_HOOKS)
def same_seed_gives_same_result(bench: Bench) -> None:
    """The same seed gives the same result, bit for bit."""
    advice = "draw only from torch's generators, when tensors are created or in a forward"
    first, second = bench.trial(), bench.trial()
    for number in range(2):
        message = f"between two runs with the same seed; {advice}"
        demand_close(first.step(seed=number), second.step(seed=number), message, 0)


@claim(*LAYER_HOOKS)
def recomputed_forward_counts_once(bench: Bench) -> None:
    """A forward recomputed under activation checkpointing counts once, and routes as it did the first time."""
    expected = bench.trial().step()
    for reentrant in (True, False):

        def recomputed(layer: Any, x: Tensor, *rest: Any, reentrant: bool = reentrant) -> Tensor:
            return output(checkpoint(layer, x.detach().requires_grad_(), *rest, use_reentrant=reentrant))

        message = f"if the forward is recomputed (use_reentrant={reentrant}); count only in measure() or moe_measure"
        demand_close(expected, bench.trial().step(call=recomputed), message)


@claim(*LAYER_HOOKS)
def recomputed_layers_keep_apart(bench: Bench) -> None:
    """Of two layers in a row that are recomputed under activation checkpointing, neither sees what the other kept."""
    gradients: list[Tensors] = []
    for recompute in (False, True):
        trial = bench.trial()
        layers = [trial.layer, bench.second_layer(trial)]
        h, carried = data().x.clone().requires_grad_(), None
        for layer in layers:
            arguments = (h, None, data().ids, data().labels, *([carried] if layer.carries else []))
            torch.default_generator.manual_seed(0)
            answer = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
            h, carried = answer if isinstance(answer, tuple) else (answer, None)
        (data().loss(h) + trial.engine.aux_loss()).backward()
        named = [(f"{at}.{name}", p) for at, layer in enumerate(layers) for name, p in layer.named_parameters()]
        gradients.append({f"gradient of {name}": p.grad for name, p in named if p.grad is not None})
    advice = "keep nothing on the plugin or in a module between layers; a router that passes values on declares carries"
    demand_close(gradients[0], gradients[1], f"if two layers are recomputed; {advice}", 1e-5)


@claim(*LAYER_HOOKS)
def only_after_step_changes_state(bench: Bench) -> None:
    """State changes only in after_step, never in a forward, a backward or a skipped step."""
    advice = "; change state only in after_step(step), and collect what it needs in measure()"
    trial = bench.trial()
    trial.step()
    before = trial.state()
    trial.backward(data())
    trial.demand_unchanged(before, f"between two steps{advice}")
    trial.engine.after_step(skipped=True)
    trial.demand_unchanged(before, f"in a skipped step{advice}")


@claim(*LAYER_HOOKS)
def eval_changes_no_state(bench: Bench) -> None:
    """Evaluation does not change the training state."""
    trial = bench.trial()
    trial.step()
    before = trial.state()
    trial.evaluate(data(seed=2))
    trial.demand_unchanged(before, "in evaluation; change state only in after_step(step)")


@claim(*LAYER_HOOKS)
def eval_is_deterministic(bench: Bench) -> None:
    """Evaluation draws no random numbers, and two evaluations agree."""
    advice = "draw noise only `if self.training`"
    trial = bench.trial()
    trial.layer.eval()
    with torch.no_grad():
        for parameter in trial.layer.router.parameters():
            parameter.mul_(8)  # a sharp gate shows what a flat one hides
        gap = distance(trial.forward(data(), seed=0), trial.forward(data(), seed=1))
        demand(not gap, f"the output for the same tokens depends on the seed; {advice}")
        before = torch.get_rng_state()
        trial.layer(*data().arguments)
        demand(same_bits(before, torch.get_rng_state()), f"random numbers were drawn; {advice}")


@claim(*LAYER_HOOKS)
def micro_batches_add_up(bench: Bench) -> None:
    """Two micro-batches change the state in the same way as one batch of both."""
    batch = data()
    whole, accumulated = bench.trial(), bench.trial()
    for trial, batches in ((whole, [batch.map(lambda v: torch.cat([v, v]))]), (accumulated, [batch, batch])):
        router = trial.layer.router.eval()  # noise would differ
        router.train = lambda mode=True, router=router: router  # type: ignore[method-assign, misc]
        trial.step(*batches)
    advice = "return sums over tokens, not means, from measure() and moe_measure; the core adds them up"
    message = f"between one batch and two micro-batches; {advice}"
    demand_close(whole.controllers(), accumulated.controllers(), message, 1e-3)
