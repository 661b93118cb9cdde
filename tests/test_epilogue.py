"""Every function of the vocabulary against the torch function it is named after: value, first and second derivative."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rawkern
from rawkern.epilogue import (
    ELU,
    GELU,
    Add,
    Clamp,
    Div,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Maximum,
    Minimum,
    Mish,
    Mul,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Sub,
    Tanh,
)
from rawkern.launchers.chain import chain_of
from rawkern.launchers.pointwise import kernel as launch_kernel
from rawkern.testing import assert_as_accurate_as_torch

INF, NAN = math.inf, math.nan


def constant(x, value):
    return torch.tensor(value, dtype=x.dtype, device=x.device)


# (function, torch's, points of special interest)
CASES = [
    (Add(0.5), lambda x: x + 0.5, []),
    (Sub(0.5), lambda x: x - 0.5, []),
    (Mul(-1.7), lambda x: x * -1.7, []),
    (Mul(0.0), lambda x: x * 0.0, []),
    (Div(0.3), lambda x: x / 0.3, []),
    (Div(0.0), lambda x: x / 0.0, []),
    (Minimum(0.5), lambda x: torch.minimum(x, constant(x, 0.5)), [0.5]),
    (Minimum(NAN), lambda x: torch.minimum(x, constant(x, NAN)), []),
    (Maximum(0.5), lambda x: torch.maximum(x, constant(x, 0.5)), [0.5]),
    (Maximum(-INF), lambda x: torch.maximum(x, constant(x, -INF)), []),
    (Clamp(-0.5, 0.5), lambda x: torch.clamp(x, -0.5, 0.5), [-0.5, 0.5]),
    (Clamp(0.5, -0.5), lambda x: torch.clamp(x, 0.5, -0.5), [-0.5, 0.5]),
    (Clamp(NAN, 0.5), lambda x: torch.clamp(x, NAN, 0.5), [0.5]),
    (Clamp(-0.5, NAN), lambda x: torch.clamp(x, -0.5, NAN), [-0.5]),
    (Clamp(min=0.5), lambda x: torch.clamp(x, min=0.5), [0.5]),
    (Clamp(max=0.5), lambda x: torch.clamp(x, max=0.5), [0.5]),
    (Hardtanh(), F.hardtanh, [-1.0, 1.0]),
    (Hardtanh(-0.5, 2.0), lambda x: F.hardtanh(x, -0.5, 2.0), [-0.5, 2.0]),
    (ReLU(), F.relu, []),
    (LeakyReLU(), F.leaky_relu, []),
    (LeakyReLU(-0.5), lambda x: F.leaky_relu(x, -0.5), []),
    (LeakyReLU(0.0), lambda x: F.leaky_relu(x, 0.0), []),
    (ELU(), F.elu, [-1e-9, 1e-9]),
    (ELU(2.0), lambda x: F.elu(x, 2.0), [-1e-9, 1e-9]),
    (SiLU(), F.silu, []),
    (Mish(), F.mish, [20.0, -20.0]),
    (Hardswish(), F.hardswish, [-3.0, 3.0, -1.5, -2.999999, 2.999999]),
    (Sigmoid(), torch.sigmoid, []),
    (Tanh(), torch.tanh, []),
    (Softplus(), F.softplus, [20.0, 20.001, 19.999]),
    (Softplus(2.0, 1.0), lambda x: F.softplus(x, 2.0, 1.0), [0.5, 0.5001, 0.4999]),
    (Softplus(-2.0, 1.0), lambda x: F.softplus(x, -2.0, 1.0), [-0.5, -0.5001, -0.4999]),
    (Softplus(1.0, 1e9), lambda x: F.softplus(x, 1.0, 1e9), [200.0]),
    (GELU(), F.gelu, [-6.0, -13.0]),
    (GELU("tanh"), lambda x: F.gelu(x, approximate="tanh"), [-6.0, -13.0]),
]
# torch 2.12 and older ignore a maximum that is NaN (but not a minimum); ours does what newer ones do.
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
    CASES.append((Clamp(max=NAN), lambda x: torch.clamp(x, max=NAN), [0.5]))

SPECIAL = [0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 1e20, -1e20, 3e38, -3e38, INF, -INF, NAN]
# In these, torch selects the gradient or zero; elsewhere it multiplies.
SELECTING = (Minimum, Maximum, Clamp, Hardtanh, ReLU, LeakyReLU, ELU, Hardswish)


def ids(values):
    return [repr(value[0]) for value in values]


def orders(function, x, g=1.0):
    """Value, g * first derivative, second derivative."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad(y, x, torch.full_like(y, g), create_graph=True)
    try:
        (second,) = torch.autograd.grad(first, x, torch.ones_like(first), allow_unused=True)
    except RuntimeError:  # torch's derivative does not depend on x
        second = None
    return y.detach(), first.detach(), torch.zeros_like(x) if second is None else second


def orders_one_by_one(function, x, g=1.0):
    """The same for torch, each point alone: its vectorised CPU kernels treat NaN and infinities otherwise."""
    return [torch.cat(parts) for parts in zip(*(orders(function, point[None], g) for point in x), strict=True)]


