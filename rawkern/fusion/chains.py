"""Finding chains in a graph and putting one call in the place of each.

A chain is a run of nodes of which each is the only one that uses the value of the one before, and uses it once. It is
taken only if no node between its first and its last may change a tensor, because the call that replaces the chain
reads everything at the place of its last node.
"""

import functools
import operator
from dataclasses import dataclass

from torch import fx

from ..epilogue import GELU
from .kernels import (
    FusedConvTranspose2d,
    FusedConvTranspose2dGELUGroupNorm,
    FusedConvTranspose2dMinSumGELUAdd,
    FusedGELUGroupNorm,
    FusedMinSumGELUAdd,
    FusedPointwise,
)
from .patterns import Attribute, Computed, Operand, constant_of, may_mutate, pointwise_items
from .steps import (
    is_height_sum,
    match_channel_minimum,
    match_convolution,
    match_normalization,
    match_sum_with,
)


@dataclass(frozen=True)
class Chain:
    """A chain that one call can compute.

    Attributes:
        nodes: its nodes in order; the value of the last is its value.
        kind: the class in kernels.py; options: what its constructor takes after `plain`.
        arguments: of the call: nodes, `Attribute`s, constants.
    """

    nodes: tuple
    kind: type
    options: tuple
    arguments: tuple


@dataclass(frozen=True)
class _Pointwise:
    """Consecutive nodes and the items of each, of which a node that changes nothing has none."""

    steps: tuple

    @property
    def nodes(self):
        return tuple(node for node, _ in self.steps)

    @property
    def items(self):
        return tuple(item for _, items in self.steps for item in items)


def find_chains(graph, root):
    """The chains in the graph of a forward of `root`, none of which overlap."""
    finder, chains, taken = _Finder(graph, root), [], set()
    for node in graph.nodes:
        if node not in taken:
            chain = finder.from_convolution(node) or finder.from_value(node)
            if chain is not None:
                chains.append(chain)
                taken.update(chain.nodes)
    return chains


