"""What a fused graph calls: one object for each chain, which runs a function of rawkern on the chain's tensors.

Whether a function of rawkern computes the same depends on what a graph does not know: dtypes, devices, the number of
dimensions, autocast. Each object decides that at every call by `applies`; where it does not apply, the chain's own
nodes run as they were, so that the result, or the error, is torch's.
"""

import torch
from torch._subclasses import FakeTensor

from ..autograd.conv_transpose2d import conv_transpose2d
from ..autograd.conv_transpose2d_gelu_group_norm import conv_transpose2d_gelu_group_norm
from ..autograd.conv_transpose2d_min_sum_gelu_add import conv_transpose2d_min_sum_gelu_add
from ..autograd.gelu_group_norm import gelu_group_norm
from ..autograd.min_sum_gelu_add import min_sum_gelu_add
from ..autograd.pointwise import pointwise
from ..epilogue import Softplus
from .patterns import Computed, Operand, Scalar, fits

_FULL = (torch.float64, torch.float32)
_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)  # the last stands for the others in torch.export
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Fused:
    """A chain that became one call.

    Attributes:
        function: the name of the function of rawkern.
        plain: the chain as it was, a function of the values that its nodes take.
    """

    function = None

    def __init__(self, plain):
        self.plain = plain
        self.__name__ = f"fused_{self.function}"

    def __call__(self, arguments, inputs):
        return self.fused(*arguments) if self.applies(*arguments) else self.plain(*inputs)


class FusedConvTranspose2d(Fused):
    """conv_transpose2d with an epilogue: (input, weight, bias, output_size, *operands)."""

    function = "conv_transpose2d"

    def __init__(self, plain, convolution, items):
        super().__init__(plain)
        self._convolution, self._epilogue = _Convolution(convolution), _Epilogue(items)

    def applies(self, input, weight, bias, output_size, *operands):
        dtype = autocast_dtype(input)
        if not self._convolution.applies(input, weight, bias, dtype is not None):
            return False
        if dtype is not None:  # then operands promote to their own type, and softplus to float32
            return not operands and not self._epilogue.has_softplus
        if self._epilogue.has_batch_norm and (input.dim() != 4 or input.dtype not in _FULL):
            return False  # torch takes no other shape; and in 16 bit it would round the scale less
        channels = _channels(weight, self._convolution.geometry)
        return all(like(operand, input) and fits(operand.shape, channels, input.dim()) for operand in operands)

    def fused(self, input, weight, bias, output_size, *operands):
        dtype = autocast_dtype(input)
        geometry = self._convolution.geometry_for(input, output_size)
        if dtype is None:
            epilogue = self._epilogue.functions(input.dtype, operands)
            return conv_transpose2d(input, weight, bias, **geometry, epilogue=epilogue)
        with torch.autocast(input.device.type, enabled=False):
            input, weight, bias = (None if value is None else value.to(dtype) for value in (input, weight, bias))
            epilogue = self._epilogue.functions(dtype)
            return conv_transpose2d(input, weight, bias, **geometry, epilogue=epilogue)


class FusedConvTranspose2dGELUGroupNorm(Fused):
    """conv_transpose2d_gelu_group_norm: (input, weight, bias, output_size, norm_weight, norm_bias)."""

    function = "conv_transpose2d_gelu_group_norm"

    def __init__(self, plain, convolution, approximate, num_groups, eps):
        super().__init__(plain)
        self._convolution = _Convolution(convolution)
        self._approximate, self._num_groups, self._eps = approximate, num_groups, eps

    def applies(self, input, weight, bias, output_size, norm_weight, norm_bias):
        if not self._convolution.applies(input, weight, bias) or input.dim() != 4:
            return False
        channels = _channels(weight, self._convolution.geometry)
        return _norm_fits(input, channels, self._num_groups, norm_weight, norm_bias)

    def fused(self, input, weight, bias, output_size, norm_weight, norm_bias):
        return conv_transpose2d_gelu_group_norm(
            input,
            weight,
            bias,
            self._num_groups,
            norm_weight,
            norm_bias,
            self._eps,
            **self._convolution.geometry_for(input, output_size),
            approximate=self._approximate,
        )


class FusedConvTranspose2dMinSumGELUAdd(Fused):
    """conv_transpose2d_min_sum_gelu_add: (input, weight, conv_bias, output_size, bias)."""

    function = "conv_transpose2d_min_sum_gelu_add"

    def __init__(self, plain, convolution):
        super().__init__(plain)
        self._convolution = _Convolution(convolution)

    def applies(self, input, weight, conv_bias, output_size, bias):
        return self._convolution.applies(input, weight, conv_bias) and input.dim() == 4 and like(bias, input)

    def fused(self, input, weight, conv_bias, output_size, bias):
        geometry = self._convolution.geometry_for(input, output_size)
        return conv_transpose2d_min_sum_gelu_add(input, weight, conv_bias, bias, **geometry)