def agree(ours, theirs, tolerance):
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return same | ((ours - theirs).abs() <= tolerance * theirs.abs().clamp_min(1e-6))


@pytest.mark.parametrize(("function", "theirs", "points"), CASES, ids=ids(CASES))
def test_special_points(function, theirs, points, device):
    """Kinks, ties, huge values, infinities, NaN: torch's answer, or where its float32 loses it, its float64 answer."""
    x = torch.tensor([*SPECIAL, *points], dtype=torch.float32)
    ours = orders(lambda x: rawkern.pointwise(x, function), x.to(device))
    single = orders_one_by_one(theirs, x)
    double = orders_one_by_one(theirs, x.double())
    # torch's own second derivative of mish overflows beyond 700, even in float64; by 500 all of them are constant.
    bounded = torch.where(x.isfinite(), x.clamp(-500, 500), x).double()
    double[2] = torch.where(double[2].isnan(), orders_one_by_one(theirs, bounded)[2], double[2])
    for name, mine, near, exact in zip(("value", "first", "second"), ours, single, double, strict=True):
        good = agree(mine.cpu().double(), near.double(), 2e-6) | agree(mine.cpu().double(), exact, 2e-6)
        shown = zip(x.tolist(), mine.tolist(), near.tolist(), exact.tolist(), strict=True)
        assert good.all(), (
            f"{name}: (x, ours, torch's, in float64) {[s for s, g in zip(shown, good, strict=True) if not g]}"
        )


SELECTING_CASES = [case for case in CASES if isinstance(case[0], SELECTING)]


@pytest.mark.parametrize(("function", "theirs", "points"), SELECTING_CASES, ids=ids(SELECTING_CASES))
def test_infinite_gradient(function, theirs, points, device):
    """Where torch selects zero for a gradient, an infinite gradient of the output leaves it zero."""
    x = torch.tensor([*SPECIAL, *points], dtype=torch.float32)
    ours = orders(lambda x: rawkern.pointwise(x, function), x.to(device), INF)[1]
    expected = orders_one_by_one(theirs, x, INF)[1]
    torch.testing.assert_close(ours.cpu(), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("function", "theirs", "points"), CASES, ids=ids(CASES))
def test_ordinary_points(function, theirs, points, device):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3001, generator=generator) * 3
    ours = orders(lambda x: rawkern.pointwise(x, function), x.to(device))
    torchs = orders(theirs, x.to(device))
    oracle = orders(theirs, x.double())
    for name, *results in zip(("value", "first", "second"), ours, torchs, oracle, strict=True):
        assert_as_accurate_as_torch(*results, name=name, elementwise=name == "value")


# GELU in float64 without the sums that cancel; and where its float32 value becomes too small to matter.
TAILS = {
    "none": (lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2, -6.5),
    "tanh": (lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), -12),
}


@pytest.mark.parametrize("approximate", TAILS)
def test_tails_do_not_cancel(approximate, device):
    """GELU's tail keeps its relative precision, where 1 + erf(x / sqrt(2)) and 1 + tanh(u) have none left."""
    exact, lowest = TAILS[approximate]
    x = torch.linspace(lowest, -4, 101)
    ours = rawkern.pointwise(x.to(device), GELU(approximate)).cpu().double()
    oracle = exact(x.double())
    keep = oracle.abs() > 1e-36
    assert ((ours - oracle).abs() / oracle.abs())[keep].max() < 5e-5
    assert (F.gelu(x, approximate=approximate).double() - oracle).abs().max() < 1e-5  # the oracle is of this function


# Chains that between them hold every function, for the dtypes in which not every function is compiled alone.
SMOOTH = (Add(0.3), SiLU(), Mul(1.7), Mish(), Sub(0.2), Sigmoid(), Div(0.3), Tanh())
BENT = (ELU(1.3), Softplus(2.0, 30.0), GELU(), Hardswish(), GELU("tanh"), LeakyReLU(0.2))
LIMITS = (Minimum(1.1), Maximum(-1.2), Clamp(-1.0, 1.0), Clamp(max=0.9), Clamp(min=-0.9), Hardtanh(-0.8, 0.8), ReLU())


def torch_smooth(x):
    return torch.tanh((torch.sigmoid(F.mish(F.silu(x + 0.3) * 1.7) - 0.2)) / 0.3)


def torch_bent(x):
    x = F.hardswish(F.gelu(F.softplus(F.elu(x, 1.3), 2.0, 30.0)))
    return F.leaky_relu(F.gelu(x, approximate="tanh"), 0.2)


def torch_limits(x):
    x = torch.maximum(torch.minimum(x, constant(x, 1.1)), constant(x, -1.2))
    return F.relu(F.hardtanh(x.clamp(-1.0, 1.0).clamp(max=0.9).clamp(min=-0.9), -0.8, 0.8))


