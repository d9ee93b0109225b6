"""Losses and gradients of pairs of equal structure at once, by one graph.

Each is traced alone. Where all traces are the same but for their tensors, ``torch.func.vmap`` over
these makes each product a batched one; draws are made outside, each member's by its own generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functionalize, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.compile.compiled import CompiledGradients, Kept, Outcome, in_own_memory
from ppvae.compile.graph import Graph, unmoved
from ppvae.pairs import NotCompiled

Draw = Callable[[Tensor, torch.Generator], Any]


class Rows:
    """Tensors of several members as rows of one, of which they are views until it is given back.

    Example:
        >>> first, second, rows = torch.zeros(2), torch.ones(2), Rows()
        >>> both = rows.of([first, second])
        >>> _ = first.add_(3)
        >>> both
        tensor([[3., 3.],
                [1., 1.]])
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    @torch.no_grad()
    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor ``(S, ...)`` whose rows these are, laid out as each of them is."""
        key = tuple(map(id, tensors))
        if key not in self._stacks:
            rows = empty_rows(len(tensors), tensors[0])
            for row, tensor in zip(rows, tensors, strict=True):
                tensor.data = row.copy_(tensor)
            self._stacks[key] = tensors, rows
        return self._stacks[key][1]

    def give_back(self) -> None:
        """Let each tensor have memory of its own again."""
        for tensors, _ in self._stacks.values():
            for tensor in tensors:
                tensor.data = tensor.data.clone()
        self._stacks.clear()


def empty_rows(number: int, like: Tensor) -> Tensor:
    """Zeros ``(S, ...)``, each row laid out as a tensor."""
    rows = torch.empty_strided(
        (number, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype, device=like.device
    )
    return rows.zero_()


class StackedGradients:
    """The losses of objectives of equal structure, with their gradients, by one graph.

    Args:
        objectives: S modules whose ``forward(*batch)`` is a loss.
        batches: a batch for each, of equal shapes; the graph is for these.
        rows: has the parameters, buffers and other tensors of all.
        compiles: compile the graph; False: leave it to Python.

    Attributes:
        parameters: of each, those that have gradients.
        buffers: tensors ``(S, ...)``, on which the graph may write.

    Raises:
        NotCompiled: the structures are not equal, a draw's number of random bits depends on a
            value, no graph can be built, or it gives other numbers than each alone.
    """

    def __init__(
        self,
        objectives: Sequence[nn.Module],
        batches: Sequence[tuple[Tensor, ...]],
        rows: Rows,
        compiles: bool,
    ) -> None:
        self.members = [
            CompiledGradients(objective, batch, {}, _nothing, compiles=False)
            for objective, batch in zip(objectives, batches, strict=True)
        ]
        first, size = self.members[0], len(objectives)
        self.parameters = [
            [p for p, used in zip(m.parameters, m.used, strict=True) if used] for m in self.members
        ]
        of_each = [[*m.inputs, *m.graph.reached] for m in self.members]
        _require_equal(self.members, of_each)
        traced = copy.deepcopy(first.graph.traced)
        self._draws = _lift_draws(traced, size)
        of_first = [t.detach() for t in (*first.inputs, *batches[0], *first.graph.reached)]
        drawn = [rows[0] for rows, _ in self._draws]
        traced = _without_writing(traced, [*of_first, *drawn])
        together = list(zip(*of_each, strict=True))
        shared = [all(t is tensors[0] for t in tensors) for tensors in together]
        held = [t[0] if is_one else rows.of(t) for t, is_one in zip(together, shared, strict=True)]
        self._inputs, self._reached = held[: len(first.inputs)], held[len(first.inputs) :]
        number = len(first.inputs)
        of_inputs = zip(self._inputs, shared, strict=False)
        self.buffers = [t for t, is_one in [*of_inputs][len(first.parameters) :] if not is_one]
        dims = [None if is_one else 0 for is_one in shared]
        args = len(batches[0])
        in_dims = (*dims[:number], *[0] * args, *dims[number:], *[0] * len(self._draws))
        alone = vmap(traced, in_dims)
        like = [p for p, used in zip(self._inputs, first.used, strict=False) if used]

        def losses_and_gradients(*inputs: Tensor) -> list[Tensor]:
            losses, norms, *outputs = alone(*inputs)
            taken = {tensor.untyped_storage()._cdata for tensor in inputs}
            gradients = [
                in_own_memory(gradient, parameter, taken)
                for gradient, parameter in zip(outputs, like, strict=False)
            ]
            return [losses, norms, *gradients, *outputs[len(like) :]]

        self.graph = Graph(losses_and_gradients, self._given(batches), compiles=compiles)
        self._compare(batches)

    def _given(self, batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        args = map(torch.stack, zip(*batches, strict=True))
        return [*self._inputs, *args, *self._reached, *(rows for rows, _ in self._draws)]

    def __call__(
        self,
        batches: Sequence[tuple[Tensor, ...]],
        generators: Sequence[torch.Generator],
        active: Collection[int],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Losses and norms ``(S,)``, and the gradients by :attr:`parameters`, ``(S, ...)`` each.

        Of members that are not active nothing is drawn or counted, but the graph writes on their
        buffers.
        """
        for rows, draw in self._draws:
            for s in active:
                draw(rows[s], generators[s])
        for s in active:
            self.members[s].advance()
        losses, norms, *outputs = self.graph(*self._given(batches))
        gradients, weights = outputs[: len(self.parameters[0])], outputs[len(self.parameters[0]) :]
        for s in active if weights else ():
            shown = zip(self.members[s].shown, weights, strict=True)
            self.members[s].state.shown.update({column: weight[s] for column, weight in shown})
        return losses, norms, gradients

    def give(self, gradients: Sequence[Tensor], s: int) -> None:
        """Let the parameters of a member have their gradients."""
        for parameter in self.members[s].parameters:
            parameter.grad = None
        for parameter, gradient in zip(self.parameters[s], gradients, strict=True):
            parameter.grad = gradient[s]

    def _compare(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        """Compare with each alone at the same draws."""
        expected = [m.eager(batch, {}) for m, batch in zip(self.members, batches, strict=True)]
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(unmoved(member.objective))
            kept = [Kept(member.objective) for member in self.members]
            devices = [parameters[0].device for parameters in self.parameters]
            generators = [torch.Generator(device).manual_seed(0) for device in devices]
            losses, _, gradients = self(batches, generators, range(len(self.members)))
            for s in range(len(self.members)):
                self.give(gradients, s)
            found = [
                Outcome([loss, *(p.grad for p in member.parameters)], before.changes())
                for loss, member, before in zip(losses, self.members, kept, strict=True)
            ]
        for parameter in chain.from_iterable(self.parameters):
            parameter.grad = None
        for i, member in enumerate(self.members):
            member.judge(expected[i], found[i], batches[i], {})


def _nothing() -> None:
    """A graph that is not compiled is made in no time."""


def _require_equal(
    members: Sequence[CompiledGradients], of_each: Sequence[Sequence[Tensor]]
) -> None:
    """Raise ``NotCompiled`` unless all traces are one, and each tensor is whole and a member's."""
    first = members[0].graph.traced
    if any(isinstance(value, nn.Module) for value in first.children()):
        raise NotCompiled("the graph has graphs inside, of a loop or a branch")
    kinds = [[(t.shape, t.stride(), t.dtype, t.device) for t in tensors] for tensors in of_each]
    for i, (member, kind) in enumerate(zip(members, kinds, strict=True)):
        if member.graph.traced.code != first.code or kind != kinds[0]:
            raise NotCompiled(
                f"the pairs of the first and of member {i + 1} are not of one structure: a shape, "
                "a number, a mode or an operation differs"
            )
        own = list({id(tensor): tensor for tensor in of_each[i]}.values())
        if len({t.untyped_storage()._cdata for t in own}) < len(own):
            raise NotCompiled("parameters, buffers or constants of a pair share memory")
        if any(torch.empty_like(tensor).stride() != tensor.stride() for tensor in own):
            raise NotCompiled("a tensor of a pair is no dense block of memory")


# Draws that a graph makes by operations of these names, as a call of the tensor to be filled.
_FILLS = {
    "randn": "normal_",
    "randn_like": "normal_",
    "rand": "uniform_",
    "rand_like": "uniform_",
}
_IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "cauchy_", "log_normal_"}
_EMPTY = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "empty_permuted",
    "zeros",
    "zeros_like",
}