class _Finder:
    def __init__(self, graph, root):
        for node in reversed(graph.nodes):  # unused parts of unpacked tuples are no users
            if node.op == "call_function" and node.target is operator.getitem and not node.users:
                graph.erase_node(node)
        self._root, self._asides = root, {}
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._mutations = [self._position[node] for node in graph.nodes if may_mutate(node, root)]

    def from_convolution(self, node):
        """The longest chain that begins with the transposed convolution `node`, if something follows it."""
        convolution = match_convolution(node, self._root)
        if convolution is None:
            return None
        common = convolution.input, convolution.weight, convolution.bias, convolution.output_size
        tail = self._min_sum_gelu_add(node)
        if tail is not None:
            nodes, bias = tail
            return self._chain((node, *nodes), FusedConvTranspose2dMinSumGELUAdd, (convolution,), (*common, bias))
        run = self._pointwise(node, convolution.channels)
        norm = self._normalization(run.nodes[-1]) if run.nodes else None
        if norm is not None and len(run.items) == 1 and isinstance(run.items[0], GELU):
            options = convolution, _approximate(run.items[0]), norm.num_groups, norm.eps
            nodes = (node, *run.nodes, norm.node)
            arguments = (*common, norm.weight, norm.bias)
            return self._chain(nodes, FusedConvTranspose2dGELUGroupNorm, options, arguments)
        run = self._without_gelu_before(norm, run)
        if not run.items:
            return None
        operands = tuple(item.node for item in run.items if isinstance(item, Operand))
        return self._chain((node, *run.nodes), FusedConvTranspose2d, (convolution, run.items), (*common, *operands))

    def from_value(self, node):
        """The chain that begins with `node` and has no convolution."""
        value = next((argument for argument in node.args if isinstance(argument, fx.Node)), None)
        if value is None:
            return None
        tail = self._min_sum_gelu_add(value, node)
        if tail is not None:
            nodes, bias = tail
            return self._chain(nodes, FusedMinSumGELUAdd, (), (value, bias))
        run = self._pointwise(value, None, node)
        if not run.nodes:
            return None
        norm = self._normalization(run.nodes[-1])
        if norm is not None and len(run.items) == 1 and isinstance(run.items[0], GELU):
            options = _approximate(run.items[0]), norm.num_groups, norm.eps
            arguments = (value, norm.weight, norm.bias)
            return self._chain((*run.nodes, norm.node), FusedGELUGroupNorm, options, arguments)
        run = self._without_gelu_before(norm, run)
        # The fused call keeps its input for backward where torch may keep none, so that nothing may change it later.
        if len(run.nodes) < 2 or len(run.items) < 2 or any(at >= self._position[node] for at in self._mutations):
            return None
        return self._chain(run.nodes, FusedPointwise, (run.items,), (value,))

    def _next(self, value):
        """The only user of `value`, if nothing between the two may change a tensor.

        Users that only ask for dtype and device, to make a constant for that one user, do not count.
        """
        asides = [user for user in value.users if _is_metadata(user) or constant_of(user) is not None]
        users = [user for user in value.users if user not in asides]
        if len(users) != 1:
            return None
        (user,) = users
        asides += [constant for aside in asides if _is_metadata(aside) for constant in aside.users]
        if any(constant_of(aside) is None or set(aside.users) != {user} for aside in asides if not _is_metadata(aside)):
            return None
        between = range(self._position[value] + 1, self._position[user])
        if any(at in between for at in self._mutations):
            return None
        self._asides[user] = asides
        return user

    def _chain(self, nodes, *rest):
        """A Chain of these nodes and of what makes constants for them."""
        nodes = {*nodes, *(aside for node in nodes[1:] for aside in self._asides.get(node, ()))}
        return Chain(tuple(sorted(nodes, key=self._position.__getitem__)), *rest)

    def _pointwise(self, value, channels, first=None):
        steps = []
        user = first or self._next(value)
        while user is not None:
            items = pointwise_items(user, value, self._root, channels)
            if items is None:
                break
            steps.append((user, items))
            value, user = user, self._next(user)
        return _Pointwise(tuple(steps))

    def _without_gelu_before(self, norm, run):
        """The run without a GELU at its end that a normalisation can take with it."""
        last = max((i for i, (_, items) in enumerate(run.steps) if items), default=None)
        if norm is None or last is None or not isinstance(run.steps[last][1][-1], GELU):
            return run
        return _Pointwise(run.steps[:last])

    def _normalization(self, value):
        user = self._next(value)
        return None if user is None else match_normalization(user, value, self._root)

    def _min_sum_gelu_add(self, value, first=None):
        """(nodes, node of the bias) of the channel minimum and all that belongs to it, applied to `value`."""
        minimum = first or self._next(value)
        values = None if minimum is None else match_channel_minimum(minimum, value)
        if values is None:
            return None
        total = self._next(values)
        if total is None or self._next(minimum) is not values or not is_height_sum(total, values):
            return None
        gelu = self._next(total)
        if gelu is None or pointwise_items(gelu, total, self._root, None) != (GELU(),):
            return None
        last = self._next(gelu)
        bias = None if last is None else match_sum_with(last, gelu)
        return None if bias is None else ((minimum, values, total, gelu, last), bias)


def _is_metadata(node):
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("dtype", "device")


def _approximate(gelu):
    return "none" if gelu == GELU() else "tanh"


def replace(graph, root, chains):
    """Puts one call in the place of each chain: call(arguments, inputs), see kernels.py."""
    calls = {}
    for chain in chains:
        last = chain.nodes[-1]
        inputs = tuple(dict.fromkeys(n for node in chain.nodes for n in node.all_input_nodes if n not in chain.nodes))
        kernel = chain.kind(_plain(chain.nodes, inputs, root), *chain.options)
        with graph.inserting_before(last):
            arguments = tuple(_argument(argument, graph, calls) for argument in chain.arguments)
            calls[last] = graph.call_function(kernel, (arguments, inputs))
        last.replace_all_uses_with(calls[last])
        for node in reversed(chain.nodes):
            graph.erase_node(node)


def _argument(argument, graph, calls):
    """The argument of a call, with the nodes that it needs and the graph does not have yet."""
    if isinstance(argument, Attribute):
        return graph.create_node("get_attr", argument.path)
    if isinstance(argument, Computed):
        return graph.call_function(argument.function, tuple(_argument(a, graph, calls) for a in argument.arguments))
    return fx.map_arg(argument, lambda node: calls.get(node, node))


def _plain(nodes, inputs, root):
    """The nodes as they are, as a function of the values of `inputs`."""
    graph = fx.Graph()
    known = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(known[nodes[-1]])
    return functools.partial(compiled(graph), root)


def compiled(graph):
    """The function of (module, *inputs) that a graph writes."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<rawkern.fuse>", "exec"), names)
    return names["forward"]