CHAINS = {"smooth": (SMOOTH, torch_smooth), "bent": (BENT, torch_bent), "limits": (LIMITS, torch_limits)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_in_every_dtype(name, dtype, device):
    chain, theirs = CHAINS[name]
    x = (torch.randn(1003, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    ours = orders(lambda x: rawkern.pointwise(x, chain), x.to(device))
    torchs = orders(theirs, x.to(device))
    oracle = orders(theirs, x.double())
    for order, *results in zip(("value", "first", "second"), ours, torchs, oracle, strict=True):
        assert_as_accurate_as_torch(*results, name=order)


@pytest.mark.parametrize("name", CHAINS)
def test_gradcheck(name, device):
    chain, _ = CHAINS[name]
    x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rawkern.pointwise(x, chain), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rawkern.pointwise(x, chain), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ties_with_numbers_the_dtype_rounds(dtype, device):
    """x = 0.1 in float16 is a tie with 0.1, which float16 does not have, for torch.clamp, and is none for hardtanh."""
    x = torch.tensor([0.1, 0.0999, 0.1001], dtype=dtype)
    for function, theirs in (
        (Minimum(0.1), lambda x: torch.minimum(x, constant(x, 0.1))),
        (Clamp(min=0.1), lambda x: torch.clamp(x, min=0.1)),
        (Clamp(0.1, 0.5), lambda x: torch.clamp(x, 0.1, 0.5)),
        (Hardtanh(-1.0, 0.1), lambda x: F.hardtanh(x, -1.0, 0.1)),
        (Hardtanh(0.1, 1.0), lambda x: F.hardtanh(x, 0.1, 1.0)),
    ):
        ours = orders(lambda x, function=function: rawkern.pointwise(x, function), x.to(device))
        for mine, expected in zip(ours, orders_one_by_one(theirs, x), strict=True):
            assert torch.equal(mine.cpu(), expected), function


def test_a_new_number_compiles_nothing():
    def kernels(number):
        chain = chain_of((Add(number), Clamp(min=number), Softplus(number)))
        return [launch_kernel(body, "float", chain.cpp, chain.params) for body in ("Forward", "Backward")]

    assert all(a is b for a, b in zip(kernels(1.0), kernels(2.5), strict=True))


def test_nothing_of_the_user_enters_the_source():
    chain = chain_of((Add(0.123456), LeakyReLU(0.654321), Mul(np.ones((3, 1, 1), np.float32))))
    assert chain.cpp == "Chain<2, 1, Add<Number<0>>, LeakyReLU<Number<1>>, Mul<Tensor<0>>>"
    assert chain.pack([np.ones(3, np.float32)], 3)["numbers"].tolist() == [0.123456, 0.654321]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Add("a"), TypeError, "'other' must be a number or a tensor, not str"),
        (lambda: Add(None), TypeError, "not NoneType"),
        (lambda: Mul(1j), TypeError, "not complex"),
        (lambda: Minimum(torch.ones(3)), TypeError, "must be a number, not Tensor"),
        (lambda: Clamp(), RuntimeError, "At least one of 'min' or 'max' must not be None"),
        (lambda: Clamp("a"), TypeError, "'min' must be a number"),
        (lambda: Hardtanh(1.0, -1.0), ValueError, "cannot be greater than"),
        (lambda: LeakyReLU("a"), TypeError, "'negative_slope' must be a number"),
        (lambda: ELU(None), TypeError, "'alpha' must be a number"),
        (lambda: Softplus(1.0, "a"), TypeError, "'threshold' must be a number"),
        (lambda: GELU("erf"), RuntimeError, "must be either none or tanh"),
        (lambda: GELU(3), TypeError, "must be str, not int"),
        (lambda: Add(10**400), OverflowError, "too large"),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("chain", "text"),
    [(3, "not int"), ((GELU,), r"did you mean GELU\(\)"), (("ReLU",), "'ReLU'"), ((F.relu,), "function 0")],
)
def test_bad_chains(chain, text):
    with pytest.raises(TypeError, match=text):
        rawkern.pointwise(torch.ones(3), chain)


def test_functions_are_values():
    assert Add(1) == Add(1.0) and hash(Add(1)) == hash(Add(1.0))
    assert Add(1) != Sub(1) and GELU() != GELU("tanh") and Clamp(min=1) != Clamp(max=1)
    tensor = torch.ones(3, 1, 1)
    assert Add(tensor) == Add(tensor) and Add(tensor) != Add(tensor.clone())
    assert repr(Clamp(max=2)) == "Clamp(min=None, max=2.0)"
    assert repr(GELU()) == "GELU(approximate='none')"
    assert repr(ReLU()) == "ReLU()"
    assert repr(Add(tensor)) == "Add(other=Tensor of shape (3, 1, 1) and dtype float32)"
    with pytest.raises(AttributeError, match="immutable"):
        Add(1).numbers = (2,)
    for function, _, _ in CASES:
        assert repr(pickle.loads(pickle.dumps(function))) == repr(function)
        assert repr(copy.deepcopy(function)) == repr(function)
    assert torch.equal(copy.deepcopy(Mul(tensor)).tensor, tensor)
