"""channel_sum: every layout, both ways of walking memory, accuracy, determinism."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rawkern.autograd.dlpack import to_array
from rawkern.launchers.channel_sum import channel_sum, plan
from rawkern.testing import assert_as_accurate_as_torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def whole_numbers(*shape, seed=0):
    """Whole numbers, whose sums are exact in float32."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def others(x, axis):
    return [i for i in range(x.dim()) if i != axis % x.dim()]


def reference(x, axis):
    return x.double().sum(others(x, axis)) if x.dim() > 1 else x.double()


def check_exact(x, axis):
    assert channel_sum(to_array(x), axis).tolist() == reference(x, axis).tolist()


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple), data=st.data())
def test_shapes(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1), "axis")
    order = data.draw(st.permutations(range(len(shape))), "order in memory")
    x = whole_numbers(*(shape[i] for i in order)).permute([order.index(i) for i in range(len(shape))])
    check_exact(x, axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((16, 3, 40, 61), 1),
        ((2, 3, 200, 300), 1),
        ((1, 1, 300, 500), 1),
        ((5, 700, 8, 8), 1),
        ((64, 9, 7, 7), 1),
        ((20000, 3), 1),
        ((20000, 64), 1),
        ((3000, 37), 1),
        ((40, 4099), 1),
        ((3, 4099), 1),
        ((40, 16392), 1),
        ((4099, 40), 0),
        ((123457,), 0),
    ],
)
def test_paths(shape, axis, device):
    x = whole_numbers(*shape).to(device)
    check_exact(x, axis)
    check_exact(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape), axis)  # not aligned to 16 bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 4098), (3, 2, 4100), (3, 2, 4104), (20, 6, 33), (20, 5, 34), (20, 5, 36)])
def test_as_many_at_a_time_as_are_aligned(shape, dtype, device):
    """Rows and columns whose lengths, and memory whose beginning, are multiples of 1, 2, 4 and 8 elements."""
    size = math.prod(shape)
    memory = torch.randint(-1, 2, (size + 8,), generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    for before in (0, 1, 2, 4, 8):
        check_exact(memory[before : before + size].view(shape), 1)


@pytest.mark.parametrize(("alignment", "inner", "vector"), [(16, 4104, 8), (16, 4100, 4), (4, 4104, 2), (2, 4104, 1)])
def test_how_many_are_read_at_a_time(alignment, inner, vector):
    assert plan(3, 2, inner, 2, alignment).vector == vector


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_views(memory_format, device):
    x = whole_numbers(6, 8, 10, 12).to(device).to(memory_format=memory_format)
    for view in (
        x,
        x[::2],
        x[:, 1:5],
        x[..., ::3],
        x[:, :1],
        x[2:],
        x.transpose(1, 3),
        x[:1].expand(6, 8, 10, 12),
        x[:, :1].expand(6, 8, 10, 12),
    ):
        for axis in range(4):
            check_exact(view, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_accuracy(dtype, memory_format, device):
    """Sums of 200,000 values with a mean of one, where a running sum in the dtype would be far off."""
    x = torch.randn(2, 3, 250, 400, generator=torch.Generator().manual_seed(1)) + 1
    x = x.to(dtype).to(device).to(memory_format=memory_format)
    ours = torch.empty(3, dtype=dtype, device=device)
    channel_sum(to_array(x), out=to_array(ours))
    assert_as_accurate_as_torch(ours, x.sum((0, 2, 3)), x.double().sum((0, 2, 3)))


def test_nan_and_infinities(device):
    x = torch.zeros(4, 3, 9)
    x[1, 0, 2], x[2, 1, 3], x[0, 2, 0], x[3, 2, 8] = math.nan, math.inf, math.inf, -math.inf
    result = channel_sum(to_array(x.to(device))).tolist()
    assert math.isnan(result[0]) and result[1] == math.inf and math.isnan(result[2])


def test_two_runs_agree(device):
    for shape in ((7, 5, 61, 67), (9000, 40)):
        x = to_array(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device))
        assert channel_sum(x).tolist() == channel_sum(x).tolist()


def test_out(device):
    x = whole_numbers(4, 6, 5).to(device)
    out = to_array(torch.empty(6, device=device))
    assert channel_sum(to_array(x), out=out) is out
    assert out.tolist() == reference(x, 1).tolist()
    strided = to_array(torch.zeros(12, device=device))[::2]
    assert channel_sum(to_array(x), out=strided) is strided
    assert strided.tolist() == reference(x, 1).tolist()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: channel_sum(np.ones(3, np.float32)), IndexError, "axis 1 is out of range"),
        (lambda: channel_sum(np.ones((3, 4), np.float32), -3), IndexError, "axis -3 is out of range"),
        (lambda: channel_sum(np.ones((3, 4), np.int64)), RuntimeError, "int64"),
        (lambda: channel_sum(np.ones((3, 4), np.float32), out=np.ones(3, np.float32)), ValueError, "out has shape"),
        (lambda: channel_sum(np.ones((3, 4), np.float32), out=np.ones(4)), ValueError, "out has dtype"),
        (lambda: channel_sum([1.0]), TypeError, "array"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


SIZES = st.integers(1, 2**20)


@given(SIZES, SIZES, SIZES, st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8, 16]))
def test_plans_of_any_size(outer, channels, inner, itemsize, alignment):
    """Launches stay within what a grid holds, partial sums stay small beside the tensor, vectors fit the rows."""
    how = plan(outer, channels, inner, itemsize, alignment)
    assert how.vector == 1 or (how.vector * itemsize in (4, 8, 16) and alignment % (how.vector * itemsize) == 0)
    total = outer * channels * inner
    assert how.blocks < 2**31 * 65535
    assert how.partials <= max(total, 40_000) and (outer < 256 or inner > 64 or how.partials * 4 <= max(total, 2**20))
    if how.walk == "RowWalk":
        assert (how.slots - 1) * how.slot_length < outer * inner <= how.slots * how.slot_length
        assert inner % how.vector == 0
    else:
        assert (how.slots - 1) * how.slot_length * how.width < total <= how.slots * how.slot_length * how.width
        assert how.width % (channels * inner) == 0
        assert how.width % how.vector == 0 == total % how.vector


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(3, 2**30, dtype=torch.float16, device="cuda")
    x[2, -4:] = 1
    x[0, 0] = 5
    assert channel_sum(to_array(x), 0).tolist() == [5, 0, 4]
    assert channel_sum(to_array(x.view(2**30, 3)), 1).sum().item() == 9
