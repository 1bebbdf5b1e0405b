"""Claims about several ranks: each trains on its part of every batch, next to one process that has the whole batch.

Everything is float64, gradients are averaged over the ranks as data parallelism does, and parts are uneven: every
second step leaves the last rank without a token. A plugin that draws random numbers is compared with them off.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.growth import Growth
from ..contract.options import options_of
from ..contract.stats import plain
from ..contract.traits import traits_of
from ..processes import all_reduce_sum, rank, world_size
from ..seeds import own_random_state
from .bench import EXPERTS, Bench, Data, Trial, data
from .biases import balanced, skewed
from .claims import Broken, NotApplicable, claim, demand
from .comparing import distance, same_bits
from .layers import LAYER_HOOKS
from .plugin_under_test import PluginUnderTest
from .rank_processes import rank_processes

STEPS, TRIGGER_STEPS = 4, 30
SEQUENCES = 3  # of a batch, for each rank
TOLERANCE = 1e-6
# options of triggers, by which they act within these steps, and not at each of them
SOONER = {"every": 9, "patience": 2, "cooldown": 4, "decay": 0.5, "max_experts": EXPERTS + 2}
ADVICE = {
    "moe_aux_loss": "let a loss read routing.load, .mean(...), .sum(...), .by_expert(...) and .total(...), which are "
    "of all ranks, or use sum_over_ranks(...)",
    "moe_growth": "decide by history, memory and states, which are the same on all ranks",
    "moe_bias": "return sums over tokens from measure(), which ranks add up, and read step.load and step.own",
    "moe_measure": "return sums over tokens from moe_measure, which are added up over ranks",
    "moe_router": "let a token's choice depend on that token alone, or use sum_over_ranks(...)",
}

Values = dict[str, Any]  # tensors and growths by name, in the order in which they came to be
Split = Callable[[Data, int], list[Data]]  # (batch, step) -> the micro-batches of one process


@attrs.frozen(eq=False)
class Trainings:
    """What each rank found, and what one process did. drawn: with the router's and the experts' noise."""

    drawn: list[Values]
    quiet: list[Values]
    alone: Values
    per_rank: bool


def trainings(bench: Bench) -> Trainings:
    """Train on all ranks and in one process, once for the claims that read it."""
    plugin = bench.plugin
    if isinstance(plugin.trainings, Broken):
        raise NotApplicable("training on several ranks failed")
    if plugin.trainings is None:
        ranks, trial = plugin.ranks, bench.trial()
        per_rank = any(traits_of(one).per_rank for one in trial.engine.plugins.active.values())

        def split(batch: Data, step: int) -> list[Data]:
            return parts(batch, step, ranks) if per_rank else [batch]

        torch.default_generator.manual_seed(0)
        fresh = torch.get_rng_state()
        trial.forward(data(), seed=0)
        noisy = not same_bits(fresh, torch.get_rng_state())
        alone = trained(bench, split, ranks, quiet=noisy)
        processes = rank_processes(ranks)
        try:
            drawn = processes.call(on_this_rank, plugin, False)
            quiet = processes.call(on_this_rank, plugin, True) if noisy else drawn
        except Broken as failure:
            plugin.trainings = failure
            raise
        plugin.trainings = Trainings(drawn, quiet, alone, per_rank)
    found: Trainings = plugin.trainings
    return found


def on_this_rank(plugin: PluginUnderTest, quiet: bool) -> Values:
    """Train on this rank's parts, with its own draws."""
    at, ranks = rank(), world_size()

    def own(batch: Data, step: int) -> list[Data]:
        return [parts(batch, step, ranks)[at]]

    with plugin.present(), own_random_state(0), warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        return trained(Bench(plugin, Path(folder)), own, ranks, at, quiet)


def parts(batch: Data, step: int, ranks: int) -> list[Data]:
    """Each rank's sequences of a batch."""
    some = (SEQUENCES + 1, SEQUENCES - 1) if step % 2 == 0 else (2 * SEQUENCES, 0)
    sizes = [some[0], *[SEQUENCES] * (ranks - 2), some[1]]
    starts = [sum(sizes[:index]) for index in range(ranks)]
    return [
        batch.map(lambda values, cut=slice(start, start + size): values[cut])  # type: ignore[misc]
        for start, size in zip(starts, sizes, strict=True)
    ]


# -- training ----------------------------------------------------------------------------------------------


