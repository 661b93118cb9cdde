"""The measure itself: what it lets through and what it must not."""

import pytest
import torch

from rawkern.testing import assert_as_accurate_as_torch, assert_parity, compare, forward_backward

ORACLE = torch.linspace(-2, 2, 401, dtype=torch.float64) + 1e-9
THEIRS = ORACLE.float()


def test_torchs_own_result_passes():
    comparison = assert_as_accurate_as_torch(THEIRS, THEIRS, ORACLE)
    assert comparison.ours == comparison.theirs and 0 < comparison.ours.maximum < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_error_of_many_ulps_is_found(dtype):
    theirs = ORACLE.to(dtype)
    ours = theirs.clone()
    ours[7] += 40 * torch.finfo(dtype).eps * 2
    assert not compare(ours, theirs, ORACLE).ok


def test_the_message_says_how_many_and_where():
    ours = THEIRS.clone()
    ours[[3, 5]] += 0.5
    with pytest.raises(AssertionError, match=r"(?s)output: .*2 of 401 elements.*\(3,\).*\(5,\)"):
        assert_as_accurate_as_torch(ours, THEIRS, ORACLE, name="output")


def test_small_elements_count_only_elementwise():
    ours = THEIRS.clone()
    ours[200] *= 3  # 3e-9 instead of 1e-9
    assert compare(ours, THEIRS, ORACLE).ok
    assert not compare(ours, THEIRS, ORACLE, elementwise=True).ok


@pytest.mark.parametrize("ours, theirs", [("nan", 1.0), (1.0, "nan"), ("inf", "-inf"), ("inf", "nan"), (1.0, "inf")])
def test_nan_and_infinities_must_be_in_their_places(ours, theirs):
    ours, theirs = (torch.tensor([float(value), 2.0]) for value in (ours, theirs))
    assert not compare(ours, theirs, theirs.double()).ok
    assert compare(theirs, theirs, theirs.double()).ok


def test_the_oracles_infinity_is_as_good_as_torchs():
    """Where torch overflows inside and the exact result does not (or the other way round), either is right."""
    theirs, oracle = torch.tensor([float("nan"), 1.0]).half(), torch.tensor([1e6, 1.0]).double()
    assert compare(torch.tensor([float("inf"), 1.0]).half(), theirs, oracle).ok
    assert compare(theirs, theirs, oracle).ok
    assert not compare(torch.tensor([5.0, 1.0]).half(), theirs, oracle).ok


@pytest.mark.parametrize("ours", [THEIRS[:-1], THEIRS.double(), THEIRS[None]], ids=["shape", "dtype", "rank"])
def test_shape_and_dtype_must_be_torchs(ours):
    assert not compare(ours, THEIRS, ORACLE).ok


def test_empty_results_are_equal():
    assert compare(THEIRS[:0], THEIRS[:0], ORACLE[:0]).ok


def test_the_rounding_of_a_mode_is_allowed_if_asked_for():
    ours = THEIRS * (1 + 1e-4)
    assert not compare(ours, THEIRS, ORACLE).ok
    assert compare(ours, THEIRS, ORACLE, rounding=1e-3).ok


@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 2), lambda x: x[:, ::2], lambda x: x[:1].expand(4, 5, 6)])
def test_inputs_keep_their_strides(layout):
    x = layout(torch.randn(4, 5, 6))
    seen = []

    def function(input):
        seen.append((input.stride(), input.dtype, input.clone()))
        return input * 2

    forward_backward(function, {"input": x}, dtype=torch.float64)
    stride, dtype, values = seen[0]
    assert stride == x.stride() and dtype is torch.float64
    torch.testing.assert_close(values, x.double())


def test_parity_covers_gradients():
    x = torch.randn(5, 6)
    assert assert_parity(torch.tanh, torch.tanh, {"input": x}).keys() == {"output", "grad input"}
    with pytest.raises(AssertionError, match="grad input"):
        assert_parity(lambda input: torch.tanh(input.detach()) + (input - input.detach()), torch.tanh, {"input": x})
