"""The weight gradient for few channels on tensor cores: shapes, element types, layouts, what is not finite, the plan.

Data of small integers makes every product and sum exact, in TF32, float16 and bfloat16 too: see
test_conv_transpose2d_weight_gradient.py, from which the arrays are.
"""

import itertools

import numpy as np
import pytest
import sweep
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv_transpose2d_weight_gradient import DTYPES, LAYOUTS, far_apart, integers

from rawkern.autograd.dlpack import to_array
from rawkern.launchers import conv_transpose2d_direct as direct
from rawkern.launchers import conv_transpose2d_direct_matrix as matrix
from rawkern.launchers.conv_transpose2d import weight_gradient
from rawkern.launchers.conv_transpose2d_direct_tile_weight_gradient import TileWeightGradientPlan
from rawkern.launchers.conv_transpose2d_direct_walk_weight_gradient import WalkWeightGradientPlan
from rawkern.launchers.geometry import Geometry
from rawkern.runtime import bfloat16
from rawkern.testing import TF32_ROUNDING, compare

#: (N, C_in, H, W), (C_in, C_out / groups, kH, kW), stride, padding, output_padding, groups, dilation
BENCHMARKED = ((16, 32, 128, 256), (32, 16, 3, 5), (2, 3), (1, 2), 0, 4, (2, 1))
CASES = dict(zip(("groups", "many channels out", "odd channels", "tall kernel"), matrix.EXAMPLES, strict=True)) | {
    "one pixel": ((1, 4, 1, 1), (4, 4, 1, 1), 1, 0, 0, 1, 1),
    "narrow images": ((5, 8, 9, 3), (8, 16, 3, 3), 1, 1, 0, 1, 1),
    "more columns than a rectangle": ((2, 8, 11, 150), (8, 16, 3, 5), (2, 3), (1, 2), (1, 2), 1, (2, 1)),
    "padding beyond the kernel": ((1, 16, 14, 40), (16, 16, 3, 3), 1, 5, 0, 1, 1),
    "dilation and stride share a factor": ((1, 10, 13, 20), (10, 12, 3, 2), (4, 6), 0, 0, 1, (6, 4)),
    "dilation larger than the image": ((2, 6, 3, 5), (6, 20, 2, 2), 1, 0, 0, 1, (4, 7)),
    "kernel smaller than stride": ((2, 9, 4, 5), (9, 5, 1, 2), (3, 4), 0, (2, 3), 1, 1),
    "wide kernel": ((1, 8, 3, 40), (8, 8, 1, 11), 1, (0, 5), 0, 1, 1),
    "many channels in": ((1, 100, 5, 9), (100, 7, 3, 3), 1, 1, 0, 1, 1),
}


@pytest.fixture(autouse=True)
def _any_size():
    """These kernels however small the problem is."""
    with sweep.direct_kernels(min_products=0):
        yield


def reference(geometry, x, grad):
    """The sum over the pixels that meet, in float64: others are left out, infinite or not."""
    groups, rows = geometry.groups, geometry.in_channels // geometry.groups
    x = x.astype("float64").reshape(geometry.batch, groups, rows, *geometry.input_size)
    grad = grad.astype("float64").reshape(geometry.batch, groups, -1, *geometry.output_size)
    result = np.zeros((groups, rows, grad.shape[2], *geometry.kernel))
    for tap in itertools.product(*map(range, geometry.kernel)):
        at, to = zip(*(met(geometry, axis, tap[axis]) for axis in (0, 1)), strict=True)
        result[..., tap[0], tap[1]] = np.einsum(
            "ngrhw,ngchw->grc", x[..., at[0], :][..., at[1]], grad[..., to[0], :][..., to[1]]
        )
    return result.reshape(geometry.weight_shape)


def met(geometry, axis, tap):
    """Positions of x, and those of gy that they meet at a tap."""
    at = np.arange(geometry.input_size[axis])
    to = at * geometry.stride[axis] - geometry.padding[axis] + tap * geometry.dilation[axis]
    exists = (to >= 0) & (to < geometry.output_size[axis])
    return at[exists], to[exists]


