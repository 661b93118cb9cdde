"""A second view of a model: other module objects, the same parameters, buffers and hooks.

Every module of the tree is copied shallowly. A copy shares the dictionaries of its parameters and buffers with the
original, so that moving, loading and training either of them does the same to both; the dictionaries of hooks are
shared as well. What differs is the tree of submodules, and with it `training` and the forward that `fuse` gives a copy.
"""

import types

import torch

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


def _translated(value, copies):
    """`value` with the copies in the place of the originals, where it is a module, a method of one, or holds some."""
    if isinstance(value, torch.nn.Module):
        return copies.get(value, value)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
        return types.MethodType(value.__func__, copies.get(value.__self__, value.__self__))
    if type(value) in (list, tuple):
        items = [_translated(item, copies) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        items = {key: _translated(item, copies) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    return value