def trained(bench: Bench, split: Split, ranks: int, seed: int = 0, quiet: bool = False) -> Values:
    """Loss terms, metrics, task losses, growths, weights and states of a few steps."""
    torch.default_generator.manual_seed(0)
    trial, hooks = bench.trial(options=_options(bench)), bench.plugin.hooks
    trial.layer.double()
    for module in (trial.layer.router, trial.layer.experts) if quiet else ():
        module.eval().train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    steps = TRIGGER_STEPS if "moe_growth" in hooks else STEPS
    values: Values = {}
    for step in range(steps):
        batch = _batch(step, ranks)
        logits = _logits(trial, batch, step) if "moe_growth" in hooks else []
        loss = _step(trial, split(batch, step), batch, 1000 * seed + step, logits, _before(batch, step))
        values[f"the task loss in step {step}"] = loss
        growths = trial.engine.due(float(loss), float(loss) if step % 10 == 0 else None)
        if step == 1 and "moe_new_expert" in hooks:
            growths = [Growth(trial.layer.name, parents=(0,))]
        values[f"growth after step {step}"] = [_comparable(growth) for growth in growths]
        if not _all_want(growths):
            return values  # those that want it would wait for the others
        for growth in growths:
            trial.optimizer.zero_grad()
            trial.engine.grow(growth, trial.optimizer)
    return {**_measured(trial, split, steps, ranks), **values, **trial.state()}


def _options(bench: Bench) -> dict[str, Any]:
    """A loss counts fully, and a trigger acts soon, unless its options are set."""
    cls, given = bench.plugin.cls, bench.plugin.settings.get(bench.plugin.name, {})
    wanted = {**({"weight": 1.0} if "moe_aux_loss" in bench.plugin.hooks else {})}
    wanted |= SOONER if "moe_growth" in bench.plugin.hooks else {}
    return {name: value for name, value in wanted.items() if name in options_of(cls) and name not in given}


def _batch(step: int, ranks: int) -> Data:
    """The whole batch of a step; from the third on, sequences end with padding."""
    batch = data(SEQUENCES * ranks, 8, seed=100 + step).to(torch.float64)
    lengths = torch.arange(SEQUENCES * ranks)[:, None] % 3 + 6
    return attrs.evolve(batch, mask=(torch.arange(8) < lengths) | (step < 2))


