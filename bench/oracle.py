"""What the right answer is: float64 on slices, by gathering, straight from the definitions.

All functions take and return float64 arrays of one library (NumPy or CuPy). A `Rounding` goes through all that round:
`EXACT` changes nothing; `modelled(mode)` rounds operands, sums and stored values as an honest computation in that mode
may. The distance between the two is what a result may be away from the exact one (see guards.py), so every op's limit
follows from its own data instead of from a tolerance somebody chose.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .data import random_bits, to_float64

_MANTISSA = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_TF32_MANTISSA = 11


@dataclass(frozen=True)
class Rounding:
    """Significant bits kept at each place; None keeps all.

    Attributes:
        operand_bits: of the factors of a product of the matrix unit.
        sum_bits: of values as they are computed, before the loss that a long sum adds.
        store_bits: of what is stored in the element type.
    """

    operand_bits: int | None = None
    sum_bits: int | None = None
    store_bits: int | None = None

    def operand(self, x):
        return _round(x, self.operand_bits)

    def computed(self, x, terms=1):
        """A sum of `terms` products. Errors of random sign grow by sqrt(terms) where one accumulator takes all of them,
        less where partial sums are combined, as they must be for long sums: terms ** 0.25 lies between."""
        return x if self.sum_bits is None else _perturb(x, self.sum_bits - 0.25 * math.log2(max(terms, 1)))

    def stored(self, x):
        return x if self.store_bits is None else _perturb(x, self.store_bits)


EXACT = Rounding()


def modelled(mode):
    """What an honest computation in `mode` may do: see data.MODES."""
    dtype, _, precision = mode.partition("/")
    bits = _MANTISSA[dtype]
    sums = 53 if dtype == "float64" else 24
    operands = bits - 2  # float32 operands that are split for the tensor cores lose a bit or two
    if precision == "tf32":
        operands = _TF32_MANTISSA
    elif dtype in ("float16", "bfloat16"):  # their products are exact
        operands = None
    return Rounding(operand_bits=operands, sum_bits=sums - 2, store_bits=bits)


def _round(x, bits):
    """x rounded to nearest with `bits` significant bits."""
    if bits is None or bits >= 53:
        return x
    xp = library(x)
    mantissa, exponent = xp.frexp(x)
    return xp.ldexp(xp.rint(mantissa * 2.0**bits) * 2.0**-bits, exponent)


def _perturb(x, bits):
    """x with errors of random sign, each as large as rounding to `bits` bits makes on average (0.4 units)."""
    xp = library(x)
    negative = (random_bits(xp, 0, x.size, 1) & np.uint64(1)).reshape(x.shape)
    return x * (1 + 0.4 * 2.0**-bits * (1 - 2 * negative.astype(np.float64)))


def library(x):
    """NumPy or CuPy, whichever the array belongs to."""
    if isinstance(x, np.ndarray):
        return np
    import cupy

    return cupy


# Transposed convolution and its gradients ---------------------------------------------------------------------------


def _taps(axis, outputs):
    """For each tap of an axis: (tap, positions among `outputs`, inputs), where that tap connects the two.

    `axis` is a bench.convolutions.Axis, `outputs` a range of output positions.
    """
    outputs = np.asarray(outputs)
    for tap in range(axis.kernel):
        shifted = outputs + axis.padding - tap * axis.dilation
        inputs = shifted // axis.stride
        places = np.flatnonzero((shifted % axis.stride == 0) & (inputs >= 0) & (inputs < axis.size))
        if len(places):
            yield tap, places, inputs[places]


def _part(array, ranges, rounding):
    """The smallest block of an image's rows that holds all of `ranges` (integer arrays), as operands; and its start."""
    first = min((int(rows[0]) for rows in ranges), default=0)
    last = max((int(rows[-1]) for rows in ranges), default=-1)
    return rounding.operand(to_float64(array[:, first : last + 1])), first


def _pick(xp, block, rows, columns):
    """block[:, rows, columns] as (channels, len(rows) * len(columns))."""
    return block[:, xp.asarray(rows)[:, None], xp.asarray(columns)[None, :]].reshape(block.shape[0], -1)


