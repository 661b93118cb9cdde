"""The weight gradient's kernels on arrays: every block, every way of staging, both kinds of tensor-core instructions.

Data of small integers makes every product and sum exact, in TF32, float16 and bfloat16 too, so that results must equal
the oracle's to the last bit: a pixel that is missed, met twice or met at the wrong tap shows wherever it is. So do
integers of more bits than TF32 has, on one side, where floats are split.
"""

import itertools

import numpy as np
import pytest
import sweep
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rawkern.launchers import conv_transpose2d_weight_gradient_taps as taps
from rawkern.launchers import repeat
from rawkern.launchers.conv_transpose2d import weight_gradient
from rawkern.launchers.geometry import Geometry
from rawkern.runtime import bfloat16
from rawkern.runtime.emulator import Emulator
from rawkern.testing import TF32_ROUNDING, compare

ARCHITECTURES = ("sm_90a", "sm_80")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (dtype, precision, arch) of every kind of products.
PRODUCTS = {
    f"{str(dtype).removeprefix('torch.')} {precision} {arch}": (dtype, precision, arch)
    for dtype, precision, arch in (
        *itertools.product(DTYPES, ("tf32",), ARCHITECTURES),
        (torch.float32, "ieee", "sm_90a"),
    )
}


@pytest.fixture(autouse=True, scope="module")
def _tensor_cores():
    """No direct kernels, which serve few channels otherwise."""
    with sweep.direct_kernels(lambda geometry: False):
        yield


