"""Launchers on arrays: a second call of a kind repeats the first one's launches, and computes what a first would."""

import numpy as np
import pytest
import sweep
import torch

from rawkern import runtime
from rawkern.epilogue import GELU, Add, LeakyReLU, Mul
from rawkern.launchers import conv_transpose2d, gelu_group_norm, group_norm, min_sum_gelu_add, pointwise, repeat
from rawkern.launchers.conv_transpose2d import channel_min, input_gradient, weight_gradient, with_moments
from rawkern.launchers.conv_transpose2d_gelu_group_norm import conv_transpose2d_gelu_group_norm
from rawkern.launchers.geometry import Geometry
from rawkern.launchers.group_norm import group_norm_backward
from rawkern.launchers.pointwise import pointwise_backward
from rawkern.runtime import Kernel

GEOMETRY = Geometry.of((2, 6, 3, 4), (6, 8, 3, 3), 2, 1)


def draw(*shape, seed=0, dtype="float32"):
    return sweep.numbers(shape, np.dtype(dtype), seed)


CALLS = {
    "convolution": (conv_transpose2d, lambda s: (draw(2, 6, 3, 4, seed=s), draw(6, 8, 3, 3, seed=s + 1)), (None, 2, 1)),
    "bias": (conv_transpose2d, lambda s: (draw(2, 6, 3, 4, seed=s), draw(6, 8, 3, 3, seed=s + 1), draw(8, seed=s)), ()),
    "channels-last": (
        conv_transpose2d,
        lambda s: (sweep.channels_last(draw(2, 6, 3, 4, seed=s)), draw(6, 8, 3, 3, seed=s + 1)),
        (),
    ),
    "no batch": (conv_transpose2d, lambda s: (draw(6, 3, 4, seed=s), draw(6, 8, 3, 3, seed=s + 1)), ()),
    "input gradient": (
        input_gradient,
        lambda s: (draw(*GEOMETRY.output_shape, seed=s), draw(6, 8, 3, 3, seed=s + 1)),
        (GEOMETRY,),
    ),
    "weight gradient": (
        weight_gradient,
        lambda s: (draw(2, 6, 3, 4, seed=s), draw(*GEOMETRY.output_shape, seed=s + 1)),
        (GEOMETRY,),
    ),
    "several results": (
        channel_min,
        lambda s: (draw(2, 6, 3, 4, seed=s), draw(6, 8, 3, 3, seed=s + 1), draw(8, seed=s)),
        (GEOMETRY,),
    ),
    "workspace": (group_norm, lambda s: (draw(2, 6, 30, 70, seed=s),), (3,)),
    "several kernels": (
        conv_transpose2d_gelu_group_norm,
        lambda s: (draw(2, 6, 3, 4, seed=s), draw(6, 8, 3, 3, seed=s + 1), draw(8, seed=s + 2)),
        (2,),
    ),
    "no elements": (pointwise, lambda s: (draw(0, 4),), (GELU(),)),
}


def values(results):
    return [np.array(result) for result in (results if isinstance(results, (tuple, list)) else (results,))]


def same(first, second):
    assert type(first) is type(second)
    for one, other in zip(values(first), values(second), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.fixture
def decisions(monkeypatch):
    """The names of kernels that launchers decided to launch."""
    names = []
    launch = Kernel.launch

    def note(self, *arguments, **fields):
        names.append(self.name)
        return launch(self, *arguments, **fields)

    monkeypatch.setattr(Kernel, "launch", note)
    return names


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_repeats_the_first(name, decisions):
    launcher, inputs, others = CALLS[name]
    launcher(*inputs(0), *others)
    decisions.clear()
    arrays = inputs(5)
    before = [array.copy() for array in arrays]
    second = launcher(*arrays, *others)
    assert not decisions
    repeat.forget_plans()
    fresh = launcher(*arrays, *others)
    same(second, fresh)
    for array, kept in zip(arrays, before, strict=True):
        assert np.array_equal(array, kept)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (second, fresh)), strict=True):
        assert one.strides == other.strides


def test_results_are_new_arrays():
    x = draw(3, 4)
    first = pointwise(x, GELU())
    kept = first.copy()
    pointwise(x + 1, GELU())
    assert np.array_equal(first, kept)


def test_given_outputs_are_written_and_returned(decisions):
    x = draw(3, 4)
    for i in range(2):
        out = np.full_like(x, np.nan)
        assert pointwise(x + i, GELU(), out=out) is out
        assert np.array_equal(out, pointwise(x + i, GELU()))
    assert len(decisions) == 2  # with `out` and without


