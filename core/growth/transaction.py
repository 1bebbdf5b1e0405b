"""Growth as a transaction: experts and their optimizer state change together or not at all.

Stage, then commit. Staging reads the live layer and creates new tensors; committing swaps pointers, and any failure
before the end swaps them back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..contract.growth import Grown, Growth, NewExpert, Order, Plan
from ..contract.parts import Axis, Part
from ..errors import UsageError, listed
from ..layer.moe import MoE
from ..optimizer_state import refuse_odd_state, reindex, staged_state
from ..seeds import random_state, set_random_state
from .merged import check_orders, mean_row, merged_row
from .plans import plans_of

Rows = dict[str, Tensor]  # one expert's rows, by "part.tensor"
Declared = tuple[str, Part, str, Axis]  # a tensor with an expert axis: "part.tensor", part, its name there, the axis

# Makes a new expert: from a population, a parent in it and the hook's arguments, (initializer's name, new expert).
Ask = Callable[[str, int | None, Mapping[str, Any]], tuple[str, NewExpert]]


@attrs.frozen
class Staged:
    """Everything that a commit replaces: tensors of parts, and optimizer states."""

    plans: Mapping[str, Plan]
    initializer: str | None
    tensors: Sequence[tuple[Part, str, Tensor]]
    states: Sequence[tuple[Optimizer, Tensor, dict[str, Any]]]


# -- staging -----------------------------------------------------------------------------------------


def stage(
    layer: MoE,
    copies: Sequence[MoE],
    growth: Growth,
    ask: Ask,
    generator: torch.Generator,
    optimizers: Sequence[Optimizer] = (),
) -> Staged:
    """Create everything that the growth needs; the live layer does not change. Raises UsageError.

    copies: layers that get the same new experts, for example in a weight average.
    """
    declared = list(_declared(layer))
    _refuse_unable(layer, declared)
    plans = plans_of(layer, growth)
    check_orders(growth, {where: (getattr(part, name), axis) for where, part, name, axis in declared})
    initializer = None
    born: dict[str, list[NewExpert]] = {}
    changed: dict[tuple[str, int], Rows] = {}  # (population, old position) -> rows of parents that change too
    for of, plan in plans.items():
        tensors_of = [(where, getattr(part, name), axis) for where, part, name, axis in declared if axis.of == of]
        weights = {where: (tensor, axis) for where, tensor, axis in tensors_of if axis.fresh is not None}
        if weights:
            initializer, born[of] = _new_experts(of, plan, growth, weights, changed, ask, generator)
    tensors = [
        (part, name, value)
        for target in (layer, *copies)
        for part, staged in _staged_parts(target, dict(layer.parts()), plans, born, changed, growth.orders)
        for name, value in staged.items()
    ]
    values = {id(getattr(part, name)): value for part, name, value in tensors}
    states = [
        state
        for optimizer in optimizers
        for state in _staged_states(optimizer, declared, plans, born, values, growth.orders)
    ]
    return Staged(plans, initializer, tensors, states)


def _staged_states(
    optimizer: Optimizer,
    declared: Sequence[Declared],
    plans: Mapping[str, Plan],
    born: Mapping[str, Sequence[NewExpert]],
    values: Mapping[int, Tensor],
    orders: Mapping[str, Order],
) -> Iterator[tuple[Optimizer, Tensor, dict[str, Any]]]:
    """An optimizer's state of each parameter that changes; values: the parameters' new ones by id."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(getattr(part, name)) in held for _, part, name, _ in declared):
        refuse_odd_state(optimizer)
    for where, part, name, axis in declared:
        parameter = getattr(part, name)
        if axis.of in plans and id(parameter) in held and optimizer.state.get(parameter):
            plan = plans[axis.of]
            how = {at: new.moments for at, new in zip(plan.added, born[axis.of], strict=True)}
            means = {
                at: partial(mean_row, axis=axis.axis, shares=shares, order=orders.get(where))
                for at, shares in plan.merged.items()
            }
            value, at = values[id(parameter)], axis.axis
            yield optimizer, parameter, staged_state(optimizer, where, parameter, value, at, plan.origins, how, means)


