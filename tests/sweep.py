"""Runs launchers forward and backward on small odd arrays, for their memory accesses, not for their results.

`python tests/sweep.py OP ...` runs the named ones (all without arguments); test_sanitizer.py does so under
AddressSanitizer, test_compile.py to see which instantiations are launched. With RAWKERN_SWEEP_DEVICE=cuda arrays are
CuPy's, for `compute-sanitizer --tool memcheck` (racecheck, synccheck, initcheck).
"""

import contextlib
import functools
import itertools
import os
import sys

import numpy as np

from rawkern import epilogue, runtime
from rawkern.launchers import block_math, repeat
from rawkern.launchers import conv_transpose2d_direct as direct
from rawkern.launchers import conv_transpose2d_direct_matrix as matrix
from rawkern.launchers import conv_transpose2d_direct_tile as tile
from rawkern.launchers import conv_transpose2d_direct_walk_weight_gradient as walk_gradient
from rawkern.launchers import conv_transpose2d_warpgroup as warpgroup
from rawkern.launchers import conv_transpose2d_weight_gradient_taps as taps
from rawkern.launchers.chain import chain_of
from rawkern.launchers.channel_sum import channel_sum
from rawkern.launchers.conv_transpose2d import (
    channel_min,
    conv_transpose2d,
    input_gradient,
    weight_gradient,
    with_moments,
)
from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm as fused_norm_conv_transpose2d_gelu_group_norm,
)
from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm_backward as fused_norm_conv_transpose2d_gelu_group_norm_backward,
)
from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import conv_bias_gradient as fused_min_conv_bias_gradient
from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import (
    conv_transpose2d_min_sum_gelu_add as fused_min_conv_transpose2d_min_sum_gelu_add,
)
from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import input_gradient as fused_min_input_gradient
from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import weight_gradient as fused_min_weight_gradient
from rawkern.launchers.gelu import gelu, gelu_backward, gelu_double_backward
from rawkern.launchers.gelu_group_norm import gelu_group_norm, gelu_group_norm_backward
from rawkern.launchers.geometry import Geometry
from rawkern.launchers.group_norm import group_norm, group_norm_backward, group_norm_double_backward
from rawkern.launchers.min_sum_gelu_add import bias_gradient as min_sum_bias_gradient
from rawkern.launchers.min_sum_gelu_add import input_gradient as min_sum_input_gradient
from rawkern.launchers.min_sum_gelu_add import min_sum_gelu_add as min_sum_min_sum_gelu_add
from rawkern.launchers.min_sum_gelu_add import sum_gradient as min_sum_sum_gradient
from rawkern.launchers.pointwise import pointwise, pointwise_backward, pointwise_double_backward
from rawkern.runtime.emulator import Emulator

MOMENTS = chain_of((epilogue.GELU(),))
DTYPES = tuple(runtime.CPP_TYPES)


if os.environ.get("RAWKERN_SWEEP_DEVICE") == "cuda":
    import cupy as xp
else:
    xp = np


def numbers(shape, dtype, seed=0):
    array = np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    return array if xp is np else xp.asarray(_bits(array)).view(dtype)


def _bits(array):
    """Numbers of a type that every array library can copy."""
    return array.view(f"u{array.itemsize}")


def empty(shape, dtype=np.float64):
    return xp.empty(shape, dtype)


def zeros(shape, dtype):
    """What is copied before it is written: nothing that initcheck would complain of."""
    return xp.zeros(shape, f"u{np.dtype(dtype).itemsize}").view(dtype)


def contiguous(array):
    return _bits(array).copy().view(array.dtype)


def channels_last(array):
    """The same values in channels-last memory."""
    order = (0, *range(2, array.ndim), 1)
    return _bits(array).transpose(order).copy().view(array.dtype).transpose(np.argsort(order).tolist())


def strided(array):
    """The same values with holes between them."""
    wide = xp.full((*array.shape, 2), -1, f"i{array.itemsize}").view(f"u{array.itemsize}")  # no numbers
    wide[..., 0] = _bits(array)
    return wide.view(array.dtype)[..., 0]


