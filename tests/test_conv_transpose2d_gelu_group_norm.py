"""conv_transpose2d -> GELU -> GroupNorm in two kernels, against torch's composition and a float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import rawkern
from rawkern.launchers.chain import IDENTITY
from rawkern.launchers.conv_transpose2d import with_moments
from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm as launch_conv_transpose2d_gelu_group_norm,
)
from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm_backward as launch_conv_transpose2d_gelu_group_norm_backward,
)
from rawkern.launchers.geometry import Geometry
from rawkern.runtime import Kernel
from rawkern.testing import TF32_ROUNDING, assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def ours(**arguments):
    return rawkern.conv_transpose2d_gelu_group_norm(**{"precision": "ieee", **arguments})


def composed(
    input, weight, conv_bias, num_groups, norm_weight=None, norm_bias=None, eps=1e-5, approximate="none", **convolution
):
    convolution.pop("precision", None)
    output = functional.conv_transpose2d(input, weight, conv_bias, **convolution)
    output = functional.gelu(output, approximate=approximate)
    if norm_weight is None and norm_bias is not None:
        norm_weight = torch.ones_like(norm_bias)  # torch's backward pass on a CPU crashes for a bias without a weight
    return functional.group_norm(output, num_groups, norm_weight, norm_bias, eps)


def problem(batch=2, channels=(3, 8), size=(5, 7), kernel=(3, 3), num_groups=4, groups=1, affine=True, **convolution):
    arguments = {
        "input": drawn(batch, channels[0], *size),
        "weight": drawn(channels[0], channels[1] // groups, *kernel, seed=1, scale=0.5),
        "conv_bias": drawn(channels[1], seed=2),
        "num_groups": num_groups,
        "groups": groups,
        **convolution,
    }
    if affine:
        arguments |= {"norm_weight": drawn(channels[1], seed=3), "norm_bias": drawn(channels[1], seed=4)}
    return arguments


PROBLEMS = {
    "the model": problem(),
    "strided": problem(stride=2, padding=1, output_padding=1, num_groups=2),
    "grouped": problem(channels=(4, 6), groups=2, num_groups=3, kernel=(2, 3), stride=(2, 1)),
    "phases without taps": problem(channels=(2, 4), kernel=(1, 2), stride=3, num_groups=1, affine=False),
    "one pixel": problem(batch=3, channels=(2, 6), size=(1, 1), kernel=(1, 1), num_groups=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_parity(device, dtype, arguments):
    assert_parity(ours, composed, arguments, dtype=dtype, device=device)


def test_tanh(device):
    assert_parity(ours, composed, problem(approximate="tanh", eps=0.1), device=device)
    plain = ours(**problem())
    assert not torch.allclose(plain, ours(**problem(approximate="tanh")), atol=1e-5)


def test_tf32(device):
    """The tensor-core kernels' statistics, also on the emulator."""
    arguments = problem(channels=(20, 24), size=(9, 11), precision="tf32")
    assert_parity(ours, composed, arguments, device=device, rounding=4 * TF32_ROUNDING)
    exact, rounded = ours(**{**arguments, "precision": "ieee"}), ours(**arguments)
    assert exact.dtype == torch.float64 and torch.equal(exact, rounded)  # TF32 is for float32 only


def test_more_channels_than_a_direct_kernel_takes(device):
    """Also in full float32 by the tensor cores of Hopper."""
    assert_parity(ours, composed, problem(channels=(20, 24), size=(9, 11)), device=device)


def test_many_tiles(device):
    """More pixels than one tile of the convolution: partial statistics are combined."""
    assert_parity(ours, composed, problem(batch=1, channels=(2, 4), size=(40, 50), num_groups=2), device=device)


@pytest.mark.parametrize("outlier", [0.0, 1e4], ids=["plain", "outlier"])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "tf32"), ("float32", "ieee"), ("float16", "tf32")])
def test_moments_next_to_a_large_mean(dtype, precision, outlier):
    """Of the tensor-core kernels, which sum around a mean of a few values, be one of these far from the others."""
    shape = (2, 32, 12, 22)
    input = (np.random.default_rng(0).standard_normal(shape) + 300).astype(dtype)
    input[:, :, 0, 0] += outlier
    geometry = Geometry.of(shape, (32, 32, 1, 1))
    weight = np.eye(32, dtype=dtype)[:, :, None, None]
    out, moments = with_moments(input, weight, None, IDENTITY, geometry, precision=precision)
    values = out.reshape(2 * 32, -1).astype(np.float64)
    count, mean, squares = moments.transpose(2, 0, 1)
    combined = (count * mean).sum(1) / values.shape[1]
    np.testing.assert_array_equal(count.sum(1), values.shape[1])
    np.testing.assert_allclose(combined, values.mean(1), rtol=1e-6)
    total = squares.sum(1) + (count * (mean - combined[:, None]) ** 2).sum(1)
    np.testing.assert_allclose(total, values.var(1) * values.shape[1], rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    num_groups=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(2, 6)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    channels_last=st.booleans(),
    affine=st.booleans(),
)
def test_any_shape(groups, num_groups, size, kernel, stride, dilation, channels_last, affine):
    arguments = problem(
        channels=(2 * groups, 2 * groups * num_groups), size=size, kernel=kernel, num_groups=num_groups, groups=groups,
        stride=stride, dilation=dilation, affine=affine,
    )  # fmt: skip
    if channels_last:
        arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    assert_parity(ours, composed, arguments)