def _declared(layer: MoE) -> Iterator[Declared]:
    for where, part in layer.parts():
        for name, axis in part.axes.items():
            yield f"{where}.{name}", part, name, axis


def _refuse_unable(layer: MoE, declared: Iterable[Declared]) -> None:
    if not any(part is layer.experts for _, part, _, _ in declared):
        bank = type(layer.experts).__name__
        raise _unable(layer, f"its {bank} declares no expert axis; use stacked experts")
    if layer.sums.of_step() is not None:
        raise _unable(layer, "a step is not finished; call engine.after_step() first")
    for where, part, name, axis in declared:
        tensor = getattr(part, name)
        if parametrize.is_parametrized(part) or (axis.fresh is not None and not isinstance(tensor, nn.Parameter)):
            raise _unable(layer, f"{where} is parametrised or pruned; remove that first")
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_inference():
            kind = type(tensor).__name__
            raise _unable(layer, f"{where} is a {kind} that can't be resized (sharded, or an inference tensor)")
        if tensor.grad is not None:
            raise _unable(layer, f"{where} has a gradient; call optimizer.zero_grad() first, which must set it to None")
        if tensor.is_floating_point() and not bool(tensor.detach().sum(dtype=torch.float32).isfinite()):
            raise _unable(layer, f"{where} is not finite")


def _unable(layer: MoE, why: str) -> UsageError:
    return UsageError(f"layer '{layer.name}' can't grow: {why}", code="layer-cannot-grow")


def _new_experts(
    of: str,
    plan: Plan,
    growth: Growth,
    weights: Mapping[str, tuple[Tensor, Axis]],
    changed: dict[tuple[str, int], Rows],
    ask: Ask,
    generator: torch.Generator,
) -> tuple[str | None, list[NewExpert]]:
    """Ask the initializer for each new expert that is not merged, with copies of its parent's rows on the CPU."""
    initializer: str | None = None
    born = []
    roles = {where: axis.role for where, (_, axis) in weights.items()}
    for number, position in enumerate(plan.added):
        origin = plan.origins[position]
        fresh = {where: fresh_row(tensor, axis, generator) for where, (tensor, axis) in weights.items()}
        given = _given_rows(growth, fresh, number, len(plan.added))
        if position in plan.merged:
            born.append(NewExpert(given, moments="mean"))  # each layer and copy averages its own rows
            continue
        parent = None
        if origin is not None:  # as earlier new experts left it
            rows = {where: tensor.detach().select(axis.axis, origin) for where, (tensor, axis) in weights.items()}
            rows |= changed.get((of, origin), {})
            parent = {where: row.cpu().clone() for where, row in rows.items()}
        offer = {"parent": parent, "growth": growth, "index": position, "fresh": fresh, "roles": roles}
        initializer, new = ask(of, origin, {**offer, "generator": generator})
        new = attrs.evolve(new, values={**new.values, **given})
        check_rows(initializer, "", new.values, fresh, all_of_them=True)
        check_rows(initializer, " of the parent", new.parent_values, fresh if origin is not None else {})
        if origin is not None:
            changed.setdefault((of, origin), {}).update(new.parent_values)
        born.append(new)
    return initializer, born


def _given_rows(growth: Growth, fresh: Rows, number: int, count: int) -> Rows:
    """The rows that a growth gives to one of `count` new units. Raises UsageError for an odd shape or value."""
    rows = {}
    for where, given in growth.rows.items():
        if where not in fresh:  # of another population
            continue
        one, several = list(fresh[where].shape), [count, *fresh[where].shape]
        if list(given.shape) not in (one, several):
            why = f"rows '{where}' of the growth of '{growth.layer}' are of shape {list(given.shape)}"
            raise UsageError(f"{why}; they must be {several}, or {one} for all", code="bad-growth")
        row = (given if list(given.shape) == one else given[number]).detach().to("cpu", fresh[where].dtype)
        if not bool(row.isfinite().all()):
            raise UsageError(f"rows '{where}' of the growth of '{growth.layer}' are not finite", code="bad-growth")
        rows[where] = row
    return rows


