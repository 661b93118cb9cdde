"""The weight gradient of depthwise convolutions: shapes, element types, layouts, what is not finite, the plan.

Data of small integers makes every product and sum exact: see test_conv_transpose2d_weight_gradient.py, from which the
arrays are.
"""

import itertools

import numpy as np
import pytest
import sweep
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_conv_transpose2d_direct_matrix import met, reference
from test_conv_transpose2d_weight_gradient import LAYOUTS

from rawkern.launchers import conv_transpose2d_direct as direct
from rawkern.launchers import conv_transpose2d_direct_walk_weight_gradient as walk_gradient
from rawkern.launchers.conv_transpose2d import weight_gradient
from rawkern.launchers.geometry import Geometry
from rawkern.runtime import CPP_TYPES, bfloat16

DTYPES = tuple(CPP_TYPES)
BENCHMARKED = Geometry.of((21, 302, 157, 163), (302, 1, 3, 3), 1, 1, 0, 302)


def depthwise(batch, channels, size, kernel, stride=1, padding=0, output_padding=0, dilation=1):
    return Geometry.of(
        (batch, channels, *size), (channels, 1, *kernel), stride, padding, output_padding, channels, dilation
    )


CASES = {
    "3 x 3": depthwise(2, 3, (9, 40), (3, 3), 1, 1),
    "more channels than a warp": depthwise(1, 37, (5, 6), (3, 3), 1, 1),
    "several slices": depthwise(7, 2, (61, 70), (3, 3), 1, 1),
    "4 x 4, stride 2": depthwise(2, 3, (9, 20), (4, 4), 2, 1),
    "7 x 7, stride 2": depthwise(1, 2, (12, 13), (7, 7), 2, 3, 1),
    "one pixel": depthwise(1, 1, (1, 1), (1, 1)),
    "1 x 1, stride 3": depthwise(2, 5, (4, 5), (1, 1), 3),
    "padding beyond the kernel": depthwise(1, 2, (14, 40), (3, 3), 1, 5),
    "dilation and stride share a factor": depthwise(1, 3, (13, 20), (3, 2), (4, 6), 0, 0, (6, 4)),
    "dilation larger than the image": depthwise(2, 3, (3, 5), (2, 2), 1, 0, 0, (4, 7)),
    "kernel smaller than stride": depthwise(2, 3, (4, 5), (1, 2), (3, 4), 0, (2, 3)),
    "wide kernel": depthwise(1, 2, (3, 40), (1, 11), 1, (0, 5)),
    "tall kernel": depthwise(1, 2, (40, 3), (11, 1), 1, (5, 0)),
}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """These kernels however small the problem is, and however few channels it has."""
    monkeypatch.setattr(walk_gradient, "_FEWEST_LANES", 1)
    walk_gradient.walk_weight_gradient_plan.cache_clear()
    with sweep.direct_kernels(min_products=0):
        yield
    walk_gradient.walk_weight_gradient_plan.cache_clear()


def plan_of(geometry, dtype=np.float32, channels_last=False):
    """As it is made on the emulator."""
    return direct.direct_weight_gradient_plan(geometry, np.dtype(dtype), "ieee", channels_last, 1)


def is_channels_last(array):
    return array.strides[1] == array.itemsize and array.shape[1] > 1


def check_exact(geometry, x, grad, layouts=(np.ascontiguousarray,) * 2):
    input, grad_output = layouts[0](x), layouts[1](grad)
    plan = plan_of(geometry, x.dtype, is_channels_last(input))
    assert isinstance(plan, walk_gradient.WalkWeightGradientPlan)
    with np.errstate(invalid="ignore"):
        expected = reference(geometry, x, grad).astype(x.dtype)
    result = weight_gradient(input, grad_output, geometry)
    np.testing.assert_array_equal(result.astype("float64"), expected.astype("float64"))
    return plan


def integers(shape, dtype, seed):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def operands(geometry, dtype):
    return integers(geometry.input_shape, dtype, 0), integers(geometry.output_shape, dtype, 1)


#: Each is a kernel of its own, which takes seconds to compile: all element types for two of them.
CASES_AND_DTYPES = [
    *((case, np.dtype("float32")) for case in CASES),
    *itertools.product(("3 x 3", "4 x 4, stride 2"), (dtype for dtype in DTYPES if dtype != np.float32)),
]


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_exact(case, dtype):
    for layout in ("plain", "channels-last"):
        check_exact(CASES[case], *operands(CASES[case], dtype), (LAYOUTS[layout],) * 2)


@pytest.mark.parametrize("layout", ("plain", "channels-last"))
def test_several_rounds_of_a_warp(layout, monkeypatch):
    """Where there are warps enough; the cases above have several slices, of a round each."""
    monkeypatch.setattr(walk_gradient, "_WARPS_WANTED", 4)
    geometry = CASES["several slices"]
    plan = check_exact(geometry, *operands(geometry, np.dtype("float32")), (LAYOUTS[layout],) * 2)
    assert plan.slices > 1 and plan.slice_strips >= (2 if layout == "channels-last" else 64)