def channels_last(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def every_other(array):
    wide = np.full((*array.shape[:3], 2 * array.shape[3]), np.nan, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def backwards(array):
    return array[:, ::-1, ::-1, ::-1].copy()[:, ::-1, ::-1, ::-1]


def eight_bytes_on(array):
    """Contiguous, whole words, but no rows at multiples of 16 bytes."""
    before = 8 // array.itemsize
    memory = np.full(array.size + before, np.nan, array.dtype)
    memory[before:] = array.ravel()
    return memory[before:].reshape(array.shape)


LAYOUTS = {
    "plain": np.ascontiguousarray,
    "channels-last": channels_last,
    "holes": every_other,
    "backwards": backwards,
    "eight bytes on": eight_bytes_on,
}

#: (N, C_in, H, W), (C_in, C_out / groups, kH, kW), stride, padding, output_padding, groups, dilation
CASES = {
    "3 x 3": ((2, 64, 9, 40), (64, 64, 3, 3), 1, 1, 0, 1, 1),
    "4 x 4, stride 2": ((2, 64, 9, 20), (64, 128, 4, 4), 2, 0, 0, 1, 1),
    "few channels": ((3, 16, 9, 7), (16, 17, 3, 3), 2, 1, 1, 1, 1),
    "odd channels, dilation 2": ((1, 71, 6, 20), (71, 81, 2, 3), (1, 3), (0, 1), 0, 1, (2, 1)),
    "groups": ((3, 64, 7, 11), (64, 24, 3, 5), (2, 3), (1, 2), (1, 0), 2, (2, 1)),
    "dilation and stride share a factor": ((1, 40, 13, 20), (40, 64, 3, 1), (4, 1), 0, 0, 1, (6, 1)),
    "dilation larger than the image": ((2, 18, 3, 5), (18, 20, 2, 2), 1, 0, 0, 1, (4, 7)),
    "1 x 1, many channels": ((1, 130, 5, 33), (130, 260, 1, 1), 1, 0, 0, 1, 1),
    "large kernel": ((3, 32, 7, 9), (32, 48, 7, 7), 1, 3, 0, 1, 3),
    "kernel smaller than stride": ((2, 33, 4, 5), (33, 20, 1, 2), (3, 4), 0, (2, 3), 1, 1),
    "whole strips": ((2, 64, 5, 64), (64, 60, 3, 3), 1, (1, 0), 0, 1, 1),
    "whole strips, the widest window": ((1, 16, 3, 64), (16, 40, 1, 3), 1, (0, 5), 0, 1, (1, 16)),
    "whole strips, taps beyond a window": ((1, 16, 2, 64), (16, 16, 1, 2), 1, 0, 0, 1, (1, 33)),
    "whole strips, dilated window at an odd column": ((1, 48, 4, 128), (48, 70, 2, 5), 1, (0, 3), 0, 1, (1, 3)),
    "whole strips, padded": ((1, 64, 3, 128), (64, 70, 3, 3), 1, 1, 0, 1, 1),
    "whole strips, padding beyond the kernel": ((1, 17, 12, 128), (17, 16, 3, 3), 1, 5, 0, 1, 1),
    "whole strips, stride 2": ((2, 64, 5, 64), (64, 64, 3, 3), 2, 1, 1, 1, 1),
    "whole strips, width 4, stride 2": ((2, 33, 5, 64), (33, 64, 4, 4), 2, 1, 0, 1, 1),
    "whole strips, width 4, stride 2, several": ((1, 16, 3, 192), (16, 35, 4, 4), 2, (0, 1), 0, 1, 1),
    "whole strips, width 4, stride 2, no padding": ((1, 16, 4, 128), (16, 130, 4, 4), 2, 0, 0, 1, 1),
    "whole strips, width 4, padding beyond the kernel": ((2, 20, 9, 64), (20, 20, 2, 4), (1, 2), (1, 5), 0, 1, 1),
    "whole strips, width 2, stride 2": ((1, 130, 3, 128), (130, 66, 2, 2), 2, 0, 0, 1, 1),
    "whole strips, width 2, stride 2, odd columns": ((1, 16, 4, 64), (16, 19, 3, 2), 2, 1, 0, 1, 1),
    "whole strips, stride 2, no padding": ((1, 40, 4, 128), (40, 70, 3, 3), 2, 0, 1, 1, 1),
    "whole strips, stride 2, padding beyond the kernel": ((2, 36, 9, 64), (36, 20, 3, 3), (1, 2), 5, (0, 1), 2, (2, 1)),
    "padding beyond the kernel": ((1, 16, 12, 14), (16, 16, 3, 3), 1, 4, 0, 1, 1),
}


def whole_strips(input_shape, out_channels, kernel, stride, padding):
    """A case whose output has an even width, as 16-bit values need it to be staged by words."""
    case = input_shape, (input_shape[1], out_channels, *kernel), stride, padding
    odd = Geometry.of(*case).output_size[1] % 2
    return *case, (0, odd), 1, 1


def integers(shape, dtype, seed, most=3):
    drawn = np.random.default_rng(seed).integers(-most, most + 1, shape)
    return drawn.astype(bfloat16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))


def oracle(case, x, grad):
    _, weight_shape, stride, padding, output_padding, groups, dilation = case
    weight = torch.zeros(weight_shape, dtype=torch.float64, requires_grad=True)
    x, grad = (torch.from_numpy(np.ascontiguousarray(array).astype("float64")) for array in (x, grad))
    y = F.conv_transpose2d(x, weight, None, stride, padding, output_padding, groups, dilation)
    return torch.autograd.grad(y, weight, grad)[0].numpy()


def check_exact(case, dtype, layouts, precision="tf32"):
    geometry = Geometry.of(*case)
    for most in ((3, 8000), (8000, 3)) if precision == "ieee" else ((3, 3),):
        x, grad = integers(geometry.input_shape, dtype, 0, most[0]), integers(geometry.output_shape, dtype, 1, most[1])
        expected = oracle(case, x, grad)
        assert taps.products_for(geometry, x.dtype, precision, Emulator.arch)
        result = weight_gradient(layouts[0](x), layouts[1](grad), geometry, precision=precision)
        np.testing.assert_array_equal(result.astype("float64"), expected.astype(x.dtype).astype("float64"))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("case", CASES)
def test_exact(case, products, monkeypatch):
    dtype, precision, arch = PRODUCTS[products]
    monkeypatch.setattr(Emulator, "arch", arch)
    for layout in ("plain", "channels-last"):
        check_exact(CASES[case], dtype, (LAYOUTS[layout],) * 2, precision)


@pytest.mark.parametrize("products", ["float32 tf32 sm_90a", "float32 ieee sm_90a", "float16 tf32 sm_90a"])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=" and ".join)
def test_layouts(layouts, products, monkeypatch):
    dtype, precision, arch = PRODUCTS[products]
    monkeypatch.setattr(Emulator, "arch", arch)
    case = ((2, 18, 5, 64), (18, 20, 2, 3), 1, 0, 0, 1, 1)
    check_exact(case, dtype, [LAYOUTS[layout] for layout in layouts], precision)


