"""What a call costs on the host, counted in calls of functions, which no other load on the machine changes.

A repeated call makes dozens; one that decides anew makes thousands.
"""

import sys

import pytest
import torch
from public_ops import OPS

from rawkern.autograd.operator import forget_plans

#: Calls of functions in Python and in C on a CPU: without gradients, with them, and of a backward pass, of which 50 to
#: 70 are PyTorch's own. Where functions of a chain are made for the call, that counts too, and so does a second
#: operator where what the first one read is to be freed before the second one's results are allocated.
CALLS = {
    "conv_transpose2d": (54, 59, 118),
    "conv_transpose2d with an epilogue": (118, 127, 176),
    "gelu": (29, 34, 99),
    "pointwise": (79, 84, 111),
    "group_norm": (55, 61, 121),
    "gelu_group_norm": (56, 62, 122),
    "conv_transpose2d_gelu_group_norm": (77, 87, 188),
    "min_sum_gelu_add": (52, 66, 113),
    "conv_transpose2d_min_sum_gelu_add": (69, 83, 133),
}
#: For another version of PyTorch, and for a GPU, where streams and the current device are looked up.
RESERVE = 15


def calls_in(function):
    """How many functions, in Python and in C, `function` calls in this thread."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", OPS)
def test_calls(name, device):
    op = OPS[name]
    for requires_grad, calls in zip((False, True), CALLS[name][:2], strict=True):
        tensors = op.inputs(torch.float32, device, requires_grad=requires_grad)
        forget_plans()
        # The second call finds room for the parameters of launches.
        deciding, _, repeating = (calls_in(lambda tensors=tensors: op.ours(*tensors)) for _ in range(3))
        assert repeating <= calls + RESERVE and repeating < deciding / 3, (repeating, deciding)


@pytest.mark.parametrize("name", OPS)
def test_calls_of_backward(name):
    """On a CPU backward passes run in the thread that asks for them."""
    op = OPS[name]
    tensors = op.inputs(torch.float32, requires_grad=True)
    counts = []
    for _ in range(3):
        output = op.ours(*tensors)
        grad = torch.ones_like(output)
        counts.append(calls_in(lambda output=output, grad=grad: torch.autograd.grad(output, tensors, grad)))
    assert counts[-1] <= CALLS[name][2] + RESERVE and counts[-1] < counts[0] / 3, counts


@pytest.mark.parametrize("name", OPS)
def test_other_memory_is_no_other_call(name):
    """Training steps on new tensors, as every batch brings them, decide nothing after the first."""
    op = OPS[name]
    counts = []
    for _ in range(5):
        tensors = op.inputs(torch.float32, requires_grad=True)
        grad = torch.ones_like(op.ours(*tensors))
        counts.append(calls_in(lambda t=tensors, g=grad: torch.autograd.grad(op.ours(*t), t, g)))
    assert max(counts[2:]) <= sum(CALLS[name][1:]) + RESERVE, counts