#: (N, C_in, H, W), (C_in, C_out / groups, kH, kW), stride, padding, output_padding, groups, dilation
CONVOLUTIONS = (
    ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 0, 1, 1),
    ((2, 3, 5, 4), (3, 5, 3, 3), 2, 1, 1, 1, 1),
    ((1, 6, 3, 7), (6, 3, 2, 4), (3, 2), (0, 1), (2, 0), 3, (1, 2)),
    ((3, 4, 6, 2), (4, 1, 5, 1), (1, 5), (2, 0), (0, 3), 4, 1),
)
LARGER = ((1, 9, 9, 16), (9, 70, 1, 2), 1, 0, 0, 1, 2)
LONGER = ((1, 38, 5, 9), (38, 70, 3, 3), 1, 1, 0, 1, 1)  # sums of more than 256 products, whole slabs and parts of one


@contextlib.contextmanager
def direct_kernels(few_channels=None, min_products=None):
    """Where the direct kernels are taken, other than by default: see conv_transpose2d_direct.py."""
    kept = direct.few_channels, direct.MIN_PRODUCTS
    try:
        direct.few_channels = few_channels or kept[0]
        direct.MIN_PRODUCTS = kept[1] if min_products is None else min_products
        _forget_plans()
        yield
    finally:
        direct.few_channels, direct.MIN_PRODUCTS = kept
        _forget_plans()


def _forget_plans():
    repeat.forget_plans()
    direct.direct_plan.cache_clear()
    direct.direct_weight_gradient_plan.cache_clear()


@contextlib.contextmanager
def architecture(name):
    """Kernels are chosen as on a GPU of this architecture, those of warpgroups also where others are faster. A GPU of
    another architecture does so as well as it can: Hopper can leave out the kernels of warpgroups."""
    kept = Emulator.arch, warpgroup.plan, warpgroup.is_faster, taps.products_for
    try:
        Emulator.arch = name
        warpgroup.is_faster = lambda *_: True
        if name != "sm_90a":
            warpgroup.plan = lambda *_, **__: None
            taps.products_for = lambda geometry, dtype, precision, _: kept[3](geometry, dtype, precision, name)
        repeat.forget_plans()
        yield
    finally:
        Emulator.arch, warpgroup.plan, warpgroup.is_faster, taps.products_for = kept
        repeat.forget_plans()


def sweep_conv_transpose2d():
    """By implicit GEMMs of warps and threads."""
    with direct_kernels(lambda geometry: False), architecture("sm_80"):
        _sweep_convolutions(CONVOLUTIONS)


#: For the kernels of warpgroups: strides from 1 to 5, several slabs and units of channels, groups, a dilation.
WARPGROUP_CONVOLUTIONS = (
    ((2, 20, 5, 9), (20, 70, 3, 3), 1, 1, 0, 1, 1),
    ((2, 130, 4, 5), (130, 17, 4, 4), 2, 1, 1, 1, 1),
    ((1, 36, 3, 7), (36, 6, 2, 5), (3, 4), (0, 1), (2, 0), 3, (1, 2)),
    ((1, 18, 3, 2), (18, 9, 5, 1), 5, (2, 0), (0, 3), 2, 1),
    ((3, 2, 1, 1), (2, 1, 1, 1), 1, 0, 0, 2, 1),
    ((2, 16, 2, 33), (16, 16, 3, 3), (2, 4), 1, 1, 1, 1),
    ((1, 70, 2, 95), (70, 5, 2, 3), 1, (0, 1), 0, 1, 1),
    ((1, 66, 2, 40), (66, 5, 1, 3), 1, 0, 0, 1, 1),
    ((2, 24, 3, 16), (24, 16, 4, 4), 2, 1, 0, 1, 1),
)


def _sweep_warpgroups(dtype, *precisions):
    with direct_kernels(lambda geometry: False), architecture("sm_90a"):
        _sweep_convolutions(WARPGROUP_CONVOLUTIONS, [np.dtype(dtype)], precisions)


def sweep_conv_transpose2d_warpgroup_tf32():
    """By products of warpgroups: float32 in TF32."""
    _sweep_warpgroups("float32", "tf32")


def sweep_conv_transpose2d_warpgroup_split():
    """float32 split in two."""
    _sweep_warpgroups("float32", "ieee")


