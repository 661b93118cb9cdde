"""Chains of pointwise functions as the kernels know them: a C++ type, a block of parameters, a list of tensors."""

import functools
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..epilogue import Function


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain of functions, ready to be compiled into a kernel.

    Attributes:
        signature: the functions' signatures in the order in which they are applied, separated by spaces.
        numbers: all their numbers in order.
        tensors: their tensor operands in order, as the user gave them; empty if launchers get the arrays separately.
        cpp: the C++ type, such as "Chain<1, 0, Add<Number<0>>, GeluErf>" (cuda/include/chain.cuh).
        params: the dtype of the type's Params.
    """

    signature: str
    numbers: tuple
    tensors: tuple
    cpp: str
    params: np.dtype

    @property
    def is_identity(self):
        return not self.signature

    @property
    def tensor_count(self):
        return self.signature.count("@")

    def pack(self, arrays=(), channels=1):
        """The chain's parameters for a launch.

        Args:
            arrays: the arrays of the tensor operands, contiguous, each with 1 or `channels` elements.
            channels: the number of channels along which tensors may vary.

        Raises ValueError if the arrays do not fit.
        """
        self.check_count(arrays)
        for i, array in enumerate(arrays):
            if array.size not in (1, channels):
                raise ValueError(f"tensor {i} of the chain has {array.size} elements, expected 1 or {channels}")
            if not array.flags.c_contiguous:
                raise ValueError(f"tensor {i} of the chain is not contiguous")
        addresses = [runtime.pointer(array) for array in arrays]
        strides = [int(array.size > 1) for array in arrays]
        return np.array((self.numbers or [0.0], addresses or [0], strides or [0]), self.params)[()]

    def check_count(self, arrays):
        """Raises ValueError unless there are as many arrays as tensor operands."""
        if len(arrays) != self.tensor_count:
            raise ValueError(f"the chain has {self.tensor_count} tensors, got {len(arrays)}")


def chain_of(functions):
    """The chain of a sequence of functions, of one function, or of what already is a chain.

    Raises TypeError for what is not of `rawkern.epilogue`.
    """
    if isinstance(functions, Chain):
        return functions
    functions = functions_of(functions)
    signature, numbers, tensors = parts_of(functions)
    return chain_from(signature, numbers, tensors)


def functions_of(chain):
    """A tuple of functions, from a sequence of them or from one. Raises TypeError as `chain_of`."""
    if isinstance(chain, Function):
        return (chain,)
    if not isinstance(chain, (tuple, list)):
        try:
            chain = tuple(chain)
        except TypeError:
            raise TypeError(
                f"a chain is a function of rawkern.epilogue or a sequence of them, not {type(chain).__name__}"
            ) from None
    for i, function in enumerate(chain):
        if not isinstance(function, Function):
            hint = f" (did you mean {function.__name__}()?)" if isinstance(function, type) else ""
            raise TypeError(f"function {i} of the chain must be one of rawkern.epilogue, got {function!r}{hint}")
    return tuple(chain)


def parts_of(functions):
    """(signature, numbers, tensors) of a tuple of functions."""
    signature = " ".join([function.signature for function in functions])
    numbers = tuple([number for function in functions for number in function.numbers])
    return signature, numbers, tuple([function.tensor for function in functions if function.tensor is not None])


def chain_from(signature, numbers, tensors=()):
    """The chain with this signature and these numbers."""
    cpp, params = _type(signature)
    return Chain(signature, tuple(numbers), tuple(tensors), cpp, params)


@functools.cache
def _type(signature):
    """The C++ type and the dtype of Params."""
    numbers = tensors = 0
    arguments = []
    for function in signature.split():
        name = function.rstrip("#-@")
        count, has_tensor = function.count("#"), function.count("@")
        operands = [f"Number<{numbers + i}>" for i in range(count)] + [f"Tensor<{tensors}>"] * has_tensor
        numbers += count
        tensors += has_tensor
        arguments.append(f"{name}<{', '.join(operands)}>" if operands else name)
    params = runtime.params(
        ("numbers", "f8", (max(1, numbers),)),
        ("tensors", "u8", (max(1, tensors),)),
        ("strides", "i8", (max(1, tensors),)),
    )
    return f"Chain<{', '.join([str(numbers), str(tensors), *arguments])}>", params


IDENTITY = chain_of(())


def channel_axis(shape, operand_shapes):
    """The axis of `shape` along which the operands vary; None if none varies.

    Each operand must broadcast to `shape` (aligned at the last axis, as everywhere in torch) and vary along at most one
    axis, the same for all. Raises RuntimeError if one does not broadcast, ValueError if they vary otherwise.
    """
    found = None
    for i, operand in enumerate(operand_shapes):
        operand = tuple(operand)
        missing = len(shape) - len(operand)
        fits = missing >= 0 and all(n in (1, shape[missing + k]) for k, n in enumerate(operand))
        if not fits:
            raise RuntimeError(f"tensor {i} of the chain, of shape {operand}, does not broadcast to {tuple(shape)}")
        for axis in (missing + k for k, n in enumerate(operand) if n != 1):
            if found is not None and axis != found:
                raise ValueError(
                    f"tensors of a chain may vary along one axis, the same for all: tensor {i}, of shape {operand}, "
                    f"varies along axis {axis} of {tuple(shape)}, and axis {found} is in use"
                )
            found = axis
    return found
