"""Tracing a module's forward into an fx graph, or saying why that cannot be done.

torch.fx records what happens to proxies and believes that everything else in a forward happens the same way at every
call. Where that would change what the model computes, the module is not traced (`UntraceableError`) and keeps its own
forward. That is so for a forward that
  - branches on values, on shapes, or on the type of what is not known to be a tensor;
  - asks whether gradients, inference mode or autocast are on, or switches them on or off, even if they are so already;
  - draws random numbers that torch.fx does not record;
  - changes attributes of its module, or keeps intermediate values elsewhere;
  - makes tensors that are not recorded, and which a later step might change.
A submodule of which this is true does not prevent the tracing of its parent: it becomes one node of the parent's graph.
"""

import contextlib
import functools
import gc
import math
import operator
import random
import sys
import threading
import types
import weakref
from unittest import mock

import numpy as np
import torch
from torch import fx

from .calls import arguments_of, count_of
from .state import Contents
from .views import is_opaque

#: Functions that make a tensor from numbers: recorded, so that every call makes it anew.
FACTORIES = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "tensor", "zeros")
_LOCK = threading.RLock()


class UntraceableError(Exception):
    """Why a forward was not traced."""


def trace(module, call, inline=None):
    """The fx graph of `module.forward` for one kind of call.

    Args:
        module: the module; the submodules that are not looked into are the graph's `call_module` targets.
        call: what `calls.call_of` gives; its tensors are the graph's placeholders, all else is constant.
        inline: the submodules to look into (default: all that can be).

    Every node has in meta["calls"] the calls of submodules that it is in, as pairs (module, number), outermost first.

    Raises UntraceableError.
    """
    tracer = Tracer(call, inline)
    before = [Contents(part) for part in module.modules()]
    try:
        with _LOCK, _unchanged_random_state(), tracer.patched_torch():
            graph = tracer.trace(module)
            if tracer.has_living_proxies():
                raise UntraceableError("forward keeps an intermediate value somewhere")
    except UntraceableError:
        raise
    except Exception as error:  # a forward may raise anything when it is given proxies
        raise UntraceableError(_first_line(error)) from error
    finally:
        changed = [contents.module for contents in before if contents.restore()]
    if changed:
        raise UntraceableError(f"forward changes attributes of {type(changed[0]).__name__}")
    return graph


def has_hooks(module):
    """Whether hooks run when `module` is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_leaf(module):
    """Whether a call of `module` is one node: torch's and our own layers, and what must be called to be right."""
    ours = type(module).__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    layer = ours and not isinstance(module, (torch.nn.Sequential, fx.GraphModule))
    return layer or is_opaque(module) or has_hooks(module)