def sweep_conv_transpose2d_warpgroup_float16():
    _sweep_warpgroups("float16")


def sweep_conv_transpose2d_warpgroup_bfloat16():
    _sweep_warpgroups(runtime.bfloat16)


def sweep_conv_transpose2d_direct():
    """By the kernel for all shapes, and by kernels for one."""
    _sweep_convolutions(CONVOLUTIONS)
    with direct_kernels(min_products=0):
        _sweep_convolutions(tile.EXAMPLES, [dtype for dtype in DTYPES if dtype != runtime.bfloat16])
        for dtype, case in itertools.product(map(np.dtype, ("float32", "float16")), walk_gradient.EXAMPLES):
            geometry = Geometry.of(*case)
            input, grad = numbers(geometry.input_shape, dtype), numbers(geometry.output_shape, dtype, 1)
            for arrange in (contiguous, channels_last, strided):
                weight_gradient(arrange(input), arrange(grad), geometry)


def sweep_conv_transpose2d_direct_matrix():
    """The weight gradient for few channels on tensor cores."""
    with direct_kernels(min_products=0):
        for case, dtype in itertools.product(matrix.EXAMPLES, matrix.DTYPES):
            geometry = Geometry.of(*case)
            input, grad = numbers(geometry.input_shape, dtype), numbers(geometry.output_shape, dtype, 1)
            for arrange in (contiguous, channels_last, strided):
                weight_gradient(arrange(input), arrange(grad), geometry, precision="tf32")


def _sweep_convolutions(convolutions, dtypes=DTYPES, precisions=("ieee", "tf32")):
    model = (epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0))
    for dtype, (index, case) in itertools.product(dtypes, enumerate(convolutions)):
        input_shape, weight_shape, *rest = case
        geometry = Geometry.of(input_shape, weight_shape, *rest)
        input, weight = numbers(input_shape, dtype), numbers(weight_shape, dtype, 1)
        bias, grad = numbers(geometry.out_channels, dtype, 2), numbers(geometry.output_shape, dtype, 3)
        for precision in precisions if dtype == np.float32 else ("ieee",):
            options = dict(precision=precision)
            conv_transpose2d(input, weight, bias, *rest, epilogue=model if index % 2 else (), **options)
            conv_transpose2d(channels_last(input), strided(weight), None, *rest, **options)
            input_gradient(grad, weight, geometry, **options)
            input_gradient(channels_last(grad), strided(weight), geometry, **options)
            weight_gradient(input, grad, geometry, **options)
            weight_gradient(channels_last(input), channels_last(grad), geometry, **options)
            weight_gradient(strided(input), channels_last(grad), geometry, **options)
            channel_min(input, weight, bias, geometry, **options)
            with_moments(input, weight, bias, MOMENTS, geometry, **options)


def sweep_conv_transpose2d_blocks():
    """Every size of block, also where the launcher would not choose it."""
    with direct_kernels(lambda geometry: False), architecture("sm_80"):
        _sweep_blocks()


def _sweep_blocks():
    choose = block_math.choose
    try:
        for (dtype, tensor_core), candidates in block_math.all_choices():
            if dtype == runtime.bfloat16:
                continue  # the blocks of float16
            input_shape, weight_shape, *rest = LONGER if candidates is block_math.LONG_SUM_CHOICES else LARGER
            geometry = Geometry.of(input_shape, weight_shape, *rest)
            input, weight = numbers(input_shape, dtype), numbers(weight_shape, dtype, 1)
            grad = numbers(geometry.output_shape, dtype, 3)
            precision = "tf32" if tensor_core else "ieee"
            for wanted in candidates:
                block_math.choose = functools.partial(_choose, choose, wanted)
                repeat.forget_plans()
                conv_transpose2d(input, weight, None, *rest, precision=precision)
                input_gradient(grad, weight, geometry, precision=precision)
            for wanted in block_math.weight_gradient_choices(dtype, precision):
                block_math.choose = functools.partial(_choose, choose, wanted)
                weight_gradient(input, grad, geometry, precision=precision)
    finally:
        block_math.choose = choose
        repeat.forget_plans()