BLOCKS = {
    f"{itemsize * 8} bit, {share}, {block.products} {block.warpgroups} {block.columns} {block.spread}": (
        itemsize,
        share,
        block,
    )
    for products, itemsize in itertools.product((taps.WARP, taps.WARPGROUP, taps.SPLIT), (4, 2))
    for share in taps.SHARES
    for block in taps.blocks(itemsize, products, share)
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name, monkeypatch):
    """Also where it would not be chosen: several slices, tiles that end within the channels and the taps."""
    itemsize, share, block = BLOCKS[name]
    arch, precision = "sm_80" if block.products == taps.WARP else "sm_90a", "tf32"
    if block.products == taps.SPLIT:
        precision = "ieee"
    monkeypatch.setattr(Emulator, "arch", arch)
    monkeypatch.setattr(Emulator, "multiprocessors", 400)
    monkeypatch.setattr(taps, "blocks", lambda *_: (block,))
    taps.taps_plan.cache_clear()
    try:
        any_rows = "kAnyRows" in share
        case = ((2, 66, 37, 91 if any_rows else 64), (66, 70, 4, 5), 1, (0, 1), 0, 1, (1, 2))
        for shares in (taps.ALL_TAPS, taps.ANY_ROWS):
            for (width, stride), all_taps in shares.items():
                if share == all_taps and any_rows:
                    case = ((2, 66, 37, 91), (66, 70, 4, width), (1, stride), (0, 1), 0, 1, 1)
                elif share == all_taps:
                    case = whole_strips((2, 66, 37, 64), 70, (4, width), (1, stride), (0, 1))
        layout = LAYOUTS["channels-last" if share == taps.CHANNELS else "plain"]
        dtype = torch.float32 if itemsize == 4 else torch.float16
        geometry = Geometry.of(*case)
        arrays = layout(integers(geometry.input_shape, dtype, 0)), layout(integers(geometry.output_shape, dtype, 1))
        assert share == taps.PIXELS or taps.share_of(geometry, *arrays) == share
        monkeypatch.setattr(taps, "share_of", lambda *_: share)
        plan = taps.taps_plan(geometry, itemsize, block.products, share, 400)
        assert plan.block == block and plan.slices > 1 and plan.chunks > 1
        check_exact(case, dtype, (layout, layout), precision)
    finally:
        taps.taps_plan.cache_clear()


@st.composite
def geometries(draw):
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 4)), draw(pairs(1, 4))
    channels = groups * draw(st.integers(16, 40)), draw(st.integers(16, 40))
    size = draw(pairs(1, 12)), (draw(st.integers(1, 6)), 64), (draw(st.integers(1, 6)), draw(st.integers(23, 110)))
    size = draw(st.sampled_from(size))
    limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    output_padding = tuple(draw(st.integers(0, n)) for n in limit)
    shapes = (draw(st.integers(1, 4)), channels[0], *size), (*channels, *kernel)
    case = (*shapes, stride, draw(pairs(0, 3)), output_padding, groups, dilation)
    try:
        Geometry.of(*case)
    except RuntimeError:
        case = (*shapes, stride, 0, output_padding, groups, dilation)
    return case


@settings(max_examples=60, deadline=None)
@given(
    case=geometries(), products=st.sampled_from(sorted(PRODUCTS)), layout=st.sampled_from(["plain", "channels-last"])
)
def test_any_geometry(case, products, layout):
    dtype, precision, arch = PRODUCTS[products]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Emulator, "arch", arch)
        repeat.forget_plans()  # the same case of another architecture
        check_exact(case, dtype, (LAYOUTS[layout],) * 2, precision)