class FusedPointwise(Fused):
    """pointwise: (input,)."""

    function = "pointwise"

    def __init__(self, plain, items):
        super().__init__(plain)
        self._epilogue = _Epilogue(items)

    def applies(self, input):
        return is_known(input) and not (self._epilogue.has_softplus and is_autocast(input))

    def fused(self, input):
        return pointwise(input, self._epilogue.functions(input.dtype))


class FusedGELUGroupNorm(Fused):
    """gelu_group_norm: (input, weight, bias)."""

    function = "gelu_group_norm"

    def __init__(self, plain, approximate, num_groups, eps):
        super().__init__(plain)
        self._approximate, self._num_groups, self._eps = approximate, num_groups, eps

    def applies(self, input, weight, bias):
        if not is_known(input) or is_autocast(input) or input.dim() < 2:
            return False
        return _norm_fits(input, input.shape[1], self._num_groups, weight, bias)

    def fused(self, input, weight, bias):
        return gelu_group_norm(input, self._num_groups, weight, bias, self._eps, self._approximate)


class FusedMinSumGELUAdd(Fused):
    """min_sum_gelu_add: (input, bias)."""

    function = "min_sum_gelu_add"

    def applies(self, input, bias):
        return is_known(input) and not is_autocast(input) and input.dim() == 4 and like(bias, input)

    def fused(self, input, bias):
        return min_sum_gelu_add(input, bias)


class _Convolution:
    """The parts of a transposed convolution that are no tensors."""

    def __init__(self, convolution):
        self._module, self.geometry = convolution.module, convolution.geometry

    def applies(self, input, weight, bias, autocast=False):
        if not is_known(input) or input.dim() not in (3, 4) or (is_autocast(input) and not autocast):
            return False
        tensors = [weight] if bias is None else [weight, bias]
        if not autocast:
            return all([like(tensor, input) for tensor in tensors])
        # autocast leaves float64 as it is
        return all(is_known(t) and t.dtype is not torch.float64 and t.device == input.device for t in tensors)

    def geometry_for(self, input, output_size):
        """The geometry, with the output padding that torch.nn.ConvTranspose2d computes from output_size."""
        if output_size is None:
            return self.geometry
        module = self._module
        padding = module._output_padding(
            input, output_size, module.stride, module.padding, module.kernel_size, 2, module.dilation
        )
        return {**self.geometry, "output_padding": padding}


def is_known(value):
    """Whether `value` is a tensor that rawkern takes."""
    return _is_plain(value) and value.dtype in _DTYPES and value.device.type in _DEVICES


def like(value, model):
    """Whether `value` is a tensor of the dtype and on the device of `model`, which is one that rawkern takes."""
    return _is_plain(value) and value.dtype is model.dtype and value.device == model.device


def _is_plain(value):
    return type(value) in _PLAIN and value.layout is torch.strided


def is_autocast(tensor):
    return tensor.device.type in _DEVICES and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor):
    """The dtype to which autocast takes the operands of a convolution of `tensor`; None if it does not."""
    if not isinstance(tensor, torch.Tensor) or not is_autocast(tensor) or tensor.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(tensor.device.type)


class _Epilogue:
    """The functions of `rawkern.epilogue` for the items of a chain."""

    def __init__(self, items):
        self.has_softplus = any(isinstance(item, Softplus) for item in items)
        self.has_batch_norm = any(isinstance(item, Operand) and isinstance(item.node, Computed) for item in items)
        self._items = {dtype: tuple(_rounded(item, dtype) for item in items) for dtype in _DTYPES}

    def functions(self, dtype, tensors=()):
        """The functions for a chain that is computed in `dtype`, with the tensors of its operands in order."""
        if not tensors:
            return self._items[dtype]
        tensors = iter(tensors)
        return tuple(item.kind(next(tensors)) if isinstance(item, Operand) else item for item in self._items[dtype])


def _rounded(item, dtype):
    return item.kind(torch.tensor(item.number, dtype=dtype).item()) if isinstance(item, Scalar) else item


def _channels(weight, geometry):
    return weight.shape[1] * geometry.get("groups", 1) if weight.dim() == 4 else None


def _norm_fits(input, channels, num_groups, *tensors):
    return (
        channels is not None
        and num_groups > 0
        and channels % num_groups == 0
        and all(tensor is None or (like(tensor, input) and tensor.shape == (channels,)) for tensor in tensors)
    )