def sweep_conv_transpose2d_weight_gradient():
    """On tensor cores: each kind of instruction and way of staging, with channels and pixels that end in a tile."""
    float32, float16 = np.dtype("float32"), np.dtype("float16")
    products = ("sm_90a", float32, "tf32"), ("sm_90a", float16, None), ("sm_90a", float32, "ieee")
    products += ("sm_80", float32, "tf32"), ("sm_80", float16, None)
    cases = (  # width, kernel, stride, padding, arrangement
        (9, (3, 3), 1, 1, contiguous),
        (9, (3, 3), 1, 1, channels_last),
        (9, (1, 1), 1, 0, contiguous),
        (64, (3, 5), 1, 1, contiguous),
        *((64, (3, 3), stride, padding, contiguous) for stride in (1, 2) for padding in (0, 1)),
        *((64, (kernel, kernel), 2, padding, contiguous) for kernel in (2, 4) for padding in (0, 1)),
        *((49, (kernel, kernel), stride, 1, contiguous) for kernel, stride in ((3, 1), (3, 2), (4, 2))),  # any rows
    )
    for (arch, dtype, precision), (width, kernel, stride, padding, arrange) in itertools.product(products, cases):
        shapes = (2, 70, 5, width), (70, 22, *kernel)
        output_padding = (0, int(stride == 2 and kernel[1] == 3))  # for an even width
        geometry = Geometry.of(*shapes, (1, stride), (1, padding), output_padding)
        input, grad = numbers(geometry.input_shape, dtype), numbers(geometry.output_shape, dtype, 1)
        with architecture(arch):
            weight_gradient(arrange(input), arrange(grad), geometry, precision=precision)


def _choose(choose, wanted, candidates, *sizes):
    return wanted if wanted in candidates else choose(candidates, *sizes)


def sweep_conv_transpose2d_min_sum_gelu_add():
    for dtype, case in itertools.product(DTYPES, CONVOLUTIONS[1:]):
        input_shape, weight_shape, *rest = case
        geometry = Geometry.of(input_shape, weight_shape, *rest)
        input, weight = numbers(input_shape, dtype), numbers(weight_shape, dtype, 1)
        conv_bias, bias = numbers(geometry.out_channels, dtype, 2), numbers((3, 1, 1), dtype, 3)
        index = empty((geometry.batch, *geometry.output_size), np.int32)
        sums = empty((geometry.batch, geometry.output_size[1]), runtime.accumulator(dtype))
        out = fused_min_conv_transpose2d_min_sum_gelu_add(input, weight, conv_bias, bias, *rest, index=index, sums=sums)
        grad_sum = min_sum_sum_gradient(out, sums)
        for arrange in (contiguous, channels_last):
            fused_min_input_gradient(grad_sum, index, weight, geometry, out=arrange(zeros(input.shape, input.dtype)))
            fused_min_weight_gradient(grad_sum, index, arrange(input), geometry)
        fused_min_conv_bias_gradient(grad_sum, index, geometry, dtype)


def sweep_conv_transpose2d_gelu_group_norm():
    for dtype, case in itertools.product(DTYPES, CONVOLUTIONS[1:]):
        input_shape, weight_shape, *rest = case
        geometry = Geometry.of(input_shape, weight_shape, *rest)
        input, weight = numbers(input_shape, dtype), numbers(weight_shape, dtype, 1)
        bias, norm_weight = numbers(geometry.out_channels, dtype, 2), numbers(geometry.out_channels, dtype, 3)
        num_groups = next(n for n in (5, 3, 2, 1) if geometry.out_channels % n == 0)
        mean, rstd = empty((2, geometry.batch, num_groups))
        for arrange in (contiguous, channels_last):
            saved = arrange(zeros(geometry.output_shape, dtype))
            out = fused_norm_conv_transpose2d_gelu_group_norm(
                arrange(input),
                weight,
                bias,
                num_groups,
                norm_weight,
                bias,
                1e-5,
                *rest,
                saved=saved,
                mean=mean,
                rstd=rstd,
            )
            fused_norm_conv_transpose2d_gelu_group_norm_backward(
                out, input, weight, saved, mean, rstd, norm_weight, geometry
            )


