"""Shape rules of group normalisation, and the two memory layouts its kernels know."""

import math
import operator
from dataclasses import dataclass

import numpy as np

from ..runtime import check_out
from .layout import copy

FLOAT64 = np.dtype("float64")


@dataclass(frozen=True)
class Sizes:
    """A normalisation's sizes: an input of `batch` images, `channels` channels, `spatial` elements in each."""

    batch: int
    channels: int
    spatial: int
    num_groups: int

    @classmethod
    def of(cls, input_shape, num_groups, weight_shape=None, bias_shape=None):
        """The sizes for an input (N, C, *), checked as torch.nn.functional.group_norm checks them.

        Raises:
            TypeError: num_groups is no int.
            ZeroDivisionError: num_groups is 0.
            RuntimeError: less than 2 dimensions, num_groups negative or no divisor of C, weight or bias not (C,).
            ValueError: groups of one value each, all in one (there is nothing to normalise).
        """
        shape = tuple(input_shape)
        num_groups = cls.check_num_groups(num_groups)
        if len(shape) < 2:
            raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {len(shape)}")
        if num_groups == 0:
            raise ZeroDivisionError("Expected num_groups to be greater than 0, got 0")
        batch, channels, spatial = shape[0], shape[1], math.prod(shape[2:])
        if batch * channels // num_groups * spatial == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")
        if num_groups < 0:
            raise RuntimeError(f"Expected num_groups to be greater than 0, got {num_groups}")
        if channels % num_groups:
            raise RuntimeError(
                "Expected number of channels in input to be divisible by num_groups, but got input of shape "
                f"{list(shape)} and num_groups={num_groups}"
            )
        for name, vector in (("weight", weight_shape), ("bias", bias_shape)):
            if vector is not None and tuple(vector) != (channels,):
                raise RuntimeError(
                    f"Expected {name} to be a vector of size equal to the number of channels in input, but got {name} "
                    f"of shape {list(vector)} and input of shape {list(shape)}"
                )
        return cls(batch, channels, spatial, num_groups)

    @staticmethod
    def check_num_groups(num_groups):
        """num_groups as an int. Raises TypeError for what is none."""
        try:
            return operator.index(num_groups)
        except TypeError:
            raise TypeError(
                f"group_norm(): argument 'num_groups' must be int, not {type(num_groups).__name__}"
            ) from None

    @property
    def channels_per_group(self):
        return self.channels // self.num_groups

    @property
    def group_size(self):
        """Elements that are normalised together."""
        return self.channels_per_group * self.spatial

    @property
    def statistics_shape(self):
        return self.batch, self.num_groups

    @property
    def is_empty(self):
        return self.batch * self.channels * self.spatial == 0


def check_eps(eps):
    """`eps` as a float. Raises TypeError for what is no number."""
    try:
        return float(eps)
    except (TypeError, ValueError):
        raise TypeError(f"group_norm(): argument 'eps' must be float, not {type(eps).__name__}") from None


def layout_of(array):
    """One of "contiguous", "channels_last" (of 4 or 5 dimensions), None (any other)."""
    if array.flags.c_contiguous:
        return "contiguous"
    if array.ndim in (4, 5) and array.transpose(0, *range(2, array.ndim), 1).flags.c_contiguous:
        return "channels_last"
    return None


def check_layout(array, name):
    """Raises ValueError for an array of a layout that the kernels do not write."""
    if layout_of(array) is None:
        raise ValueError(
            f"{name} must be contiguous or channels-last, got strides {array.strides}, shape {array.shape}"
        )


def is_channels_last(array):
    return layout_of(array) == "channels_last"


def arranged(queue, array, channels_last):
    """The array itself if it has the layout, else a copy that has; None stays None."""
    if array is None or layout_of(array) == ("channels_last" if channels_last else "contiguous"):
        return array
    return copy(queue, empty(queue, array.shape, array.dtype, channels_last), array)


def arranged_with(queue, input, out, wanted=True):
    """Input and output of one layout: the output's if there is one, else the input's."""
    if not wanted:
        return arranged(queue, input, is_channels_last(input)), None
    if out is None:
        out = empty(queue, input.shape, input.dtype, is_channels_last(input))
    check_out(out, input.shape, input.dtype, queue.device)
    check_layout(out, "out")
    return arranged(queue, input, is_channels_last(out)), out


def empty(queue, shape, dtype, channels_last):
    if not channels_last:
        return queue.empty(shape, dtype)
    batch, channels, *spatial = shape
    return queue.empty((batch, *spatial, channels), dtype).transpose(0, len(shape) - 1, *range(1, len(shape) - 1))


def channel_vector(queue, sizes, array, dtype, name):
    array = queue.empty((sizes.channels,), dtype) if array is None else array
    check_out(array, (sizes.channels,), dtype, queue.device, name)
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.strides}")
    return array


def statistics_arrays(queue, sizes, mean, rstd):
    """mean and rstd, new where they are None. Raises ValueError if one does not fit."""
    arrays = []
    for name, array in (("mean", mean), ("rstd", rstd)):
        array = queue.empty(sizes.statistics_shape, FLOAT64) if array is None else array
        check_statistics(queue, sizes, array, name)
        arrays.append(array)
    return arrays


def check_statistics(queue, sizes, array, name):
    check_out(array, sizes.statistics_shape, FLOAT64, queue.device, name)
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.strides}")


def check_gradient(queue, sizes, grad_output, input, mean, rstd):
    if tuple(grad_output.shape) != tuple(input.shape):
        raise RuntimeError(f"expected grad_output of shape {list(input.shape)}, but got {list(grad_output.shape)}")
    check_statistics(queue, sizes, mean, "mean")
    check_statistics(queue, sizes, rstd, "rstd")


def shapes_of(*arrays):
    return [None if array is None else array.shape for array in arrays]