@pytest.mark.parametrize("dtype, precision", [*((dtype, "tf32") for dtype in DTYPES), (torch.float32, "ieee")], ids=str)
def test_as_accurate_as_torch(dtype, precision, device):
    """Random numbers, against torch's own error; TF32 neither worse than its operands' rounding nor float32."""
    case = ((4, 32, 40, 64), (32, 32, 3, 3), 1, 1, 0, 1, 1)
    geometry = Geometry.of(*case)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(s, generator=generator).to(dtype) for s in (geometry.input_shape, geometry.output_shape))
    exact = torch.from_numpy(oracle(case, x.double().numpy(), grad.double().numpy()))
    weight = torch.zeros(case[1], dtype=dtype, device=device, requires_grad=True)
    y = F.conv_transpose2d(x.to(device), weight, padding=1)
    theirs = torch.autograd.grad(y, weight, grad.to(device))[0]
    ours = torch.empty(case[1], dtype=dtype, device=device)
    from rawkern.autograd.dlpack import to_array

    arrays = [to_array(tensor.to(device)) for tensor in (x, grad)]
    weight_gradient(*arrays, geometry, precision=precision, out=to_array(ours))
    rounding = TF32_ROUNDING if dtype == torch.float32 and precision == "tf32" else 0.0
    judged = compare(ours, theirs, exact, dtype, rounding=rounding)
    assert judged.ok, judged.problems
    if rounding:
        assert judged.ours.rms > 1e-5


@pytest.mark.parametrize("products", [name for name in PRODUCTS if not name.startswith("bfloat16")])
@pytest.mark.parametrize("layout", ["plain", "channels-last"])
@pytest.mark.parametrize("width, stride", taps.ALL_TAPS)
def test_what_is_not_finite_stays_where_it_belongs(width, stride, layout, products, monkeypatch):
    """Infinities and NaN of x and gy, in the first and last rows and columns, reach the taps and channels that torch
    says, among them none by way of pixels that are staged to fill a tile."""
    dtype, precision, arch = PRODUCTS[products]
    monkeypatch.setattr(Emulator, "arch", arch)
    whole = whole_strips((2, 16, 6, 64), 16, (3, width), stride, 1)
    any_rows = ((2, 16, 6, 49), (16, 16, 3, width), stride, 1, 0, 1, 1)
    for case, name, row, column in itertools.product((whole, any_rows), ("x", "gy"), (0, 3, -1), (0, 40, -1)):
        geometry = Geometry.of(*case)
        shapes = {"x": geometry.input_shape, "gy": geometry.output_shape}
        x, grad = integers(shapes["x"], dtype, 0), integers(shapes["gy"], dtype, 1)
        array = x if name == "x" else grad
        array[0, 5, row, column], array[1, 9, row, column] = np.inf, np.nan
        result = weight_gradient(LAYOUTS[layout](x), LAYOUTS[layout](grad), geometry, precision=precision)
        np.testing.assert_array_equal(result.astype("float64"), oracle(case, x, grad).astype(result.dtype))


@pytest.mark.parametrize("width, stride", taps.ALL_TAPS)
def test_how_tiles_are_staged(width, stride):
    """The ways for one width serve what they are for, and nothing whose rows are not aligned."""
    geometry = Geometry.of(*whole_strips((2, 16, 4, 64), 16, (3, width), stride, 1))
    arrays = integers(geometry.input_shape, torch.float16, 0), integers(geometry.output_shape, torch.float16, 1)
    assert taps.share_of(geometry, *arrays) == taps.ALL_TAPS[width, stride]
    otherwise = taps.ANY_ROWS.get((width, stride), taps.PIXELS)
    assert taps.share_of(geometry, eight_bytes_on(arrays[0]), arrays[1]) == otherwise
    assert taps.share_of(geometry, arrays[0], eight_bytes_on(arrays[1])) == taps.ALL_TAPS[width, stride]
    assert taps.share_of(geometry, *map(every_other, arrays)) == taps.PIXELS
    assert taps.share_of(geometry, *map(channels_last, arrays)) == taps.CHANNELS


@pytest.mark.parametrize("dtype, widths", [(torch.float32, (22, 23, 64, 69, 91)), (torch.float16, (35, 36, 128, 118))])
@pytest.mark.parametrize("width, stride", taps.ALL_TAPS)
def test_how_rows_of_any_width_are_staged(width, stride, dtype, widths):
    """In strips of their own, unless these are much longer; then side by side."""
    for columns in widths:
        geometry = Geometry.of((2, 16, 4, columns), (16, 16, 3, width), stride, 1)
        arrays = integers(geometry.input_shape, dtype, 0), integers(geometry.output_shape, dtype, 1)
        expected = taps.ANY_ROWS.get((width, stride), taps.PIXELS) if columns > widths[0] else taps.PIXELS
        if columns % 64 == 0 and (dtype == torch.float32 or geometry.output_size[1] % 2 == 0):
            expected = taps.ALL_TAPS[width, stride]
        assert taps.share_of(geometry, *arrays) == expected