def test_channels_last_is_kept(device):
    arguments = problem(channels=(6, 40), num_groups=5)
    arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    assert_parity(ours, composed, arguments, device=device)
    input = arguments["input"].to(device).requires_grad_()
    others = {name: value.to(device) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    output = ours(**{**arguments, **others, "input": input})
    output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert input.grad.is_contiguous(memory_format=torch.channels_last)


def test_strided_arguments(device):
    arguments = problem(channels=(3, 6), num_groups=2)
    arguments["input"] = drawn(2, 5, 6, 7).transpose(1, 3)[:, 2:5]
    arguments["norm_weight"] = drawn(6, 2)[:, 0]
    arguments["conv_bias"] = drawn(6, 2, seed=9)[:, 1]
    assert_parity(ours, composed, arguments, device=device)


def test_unbatched_input_is_normalised_as_torch_composes_it(device):
    """(C, H, W) comes out of the convolution as (C_out, H_out, W_out), of which group_norm takes H_out as channels."""
    arguments = problem(affine=False, size=(4, 7), num_groups=3)
    arguments["input"] = arguments["input"][0]
    assert_parity(ours, composed, arguments, device=device)


def test_empty_batch(device):
    arguments = problem(batch=0)
    assert_parity(ours, composed, arguments, device=device)


def test_gradcheck(device):
    names = ("input", "weight", "conv_bias", "norm_weight", "norm_bias")
    arguments = problem(batch=2, channels=(2, 4), size=(2, 3), num_groups=2, stride=2)
    tensors = [arguments.pop(name).to(device).requires_grad_() for name in names]

    def function(*tensors):
        return ours(**dict(zip(names, tensors, strict=True)), **arguments)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def launched(monkeypatch, action):
    """Names of the kernels that `action` launches."""
    names = []
    launch = Kernel.launch

    def record(kernel, *arguments, **fields):
        names.append(kernel.name)
        launch(kernel, *arguments, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "launch", record)
        action()
    return names


def test_statistics_come_from_the_convolution(device, monkeypatch):
    arguments = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in problem().items()}
    names = launched(monkeypatch, lambda: ours(**arguments))
    assert "group_norm_normalize" in names and "group_norm_row_moments" not in names


def test_unneeded_gradients_are_not_computed(device, monkeypatch):
    arguments = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in problem().items()}
    arguments["norm_bias"].requires_grad_()
    output = ours(**arguments).sum()
    names = launched(monkeypatch, output.backward)
    assert names == ["group_norm_held_gradients"]


def test_two_runs_are_equal(device):
    def run():
        arguments = problem(batch=1, channels=(3, 8), size=(30, 30))
        tensors = {
            n: v.float().to(device).requires_grad_() for n, v in arguments.items() if isinstance(v, torch.Tensor)
        }
        output = ours(**{**arguments, **tensors})
        return [output, *torch.autograd.grad(output.square().sum(), list(tensors.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_groups": 3}, RuntimeError),
        ({"num_groups": 0}, ZeroDivisionError),
        ({"norm_weight": torch.ones(7).double()}, RuntimeError),
        ({"conv_bias": torch.ones(7).double()}, RuntimeError),
        ({"norm_bias": torch.ones(8)}, RuntimeError),
        ({"input": torch.ones(2, 5).double()}, RuntimeError),
        ({"output_padding": 1}, RuntimeError),
        ({"approximate": "erf"}, RuntimeError),
        ({"norm_weight": [1.0] * 8}, TypeError),
        ({"eps": None}, TypeError),
    ],
    ids=str,
)
def test_errors_are_torchs(change, error):
    arguments = {**problem(), **change}
    for function in (composed, ours):
        with pytest.raises(error):
            function(**arguments)


def test_mixed_dtypes_are_named():
    with pytest.raises(RuntimeError, match=r"input and conv_bias.*float64 and float32"):
        ours(**{**problem(), "conv_bias": torch.ones(8)})


def test_arrays():
    arguments = problem(stride=2)
    expected = composed(**arguments)
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    function = launch_conv_transpose2d_gelu_group_norm
    np.testing.assert_allclose(function(**arrays), expected, atol=1e-12)
    saved, out, mean, rstd = np.empty(expected.shape), np.empty(expected.shape), np.empty((2, 4)), np.empty((2, 4))
    assert function(**arrays, saved=saved, out=out, mean=mean, rstd=rstd) is out
    np.testing.assert_allclose(out, expected, atol=1e-12)
    geometry = Geometry.of(arrays["input"].shape, arrays["weight"].shape, stride=2)
    grads = launch_conv_transpose2d_gelu_group_norm_backward(
        np.ones(expected.shape), arrays["input"], arrays["weight"], saved, mean, rstd, arrays["norm_weight"], geometry,
        needs=(True, False, True, True, False),
    )  # fmt: skip
    assert [grad is None for grad in grads] == [False, True, False, False, True]
    inputs = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    composed(**arguments).sum().backward()
    np.testing.assert_allclose(grads[0], inputs["input"].grad, atol=1e-11)
    np.testing.assert_allclose(grads[2], inputs["conv_bias"].grad, atol=1e-11)
    with pytest.raises(ValueError, match="saved has shape"):
        function(**arrays, saved=saved[:1])
    # Unbatched, as torch composes it: the rows of the output are its channels.
    one = {"weight": arrays["weight"], "conv_bias": arrays["conv_bias"], "num_groups": 1, "stride": 2}
    result = function(input=arrays["input"][0], **one)
    expected = composed(arguments["input"][0], arguments["weight"], arguments["conv_bias"], 1, stride=2)
    np.testing.assert_allclose(result, expected.detach(), atol=1e-12)