@pytest.mark.parametrize("dtype", (np.float32, bfloat16), ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=" and ".join)
def test_layouts(layouts, dtype):
    geometry = CASES["4 x 4, stride 2"]
    check_exact(geometry, *operands(geometry, dtype), [LAYOUTS[layout] for layout in layouts])


@st.composite
def geometries(draw):
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 5)), draw(pairs(1, 4))
    limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    output_padding = tuple(draw(st.integers(0, n)) for n in limit)
    sizes = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(pairs(1, 30))
    try:
        return depthwise(*sizes, kernel, stride, draw(pairs(0, 3)), output_padding, dilation)
    except RuntimeError:  # no output is left
        return draw(geometries())


@settings(deadline=None, max_examples=12)
@given(geometries(), st.sampled_from(("plain", "channels-last")))
def test_any_geometry(geometry, layout):
    x, grad = operands(geometry, np.dtype("float32"))
    arrange = LAYOUTS[layout]
    plan = plan_of(geometry, channels_last=is_channels_last(arrange(x)))
    assume(isinstance(plan, walk_gradient.WalkWeightGradientPlan))
    check_exact(geometry, x, grad, (arrange, arrange))


@pytest.mark.parametrize("layout", ("plain", "channels-last"))
@pytest.mark.parametrize("case", ("3 x 3", "4 x 4, stride 2", "kernel smaller than stride"))
def test_what_is_not_finite_stays_where_it_belongs(case, layout):
    """Every place of one value, first, last and in between, in either operand: it reaches the taps at which it meets
    something, and no others, which beyond an edge it would as 0 * inf."""
    geometry = CASES[case]
    for which, row, column in itertools.product((0, 1), (0, 2, -1), (0, 3, -1)):
        arrays = operands(geometry, np.float32)
        for array in arrays:
            array[array == 0] = 1  # 0 * inf is NaN where it does belong, too, and would hide what does not
        arrays[which][0, 1, row, column] = np.inf
        arrays[which][-1, 2, row, column] = np.nan
        check_exact(geometry, *arrays, (LAYOUTS[layout],) * 2)


def test_two_runs_are_equal():
    geometry = CASES["several slices"]
    generator = np.random.default_rng(0)
    x, grad = (generator.normal(size=shape).astype("f4") for shape in (geometry.input_shape, geometry.output_shape))
    first, second = (weight_gradient(x, grad, geometry) for _ in range(2))
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, reference(geometry, x, grad), rtol=0, atol=2e-5 * len(met(geometry, 0, 0)[0]))


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_problems_it_serves(dtype, channels_last, monkeypatch):
    """One channel on both sides, enough of them in channels-last memory; of many taps the sums do not fit into
    registers."""
    monkeypatch.undo()
    assert isinstance(plan_of(BENCHMARKED, dtype, channels_last), walk_gradient.WalkWeightGradientPlan)
    others = (
        Geometry.of((16, 32, 64, 64), (32, 2, 3, 3), groups=32),
        Geometry.of((16, 64, 64, 64), (64, 1, 3, 3), groups=32),
        depthwise(16, 32, (64, 64), (13, 13)),
    )
    for geometry in others:
        assert not isinstance(plan_of(geometry, dtype, channels_last), walk_gradient.WalkWeightGradientPlan)
    few = depthwise(32, 15, (64, 64), (3, 3))
    assert isinstance(plan_of(few, dtype, channels_last), walk_gradient.WalkWeightGradientPlan) != channels_last


@pytest.mark.parametrize("channels_last", (False, True))
def test_plans_fill_a_device_with_short_sums(channels_last):
    """Few channels in channels-last memory, a warp for 32 of them, have fewer warps and longer sums."""
    for geometry, few in (
        (BENCHMARKED, False),
        (depthwise(12, 388, (167, 173), (7, 7), 2, 3, 1), False),
        (depthwise(32, 256, (128, 128), (4, 4), 2, 1), False),
        (depthwise(8, 16, (256, 256), (3, 3), 1, 1), channels_last),
        (depthwise(16, 32, (512, 512), (3, 3), 1, 1), channels_last),
    ):
        plan = plan_of(geometry, channels_last=channels_last)
        assert plan.warps > 132 * (14 if few else 24)
        lanes = 1 if channels_last else 32
        products = plan.slice_strips // lanes * plan.walk.steps * plan.walk.pixels * plan.walk.columns
        assert products <= (4096 if few else 1024)


def test_kernels_of_both_orders_of_memory_are_listed(monkeypatch):
    monkeypatch.undo()
    types = [kernel.type for kernel in walk_gradient.kernels()]
    assert all(sum(f", {order}, " in type for type in types) > 5 for order in ("false", "true"))