def test_numbers_and_kinds_of_functions_are_told_apart():
    x = draw(3, 4)
    for chain in ((Add(0.5),), (Add(0.25),), (Mul(0.5),), (LeakyReLU(0.0),), (LeakyReLU(-0.0),), (Add(0.5), GELU())):
        expected = values(pointwise(x, chain))
        assert np.array_equal(values(pointwise(x, chain)), expected)
        repeat.forget_plans()
        assert np.array_equal(values(pointwise(x, chain)), expected)


def test_operands_are_those_of_the_call(decisions):
    x = draw(2, 3, 4)
    for seed in range(3):
        operand = draw(3, 1, seed=seed)
        assert np.allclose(pointwise(x, Add(operand)), x + operand)
    assert len(decisions) == 1


def test_one_array_given_twice_is_another_kind_of_call():
    x, g = draw(3, 4), draw(3, 4, seed=1)
    apart = pointwise_backward(g, x, GELU())[0]
    together = pointwise_backward(x, x, GELU())[0]
    assert np.array_equal(pointwise_backward(g, x, GELU())[0], apart)
    assert np.array_equal(pointwise_backward(x.copy(), x, GELU())[0], together)


def test_only_gradients_that_are_needed():
    x, g = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    mean, rstd = np.empty((2, 2)), np.empty((2, 2))
    group_norm(x, 2, mean=mean, rstd=rstd)
    for needs in ((True, False, False), (False, True, False), (True, False, False)):
        gradients = group_norm_backward(g, x, mean, rstd, draw(4), needs=needs)
        assert [gradient is not None for gradient in gradients] == list(needs)


def test_a_library_s_copies_are_decided_anew(decisions):
    for _ in range(2):
        x = draw(3, 8)[:, ::2]
        same(pointwise(x, GELU()), pointwise(x.copy(), GELU()))
        assert np.array_equal(pointwise(x[::-1], GELU()), pointwise(x[::-1].copy(), GELU()))


def test_errors_stay_errors():
    x, weight = draw(2, 6, 3, 4), draw(6, 8, 3, 3)
    for _ in range(2):
        conv_transpose2d(x, weight, None, 1)
        with pytest.raises(TypeError, match="stride"):
            conv_transpose2d(x, weight, None, True)
        with pytest.raises(RuntimeError, match="dtype"):
            conv_transpose2d(x, weight.astype("f8"))
        out = np.empty_like(x)
        out.flags.writeable = False
        pointwise(x, GELU(), out=np.empty_like(x))
        with pytest.raises(ValueError, match="read-only"):
            pointwise(x, GELU(), out=out)


def test_a_kernel_that_fails_is_no_plan(monkeypatch):
    x = draw(3, 4)
    with monkeypatch.context() as patched:
        patched.setattr(Kernel, "launch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            pointwise(x, GELU())
    same(pointwise(x, GELU()), pointwise(x, GELU()))


def test_fused_models_and_moments_repeat(decisions):
    for seed in (0, 7):
        x, weight = draw(2, 6, 3, 4, seed=seed), draw(6, 8, 3, 3, seed=seed + 1)
        results = with_moments(x, weight, None, sweep.MOMENTS, GEOMETRY), min_sum_gelu_add(x, draw(1))
        norm = gelu_group_norm(x, 2)
        if seed == 0:
            decisions.clear()
    assert not decisions
    repeat.forget_plans()
    fresh = with_moments(x, weight, None, sweep.MOMENTS, GEOMETRY), min_sum_gelu_add(x, draw(1))
    for one, other in zip((*results, norm), (*fresh, gelu_group_norm(x, 2)), strict=True):
        same(one, other)


def test_a_repeated_call_takes_few_steps():
    from test_host_time import calls_in

    x, weight, bias = draw(2, 6, 3, 4), draw(6, 8, 3, 3), draw(8)
    deciding = calls_in(lambda: conv_transpose2d(x, weight, bias, 2, 1))
    repeating = calls_in(lambda: conv_transpose2d(x, weight, bias, 2, 1))
    assert repeating <= 120 and repeating < deciding / 3, (repeating, deciding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_current_stream_is_that_of_each_call():
    import cupy

    x = cupy.asarray(draw(64, 64))
    expected = pointwise(x, GELU())
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        results = [pointwise(x, GELU()) for _ in range(3)]
    given = pointwise(x, GELU(), stream=stream)
    stream.synchronize()
    for result in (*results, given):
        assert (result == expected).all()


def test_pointers_of_streams():
    assert runtime.device_of(draw(1)).stream_pointer(None) == 0
