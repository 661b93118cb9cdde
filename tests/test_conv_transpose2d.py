"""conv_transpose2d and its gradients: parity with torch, derivatives, layouts, precision modes, epilogues, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rawkern
from rawkern import launchers
from rawkern.epilogue import ELU, GELU, Add, Clamp, Minimum, Mul, Sigmoid, SiLU, Tanh
from rawkern.launchers.conv_transpose2d import input_gradient, weight_gradient
from rawkern.launchers.geometry import Geometry
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


def check(inputs, dtype, device, **options):
    assert_parity(rawkern.conv_transpose2d, F.conv_transpose2d, inputs, dtype=dtype, device=device, **options)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, device):
    check(CASES[case], dtype, device)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight"])
def test_layouts(layout, which, device):
    inputs = problem(2, (4, 6), (5, 6), (3, 2), stride=2, padding=1)
    inputs[which] = LAYOUTS[layout](inputs[which])
    check(inputs, torch.float32, device)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype, device):
    inputs = {
        name: value.to(dtype).to(device)
        for name, value in problem(0, (3, 4), (5, 6), (3, 3)).items()
        if name != "groups"
    }
    leaves = [value.requires_grad_() for value in inputs.values()]
    y = rawkern.conv_transpose2d(**inputs)
    assert y.shape == (0, 4, 7, 8)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in gradients] == [value.shape for value in leaves]
    assert all((g == 0).all() for g in gradients)


def test_infinities_and_nan_stay_where_they_belong(device):
    """A value that is not finite reaches the outputs its taps reach, and no others."""
    x = draw(1, 3, 6, 6)
    x[0, 1, 2, 3], x[0, 0, 5, 0], x[0, 2, 0, 5] = float("inf"), float("nan"), float("-inf")
    check(problem(1, (3, 5), (6, 6), (3, 3), stride=2) | {"input": x}, torch.float32, device, backward=False)


# Precision of float32 products


@pytest.mark.parametrize(
    "case", ["first model", "everything differs between height and width", "many channels", "depthwise"]
)
def test_tf32(case, device):
    """Within what rounding both operands to TF32 does, and not by accident as exact as float32."""
    inputs = CASES[case]
    ours = lambda *a, **k: rawkern.conv_transpose2d(*a, **k, precision="tf32")  # noqa: E731
    assert_parity(ours, F.conv_transpose2d, inputs, dtype=torch.float32, device=device, rounding=TF32_ROUNDING)
    values = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    oracle = F.conv_transpose2d(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
    error = (ours(**values) - oracle).abs().max() / oracle.abs().max()
    assert error > 1e-5


def test_tf32_keeps_infinity_and_nan(device):
    x = torch.zeros(1, 1, 1, 4, device=device)
    x[0, 0, 0] = torch.tensor([float("inf"), float("nan"), 3e38, 1.0])
    y = rawkern.conv_transpose2d(x, torch.ones(1, 1, 1, 1, device=device), precision="tf32").flatten()
    assert y[0] == float("inf") and y[1].isnan() and y[2].isfinite() and y[3] == 1


def test_default_precision_on_cpu_is_ieee(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, w = draw(1, 8, 4, 4).float(), draw(8, 4, 3, 3).float()
    ieee = rawkern.conv_transpose2d(x, w, precision="ieee")
    assert torch.equal(rawkern.conv_transpose2d(x, w), ieee)
    assert not torch.equal(rawkern.conv_transpose2d(x, w, precision="tf32"), ieee)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_precision_on_a_gpu_follows_torch():
    x, w = draw(1, 8, 4, 4).float().cuda(), draw(8, 4, 3, 3).float().cuda()
    modes = {name: rawkern.conv_transpose2d(x, w, precision=name) for name in ("ieee", "tf32")}
    for allowed, name in ((True, "tf32"), (False, "ieee")):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert torch.equal(rawkern.conv_transpose2d(x, w), modes[name])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogue(name, dtype, device):
    chain, expected = EPILOGUES[name]
    expected = expected or long_chain
    inputs = {"input": draw(2, 4, 5, 4) * 0.5, "weight": draw(4, 6, 3, 3, seed=1) * 0.5, "bias": draw(6, seed=2) * 0.5}
    ours = lambda **k: rawkern.conv_transpose2d(**k, stride=2, epilogue=chain)  # noqa: E731
    assert_parity(ours, lambda **k: expected(F.conv_transpose2d(**k, stride=2)), inputs, dtype=dtype, device=device)


def test_epilogue_with_tensors(device):
    inputs = {
        "input": draw(2, 4, 5, 4),
        "weight": draw(4, 6, 3, 3, seed=1) * 0.5,
        "bias": draw(6, seed=2),
        "scale": draw(6, 1, 1, seed=3),
        "shift": draw(1, seed=4),
    }

    def ours(input, weight, bias, scale, shift):
        return rawkern.conv_transpose2d(input, weight, bias, epilogue=(Mul(scale), Tanh(), Add(shift)))

    def theirs(input, weight, bias, scale, shift):
        return torch.tanh(F.conv_transpose2d(input, weight, bias) * scale) + shift

    for dtype in DTYPES:
        assert_parity(ours, theirs, inputs, dtype=dtype, device=device)


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
            for index, name in enumerate(("InputGradient", "WeightGradient", "ChannelSum")):
                if index != needed:
                    patch.setattr(module, name, None)
            y.sum().backward()
        assert inputs[needed].grad is not None


def test_two_runs_are_bitwise_equal(device):
    inputs = [
        value.float().to(device).requires_grad_() for value in (draw(3, 20, 30, 30), draw(20, 24, 3, 3), draw(24))
    ]
    runs = []
    for _ in range(2):
        y = rawkern.conv_transpose2d(*inputs, stride=2)
        runs.append([y, *torch.autograd.grad(y, inputs, torch.cos(y.detach()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


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
def test_more_than_2_to_the_31_elements():
    """Offsets past 2**31 in the output, and in the input of the gradients."""
    x = torch.randn(2, 8, 2, 2**20, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(8, 260, 1, 2, device="cuda", dtype=torch.bfloat16)
    y = rawkern.conv_transpose2d(x, w, stride=(1, 2))
    assert y.numel() > 2**31
    last = F.conv_transpose2d(x[1:, :, 1:, -1000:].float(), w[:, -4:].float(), stride=(1, 2))
    torch.testing.assert_close(y[1:, -4:, 1:, -2000:].float(), last, rtol=1e-2, atol=1e-2)
    geometry = Geometry.of(x.shape, w.shape, stride=(1, 2))
    from rawkern.autograd.conv_transpose2d import InputGradient

    gradient = InputGradient.apply(y, w, geometry, "ieee")
    expected = F.conv2d(y[1:, :, 1:, -2000:].float(), w.float(), stride=(1, 2))
    torch.testing.assert_close(gradient[1:, :, 1:, -1000:].float(), expected, rtol=2e-2, atol=1.0)
