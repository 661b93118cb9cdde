"""Shape rules of the transposed convolution, written once: for launchers, autograd and modules."""

import functools
import math
import operator
from dataclasses import dataclass


def pair(value, name):
    """`value`, an int or a sequence of one or two, as a pair of ints. Raises TypeError or RuntimeError, as torch."""
    if type(value) is int:  # the common cases first
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (tuple, list)):
        values = tuple(_int(item, name, "tuple of ints") for item in value)
        if len(values) not in (1, 2):
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 2 values to match the convolution "
                f"dimensions, but got {name}={list(values)}"
            )
        return values * (3 - len(values))
    value = _int(value, name, "tuple of ints")
    return value, value


def check_groups(groups):
    """The number of groups as an int. Raises TypeError for what is none."""
    return groups if type(groups) is int else _int(groups, "groups", "int")


def _int(value, name, expected):
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"conv_transpose2d(): argument '{name}' must be {expected}, not {type(value).__name__}")
    return operator.index(value)


@dataclass(frozen=True)
class Geometry:
    """A transposed convolution's sizes and parameters; every pair is (height, width).

    output_size = (input_size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    """

    batch: int
    in_channels: int
    out_channels: int
    input_size: tuple
    kernel: tuple
    stride: tuple
    padding: tuple
    output_padding: tuple
    dilation: tuple
    groups: int

    @classmethod
    def of(cls, input_shape, weight_shape, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        """The geometry for a 4-D input (N, C_in, H, W) and weight (C_in, C_out / groups, kH, kW).

        Raises RuntimeError for what torch refuses: ranks, channel counts, groups that do not divide, negative sizes, an
        output_padding not smaller than stride or dilation, an output without elements; TypeError for what is no int.
        """
        if len(input_shape) != 4:
            raise RuntimeError(
                "Expected 3D (unbatched) or 4D (batched) input to conv_transpose2d, but got input of size: "
                f"{list(input_shape)}"
            )
        if len(weight_shape) != 4:
            raise RuntimeError(
                "expected weight of 4 dimensions (in_channels, out_channels / groups, kH, kW), but got weight of size "
                f"{list(weight_shape)}"
            )
        stride, padding = pair(stride, "stride"), pair(padding, "padding")
        output_padding, dilation = pair(output_padding, "output_padding"), pair(dilation, "dilation")
        groups = check_groups(groups)
        arguments = tuple(input_shape), tuple(weight_shape), stride, padding, output_padding, groups, dilation
        symbolic = any(type(size) is not int for size in (*input_shape, *weight_shape))  # sizes of a traced program
        return cls._new(*arguments) if symbolic else cls._of(*arguments)

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def _of(cls, *arguments):
        return cls._new(*arguments)

    @classmethod
    def _new(cls, input_shape, weight_shape, stride, padding, output_padding, groups, dilation):
        geometry = cls(
            batch=input_shape[0],
            in_channels=input_shape[1],
            out_channels=weight_shape[1] * max(groups, 0),
            input_size=tuple(input_shape[2:]),
            kernel=tuple(weight_shape[2:]),
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
        )
        geometry._check(list(input_shape), list(weight_shape))
        return geometry

    def _check(self, input_shape, weight_shape):
        if min(self.padding) < 0:
            raise RuntimeError(f"negative padding is not supported, got padding={self.padding}")
        if min(self.output_padding) < 0:
            raise RuntimeError(f"negative output_padding is not supported, got output_padding={self.output_padding}")
        if min(self.stride) < 1:
            raise RuntimeError(f"non-positive stride is not supported, got stride={self.stride}")
        if min(self.dilation) < 1:
            raise RuntimeError(f"non-positive dilation is not supported, got dilation={self.dilation}")
        if self.groups < 1:
            raise RuntimeError(f"non-positive groups is not supported, got groups={self.groups}")
        # Sizes are compared one by one: of a traced program's sizes it must not be asked which is the smallest.
        if weight_shape[0] < 1 or weight_shape[0] % self.groups:
            raise RuntimeError(
                f"Given groups={self.groups}, expected weight to be at least 1 and divisible by {self.groups} at "
                f"dimension 0, but got weight of size {weight_shape}"
            )
        if any(size < 1 for size in weight_shape):
            raise RuntimeError(f"expected weight without empty dimensions, but got weight of size {weight_shape}")
        if self.in_channels != weight_shape[0]:
            raise RuntimeError(
                f"Given transposed=1, weight of size {weight_shape}, expected input{input_shape} to have "
                f"{weight_shape[0]} channels, but got {self.in_channels} channels instead"
            )
        if any(size < 1 for size in self.input_size):
            raise RuntimeError(f"Only zero batch inputs are supported, but got input shape: {input_shape}")
        if any(o >= s and o >= d for o, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True)):
            raise RuntimeError(
                "output padding must be smaller than either stride or dilation, but got "
                f"output_padding={self.output_padding}, stride={self.stride}, dilation={self.dilation}"
            )
        if any(size < 1 for size in self.output_size):
            raise RuntimeError(
                f"Given input size per channel: {self.input_size}. Calculated output size per channel: "
                f"{self.output_size}. Output size is too small"
            )
        extents = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        sizes = (*self.input_shape, *self.output_shape, *self.padding, *self.stride, *self.dilation, *extents)
        if any(type(size) is int and size >= 2**29 for size in sizes):  # symbols: when the program runs
            raise RuntimeError("sizes of 2**29 and more along one dimension are not supported")

    @functools.cached_property
    def output_size(self):
        return tuple(
            (size - 1) * s - 2 * p + d * (k - 1) + o + 1
            for size, s, p, d, k, o in zip(
                self.input_size, self.stride, self.padding, self.dilation, self.kernel, self.output_padding, strict=True
            )
        )

    @functools.cached_property
    def input_shape(self):
        return (self.batch, self.in_channels, *self.input_size)

    @functools.cached_property
    def output_shape(self):
        return (self.batch, self.out_channels, *self.output_size)

    @functools.cached_property
    def weight_shape(self):
        return (self.in_channels, self.out_channels // self.groups, *self.kernel)

    def depth_and_rows(self, transposed):
        """Channels of a group that a kernel sums over, and channels of a group that it computes."""
        in_channels, out_channels = self.in_channels // self.groups, self.out_channels // self.groups
        return (in_channels, out_channels) if transposed else (out_channels, in_channels)

    def check_bias(self, shape):
        """Raises RuntimeError unless `shape` is (C_out,)."""
        if tuple(shape) != (self.out_channels,):
            raise RuntimeError(
                f"Given transposed=1, weight of size {list(self.weight_shape)}, expected bias to be 1-dimensional with "
                f"{self.out_channels} elements, but got bias of size {list(shape)} instead"
            )

    @functools.lru_cache(maxsize=4096)  # noqa: B019  a geometry is a small value, and the cache bounded
    def axis(self, index, transposed):
        """The fields of `Axis` in axis.cuh for height (0) or width (1): in and out as the kernel gathers."""
        sizes = self.input_size[index], self.output_size[index]
        stride, dilation = self.stride[index], self.dilation[index]
        common = math.gcd(stride, dilation)
        period = stride // common
        inverse = pow(dilation // common, -1, period) if period > 1 else 0
        sizes = sizes if transposed else sizes[::-1]
        return (*sizes, self.kernel[index], stride, self.padding[index], dilation, common, inverse)


def check_shape(name, array, shape):
    """Raises RuntimeError unless the array called `name` has this shape."""
    if tuple(array.shape) != tuple(shape):
        raise RuntimeError(f"expected {name} of shape {list(shape)}, but got {list(array.shape)}")