def plan_of(geometry, dtype, precision="tf32", channels_last=False, multiprocessors=132):
    return direct.direct_weight_gradient_plan(geometry, np.dtype(dtype), precision, channels_last, multiprocessors)


def check_exact(geometry, x, grad, layouts=(np.ascontiguousarray,) * 2):
    assert isinstance(plan_of(geometry, x.dtype), matrix.MatrixPlan)
    expected = reference(geometry, x, grad).astype(x.dtype)
    result = weight_gradient(layouts[0](x), layouts[1](grad), geometry, precision="tf32")
    np.testing.assert_array_equal(result.astype("float64"), expected.astype("float64"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact(case, dtype):
    geometry = Geometry.of(*CASES[case])
    x, grad = integers(geometry.input_shape, dtype, 0), integers(geometry.output_shape, dtype, 1)
    for layout in ("plain", "channels-last"):
        check_exact(geometry, x, grad, (LAYOUTS[layout],) * 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=" and ".join)
def test_layouts(layouts, dtype):
    geometry = Geometry.of(*CASES["groups"])
    x, grad = integers(geometry.input_shape, dtype, 0), integers(geometry.output_shape, dtype, 1)
    check_exact(geometry, x, grad, [LAYOUTS[layout] for layout in layouts])


@st.composite
def geometries(draw):
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 4)), draw(pairs(1, 4))
    channels = groups * draw(st.integers(4, 32)), draw(st.integers(4, 16))
    limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    output_padding = tuple(draw(st.integers(0, n)) for n in limit)
    shapes = (draw(st.integers(1, 3)), channels[0], *draw(pairs(1, 40))), (*channels, *kernel)
    padding = draw(pairs(0, 3))
    try:
        return Geometry.of(*shapes, stride, padding, output_padding, groups, dilation)
    except RuntimeError:
        return Geometry.of(*shapes, stride, 0, output_padding, groups, dilation)


