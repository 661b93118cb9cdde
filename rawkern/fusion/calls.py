"""The kinds of calls of a forward: how many tensors come where, and what the other arguments are."""

import inspect

import torch
from torch.utils import _pytree as pytree

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
_TENSOR = object()


def _hashable(spec):
    """What stands for a `TreeSpec`: torch 2.6 has lists in those of dictionaries, which thus have no hash."""
    return spec if _SPECS_ARE_HASHABLE else repr(spec)


try:
    _SPECS_ARE_HASHABLE = bool(hash(pytree.tree_flatten({"": 0})[1])) or True
except TypeError:
    _SPECS_ARE_HASHABLE = False


class Call:
    """One kind of call: compares equal to another that differs only in its tensors.

    Attributes:
        count: the number of tensors, also those inside lists, tuples and dictionaries.
    """

    __slots__ = ("_constants", "_hash", "_key", "_spec", "count")

    def __init__(self, spec, constants):
        self._spec, self._constants = spec, constants
        self._key = _hashable(spec), tuple((type(constant), constant) for constant in constants)
        self._hash = hash(self._key)
        self.count = sum(constant is _TENSOR for constant in constants)

    def __eq__(self, other):
        return isinstance(other, Call) and self._key == other._key

    def __hash__(self):
        return self._hash

    def arguments(self, tensors):
        """(args, kwargs) of such a call with these tensors."""
        tensors = iter(tensors)
        leaves = [next(tensors) if constant is _TENSOR else constant for constant in self._constants]
        return pytree.tree_unflatten(leaves, self._spec)


def count_of(call):
    """The number of tensors of a call."""
    return call if isinstance(call, int) else call.count


def arguments_of(call, tensors):
    """(args, kwargs) of a call with these tensors."""
    return (tensors, {}) if isinstance(call, int) else call.arguments(tensors)


def call_of(args, kwargs):
    """(call, tensors); (None, None) if an argument is neither a tensor nor a constant nor a container of those.

    A call of tensors by position, and nothing else, is known by their number.
    """
    if not kwargs and all(isinstance(value, torch.Tensor) for value in args):
        return len(args), args
    leaves, spec = pytree.tree_flatten((args, kwargs))
    constants = tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    if not all(constant is _TENSOR or type(constant) in _CONSTANTS for constant in constants):
        return None, None
    return Call(spec, constants), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def usual_call(forward):
    """The call of a forward with a tensor for each argument by position that has no default, or one for all *args."""
    parameters = inspect.signature(forward).parameters.values()
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return sum(p.default is p.empty for p in by_position) if by_position else int(any_number)