def _product(xp, a, b):
    """Matrix products of float64 stacks; where CuPy finds no cuBLAS, by the definition."""
    try:
        return xp.matmul(a, b)
    except (ImportError, OSError):
        return sum(a[:, :, k, None] * b[:, None, k, :] for k in range(b.shape[1]))


def convolution_rows(conv, image, weight, bias, rows, rounding):
    """Output rows `rows` (a range) of one image: (C_out, len(rows), W_out), without what an epilogue does.

    Args:
        image: (C_in, H, W); weight: (C_in, C_out / groups, kH, kW); bias: (C_out,) or None; any float dtype.
    """
    xp = library(image)
    weight = rounding.operand(to_float64(weight))
    groups, depth, width = conv.groups, conv.in_channels // conv.groups, conv.out_channels // conv.groups
    result = xp.zeros((conv.out_channels, len(rows), conv.out_size[1]))
    columns = range(conv.out_size[1])
    vertical, horizontal = list(_taps(conv.axes[0], rows)), list(_taps(conv.axes[1], columns))
    block, first = _part(image, [hi for _, _, hi in vertical], rounding)
    for kh, ho, hi in vertical:
        for kw, wo, wi in horizontal:
            x = _pick(xp, block, hi - first, wi).reshape(groups, depth, -1)
            w = weight[:, :, kh, kw].reshape(groups, depth, width).transpose(0, 2, 1)
            product = _product(xp, w, x).reshape(conv.out_channels, len(ho), len(wo))
            result[:, xp.asarray(ho)[:, None], xp.asarray(wo)[None, :]] += product
    if bias is not None:
        result += to_float64(bias)[:, None, None]
    return rounding.computed(result, depth * conv.taps_per_output)


def input_gradient_rows(conv, grad_image, weight, rows, rounding):
    """Rows `rows` of one image's input gradient, (C_in, len(rows), W), from its grad_output (C_out, H_out, W_out)."""
    xp = library(grad_image)
    weight = rounding.operand(to_float64(weight))
    groups, depth, width = conv.groups, conv.in_channels // conv.groups, conv.out_channels // conv.groups
    result = xp.zeros((conv.in_channels, len(rows), conv.size[1]))
    vertical = list(_inverse_taps(conv.axes[0], rows))
    horizontal = list(_inverse_taps(conv.axes[1], range(conv.size[1])))
    block, first = _part(grad_image, [ho for _, _, ho in vertical], rounding)
    for kh, hi, ho in vertical:
        for kw, wi, wo in horizontal:
            g = _pick(xp, block, ho - first, wo).reshape(groups, width, -1)
            w = weight[:, :, kh, kw].reshape(groups, depth, width)
            product = _product(xp, w, g).reshape(conv.in_channels, len(hi), len(wi))
            result[:, xp.asarray(hi)[:, None], xp.asarray(wi)[None, :]] += product
    return rounding.computed(result, width * math.prod(conv.kernel))


def _inverse_taps(axis, inputs):
    """For each tap: (tap, positions among `inputs`, outputs)."""
    inputs = np.asarray(inputs)
    for tap in range(axis.kernel):
        outputs = inputs * axis.stride - axis.padding + tap * axis.dilation
        places = np.flatnonzero((outputs >= 0) & (outputs < axis.out_size))
        if len(places):
            yield tap, places, outputs[places]


