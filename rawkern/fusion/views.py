"""A second view of a model: other module objects, the same parameters, buffers and hooks.

Every module of the tree is copied shallowly. A copy shares the dictionaries of its parameters and buffers with the
original, so that moving, loading and training either of them does the same to both; the dictionaries of hooks are
shared as well. What differs is the tree of submodules, and with it `training` and the forward that `fuse` gives a copy.
"""

import functools
import types
from collections import OrderedDict, defaultdict, deque

import torch

#: Containers in containers are looked into so far; some hold themselves.
DEPTH = 6
INTERNAL = frozenset(torch.nn.Module().__dict__)


class OwnForward:
    """A forward that `fuse` gave to one copy of a module, in the copy's __dict__."""


def view_of(model):
    """(copy, copies): a copy of the tree of modules that shares the state of `model`, and all copies by original.

    Opaque modules are not copied but used by both.
    """
    copies = {}
    view = _copy_tree(model, copies)
    for copy in copies.values():
        for name, value in copy.__dict__.items():
            if name not in INTERNAL:
                copy.__dict__[name] = _translated(value, copies)
    return view, copies


def is_opaque(module):
    """Whether calling `module` may do something else than run the forward of its class.

    So it is with TorchScript, with a forward of the instance's own, with __call__ replaced, with what was compiled, and
    while parameters wait for the first input.
    """
    return (
        isinstance(module, torch.jit.ScriptModule)
        or not isinstance(module.__dict__.get("forward", OwnForward()), OwnForward)
        or type(module).__call__ is not torch.nn.Module.__call__
        or module._compiled_call_impl is not None
        or any(torch.nn.parameter.is_lazy(value) for value in module._parameters.values())
    )


def _copy_tree(module, copies):
    if is_opaque(module):
        return module
    if module not in copies:
        copy = copies[module] = object.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        copy.__dict__.pop("forward", None)
        copy.__dict__["_modules"] = {
            name: None if child is None else _copy_tree(child, copies) for name, child in module._modules.items()
        }
    return copies[module]


def _translated(value, copies, depth=DEPTH):
    """`value` with the copies in the place of the originals, where it is a module, a method of one, or holds some."""
    if isinstance(value, torch.nn.Module):
        return copies.get(value, value)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
        return types.MethodType(value.__func__, copies.get(value.__self__, value.__self__))
    if not depth:
        return value
    if type(value) is functools.partial:
        parts = value.func, value.args, value.keywords
        new = tuple(_translated(part, copies, depth - 1) for part in parts)
        return value if _are_same(new, parts) else functools.partial(new[0], *new[1], **new[2])
    if type(value) in (list, tuple, set, deque) or (isinstance(value, tuple) and hasattr(value, "_make")):
        items = [_translated(item, copies, depth - 1) for item in value]
        if _are_same(items, value):
            return value
        if isinstance(value, deque):
            return deque(items, value.maxlen)
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if type(value) in (dict, OrderedDict, defaultdict):
        items = [_translated(item, copies, depth - 1) for item in value.values()]
        if _are_same(items, value.values()):
            return value
        translated = value.copy()  # with what a defaultdict makes new items by
        translated.update(zip(value, items, strict=True))
        return translated
    return value


def _are_same(items, others):
    return all(a is b for a, b in zip(items, others, strict=True))