def _lift_draws(traced: GraphModule, size: int) -> list[tuple[Tensor, Draw]]:
    """Make every draw of a graph an input; returns the memory of each, and what fills a row.

    Raises:
        NotCompiled: how much randomness a draw takes depends on a value.
    """
    draws: list[tuple[Tensor, Draw]] = []
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    for node in list(traced.graph.nodes):
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        draw = _draw_of(node)
        if draw is None:
            raise NotCompiled(
                f"{node.target} draws in the graph what depends on a value there, so members "
                "cannot each have their own stream"
            )
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"draw_{len(draws)}")
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last)
        traced.graph.erase_node(node)
        draws.append((empty_rows(size, last.meta["val"]), draw))
    traced.recompile()
    return draws


def _without_writing(traced: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """The same graph, which writes on nothing but its inputs, and on these last.

    A tensor that is made in a graph has no rows of its own to be written on.
    """
    found: GraphModule = make_fx(functionalize(traced), tracing_mode="fake")(*inputs)
    for node in found.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        node.target = _written  # torch has no rule for it, and would take member by member
    for node in found.graph.find_nodes(op="call_function", target=torch.ops.ppvae.kept.default):
        node.replace_all_uses_with(node.args[0])
        found.graph.erase_node(node)
    found.recompile()
    return found


def _written(place: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    return value.to(place.dtype).expand(place.shape)


def _draw_of(node: Node) -> Draw | None:
    """What fills a row as a node of a graph does; None: not known without the graph's values."""
    name = _name(node)
    if fill := _FILLS.get(name):
        return lambda row, generator: getattr(row, fill)(generator=generator)
    if name == "randperm":
        return lambda row, generator: torch.randperm(len(row), generator=generator, out=row)
    place, *numbers = [*node.args, *node.kwargs.values()]
    if name not in _IN_PLACE or any(isinstance(number, Node) for number in numbers):
        return None
    if not isinstance(place, Node) or len(place.users) > 1 or _name(place) not in _EMPTY:
        return None  # it is written on what is used elsewhere
    return lambda row, generator: getattr(row, name)(*numbers, generator=generator)


def _name(node: Node) -> str:
    """The name of the operation of a node, such as ``"normal_"``."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")