#: Functions of torch that a forward may not call: what they tell, or switch to, may be another thing than was so before
#: at one call and the same at the next. Contexts such as torch.no_grad() and torch.autocast() call them, too.
QUESTIONS = (
    "get_autocast_dtype", "get_rng_state", "is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled",
    "manual_seed", "set_autocast_enabled", "set_rng_state",
)  # fmt: skip
_ask = types.SimpleNamespace(**{name: getattr(torch, name) for name in QUESTIONS})


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _context():
    """What contexts a forward may switch that change its results or gradients."""
    autocast = ((_ask.is_autocast_enabled(kind), _ask.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return _ask.is_grad_enabled(), _ask.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _unchanged_random_state():
    """Restores the states of the generators of random numbers; raises UntraceableError if they were used."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), _torch_random_states()
    try:
        yield
        if (
            random.getstate() != python
            or any(not np.array_equal(now, before) for now, before in zip(np.random.get_state(), numpy, strict=True))
            or any(not torch.equal(now, before) for now, before in zip(_torch_random_states(), torchs, strict=True))
        ):
            raise UntraceableError("forward draws random numbers")
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        _ask.set_rng_state(torchs[0])
        if len(torchs) > 1:
            torch.cuda.set_rng_state_all(torchs[1:])


def _torch_random_states():
    """The state of torch's generator on the CPU, then of those of the GPUs, if CUDA is in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [_ask.get_rng_state(), *gpus]


def _is_tensor(obj):
    """torch.is_tensor, for proxies as well."""
    if isinstance(obj, fx.Proxy):
        if obj.node.op == "placeholder":
            return True
        raise UntraceableError(f"forward looks at the type of {obj.node}")
    return isinstance(obj, torch.Tensor)


class Proxy(fx.Proxy):
    """A proxy that records in-place operators as such, and is careful about its type.

    Code that asks whether a value is a tensor gets an answer for the arguments of the call, which are known to be
    tensors, and `UntraceableError` for everything else. torch's own code sees a proxy.
    """

    @property
    def __class__(self):
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == "abc":
            frame = frame.f_back
        caller = "" if frame is None else frame.f_globals.get("__name__", "")
        if caller.partition(".")[0] in ("torch", __name__.partition(".")[0]):
            return Proxy
        if self.node.op == "placeholder":
            return torch.Tensor
        raise UntraceableError(f"forward looks at the type of {self.node}")


def _in_place(name):
    """The function that records `operator.<name>`, hidden from fx, which would write it as a statement.

    Written as a statement, a += b would also rename what other nodes know as a, if a is a number.
    """
    operation = getattr(operator, name)

    @functools.wraps(operation)
    def function(a, b):
        return operation(a, b)

    function.__module__ = __name__
    setattr(Proxy, f"__{name}__", lambda a, b: a.tracer.create_proxy("call_function", function, (a, b), {}))
    return function


#: What the in-place operators are recorded as, by their names in `operator`.
IN_PLACE_OPERATORS = {
    name: _in_place(name)
    for name in (
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
        "itruediv", "ixor",
    )
}  # fmt: skip


class Tracer(fx.Tracer):
    """fx's tracer, with the rules of this file."""

    proxy_buffer_attributes = True

    def __init__(self, call, inline):
        super().__init__(autowrap_modules=(math,))
        self._call, self._inline = call, inline
        self._calls, self._call_count = [], 0
        self._thread = threading.get_ident()
        self._proxies = []
        self._made = {}  # by id: the tensor, and how it was made
        self._context = _context()

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        def forward(module, *tensors):
            args, kwargs = arguments_of(self._call, tensors)
            return root_fn(module, *args, **kwargs)

        tensors = (self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(count_of(self._call)))
        return forward, [self.root, *tensors]

    def proxy(self, node):
        proxy = Proxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def has_living_proxies(self):
        """Whether somebody still has a proxy, after tracing."""
        living = any(proxy() is not None for proxy in self._proxies)
        if living:  # perhaps in a circle of references
            gc.collect()
            living = any(proxy() is not None for proxy in self._proxies)
        return living

    def create_node(self, *args, **kwargs):
        if _context() != self._context:
            raise UntraceableError("forward switches gradients, inference mode or autocast inside")
        node = super().create_node(*args, **kwargs)
        node.meta["calls"] = tuple(self._calls)
        return node

    def create_arg(self, a):
        if type(a) is Proxy:
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, torch.nn.Parameter) and id(a) in self._made:
            _, function, args, kwargs = self._made[id(a)]
            if a._version:
                raise UntraceableError("forward changes a tensor that it makes from numbers")
            return self.create_node("call_function", function, self.create_arg(args), self.create_arg(kwargs))
        argument = super().create_arg(a)
        if isinstance(argument, fx.Node) and "_tensor_constant" in str(argument.target):
            raise UntraceableError("forward uses a tensor that is neither an argument nor an attribute")
        return argument

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, {})  # what a refused submodule read may not be used again

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if is_leaf(m) or (self._inline is not None and m not in self._inline):
            return self.create_proxy("call_module", path, args, kwargs)
        before, count = Contents(m), len(self.graph.nodes)
        self._call_count += 1
        self._calls.append((m, self._call_count))
        try:
            with _unchanged_random_state():
                result = type(m).forward(m, *args, **kwargs)
            if before.restore():
                raise UntraceableError(f"forward changes attributes of {type(m).__name__}")
            return result
        except Exception:
            if self._inline is not None:
                raise
            before.restore()
            for node in reversed(list(self.graph.nodes)[count:]):
                self.graph.erase_node(node)
        finally:
            self._calls.pop()
        return self.create_proxy("call_module", path, args, kwargs)

    @contextlib.contextmanager
    def patched_torch(self):
        """While active, tensors made from numbers are remembered, or recorded if their making involves proxies.

        And torch's questions about types and gradients are answered, or not, by the rules of this file.
        """
        with contextlib.ExitStack() as stack:
            for name in FACTORIES:
                function = self._recorded(getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, function))
            stack.enter_context(mock.patch.object(torch, "is_tensor", _is_tensor))
            for name in QUESTIONS:
                stack.enter_context(mock.patch.object(torch, name, self._refused(getattr(_ask, name), name)))
            enter = torch.inference_mode.__enter__
            refused = self._refused(enter, "inference_mode")
            stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", refused))
            yield

    def _refused(self, function, name):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            raise UntraceableError(f"forward calls torch.{name}, or what does so")

        return wrapped

    def _recorded(self, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            proxies = []
            fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
            if proxies:
                return self.create_proxy("call_function", function, args, kwargs)
            tensor = function(*args, **kwargs)
            # Keyword arguments say what a default or a context decided about it.
            pinned = {**kwargs, "dtype": tensor.dtype, "device": tensor.device}
            self._made[id(tensor)] = tensor, function, args, pinned
            return tensor

        return wrapped