def _logits(trial: Trial, batch: Data, step: int) -> list[Tensor]:
    """Logits that make triggers act: even ones, then ones that prefer few units, others at the end, then equal ones."""

    def uneven(tokens: int, units: int) -> Tensor:
        return torch.where(
            torch.arange(tokens)[:, None] < 0.7 * tokens, skewed(tokens, units), skewed(tokens, units).flip(1)
        )

    make = (balanced, uneven, torch.zeros)[3 * step // TRIGGER_STEPS]
    return [make(batch.labels.numel(), level.size).double() for level in trial.layer.router.levels]


def _before(batch: Data, step: int) -> int:
    """The number of tokens that the ranks before this one have of a batch."""
    return sum(one.labels.numel() for one in parts(batch, step, world_size())[: rank()]) if world_size() > 1 else 0


def _step(
    trial: Trial, batches: Sequence[Data], batch: Data, seed: int, logits: Sequence[Tensor], start: int
) -> Tensor:
    """One step in micro-batches; returns the task loss, the mean over the real tokens of all ranks.

    logits: instead of the router's, of the whole batch, from whose token `start` on these are.
    """
    trial.layer.train()
    trial.optimizer.zero_grad()
    total, task = batch.mask.sum(), torch.zeros((), dtype=torch.float64)  # type: ignore[union-attr]
    for number, one in enumerate(batches):
        if logits:
            cut = slice(start, start := start + one.labels.numel())
            trial.set_logits(*(level[cut].clone().requires_grad_() for level in logits))
        error = (trial.forward(one, seed + number) - one.target).square().sum(-1)
        loss = torch.where(one.mask, error, 0).sum() / total  # type: ignore[arg-type]
        (loss * world_size() + trial.engine.aux_loss() / len(batches)).backward()
        trial.engine.after_backward()
        task += loss.detach()
    trial.reset_logits()
    _average_gradients(trial)
    trial.optimizer.step()
    trial.engine.after_step()
    return all_reduce_sum(task)


def _average_gradients(trial: Trial) -> None:
    """The mean over ranks, as data parallelism takes it."""
    named = list(trial.layer.named_parameters())
    if world_size() == 1 or not named:
        return
    having = all_reduce_sum(torch.tensor([float(parameter.grad is not None) for _, parameter in named]))
    message = "gets a gradient on some ranks and none on others; let it take part in every forward"
    for (name, _), ranks in zip(named, having.tolist(), strict=True):
        demand(ranks in (0, world_size()), f"{name} {message}, as values + 0 * parameter.sum() does")
    gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
    mean = all_reduce_sum(torch.cat([one.flatten() for one in gradients] or [torch.zeros(0)])) / world_size()
    for one, total in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
        one.copy_(total.view_as(one))


def _all_want(growths: Sequence[Growth]) -> bool:
    """Whether all ranks want the same."""
    if world_size() == 1:
        return True
    wanted: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(wanted, [_comparable(growth) for growth in growths])
    return all(one == wanted[0] for one in wanted)


def _comparable(growth: Growth) -> Any:
    """A growth as plain data, without what may differ in the last bit."""
    return plain(attrs.asdict(growth, filter=lambda field, _: field.name not in ("why", "rows", "shares", "orders")))


def _measured(trial: Trial, split: Split, step: int, ranks: int) -> Values:
    """The loss terms and metrics of both splits. Evaluation is in the parts of the ranks."""
    probe = data(2, 8, seed=9).to(torch.float64)
    with torch.no_grad():
        for one in split(_batch(step, ranks), step) if world_size() > 1 else parts(_batch(step, ranks), step, ranks):
            trial.evaluate(one)
    values: Values = {}
    for name in ("train", "eval"):
        torch.default_generator.manual_seed(0)
        metrics = trial.engine.metrics(name, lambda: probe.loss(trial.evaluate(probe)))
        for key, value in metrics.get(trial.layer.name, {}).items():
            words = f"loss '{key.removeprefix('loss.')}'" if key.startswith("loss.") else f"metric '{key}'"
            values[f"{words} in {name}"] = plain(value)
    return values


# -- claims ------------------------------------------------------------------------------------------------


def difference(expected: Values, found: Values) -> str | None:
    """What differs first, in words; None if nothing does."""
    for name in (name for name in expected if name in found):
        first, second = expected[name], found[name]
        if isinstance(first, dict):  # a finding: its reason is text
            first, second = (
                (one["name"], one["severity"]) if isinstance(one, dict) else one for one in (first, second)
            )
        before, now = _numbers(first), _numbers(second)
        if before is None or now is None:
            if first != second:
                return f"{name} is {second or 'nothing'}, not {first or 'nothing'},"
        elif before.shape != now.shape:
            return f"{name} is {list(now.shape)}, not {list(before.shape)},"
        elif (gap := distance(before, now)) > TOLERANCE:
            return f"{name} differs by {gap:.2g}"
    only = sorted(expected.keys() ^ found.keys())
    return f"{only[0]} is there once only" if only else None


def _numbers(value: Any) -> Tensor | None:
    """A value as a tensor, None in it as nan; None if it is not made of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(_with_nan(value), dtype=torch.float64)
    except (TypeError, ValueError):
        return None


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return float("nan") if value is None else value


HOOKS = (*LAYER_HOOKS, "moe_metrics", "moe_growth", "moe_new_expert")


@claim(*HOOKS, on_ranks=True)
def ranks_agree(bench: Bench) -> None:
    """Ranks that train on parts of each batch have equal weights, states and metrics, and want the same growth."""
    first, *others = trainings(bench).drawn
    for at, other in enumerate(others, 1):
        found = difference(first, other)
        demand(found is None, f"{found} between rank 0 and rank {at}; {_advice(bench)}")


@claim(*HOOKS, on_ranks=True)
def ranks_equal_one_process(bench: Bench) -> str | None:
    """Ranks with parts of a batch compute what one process does with the batch; if `per_rank`, with micro-batches."""
    found = trainings(bench)
    if found.per_rank and "moe_aux_loss" in bench.plugin.hooks:
        raise NotApplicable("no process has the loss of one rank's tokens, as Traits(per_rank=True) declares it")
    whole = "whose micro-batches are the ranks' parts" if found.per_rank else "with the whole batch"
    design = "; or declare Traits(per_rank=True), if it works on each rank's tokens alone by design"
    for values in found.quiet:
        gap = difference(found.alone, values)
        ranks = f"between {len(found.quiet)} ranks and one process {whole}"
        demand(gap is None, f"{gap} {ranks}; {_advice(bench)}{'' if found.per_rank else design}")
    return "compared with micro-batches, because it declares per_rank" if found.per_rank else None


def _advice(bench: Bench) -> str:
    several = [advice for hook, advice in ADVICE.items() if hook in bench.plugin.hooks]
    return several[0] if several else "add up over ranks what each computes from its tokens: sum_over_ranks(...)"