def test_narrow_images_keep_what_is_not_finite_apart():
    """Images side by side in a strip: the last column of one is no neighbour of the next one's first."""
    case = ((9, 16, 3, 5), (16, 16, 1, 3), 1, 0, 0, 1, 1)
    geometry = Geometry.of(*case)
    x, grad = integers(geometry.input_shape, torch.float32, 0), integers(geometry.output_shape, torch.float32, 1)
    grad[3, 2, 1, -1] = grad[5, 3, 1, 0] = np.nan
    result = weight_gradient(x, grad, geometry, precision="tf32")
    np.testing.assert_array_equal(result, oracle(case, x, grad).astype("float32"))


def far_apart(values):
    """Two arrays of these values in float16, their images and rows of images farther apart than 2**30 elements."""
    memory = np.zeros(2**32 + 2**20, np.float16)  # of which hardly a page is touched
    arrays, offset = [], 0
    for value in values:
        strides = (2**31 + 2**16, 50, 2**30, 1)
        far = np.lib.stride_tricks.as_strided(memory[offset:], value.shape, [2 * stride for stride in strides])
        far[...] = value
        arrays.append(far)
        offset += 2000
    return arrays


def test_offsets_beyond_32_bits():
    """Images and rows of images farther apart than 2**31 elements."""
    case = ((2, 16, 2, 3), (16, 16, 2, 2), 1, 0, 0, 1, 1)
    geometry = Geometry.of(*case)
    values = integers(geometry.input_shape, torch.float16, 0), integers(geometry.output_shape, torch.float16, 1)
    result = weight_gradient(*far_apart(values), geometry, precision="tf32")
    np.testing.assert_array_equal(result, oracle(case, *values).astype("float16"))


def test_expanded_arrays():
    """Stride 0: one image and one pixel that stand for many."""
    case = ((3, 16, 4, 6), (16, 20, 3, 3), 2, 1, 0, 1, 1)
    geometry = Geometry.of(*case)
    x = np.broadcast_to(integers((1, 16, 4, 6), torch.float32, 0), geometry.input_shape)
    grad = np.broadcast_to(integers((3, 20, 1, 1), torch.float32, 1), geometry.output_shape)
    result = weight_gradient(x, grad, geometry, precision="tf32")
    np.testing.assert_array_equal(result, oracle(case, x, grad).astype("float32"))


def test_no_images():
    geometry = Geometry.of((0, 16, 4, 6), (16, 20, 3, 3))
    arrays = np.empty(geometry.input_shape, "f4"), np.empty(geometry.output_shape, "f4")
    assert not weight_gradient(*arrays, geometry, precision="tf32").any()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_two_runs_are_bitwise_equal(precision, device):
    xp = np if device == "cpu" else pytest.importorskip("cupy")
    geometry = Geometry.of((5, 32, 40, 64), (32, 48, 3, 3))
    rng = np.random.default_rng(0)
    arrays = [xp.asarray(rng.standard_normal(s, "f4")) for s in (geometry.input_shape, geometry.output_shape)]
    first, second = (weight_gradient(*arrays, geometry, precision=precision) for _ in range(2))
    assert (first == second).all()


def test_plans_cover_the_device_with_short_sums():
    """At sizes at which it matters: blocks for every multiprocessor, no sum longer than the limit."""
    for case in (((8, 64, 1024, 1024), (64, 64, 3, 3)), ((128, 64, 64, 64), (64, 128, 4, 4), 2)):
        geometry = Geometry.of(*case)
        for itemsize, products, share in (
            (4, taps.WARPGROUP, taps.PIXELS),
            (4, taps.SPLIT, taps.WINDOWS),
            (2, taps.WARPGROUP, taps.CHANNELS),
        ):
            plan = taps.taps_plan(geometry, itemsize, products, share, 132)
            pixels = geometry.batch * geometry.input_size[0] * geometry.input_size[1]
            rounds = plan.tiles * plan.slices / (132 * plan.block.resident)
            assert rounds >= 0.9 * -(-rounds // 1)
            assert pixels / plan.slices <= taps.SLICE_PIXELS