@settings(max_examples=30, deadline=None)
@given(geometry=geometries(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["plain", "channels-last"]))
def test_any_geometry(geometry, dtype, layout):
    x, grad = integers(geometry.input_shape, dtype, 0), integers(geometry.output_shape, dtype, 1)
    check_exact(geometry, x, grad, (LAYOUTS[layout],) * 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", ["groups", "narrow images", "odd channels"])
def test_what_is_not_finite_stays_where_it_belongs(case, dtype):
    """Infinities and NaN of x and gy, at all edges, reach the weights by which they are multiplied, and no others."""
    geometry = Geometry.of(*CASES[case])
    shapes = {"x": geometry.input_shape, "gy": geometry.output_shape}
    for name, row, column in itertools.product(shapes, (0, 2, -1), (0, 2, -1)):
        x, grad = integers(shapes["x"], dtype, 0), integers(shapes["gy"], dtype, 1)
        array = x if name == "x" else grad
        array[0, 3, row, column], array[-1, -1, row, column] = np.inf, np.nan
        check_exact(geometry, x, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_torch(dtype, device):
    """Random numbers, against torch's own error; TF32 neither worse than its operands' rounding nor float32."""
    case = ((4, 16, 40, 64), (16, 8, 3, 3), 1, 1, 0, 2, 1)
    geometry = Geometry.of(*case)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(s, generator=generator).to(dtype) for s in (geometry.input_shape, geometry.output_shape))
    exact = torch.from_numpy(reference(geometry, x.double().numpy(), grad.double().numpy()))
    weight = torch.zeros(case[1], dtype=dtype, device=device, requires_grad=True)
    y = F.conv_transpose2d(x.to(device), weight, padding=1, groups=2)
    theirs = torch.autograd.grad(y, weight, grad.to(device))[0]
    ours = torch.empty(case[1], dtype=dtype, device=device)
    arrays = [to_array(tensor.to(device)) for tensor in (x, grad)]
    weight_gradient(*arrays, geometry, precision="tf32", out=to_array(ours))
    rounding = TF32_ROUNDING if dtype == torch.float32 else 0.0
    judged = compare(ours, theirs, exact, dtype, rounding=rounding)
    assert judged.ok, judged.problems
    if dtype == torch.float32:
        assert judged.ours.rms > 1e-5


def test_offsets_beyond_32_bits():
    """Images and rows of images farther apart than 2**31 elements."""
    geometry = Geometry.of((2, 8, 2, 3), (8, 16, 2, 2))
    values = integers(geometry.input_shape, torch.float16, 0), integers(geometry.output_shape, torch.float16, 1)
    result = weight_gradient(*far_apart(values), geometry, precision="tf32")
    np.testing.assert_array_equal(result, reference(geometry, *values).astype("float16"))


def test_expanded_arrays():
    """Stride 0: one image and one pixel that stand for many."""
    geometry = Geometry.of((3, 8, 4, 6), (8, 20, 3, 3), 2, 1)
    x = np.broadcast_to(integers((1, 8, 4, 6), torch.float32, 0), geometry.input_shape)
    grad = np.broadcast_to(integers((3, 20, 1, 1), torch.float32, 1), geometry.output_shape)
    check_exact(geometry, x, grad, (lambda array: array,) * 2)


def test_no_images():
    geometry = Geometry.of((0, 8, 4, 6), (8, 20, 3, 3))
    arrays = np.empty(geometry.input_shape, "f2"), np.empty(geometry.output_shape, "f2")
    assert not weight_gradient(*arrays, geometry).any()


def test_two_runs_are_bitwise_equal(device):
    xp = np if device == "cpu" else pytest.importorskip("cupy")
    geometry = Geometry.of((5, 16, 40, 64), (16, 12, 3, 3), groups=2)
    rng = np.random.default_rng(0)
    arrays = [xp.asarray(rng.standard_normal(s, "f4")) for s in (geometry.input_shape, geometry.output_shape)]
    first, second = (weight_gradient(*arrays, geometry, precision="tf32") for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", matrix.DTYPES, ids=str)
def test_which_problems_it_serves(dtype, channels_last):
    """16-bit types, and float32 where TF32 is asked for, with channels enough on both sides."""
    geometry = Geometry.of(*BENCHMARKED)
    assert isinstance(plan_of(geometry, dtype, "tf32", channels_last), matrix.MatrixPlan)
    ieee = TileWeightGradientPlan if dtype == np.float32 else matrix.MatrixPlan
    assert isinstance(plan_of(geometry, dtype, "ieee", channels_last), ieee)
    assert isinstance(plan_of(geometry, "float64", "tf32", channels_last), TileWeightGradientPlan)
    depthwise = Geometry.of((16, 32, 128, 128), (32, 1, 3, 3), groups=32)
    assert isinstance(plan_of(depthwise, dtype, "tf32", channels_last), WalkWeightGradientPlan)
    tall = Geometry.of((16, 8, 128, 128), (8, 8, 13, 1))  # its sums do not fit into registers
    assert isinstance(plan_of(tall, dtype, "tf32", channels_last), TileWeightGradientPlan)


@pytest.mark.parametrize("dtype", (np.dtype("float32"), bfloat16), ids=str)
def test_plans_cover_the_device_with_short_sums(dtype):
    for case in (BENCHMARKED, ((8, 64, 90, 90), (64, 8, 3, 3), 1, 1, 0, 8, 1), ((64, 16, 64, 64), (16, 16, 3, 3), 2)):
        plan = plan_of(Geometry.of(*case), dtype)
        rounds = plan.blocks / (132 * plan.shape.min_blocks)
        assert rounds >= 0.7 * -(-rounds // 1)
        assert plan.slice_tiles * plan.shape.lines * plan.shape.words // plan.shape.steps * 4 // dtype.itemsize <= 4096
