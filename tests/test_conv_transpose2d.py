"""conv_transpose2d and its gradients: parity with torch, derivatives, layouts, precision modes, epilogues, errors."""

import functools
import itertools
import math
import sys

import numpy as np
import pytest
import sweep
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rawkern
from rawkern import launchers
from rawkern.autograd.conv_transpose2d import INPUT_GRADIENT, convolution_of
from rawkern.epilogue import ELU, GELU, Add, Clamp, Minimum, Mul, Sigmoid, SiLU, Tanh
from rawkern.launchers import conv_transpose2d_direct as direct
from rawkern.launchers import conv_transpose2d_direct_walk as walk
from rawkern.launchers import conv_transpose2d_warpgroup as warpgroup
from rawkern.launchers.chain import chain_of
from rawkern.launchers.conv_transpose2d import input_gradient, weight_gradient, with_moments
from rawkern.launchers.geometry import Geometry
from rawkern.launchers.pointwise import pointwise
from rawkern.runtime.emulator import Emulator
from rawkern.testing import TF32_ROUNDING, assert_as_accurate_as_torch, assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(batch, channels, size, kernel, bias=True, groups=1, **parameters):
    """Inputs of a call: channels is (in, out), sizes are (h, w)."""
    inputs = {
        "input": draw(batch, channels[0], *size),
        "weight": draw(channels[0], channels[1] // groups, *kernel, seed=1),
        "bias": draw(channels[1], seed=2) if bias else None,
    }
    return inputs | {"groups": groups} | parameters


def check(inputs, dtype, device, kernel=None, **options):
    ours = functools.partial(rawkern.conv_transpose2d, **precision_for(kernel, dtype))
    options |= rounding_of(kernel, dtype)
    assert_parity(ours, F.conv_transpose2d, inputs, dtype=dtype, device=device, **options)


CASES = {
    "plain": problem(2, (3, 5), (7, 9), (3, 3)),
    "first model": problem(2, (8, 16), (9, 7), (3, 3), stride=2, padding=1, output_padding=1),
    "third model": problem(1, (8, 16), (5, 6), (4, 4), stride=2),
    "kernel smaller than stride: phases without taps": problem(2, (4, 3), (4, 5), (1, 2), stride=(3, 4)),
    "everything differs between height and width": problem(
        2, (6, 9), (7, 5), (3, 4), stride=(2, 3), padding=(3, 1), output_padding=(1, 2), dilation=(3, 2), groups=3
    ),
    "stride and dilation share a factor": problem(1, (3, 4), (6, 5), (3, 3), stride=(4, 6), dilation=(6, 4)),
    "output_padding below dilation only": problem(1, (3, 2), (4, 4), (2, 2), output_padding=2, dilation=3),
    "depthwise": problem(2, (6, 6), (6, 7), (3, 3), stride=2, padding=1, groups=6),
    "depthwise multiplier": problem(1, (3, 12), (5, 4), (2, 3), groups=3),
    "padding removes most": problem(2, (4, 2), (5, 6), (3, 3), padding=3),
    "one pixel in, one pixel out": problem(1, (1, 1), (1, 1), (1, 1)),
    "tall kernel": problem(1, (2, 3), (3, 4), (11, 1), padding=(4, 0)),
    "no bias": problem(1, (3, 2), (4, 4), (2, 2), bias=False),
    "many channels": problem(1, (70, 140), (5, 4), (2, 2), stride=2),
    "long sums": problem(1, (300, 20), (6, 5), (3, 3), padding=1),
    "many pixels": problem(1, (2, 3), (40, 70), (3, 3)),
}


#: The ways there are to compute a convolution, and what makes the launchers take each: the architecture, and
#: arguments of sweep.direct_kernels.
IMPLICIT_GEMM, WARPGROUP, SPLIT = "implicit GEMM", "warpgroup", "warpgroup, split floats"
DIRECT, DIRECT_TILE = "direct", "direct, for one shape"
KERNELS = {
    IMPLICIT_GEMM: ("sm_80", dict(few_channels=lambda geometry: False)),
    WARPGROUP: ("sm_90a", dict(few_channels=lambda geometry: False)),
    SPLIT: ("sm_90a", dict(few_channels=lambda geometry: False)),
    DIRECT: ("sm_90a", dict(few_channels=lambda geometry: True, min_products=2**62)),
    DIRECT_TILE: ("sm_90a", dict(few_channels=lambda geometry: True, min_products=0)),
}
WARPGROUPS_AND_DTYPES = [*((WARPGROUP, dtype) for dtype in DTYPES[1:]), (SPLIT, torch.float32)]
#: With every dtype, but for kernels compiled for one shape, of which there are endlessly many.
KERNELS_AND_DTYPES = [
    *((kernel, dtype) for kernel in (IMPLICIT_GEMM, DIRECT) for dtype in DTYPES),
    *WARPGROUPS_AND_DTYPES,
]


@pytest.fixture
def kernel(request):
    """All convolutions of the test are computed in the way that is the parameter; float32 by warpgroups only where
    `precision_for` is heeded."""
    arch, choice = KERNELS[request.param]
    with sweep.architecture(arch), sweep.direct_kernels(**choice):
        yield request.param


def precision_for(kernel, dtype):
    """The arguments of rawkern's functions with which the kernels of the fixture's name are taken."""
    return {"precision": "tf32"} if kernel == WARPGROUP and dtype == torch.float32 else {}


def rounding_of(kernel, dtype):
    """The arguments of assert_parity that go with `precision_for`."""
    return {"rounding": TF32_ROUNDING} if precision_for(kernel, dtype) else {}


def exact_in_tf32(inputs):
    """The tensors rounded, so that the forward pass must be as accurate in TF32 as in float32: what a chain makes of
    TF32's rounding is no matter of its results' scale."""
    return {name: tensor.bfloat16().double() for name, tensor in inputs.items()}


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, indirect=["kernel"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, kernel, device):
    check(CASES[case], dtype, device, kernel)


#: For the kernels of warpgroups: several slabs and units of channels, tiles in both directions and across images,
#: strides of more phases than are computed together, weights streamed for longer than what is staged lasts.
LARGER = {
    "several slabs": problem(2, (150, 40), (9, 11), (3, 3), padding=1),
    "several units": problem(1, (24, 150), (7, 20), (4, 4), stride=2, padding=1),
    "groups of several slabs and units": problem(2, (140, 150), (5, 6), (3, 3), stride=(1, 2), groups=2),
    "many tiles": problem(3, (20, 24), (37, 75), (3, 3), padding=1),
    "stride 3": problem(2, (18, 20), (9, 8), (5, 4), stride=3, padding=2, output_padding=1),
    "stride 5": problem(2, (18, 20), (5, 7), (3, 6), stride=(4, 5), padding=1),
    "dilated": problem(2, (17, 19), (12, 15), (3, 3), stride=(2, 1), padding=3, dilation=(3, 4)),
    "1 x 1": problem(2, (33, 65), (11, 13), (1, 1)),
    "as many stages as slabs that stay": problem(
        1, (120, 12), (5, 128), (1, 3), stride=(3, 1), padding=(2, 1), output_padding=(1, 0), groups=3
    ),
    "rows of 16 bytes": problem(2, (70, 9), (9, 56), (3, 1), padding=(1, 0)),
    "rows of 8 bytes": problem(2, (34, 9), (6, 20), (3, 3), stride=2),
    "odd rows": problem(2, (70, 9), (4, 71), (3, 3), padding=1),
    "odd rows, 1 x 1": problem(3, (133, 9), (3, 95), (1, 1)),
    "long rows": problem(1, (9, 10), (2, 520), (1, 3), padding=(0, 1)),
    "rows that begin anywhere": problem(3, (72, 24), (7, 45), (3, 3), padding=1),
    "rows that begin anywhere, stride 2": problem(2, (40, 16), (6, 33), (3, 4), stride=2, padding=1),
    "rows that begin anywhere, groups": problem(2, (80, 16), (5, 67), (3, 3), padding=(1, 3), groups=2),
    "rows of 16 bytes, stride 2": problem(2, (40, 16), (6, 24), (4, 4), stride=2, padding=1),
}


@pytest.mark.parametrize(("kernel", "dtype"), WARPGROUPS_AND_DTYPES, indirect=["kernel"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", LARGER)
def test_parity_of_larger_problems(case, channels_last, dtype, kernel, device):
    inputs = dict(LARGER[case])
    if channels_last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    check(inputs, dtype, device, kernel)


def geometry_of(inputs):
    parameters = {name: value for name, value in inputs.items() if name not in ("input", "weight", "bias")}
    return Geometry.of(inputs["input"].shape, inputs["weight"].shape, **parameters)


@pytest.mark.parametrize(("kernel", "dtype"), WARPGROUPS_AND_DTYPES, indirect=["kernel"])
@pytest.mark.parametrize("case", ["odd rows", "rows of 16 bytes"])
def test_memory_that_begins_anywhere(case, dtype, kernel, device):
    inputs = {name: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for name, v in LARGER[case].items()}
    aligned = inputs.pop("input")
    shifted = torch.cat([aligned.flatten()[:1], aligned.flatten()])[1:].view(aligned.shape)
    assert aligned.data_ptr() % 16 == 0 and shifted.data_ptr() % 16
    ours = functools.partial(rawkern.conv_transpose2d, **inputs, **precision_for(kernel, dtype))
    assert torch.equal(ours(shifted), ours(aligned))


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
def test_channels_far_apart(kernel, tmp_path):
    """Offsets that 32 bits do not hold, in rows that begin anywhere; of the memory in between nothing is touched."""
    stride = 2**29 + 1
    memory = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(8 * stride,)).view(np.ndarray)
    image = memory.reshape(1, 8, 1, stride)[..., :95]
    image[...] = sweep.numbers(image.shape, np.dtype("float16"))
    weight = sweep.numbers((8, 4, 1, 1), np.dtype("float16"), 1)
    assert warpgroup.staging_of(image, Geometry.of(image.shape, weight.shape)) == warpgroup.PIXELS
    assert np.array_equal(launchers.conv_transpose2d(image, weight), launchers.conv_transpose2d(image.copy(), weight))


@pytest.mark.parametrize(
    ("dtype", "precision"), [*((dtype, "tf32") for dtype in warpgroup.DTYPES), (np.dtype("float32"), "ieee")], ids=str
)
@pytest.mark.parametrize("way", ["forward", "gradient"])
def test_every_way_to_stage_the_input_is_tried(way, dtype, precision):
    """By the tests of parity, in every plan that they come to: with and without planes of a stride."""
    ways = set()
    for inputs, channels_last in itertools.product(LARGER.values(), (False, True)):
        geometry = geometry_of(inputs)
        shape = geometry.input_shape if way == "forward" else geometry.output_shape
        array = np.zeros(shape, dtype)
        if channels_last:
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        staging = warpgroup.staging_of(array, geometry)
        plan = warpgroup.plan(geometry, dtype, precision, "sm_90a", 1, transposed=way == "forward", staging=staging)
        if plan:
            ways.add((plan.staging, math.prod(plan.fields["in_step"]) > 1))
    stagings = warpgroup.PIXELS, warpgroup.ROWS, warpgroup.FLAT, warpgroup.CHANNELS
    assert ways == set(itertools.product(stagings, (False,) if way == "forward" else (False, True)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_copy_engine_can_reach(dtype):
    geometry = Geometry.of((2, 16, 6, 24), (16, 8, 1, 1), groups=2)
    memory = np.zeros((4, 24, 8, 32), dtype)
    interleaved = np.zeros((4, 6, 24, 32), dtype)

    def staging(array):
        return warpgroup.staging_of(array, geometry)

    dense = np.zeros(geometry.input_shape, dtype)
    last = np.zeros((2, 6, 24, 16), dtype).transpose(0, 3, 1, 2)
    assert staging(dense) == staging(memory[1:3, :16, 1:7, 8:]) == warpgroup.ROWS
    assert staging(last) == staging(interleaved[::2, ..., 16:].transpose(0, 3, 1, 2)) == warpgroup.CHANNELS
    begins_anywhere = np.zeros((2, 16, 6, 25), dtype)[..., :24]
    assert staging(begins_anywhere) == warpgroup.FLAT
    assert staging(np.zeros((2, 16, 6, 25), dtype)[..., 1:]) == warpgroup.PIXELS  # not aligned
    assert staging(np.broadcast_to(np.zeros((1, 16, 6, 25), dtype), (2, 16, 6, 25))[..., :24]) == warpgroup.PIXELS
    assert staging(np.zeros((2, 16, 6, 48), dtype)[..., ::2]) == warpgroup.PIXELS
    assert staging(np.zeros((2, 16, 24, 6), dtype).transpose(0, 1, 3, 2)) == warpgroup.PIXELS


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_begin_anywhere_in_aligned_rows(dtype, align, kernel, monkeypatch):
    """The copy engine copies from multiples of 16 bytes: a box begins before its tile does, by any number of pixels."""
    monkeypatch.setattr(warpgroup, "SHAPES", [warpgroup.Shape(1, 64)])
    monkeypatch.setattr(warpgroup, "_aligns", lambda *_: (align,))
    monkeypatch.setattr(warpgroup, "plan", functools.cache(warpgroup.plan.__wrapped__))
    generator = np.random.default_rng(0)
    starts = set()
    for width in 40, 80, 88, 104, 152:
        x, w = (generator.integers(-2, 3, shape).astype(dtype) for shape in ((2, 11, 5, width), (11, 9, 3, 3)))
        geometry = Geometry.of(x.shape, w.shape)
        plan = warpgroup.plan(geometry, x.dtype, "tf32", "sm_90a", 2, transposed=True, staging=warpgroup.ROWS)
        columns, tiles = plan.fields["tile_columns"], plan.fields["column_tiles"]
        starts |= {(i * columns + plan.fields["in_origin"][1]) % 8 for i in range(tiles)}
        expected = F.conv_transpose2d(*(torch.from_numpy(array).double() for array in (x, w))).numpy()
        assert np.array_equal(launchers.conv_transpose2d(x, w, None, precision="tf32"), expected)
    assert starts == {0} if align == 8 else any(start % 4 for start in starts) and len(starts) > 2


@given(divisor=st.integers(1, 2**31 - 1), quotient=st.integers(0, 2**31 - 1))
@example(divisor=1, quotient=2**31 - 1)
@example(divisor=2**30 + 1, quotient=1)
@example(divisor=2**31 - 1, quotient=1)
def test_fixed_divisor(divisor, quotient):
    """As FixedDivisor::divide() computes it, at the multiples of the divisor and just below them."""
    factor, shift = warpgroup.fixed_divisor(divisor)
    assert factor < 2**32 and shift < 32
    multiple = quotient % ((2**31 - 1) // divisor + 1) * divisor
    for n in {multiple, max(0, multiple - 1), 2**31 - 1}:
        assert (2 * n * factor >> 32) >> shift == n // divisor


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_way_to_store_rows(stride, dtype, kernel, monkeypatch):
    """From the registers or by way of shared memory, by as many neighbours as are aligned: the right numbers, and
    nothing besides them."""
    ways = set()
    choose = warpgroup.outputs_per_store

    def outputs_per_store(*arguments):
        ways.add(choose(*arguments))
        return choose(*arguments)

    monkeypatch.setattr(warpgroup, "outputs_per_store", outputs_per_store)
    monkeypatch.setattr(warpgroup, "SHAPES", [shape for shape in warpgroup.SHAPES if shape.phases == stride])
    monkeypatch.setattr(warpgroup, "plan", functools.cache(warpgroup.plan.__wrapped__))
    generator = np.random.default_rng(0)
    x, w, b = (generator.integers(-2, 3, shape).astype(dtype) for shape in ((2, 9, 3, 40), (9, 21, 2, 4), (21,)))
    x, w = (x, w[..., :3]) if stride == 1 else (x, w)
    arguments = dict(stride=(2, stride), padding=(0, 1 if stride < 4 else 0))
    expected = F.conv_transpose2d(*(torch.from_numpy(array).double() for array in (x, w, b)), **arguments).numpy()
    size = expected.size
    assert expected.shape[3] == 40 * stride and np.abs(expected).max() < 512
    for first in (0, 4, 2, 1):
        memories = [np.full(size + 16, 99, dtype) for _ in range(2)]
        out, saved = (memory[first : first + size].reshape(expected.shape) for memory in memories)
        launchers.conv_transpose2d(x, w, b, **arguments, epilogue=(Add(0.5),), precision="tf32", out=out, saved=saved)
        assert np.array_equal(out, expected + 0.5) and np.array_equal(saved, expected)
        assert all((memory[:first] == 99).all() and (memory[first + size :] == 99).all() for memory in memories)
    assert ways == ({1, 2, 4} if dtype == "float32" else {1, 2, 8})


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "width,layout,kernels",
    [(32, sweep.contiguous, 1), (33, sweep.contiguous, 2), (36, sweep.contiguous, 2), (35, sweep.channels_last, 1)],
)
def test_the_chain_has_a_kernel_of_its_own(width, layout, kernels, dtype, kernel, monkeypatch):
    """Where the convolution is saved, too, and tiles would write parts of a sector."""
    generator = np.random.default_rng(0)
    shapes = (2, 8, 3, width), (8, 32, 3, 3), (32,)
    x, w, b = (generator.integers(-2, 3, shape).astype(dtype) for shape in shapes)
    expected = F.conv_transpose2d(*(torch.from_numpy(array).double() for array in (x, w, b)), padding=1).numpy()
    out, saved = (layout(np.full(expected.shape, 99, dtype)) for _ in range(2))
    own = []
    module = sys.modules["rawkern.launchers.conv_transpose2d"]
    monkeypatch.setattr(module, "pointwise", lambda *args, **options: own.append(pointwise(*args, **options)) or own[0])
    chain = Add(0.5), Mul(2.0)
    result = launchers.conv_transpose2d(x, w, b, padding=1, epilogue=chain, precision="tf32", out=out, saved=saved)
    assert result is out and len(own) == kernels - 1
    assert np.array_equal(out, 2 * expected + 1) and np.array_equal(saved, expected)


#: Channels of an output, groups, the channels of its memory and how many of these come first, how many one store takes.
CHANNELS_LAST = [
    (48, 1, 48, 0, 8),
    (88, 1, 104, 8, 8),
    (20, 1, 20, 0, 4),
    (72, 2, 72, 0, 4),
    (72, 1, 80, 4, 4),
    (24, 1, 26, 0, 2),
    (22, 1, 22, 0, 2),
    (36, 2, 36, 0, 2),
    (21, 1, 21, 0, 1),
    (18, 2, 18, 0, 1),
    (16, 1, 18, 1, 1),
]


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_way_to_store_channels(stride, dtype, kernel, monkeypatch):
    """Where these are neighbours in memory: as many as are aligned and belong to one group, and nothing besides them.
    Tiles straddle images, and rows of an odd width end within a chunk."""
    most, ways = 16 // np.dtype(dtype).itemsize, []
    choose = warpgroup.outputs_per_store
    monkeypatch.setattr(warpgroup, "outputs_per_store", lambda *args: ways.append(choose(*args)) or ways[-1])
    generator = np.random.default_rng(0)
    arguments = dict(stride=(2, stride), padding=1, output_padding=(1, min(stride, 2) - 1))
    for channels, groups, wide, before, vector in CHANNELS_LAST:
        shapes = (3, 10, 3, 19), (10, channels // groups, 3, 3), (channels,)
        x, w, b = (generator.integers(-2, 3, shape).astype(dtype) for shape in shapes)
        tensors = [torch.from_numpy(array).double() for array in (x, w, b)]
        expected = F.conv_transpose2d(*tensors, **arguments, groups=groups).numpy()
        batch, _, height, width = expected.shape
        memories = [np.full((batch, height, width, wide), 99, dtype) for _ in range(3)]
        out, saved, counted = (m[..., before : before + channels].transpose(0, 3, 1, 2) for m in memories)
        launchers.conv_transpose2d(
            x, w, b, **arguments, groups=groups, epilogue=(Add(0.5),), precision="tf32", out=out, saved=saved
        )
        geometry = Geometry.of(x.shape, w.shape, **arguments, groups=groups)
        chain = chain_of((Mul(2.0),))
        _, moments = with_moments(x, w, b, chain, geometry, precision="tf32", out=counted)
        assert np.array_equal(out, expected + 0.5)
        assert np.array_equal(saved, expected) and np.array_equal(counted, expected)
        total = moments[..., 0] * moments[..., 1]
        np.testing.assert_allclose(total.sum(1), 2 * expected.sum((2, 3)).reshape(-1), rtol=1e-5, atol=1e-3)
        assert all((m[..., :before] == 99).all() and (m[..., before + channels :] == 99).all() for m in memories)
        assert ways[-2:] == 2 * [-min(vector, most)]


@pytest.mark.parametrize("processors, blocks", [(132, 131), (131, 131), (130, 130), (66, 65), (2, 2)])
def test_no_block_has_the_same_columns_in_all_of_its_tiles(processors, blocks):
    """Three tiles side by side, on devices of several sizes."""
    geometry = Geometry.of((128, 64, 64, 64), (64, 128, 4, 4), 2, 1)
    arguments = dict(transposed=True, staging=warpgroup.ROWS)
    plan = warpgroup.plan(geometry, np.dtype("float32"), "tf32", "sm_90a", processors, **arguments)
    assert plan.fields["column_tiles"] == 3 and plan.blocks == blocks


@pytest.mark.parametrize("case", CASES | LARGER)
def test_warpgroups_are_chosen(case):
    """By default, for all that they serve: otherwise the tests above would try other kernels.

    The input gradient stages a plane for each pixel of a stride: too many for shared memory where strides are large.
    """
    geometry = geometry_of((CASES | LARGER)[case])
    for dtype in map(np.dtype, ("float32", "float16")):
        for transposed in (True, False) if math.prod(geometry.stride) < 16 else (True,):
            assert warpgroup.plan(geometry, dtype, "tf32", "sm_90a", 1, transposed=transposed)
            assert not warpgroup.plan(geometry, dtype, "tf32", "sm_80", 1, transposed=transposed)
    plans = [warpgroup.plan(geometry, np.dtype("float32"), p, "sm_90a", 1, transposed=True) for p in ("ieee", "tf32")]
    assert [plan.split for plan in plans] == [True, False]
    assert not warpgroup.plan(geometry, np.dtype("float64"), "tf32", "sm_90a", 1, transposed=True)


@pytest.mark.parametrize("way", [IMPLICIT_GEMM, WARPGROUP])
def test_the_architecture_decides(way, monkeypatch):
    """Which kernels run on the emulator, forward and backward."""
    launched = []
    launch = Emulator.launch
    monkeypatch.setattr(
        Emulator, "launch", lambda self, kernel, *rest: launched.append(kernel.type) or launch(self, kernel, *rest)
    )
    x, w = (draw(*shape).half().requires_grad_() for shape in ((1, 20, 4, 5), (20, 24, 3, 3)))
    with sweep.architecture(KERNELS[way][0]):
        rawkern.conv_transpose2d(x, w).sum().backward()
    multiplies = [kernel for kernel in launched if not kernel.startswith(("SumSlices", "PackWeight"))]
    assert len(multiplies) >= 3
    assert all(("Warpgroup" in kernel) == (way == WARPGROUP) for kernel in multiplies)


#: For the kernels compiled for one shape: several tiles in both directions, several tiles of channels, channels staged
#: in several parts, sums in runs, phases without taps and with different numbers of them, long reaches.
TILED = {
    "depthwise": problem(2, (3, 3), (40, 70), (3, 3), padding=1, groups=3),
    "depthwise with stride": problem(1, (2, 2), (19, 37), (7, 7), stride=2, padding=3, output_padding=1, groups=2),
    "groups": problem(
        2, (16, 32), (9, 35), (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), output_padding=(0, 2), groups=2
    ),
    "from few": problem(1, (3, 40), (9, 12), (4, 4), stride=2, padding=1),
    "to few": problem(1, (70, 3), (7, 9), (5, 5), stride=2, padding=2, output_padding=1),
    "kernel smaller than stride": problem(2, (4, 3), (4, 5), (1, 2), stride=(3, 4)),
    "stride and dilation share a factor": CASES["stride and dilation share a factor"],
    "dilated": problem(1, (4, 4), (12, 15), (3, 3), padding=4, dilation=4, groups=2),
    "stride 5": problem(1, (4, 8), (7, 8), (3, 4), stride=5, padding=1, groups=4),
    "padding removes most": problem(2, (3, 3), (5, 6), (3, 3), padding=3, groups=3),
}


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", TILED)
def test_parity_of_kernels_for_one_shape(case, channels_last, kernel, device):
    inputs = dict(TILED[case])
    if channels_last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    check(inputs, torch.float32, device)


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["depthwise with stride", "groups"])
def test_dtypes_of_kernels_for_one_shape(case, dtype, kernel, device):
    check(TILED[case], dtype, device)


#: For direct_walk.cuh: every stride and number of columns stored together, columns that memory does not let be stored
#: together, edges everywhere, several steps, parts and warps, several outputs of one input channel.
WALKED = {
    "no stride": problem(2, (3, 3), (21, 35), (3, 3), padding=1, groups=3),
    "stride": problem(1, (3, 3), (19, 40), (4, 4), stride=2, padding=1, groups=3),
    "stride and an odd width": problem(2, (2, 2), (9, 17), (5, 4), stride=2, padding=(3, 0), groups=2),
    "stride 4": problem(1, (2, 2), (6, 36), (3, 7), stride=(3, 4), padding=(2, 5), output_padding=(0, 3), groups=2),
    "two channels from each": problem(2, (3, 6), (11, 9), (2, 3), stride=(1, 2), padding=(0, 1), groups=3),
    "dilated": problem(1, (2, 2), (11, 15), (3, 3), padding=4, dilation=4, groups=2),
    "stride and dilation share a factor": problem(1, (3, 3), (6, 5), (3, 3), stride=4, dilation=(6, 2), groups=3),
    "kernel smaller than stride": problem(2, (3, 3), (4, 5), (1, 1), stride=(3, 4), groups=3),
}


@pytest.fixture
def long_walks(monkeypatch):
    """Threads take as many steps as there are, as they do in problems that are large enough."""
    monkeypatch.setattr(walk, "_THREADS_WANTED", 1)
    walk.walk_plan.cache_clear()
    yield
    walk.walk_plan.cache_clear()


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", WALKED)
def test_parity_of_kernels_that_walk(case, channels_last, long_walks, kernel, device):
    plan = direct.direct_plan(geometry_of(WALKED[case]), np.dtype("float32"), None, True, channels_last)
    assert isinstance(plan, walk.DirectWalkPlan) and plan.steps > 1
    inputs = dict(WALKED[case])
    if channels_last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    check(inputs, torch.float32, device)


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["stride", "no stride", "stride 4"])
def test_dtypes_of_kernels_that_walk(case, dtype, long_walks, kernel, device):
    check(WALKED[case], dtype, device)


@pytest.mark.parametrize("case", TILED)
def test_kernels_for_one_shape_exist(case):
    """Otherwise the two tests above would try the kernel for all shapes."""
    geometry = geometry_of(TILED[case])
    for channels_last in (False, True):
        plans = [direct.tile_plan(geometry, np.dtype("float32"), way, channels_last) for way in (True, False)]
        assert all([*plans, direct.tile_weight_gradient_plan(geometry, np.dtype("float32"), channels_last)])


TOO_LARGE = {
    "stride of many phases": problem(1, (2, 2), (3, 4), (3, 3), stride=(2, 17), groups=2),
    "kernel of many taps": problem(1, (1, 1), (2, 2), (41, 41), padding=20),
    "reach beyond shared memory": problem(1, (1, 1), (3, 3), (2, 3), dilation=(900, 700), padding=(400, 600)),
}


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_no_tile_holds_goes_to_the_kernel_for_all_shapes(case, kernel, device):
    plan = direct.direct_plan(geometry_of(TOO_LARGE[case]), np.dtype("float32"), None, transposed=True)
    assert isinstance(plan, direct.DirectPlan)
    check(TOO_LARGE[case], torch.float32, device)


#: Beyond what a plan of warpgroup_gather.cuh can say, or what its shared memory holds.
TOO_LARGE_FOR_WARPGROUPS = TOO_LARGE | {
    "stride of many phases": problem(1, (17, 18), (3, 4), (3, 3), stride=(3, 33)),
    "many phases and taps": problem(1, (17, 18), (2, 2), (3, 90), stride=(1, 65)),
    "a row that no stage holds": problem(1, (17, 18), (1, 2), (1, 2), stride=(1, 300), dilation=(1, 299)),
}


@pytest.mark.parametrize("kernel", [WARPGROUP], indirect=True)
@pytest.mark.parametrize("case", TOO_LARGE_FOR_WARPGROUPS)
def test_what_warpgroups_do_not_hold_goes_to_the_implicit_gemm(case, kernel, device):
    inputs = TOO_LARGE_FOR_WARPGROUPS[case]
    plans = [
        warpgroup.plan(geometry_of(inputs), np.dtype("float16"), None, "sm_90a", 1, transposed=way)
        for way in (True, False)
    ]
    assert None in plans
    check(inputs, torch.float16, device, kernel)


@st.composite
def problems(draw_):
    groups = draw_(st.sampled_from([1, 1, 2, 3]))
    integers = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = draw_(integers(1, 4)), draw_(integers(1, 4)), draw_(integers(1, 3))
    size, padding = draw_(integers(1, 8)), draw_(integers(0, 3))
    limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    output_padding = tuple(draw_(st.integers(0, n)) for n in limit)
    channels = groups * draw_(st.integers(1, 5)), groups * draw_(st.integers(1, 5))
    batch, bias = draw_(st.integers(1, 3)), draw_(st.booleans())
    result = problem(
        batch, channels, size, kernel, bias, groups,
        stride=stride, padding=padding, output_padding=output_padding, dilation=dilation,
    )  # fmt: skip
    shape = result["input"].shape, result["weight"].shape
    try:
        Geometry.of(*shape, stride, padding, output_padding, groups, dilation)
    except RuntimeError:
        result["padding"] = (0, 0)
    return result


@settings(max_examples=60, deadline=None)
@example(inputs=CASES["everything differs between height and width"])
@given(inputs=problems())
def test_any_geometry(inputs):
    """Drawn geometries on the emulator; the same kernels run on a GPU in test_parity."""
    check(inputs, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unbatched(dtype, device):
    inputs = dict(CASES["first model"])
    inputs["input"] = inputs["input"][0]
    check(inputs, dtype, device)


LAYOUTS = {
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t + 1], 3)[..., ::2],
    "expanded batch": lambda t: t[:1].expand(t.shape),
    "expanded image": lambda t: t[:, :, :1, :1].expand(t.shape),
    "channels of a larger tensor": lambda t: torch.cat([t, t], 1)[:, t.shape[1] // 2 : t.shape[1] // 2 + t.shape[1]],
}


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight"])
def test_layouts(layout, which, kernel, device):
    inputs = problem(2, (4, 6), (5, 6), (3, 2), stride=2, padding=1)
    inputs[which] = LAYOUTS[layout](inputs[which])
    check(inputs, torch.float32, device, kernel)
    if kernel == WARPGROUP:
        check(inputs, torch.float16, device, kernel)


@pytest.mark.parametrize("bias", ["expanded", "strided"])
def test_bias_layouts(bias, device):
    inputs = problem(1, (2, 4), (3, 3), (2, 2))
    values = inputs["bias"]
    inputs["bias"] = values[:1].expand(4) if bias == "expanded" else torch.stack([values, values], 1)[:, 0]
    check(inputs, torch.float32, device)


def test_channels_last_in_channels_last_out(device):
    x = draw(2, 4, 5, 6).float().to(device).to(memory_format=torch.channels_last).requires_grad_()
    y = rawkern.conv_transpose2d(x, draw(4, 3, 2, 2).float().to(device))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert rawkern.conv_transpose2d(x.detach().contiguous(), draw(4, 3, 2, 2).float().to(device)).is_contiguous()


@pytest.mark.parametrize(
    ("kernel", "dtype"), [*KERNELS_AND_DTYPES, *((DIRECT_TILE, dtype) for dtype in DTYPES)], indirect=["kernel"]
)
def test_empty_batch(dtype, kernel, device):
    inputs = {
        name: value.to(dtype).to(device)
        for name, value in problem(0, (3, 4), (5, 6), (3, 3)).items()
        if name != "groups"
    }
    leaves = [value.requires_grad_() for value in inputs.values()]
    y = rawkern.conv_transpose2d(**inputs, **precision_for(kernel, dtype))
    assert y.shape == (0, 4, 7, 8)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in gradients] == [value.shape for value in leaves]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_infinities_and_nan_stay_where_they_belong(kernel, device):
    """A value that is not finite reaches the outputs its taps reach, and no others."""
    x = draw(1, 3, 6, 6)
    x[0, 1, 2, 3], x[0, 0, 5, 0], x[0, 2, 0, 5] = float("inf"), float("nan"), float("-inf")
    inputs = problem(1, (3, 5), (6, 6), (3, 3), stride=2) | {"input": x}
    check(inputs, torch.float32, device, kernel, backward=False)


@pytest.mark.parametrize("kernel", [IMPLICIT_GEMM, WARPGROUP, SPLIT, DIRECT], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_infinite_channels_of_other_groups(groups, dtype, kernel, device):
    """Channels that are staged to fill a tile, of other groups or of none, are met by no sum."""
    inputs = problem(2, (20, 24), (9, 11), (3, 3), stride=(1, 2), groups=groups)
    inputs["input"][1, 19], inputs["input"][0, 0, 3, 4] = float("inf"), float("nan")
    check(inputs, dtype, device, kernel, backward=False)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_an_infinite_input_leaves_the_weights_that_it_does_not_meet(kernel):
    """At the edge, where padding cuts its products off, and not 0 * inf instead."""
    geometry = Geometry.of((1, 2, 9, 35), (2, 1, 3, 3), padding=1, groups=2)
    x, gy = (draw(*shape).float().numpy() for shape in (geometry.input_shape, geometry.output_shape))
    for h, w, reached in ((0, 34, np.s_[1:, :2]), (8, 0, np.s_[:2, 1:]), (8, 34, np.s_[:2, :2])):
        without, with_infinity = x.copy(), x.copy()
        without[0, 1, h, w], with_infinity[0, 1, h, w] = 0, np.inf
        expected = weight_gradient(without, gy, geometry)
        expected[1, 0][reached] = np.sign(gy[0, 1, max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2]) * np.inf
        np.testing.assert_array_equal(weight_gradient(with_infinity, gy, geometry), expected)


# Precision of float32 products


@pytest.mark.parametrize("kernel", [DIRECT, DIRECT_TILE], indirect=True)
def test_few_channels_are_multiplied_as_float32(kernel, device):
    """In every mode: these problems are bound by memory."""
    x, w = draw(1, 3, 6, 7).float().to(device), draw(3, 2, 3, 3, seed=1).float().to(device)
    results = [rawkern.conv_transpose2d(x, w, precision=name) for name in ("ieee", "tf32")]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="precision must be"):
        rawkern.conv_transpose2d(x, w, precision="bf16")


@pytest.mark.parametrize("kernel", [IMPLICIT_GEMM, WARPGROUP], indirect=True)
@pytest.mark.parametrize(
    "case", ["first model", "everything differs between height and width", "many channels", "depthwise"]
)
def test_tf32(case, kernel, device):
    """Within what rounding both operands to TF32 does, and not by accident as exact as float32."""
    inputs = CASES[case]
    ours = lambda *a, **k: rawkern.conv_transpose2d(*a, **k, precision="tf32")  # noqa: E731
    assert_parity(ours, F.conv_transpose2d, inputs, dtype=torch.float32, device=device, rounding=TF32_ROUNDING)
    values = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    oracle = F.conv_transpose2d(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
    error = (ours(**values) - oracle).abs().max() / oracle.abs().max()
    assert error > 1e-5


@pytest.mark.parametrize("kernel", [IMPLICIT_GEMM, WARPGROUP], indirect=True)
def test_tf32_keeps_infinity_and_nan(kernel, device):
    x = torch.zeros(1, 1, 1, 4, device=device)
    x[0, 0, 0] = torch.tensor([float("inf"), float("nan"), 3e38, 1.0])
    y = rawkern.conv_transpose2d(x, torch.ones(1, 1, 1, 1, device=device), precision="tf32").flatten()
    assert y[0] == float("inf") and y[1].isnan() and y[2].isfinite() and y[3] == 1


def test_default_precision_on_cpu_is_ieee(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, w = draw(1, 20, 4, 4).float(), draw(20, 24, 3, 3).float()
    ieee = rawkern.conv_transpose2d(x, w, precision="ieee")
    assert torch.equal(rawkern.conv_transpose2d(x, w), ieee)
    assert not torch.equal(rawkern.conv_transpose2d(x, w, precision="tf32"), ieee)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_precision_on_a_gpu_follows_torch():
    x, w = draw(1, 20, 4, 4).float().cuda(), draw(20, 24, 3, 3).float().cuda()
    modes = {name: rawkern.conv_transpose2d(x, w, precision=name) for name in ("ieee", "tf32")}
    for allowed, name in ((True, "tf32"), (False, "ieee")):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert torch.equal(rawkern.conv_transpose2d(x, w), modes[name])


@pytest.mark.parametrize("kernel", [SPLIT], indirect=True)
def test_split_floats_keep_every_number(kernel, device):
    """Infinities, NaN, the largest numbers and small ones, whatever they are multiplied with."""
    numbers = [float("inf"), float("-inf"), float("nan"), 3.4028234e38, -3.4028e38, 1.17549e-38, 1e-40, 1 + 2**-23, 0.0]
    x = torch.tensor(numbers, device=device).view(1, 1, 1, -1)
    for factor in (1.0, 0.75, -1 + 2**-24):
        expected = x.double() * factor
        y = rawkern.conv_transpose2d(x, torch.full((1, 1, 1, 1), factor, device=device), precision="ieee")
        torch.testing.assert_close(y.double(), expected, rtol=2**-21, atol=2**-137, equal_nan=True)
        one = torch.full((1, 1, 1, 1), factor, device=device)
        y = rawkern.conv_transpose2d(one, x.view(1, -1, 1, 1), precision="ieee")  # infinite weights
        torch.testing.assert_close(y.double().flatten(), expected.flatten(), rtol=2**-21, atol=2**-137, equal_nan=True)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision must be"):
        rawkern.conv_transpose2d(draw(1, 1, 2, 2), draw(1, 1, 2, 2), precision="bf16")


# Epilogues

EPILOGUES = {
    "third model": ((Add(0.5), Minimum(0.0), GELU(), Mul(2.0)), lambda y: F.gelu((y + 0.5).clamp_max(0.0)) * 2.0),
    "clamp": ((Clamp(-0.5, 0.75), SiLU()), lambda y: F.silu(y.clamp(-0.5, 0.75))),
    "long": ((Tanh(), ELU(0.7), Mul(3.0), Sigmoid(), GELU("tanh")), None),
}


def long_chain(y):
    return F.gelu(torch.sigmoid(F.elu(torch.tanh(y), 0.7) * 3.0), approximate="tanh")


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, indirect=["kernel"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogue(name, dtype, kernel, device):
    chain, expected = EPILOGUES[name]
    expected = expected or long_chain
    inputs = {"input": draw(2, 4, 5, 4) * 0.5, "weight": draw(4, 6, 3, 3, seed=1) * 0.5, "bias": draw(6, seed=2) * 0.5}
    precision = precision_for(kernel, dtype)
    ours = lambda **k: rawkern.conv_transpose2d(**k, stride=2, epilogue=chain, **precision)  # noqa: E731
    theirs = lambda **k: expected(F.conv_transpose2d(**k, stride=2))  # noqa: E731
    check_chain(ours, theirs, inputs, dtype, device, kernel)


def check_chain(ours, theirs, inputs, dtype, device, kernel):
    if rounding := rounding_of(kernel, dtype):
        inputs = exact_in_tf32(inputs)
        assert_parity(ours, theirs, inputs, dtype=dtype, device=device, backward=False)
    assert_parity(ours, theirs, inputs, dtype=dtype, device=device, **rounding)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_epilogue_with_tensors(kernel, device):
    inputs = {
        "input": draw(2, 4, 5, 4),
        "weight": draw(4, 6, 3, 3, seed=1) * 0.5,
        "bias": draw(6, seed=2),
        "scale": draw(6, 1, 1, seed=3),
        "shift": draw(1, seed=4),
    }

    def ours(input, weight, bias, scale, shift):
        chain = Mul(scale), Tanh(), Add(shift)
        return rawkern.conv_transpose2d(input, weight, bias, epilogue=chain, **precision_for(kernel, input.dtype))

    def theirs(input, weight, bias, scale, shift):
        return torch.tanh(F.conv_transpose2d(input, weight, bias) * scale) + shift

    for dtype in DTYPES:
        check_chain(ours, theirs, inputs, dtype, device, kernel)


def test_a_new_number_compiles_nothing(device, monkeypatch):
    x, w = draw(1, 2, 3, 3).to(device), draw(2, 2, 2, 2).to(device)
    first = rawkern.conv_transpose2d(x, w, epilogue=(Add(1.0), Mul(2.0)))
    for module in ("emulator", "nvrtc"):
        monkeypatch.setattr(f"rawkern.runtime.{module}.build", lambda *_: pytest.fail("compiled again"))
    second = rawkern.conv_transpose2d(x, w, epilogue=(Add(7.0), Mul(3.0)))
    torch.testing.assert_close(second, (first / 2 + 6) * 3)


def test_epilogue_errors():
    x, w = draw(1, 2, 3, 3), draw(2, 3, 2, 2)
    with pytest.raises(TypeError, match="must be one of"):
        rawkern.conv_transpose2d(x, w, epilogue=(torch.relu,))
    with pytest.raises(RuntimeError, match="does not broadcast"):
        rawkern.conv_transpose2d(x, w, epilogue=(Add(draw(4, 1, 1)),))
    with pytest.raises(ValueError, match="per channel"):
        rawkern.conv_transpose2d(x, w, epilogue=(Add(draw(4)),))
    with pytest.raises(RuntimeError, match="dtype"):
        rawkern.conv_transpose2d(x, w, epilogue=(Add(draw(3, 1, 1).float()),))


# Derivatives

SMALL = {
    "plain": dict(),
    "strided": dict(stride=(2, 1), padding=1, output_padding=(1, 0)),
    "dilated": dict(stride=2, dilation=(1, 3), output_padding=(0, 2)),
}


def small(groups=1):
    inputs = [draw(1, 2, 3, 2), draw(2, 2 // groups, 2, 3, seed=1), draw(2, seed=2)]
    return [value.requires_grad_() for value in inputs]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name, groups, device):
    inputs = [value.detach().to(device).requires_grad_() for value in small(groups)]
    function = lambda x, w, b: rawkern.conv_transpose2d(x, w, b, groups=groups, **SMALL[name])  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradcheck_with_epilogue(device):
    inputs = [value.detach().to(device).requires_grad_() for value in (*small(), draw(2, 1, 1, seed=3))]
    function = lambda x, w, b, s: rawkern.conv_transpose2d(x, w, b, stride=2, epilogue=(GELU(), Mul(s), Tanh()))  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivative():
    """Derivatives of every order: the third of a function of the convolution agrees with torch's."""

    def third(function):
        x, w, _ = small()
        y = function(x, w).pow(3).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.pow(2).sum()
        return torch.autograd.grad(y, (x, w))

    for ours, theirs in zip(third(rawkern.conv_transpose2d), third(F.conv_transpose2d), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_unneeded_gradients_are_not_computed(monkeypatch):
    from rawkern.autograd import conv_transpose2d as module

    for needed in range(3):
        inputs = [value.detach() for value in small()]
        inputs[needed].requires_grad_()
        y = rawkern.conv_transpose2d(*inputs)
        with monkeypatch.context() as patch:
            for index, name in enumerate(("INPUT_GRADIENT", "WEIGHT_GRADIENT", "CHANNEL_SUM")):
                if index != needed:
                    patch.setattr(module, name, None)
            y.sum().backward()
        assert inputs[needed].grad is not None


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_two_runs_are_bitwise_equal(kernel, device):
    inputs = [
        value.float().to(device).requires_grad_() for value in (draw(3, 20, 30, 30), draw(20, 24, 3, 3), draw(24))
    ]
    runs = []
    for _ in range(2):
        y = rawkern.conv_transpose2d(*inputs, stride=2, **precision_for(kernel, torch.float32))
        runs.append([y, *torch.autograd.grad(y, inputs, torch.cos(y.detach()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_moments(kernel):
    """Far from zero, where squares would cancel; several tiles and warps, edges in both directions."""
    x, w = draw(2, 3, 21, 40).float().numpy(), draw(3, 5, 3, 3, seed=1).float().numpy()
    check_moments(x, w, Geometry.of(x.shape, w.shape, stride=2, padding=1), **precision_for(kernel, torch.float32))


@pytest.mark.parametrize("kernel", [DIRECT_TILE], indirect=True)
@pytest.mark.parametrize("way", ["steps", "parts"])
def test_moments_of_kernels_that_walk(way, request, kernel):
    if way == "steps":
        request.getfixturevalue("long_walks")
    x, w = draw(2, 5, 19, 40).float().numpy(), draw(5, 1, 4, 4, seed=1).float().numpy()
    check_moments(x, w, Geometry.of(x.shape, w.shape, stride=2, padding=1, groups=5))


def check_moments(x, w, geometry, **options):
    bias = np.float32([1e4, -1e4, 0, 1, 2])
    out, moments = with_moments(x, w, bias, chain_of((Mul(2.0),)), geometry, **options)
    values = 2 * out.astype(np.float64).reshape(10, -1)
    count, mean, squares = np.moveaxis(moments, 2, 0)
    assert (count.sum(1) == values.shape[1]).all()
    total = (count * mean).sum(1) / count.sum(1)
    np.testing.assert_allclose(total, values.mean(1), rtol=1e-6, atol=1e-5)
    spread = squares.sum(1) + (count * (mean - total[:, None]) ** 2).sum(1)
    np.testing.assert_allclose(spread, values.var(1) * values.shape[1], rtol=1e-5)


# The array level


def test_launchers_on_arrays(device):
    xp = np if device == "cpu" else pytest.importorskip("cupy")
    x, w, b, g = (draw(*shape).float() for shape in ((2, 4, 5, 6), (4, 3, 3, 3), (3,), (2, 3, 11, 13)))
    oracle_inputs = [value.double().requires_grad_() for value in (x, w, b)]
    oracle = F.conv_transpose2d(*oracle_inputs, stride=2)
    theirs_inputs = [value.requires_grad_() for value in (x, w, b)]
    theirs = F.conv_transpose2d(*theirs_inputs, stride=2)
    oracles = (oracle, *torch.autograd.grad(oracle, oracle_inputs[:2], g.double()))
    measures = (theirs, *torch.autograd.grad(theirs, theirs_inputs[:2], g))

    arrays = [xp.asarray(value.detach().numpy()) for value in (x, w, b, g)]
    geometry = Geometry.of(x.shape, w.shape, stride=2)
    out = xp.full(geometry.output_shape, xp.nan, dtype=xp.float32)
    results = (
        launchers.conv_transpose2d(*arrays[:3], stride=2, out=out),
        input_gradient(arrays[3], arrays[1], geometry),
        weight_gradient(arrays[0], arrays[3], geometry),
    )
    assert results[0] is out
    for ours, measure, oracle in zip(results, measures, oracles, strict=True):
        ours = torch.from_numpy(ours if xp is np else xp.asnumpy(ours))
        assert_as_accurate_as_torch(ours, measure, oracle)


def test_out_of_the_wrong_kind():
    x, w = np.zeros((1, 2, 3, 3), np.float32), np.zeros((2, 2, 2, 2), np.float32)
    for out in (np.zeros((1, 2, 4, 5), np.float32), np.zeros((1, 2, 4, 4), np.float64)):
        with pytest.raises(ValueError, match="out has"):
            launchers.conv_transpose2d(x, w, out=out)


def test_out_whose_elements_do_not_have_a_place_of_their_own():
    x, w = np.zeros((1, 2, 3, 3), np.float32), np.zeros((2, 2, 2, 2), np.float32)
    whole = np.zeros((1, 2, 4, 4), np.float32)
    read_only = whole.copy()
    read_only.flags.writeable = False
    for out in (whole[:, :, ::-1], np.lib.stride_tricks.as_strided(whole, strides=(128, 64, 0, 4)), read_only):
        with pytest.raises(ValueError, match=r"positive strides|read-only"):
            launchers.conv_transpose2d(x, w, out=out)


def test_nothing_is_kept_where_no_backward_pass_can_come(monkeypatch):
    from rawkern.autograd import conv_transpose2d as module

    kept = []
    launch = module.launch_conv_transpose2d
    monkeypatch.setattr(
        module, "launch_conv_transpose2d", lambda *a, saved, **k: kept.append(saved) or launch(*a, saved=saved, **k)
    )
    x, w, _ = small()
    rawkern.conv_transpose2d(x, w, epilogue=(GELU(),))
    with torch.no_grad():
        rawkern.conv_transpose2d(x, w, epilogue=(GELU(),))
    assert [saved is None for saved in kept] == [False, True]


# Mistakes

X, W = draw(2, 4, 5, 6), draw(4, 3, 3, 3)
MISTAKES = {
    "rank 2": (lambda f: f(X[0, 0], W), "Expected 3D"),
    "rank 5": (lambda f: f(X[None], W), "Expected 3D"),
    "weight of rank 3": (lambda f: f(X, W[0]), "weight of"),
    "channels": (lambda f: f(X[:, :3], W), "channels"),
    "output_padding": (lambda f: f(X, W, output_padding=1), "output padding must be smaller"),
    "output_padding of one axis": (
        lambda f: f(X, W, stride=(2, 1), output_padding=1),
        "output padding must be smaller",
    ),
    "negative padding": (lambda f: f(X, W, padding=-1), "negative padding"),
    "negative output_padding": (lambda f: f(X, W, stride=2, output_padding=-1), "negative output_padding"),
    "stride 0": (lambda f: f(X, W, stride=0), "stride"),
    "dilation 0": (lambda f: f(X, W, dilation=0), "dilation"),
    "groups 0": (lambda f: f(X, W, groups=0), "groups"),
    "groups that do not divide": (lambda f: f(X, W, groups=3), "divisible by 3"),
    "bias of the wrong length": (lambda f: f(X, W, draw(4)), "bias"),
    "bias of rank 2": (lambda f: f(X, W, draw(3, 1)), "bias"),
    "empty output": (lambda f: f(X, W, padding=4), "too small"),
    "mixed dtypes": (lambda f: f(X.float(), W), "float32 and float64"),
    "empty height": (lambda f: f(X[:, :, :0], W), "zero batch"),
    "no channels": (lambda f: f(X[:, :0], W[:0]), "at least 1"),
    "three strides": (lambda f: f(X, W, stride=(1, 2, 3)), "expected stride"),
    "fractional stride": (lambda f: f(X, W, stride=1.5), "'stride'"),
    "boolean stride": (lambda f: f(X, W, stride=True), "'stride'"),
    "fractional groups": (lambda f: f(X, W, groups=1.0), "'groups'"),
    "no tensor": (lambda f: f(None, W), "'input'"),
    "array for tensor": (lambda f: f(X.numpy(), W), "'input'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_raise_what_torch_raises(name, monkeypatch):
    call, message = MISTAKES[name]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        call(F.conv_transpose2d)
    monkeypatch.setattr("rawkern.runtime.kernel.Kernel.launch", lambda *_: pytest.fail("launched"))
    with pytest.raises(theirs.type, match=message):
        call(rawkern.conv_transpose2d)


def test_integers_are_refused():
    with pytest.raises(RuntimeError, match="int64"):
        rawkern.conv_transpose2d(torch.ones(1, 1, 2, 2, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64))


def test_bias_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="input and bias have different dtypes: float64 and float32"):
        rawkern.conv_transpose2d(X, W, draw(3).float())


def test_numpy_integers_and_short_tuples_are_accepted():
    ours = rawkern.conv_transpose2d(X, W, stride=np.int64(2), padding=(1,), dilation=[2])
    torch.testing.assert_close(ours, F.conv_transpose2d(X, W, stride=2, padding=1, dilation=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_mixed_devices():
    with pytest.raises(RuntimeError, match=r"cpu and cuda:0|cuda:0 and cpu"):
        rawkern.conv_transpose2d(X.cuda(), W)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kernel", [DIRECT, DIRECT_TILE], indirect=True)
def test_more_than_2_to_the_31_elements_of_few_channels(kernel):
    x = torch.randn(1, 4, 16, 2**25, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4, 1, 1, 2, device="cuda", dtype=torch.bfloat16)
    y = rawkern.conv_transpose2d(x, w, groups=4)
    last = F.conv_transpose2d(x[:, -1:, 15:, -1000:].float(), w[-1:].float())
    torch.testing.assert_close(y[:, -1:, 15:, -1000:].float(), last[..., 1:], rtol=1e-2, atol=1e-2)
    gradient = INPUT_GRADIENT((y, w), ((16, 2**25), *convolution_of(1, 0, 0, 1, 4, "ieee")))
    expected = F.conv2d(y[:, -1:, 15:, -1000:].float(), w[-1:].float())
    torch.testing.assert_close(gradient[:, -1:, 15:, -999:].float(), expected, rtol=2e-2, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_2_to_the_31_elements():
    """Offsets past 2**31 in the output, and in the input of the gradients."""
    x = torch.randn(2, 8, 2, 2**20, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(8, 260, 1, 2, device="cuda", dtype=torch.bfloat16)
    y = rawkern.conv_transpose2d(x, w, stride=(1, 2))
    assert y.numel() > 2**31
    last = F.conv_transpose2d(x[1:, :, 1:, -1000:].float(), w[:, -4:].float(), stride=(1, 2))
    torch.testing.assert_close(y[1:, -4:, 1:, -2000:].float(), last, rtol=1e-2, atol=1e-2)
    gradient = INPUT_GRADIENT((y, w), ((2, 2**20), *convolution_of((1, 2), 0, 0, 1, 1, "ieee")))
    expected = F.conv2d(y[1:, :, 1:, -2000:].float(), w.float(), stride=(1, 2))
    torch.testing.assert_close(gradient[1:, :, 1:, -1000:].float(), expected, rtol=2e-2, atol=1.0)
