"""The forward of a module of a fused model: the module's own, or a graph of it in which chains are one call.

Which of the two, and which graph, is decided per kind of call and state of the module, when it is first called so: a
`Plan`. A graph is used only if a chain goes through the module's own forward; chains inside a submodule are left to the
submodule. And it looks only into those submodules that a chain passes through.
"""

import threading
from dataclasses import dataclass

import torch

from .calls import call_of
from .chains import compiled, find_chains, replace
from .state import Watch
from .tracing import UntraceableError, trace
from .views import OwnForward

#: Plans that one module keeps for one kind of call, and kinds of calls for which it keeps some.
_MAX_PLANS, _MAX_CALLS = 16, 64
#: Making a plan takes milliseconds. A module that needed so many is asked for something new at every call, as by a
#: counter among its attributes or a number among its arguments; then only one miss of so many still makes one.
_PATIENCE = 64


@dataclass(frozen=True)
class Plan:
    """How one module runs one kind of call in one mode, as long as `watch` holds.

    Attributes:
        training: the mode of the module.
        forward: a function of (module, *tensors), or None for the module's own forward.
        chains: the chains that `forward` has as one call, and modules: the submodules it looks into.
        reason: why the module could not be traced, if that is why it runs its own forward.
    """

    training: bool
    watch: Watch
    forward: object = None
    chains: tuple = ()
    modules: frozenset = frozenset()
    reason: str | None = None


class FusedForward(OwnForward):
    """The forward of `module`, an attribute of the instance."""

    def __init__(self, module):
        self.module = module
        self._plans, self._misses = {}, 0
        self._lock = threading.RLock()

    @property
    def __wrapped__(self):
        """The forward of the class, for inspect.signature."""
        return type(self.module).forward.__get__(self.module)

    @property
    def __code__(self):
        """That of the forward of the class: torch.export wants to know where it is written."""
        return type(self.module).forward.__code__

    def __reduce__(self):
        return type(self), (self.module,)  # copies and pickles make their own plans

    def __call__(self, *args, **kwargs):
        call, tensors = call_of(args, kwargs)
        plan = None if call is None else self.plan(call)
        if plan is None or plan.forward is None:
            return self.__wrapped__(*args, **kwargs)
        return plan.forward(self.module, *tensors)

    def plan(self, call):
        """The plan for a call, as `calls.call_of` gives it, in the state in which the module is."""
        for plan in self._plans.get(call, ()):
            # torch.compile takes what the watch says for constant; of the mode it knows that it may change.
            if plan.training == self.module.training and plan.watch.holds():
                return plan
        return self._new_plan(call)

    def plans(self):
        """The plans that there are for the state in which the module is, those with chains first."""
        plans = [plan for plans in self._plans.values() for plan in plans if plan.watch.holds()]
        return sorted(plans, key=lambda plan: plan.forward is None)

    @torch.compiler.disable
    def _new_plan(self, call):
        with self._lock:
            self._misses += 1
            if self._misses > _PATIENCE and self._misses % _PATIENCE:
                return Plan(self.module.training, Watch([]))
            plan = make_plan(self.module, call)
            plans = [plan, *self._plans.pop(call, ())][:_MAX_PLANS]
            if len(self._plans) >= _MAX_CALLS:
                del self._plans[next(iter(self._plans))]
            self._plans[call] = sorted(plans, key=lambda plan: plan.forward is None)  # those with chains first
        return plan


def make_plan(module, call):
    """The plan for one kind of call of `module`."""
    try:
        graph = trace(module, call)
        through = [chain for chain in find_chains(graph, module) if _is_own(chain)]
        if not through:
            return Plan(module.training, Watch([module]))
        modules = frozenset(part for chain in through for node in chain.nodes for part, _ in node.meta["calls"])
        graph = trace(module, call, inline=modules)
    except UntraceableError as reason:
        return Plan(module.training, Watch([module]), reason=str(reason))
    chains = find_chains(graph, module)
    layers = {module.get_submodule(n.target) for chain in chains for n in chain.nodes if n.op == "call_module"}
    replace(graph, module, chains)
    watch = Watch([module, *modules, *layers])
    return Plan(module.training, watch, compiled(graph), tuple(chains), modules)


def _is_own(chain):
    """Whether a chain lies in the module's own forward, not in one call of a submodule."""
    outermost = {node.meta["calls"][:1] for node in chain.nodes}
    return outermost == {()} or len(outermost) > 1