def weight_gradient_rows(conv, input, grad_output, channel, columns, rounding):
    """grad_weight[channel, columns]: (len(columns), kH, kW), summed over all images.

    Args:
        channel: an input channel; columns: output channels within its group.
        grad_output: (N, C_out, H_out, W_out), or a dict of the channels that are needed, each (N, H_out, W_out).
    """
    xp = library(input)
    group = channel // (conv.in_channels // conv.groups)
    outputs = [group * (conv.out_channels // conv.groups) + column for column in columns]
    images = rounding.operand(to_float64(input[:, channel]))
    grads = [rounding.operand(to_float64(_channel(grad_output, output))) for output in outputs]
    result = xp.zeros((len(columns), *conv.kernel))
    for kh, hi, ho in _inverse_taps(conv.axes[0], range(conv.size[0])):
        for kw, wi, wo in _inverse_taps(conv.axes[1], range(conv.size[1])):
            x = _pick(xp, images, hi, wi)
            for i, grad in enumerate(grads):
                result[i, kh, kw] = (x * _pick(xp, grad, ho, wo)).sum()
    return rounding.computed(result, conv.batch * math.prod(conv.size))


def _channel(array, number):
    return array[number] if isinstance(array, dict) else array[:, number]


# Pointwise functions -------------------------------------------------------------------------------------------------


@functools.cache
def _erf(xp):
    if xp is np:
        function = np.frompyfunc(math.erf, 1, 1)
        return lambda x: function(x).astype(np.float64)
    return xp.ElementwiseKernel("float64 x", "float64 y", "y = erf(x)", "bench_erf")


def gelu(x):
    return 0.5 * x * (1 + _erf(library(x))(x * math.sqrt(0.5)))


def gelu_derivative(x):
    xp = library(x)
    return 0.5 * (1 + _erf(xp)(x * math.sqrt(0.5))) + x * xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _sigmoid(x):
    return 1 / (1 + library(x).exp(-x))


#: (value, derivative) by name of the class in rawkern.epilogue, for those the problems use.
FUNCTIONS = {
    "Add": (lambda x, other: x + other, lambda x, other: 1.0 + 0 * x),
    "Mul": (lambda x, other: x * other, lambda x, other: other + 0 * x),
    "Minimum": (lambda x, other: library(x).minimum(x, other), lambda x, other: (x < other) + 0.5 * (x == other)),
    "Clamp": (
        lambda x, low, high: library(x).clip(x, low, high),
        lambda x, low, high: ((x >= low) & (x <= high)) * 1.0,
    ),
    "GELU": (gelu, gelu_derivative),
    "SiLU": (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
    "Tanh": (lambda x: library(x).tanh(x), lambda x: 1 - library(x).tanh(x) ** 2),
}


def chain_value(functions, x, rounding):
    """The chain of rawkern.epilogue functions with numbers as operands."""
    for function in functions:
        x = rounding.computed(FUNCTIONS[type(function).__name__][0](x, *function.numbers))
    return x


def chain_derivative(functions, x, rounding):
    """Its derivative by x, the product of those of its parts."""
    slope = 1.0
    for function in functions:
        value, derivative = FUNCTIONS[type(function).__name__]
        slope = rounding.computed(slope * derivative(x, *function.numbers))
        x = rounding.computed(value(x, *function.numbers))
    return slope


# Group normalisation --------------------------------------------------------------------------------------------------


def group_norm_image(x, groups, weight, bias, eps):
    """One image (C, ...) normalised over groups of channels."""
    xp = library(x)
    grouped = x.reshape(groups, -1)
    mean = grouped.mean(axis=1, keepdims=True)
    variance = xp.square(grouped - mean).mean(axis=1, keepdims=True)
    return _affine(((grouped - mean) / xp.sqrt(variance + eps)).reshape(x.shape), weight, bias)


def group_norm_image_gradient(grad, x, mean, rstd, weight):
    """One image's input gradient from its statistics mean and rstd (groups,): (C, ...)."""
    groups = mean.shape[0]
    weighted = _affine(grad, weight, None).reshape(groups, -1)
    normal = normalised(x, mean, rstd).reshape(groups, -1)
    average, slope = weighted.mean(axis=1, keepdims=True), (weighted * normal).mean(axis=1, keepdims=True)
    return (rstd[:, None] * (weighted - average - normal * slope)).reshape(x.shape)


def normalised(x, mean, rstd):
    """(x - mean) * rstd for one image (C, ...) and its groups' statistics."""
    grouped = x.reshape(mean.shape[0], -1)
    return ((grouped - mean[:, None]) * rstd[:, None]).reshape(x.shape)


def _affine(x, weight, bias):
    shape = (-1,) + (1,) * (x.ndim - 1)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)