def fresh_row(tensor: Tensor, axis: Axis, generator: torch.Generator) -> Tensor:
    """A newly drawn row of one unit, on the CPU."""
    shape = list(tensor.shape)
    shape[axis.axis] = 1
    assert axis.fresh is not None
    row: Tensor = axis.fresh(tuple(shape), generator=generator).select(axis.axis, 0)
    return row.detach().to("cpu", tensor.dtype)


def check_rows(
    initializer: str, whose: str, rows: Mapping[str, Tensor], fresh: Rows, all_of_them: bool = False
) -> None:
    """Raise UsageError for rows of an initializer that are none of `fresh`, or of another shape, or not finite."""
    problem = f"leaves out {listed(missing)}" if all_of_them and (missing := sorted(fresh.keys() - rows.keys())) else ""
    for where, row in rows.items():
        if where not in fresh:
            problem = f"returned a row{whose} '{where}', which is none of {listed(sorted(fresh))}"
        elif row.shape != fresh[where].shape:
            problem = f"returned a row{whose} '{where}' of shape {list(row.shape)}, not {list(fresh[where].shape)}"
        elif not bool(row.isfinite().all()):
            problem = f"returned a row{whose} '{where}' that is not finite"
        if problem:
            break
    if problem:
        raise UsageError(f"initializer '{initializer}' {problem}", code="bad-new-expert")


def _staged_parts(
    layer: MoE,
    originals: Mapping[str, Part],
    plans: Mapping[str, Plan],
    born: Mapping[str, Sequence[NewExpert]],
    changed: Mapping[tuple[str, int], Rows],
    orders: Mapping[str, Order],
) -> Iterator[tuple[Part, Rows]]:
    """Each part that changes, with its new tensors by name. originals: the parts of the live layer."""
    for where, part in layer.parts():
        staged = {}
        for name, axis in part.axes.items():
            if axis.of in plans or axis.values in plans:
                full, live = f"{where}.{name}", getattr(part, name).detach()
                news = [new.values.get(full) for new in born.get(axis.of, ())]
                staged[name] = _staged_tensor(full, live, axis, plans, news, orders.get(full))
        for (of, old), rows in changed.items():
            for name, axis in part.axes.items():
                if axis.of == of and f"{where}.{name}" in rows:
                    row = staged[name].select(axis.axis, plans[of].kept[old])
                    live = getattr(originals[where], name).detach().select(axis.axis, old)
                    new = rows[f"{where}.{name}"].to(row)
                    row.copy_(new if part is originals[where] else row + new - live)  # a copy's moves by as much
        if staged:
            part.adjust_rows(staged, plans)
            for name, axis in part.axes.items():
                if axis.values in plans and bool((staged[name] < 0).any()):
                    message = f"{where}.{name} still names a unit that is to be removed"
                    raise UsageError(message, code="bad-growth")
            yield part, staged


def _staged_tensor(
    where: str,
    tensor: Tensor,
    axis: Axis,
    plans: Mapping[str, Plan],
    news: Sequence[Tensor | None],
    order: Order | None,
) -> Tensor:
    plan = plans.get(axis.of)
    out = tensor.clone() if plan is None else reindex(tensor, axis.axis, plan.origins)
    for number, position in enumerate(plan.added if plan else ()):
        assert plan is not None
        row = news[number] if number < len(news) else None
        if row is None and axis.new == "parent" and position in plan.merged:
            row = merged_row(where, tensor, axis.axis, plan.merged[position], order)
        elif row is None and (axis.new != "parent" or plan.origins[position] is None):
            row = _new_row(where, tensor, axis)
        if row is not None:
            out.select(axis.axis, position).copy_(row)
    if axis.values is not None and axis.values in plans:
        out = _renamed(out, axis, plans[axis.values], plan)
    return out


