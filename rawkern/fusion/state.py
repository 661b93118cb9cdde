"""What a forward may depend on, beside its arguments and tensors: the attributes of its module.

`Contents` finds out, and undoes, what tracing a forward changed. `Watch` finds out at every call whether a graph that
was traced before is still that of the module.
"""

from collections import OrderedDict, defaultdict, deque

import torch

from .views import DEPTH, INTERNAL

_CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)
#: Of the dictionaries that every torch.nn.Module has, those that decide what calling it does, beside its tensors.
_DECISIVE = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Contents:
    """The attributes of a module at one moment, and what is in them if they are containers."""

    def __init__(self, module):
        self.module = module
        self._attributes = dict(module.__dict__)
        self._items = {}
        for value in module.__dict__.values():
            self._note(value, DEPTH)

    def _note(self, value, depth):
        """Copies a container, and those in it."""
        if type(value) in _CONTAINERS and id(value) not in self._items:
            self._items[id(value)] = value, value.copy()
        elif type(value) is not tuple:
            return
        if depth:
            for item in value.values() if isinstance(value, dict) else value:
                self._note(item, depth - 1)

    def restore(self):
        """Makes everything as it was; returns whether anything was different."""
        changed = not _same(self.module.__dict__, self._attributes)
        if changed:
            self.module.__dict__.clear()
            self.module.__dict__.update(self._attributes)
        for container, items in self._items.values():
            if not _same(container, items):
                changed = True
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(items)
        return changed


class Watch:
    """Whether modules are still as they were, in what a graph of them depends on.

    Tensors are not watched: a graph reads parameters and buffers anew at every call. Of objects of other types than
    numbers, strings and their containers, which may be nested, only the identity is watched.
    """

    def __init__(self, modules):
        self._sizes, self._values, self._items = [], [], []
        for module in modules:
            attributes = module.__dict__
            self._sizes.append((attributes, _size(attributes)))
            self._values.append((attributes, "training", module.training))
            self._items += [(attributes[name], attributes[name].copy()) for name in _DECISIVE]
            for name, value in attributes.items():
                if name not in INTERNAL and not isinstance(value, torch.Tensor):
                    self._values.append((attributes, name, _snapshot(value)))
            for tensors in (module._parameters, module._buffers):
                self._values += [(tensors, name, None) for name, value in tensors.items() if value is None]

    @torch.compiler.assume_constant_result
    def holds(self):
        for attributes, size in self._sizes:
            if _size(attributes) != size:
                return False
        for items, before in self._items:
            if items != before:
                return False
        for attributes, name, before in self._values:
            now = attributes.get(name)
            if now is not before and not _same(now, before):
                return False
        return True


def _snapshot(value, depth=DEPTH):
    """`value`, with copies of the containers in it, so that a change of one can be told."""
    if depth and type(value) in _CONTAINERS:
        copied = value.copy()
        if isinstance(copied, dict):
            copied.update((name, _snapshot(item, depth - 1)) for name, item in value.items())
        elif not isinstance(copied, set):
            copied.clear()
            copied.extend(_snapshot(item, depth - 1) for item in value)
        return copied
    return tuple(_snapshot(item, depth - 1) for item in value) if depth and type(value) is tuple else value


def _size(attributes):
    """How many attributes there are: a new one may hide one of the class. torch.compile's own mark does not count."""
    return len(attributes) - ("_is_torch_compile" in attributes)


def _same(now, before, depth=DEPTH):
    """Whether two values are the same, or containers of the same. Numbers and strings are the same if equal."""
    if now is before:
        return True
    if type(now) is not type(before) or not depth:
        return False
    if isinstance(now, dict):
        return list(now) == list(before) and all(_same(now[name], before[name], depth - 1) for name in now)
    if isinstance(now, (list, tuple, deque)):
        return len(now) == len(before) and all(_same(a, b, depth - 1) for a, b in zip(now, before, strict=True))
    return isinstance(now, (int, float, complex, str, bytes, set, frozenset)) and now == before