def sweep_group_norm():
    """Group normalisation and its two derivatives, plain and with GELU before it."""
    shapes = ((2, 6), (3, 4, 5), (2, 6, 3, 7), (1, 8, 17, 33), (2, 4, 2, 3, 5), (1, 12, 1, 1), (5, 70, 3, 1))
    shapes += ((70, 96), (3, 16, 8, 8), (1, 2, 70, 80))  # two with vectors, one not held in registers
    for dtype, shape, arrange in itertools.product(DTYPES, shapes, (contiguous, channels_last, strided)):
        input, grad = arrange(numbers(shape, dtype)), arrange(numbers(shape, dtype, 1))
        weight = numbers(shape[1], dtype, 2)
        mean, rstd = empty((2, shape[0], 2))
        group_norm(input, 2, weight, weight, mean=mean, rstd=rstd)
        group_norm_backward(grad, input, mean, rstd, weight, grad_input_sum=numbers(shape[1], dtype))
        grads = dict(grad_grad_input=grad, grad_grad_weight=weight, grad_grad_bias=weight)
        group_norm_double_backward(grad, input, mean, rstd, weight, **grads)
        gelu_group_norm(input, 2, mean=mean, rstd=rstd)
        gelu_group_norm_backward(grad, input, mean, rstd)


def sweep_min_sum_gelu_add():
    shapes = ((1, 1, 1, 1), (2, 5, 3, 7), (3, 33, 9, 4), (1, 70, 2, 65))
    for dtype, shape, arrange in itertools.product(DTYPES, shapes, (contiguous, channels_last, strided)):
        batch, _, height, width = shape
        input = arrange(numbers(shape, dtype))
        index = empty((batch, height, width), np.int32)
        sums = empty((batch, width), runtime.accumulator(dtype))
        for bias_shape in ((1, 1, 1), (3, 1, 1), (batch, 1, 2, width), (2, 1, 1, 1, 1)):
            out = min_sum_min_sum_gelu_add(input, numbers(bias_shape, dtype, 1), index=index, sums=sums)
            grad_sum = min_sum_sum_gradient(out, sums)
            min_sum_bias_gradient(out, bias_shape)
        min_sum_input_gradient(grad_sum, index, shape, dtype)
        if arrange is channels_last:
            min_sum_input_gradient(grad_sum, index, shape, dtype, out=channels_last(zeros(shape, dtype)))


def sweep_pointwise():
    """Chains without and with tensors, and their two derivatives."""
    for dtype, shape in itertools.product(DTYPES, ((1,), (3, 5), (2, 3, 5, 7), (1, 5, 33, 31), (70, 2))):
        tensors = (
            numbers((1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,), dtype, 1),
            numbers((), dtype),
        )
        chains = (
            (epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0)),
            (epilogue.Mul(tensors[0]), epilogue.SiLU(), epilogue.Sub(tensors[1])),
        )
        for chain, arrange in itertools.product(chains, (contiguous, channels_last, strided)):
            if len(shape) == 1 and arrange is channels_last:
                continue
            input, grad = arrange(numbers(shape, dtype, 2)), arrange(numbers(shape, dtype, 3))
            pointwise(input, chain)
            pointwise_backward(grad, input, chain)
            grad_grad_tensors = tensors if any(function.tensor is not None for function in chain) else ()
            pointwise_double_backward(grad, input, chain, grad, grad_grad_tensors)


def sweep_gelu():
    for dtype, size, approximate in itertools.product(DTYPES, (1, 7, 1000), ("none", "tanh")):
        input = numbers(size, dtype)
        gelu(input, approximate)
        gelu_backward(input, input, approximate)
        gelu_double_backward(input, input, input, approximate)


def sweep_channel_sum():
    shapes = ((1, 1), (3, 5), (7, 3, 9), (2, 33, 5, 7), (1, 2, 70, 33), (65, 3, 2, 1))
    for dtype, shape, arrange in itertools.product(DTYPES, shapes, (contiguous, channels_last, strided)):
        for axis in range(len(shape)):
            channel_sum(arrange(numbers(shape, dtype)), axis)


SWEEPS = {name.removeprefix("sweep_"): value for name, value in list(globals().items()) if name.startswith("sweep_")}

if __name__ == "__main__":
    for name in sys.argv[1:] or SWEEPS:
        SWEEPS[name]()
        print(name, "done")