def _new_row(where: str, tensor: Tensor, axis: Axis) -> Tensor:
    """A new unit's initial row in a buffer."""
    row = tensor.select(axis.axis, 0)
    if isinstance(axis.new, int | float):
        return torch.full_like(row, axis.new)
    if axis.new == "zero":
        return torch.zeros_like(row)
    if not tensor.is_floating_point():
        message = f"a new unit needs a parent, because {where} holds whole numbers, which have no mean"
        raise UsageError(message, code="growth-needs-parent")
    return tensor.mean(axis.axis)


def _renamed(out: Tensor, axis: Axis, named: Plan, plan: Plan | None) -> Tensor:
    """A tensor of unit indices, renumbered: of units merged away the merged one's, -1 for others that are removed."""
    names = named.heirs | named.kept
    new_name = torch.full((1 + max(max(names, default=0), int(out.max())),), -1, device=out.device)
    for old, new in names.items():
        new_name[old] = new
    out = new_name[out].to(out.dtype)
    for position, home in zip(plan.added, plan.homes, strict=True) if plan and plan.homes else ():
        out.select(axis.axis, position).fill_(home)
    return out


# -- commit or roll back -------------------------------------------------------------------------------


def commit(staged: Staged, layers: Iterable[MoE]) -> None:
    """Swap the pointers, and let the layers adopt their new sizes."""
    for part, name, value in staged.tensors:
        part.put(name, value)
    for optimizer, parameter, state in staged.states:
        optimizer.state[parameter] = state
    for layer in layers:
        layer.refit()


@contextmanager
def all_or_nothing(layers: Sequence[MoE], optimizers: Sequence[Optimizer], grown: list[Grown]) -> Iterator[None]:
    """Roll layers, optimizers and the growth log back, bit for bit, if the body raises; random states always."""
    put_back, before, draws = _pointers(layers, optimizers), list(grown), random_state()
    try:
        yield
        set_random_state(draws)
    except BaseException:
        set_random_state(draws)
        put_back()
        grown[:] = before
        raise


def _pointers(layers: Sequence[MoE], optimizers: Sequence[Optimizer]) -> Callable[[], None]:
    """Remember every pointer that a commit may change; returns a function that restores them."""
    tables = [
        (table, dict(table))
        for layer in layers
        for module in {*layer.modules(), *(part.holder(name)[0] for _, part, name, _ in _declared(layer))}
        for table in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    data = [(part, name, getattr(part, name).data) for layer in layers for _, part, name, _ in _declared(layer)]
    parameters = {parameter for layer in layers for parameter in layer.all_parameters()}
    states = [
        (optimizer.state, parameter, optimizer.state[parameter])
        for optimizer in optimizers
        for parameter in parameters
        if parameter in optimizer.state
    ]

    def put_back() -> None:
        for table, before in tables:
            table.clear()
            table.update(before)
        for part, name, value in data:
            tensor = getattr(part, name)
            if isinstance(tensor, nn.Parameter) and tensor.data_ptr() != value.data_ptr():
                part.put(name, value)
        for state, parameter, before in states:
            state[parameter] = before

    return put_back


def recorded(
    step: int,
    growth: Growth,
    staged: Staged,
    before: int,
    change: float | None,
    loss_before: float | None,
    loss_after: float | None,
) -> Grown:
    """The record of a growth that was committed."""
    plan = staged.plans["expert"]
    return Grown(
        step=step,
        layer=growth.layer,
        of=growth.of,
        before=before,
        after=len(plan.origins),
        rows=tuple(None if at in plan.added else old for at, old in enumerate(plan.origins)),
        parents=tuple(tuple(plan.merged[at]) if at in plan.merged else plan.origins[at] for at in plan.added),
        drop=tuple(sorted(set(range(before)) - plan.kept.keys())),
        initializer=staged.initializer,
        why=growth.why,
        change=change,
        loss_before=loss_before,
        loss_after=loss_after,
    )
