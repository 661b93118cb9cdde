"""What the benchmarks with a minimum over channels share."""

import statistics

from .convolutions import elements
from .data import to_float64
from .oracle import gelu_derivative

#: Standard deviation of values over their number of rows. GELU of a large negative sum is zero and hides everything, so
#: the sums must stay near zero: the values are small, and shifted by what the minimum of their channels is on average.
FORWARD_SCALE = 2.0


def expected_minimum(channels):
    """The mean of the smallest of `channels` standard normal numbers (Blom 1958)."""
    return statistics.NormalDist().inv_cdf((1 - 0.375) / (channels + 0.25))


def sum_gradient(arrays, image, rounding):
    """The gradient for one image's sums, (W,): grad_output (N, 1, 1, W) times GELU's derivative at sums (N, W)."""
    sums = rounding.computed(to_float64(arrays["sums"][image]))
    return to_float64(arrays["grad_output"][image]).reshape(-1) * gelu_derivative(sums)


def sum_gradient_checks(grad_output, grad_bias):
    """The check of the gradient of a bias of one element."""
    terms = elements(grad_output.shape)
    yield (
        "grad_bias",
        to_float64(grad_bias).reshape(1),
        lambda rounding: rounding.computed(to_float64(grad_output).sum().reshape(1), terms),
    )
