"""PyTorch's own operator samples: the inputs, and the wrong inputs, that torch tests its operators with."""

import unittest.mock
from functools import partial

import pytest
import torch

import rawkern
from rawkern.testing import assert_parity, forward_backward

pytest.importorskip("expecttest", reason="torch's operator samples need expecttest")
# The import would forbid everyone in this process to set flags such as cudnn's, for the sake of torch's own tests.
with unittest.mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db

OURS = {
    "nn.functional.conv_transpose2d": rawkern.conv_transpose2d,
    "nn.functional.gelu": rawkern.gelu,
    "nn.functional.group_norm": rawkern.group_norm,
}
OPERATORS = {op.name: op for op in op_db if op.name in OURS}


def calls(name):
    """(ours, torch's, inputs) for every sample of the operator."""
    operator = OPERATORS[name]
    for sample in operator.sample_inputs("cpu", torch.float64, requires_grad=False):
        positional = {f"argument {i}": value for i, value in enumerate(sample.args)}
        named = {key: value for key, value in sample.kwargs.items() if isinstance(value, torch.Tensor)}

        def call(function, options=sample.kwargs, named=tuple(named), **values):
            tensors = {key: values.pop(key) for key in named}
            return function(*values.values(), **(options | tensors))

        yield partial(call, OURS[name]), partial(call, operator.op), {"input": sample.input, **positional, **named}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_samples(name, dtype, device):
    samples = list(calls(name))
    assert samples
    for ours, theirs, inputs in samples:
        assert_parity(ours, theirs, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("name", OURS)
def test_samples_in_float64(name, device):
    """Where torch is its own oracle: some samples cancel so far that rounding is all that is left to compare."""
    for ours, theirs, inputs in calls(name):
        expected = forward_backward(theirs, inputs, device="cpu")
        for key, value in forward_backward(ours, inputs, device=device).items():
            torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-10, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in OURS if OPERATORS[name].error_inputs_func])
def test_errors(name):
    for error in OPERATORS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
